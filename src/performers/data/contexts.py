"""Rows of tokens of any length, cut from a corpus: what one step of training sees.

A `Contexts` is a function from the number of a context (0, 1, 2... from the start of training, on through the epochs) to its
tokens. It holds no iterator: batch size, number of processes and where a run was cut off change nothing. Each epoch has its own
order of the proteins, drawn from (seed, epoch). In `"packed"` mode a row holds whole proteins that cannot see each other; in
`"concatenated"` mode proteins follow one another, separated by eos, and are read together, as in the paper's experiment with
contexts of 8,192 (2009.14794, section 4.4). It knows nothing of objectives: rows come out unmasked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from performers.data.alphabet import BOS, EOS, PAD
from performers.data.corpus import Corpus
from performers.errors import InputError
from performers.randomness import derive_seed

Mode: TypeAlias = Literal["packed", "concatenated"]

_OPEN_ROWS = 64
_PIECES_AT_ONCE = 1 << 20

_Int64s: TypeAlias = npt.NDArray[np.int64]


class ContextBatch(NamedTuple):
    """R rows of L tokens.

    Attributes:
        input_ids: (R, L) int64.
        position_ids: (R, L) int64; counted from 0 in each segment, or in each row when the row is read together.
        segments: the boundaries of the segments in the R * L flattened tokens, from 0 to R * L, int32 ("cu_seqlens"); no
            segment crosses a row, and the free room at the end of a row is one segment of padding. None when each row is read
            together.
    """

    input_ids: _Int64s
    position_ids: _Int64s
    segments: npt.NDArray[np.int32] | None


class _Packing(NamedTuple):
    """One epoch, packed: pieces of proteins in the order of their rows, and the first piece of each row."""

    proteins: _Int64s
    starts: _Int64s  # in the protein's tokens: bos, residues, eos
    sizes: _Int64s
    contexts: _Int64s  # one more than there are contexts


class _Stream(NamedTuple):
    """One epoch, concatenated: the order of the proteins and where each ends in the stream, its eos included."""

    order: _Int64s
    ends: _Int64s
    num_contexts: int


class Contexts:
    """The contexts of a corpus.

    packed: each protein is [bos] residues [eos]. Proteins are taken in the order of the epoch, and each goes to the row that it
    fills best among a few that are open; what remains of a row is padding. A protein longer than a row is cut into pieces of a
    row each, none of it is dropped.

    concatenated: the proteins of an epoch form one stream, each followed by eos; every row is bos and the next length - 1
    tokens of it. The rest at the end of an epoch that does not fill a row is dropped.

    Arguments:
        corpus: the proteins.
        length: tokens per row, at least 3.
        mode: "packed" or "concatenated".
        seed: of the order of the proteins.

    Raises:
        InputError: the length is too small, or an epoch is shorter than one concatenated row.
    """

    def __init__(self, corpus: Corpus, length: int, mode: Mode = "packed", seed: int = 0) -> None:
        if mode not in get_args(Mode):
            raise InputError(f"The mode of contexts is {mode!r}; expected 'packed' or 'concatenated'.")
        if length < 3:
            raise InputError(f"The context has {length} tokens; expected at least 3 (bos, a residue, eos).")
        if not len(corpus):
            raise InputError("The corpus is empty; expected at least one protein.")
        self.corpus = corpus
        self.length = length
        self.mode = mode
        self.seed = seed
        self._plans: dict[int, _Packing | _Stream] = {}
        self._first_contexts = [0]  # of each epoch known so far, and of the next
        stream = corpus.num_residues + len(corpus)
        if mode == "concatenated" and stream < length - 1:
            raise InputError(
                f"The corpus has {stream:,} tokens, fewer than one context of {length:,}; expected a smaller --context "
                "or packed contexts."
            )

    @property
    def num_tokens_per_epoch(self) -> int:
        """The tokens of one epoch, padding not counted."""
        if self.mode == "concatenated":
            return self.contexts_in_epoch(0) * self.length
        return self.corpus.num_residues + 2 * len(self.corpus)

    def contexts_in_epoch(self, epoch: int) -> int:
        """How many rows epoch 0, 1, 2... has; packed epochs differ a little, for their order does."""
        while len(self._first_contexts) < epoch + 2:
            plan = self._plan(len(self._first_contexts) - 1)
            count = plan.num_contexts if isinstance(plan, _Stream) else len(plan.contexts) - 1
            self._first_contexts.append(self._first_contexts[-1] + count)
        return self._first_contexts[epoch + 1] - self._first_contexts[epoch]

    def epoch_of(self, index: int) -> int:
        """The epoch in which context `index` is."""
        while self._first_contexts[-1] <= index:
            self.contexts_in_epoch(len(self._first_contexts) - 1)
        return int(np.searchsorted(self._first_contexts, index, side="right")) - 1

    def rows(self, indices: Iterable[int]) -> ContextBatch:
        """The contexts with these numbers, one per row; a pure function of (corpus, length, mode, seed, indices)."""
        chosen = [int(index) for index in indices]
        if any(index < 0 for index in chosen):
            raise InputError(f"Context {min(chosen)} was asked for; expected numbers from 0.")
        input_ids = np.full((len(chosen), self.length), PAD, dtype=np.int64)
        position_ids = np.empty_like(input_ids)
        bounds = [0]
        for row, index in enumerate(chosen):
            epoch = self.epoch_of(index)
            plan = self._plan(epoch)
            number = index - self._first_contexts[epoch]
            if isinstance(plan, _Stream):
                self._read(plan, number, input_ids[row])
                position_ids[row] = np.arange(self.length)
            else:
                sizes = self._unpack(plan, number, input_ids[row])
                for size in sizes:
                    start = bounds[-1] - row * self.length
                    position_ids[row, start : start + size] = np.arange(size)
                    bounds.append(bounds[-1] + size)
        return ContextBatch(input_ids, position_ids, np.array(bounds, np.int32) if self.mode == "packed" else None)

    def _plan(self, epoch: int) -> _Packing | _Stream:
        if epoch not in self._plans:
            # The raw output of a bit generator is the same in every version of numpy, that of its distributions is not.
            keys = np.random.Philox(key=derive_seed(self.seed, "order", epoch)).random_raw(len(self.corpus))
            order = np.argsort(keys, kind="stable")
            plan = self._pack(order) if self.mode == "packed" else self._join(order)
            # A batch spans two epochs at most times; older plans are made again when they are asked for.
            self._plans = {**dict(list(self._plans.items())[-1:]), epoch: plan}
        return self._plans[epoch]

    def _join(self, order: _Int64s) -> _Stream:
        ends = np.cumsum(self.corpus.lengths[order] + 1)
        return _Stream(order, ends, int(ends[-1]) // (self.length - 1))

    def _read(self, stream: _Stream, number: int, row: _Int64s) -> None:
        row[0] = BOS
        position = number * (self.length - 1)
        protein = int(np.searchsorted(stream.ends, position, side="right"))
        filled = 1
        while filled < self.length:
            ids = self.corpus[stream.order[protein]]
            offset = position + filled - 1 - (int(stream.ends[protein]) - len(ids) - 1)
            piece = ids[offset : offset + self.length - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled < self.length:
                row[filled] = EOS
                filled += 1
            protein += 1

    def _pack(self, order: _Int64s) -> _Packing:
        tokens = self.corpus.lengths[order] + 2
        pieces = -(-tokens // self.length)
        proteins = np.repeat(order, pieces)
        starts = (np.arange(len(proteins)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * self.length
        sizes = np.minimum(np.repeat(tokens, pieces) - starts, self.length)
        rows = _fit(sizes, self.length)
        by_row = np.argsort(rows, kind="stable")
        contexts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        return _Packing(proteins[by_row], starts[by_row], sizes[by_row], contexts)

    def _unpack(self, packing: _Packing, number: int, row: _Int64s) -> list[int]:
        """Fill a row; returns the sizes of its segments, the padding included."""
        pieces = slice(int(packing.contexts[number]), int(packing.contexts[number + 1]))
        sizes: list[int] = packing.sizes[pieces].tolist()
        filled = 0
        for protein, start, size in zip(
            packing.proteins[pieces].tolist(), packing.starts[pieces].tolist(), sizes, strict=True
        ):
            ids = self.corpus[protein]
            segment = row[filled : filled + size]
            residues = ids[max(start - 1, 0) : start - 1 + size]
            offset = 1 if start == 0 else 0
            segment[offset : offset + len(residues)] = residues
            if start == 0:
                segment[0] = BOS
            if start + size == len(ids) + 2:
                segment[-1] = EOS
            filled += size
        return sizes if filled == self.length else [*sizes, self.length - filled]


def _fit(sizes: _Int64s, length: int) -> _Int64s:
    """The row of each piece: the open row that it fills best, or else a new one.

    At most `_OPEN_ROWS` rows are open, of which the fullest is closed when there are more; so pieces stay near their place in
    the order, and the work per piece is constant. On Swiss-Prot 1.5 % of rows of 1,024 remain padding; without open rows, 21 %.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    rooms: list[int] = []  # that is left in each open row, ascending
    open_rows: list[int] = []
    num_rows = 0
    for start in range(0, len(sizes), _PIECES_AT_ONCE):
        placed: list[int] = []
        for size in sizes[start : start + _PIECES_AT_ONCE].tolist():
            best = bisect_left(rooms, size)
            if best < len(rooms):
                room, row = rooms.pop(best), open_rows.pop(best)
            else:
                room, row = length, num_rows
                num_rows += 1
                if len(rooms) == _OPEN_ROWS:
                    del rooms[0], open_rows[0]
            placed.append(row)
            room -= size
            if room:
                place = bisect_left(rooms, room)
                rooms.insert(place, room)
                open_rows.insert(place, row)
        rows[start : start + len(placed)] = placed
    return rows
