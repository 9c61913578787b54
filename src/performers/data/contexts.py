"""Rows of tokens of any length, cut from a corpus: what one step of training sees.

A `Contexts` is a function from the number of a context (0, 1, 2... from the start of training, on through the epochs) to its
tokens. It holds no iterator: batch size, number of processes and where a run was cut off change nothing. Each epoch has its own
order of the proteins, drawn from (seed, epoch). In `"packed"` mode a row holds whole proteins that cannot see each other; in
`"concatenated"` mode proteins follow one another, separated by eos, and are read together, as in the paper's experiment with
contexts of 8,192 (2009.14794, section 4.4). `"related"` rows are packed, too, and hold proteins of one cluster together, as far
as they fit, for those to be read with each other. It knows nothing of objectives: rows come out unmasked.

Of the corpus a row reads its own proteins. What is in memory besides is the plan of a window or two of an epoch
(`performers.data.order`), about a million proteins each, so that neither memory nor the work per row grows with the corpus. Two
exceptions: related contexts plan a whole epoch at once, as the clusters are in memory, too; and to say where packed context n is,
what comes before it has to be packed once, a microsecond or two per protein, which a process does when a run goes on.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from performers.data.alphabet import BOS, EOS, PAD
from performers.data.corpus import Corpus
from performers.data.order import ProteinOrder
from performers.errors import InputError
from performers.randomness import derive_seed

Mode: TypeAlias = Literal["packed", "concatenated", "related"]

_OPEN_ROWS = 64
_PIECES_AT_ONCE = 1 << 20

_Int64s: TypeAlias = npt.NDArray[np.int64]
_Plan = TypeVar("_Plan")


class ContextBatch(NamedTuple):
    """R rows of L tokens.

    Attributes:
        input_ids: (R, L) int64.
        position_ids: (R, L) int64; counted from 0 in each segment, or in each row when the row is read together.
        segments: the boundaries of the segments in the R * L flattened tokens, from 0 to R * L, int32 ("cu_seqlens"); no
            segment crosses a row, and the free room at the end of a row is one segment of padding. None when each row is read
            together.
        families: (S,) int64, the cluster of each segment, -1 for padding; None unless contexts are related.
    """

    input_ids: _Int64s
    position_ids: _Int64s
    segments: npt.NDArray[np.int32] | None
    families: _Int64s | None = None


class _Packing(NamedTuple):
    """A window of an epoch, packed: pieces of proteins in the order of their rows, and the first piece of each row."""

    proteins: _Int64s
    starts: _Int64s  # in the protein's tokens: bos, residues, eos
    sizes: _Int64s
    contexts: _Int64s  # one more than there are contexts


class _Stream(NamedTuple):
    """A window of an epoch, concatenated: the order of the proteins, and where in the epoch's stream each ends, eos included."""

    order: _Int64s
    ends: _Int64s


class Contexts:
    """The contexts of a corpus.

    packed: each protein is [bos] residues [eos]. Proteins are taken in the order of the epoch, and each goes to the row that it
    fills best among a few that are open; what remains of a row is padding. A protein longer than a row is cut into pieces of a
    row each, none of it is dropped.

    concatenated: the proteins of an epoch form one stream, each followed by eos; every row is bos and the next length - 1
    tokens of it. The rest at the end of an epoch that does not fill a row is dropped.

    related: as packed, but groups of proteins are placed, each of as many members of one cluster as fill a row at most. Which
    members are together differs from epoch to epoch.

    Arguments:
        corpus: the proteins.
        length: tokens per row, at least 3.
        mode: "packed", "concatenated" or "related".
        seed: of the order of the proteins.
        clusters: (N,) the cluster of each protein, for "related" contexts.

    Raises:
        InputError: clusters are missing or not wanted, the length is too small, or an epoch is shorter than one concatenated row.
    """

    def __init__(
        self, corpus: Corpus, length: int, mode: Mode = "packed", seed: int = 0, clusters: _Int64s | None = None
    ) -> None:
        if mode not in get_args(Mode):
            raise InputError(f"The mode of contexts is {mode!r}; expected 'packed', 'concatenated' or 'related'.")
        if (mode == "related") != (clusters is not None):
            raise InputError("Related contexts need the cluster of each protein, and only they take clusters.")
        if length < 3:
            raise InputError(f"The context has {length} tokens; expected at least 3 (bos, a residue, eos).")
        if not len(corpus):
            raise InputError("The corpus is empty; expected at least one protein.")
        self.corpus = corpus
        self.length = length
        self.mode = mode
        self.seed = seed
        self.clusters = clusters
        self._order = ProteinOrder(corpus, seed)
        self._num_windows = 1 if mode == "related" else self._order.num_windows
        # Windows are numbered on through the epochs.
        self._packings: dict[int, _Packing] = {}
        self._streams: dict[int, _Stream] = {}
        self._stream_starts: dict[int, _Int64s] = {}  # by epoch
        self._first_contexts = [0]  # of each packed window known so far, and of the next
        self._stream_tokens = corpus.num_residues + len(corpus)
        if mode == "concatenated" and self._stream_tokens < length - 1:
            raise InputError(
                f"The corpus has {self._stream_tokens:,} tokens, fewer than one context of {length:,}; expected a smaller "
                "--context or packed contexts."
            )

    @property
    def num_tokens_per_epoch(self) -> int:
        """The tokens of one epoch, padding not counted."""
        if self.mode == "concatenated":
            return self.contexts_in_epoch(0) * self.length
        return self.corpus.num_residues + 2 * len(self.corpus)

    def contexts_in_epoch(self, epoch: int) -> int:
        """How many rows epoch 0, 1, 2... has; packed epochs differ a little, for their order does."""
        if self.mode == "concatenated":
            return self._stream_tokens // (self.length - 1)
        first = epoch * self._num_windows
        return self._first_context(first + self._num_windows) - self._first_context(first)

    def epoch_of(self, index: int) -> int:
        """The epoch in which context `index` is."""
        if self.mode == "concatenated":
            return index // self.contexts_in_epoch(0)
        return self._window_of(index) // self._num_windows

    def rows(self, indices: Iterable[int]) -> ContextBatch:
        """The contexts with these numbers, one per row; a pure function of (corpus, length, mode, seed, indices)."""
        chosen = [int(index) for index in indices]
        if any(index < 0 for index in chosen):
            raise InputError(f"Context {min(chosen)} was asked for; expected numbers from 0.")
        input_ids = np.full((len(chosen), self.length), PAD, dtype=np.int64)
        position_ids = np.empty_like(input_ids)
        bounds = [0]
        families: list[int] = []
        for row, index in enumerate(chosen):
            if self.mode == "concatenated":
                self._read(index, input_ids[row])
                position_ids[row] = np.arange(self.length)
            else:
                window = self._window_of(index)
                plan, number = self._packing(window), index - self._first_contexts[window]
                sizes = self._unpack(plan, number, input_ids[row])
                families += self._families(plan, number, len(sizes))
                for size in sizes:
                    start = bounds[-1] - row * self.length
                    position_ids[row, start : start + size] = np.arange(size)
                    bounds.append(bounds[-1] + size)
        if self.mode == "concatenated":
            return ContextBatch(input_ids, position_ids, None)
        related = np.array(families, np.int64) if self.mode == "related" else None
        return ContextBatch(input_ids, position_ids, np.array(bounds, np.int32), related)

    def _window_of(self, index: int) -> int:
        """The window in which packed context `index` is."""
        while self._first_contexts[-1] <= index:
            self._first_context(len(self._first_contexts))
        return bisect_right(self._first_contexts, index) - 1

    def _first_context(self, window: int) -> int:
        """The number of the first context of a packed window."""
        while len(self._first_contexts) <= window:
            plan = self._packing(len(self._first_contexts) - 1)
            self._first_contexts.append(self._first_contexts[-1] + len(plan.contexts) - 1)
        return self._first_contexts[window]

    def _packing(self, window: int) -> _Packing:
        if window not in self._packings:
            epoch, number = divmod(window, self._num_windows)
            if self.clusters is not None:
                order = self._order.everything(epoch)
                plan = self._pack(order[np.argsort(self.clusters[order], kind="stable")], epoch)
            else:
                plan = self._pack(self._order.window(epoch, number))
            self._packings = _with_last(self._packings, window, plan)
        return self._packings[window]

    def _stream(self, window: int) -> _Stream:
        if window not in self._streams:
            epoch, number = divmod(window, self._num_windows)
            order = self._order.window(epoch, number)
            ends = self._starts_of(epoch)[number] + np.cumsum(self.corpus.lengths_of(order) + 1)
            self._streams = _with_last(self._streams, window, _Stream(order, ends))
        return self._streams[window]

    def _starts_of(self, epoch: int) -> _Int64s:
        """Where the windows of a concatenated epoch begin in its stream."""
        if epoch not in self._stream_starts:
            self._stream_starts = _with_last(self._stream_starts, epoch, self._order.tokens_before(epoch, extra=1))
        return self._stream_starts[epoch]

    def _read(self, index: int, row: _Int64s) -> None:
        """Fill a row with a stretch of the stream of its epoch."""
        epoch, number = divmod(index, self.contexts_in_epoch(0))
        position = number * (self.length - 1)
        window = epoch * self._num_windows + int(np.searchsorted(self._starts_of(epoch), position, side="right")) - 1
        stream = self._stream(window)
        protein = int(np.searchsorted(stream.ends, position, side="right"))
        row[0] = BOS
        filled = 1
        while filled < self.length:
            if protein == len(stream.order):
                window, protein = window + 1, 0
                stream = self._stream(window)
            ids = self.corpus[stream.order[protein]]
            offset = position + filled - 1 - (int(stream.ends[protein]) - len(ids) - 1)
            piece = ids[offset : offset + self.length - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled < self.length:
                row[filled] = EOS
                filled += 1
            protein += 1

    def _pack(self, order: _Int64s, groups_of_epoch: int | None = None) -> _Packing:
        tokens = self.corpus.lengths_of(order) + 2
        pieces = -(-tokens // self.length)
        proteins = np.repeat(order, pieces)
        starts = (np.arange(len(proteins)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * self.length
        sizes = np.minimum(np.repeat(tokens, pieces) - starts, self.length)
        rows = (
            fit_rows(sizes, self.length)
            if groups_of_epoch is None
            else self._fit_groups(proteins, sizes, groups_of_epoch)
        )
        by_row = np.argsort(rows, kind="stable")
        contexts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        return _Packing(proteins[by_row], starts[by_row], sizes[by_row], contexts)

    def _fit_groups(self, proteins: _Int64s, sizes: _Int64s, epoch: int) -> _Int64s:
        """The row of each piece, where pieces come cluster by cluster and groups of a cluster's pieces stay together."""
        assert self.clusters is not None
        clusters = self.clusters[proteins]
        groups = np.empty(len(sizes), dtype=np.int64)
        group, used, last = -1, 0, -1
        for piece, (cluster, size) in enumerate(zip(clusters.tolist(), sizes.tolist(), strict=True)):
            if cluster != last or used + size > self.length:
                group, used, last = group + 1, 0, cluster
            groups[piece] = group
            used += size
        totals = np.bincount(groups, weights=sizes).astype(np.int64)
        keys = np.random.Philox(key=derive_seed(self.seed, "groups", epoch)).random_raw(len(totals))
        order = np.argsort(keys, kind="stable")
        rows = np.empty(len(totals), dtype=np.int64)
        rows[order] = fit_rows(totals[order], self.length)
        return rows[groups]

    def _families(self, packing: _Packing, number: int, count: int) -> list[int]:
        """The clusters of a row's `count` segments, -1 for padding."""
        if self.clusters is None:
            return []
        pieces = slice(int(packing.contexts[number]), int(packing.contexts[number + 1]))
        found: list[int] = self.clusters[packing.proteins[pieces]].tolist()
        return found + [-1] * (count - len(found))

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


def _with_last(plans: dict[int, _Plan], number: int, plan: _Plan) -> dict[int, _Plan]:
    """The plan that was made last, and one more: a batch spans two windows at most times; others are made again if asked for."""
    return {**dict(list(plans.items())[-1:]), number: plan}


def fit_rows(sizes: _Int64s, length: int) -> _Int64s:
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
