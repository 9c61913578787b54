"""Pairs of residues: which ones count, the best of them as they come by, and where in the chains they are.

Residues are numbered from 0 through all chains of a record. Scores of pairs come in block by block; what is kept is a bounded
number of the best, whatever the order of the blocks. It knows nothing of how pairs are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]


class Pairs(NamedTuple):
    """Pairs i < j with a score, best first.

    Attributes:
        i, j: residues.
        score: more is more likely a contact.
    """

    i: _Ints
    j: _Ints
    score: _Floats


@dataclass(frozen=True)
class Geometry:
    """Which pairs of the residues of some chains count.

    Attributes:
        starts: where each chain begins, and the end of the last.
        min_separation: |i - j| at least, in the same chain; all pairs between chains count.
    """

    starts: _Ints
    min_separation: int

    @classmethod
    def of(cls, chains: Sequence[str], min_separation: int) -> Geometry:
        """That of chains of residues."""
        return cls(np.concatenate(([0], np.cumsum([len(chain) for chain in chains]))).astype(np.int64), min_separation)

    def chain_of(self, residues: _Ints) -> _Ints:
        """The number of each residue's chain, counted from 0."""
        return np.searchsorted(self.starts, residues, side="right") - 1

    def counts(self, i: _Ints, j: _Ints) -> npt.NDArray[np.bool_]:
        """Whether pairs count, i < j."""
        same = self.chain_of(i) == self.chain_of(j)
        return (j > i) & (~same | (j - i >= self.min_separation))


class BestPairs:
    """The best `limit` of the pairs that it is given; of equal ones those that come first in the map.

    Between two cuts no more than twice as many are kept, so memory is that of the limit and of one block.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._i, self._j = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._score = np.zeros(0, np.float32)
        self._threshold = -np.inf

    def add_block(self, scores: _Floats, rows: slice, columns: slice, geometry: Geometry) -> None:
        """Take the pairs that count of a block of the map.

        Arguments:
            scores: (r, c).
            rows, columns: of the residues.
            geometry: says which count.
        """
        i, j = np.nonzero(scores >= self._threshold)
        score = scores[i, j]
        i, j = i.astype(np.int64) + rows.start, j.astype(np.int64) + columns.start
        kept = geometry.counts(i, j)
        self.add(Pairs(i[kept], j[kept], score[kept]))

    def add(self, pairs: Pairs) -> None:
        """Take pairs."""
        self._i, self._j = np.concatenate((self._i, pairs.i)), np.concatenate((self._j, pairs.j))
        self._score = np.concatenate((self._score, pairs.score))
        if len(self._i) > 2 * self._limit:
            self._cut()

    def _cut(self) -> None:
        order = np.lexsort((self._j, self._i, -self._score))[: self._limit]
        self._i, self._j, self._score = self._i[order], self._j[order], self._score[order]
        if self._limit and len(order) == self._limit:
            self._threshold = self._score[-1]

    def best(self) -> Pairs:
        """What was kept, in order."""
        self._cut()
        return Pairs(self._i, self._j, self._score)
