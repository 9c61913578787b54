"""Groups of proteins from an interaction graph, read in one context: are the edges found, how fast, and do decoys disturb it.

A scorer of proteins and the edges among them come in, figures with intervals over groups go out. A pair of a group that is not an
edge counts as one that does not interact: nobody has looked for all of them, so the areas are of use in comparison.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.benchmarks.experiment import DONE, SKIPPED, Figures
from performers.randomness import derive_seed
from performers.tools.agreement import auc, spearman

Edges = set[frozenset[int]]


def measure_groups(
    scorer: Any, edges: Edges, additive: npt.NDArray[np.float64], *, size: int, number: int, decoys: int, seed: int
) -> Figures:
    """What groups of one size come to.

    Arguments:
        scorer: a `Scorer` of P proteins.
        edges: pairs of their places that interact.
        additive: (P,) g of each, for the additive model.
        size: of a group.
        number: of groups, at most.
        decoys: that join each of them.
        seed: of the draws.

    Returns:
        status; groups_measured; by way of scoring "auroc" and its "intervals" (the group in one context, its pairs one by one,
        the additive model, the group joined by decoys); ahead_of_additive, the interval of the difference; rank_kept, Spearman's
        correlation of the group's scores before and after decoys, with its interval; seconds of either way for a group, once
        its proteins are read.
    """
    drawn = draw_groups(edges, size, number, seed)
    if not drawn:
        return {"status": SKIPPED, "reason": f"no {size} proteins of the table are connected"}
    columns: dict[str, list[float]] = {"group": [], "pairs": [], "additive": [], "decoys": []}
    kept: list[float] = []
    seconds = {"group": 0.0, "pairs": 0.0}
    rows, others = np.triu_indices(size, 1)
    for place, group in enumerate(drawn):
        members = np.array(group)
        pairs = np.stack([members[rows], members[others]], axis=1)
        truth = np.array([frozenset(pair) in edges for pair in pairs.tolist()])
        if truth.all():
            continue
        started = time.perf_counter()
        matrix = scorer.group(group)[rows, others]
        middle = time.perf_counter()
        one_by_one = scorer.pairs(pairs)
        seconds["group"] += middle - started
        seconds["pairs"] += time.perf_counter() - middle
        strangers = _decoys(edges, group, len(scorer.proteins), decoys, derive_seed(seed, "decoys", size, place))
        joined = scorer.group([*group, *strangers])[rows, others]
        summed = additive[members[rows]] + additive[members[others]]
        for name, scores in (("group", matrix), ("pairs", one_by_one), ("additive", summed), ("decoys", joined)):
            area = auc(scores, truth)
            assert area is not None
            columns[name].append(area)
        kept.append(spearman(matrix, joined) or 0.0)
    if not kept:
        return {"status": SKIPPED, "reason": "in every group all proteins interact with all"}
    ahead = np.array(columns["group"]) - np.array(columns["additive"])
    return {
        "status": DONE,
        "groups_measured": len(kept),
        "auroc": {name: float(np.mean(values)) for name, values in columns.items()},
        "intervals": {name: _interval(np.array(values), seed) for name, values in columns.items()},
        "ahead_of_additive": _interval(ahead, seed),
        "rank_kept": float(np.mean(kept)),
        "rank_kept_interval": _interval(np.array(kept), seed),
        "seconds": {name: value / len(kept) for name, value in seconds.items()},
    }


def _interval(values: npt.NDArray[np.float64], seed: int) -> list[float]:
    """The 95 % bootstrap interval of a mean over groups."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap over groups")))
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(1000)]
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def draw_groups(edges: Edges, size: int, number: int, seed: int) -> list[list[int]]:
    """Connected groups of an interaction graph, each grown from a protein by a random partner of a random member.

    Arguments:
        edges: pairs that interact.
        size: of a group.
        number: of groups, at most; fewer where too little is connected.
        seed: of the draws.
    """
    partners: dict[int, list[int]] = {}
    for edge in edges:
        if len(edge) == 2:
            a, b = edge
            partners.setdefault(a, []).append(b)
            partners.setdefault(b, []).append(a)
    for found in partners.values():
        found.sort()
    groups: list[list[int]] = []
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "groups", size)))
    starts = np.array(sorted(partners), dtype=np.int64)
    for _ in range(20 * number):
        if len(groups) == number or not len(starts):
            break
        group = [int(generator.choice(starts))]
        while len(group) < size:
            outside = sorted({partner for member in group for partner in partners[member]} - set(group))
            if not outside:
                break
            group.append(int(outside[int(generator.integers(len(outside)))]))
        if len(group) == size:
            groups.append(group)
    return groups


def _decoys(edges: Edges, group: Sequence[int], proteins: int, number: int, seed: int) -> list[int]:
    """Proteins that are not known to interact with any of a group."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(proteins).tolist()
    strangers = (
        one for one in order if one not in group and not any(frozenset((one, member)) in edges for member in group)
    )
    return list(itertools.islice(strangers, number))


def table_of_groups(cells: Sequence[Figures]) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows of the groups that were measured."""
    title = (
        f"Groups from the graph of {cells[0]['test'][0]}: AUROC of the matrix, mean over groups; 95 % intervals over groups; "
        "milliseconds a group, once its proteins are read"
    )
    header = [
        "size",
        "groups",
        "one context",
        "pair by pair",
        "additive",
        "one context minus additive",
        "with decoys",
        "rank kept",
        "ms",
        "ms by pairs",
    ]
    return title, header, [_group_row(cell) for cell in cells]


def _group_row(cell: Figures) -> list[str]:
    one, pairs, additive, decoys = (
        "{:.3f} ({:.3f} to {:.3f})".format(cell["auroc"][name], *cell["intervals"][name])
        for name in ("group", "pairs", "additive", "decoys")
    )
    ahead = "{:+.3f} to {:+.3f}".format(*cell["ahead_of_additive"])
    kept = "{:.3f} ({:.3f} to {:.3f})".format(cell["rank_kept"], *cell["rank_kept_interval"])
    seconds = [f"{1000 * cell['seconds'][name]:.1f}" for name in ("group", "pairs")]
    return [str(cell["size"]), str(cell["groups_measured"]), one, pairs, additive, ahead, decoys, kept, *seconds]
