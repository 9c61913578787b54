"""Pairs of proteins that are read together, one after the other: what a model that heeds a partner is trained on.

A table of pairs comes in as a file, and `PairContexts` is then what `performers.data.contexts.Contexts` is for single proteins: a
function from the number of a context to its tokens. A row holds whole pairs that cannot see each other, each as

    [bos] first [eos] [bos] second [eos]

with positions that start again at the second protein. Every pair comes once an epoch in either order. It knows nothing of
objectives, and nothing of whether the pairs are true.
"""

from __future__ import annotations

import gzip
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO, cast

import numpy as np
import numpy.typing as npt

from performers.data.alphabet import BOS, EOS, PAD
from performers.data.contexts import ContextBatch, fit_rows
from performers.data.corpus import Corpus
from performers.errors import InputError
from performers.randomness import derive_seed

_ADDED = 4  # start and end tokens of a pair
_Int64s = npt.NDArray[np.int64]


def read_pairs(path: str | Path, corpus: Corpus) -> _Int64s:
    """The true pairs of a table, TSV or gzip: two identifiers and, if there is a third column, a label of which 1 counts.

    A first line whose label is neither 0 nor 1, or that names no protein, is taken for headings. A pair of a protein with
    itself is left out, and a pair counts once, in whatever order and however often it is there.

    Returns:
        (P, 2) indices into the corpus, the smaller one first.

    Raises:
        InputError: the file cannot be read, a line has no two columns or another label, a protein is not in the corpus, or
            there is no true pair.
    """
    path = Path(path)
    indices = {corpus.name(index): index for index in reversed(range(len(corpus)))}
    found: dict[tuple[int, int], None] = {}
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (
            cast("TextIO", gzip.open(path, "rt", encoding="utf-8")) if packed else path.open(encoding="utf-8") as lines
        ):
            for number, line in enumerate(lines, start=1):
                columns = line.rstrip("\r\n").split("\t")
                if columns == [""]:
                    continue
                where = f"{path}, line {number:,}"
                if len(columns) < 2:
                    raise InputError(f"{where}: found {line.rstrip()[:60]!r}; expected two identifiers and a tab.")
                label = columns[2] if len(columns) > 2 else "1"
                unknown = [name for name in columns[:2] if name not in indices]
                if number == 1 and (label not in ("0", "1") or len(unknown) == 2):
                    continue
                if label not in ("0", "1"):
                    raise InputError(f"{where}: the label is {label!r}; expected 1 for a true pair, or 0.")
                if unknown:
                    raise InputError(f"{where}: {unknown[0]} is not among the proteins.")
                first, second = sorted(indices[name] for name in columns[:2])
                if label == "1" and first != second:
                    found[first, second] = None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as pairs: {error}.") from error
    if not found:
        raise InputError(f"{path} has no true pair of two proteins.")
    return np.array(list(found), dtype=np.int64)


class PairContexts:
    """The contexts of pairs of proteins.

    Arguments:
        corpus: the proteins.
        pairs: (P, 2) indices into the corpus.
        length: tokens per row.
        seed: of the order of the pairs.

    Raises:
        InputError: a pair does not fit into a row.
    """

    def __init__(self, corpus: Corpus, pairs: _Int64s, length: int, seed: int = 0) -> None:
        self.corpus, self.length, self.seed = corpus, length, seed
        self.pairs = np.concatenate((pairs, pairs[:, ::-1]))
        self._sizes = np.asarray(corpus.lengths, dtype=np.int64)[self.pairs].sum(axis=1) + _ADDED
        longest = int(self._sizes.argmax())
        if self._sizes[longest] > length:
            first, second = (corpus.name(index) for index in self.pairs[longest].tolist())
            raise InputError(
                f"The pair {first} and {second} has {self._sizes[longest]:,} tokens: expected a --context of at least as many, "
                "for pairs are never cut."
            )
        self._plans: dict[int, tuple[_Int64s, _Int64s]] = {}
        self._first_contexts = [0]  # of each epoch known so far, and of the next

    def rows(self, indices: Iterable[int]) -> ContextBatch:
        """The contexts with these numbers, one per row; a pure function of (corpus, pairs, length, seed, indices)."""
        chosen = [int(index) for index in indices]
        input_ids = np.full((len(chosen), self.length), PAD, dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        bounds = [0]
        for row, index in enumerate(chosen):
            filled = 0
            for pair in self._pairs_of(index):
                for protein in self.pairs[pair].tolist():
                    ids = np.concatenate(([BOS], self.corpus[protein], [EOS]))
                    input_ids[row, filled : filled + len(ids)] = ids
                    position_ids[row, filled : filled + len(ids)] = np.arange(len(ids))
                    filled += len(ids)
                bounds.append(row * self.length + filled)
            if filled < self.length:
                position_ids[row, filled:] = np.arange(self.length - filled)
                bounds.append((row + 1) * self.length)
        return ContextBatch(input_ids, position_ids, np.array(bounds, np.int32))

    def _pairs_of(self, index: int) -> list[int]:
        """The pairs in a context."""
        while self._first_contexts[-1] <= index:
            plan = self._plan(len(self._first_contexts) - 1)
            self._first_contexts.append(self._first_contexts[-1] + len(plan[1]) - 1)
        epoch = bisect_right(self._first_contexts, index) - 1
        order, starts = self._plan(epoch)
        number = index - self._first_contexts[epoch]
        return order[starts[number] : starts[number + 1]].tolist()

    def _plan(self, epoch: int) -> tuple[_Int64s, _Int64s]:
        """The pairs of an epoch in the order of their rows, and the first of each row."""
        if epoch not in self._plans:
            # The raw output of a bit generator is the same in every version of numpy.
            keys = np.random.Philox(key=derive_seed(self.seed, "order of pairs", epoch)).random_raw(len(self.pairs))
            order = np.argsort(keys, kind="stable")
            rows = fit_rows(self._sizes[order], self.length)
            starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
            plan = order[np.argsort(rows, kind="stable")], starts
            self._plans = {**dict(list(self._plans.items())[-1:]), epoch: plan}
        return self._plans[epoch]
