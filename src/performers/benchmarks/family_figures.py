"""What `performers benchmark family` makes of its cells: accuracies, correlations, and what a context gains, with intervals.

Cells go in as they were measured; rows for the report come out. Intervals are 95 % bootstrap intervals, over families for their
residues and over variants for an assay. What is compared is drawn together: a gain is measured on the same families or variants.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from performers.benchmarks.experiment import Figures
from performers.randomness import derive_seed
from performers.tools.agreement import ranks

# What is held against what: is there a gain, is it the family's, and does a wrong one harm?
COMPARISONS = (("own", "none"), ("own", "wrong"), ("wrong", "none"))
_RESAMPLES = 1000
_Floats = npt.NDArray[np.float64]


def named(context: str) -> str:
    """A context, for people."""
    return {"none": "no context", "own": "its own family", "wrong": "a wrong family"}[context]


def accuracies(cells: Sequence[Figures], seed: int) -> list[Figures]:
    """A row for each model and context: accuracy and perplexity over all residues, with intervals over families."""
    rows: list[Figures] = []
    for cell in cells:
        right, count, loss = (np.array(cell[key], dtype=float) for key in ("right", "residues", "loss"))
        draws = _draws(len(count), seed)
        rows.append(
            {
                "model": cell["model"],
                "context": cell["context"],
                "accuracy": right.sum() / count.sum(),
                "interval": _interval(right[draws].sum(1) / count[draws].sum(1)),
                "perplexity": float(np.exp(loss.sum() / count.sum())),
                "families": len(count),
                "residues": int(count.sum()),
            }
        )
    return rows


def verdicts(cells: Sequence[Figures], seed: int) -> list[Figures]:
    """What a context gains over another in accuracy, on the same residues: the comparisons of `COMPARISONS`, for each model."""
    found = {(cell["model"], cell["context"]): cell for cell in cells}

    def gained(model: str, context: str, other: str) -> tuple[float, _Floats]:
        one, against = found[model, context], found[model, other]
        more = np.array(one["right"], dtype=float) - np.array(against["right"], dtype=float)
        count = np.array(one["residues"], dtype=float)
        draws = _draws(len(count), seed)
        return float(more.sum() / count.sum()), more[draws].sum(1) / count[draws].sum(1)

    return [
        _verdict(model, context, other, *gained(model, context, other))
        for model in dict.fromkeys(cell["model"] for cell in cells)
        for context, other in COMPARISONS
        if (model, context) in found and (model, other) in found
    ]


def agreements(cells: Sequence[Figures], seed: int) -> tuple[list[Figures], list[Figures]]:
    """How well each model and context ranks the variants of an assay: Spearman's correlations, and what a context gains.

    Arguments:
        cells: as `performers.benchmarks.family_assay` measured them; the variants that all of them scored count.
        seed: of the bootstrap.

    Returns:
        A row for each cell, "spearman" and "interval" None where all its scores are equal; and the verdicts on each model.
    """
    if not cells:
        return [], []
    shared = sorted(set.intersection(*({*cell["rows"]} for cell in cells)))
    scores: list[_Floats] = []
    measured: _Floats = np.zeros(0)
    for cell in cells:
        place = {row: number for number, row in enumerate(cell["rows"])}
        chosen = [place[row] for row in shared]
        scores.append(np.array(cell["scores"], dtype=float)[chosen])
        measured = np.array(cell["measured"], dtype=float)[chosen]
    values = _spearman(measured, scores)
    drawn = np.stack([_spearman(measured[draw], [one[draw] for one in scores]) for draw in _draws(len(shared), seed)])
    rows = [
        {
            "model": cell["model"],
            "context": cell["context"],
            "spearman": float(values[number]),
            "interval": _interval(drawn[:, number]),
            "variants": len(shared),
        }
        for number, cell in enumerate(cells)
    ]
    at = {(cell["model"], cell["context"]): number for number, cell in enumerate(cells)}
    gains = [
        _verdict(model, context, other, float(values[one] - values[against]), drawn[:, one] - drawn[:, against])
        for model in dict.fromkeys(cell["model"] for cell in cells)
        for context, other in COMPARISONS
        if (one := at.get((model, context))) is not None and (against := at.get((model, other))) is not None
    ]
    return rows, gains


def _verdict(model: str, context: str, other: str, gain: float, drawn: _Floats) -> Figures:
    interval = _interval(drawn)
    if interval is None:
        outcome, said = "undecided against", "the scores are all equal"
    else:
        low, high = interval
        outcome = "above" if low > 0 else "below" if high < 0 else "undecided against"
        said = f"{gain:+.4f}, {low:+.4f} to {high:+.4f}"
    text = f"{model}: {named(context)} {outcome} {named(other)} ({said})."
    return {"model": model, "context": context, "against": other, "gain": gain, "interval": interval, "text": text}


def _spearman(measured: _Floats, scores: Sequence[_Floats]) -> _Floats:
    """(n,) rank correlations of each of n scores with what was measured; NaN where one side does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.corrcoef([ranks(measured), *(ranks(one) for one in scores)]))[0, 1:]


def _interval(drawn: _Floats) -> list[float] | None:
    """Of the figures of all draws; None where most of them are undefined."""
    found = drawn[np.isfinite(drawn)]
    if len(found) <= len(drawn) / 2:
        return None
    return [float(bound) for bound in np.quantile(found, [0.025, 0.975])]


def _draws(count: int, seed: int) -> npt.NDArray[np.int64]:
    """(resamples, count) numbers of families or variants, the same for all that is compared."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap")))
    return generator.integers(count, size=(_RESAMPLES, count))
