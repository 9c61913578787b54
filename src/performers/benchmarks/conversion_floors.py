"""What can be had of masked residues without a model of antibodies: copying the most similar antibody that is known.

Antibody domains go in, what was found of each comes out, in the form of `conversion_subjects`. The neighbour of a domain is the
one among the training domains with the largest identity (MMseqs2); it is found with all residues in view, which favours the
floor. Then the domain is aligned with it anew for each set of masked residues, without these (global alignment, BLOSUM62), and
each of them is taken to be the residue that it is aligned with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from performers.benchmarks.conversion_figures import Columns
from performers.benchmarks.conversion_sequences import Domain
from performers.benchmarks.conversion_subjects import ROUNDS, by_region
from performers.data import Record
from performers.data.splits import nearest_identities
from performers.errors import MissingExtraError

_HIDDEN = "X"


def copied_from_neighbours(
    known: Sequence[Domain], judged: Sequence[Domain], rounds: Sequence[Tensor], threads: int | None = None
) -> tuple[Columns, list[float]]:
    """How many masked residues are those of the nearest known domain.

    Arguments:
        known: to copy from.
        judged: whose residues are masked.
        rounds: of each of these in which pass a residue is masked, (L,).
        threads: of MMseqs2.

    Returns:
        Columns as of `by_region`, and the identity of each domain to its neighbour; 0 where there is none, of which nothing can
        be copied.

    Raises:
        MissingExtraError: gemmi or MMseqs2 is not installed.
    """
    records = [[Record(str(i), "", d.sequence, i + 1) for i, d in enumerate(half)] for half in (judged, known)]
    neighbours = nearest_identities(*records, threads=threads)
    right: list[Tensor] = []
    for domain, of_domain, neighbour in zip(judged, rounds, neighbours, strict=True):
        found = torch.zeros(len(domain.sequence), dtype=torch.bool)
        if neighbour.nearest:
            source = known[int(neighbour.nearest)].sequence
            for turn in range(ROUNDS):
                masked = (of_domain == turn).tolist()
                visible = "".join(_HIDDEN if m else r for r, m in zip(domain.sequence, masked, strict=True))
                copy = aligned(visible, source)
                same = [m and c == r for m, c, r in zip(masked, copy, domain.sequence, strict=True)]
                found |= torch.tensor(same)
        right.append(found)
    return by_region(list(judged), right), [neighbour.identity for neighbour in neighbours]


def aligned(query: str, target: str) -> str:
    """Of each residue of the query the one of the target that it is aligned with, "-" for none.

    Raises:
        MissingExtraError: gemmi is not installed.
    """
    try:
        import gemmi
    except ImportError:
        raise MissingExtraError("gemmi", "structures", "aligning antibodies") from None
    scoring: Any = gemmi.AlignmentScoring("b")
    ours, theirs = (gemmi.expand_one_letter_sequence(text, gemmi.ResidueKind.AA) for text in (query, target))
    cigar = gemmi.align_string_sequences(ours, theirs, [], scoring).cigar_str()
    found, place = "", 0
    for count, kind in re.findall(r"(\d+)([MID])", cigar):
        if kind == "I":
            found += "-" * int(count)
            continue
        if kind == "M":
            found += target[place : place + int(count)]
        place += int(count)
    return found
