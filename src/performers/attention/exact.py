"""Exact softmax attention: the Transformer that Performer is measured against, under the same arguments and laws.

It comes twice. `exact_attention` goes through PyTorch's fused kernels, which never hold the L x L matrix: what a Transformer
costs today. `materialised_attention` writes the matrix out and keeps it for the backward pass, as that of 2009.14794 did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from performers.attention.arguments import check_attention_arguments, repeat_heads, segments
from performers.attention.mechanism import Mechanism
from performers.attention.visibility import visible_keys
from performers.errors import InputError, UnsupportedError


@dataclass(frozen=True)
class ExactState:
    """The keys and values seen so far: it grows with every token, and that is exact attention's price.

    Attributes:
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        real: (B, L) bool, True for a real token.
    """

    key: Tensor
    value: Tensor
    real: Tensor

    def reorder(self, index: Tensor) -> ExactState:
        """The state of batch rows `index`, (B',) integers: what beam search asks for."""
        index = index.to(self.key.device)
        return ExactState(*(tensor.index_select(0, index) for tensor in (self.key, self.value, self.real)))

    def is_finite(self) -> bool:
        """Whether its keys and values are."""
        return bool(self.key.isfinite().all() and self.value.isfinite().all())

    def to(self, device: torch.device) -> ExactState:
        """The same on a device."""
        return ExactState(self.key.to(device), self.value.to(device), self.real.to(device))

    def rows(self) -> list[ExactState]:
        """The state of each row of the batch, as a batch of one."""
        parts = zip(self.key.split(1), self.value.split(1), self.real.split(1), strict=True)
        return [ExactState(*row) for row in parts]

    def joined(self, others: Sequence[ExactState]) -> ExactState:
        """The rows of this state and then those of the others, as long as the longest."""
        states = [self, *others]
        missing = [max(state.real.shape[1] for state in states) - state.real.shape[1] for state in states]
        return ExactState(
            torch.cat([pad(state.key, (0, 0, 0, more)) for state, more in zip(states, missing, strict=True)]),
            torch.cat([pad(state.value, (0, 0, 0, more)) for state, more in zip(states, missing, strict=True)]),
            torch.cat([pad(state.real, (0, more)) for state, more in zip(states, missing, strict=True)]),
        )

    def mixed(self, weights: Tensor) -> ExactState:
        """Sums of these states: row r holds the keys and values of every row j with weights[r, j] of 1, in the order of j.

        What sums of FAVOR states are to exact attention. The result has B x L places per row.

        Arguments:
            weights: (R, B), of zeros and ones: what was read once cannot be read twice, nor taken out again.

        Raises:
            UnsupportedError: another weight.
        """
        if not ((weights == 0) | (weights == 1)).all():
            raise UnsupportedError(
                "Keys and values of exact attention are kept or left out: expected weights of 0 and 1."
            )
        rows = weights.shape[0]
        real = (weights.to(self.real.device) == 1)[:, :, None] & self.real
        key, value = (
            x.transpose(0, 1).flatten(1, 2).expand(rows, -1, -1, -1) for x in (self.key, self.value)
        )  # (H, B L, D), for every row
        return ExactState(key, value, real.flatten(1))

    @classmethod
    def after(cls, state: ExactState | None, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> ExactState:
        """The state after these keys and values as well."""
        real = key_padding_mask
        if real is None:
            real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        if state is None:
            return cls(key, value, real)
        return cls(torch.cat([state.key, key], 2), torch.cat([state.value, value], 2), torch.cat([state.real, real], 1))

    def last(self, count: int) -> ExactState:
        """The state of the last `count` real tokens of each row."""
        length = self.real.shape[1]
        if length <= count:
            return self
        kept = self.real.int().argsort(dim=1, stable=True)[:, length - count :]
        index = kept[:, None, :, None]
        key, value = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (self.key, self.value))
        return ExactState(key, value, self.real.gather(1, kept))

    @property
    def nbytes(self) -> int:
        """The memory that the state takes."""
        return self.key.nbytes + self.value.nbytes + self.real.nbytes


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: ExactState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | tuple[Tensor, ExactState]:
    """softmax(q k^T / sqrt(D)) v by PyTorch's fused kernels; time is quadratic in the length.

    Arguments:
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        is_causal: a query sees no later key; when Lq and Lk differ, the last query is aligned with the last key.
        key_padding_mask: (B, Lk) bool, True for a real token.
        cu_seqlens: (N + 1,) int32 or int64, from 0 to L: packed sequences along L (B = 1), each of which sees itself alone.
        state: the keys and values before these; every query sees all of them.
        return_state: also return the state after the last key.
        scale: the factor on q.k, 1 / sqrt(D) when None.
        enable_gqa: allow Hkv < H, each key head serving H / Hkv consecutive query heads.

    Returns:
        (B, H, Lq, Dv); with `return_state` a pair of it and an `ExactState`. A query with nothing to attend to gives zeros.

    Raises:
        InputError: shapes, types or arguments that do not go together; the message says which.
    """
    return _attention(
        scaled_dot_product_attention,
        query,
        key,
        value,
        is_causal,
        key_padding_mask,
        cu_seqlens,
        state,
        return_state,
        scale,
        enable_gqa,
    )


def materialised_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: ExactState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | tuple[Tensor, ExactState]:
    """softmax(q k^T / sqrt(D)) v as written: the Lq x Lk matrix is formed, in float32 at least, and kept for the backward pass.

    The baseline of 2009.14794 (equation 1), whose memory is quadratic in the length. Arguments, results and errors are those of
    `exact_attention`; packed sequences have a matrix each.
    """
    return _attention(
        _materialised,
        query,
        key,
        value,
        is_causal,
        key_padding_mask,
        cu_seqlens,
        state,
        return_state,
        scale,
        enable_gqa,
    )


def _materialised(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What `scaled_dot_product_attention` promises of these arguments; a row without keys gives a mean, not zeros."""
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        logits = (query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.to(wide).mT
        if is_causal:
            attn_mask = visible_keys(*logits.shape[-2:], is_causal=True, device=query.device)
        if attn_mask is not None:
            logits.masked_fill_(~attn_mask, torch.finfo(wide).min)
        return (logits.softmax(-1) @ value.to(wide)).to(query.dtype)


def _attention(
    product: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: ExactState | None,
    return_state: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | tuple[Tensor, ExactState]:
    """Exact attention by a function with the arguments of `scaled_dot_product_attention`."""
    streaming = state is not None or return_state
    check_attention_arguments(query, key, value, key_padding_mask, cu_seqlens, enable_gqa, streaming)
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        raise InputError(f"query, key and value have types {query.dtype}, {key.dtype} and {value.dtype}: expected one.")
    if cu_seqlens is not None:
        if torch.compiler.is_compiling():  # a graph cannot hold a loop over lengths that it does not know
            visible = visible_keys(
                *[query.shape[2]] * 2, is_causal=is_causal, cu_seqlens=cu_seqlens, device=query.device
            )
            return product(query, *repeat_heads(query, key, value), attn_mask=visible, scale=scale)
        lengths = [rows.stop - rows.start for rows in segments(cu_seqlens, query.shape[2])]
        # Split, not sliced: the backward pass of each slice would fill and add gradients as long as all sequences together.
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        out = [_attend(product, q, k, v, is_causal, None, 0, scale) for q, k, v in parts]
        return torch.cat(out, dim=2) if out else query.new_zeros(*query.shape[:3], value.shape[-1])
    if not streaming:
        return _attend(product, query, key, value, is_causal, key_padding_mask, 0, scale)
    past = 0 if state is None else state.key.shape[2]
    after = ExactState.after(state, key, value, key_padding_mask)
    out = _attend(product, query, after.key, after.value, is_causal, after.real, past, scale)
    return (out, after) if return_state else out


def _attend(
    product: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    real: Tensor | None,
    past: int,
    scale: float | None,
) -> Tensor:
    key, value = repeat_heads(query, key, value)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if real is None and (not is_causal or num_queries == num_keys):
        return product(query, key, value, is_causal=is_causal, scale=scale)
    if real is not None and not is_causal:
        some = real.any(-1)[:, None, None, None]
        out = product(query, key, value, attn_mask=real[:, None, None, :], scale=scale)
        return out.masked_fill(~some, 0.0)
    # SDPA's own causal flag aligns top-left and cannot be combined with a mask.
    visible = visible_keys(num_queries, num_keys, is_causal=is_causal, key_padding_mask=real, device=query.device)
    if is_causal and num_queries > num_keys - past:
        visible[..., :past] = visible_keys(num_queries, past, key_padding_mask=None if real is None else real[:, :past])
    out = product(query, key, value, attn_mask=visible, scale=scale)
    return out.masked_fill(~visible.any(-1, keepdim=True), 0.0)


class ExactAttention(Mechanism):
    """Exact attention as a mechanism of a model. It has no parameters and nothing to draw. All laws apply to it.

    Arguments:
        head_dim: D of queries and keys; not needed, given to every mechanism.
        seed: likewise.
    """

    def __init__(self, head_dim: int, seed: int = 0) -> None:
        super().__init__()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, ExactState]:
        """As `exact_attention`."""
        return exact_attention(query, key, value, **arguments)

    def shareable(self, state: ExactState) -> ExactState:
        """All of it."""
        return state

    @property
    def shared_kinds(self) -> tuple[type, ...]:
        """Its own."""
        return (ExactState,)


class MaterialisedAttention(ExactAttention):
    """Exact attention with its L x L matrix in memory, as a mechanism of a model: the paper's baseline. All laws apply to it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, ExactState]:
        """As `materialised_attention`."""
        return materialised_attention(query, key, value, **arguments)
