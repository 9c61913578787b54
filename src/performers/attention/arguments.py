"""The arguments that all mechanisms share, checked at the door."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from performers.errors import InputError


def check_attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    enable_gqa: bool,
    streaming: bool,
) -> None:
    """Raise an InputError that names what does not fit.

    Arguments:
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        key_padding_mask: (B, Lk) bool.
        cu_seqlens: (N + 1,) int32 or int64; `segments` looks at its values.
        enable_gqa: whether Hkv may be a divisor of H.
        streaming: whether a state is given or asked for.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}: expected four dimensions (batch, heads, length, size)."
            )
        if not tensor.is_floating_point():
            raise InputError(f"{name} has type {tensor.dtype}: expected floating-point numbers.")
    if key.shape[:3] != value.shape[:3]:
        raise InputError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in batch, heads or length.")
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise InputError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or head size.")
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and not (enable_gqa and heads % key_heads == 0):
        hint = "H must be a multiple of Hkv" if enable_gqa else "enable_gqa=True allows fewer key heads"
        raise InputError(f"query has {heads} heads and key has {key_heads}: {hint}.")
    if key_padding_mask is not None:
        if cu_seqlens is not None:
            raise InputError("key_padding_mask and cu_seqlens cannot be combined: packed sequences have no padding.")
        expected = (key.shape[0], key.shape[2])
        if key_padding_mask.shape != expected or key_padding_mask.dtype != torch.bool:
            raise InputError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)} and type {key_padding_mask.dtype}: "
                f"expected {expected} bool, True for a real token."
            )
    if cu_seqlens is not None:
        if streaming:
            raise InputError("a state belongs to one sequence per batch row: it cannot be combined with cu_seqlens.")
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.numel() < 1:
            raise InputError("cu_seqlens must hold N + 1 offsets as int32 or int64, from 0 to the length.")
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise InputError(
                f"cu_seqlens needs a batch of one and as many queries as keys: query {tuple(query.shape)}, "
                f"key {tuple(key.shape)}."
            )


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, Lk, .), each of Hkv heads repeated for the H / Hkv query heads that it serves."""
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def segments(cu_seqlens: Tensor, length: int) -> list[slice]:
    """The packed sequences that are not empty, as slices of the length. Reads the offsets, so it waits for a GPU.

    Raises:
        InputError: the offsets do not rise from 0 to `length`.
    """
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length or any(a > b for a, b in pairwise(offsets)):
        shown = str(offsets) if len(offsets) <= 8 else f"[{', '.join(map(str, offsets[:4]))}, ..., {offsets[-1]}]"
        raise InputError(f"cu_seqlens must rise from 0 to the length {length}, but is {shown}.")
    return [slice(a, b) for a, b in pairwise(offsets) if a < b]
