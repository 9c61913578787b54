"""How good predictions are: the figures of a task and their bootstrap intervals over proteins.

Predictions and targets of each protein come in, as arrays of one row per target; figures go out. Ridge or Transformer is all the
same here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from performers.data import IGNORED
from performers.randomness import derive_seed
from performers.tools.agreement import auc, spearman
from performers.tools.labelled import Kind, Targets

Predictions: TypeAlias = Sequence[npt.NDArray[np.float64]]
Figure: TypeAlias = Callable[[npt.NDArray[np.int64]], float | None]

RESAMPLES = 1000
HEADLINE = {"regression": "spearman", "classification": "auroc", "residue": "accuracy"}
"""The figure of each task by which systems are compared."""


def assess(
    kind: Kind, predicted: Predictions, targets: Sequence[Targets], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """The figures of a task, each with its 95 % bootstrap interval over proteins.

    Arguments:
        kind: of the task.
        predicted: of each of N proteins (T, C): a number, or a score for each label, the highest of which is the prediction.
        targets: of each protein (T,), as in `LabelledProteins`.
        seed: of the bootstrap; the same proteins are drawn whatever is assessed.
        resamples: of the bootstrap; with 0 there are no intervals.

    Returns:
        By name {"value", "interval"}; None where there is nothing to say, as for a correlation of constants.
    """
    return {
        name: {
            "value": figure(np.arange(len(predicted))),
            "interval": interval(figure, len(predicted), seed, resamples),
        }
        for name, figure in figures_of(kind, predicted, targets).items()
    }


def difference(
    kind: Kind, first: Predictions, second: Predictions, targets: Sequence[Targets], seed: int
) -> dict[str, Any]:
    """By how much the first system is above the second in the headline figure, paired over proteins."""
    one, other = (figures_of(kind, predicted, targets)[HEADLINE[kind]] for predicted in (first, second))

    def figure(rows: npt.NDArray[np.int64]) -> float | None:
        a, b = one(rows), other(rows)
        return None if a is None or b is None else a - b

    return {"value": figure(np.arange(len(targets))), "interval": interval(figure, len(targets), seed)}


def interval(figure: Figure, number: int, seed: int, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a figure of some of `number` proteins; None if over 5 % of the draws leave it undefined."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap")))
    draws = (figure(generator.integers(number, size=number)) for _ in range(resamples))
    found = [value for value in draws if value is not None]
    if not found or len(found) < 0.95 * resamples:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def figures_of(kind: Kind, predicted: Predictions, targets: Sequence[Targets]) -> dict[str, Figure]:
    """The figures of a task, by name, as functions of the indices of proteins."""
    if kind == "residue":
        return _residue_figures(predicted, targets)
    scores, truth = np.concatenate(predicted), np.concatenate(targets)
    return _number_figures(scores[:, 0], truth) if kind == "regression" else _class_figures(scores, truth)


def _number_figures(scores: npt.NDArray[np.float64], truth: Targets) -> dict[str, Figure]:
    def r2(rows: npt.NDArray[np.int64]) -> float | None:
        around = np.square(truth[rows] - truth[rows].mean()).sum()
        return None if around == 0 else float(1 - np.square(truth[rows] - scores[rows]).sum() / around)

    return {
        "spearman": lambda rows: spearman(scores[rows], truth[rows]),
        "r2": r2,
        "mae": lambda rows: float(np.abs(truth[rows] - scores[rows]).mean()),
    }


def _class_figures(scores: npt.NDArray[np.float64], truth: Targets) -> dict[str, Figure]:
    """Of two classes, F1 is that of the second; of more, F1 and the area under the curve are means over those present."""
    best = scores.argmax(axis=1)
    classes = range(scores.shape[1]) if scores.shape[1] > 2 else (1,)

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    def f1(rows: npt.NDArray[np.int64], label: int) -> float | None:
        is_it, is_said = truth[rows] == label, best[rows] == label
        either = int(is_it.sum() + is_said.sum())
        return None if either == 0 else 2 * int((is_it & is_said).sum()) / either

    return {
        "accuracy": lambda rows: float((best[rows] == truth[rows]).mean()),
        "auroc": lambda rows: mean([auc(scores[rows, label], truth[rows] == label) for label in classes]),
        "f1": lambda rows: mean([f1(rows, label) for label in classes]),
    }


def _residue_figures(predicted: Predictions, targets: Sequence[Targets]) -> dict[str, Figure]:
    known = np.array([int((target != IGNORED).sum()) for target in targets])
    right = np.array([int((p.argmax(axis=1) == t).sum()) for p, t in zip(predicted, targets, strict=True)])

    def accuracy(rows: npt.NDArray[np.int64]) -> float | None:
        total = known[rows].sum()
        return float(right[rows].sum() / total) if total else None

    return {"accuracy": accuracy}
