"""The Sparse Transformer's attention (1904.10509): each query sees some sqrt(L) of the keys, by one of two fixed patterns.

With a stride l, a query at position i sees a key at position j (section 4.2, both of a pattern's sets in every head, which the
paper calls a merged head):

- strided: the l before it, i - j <= l, and every l-th, (i - j) mod l = 0.
- fixed: its own block of l positions, floor(j / l) = floor(i / l), and the last c positions of every block.

These are the paper's. The code that was released with it (openai/sparse_attention) has others, which are not offered here:

- its "strided" is the second set alone; the first is a mode of its own, "local", for another layer or another head, and it is one
  key narrower, i - j < l;
- its "fixed" counts in blocks of 32 positions: c is a multiple of 32, and with several heads each takes another c of a block (the
  last, the last but one, ...), which the paper recommends in a sentence. Here every head takes the last.

Bidirectional attention, which the paper does not have, takes |i - j| and blocks on both sides. All laws apply.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from performers.attention.exact import ExactState
from performers.attention.gathered import PLANS, Blocks, Plan, Positions, gathered_attention
from performers.attention.mechanism import Mechanism
from performers.errors import InputError

PATTERNS = ("strided", "fixed")


def sparse_pattern(
    length: int,
    pattern: str = "strided",
    stride: int | None = None,
    is_causal: bool = False,
    summary: int | None = None,
) -> Tensor:
    """Which keys a query sees, spelled out: for tests and pictures.

    Arguments:
        length: L.
        pattern, stride, is_causal, summary: as in `sparse_attention`.

    Returns:
        (L, L) bool, queries along the first dimension.

    Raises:
        InputError: an unknown pattern, or a number out of range.
    """
    stride, summary = _sizes(pattern, stride, summary, length)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    strided = ((i - j).abs() <= stride) | ((i - j) % stride == 0)
    visible = strided if pattern == "strided" else (i // stride == j // stride) | (j % stride >= stride - summary)
    return visible & (j <= i) if is_causal else visible


def _sizes(pattern: str, stride: int | None, summary: int | None, length: int) -> tuple[int, int]:
    if pattern not in PATTERNS:
        raise InputError(f"pattern={pattern!r} is not known: expected one of {', '.join(map(repr, PATTERNS))}.")
    for name, number, most in (("stride", stride, None), ("summary", summary, stride)):
        wrong = isinstance(number, bool) or not isinstance(number, int) or number < 1 or (most and number > most)
        if number is not None and wrong:
            raise InputError(f"{name}={number!r} must be a positive integer{f', at most {most}' if most else ''}.")
    if stride is None:
        stride = max(1, round(length**0.5))
        summary = None if summary is None else min(summary, stride)
    return stride, min(8, max(1, stride // 16)) if summary is None else summary


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: str = "strided",
    stride: int | None = None,
    summary: int | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: ExactState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | tuple[Tensor, ExactState]:
    """softmax(q k^T / sqrt(D)) v under a sparse pattern, in O(L sqrt(L)) time and linear memory.

    Arguments:
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        pattern: "strided" or "fixed".
        stride: l; the rounded square root of the longest sequence's length when None, which only a whole sequence has.
        summary: c, of the fixed pattern, at most l (and l itself where that follows from a length and is less); when None
            l // 16, at least 1 and at most the paper's 8 (for a stride of 128).
        is_causal: a query sees no later key; when Lq and Lk differ, the last query is aligned with the last key.
        key_padding_mask: (B, Lk) bool, True for a real token. Positions count real tokens alone, so padding is invisible
            wherever it stands; a query that is padding itself gives zeros.
        cu_seqlens: (N + 1,) int32 or int64, from 0 to L: packed sequences along L (B = 1), each of which sees itself alone.
        state: the keys and values before these.
        return_state: also return the state after the last key.
        scale: the factor on q.k, 1 / sqrt(D) when None.
        enable_gqa: allow Hkv < H, each key head serving H / Hkv consecutive query heads.

    Returns:
        (B, H, Lq, Dv) in the query's type; with `return_state` a pair of it and an `ExactState`: all keys and values, as a
        later query may see any of them. A query with nothing to attend to gives zeros.

    Raises:
        InputError: shapes, types or arguments that do not go together; the message says which.
    """
    _sizes(pattern, stride, summary, key.shape[2])
    if stride is None and (state is not None or return_state):
        raise InputError("stride=None follows from the length of a whole sequence: give a stride to carry a state.")
    return gathered_attention(
        query,
        key,
        value,
        pattern,
        [stride or 0, summary or 0],  # 0: as the length of each sequence asks
        None,
        is_causal,
        key_padding_mask,
        cu_seqlens,
        state,
        return_state,
        scale,
        enable_gqa,
    )


def _plan(pattern: str, at: Positions, is_causal: bool, numbers: list[int]) -> list[Blocks]:
    stride, summary = _sizes(pattern, numbers[0] or None, numbers[1] or None, len(at.key_at))
    device, num_blocks = at.key_at.device, -(-len(at.key_at) // stride)
    block = torch.arange(at.first // stride, num_blocks, device=device)[:, None]
    inside = torch.arange(stride, device=device)
    own = block * stride + inside
    if pattern == "strided":
        near = torch.arange(-stride, stride if is_causal else 2 * stride, device=device)
        column = inside[:, None] + block.T * stride
        if is_causal:
            window = at.blocks(own, block * stride + near, lambda i, j: (i >= j) & (i - j <= stride))
            return [window, at.blocks(column, column, lambda i, j: i - j > stride)]
        window = at.blocks(own, block * stride + near, lambda i, j: (i - j).abs() <= stride)
        return [window, at.blocks(column, column, lambda i, j: (i - j).abs() > stride)]
    last = torch.arange(num_blocks, device=device)[:, None] * stride + inside[stride - summary :]
    summaries = last.flatten().expand(len(block), -1)
    if is_causal:
        return [
            at.blocks(own, own, lambda i, j: i >= j),
            at.blocks(own, summaries, lambda i, j: i // stride > j // stride),
        ]
    return [
        at.blocks(own, own, lambda i, j: i // stride == j // stride),
        at.blocks(own, summaries, lambda i, j: i // stride != j // stride),
    ]


PLANS["strided"] = lambda query, key, at, is_causal, numbers, seed: Plan(_plan("strided", at, is_causal, numbers))
PLANS["fixed"] = lambda query, key, at, is_causal, numbers, seed: Plan(_plan("fixed", at, is_causal, numbers))


class SparseAttention(Mechanism):
    """The Sparse Transformer's attention as a mechanism of a model. It has no parameters and nothing to draw.

    Arguments:
        head_dim: D of queries and keys; not needed, given to every mechanism.
        seed: likewise.
        pattern, stride, summary: as in `sparse_attention`. The stride of a model is fixed (128, the paper's) unless it is None.
    """

    def __init__(
        self,
        head_dim: int,
        seed: int = 0,
        *,
        pattern: str = "strided",
        stride: int | None = 128,
        summary: int | None = None,
    ) -> None:
        super().__init__()
        _sizes(pattern, stride, summary, 1)
        self.pattern, self.stride, self.summary = pattern, stride, summary

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, ExactState]:
        """As `sparse_attention`."""
        return sparse_attention(
            query, key, value, pattern=self.pattern, stride=self.stride, summary=self.summary, **arguments
        )

    @property
    def needs_one_sequence(self) -> bool:
        """Always: the pattern is one of positions."""
        return True
