"""Whether a sequence looks like a protein at first sight: its composition, its low complexity, its runs.

A sequence comes in, three numbers go out, and which of them are beyond those of stretches of natural proteins of its length. They
judge nothing but letters: a shuffled protein passes all of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from performers.data import STANDARD_RESIDUES, encode, read_fasta
from performers.data.alphabet import FIRST_RESIDUE
from performers.tools.readings import BACKGROUND

WINDOW, BITS = 12, 2.2  # SEG's window and trigger (Wootton and Federhen, 1993)
NATURAL = ("bundled:validation", "bundled:test", "bundled:ood")
_MOST, _FEWEST = 500, 100  # natural proteins that are compared with
_PERCENTILE = 99
_RUNG = 1.05  # lengths are compared up to this factor

_STANDARD = len(STANDARD_RESIDUES)


class Composition(NamedTuple):
    """What the letters of one sequence show.

    Attributes:
        distance: half the sum of the differences between its shares of the 20 standard residues and those of Swiss-Prot; 0 to 1.
        low_complexity: the fraction of its residues in a window of 12 whose letters have an entropy of at most 2.2 bits, 0 for
            sequences shorter than that.
        longest_run: the most times that a residue follows itself, the first counted.
    """

    distance: float
    low_complexity: float
    longest_run: int


def composition_of(sequence: str) -> Composition:
    """The numbers of one sequence of residues."""
    ids = encode(sequence).astype(np.int64) - FIRST_RESIDUE
    standard = ids[ids < _STANDARD]
    shares = np.bincount(standard, minlength=_STANDARD) / max(len(standard), 1)
    changes = np.flatnonzero(np.diff(ids)) + 1
    longest = int(np.diff(np.concatenate(([0], changes, [len(ids)]))).max())
    return Composition(float(np.abs(shares - BACKGROUND).sum() / 2), _low_complexity(ids), longest)


def unusual(sequence: str, found: Composition) -> list[str]:
    """The names of those numbers that exceed the 99th percentile of the first residues, as many, of natural proteins."""
    limits = _limits(_rung(len(sequence)))
    return [name for name, value, limit in zip(Composition._fields, found, limits, strict=True) if value > limit]


def _low_complexity(ids: npt.NDArray[np.int64]) -> float:
    if len(ids) < WINDOW:
        return 0.0
    letters = np.eye(int(ids.max()) + 1, dtype=np.int32)[ids]
    sums = np.concatenate((np.zeros((1, letters.shape[1]), np.int32), letters.cumsum(0)))
    counts = (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW
    bits = -(counts * np.log2(np.where(counts > 0, counts, 1.0))).sum(1)
    low = np.zeros(len(ids) + 1, dtype=np.int64)
    starts = np.flatnonzero(bits <= BITS)
    np.add.at(low, starts, 1)
    np.add.at(low, starts + WINDOW, -1)
    return float((low[:-1].cumsum() > 0).mean())


@functools.cache
def _natural() -> list[str]:
    return [record.sequence for record in read_fasta(NATURAL)]


def _rung(length: int) -> int:
    """The length rounded down, by less than a twentieth, so that a few limits serve all lengths."""
    rung = 1
    while (following := max(rung + 1, int(rung * _RUNG))) <= length:
        rung = following
    return rung


@functools.cache
def _limits(length: int) -> npt.NDArray[np.float64]:
    """Of the three numbers; where too few natural proteins are so long, the longest ones are taken whole."""
    chosen = [sequence[:length] for sequence in _natural() if len(sequence) >= length][:_MOST]
    if len(chosen) < _FEWEST:
        chosen = sorted(_natural(), key=len)[-_FEWEST:]
    return np.percentile(np.array([composition_of(sequence) for sequence in chosen]), _PERCENTILE, axis=0)
