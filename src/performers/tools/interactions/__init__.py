"""`interact`: which proteins interact, by reading them together.

From the bottom up:

- `pairs`: files of pairs and groups, and sets of pairs that do not leak.
- `summaries`: what is kept of a protein that was read: a mean and a FAVOR state, which add up to contexts.
- `model`: the head, which turns summaries into a logit for each pair, and the folder of a model.
- `figures`: AUROC, AUPR and calibration, with intervals that resample proteins; the verdict.
- `baselines`: what a model has to beat.
- `scorer`: proteins ready to meet, pair by pair or in groups.
- `training` and `learning`: `interact train`, a `Task` of the one training loop.
- `prediction` and `outputs`: `interact predict`, a `Tool`, and the files it leaves.
"""
