"""FAVOR attention in Triton: any NVIDIA GPU, and Triton's interpreter where there is none.

No L x M tensor is ever in device memory: features, sums and outputs are made block by block in `triton_kernels`. A sequence is
cut into jobs of rows. `summarise` sums up each job's keys, `scan` adds the summaries of a sequence, and `read` gives the queries
their outputs:

- Bidirectional: a few long jobs for each sequence; all queries read the sum.
- Causal: jobs of `ROWS` rows; a job's queries read the sum of the jobs before it, and see its own keys through a matrix of
  weights. Where those weights cannot be had from single-token scales, `read_exact` computes the rows again.

The summaries of all jobs of a long sequence would fill the memory, so that jobs go in waves of at most `SUMMARY_BYTES`, with the
state carried from wave to wave: memory does not grow with the length, and every kernel has as many programs as a wave has jobs.

The gradients of keys come from queries as the outputs of queries come from keys: `summarise` and `scan` again, in reverse, over
phi(q) / denominator and d_out, and `pull_keys` reads them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from performers.attention.arguments import segments
from performers.attention.features import kernel_of
from performers.attention.kernels.exponential import LOST_BELOW, SAFE_ABOVE
from performers.attention.kernels.state import Request, StateTensors, Upstream, finite

ROWS = 64  # of a causal job, and of a block of queries; half as many where products are float32
FEATURES = 64  # of a block
EXACT_ROWS, EXACT_FEATURES = 16, 32  # of a block where every pair of rows is summed over the features one by one
SUMMARY_BYTES = 64 * 2**20  # how much the summaries of one wave of jobs may take
PROGRAMS = 1024  # that keep a large GPU busy, where the inputs are long enough for as many
LONG_ROWS = 256  # at least, of a job whose rows are only summed up
MAX_HEAD_SIZE = 128
WIDE_SHARED_MEMORY = 160 * 2**10  # bytes that a block must be able to use for heads wider than 64
MAX_FEATURES = 512
POINTWISE = frozenset({"relu", "elu", "abs", "identity", "sigmoid", "tanh", "gelu", "cos"})


class _Span(NamedTuple):
    """Rows of one sequence."""

    sequence: int
    batch: int
    start: int
    stop: int

    def num_jobs(self, rows: int) -> int:
        return -(-(self.stop - self.start) // rows)


class _Table(NamedTuple):
    """What the kernels know about jobs and runs; see `triton_kernels`."""

    jobs: Tensor  # (J, 4) int32
    runs: Tensor  # (R, 2) int32


class _Rows(NamedTuple):
    """The rows of W for queries or keys, as the products take them."""

    high: Tensor  # (Bf, Hf, M, D)
    low: Tensor  # what `high` has rounded away; used if the problem is `split`


@lru_cache(maxsize=512)
def _tabulate(spans: tuple[_Span, ...], rows: int, slot_of_run: bool, device: torch.device) -> _Table:
    """The jobs of `rows` rows that make up the spans. A job's slot is its run's index, or its own."""
    of = torch.tensor([(span.batch, span.start, span.stop) for span in spans])
    counts = torch.tensor([span.num_jobs(rows) for span in spans])
    last = counts.cumsum(0)
    run = torch.repeat_interleave(torch.arange(len(spans)), counts)
    job = torch.arange(len(run))
    start = of[run, 1] + (job - (last - counts)[run]) * rows
    stop = torch.minimum(start + rows, of[run, 2])
    jobs = torch.stack([of[run, 0], start, stop, run if slot_of_run else job], 1)
    runs = torch.stack([last - counts, last], 1)
    return _Table(jobs.int().to(device), runs.int().to(device))


def _groups(spans: list[_Span], rows: int, capacity: int) -> Iterator[tuple[_Span, ...]]:
    """The spans in order, in groups of about `capacity` jobs."""
    group: list[_Span] = []
    jobs = 0
    for span in spans:
        # A sequence without keys has a summary, too.
        size = max(1, span.num_jobs(rows))
        if group and jobs + size > capacity:
            yield tuple(group)
            group, jobs = [], 0
        group.append(span)
        jobs += size
    if group:
        yield tuple(group)


def _waves(spans: list[_Span], rows: int, capacity: int) -> list[tuple[_Span, ...]]:
    """The spans in order, cut where a wave has `capacity` jobs."""
    waves: list[tuple[_Span, ...]] = []
    wave: list[_Span] = []
    room = capacity
    for span in spans:
        start = span.start
        while start < span.stop:
            stop = min(span.stop, start + room * rows)
            wave.append(span._replace(start=start, stop=stop))
            room -= wave[-1].num_jobs(rows)
            start = stop
            if room == 0:
                waves.append(tuple(wave))
                wave, room = [], capacity
    return [*waves, tuple(wave)] if wave else waves


class _Carried:
    """The summary that each sequence has reached.

    Of sequences in a batch all are kept. Of packed ones only those that a wave may have cut: they start from nothing.
    """

    def __init__(self, problem: _Problem, start: StateTensors | None) -> None:
        self.problem = problem
        self.all = (
            None if start is None else StateTensors(*(x.clone(memory_format=torch.contiguous_format) for x in start))
        )
        self.cut: dict[int, StateTensors] = {}

    def take(self, wave: tuple[_Span, ...]) -> StateTensors:
        """The summaries (R, H, M, ...) before a wave."""
        if self.all is not None:
            return StateTensors(*(x[wave[0].sequence : wave[-1].sequence + 1] for x in self.all))
        states = self.problem.room(len(wave), empty=True)
        for run, span in enumerate(wave):
            if span.sequence in self.cut:
                for x, kept in zip(states, self.cut[span.sequence], strict=True):
                    x[run] = kept
        return states

    def put(self, wave: tuple[_Span, ...], states: StateTensors) -> None:
        """Remember the summaries after a wave."""
        if self.all is not None:
            for x, new in zip(self.all, states, strict=True):
                x[wave[0].sequence : wave[-1].sequence + 1] = new
        else:
            self.cut = {wave[run].sequence: StateTensors(*(x[run] for x in states)) for run in (0, -1)}


@dataclass
class _Problem:
    """What all launches of one call have in common."""

    queries: _Rows
    keys: _Rows
    metric: Tensor
    bias: Tensor
    num_heads: int
    size: int  # M'
    head_dim: int
    value_dim: int
    exponential: bool
    kernel: str
    dot: torch.dtype
    split: bool
    precision: str

    @classmethod
    def of(cls, request: Request) -> _Problem:
        query, _, value, rows, *_ = request
        kernel, fast = request.kernel, request.fast
        half = query.dtype != torch.float32
        dot = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
        split = half and not fast
        precision = "ieee"
        if query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0):
            # Three products on tensor cores lose 2^-22 of |q| |w|, about what a sum of float32 products loses.
            precision = "tf32" if half or fast else "tf32x3"
        elif dot == torch.bfloat16 and _interpreted():
            precision = "emulated"
        queries = _parts(rows.queries, dot, split)
        return cls(
            queries=queries,
            keys=queries if rows.keys is rows.queries else _parts(rows.keys, dot, split),
            metric=rows.metric.contiguous(),
            bias=rows.bias.contiguous(),
            num_heads=query.shape[1],
            size=rows.queries.shape[-2],
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            exponential=kernel_of(kernel).exponential,
            kernel=kernel,
            dot=dot,
            split=split,
            precision=precision,
        )

    @property
    def capacity(self) -> int:
        """How many summaries a wave may have."""
        return max(1, SUMMARY_BYTES // (self.num_heads * self.size * self.value_dim * 4))

    @property
    def rows(self) -> int:
        """How many rows a block of queries has, and a causal job: what fits in registers and shared memory."""
        return ROWS if self.dot == torch.bfloat16 else ROWS // 2

    @property
    def block_m(self) -> int:
        return min(FEATURES if self.dot == torch.bfloat16 else FEATURES // 2, _padded(self.size))

    @property
    def num_blocks(self) -> int:
        return -(-self.size // self.block_m)

    def long_rows(self, spans: list[_Span]) -> int:
        """How many rows a job should have that only sums them up."""
        total = sum(span.stop - span.start for span in spans)
        jobs = min(self.capacity, max(1, PROGRAMS // (self.num_heads * self.num_blocks)))
        longest = max((span.stop - span.start for span in spans), default=0)
        rows = max(LONG_ROWS, -(-total // jobs), -(-longest // self.capacity))
        return -(-rows // ROWS) * ROWS

    def room(self, count: int, empty: bool = False) -> StateTensors:
        """Room for summaries; with `empty`, those of no rows."""
        like = self.metric
        if empty:
            return StateTensors.empty((count, self.num_heads), self.size, self.value_dim, self.exponential, like)
        shape = (count, self.num_heads, self.size)
        return StateTensors(like.new_empty(*shape, self.value_dim), like.new_empty(shape), like.new_empty(shape))

    @property
    def features(self) -> tuple[Any, ...]:
        """The rows of W and what belongs to them, as the kernels take them."""
        return (*_of_rows(self.queries), *_of_rows(self.keys), *_shared(self.metric), *_shared(self.bias))

    @property
    def constants(self) -> dict[str, Any]:
        tl: Any = import_module("triton.language")
        return {
            "H": self.num_heads,
            "M": self.size,
            "D": self.head_dim,
            "DV": self.value_dim,
            "BLOCK_M": self.block_m,
            "BLOCK_D": _padded(self.head_dim),
            "BLOCK_V": _padded(self.value_dim),
            "EXPONENTIAL": self.exponential,
            "KIND": "" if self.exponential else self.kernel,
            "DOT": tl.bfloat16 if self.dot == torch.bfloat16 else tl.float32,
            "SPLIT": self.split,
            "PRECISION": self.precision,
            **self.options(),
        }

    @property
    def exact_constants(self) -> dict[str, Any]:
        """For the kernels that compute lost rows again."""
        constants = {name: x for name, x in self.constants.items() if name not in ("EXPONENTIAL", "KIND")}
        return {**constants, "ROWS": EXACT_ROWS, "BLOCK_M": EXACT_FEATURES, "num_warps": 4, "num_stages": 1}

    def options(self, causal: bool = False, backward: bool = False) -> dict[str, Any]:
        # Causal kernels keep tiles of queries, keys and values at once: loads ahead of time would not fit in shared memory.
        large = max(self.head_dim, self.value_dim) > 64 or self.dot == torch.float32
        return {
            "num_warps": 8 if self.dot == torch.bfloat16 and (large or (causal and backward)) else 4,
            "num_stages": 1 if large or causal else 2,
        }

    def summarise_keys(self, key: Tensor, value: Tensor, mask: Tensor | None, table: _Table) -> StateTensors:
        """The summary of each job's keys."""
        return self._summarise(key, value, None, None, mask, self.keys, table)

    def _summarise(
        self,
        x: Tensor,
        value: Tensor,
        norm: Tensor | None,
        slope: Tensor | None,
        mask: Tensor | None,
        rows: _Rows,
        table: _Table,
    ) -> StateTensors:
        kernels = _kernels()
        parts = self.room(len(table.jobs))
        if not len(table.jobs):
            return parts
        kernels.summarise[(len(table.jobs), self.num_heads, self.num_blocks)](
            *_strided(x),
            *_strided(value),
            *_of_row(norm, x),
            *_of_row(slope, x),
            *_of_mask(mask, x),
            *_of_rows(rows),
            *_shared(self.metric),
            *_shared(self.bias),
            *parts,
            table.jobs,
            ROWS=self.rows,
            QUERIES=norm is not None,
            MASKED=mask is not None,
            **self.constants,
        )
        return parts

    def scan(
        self, parts: StateTensors, past: StateTensors, table: _Table, *, exclusive: bool, reverse: bool = False
    ) -> StateTensors:
        """The summary after each run's jobs. With `exclusive`, the jobs' own are replaced by those before them."""
        kernels = _kernels()
        after = self.room(len(table.runs))
        kernels.scan[(len(table.runs), self.num_heads, self.num_blocks)](
            *parts,
            *(x.contiguous() for x in past),
            *after,
            table.runs,
            H=self.num_heads,
            M=self.size,
            DV=self.value_dim,
            BLOCK_M=self.block_m,
            BLOCK_V=_padded(self.value_dim),
            REVERSE=reverse,
            EXCLUSIVE=exclusive,
            EXPONENTIAL=self.exponential,
            num_warps=4,
        )
        return after

    def read(
        self,
        query: Tensor,
        own: tuple[Tensor, Tensor, Tensor | None] | None,
        state: StateTensors,
        table: _Table,
        out: Tensor,
        norm: Tensor | None,
    ) -> None:
        """Write the output of queries, and their (log) denominators. `own`: the keys, values and mask of a causal job's rows."""
        kernels = _kernels()
        key, value, mask = own or (query, query, None)
        arguments = (
            *_strided(query),
            *_strided(key),
            *_strided(value),
            *_strided(out),
            *_of_row(norm, query),
            *_of_mask(mask, query),
            *self.features,
            *state,
            table.jobs,
        )
        kernels.read[(len(table.jobs), self.num_heads)](
            *arguments,
            LOST_BELOW=LOST_BELOW,
            NORM=norm is not None,
            ROWS=self.rows,
            CAUSAL=own is not None,
            MASKED=mask is not None,
            **{**self.constants, **self.options(causal=own is not None)},
        )
        if own is not None and self.exponential:
            kernels.read_exact[(len(table.jobs), self.num_heads, self.rows // EXACT_ROWS)](
                *arguments, MASKED=mask is not None, **self.exact_constants
            )

    def summarise_queries(
        self, query: Tensor, d_out: Tensor, norm: Tensor, slope: Tensor, table: _Table
    ) -> StateTensors:
        """The gradient of the summary that each job's queries have read, with respect to numerator and denominator."""
        return self._summarise(query, d_out, norm, slope, None, self.queries, table)

    def read_backward(
        self,
        query: Tensor,
        own: tuple[Tensor, Tensor, Tensor | None] | None,
        state: StateTensors,
        table: _Table,
        d_out: Tensor,
        d_query: Tensor,
        norm: Tensor,
        slope: Tensor,
        *,
        known: bool,
    ) -> None:
        """Write the gradients of queries, their slopes d_out . out, and their (log) denominators unless they are `known`."""
        kernels = _kernels()
        key, value, mask = own or (query, query, None)
        lost = table.jobs.new_zeros(len(table.jobs), self.num_heads)
        arguments = (
            *_strided(query),
            *_strided(key),
            *_strided(value),
            *_strided(d_out),
            *_strided(d_query),
            *_of_row(norm, query),
            *_of_row(slope, query),
            *_of_mask(mask, query),
            *self.features,
            *state,
            lost,
            table.jobs,
        )
        kernels.read_backward[(len(table.jobs), self.num_heads)](
            *arguments,
            SAFE_ABOVE=SAFE_ABOVE,
            KNOWN=known,
            ROWS=self.rows,
            CAUSAL=own is not None,
            MASKED=mask is not None,
            **{**self.constants, **self.options(causal=own is not None, backward=True)},
        )
        if own is not None and self.exponential:
            kernels.read_backward_exact[(len(table.jobs), self.num_heads, self.rows // EXACT_ROWS)](
                *arguments, MASKED=mask is not None, **self.exact_constants
            )

    def pull_keys(
        self,
        own: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        reverse: StateTensors,
        table: _Table,
        d_key: Tensor,
        d_value: Tensor,
    ) -> None:
        """Write the gradients of keys and values. `own`: queries, d_out, norm and slope of a causal job's rows."""
        kernels = _kernels()
        query, d_out, norm, slope = own or (key, value, None, None)
        lost = table.jobs.new_zeros(len(table.jobs), self.num_heads)
        arguments = (
            *_strided(query),
            *_strided(key),
            *_strided(value),
            *_strided(d_out),
            *_strided(d_key),
            *_strided(d_value),
            *_of_row(norm, query),
            *_of_row(slope, query),
            *_of_mask(mask, query),
            *self.features,
            *reverse,
            lost,
            table.jobs,
        )
        kernels.pull_keys[(len(table.jobs), self.num_heads)](
            *arguments,
            SAFE_ABOVE=SAFE_ABOVE,
            ROWS=self.rows,
            CAUSAL=own is not None,
            MASKED=mask is not None,
            **{**self.constants, **self.options(causal=own is not None, backward=True)},
        )
        if own is not None and self.exponential:
            kernels.pull_keys_exact[(len(table.jobs), self.num_heads, self.rows // EXACT_ROWS)](
                *arguments, MASKED=mask is not None, **self.exact_constants
            )


def _kernels() -> Any:
    """The kernels; imported when the first of them is launched, since that imports Triton."""
    return import_module("performers.attention.kernels.triton_kernels")


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. Does not import Triton if nobody has asked for that."""
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:
        return False
    triton: Any = import_module("triton")
    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def _padded(size: int) -> int:
    """The power of two, at least 16, that holds `size`: the least that `tl.dot` takes."""
    return max(16, 1 << (size - 1).bit_length())


def _parts(rows: Tensor, dot: torch.dtype, split: bool) -> _Rows:
    """W in the type for products, and with `split` what is lost by that.

    For float16 tokens the type is float32, of which the tensor cores see 10 bits of mantissa: as many as the tokens have.
    """
    rows = rows.float().contiguous()
    if not split and dot == torch.float32:
        return _Rows(rows, rows)
    high = rows.to(dot) if dot == torch.bfloat16 else (rows.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return _Rows(high, (rows - high.float()).to(dot) if split else high)


def _strided(x: Tensor) -> tuple[Any, ...]:
    return (x, *x.stride()[:3])


def _shared(x: Tensor) -> tuple[Any, ...]:
    """A tensor of features and its steps from one sequence, and one head, to the next: zero where they share it."""
    return (x, *(0 if size == 1 else step for size, step in zip(x.shape[:2], x.stride()[:2], strict=True)))


def _of_rows(rows: _Rows) -> tuple[Any, ...]:
    high, *steps = _shared(rows.high)
    return (high, rows.low, *steps)


def _of_row(x: Tensor | None, stand_in: Tensor) -> tuple[Any, ...]:
    return (stand_in, 0, 0) if x is None else (x, *x.stride()[:2])


def _of_mask(mask: Tensor | None, stand_in: Tensor) -> tuple[Any, ...]:
    return (stand_in, 0) if mask is None else (mask, mask.stride(0))


def _unit(x: Tensor) -> Tensor:
    """x with neighbours in memory along the last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _spans(batch: int, start: int, stop: int) -> list[_Span]:
    return [_Span(row, row, start, stop) for row in range(batch)]


def supports(request: Request) -> bool:
    """Whether the inputs are on a GPU (or Triton interprets), of a type, size and kernel that there are Triton kernels for."""
    query, key, value, rows, *_ = request
    kernel = request.kernel
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not query.dtype == key.dtype == value.dtype:
        return False
    if request.learned:
        return False
    if not (kernel in POINTWISE or kernel_of(kernel).exponential):
        return False
    if not (16 <= query.shape[-1] <= MAX_HEAD_SIZE and 16 <= value.shape[-1] <= MAX_HEAD_SIZE):
        return False
    if not 1 <= rows.queries.shape[-2] <= MAX_FEATURES or not _installed():
        return False
    if not query.is_cuda:
        return query.device.type == "cpu" and _interpreted()
    # Tiles of wide heads take up to 120 KiB.
    memory = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
    return max(query.shape[-1], value.shape[-1]) <= 64 or memory >= WIDE_SHARED_MEMORY


@dataclass
class _Inputs:
    """The tensors of a call, and how they are cut into sequences."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    packed: bool
    spans: list[_Span]  # of keys that queries are aligned with, all keys if bidirectional
    early: int  # queries before the first key
    prefix: int  # keys before the first query

    @classmethod
    def of(cls, request: Request) -> _Inputs:
        query, key, value = (_unit(x) for x in request[:3])
        mask, cu_seqlens, is_causal = request.key_padding_mask, request.cu_seqlens, request.is_causal
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        early, prefix = (max(0, x.shape[2] - y.shape[2]) if is_causal else 0 for x, y in ((query, key), (key, query)))
        if cu_seqlens is not None:
            found = segments(cu_seqlens, query.shape[2])
            spans = [_Span(number, 0, rows.start, rows.stop) for number, rows in enumerate(found)]
        else:
            spans = _spans(query.shape[0], 0, key.shape[2] - prefix)
        return cls(query, key, value, mask, cu_seqlens is not None, spans, early, prefix)

    def queries_of(self, spans: tuple[_Span, ...]) -> tuple[_Span, ...]:
        """The queries of sequences, all of which see all keys."""
        return spans if self.packed else tuple(span._replace(start=0, stop=self.query.shape[2]) for span in spans)

    def aligned(self, x: Tensor | None, skip: int) -> Any:
        return (
            None
            if x is None
            else x.narrow(2 if x.ndim > 2 else 1, skip, (x.shape[2] if x.ndim > 2 else x.shape[1]) - skip)
        )


def forward(request: Request) -> tuple[Tensor, Tensor, StateTensors]:
    """The output, the (log) denominators of causal rows and the state after the last key; see `chunked.forward`."""
    query, state = request.query, request.state
    inputs, problem = _Inputs.of(request), _Problem.of(request)
    out, normaliser = request.output(), request.normaliser()
    carried = _Carried(problem, None if inputs.packed else state)
    if request.is_causal:
        if inputs.prefix:
            for _ in _absorb(problem, inputs, _spans(query.shape[0], 0, inputs.prefix), carried):
                pass
        if inputs.early:
            table = _tabulate(tuple(_spans(query.shape[0], 0, inputs.early)), problem.rows, True, query.device)
            assert carried.all is not None
            problem.read(inputs.query, None, carried.all, table, out, normaliser)
        q, o, norm = (inputs.aligned(x, inputs.early) for x in (inputs.query, out, normaliser))
        k, v = (inputs.aligned(x, inputs.prefix) for x in (inputs.key, inputs.value))
        mask = inputs.aligned(inputs.mask, inputs.prefix)
        for wave in _waves(inputs.spans, problem.rows, problem.capacity):
            table = _tabulate(wave, problem.rows, False, query.device)
            parts = problem.summarise_keys(k, v, mask, table)
            carried.put(wave, problem.scan(parts, carried.take(wave), table, exclusive=True))
            problem.read(q, (k, v, mask), parts, table, o, norm)
    else:
        for wave, states in _absorb(problem, inputs, inputs.spans, carried):
            queries = inputs.queries_of(wave)
            if queries[0].stop:
                table = _tabulate(queries, problem.rows, True, query.device)
                problem.read(inputs.query, None, states, table, out, None)
    # Nobody may ask for the state after packed sequences: any tensors of the right shape will do.
    return out, normaliser, carried.all or StateTensors(*(x.clone() for x in state))


def _absorb(
    problem: _Problem, inputs: _Inputs, spans: list[_Span], carried: _Carried
) -> Iterator[tuple[tuple[_Span, ...], StateTensors]]:
    """Add the keys of whole sequences to what is carried; the summaries that they reach, by groups of sequences."""
    rows = problem.long_rows(spans)
    for group in _groups(spans, rows, problem.capacity):
        table = _tabulate(group, rows, False, inputs.key.device)
        parts = problem.summarise_keys(inputs.key, inputs.value, inputs.mask, table)
        states = problem.scan(parts, carried.take(group), table, exclusive=False)
        carried.put(group, states)
        yield group, states


def backward(upstream: Upstream, request: Request) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, past numerator and past denominator; see `chunked.backward`."""
    query, key, value, _, state, *_ = request
    inputs, problem = _Inputs.of(request), _Problem.of(request)
    d_query, d_key, d_value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    slope = state.numerator.new_empty(query.shape[:3])
    norm = upstream.normaliser if request.is_causal else torch.empty_like(slope)
    # d_numerator and d_denominator are with respect to sums that were divided by exp(log_scale).
    scale = -finite(upstream.after.log_scale)
    d_after = StateTensors(upstream.d_numerator, upstream.d_denominator, scale)
    reverse = _Carried(problem, None if inputs.packed else d_after)
    call = _Backward(problem, inputs, _unit(upstream.d_out), d_query, d_key, d_value, norm, slope, reverse)
    if request.is_causal:
        call.causal(_Carried(problem, None if inputs.packed else state))
    else:
        call.bidirectional(None if inputs.packed else upstream.after)
    if reverse.all is None:
        return d_query, d_key, d_value, torch.zeros_like(state.numerator), torch.zeros_like(state.denominator)
    d_past, r, scale = reverse.all
    if problem.exponential:
        keep = torch.exp(state.log_scale + scale)
        d_past, r = d_past * keep.unsqueeze(-1), r * keep
    return d_query, d_key, d_value, d_past, r


@dataclass
class _Backward:
    """The backward pass of one call."""

    problem: _Problem
    inputs: _Inputs
    d_out: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor
    norm: Tensor
    slope: Tensor
    reverse: _Carried

    def bidirectional(self, after: StateTensors | None) -> None:
        """`after`: the state that the queries have read; computed again if it was not kept."""
        inputs = self.inputs
        if after is not None:
            after = StateTensors(*(x.contiguous() for x in after))
            groups: Any = [(tuple(inputs.spans), after)]
        else:
            groups = _absorb(self.problem, inputs, inputs.spans, _Carried(self.problem, None))
        for spans, states in groups:
            queries = inputs.queries_of(spans)
            if inputs.query.shape[2]:
                self._pull_queries(queries, states, known=False)
            reverse = self._collect(queries)
            if inputs.key.shape[2]:
                self._pull_keys(spans, reverse)

    def causal(self, carried: _Carried) -> None:
        """`carried`: the state before the first key."""
        problem, inputs = self.problem, self.inputs
        early, prefix = (_spans(len(inputs.query), 0, count) for count in (inputs.early, inputs.prefix))
        if inputs.prefix:
            for _ in _absorb(problem, inputs, prefix, carried):
                pass
        if inputs.early:
            assert carried.all is not None
            self._pull_queries(tuple(early), carried.all, known=True)
        of_queries = (inputs.query, self.d_out, self.norm, self.slope)
        q, d_out, norm, slope, d_q = (inputs.aligned(x, inputs.early) for x in (*of_queries, self.d_query))
        of_keys = (inputs.key, inputs.value, self.d_key, self.d_value)
        k, v, d_k, d_v = (inputs.aligned(x, inputs.prefix) for x in of_keys)
        mask = inputs.aligned(inputs.mask, inputs.prefix)
        waves = _waves(inputs.spans, problem.rows, problem.capacity)
        for wave in waves:
            table = _tabulate(wave, problem.rows, False, q.device)
            parts = problem.summarise_keys(k, v, mask, table)
            carried.put(wave, problem.scan(parts, carried.take(wave), table, exclusive=True))
            problem.read_backward(q, (k, v, mask), parts, table, d_out, d_q, norm, slope, known=True)
        for wave in reversed(waves):
            table = _tabulate(wave, problem.rows, False, q.device)
            parts = problem.summarise_queries(q, d_out, norm, slope, table)
            before = self.reverse.take(wave)
            self.reverse.put(wave, problem.scan(parts, before, table, exclusive=True, reverse=True))
            problem.pull_keys((q, d_out, norm, slope), k, v, mask, parts, table, d_k, d_v)
        if inputs.early:
            self._collect(tuple(early))
        if inputs.prefix:
            self._pull_keys(tuple(prefix), self.reverse.take(tuple(prefix)))

    def _pull_queries(self, spans: tuple[_Span, ...], states: StateTensors, known: bool) -> None:
        """The gradients of queries that have read one summary for each span."""
        table = _tabulate(spans, self.problem.rows, True, self.d_out.device)
        self.problem.read_backward(
            self.inputs.query, None, states, table, self.d_out, self.d_query, self.norm, self.slope, known=known
        )

    def _collect(self, spans: tuple[_Span, ...]) -> StateTensors:
        """What these queries, and all after them, send back."""
        table = _tabulate(spans, self.problem.long_rows(list(spans)), False, self.d_out.device)
        parts = self.problem.summarise_queries(self.inputs.query, self.d_out, self.norm, self.slope, table)
        states = self.problem.scan(parts, self.reverse.take(spans), table, exclusive=False)
        self.reverse.put(spans, states)
        return states

    def _pull_keys(self, spans: tuple[_Span, ...], reverse: StateTensors) -> None:
        """The gradients of keys that are in one summary for each span."""
        table = _tabulate(spans, self.problem.rows, True, self.d_out.device)
        inputs = self.inputs
        self.problem.pull_keys(None, inputs.key, inputs.value, inputs.mask, reverse, table, self.d_key, self.d_value)
