"""FAVOR attention in chunks of rows: any device, time and memory linear in the length, no L x M tensor ever.

The forward and the backward pass are `torch.library` operators, so that `torch.compile` sees one node each and not a loop over a
million tokens. Features are computed again in the backward pass; the operators keep the state and, when causal, one number per
row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from performers.attention.arguments import segments
from performers.attention.features import FavorFeatures, feature_rows, kernel_of
from performers.attention.kernels.exponential import Exponential
from performers.attention.kernels.pointwise import Pointwise
from performers.attention.kernels.state import CAUSAL_ROWS, ROWS, StateTensors, compute_dtype

GROUP_ROWS = 1024  # how many rows, over several heads, one product takes where there are as many
FLATTENED_LENGTH = (
    512  # up to which batch and heads are joined, at the price of a copy, so that products are large enough
)


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FavorFeatures,
    *,
    scale: float,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: StateTensors | None,
) -> tuple[Tensor, StateTensors]:
    """The output (B, H, Lq, Dv) and the state after the last key; arguments as in `favor_attention`."""
    if state is None:
        dtype, exponential = compute_dtype(query.dtype), kernel_of(features.kernel_key).exponential
        like = torch.empty((), dtype=dtype, device=query.device)
        state = StateTensors.empty(query.shape[:2], features.size, value.shape[-1], exponential, like)
    out, _, *after = _forward(
        query,
        key,
        value,
        features.projection,
        *state,
        key_padding_mask,
        cu_seqlens,
        features.kernel_key,
        scale,
        is_causal,
        features.precision == "fast",
    )
    return out, StateTensors(*after)


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

    def state(self, state: StateTensors) -> StateTensors:
        return StateTensors(*(self.summary(tensor) for tensor in state))

    def real(self, mask: Tensor | None, num_heads: int) -> Tensor | None:
        """The padding mask of these heads, (G, L)."""
        if mask is None:
            return None
        if self.batch is None:
            return mask.repeat_interleave(num_heads, 0)[self.heads]
        return mask[self.batch].expand(self.heads.stop - self.heads.start, -1)


def _items(query: Tensor, key: Tensor, cu_seqlens: Tensor | None, is_causal: bool) -> Iterator[_Item]:
    batch, heads, length = query.shape[:3]
    chunk = CAUSAL_ROWS if is_causal else ROWS
    if cu_seqlens is None:
        joined = max(length, key.shape[2]) <= FLATTENED_LENGTH
        sequences = [(None if joined else row, slice(0, None)) for row in range(1 if joined else batch)]
    else:
        joined = False
        sequences = [(0, rows) for rows in segments(cu_seqlens, length)]
    total = batch * heads if joined else heads
    for row, rows in sequences:
        rows_of_a_head = min(chunk, length if rows.stop is None else rows.stop - rows.start)
        group = max(1, GROUP_ROWS // max(1, rows_of_a_head))
        for first in range(0, total, group):
            yield _Item(slice(first, min(first + group, total)), rows, row)


def _family(projection: Tensor, dtype: torch.dtype, kernel: str, scale: float, fast: bool) -> Exponential | Pointwise:
    sums = compute_dtype(dtype)
    chosen = kernel_of(kernel)
    weight = feature_rows(projection, chosen).to(sums) * scale**0.5
    # Sums over keys pass float16's largest number, 65504.
    products = dtype if fast and dtype != torch.float16 else sums
    if chosen.exponential:
        return Exponential(weight, scale * chosen.norm, products)
    return Pointwise(chosen, weight, products)


def _contiguous_like(x: Tensor) -> Tensor:
    """Room for a result of the shape of x, of which `_Item` can take parts to write to, whatever the strides of x are."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("performers::favor_chunked", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    log_scale: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kernel: str,
    scale: float,
    is_causal: bool,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    normaliser = numerator.new_zeros(query.shape[:3] if is_causal else (0,))
    after = StateTensors(*(_contiguous_like(x) for x in (numerator, denominator, log_scale)))
    with torch.autocast(query.device.type, enabled=False):
        family = _family(projection, query.dtype, kernel, scale, fast)
        for item in _items(query, key, cu_seqlens, is_causal):
            past = item.state(StateTensors(numerator, denominator, log_scale))
            q, k, v, o = (item.place(x) for x in (query, key, value, out))
            real = item.real(key_padding_mask, query.shape[1])
            if is_causal:
                state = family.causal(q, k, v, real, past, o, item.place(normaliser))
            else:
                state = family.bidirectional(q, k, v, real, past, o)
            for target, tensor in zip(item.state(after), state, strict=True):
                target.copy_(tensor)
    return out, normaliser, after.numerator, after.denominator, after.log_scale


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    log_scale: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kernel: str,
    scale: float,
    is_causal: bool,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(*query.shape[:3], value.shape[-1]),
        numerator.new_empty(query.shape[:3] if is_causal else (0,)),
        _contiguous_like(numerator),
        _contiguous_like(denominator),
        _contiguous_like(log_scale),
    )


@torch.library.custom_op("performers::favor_chunked_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_numerator: Tensor,
    d_denominator: Tensor,
    normaliser: Tensor,
    after_numerator: Tensor,
    after_denominator: Tensor,
    after_log_scale: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    log_scale: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kernel: str,
    scale: float,
    is_causal: bool,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (_contiguous_like(x).zero_() for x in (query, key, value))
    d_past = (_contiguous_like(numerator).zero_(), _contiguous_like(denominator).zero_())
    with torch.autocast(query.device.type, enabled=False):
        family = _family(projection, query.dtype, kernel, scale, fast)
        for item in _items(query, key, cu_seqlens, is_causal):
            past = item.state(StateTensors(numerator, denominator, log_scale))
            q, k, v, d_o, d_q, d_k, d_v = (item.place(x) for x in (query, key, value, d_out, d_query, d_key, d_value))
            real = item.real(key_padding_mask, query.shape[1])
            d_after = (item.summary(d_numerator), item.summary(d_denominator))
            if cu_seqlens is None:
                after = item.state(StateTensors(after_numerator, after_denominator, after_log_scale))
            else:  # one state per packed sequence would outweigh the sequences: it is computed again
                after = family.absorb_all(k, v, real, past)
            if is_causal:
                rows = item.place(normaliser)
                d_state = family.causal_backward(q, k, v, real, past, after, rows, d_o, d_after, d_q, d_k, d_v)
            else:
                d_state = family.bidirectional_backward(q, k, v, real, past, after, d_o, d_after, d_q, d_k, d_v)
            for target, tensor in zip(d_past, d_state, strict=True):
                item.summary(target).copy_(tensor)
    return d_query, d_key, d_value, *d_past


@_backward.register_fake
def _(
    d_out: Tensor,
    d_numerator: Tensor,
    d_denominator: Tensor,
    normaliser: Tensor,
    after_numerator: Tensor,
    after_denominator: Tensor,
    after_log_scale: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    log_scale: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kernel: str,
    scale: float,
    is_causal: bool,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (_contiguous_like(x) for x in (query, key, value))
    return d_query, d_key, d_value, _contiguous_like(numerator), _contiguous_like(denominator)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kernel, scale, is_causal, fast = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(output[1], output[4])
    ctx.arguments = (kernel, scale, is_causal, fast)


def _backward_of(ctx: Any, d_out: Tensor, _: Tensor, d_numerator: Tensor, d_denominator: Tensor, __: Tensor) -> Any:
    gradients = _backward(d_out, d_numerator, d_denominator, *ctx.saved_tensors, *ctx.arguments)
    d_q, d_k, d_v, *d_past = gradients
    return d_q, d_k, d_v, None, *d_past, *[None] * 7


_forward.register_autograd(_backward_of, setup_context=_setup_context)
