"""How well scores agree with measurements: rank correlation, area under the ROC curve and NDCG, by number of mutations.

Beside the rank correlation of the scores stand those of baselines, such as a substitution matrix, each with its interval.

Arrays in, figures out. Ties are given their mean rank, as everywhere in statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]
MOST_MUTATIONS = 5  # variants with so many or more are one group, as in ProteinGym


def ranks(values: _Floats) -> _Floats:
    """The rank of each value, counted from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def spearman(x: _Floats, y: _Floats) -> float | None:
    """Spearman's rank correlation; None where one side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def spearman_interval(correlation: float | None, number: int) -> tuple[float, float] | None:
    """The 95 % interval of Spearman's correlation of `number` pairs (Bonett and Wright, 2000); None below ten pairs."""
    if correlation is None or number < 10 or abs(correlation) == 1:
        return None
    half = 1.959964 * np.sqrt((1 + correlation**2 / 2) / (number - 3))
    low, high = np.tanh(np.arctanh(correlation) + np.array([-half, half]))
    return float(low), float(high)


def auc(scores: _Floats, is_positive: npt.NDArray[np.bool_]) -> float | None:
    """The chance that a positive scores above a negative, ties counting half; None without either kind."""
    positives = int(is_positive.sum())
    negatives = len(scores) - positives
    if not positives or not negatives:
        return None
    return float((ranks(scores)[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def ndcg(scores: _Floats, measured: _Floats, share: float = 0.1) -> float | None:
    """Normalised discounted cumulative gain of the best tenth by score (Järvelin and Kekäläinen, 2002).

    The gain of a variant is its measurement, scaled to [0, 1] over all of them, as in ProteinGym.
    """
    best = max(1, int(len(scores) * share))
    if len(scores) < 2 or np.ptp(measured) == 0:
        return None
    gains = (measured - measured.min()) / np.ptp(measured)
    discounts = 1 / np.log2(np.arange(best) + 2)
    order = np.argsort(-scores, kind="stable")[:best]
    return float((gains[order] * discounts).sum() / (np.sort(gains)[::-1][:best] * discounts).sum())


def agreement(
    scores: _Floats,
    measured: _Floats,
    is_positive: npt.NDArray[np.bool_],
    mutations: npt.NDArray[np.int64],
    baselines: Mapping[str, _Floats] | None = None,
) -> list[dict[str, Any]]:
    """The figures of all variants, and of those with one, two, ... mutations.

    Arguments:
        scores, measured: (N,) numbers; more is better in both.
        is_positive: (N,) whether a measurement counts as good, for the area under the curve.
        mutations: (N,) how many residues differ.
        baselines: by name (N,) other scores of the same variants, nan where there is none.

    Returns:
        For each number of mutations that occurs: "mutations", "variants", "spearman", its "interval", "auc", "ndcg", and under
        "baselines" by name the "spearman" and "interval" of the other scores, both None unless all variants of the row have one.
    """
    groups: list[tuple[str, npt.NDArray[np.bool_]]] = [("all", np.ones(len(scores), dtype=np.bool_))]
    for count in range(1, MOST_MUTATIONS):
        groups.append((str(count), mutations == count))
    groups.append((f"{MOST_MUTATIONS}+", mutations >= MOST_MUTATIONS))
    rows: list[dict[str, Any]] = []
    for name, chosen in groups:
        if not chosen.any():
            continue
        rows.append(
            {
                "mutations": name,
                "variants": int(chosen.sum()),
                **_correlation(scores[chosen], measured[chosen]),
                "baselines": {
                    name: _correlation(others[chosen], measured[chosen]) for name, others in (baselines or {}).items()
                },
                "auc": auc(scores[chosen], is_positive[chosen]),
                "ndcg": ndcg(scores[chosen], measured[chosen]),
            }
        )
    return rows


def _correlation(scores: _Floats, measured: _Floats) -> dict[str, Any]:
    correlation = None if np.isnan(scores).any() else spearman(scores, measured)
    return {"spearman": correlation, "interval": spearman_interval(correlation, len(scores))}
