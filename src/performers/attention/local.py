"""Local attention: each query sees the keys in a window around it. Exact near, blind far: the other half of linear attention.

Causal, a window of w is the query's own token and the w - 1 before it, and a state holds no more than these: unlike that of exact
attention it does not grow. Bidirectional, it is w - 1 on both sides. Layers of it, or some heads of a layer (see `split`), go
beside layers or heads that see everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from performers.attention.exact import ExactState
from performers.attention.gathered import PLANS, REACHES, Plan, Positions, gathered_attention
from performers.attention.mechanism import Mechanism
from performers.errors import InputError


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 128,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: ExactState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | tuple[Tensor, ExactState]:
    """softmax(q k^T / sqrt(D)) v over the keys of which |i - j| < window, in O(L window) time and linear memory.

    Arguments:
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        window: w, in tokens.
        is_causal: a query sees no later key; when Lq and Lk differ, the last query is aligned with the last key.
        key_padding_mask: (B, Lk) bool, True for a real token. Positions count real tokens alone, so padding is invisible
            wherever it stands; a query that is padding itself gives zeros.
        cu_seqlens: (N + 1,) int32 or int64, from 0 to L: packed sequences along L (B = 1), each of which sees itself alone.
        state: what `return_state` gave for the tokens before these.
        return_state: also return the state after the last key.
        scale: the factor on q.k, 1 / sqrt(D) when None.
        enable_gqa: allow Hkv < H, each key head serving H / Hkv consecutive query heads.

    Returns:
        (B, H, Lq, Dv) in the query's type; with `return_state` a pair of it and an `ExactState` of the last w - 1 real tokens of
        each row. A query with nothing to attend to gives zeros.

    Raises:
        InputError: shapes, types or arguments that do not go together; the message says which.
    """
    check_window(window)
    out = gathered_attention(
        query,
        key,
        value,
        "local",
        [window],
        None,
        is_causal,
        key_padding_mask,
        cu_seqlens,
        state,
        return_state,
        scale,
        enable_gqa,
    )
    if isinstance(out, Tensor):
        return out
    return out[0], out[1].last(window - 1)


def check_window(window: int) -> None:
    """Refuse what is not a positive integer.

    Raises:
        InputError: saying so.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"window={window!r} must be a positive integer.")


def _plan(query: Tensor, key: Tensor, at: Positions, is_causal: bool, numbers: list[int], seed: Tensor | None) -> Plan:
    (window,) = numbers
    device = at.key_at.device
    asked = (at.query_at >= 0).nonzero()[:, 0]
    if not len(asked):
        return Plan([])
    first, end = at.first + int(asked[0]), len(at.key_at)
    size = min(window, end - first)  # a single query, as in decoding, has a block of its own size
    start = torch.arange(first, end, size, device=device)[:, None]
    queries = start + torch.arange(size, device=device)
    keys = start + torch.arange(1 - window, size if is_causal else size + window - 1, device=device)
    if is_causal:
        return Plan([at.blocks(queries, keys, lambda i, j: (i >= j) & (i - j < window))])
    return Plan([at.blocks(queries, keys, lambda i, j: (i - j).abs() < window)])


PLANS["local"] = _plan
REACHES["local"] = lambda numbers: numbers[0]


class LocalAttention(Mechanism):
    """Attention to a window, as a mechanism of a model. It has no parameters and nothing to draw. All laws apply to it.

    Arguments:
        head_dim: D of queries and keys; not needed, given to every mechanism.
        seed: likewise.
        window: as in `local_attention`.
    """

    def __init__(self, head_dim: int, seed: int = 0, *, window: int = 128) -> None:
        super().__init__()
        check_window(window)
        self.window = window

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, ExactState]:
        """As `local_attention`."""
        return local_attention(query, key, value, window=self.window, **arguments)

    @property
    def has_fixed_causal_state(self) -> bool:
        """Always: the last w - 1 tokens."""
        return True

    @property
    def needs_one_sequence(self) -> bool:
        """Always: the window is one of positions."""
        return True
