"""Split-conformal prediction: how far a model is off on proteins it has not learned from, as the width of what it says next.

Scores of non-conformity on a calibration set come in; the threshold for any confidence goes out. Where calibration and new
proteins are exchangeable, the truth scores at most the threshold with at least that probability (Vovk et al., 2005; Lei et al.,
2018, for intervals; Sadinle et al., 2019, for sets of labels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

_MOST_SCORES = 2000


@dataclass(frozen=True)
class Calibration:
    """What is kept of n scores: all of them, or every so many-th in order, whose ranks (from 1) are named.

    Attributes:
        count: n.
        ranks, scores: rising, as many of each.
    """

    count: int
    ranks: tuple[int, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, scores: npt.NDArray[np.floating[Any]]) -> Self:
        """That of the scores, (n,)."""
        count = len(scores)
        kept = (
            np.unique(np.linspace(1, count, min(count, _MOST_SCORES)).round().astype(int))
            if count
            else np.zeros(0, int)
        )
        return cls(count, tuple(kept.tolist()), tuple(np.sort(scores)[kept - 1].astype(float).tolist()))

    def threshold(self, confidence: float) -> float:
        """The score that the truth exceeds with a probability of at most 1 - confidence; infinite where n is too small to say."""
        rank = math.ceil((self.count + 1) * confidence)
        if rank > self.count:
            return math.inf
        return self.scores[int(np.searchsorted(self.ranks, rank))]

    def needed(self, confidence: float) -> int:
        """The smallest n for which the threshold of this confidence is finite."""
        return math.ceil(confidence / (1 - confidence) - 1e-9)


def scores_of(
    predicted: npt.NDArray[np.float64], truth: npt.NDArray[Any], *, is_number: bool
) -> npt.NDArray[np.float64]:
    """How badly predictions conform with the truth.

    Arguments:
        predicted: (n, 1) numbers, or (n, C) probabilities.
        truth: (n,) numbers, or classes.
        is_number: which.

    Returns:
        (n,): the absolute error, or one minus the probability of the right class.
    """
    if is_number:
        return np.abs(predicted[:, 0] - truth)
    return 1 - predicted[np.arange(len(truth)), truth]


def label_sets(probabilities: npt.NDArray[np.float64], threshold: float) -> npt.NDArray[np.bool_]:
    """(n, C) whether each class is in the set of each row; the most probable one always is."""
    chosen = probabilities >= 1 - threshold
    chosen[np.arange(len(chosen)), probabilities.argmax(axis=1)] = True
    return chosen
