"""How well scores of pairs tell those that interact from those that do not, with intervals that respect the proteins.

Pairs share proteins, so pairs are not independent, and resampling them would make intervals far too narrow. Here proteins are
resampled: a pair counts as often as the product of how often its two proteins were drawn (the pigeonhole bootstrap, Owen 2007).
Scores and labels in, figures and a picture out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.randomness import derive_seed

RESAMPLES = 200
_BINS = 10

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


class Curve:
    """Scores of pairs in order, ready to be weighed again and again.

    Arguments:
        scores: (K,) more is likelier to interact.
        labels: (K,) zeros and ones.
    """

    def __init__(self, scores: _Floats, labels: _Ints) -> None:
        values, self._place = np.unique(scores, return_inverse=True)
        self._levels, self._labels = len(values), labels.astype(np.float64)
        self._right = ((scores > 0) == (labels > 0)).astype(np.float64)

    def areas(self, weights: _Floats | None = None) -> tuple[float, float]:
        """The areas under the ROC and under the precision-recall curve (average precision); NaN without both labels.

        Ties count half in the first, and are one point of the second.

        Arguments:
            weights: (K,) how often each pair counts; once if None.
        """
        weights = np.ones(len(self._labels)) if weights is None else weights
        positive = np.bincount(self._place, weights * self._labels, self._levels)[::-1]
        negative = np.bincount(self._place, weights * (1 - self._labels), self._levels)[::-1]
        positives, negatives = positive.sum(), negative.sum()
        if not positives or not negatives:
            return float("nan"), float("nan")
        true, false = np.cumsum(positive), np.cumsum(negative)
        roc = (positive * (negatives - false + negative / 2)).sum() / (positives * negatives)
        seen = true + false
        precision = np.divide(true, seen, out=np.zeros_like(true), where=seen > 0)
        return float(roc), float((positive * precision).sum() / positives)

    def figures(self, weights: _Floats | None = None) -> tuple[float, float, float]:
        """The two areas, and the share of pairs whose score is above 0 exactly if they interact."""
        total = len(self._right) if weights is None else weights.sum()
        right = self._right if weights is None else weights * self._right
        return *self.areas(weights), float(right.sum() / total) if total else float("nan")


def resampled_weights(pairs: _Ints, seed: int, resamples: int = RESAMPLES) -> Iterator[_Floats]:
    """How often each pair (K, 2) counts in each resample of the proteins."""
    proteins, inverse = np.unique(pairs, return_inverse=True)
    inverse = inverse.reshape(pairs.shape)
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap over proteins")))
    for _ in range(resamples):
        drawn = np.bincount(generator.integers(len(proteins), size=len(proteins)), minlength=len(proteins))
        yield (drawn[inverse[:, 0]] * drawn[inverse[:, 1]]).astype(np.float64)


def measure(scores: Mapping[str, _Floats], labels: _Ints, pairs: _Ints, *, seed: int, first: str) -> dict[str, Any]:
    """The figures of several systems on the same pairs.

    Arguments:
        scores: (K,) of each system, above 0 where it says that a pair interacts.
        labels: (K,).
        pairs: (K, 2) indices of proteins.
        seed: of the resamples.
        first: the system that the others are compared with.

    Returns:
        pairs, positives, proteins, base_rate; under "systems" for each: auroc, aupr, accuracy, their 95 % intervals,
        aupr_per_protein, and "behind": the interval of the AUROC of `first` minus its own. An interval is None where no resample
        had both labels.
    """
    curves = {name: Curve(values, labels) for name, values in scores.items()}
    drawn = np.array(
        [[curve.figures(weights) for curve in curves.values()] for weights in resampled_weights(pairs, seed)]
    )
    reference = drawn[:, list(curves).index(first), 0]
    systems: dict[str, Any] = {}
    for column, (name, curve) in enumerate(curves.items()):
        system: dict[str, Any] = {}
        for place, (key, value) in enumerate(zip(("auroc", "aupr", "accuracy"), curve.figures(), strict=True)):
            system |= {key: value, f"{key}_interval": _interval(drawn[:, column, place])}
        system["aupr_per_protein"] = per_protein(scores[name], labels, pairs)
        if name != first:
            system["behind"] = _interval(reference - drawn[:, column, 0])
        systems[name] = system
    return {
        "pairs": len(labels),
        "positives": int(labels.sum()),
        "proteins": len(np.unique(pairs)),
        "base_rate": float(labels.mean()),
        "systems": systems,
    }


def _interval(values: _Floats) -> list[float] | None:
    return interval(values) if np.isfinite(values).any() else None


def interval(values: _Floats) -> list[float]:
    """The 95 % percentile interval; NaN where no resample had both labels."""
    finite = values[np.isfinite(values)]
    return [float("nan")] * 2 if not len(finite) else [float(x) for x in np.quantile(finite, [0.025, 0.975])]


def per_protein(scores: _Floats, labels: _Ints, pairs: _Ints) -> dict[str, float | int] | None:
    """Average precision among the pairs of one protein, mean over the proteins that have both labels.

    What a protein's number of partners gives away is of no use here; a table whose negatives are random has to be judged so.

    Returns:
        aupr; base_rate, the mean of the shares of positives; proteins. None where no protein has both labels.
    """
    ends = np.concatenate([pairs[:, 0], pairs[:, 1]])
    rows = np.tile(np.arange(len(pairs)), 2)
    order = np.argsort(ends, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(ends[order]) > 0])
    found: list[tuple[float, float]] = []
    for chosen in np.split(rows[order], starts[1:]):
        share = float(labels[chosen].mean())
        if 0 < share < 1:
            found.append((Curve(scores[chosen], labels[chosen]).areas()[1], share))
    if not found:
        return None
    precision, share = np.mean(found, axis=0)
    return {"aupr": float(precision), "base_rate": float(share), "proteins": len(found)}


NO_BETTER = "no better than its baselines on held-out proteins"
BETTER = "better than its baselines on held-out proteins"
NOT_MEASURED = "not measured: there were too few pairs to hold any out"


def verdict(figures: Mapping[str, Any] | None, first: str) -> str:
    """What the intervals of `measure` say of a system: better only if it is surely ahead of every other one."""
    if figures is None:
        return NOT_MEASURED
    others = [system for name, system in figures["systems"].items() if name != first]
    return BETTER if all(system["behind"] and system["behind"][0] > 0 for system in others) else NO_BETTER


def with_interval(system: Mapping[str, Any], key: str) -> str:
    """A figure of a system and its interval, for people."""
    low_high = system[f"{key}_interval"]
    return f"{system[key]:.3f}" + ("" if low_high is None else " ({:.3f} to {:.3f})".format(*low_high))


def ahead(system: Mapping[str, Any]) -> str:
    """By how much the first system is ahead of another, an interval, for people; empty for the first itself."""
    return "{:+.3f} to {:+.3f}".format(*system["behind"]) if system.get("behind") else ""


def calibration(probabilities: _Floats, labels: _Ints) -> dict[str, Any]:
    """Predicted probabilities against what came true, in bins of equally many pairs.

    Returns:
        predicted, observed, pairs of each bin, and error, the mean distance between the first two (expected calibration error).
    """
    parts = [part for part in np.array_split(np.argsort(probabilities, kind="stable"), _BINS) if len(part)]
    predicted = [float(probabilities[part].mean()) for part in parts]
    observed = [float(labels[part].mean()) for part in parts]
    counts = [len(part) for part in parts]
    gaps = np.abs(np.array(predicted) - np.array(observed))
    error = float((gaps * counts).sum() / sum(counts))
    return {"predicted": predicted, "observed": observed, "pairs": counts, "error": error}


def draw_calibration(curves: Mapping[str, Mapping[str, Any]], picture: Path) -> None:
    """Draws calibration curves, a line for each name, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.3), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="calibrated")
    for name, curve in curves.items():
        label = f"{name} (mean gap {curve['error']:.3f})"
        axes.plot(curve["predicted"], curve["observed"], "o-", markersize=4, linewidth=1, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability", ylabel="share of pairs that interact")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(picture, metadata={"Software": None})
