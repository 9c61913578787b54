"""Which key a query may attend to, spelled out as a matrix: for oracles, tests and pictures, never for linear attention."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    num_queries: int,
    num_keys: int,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The mask that all mechanisms obey.

    Arguments:
        num_queries, num_keys: Lq and Lk. When they differ, causality aligns the last query with the last key.
        is_causal: a query sees no later key.
        key_padding_mask: (B, Lk) bool, True for a real token.
        cu_seqlens: (N + 1,) offsets of packed sequences, each of which sees itself alone.

    Returns:
        A bool tensor of shape (B or 1, 1, Lq, Lk).
    """
    visible = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device)
    if is_causal:
        visible = visible.tril(num_keys - num_queries)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    if cu_seqlens is not None:
        position = torch.arange(num_keys, device=device)
        segment = torch.searchsorted(cu_seqlens.to(position), position, right=True)
        visible = visible & (segment[:, None] == segment[None, :])
    return visible
