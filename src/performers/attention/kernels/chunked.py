"""FAVOR attention in chunks of rows: any device, time and memory linear in the length, no L x M tensor ever.

Heads are taken in groups, so that one product has enough rows; the two families of features do the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from performers.attention.arguments import segments
from performers.attention.features import FeatureRows, kernel_of
from performers.attention.kernels.exponential import Exponential
from performers.attention.kernels.pointwise import Pointwise
from performers.attention.kernels.state import CAUSAL_ROWS, ROWS, Request, StateTensors, Upstream, compute_dtype

GROUP_ROWS = 1024  # how many rows, over several heads, one product takes where there are as many
FLATTENED_LENGTH = (
    512  # up to which batch and heads are joined, at the price of a copy, so that products are large enough
)


@dataclass
class _Item:
    """A group of G heads of one sequence (or of several sequences of the same length): the unit of work.

    `place` finds the same heads and rows in any (B, H, L, .) tensor, as (G, L, .); `summary` finds the heads in (B, H, ...).
    """

    heads: slice
    rows: slice
    batch: int | None  # None when batch and heads are joined

    def place(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1) if self.batch is None else x[self.batch]
        return x[self.heads, self.rows]

    def summary(self, x: Tensor) -> Tensor:
        return (x.flatten(0, 1) if self.batch is None else x[self.batch])[self.heads]

    def of_rows(self, x: Tensor, shape: torch.Size) -> Tensor:
        """These heads' part of `FeatureRows`, (G, ...); without the first dimension if one part serves all heads."""
        if x.shape[:2] == (1, 1):
            return x[0, 0]
        return self.summary(x.expand(*shape[:2], *x.shape[2:]))

    def state(self, state: StateTensors) -> StateTensors:
        return StateTensors(*(self.summary(tensor) for tensor in state))

    def real(self, mask: Tensor | None, num_heads: int) -> Tensor | None:
        """The padding mask of these heads, (G, L)."""
        if mask is None:
            return None
        if self.batch is None:
            return mask.repeat_interleave(num_heads, 0)[self.heads]
        return mask[self.batch].expand(self.heads.stop - self.heads.start, -1)


def _items(request: Request) -> Iterator[_Item]:
    batch, heads, length = request.query.shape[:3]
    chunk = CAUSAL_ROWS if request.is_causal else ROWS
    if request.cu_seqlens is None:
        joined = max(length, request.key.shape[2]) <= FLATTENED_LENGTH
        sequences = [(None if joined else row, slice(0, None)) for row in range(1 if joined else batch)]
    else:
        joined = False
        sequences = [(0, rows) for rows in segments(request.cu_seqlens, length)]
    total = batch * heads if joined else heads
    for row, rows in sequences:
        rows_of_a_head = min(chunk, length if rows.stop is None else rows.stop - rows.start)
        group = max(1, GROUP_ROWS // max(1, rows_of_a_head))
        for first in range(0, total, group):
            yield _Item(slice(first, min(first + group, total)), rows, row)


def _family(item: _Item, request: Request, d_rows: tuple[Tensor, Tensor] | None = None) -> Exponential | Pointwise:
    query = request.query
    sums = compute_dtype(query.dtype)
    of = [item.of_rows(x.to(sums), query.shape) for x in request.rows]
    matrices, vectors = of[:2], [x.unsqueeze(-2) for x in of[2:]]
    # Sums over keys pass float16's largest number, 65504.
    products = query.dtype if request.fast and query.dtype != torch.float16 else sums
    chosen = kernel_of(request.kernel)
    family = Exponential if chosen.exponential else Pointwise
    learned = None if d_rows is None else tuple(item.of_rows(x, query.shape) for x in d_rows)
    return family(chosen, FeatureRows(*matrices, *vectors), bool(of[3].any()), products, learned)  # pyright: ignore[reportArgumentType]


def supports(request: Request) -> bool:
    """Always: every device, type, size and kernel."""
    return True


def forward(request: Request) -> tuple[Tensor, Tensor, StateTensors]:
    """Attention outputs, what the backward pass wants to know of each row, and the state after the last key.

    Returns:
        out (B, H, Lq, Dv); the (log) denominators (B, H, Lq) when causal, nothing (0,) otherwise; the state.
    """
    query, key, value, _, state, *_ = request
    out, normaliser = request.output().zero_(), request.normaliser().zero_()
    after = StateTensors(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in state))
    for item in _items(request):
        family = _family(item, request)
        past = item.state(state)
        q, k, v, o = (item.place(x) for x in (query, key, value, out))
        real = item.real(request.key_padding_mask, query.shape[1])
        if request.is_causal:
            reached = family.causal(q, k, v, real, past, o, item.place(normaliser))
        else:
            reached = family.bidirectional(q, k, v, real, past, o)
        for target, tensor in zip(item.state(after), reached, strict=True):
            target.copy_(tensor)
    return out, normaliser, after


def backward(upstream: Upstream, request: Request) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, past numerator and past denominator, and of the rows if they are learned."""
    query, key, value, rows, state, *_ = request
    d_query, d_key, d_value, d_past_numerator, d_past_denominator = (
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        for x in (query, key, value, state.numerator, state.denominator)
    )
    d_rows = None
    if request.learned:  # heads that share a row each add to a copy of their own, unless all of them do
        shapes = [x.shape if x.shape[:2] == (1, 1) else (*query.shape[:2], *x.shape[2:]) for x in rows[:2]]
        d_rows = (rows.queries.new_zeros(shapes[0]), rows.keys.new_zeros(shapes[1]))
    for item in _items(request):
        family = _family(item, request, d_rows)
        past = item.state(state)
        placed = (item.place(x) for x in (query, key, value, upstream.d_out, d_query, d_key, d_value))
        q, k, v, d_o, d_q, d_k, d_v = placed
        real = item.real(request.key_padding_mask, query.shape[1])
        d_after = (item.summary(upstream.d_numerator), item.summary(upstream.d_denominator))
        # One state per packed sequence would outweigh the sequences: it is computed again.
        reached = item.state(upstream.after) if request.cu_seqlens is None else family.absorb_all(k, v, real, past)
        if request.is_causal:
            of_rows = item.place(upstream.normaliser)
            d_past = family.causal_backward(q, k, v, real, past, reached, of_rows, d_o, d_after, d_q, d_k, d_v)
        else:
            d_past = family.bidirectional_backward(q, k, v, real, past, reached, d_o, d_after, d_q, d_k, d_v)
        for target, tensor in zip((d_past_numerator, d_past_denominator), d_past, strict=True):
            item.summary(target).copy_(tensor)
    gradients = (d_query, d_key, d_value, d_past_numerator, d_past_denominator)
    if d_rows is None:
        return gradients
    return *gradients, *(x.sum_to_size(row.shape) for x, row in zip(d_rows, rows[:2], strict=True))
