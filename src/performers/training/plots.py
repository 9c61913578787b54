"""The loss curve of a run as a picture: the log in, a PNG out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def plot_loss(log: Path, picture: Path, title: str, loss: str = "loss (nats per residue)") -> None:
    """Draws the training loss of every step and the evaluations in `log.jsonl` against the step.

    Arguments:
        log: the run's log, one JSON object a line.
        picture: the PNG to write.
        title: the heading.
        loss: what the vertical axis shows.
    """
    from matplotlib.figure import Figure

    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    training = [(entry["step"], entry["loss"]) for entry in entries if "learning_rate" in entry]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if not training:
        return  # the log has been removed: there is nothing to draw
    axes.plot(*zip(*training, strict=True), color="#9aa5b1", linewidth=0.8, label="training, each step")
    window = max(1, len(training) // 50)
    if window > 1:
        smooth = [
            (training[end - 1][0], sum(loss for _, loss in training[end - window : end]) / window)
            for end in range(window, len(training) + 1)
        ]
        axes.plot(*zip(*smooth, strict=True), color="#1f4e79", label=f"training, mean of {window} steps")
    for name, colour in (("validation", "#c2410c"), ("ood", "#15803d")):
        points = [(entry["step"], entry["loss"]) for entry in entries if entry.get("evaluation") == name]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=name)
    baselines = [
        entry["baseline_loss"] for entry in entries if "baseline_loss" in entry and entry["evaluation"] == "validation"
    ]
    if baselines:
        axes.axhline(baselines[-1], color="black", linestyle=":", linewidth=1, label="unigram baseline (validation)")
    axes.set(xlabel="optimizer step", ylabel=loss, title=title)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(picture, dpi=150)
