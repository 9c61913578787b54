"""Softmax attention of queries to chosen keys, by gathering blocks of them: what the sparse mechanisms have in common.

A mechanism says which keys its queries see as a list of tiles: each has blocks of query positions, blocks of key positions and
a rule for the pairs in between. Tiles must not have a pair in common: their softmax sums are then merged, and the result is
softmax over the union. Nothing larger than `TILE` weights is formed at a time; the backward pass forms them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from performers.attention.arguments import check_attention_arguments, repeat_heads, segments
from performers.attention.exact import ExactState
from performers.attention.features import attention_scale

TILE = 2**21  # weights at a time, over all blocks and heads
TOKENS = 2**19  # at a time, over heads: each has a query, a key, a value and their gradients in float32


@dataclass(frozen=True)
class Blocks:
    """N blocks of bq queries each, and of the bk keys that they may see.

    Attributes:
        queries: (Z or 1, N, bq) indices of queries; Z sequences (or heads of sequences); -1 where there is none.
        keys: (Z or 1, N, bk) indices of keys; -1 where there is none.
        visible: the rule: from the numbers of blocks (a slice), a bool tensor (Z or 1, n, bq, bk). Pairs of which one index is
            -1 never count.
    """

    queries: Tensor
    keys: Tensor
    visible: Callable[[slice], Tensor]


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a sequence are: positions count real keys from 0, and earlier queries downwards from -1."""

    key_at: Tensor  # (P,) the key at each position from 0, -1 where there is none
    query_at: Tensor  # (P - first,) the query at each position from `first`, -1 where there is none
    first: int
    # (N + 1,) of packed sequences that a plan has to keep apart: the first position of each, and the end
    bounds: Tensor | None = None

    @classmethod
    def of(
        cls, num_queries: int, num_keys: int, real: Tensor | None, device: torch.device, bounds: Tensor | None = None
    ) -> Positions:
        """The last query is at the last key; `real` are the keys that count, all if None."""
        key_at = torch.arange(num_keys, device=device) if real is None else real
        early = max(0, num_queries - num_keys)
        query_at = torch.cat([torch.arange(early, device=device), key_at + (num_queries - num_keys)]).clamp(min=-1)
        return cls(key_at, query_at, -early, bounds)

    def of_queries(self, num_queries: int) -> Tensor:
        """The position of each query, (Lq,); below `first` where it is padding."""
        position = torch.arange(self.first, len(self.key_at), device=self.key_at.device)
        nowhere = torch.full((num_queries + 1,), self.first - 1, device=position.device)
        return nowhere.scatter_(0, self.query_at.where(self.query_at >= 0, num_queries), position)[:-1]

    def blocks(self, queries: Tensor, keys: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Blocks:
        """The blocks that have these positions, (N, bq) and (N, bk), and a rule on differences of them."""
        index = self._find(self.query_at, queries - self.first)
        some = (index >= 0).any(-1)
        queries, keys, index = queries[some], keys[some], index[some]
        return Blocks(
            index[None],
            self._find(self.key_at, keys)[None],
            lambda blocks: rule(queries[blocks].unsqueeze(-1), keys[blocks].unsqueeze(-2))[None],
        )

    @staticmethod
    def _find(at: Tensor, index: Tensor) -> Tensor:
        inside = (index >= 0) & (index < len(at))
        return at[index.clamp(0, max(0, len(at) - 1))].where(inside, -1) if len(at) else torch.full_like(index, -1)


class Plan(NamedTuple):
    """Which keys the queries of a sequence see.

    Attributes:
        parts: no two have a pair in common.
        own: (Lq,), the index of the key of each query's own token, which it sees only if it sees nothing else, or -2; None if a
            token is like any other to itself.
    """

    parts: Iterable[Blocks]
    own: Tensor | None = None


# By name, as operators take no functions: (query (Z, Lq, D), key (Z, Lk, D), positions, is_causal, numbers, seed) -> plan.
PLANS: dict[str, Callable[[Tensor, Tensor, Positions, bool, list[int], Tensor | None], Plan]] = {}
# Of the plans that have a bound, from the numbers: the distance at which no query sees a key any more. Packed sequences that far
# apart do not see each other, so these plans take all of them at once.
REACHES: dict[str, Callable[[list[int]], int]] = {}
# Plans that keep packed sequences apart themselves, and so take all of them at once, too.
TAKE_PACKED: set[str] = set()


@dataclass(frozen=True)
class _Tile:
    queries: (
        Tensor  # (Z, n, bq) rows of all heads' queries, one head after the other; the head's spare row in place of -1
    )
    keys: Tensor  # (Z, n, bk) likewise
    visible: Tensor  # (Z, n, bq, bk), of the head's own queries; what the spare row sees comes to nothing
    same: Tensor | None  # (Z, n, bq, bk)  the pair of a token with itself


def _tiles(parts: Iterable[Blocks], num: int, num_queries: int, num_keys: int, own: Tensor | None) -> Iterator[_Tile]:
    for part in parts:
        total, bq, bk = part.queries.shape[1], part.queries.shape[2], part.keys.shape[2]
        step = max(1, TILE // max(1, num * bq * bk))
        for start in range(0, total, step):
            blocks = slice(start, min(start + step, total))
            queries, keys = part.queries[:, blocks], part.keys[:, blocks]
            visible = part.visible(blocks) & (keys >= 0).unsqueeze(-2)
            same = None
            if own is not None:
                same = own[queries.clamp(min=0)].unsqueeze(-1) == keys.unsqueeze(-2)
            head = torch.arange(num, device=queries.device)[:, None, None]
            yield _Tile(
                queries.where(queries >= 0, num_queries) + head * (num_queries + 1),
                keys.where(keys >= 0, num_keys) + head * (num_keys + 1),
                visible,
                same,
            )


# Whole rows are copied and added: several times as fast as elements by `gather` and `scatter_add`.
def _take(x: Tensor, index: Tensor) -> Tensor:
    """The rows (Z, n, b) of x (Z, L + 1, D), as (Z, n, b, D)."""
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def _put(x: Tensor, index: Tensor, rows: Tensor) -> None:
    x.view(-1, x.shape[-1]).index_copy_(0, index.flatten(), rows.flatten(0, 2))


def _add(x: Tensor, index: Tensor, rows: Tensor) -> None:
    x.view(-1, x.shape[-1]).index_add_(0, index.flatten(), rows.flatten(0, 2))


def _with_spare(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (Z, L, D) and a row of zeros, to read from and write to where a block has no token."""
    return torch.cat([x.to(dtype), x.new_zeros(x.shape[0], 1, x.shape[-1], dtype=dtype)], 1)


# What is added to the logit of a token with itself where it attends to itself only if it sees nothing else (2001.04451), and to
# that of a hidden pair. On CPUs to add or multiply by a mask is seven times as fast as `masked_fill_`, and `exp` ten times as
# fast where nothing underflows: exp(LOWEST) is about the smallest normal number of float32.
LAST_RESORT = -1e5
HIDDEN = -1e30
LOWEST = -87.0


def _logits(q: Tensor, k: Tensor, tile: _Tile, scale: float) -> Tensor:
    """Those of hidden pairs, too."""
    logits = (q @ k.mT).mul_(scale)
    return logits if tile.same is None else logits.add_(tile.same, alpha=LAST_RESORT)


def _weights(logits: Tensor, log_scale: Tensor, tile: _Tile) -> Tensor:
    """exp(logits - log_scale) in place of `logits`, zero for hidden pairs; of visible ones, no logit may be above its scale."""
    return logits.sub_(log_scale).clamp_(LOWEST, 0.0).exp_().mul_(tile.visible)


def _sequence_forward(
    query: Tensor, key: Tensor, value: Tensor, parts: Iterable[Blocks], scale: float, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs and log sums.

    Arguments:
        query: (Z, Lq, D), of Z heads.
        key: (Z, Lk, D).
        value: (Z, Lk, Dv).
        parts: which keys the queries see; no pair twice.
        scale: the factor on q.k.
        own: (Lq,), the index of the key of each query's own token, which it sees only if it sees nothing else; -2 for none.

    Returns:
        (Z, Lq, Dv) and (Z, Lq), in float32 at least. A query that sees nothing has zeros and -inf.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (_with_spare(x, dtype) for x in (query, key, value))
    num, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
    out = q.new_zeros(num, num_queries + 1, v.shape[-1])
    log_sum = q.new_full((num, num_queries + 1, 1), -torch.inf)
    for tile in _tiles(parts, num, num_queries, num_keys, own):
        logits = _logits(_take(q, tile.queries), _take(k, tile.keys), tile, scale)
        peak = logits.add_(~tile.visible, alpha=HIDDEN).amax(-1, keepdim=True)
        peak = torch.where(peak < HIDDEN / 2, 0.0, peak)
        weights = _weights(logits, peak, tile)
        total = weights.sum(-1, keepdim=True)
        found = peak + total.log()
        before = _take(log_sum, tile.queries)
        both = torch.logaddexp(before, found)
        safe = torch.where(both == -torch.inf, 0.0, both)
        merged = _take(out, tile.queries) * torch.exp(before - safe)
        share = torch.where(total > 0, torch.exp(peak - safe), 0.0)
        merged += weights @ _take(v, tile.keys) * share
        _put(out, tile.queries, merged)
        _put(log_sum, tile.queries, both)
        # The spare row has been written to by every block that lacks a query.
        out[:, -1], log_sum[:, -1] = 0.0, -torch.inf
    return out[:, :-1], log_sum[:, :-1, 0]


def _sequence_backward(
    d_out: Tensor,
    out: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Iterable[Blocks],
    scale: float,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given what `_sequence_forward` took and gave; in the type of `out`."""
    q, k, v, d_o = (_with_spare(x, out.dtype) for x in (query, key, value, d_out))
    num, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
    delta = _with_spare((d_out.to(out.dtype) * out).sum(-1, keepdim=True), out.dtype)
    log_sum = torch.where(log_sum == -torch.inf, torch.inf, log_sum).unsqueeze(-1)
    log_sum = torch.cat([log_sum, log_sum.new_full((num, 1, 1), torch.inf)], 1)
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in _tiles(parts, num, num_queries, num_keys, own):
        tile_q, tile_k, tile_d_o = _take(q, tile.queries), _take(k, tile.keys), _take(d_o, tile.queries)
        weights = _weights(_logits(tile_q, tile_k, tile, scale), _take(log_sum, tile.queries), tile)
        _add(d_v, tile.keys, weights.mT @ tile_d_o)
        slopes = (tile_d_o @ _take(v, tile.keys).mT).sub_(_take(delta, tile.queries)).mul_(weights).mul_(scale)
        _add(d_q, tile.queries, slopes @ tile_k)
        _add(d_k, tile.keys, slopes.mT @ tile_q)
    return d_q[:, :-1], d_k[:, :-1], d_v[:, :-1]


class _Sequence(NamedTuple):
    """The heads of one sequence, of sequences of the same length and no padding, or of packed ones that are apart."""

    heads: slice  # of batch and heads, joined
    rows: slice  # of the length
    real: Tensor | None  # (P,) the key at each position, -1 where there is none; None for every key in order
    bounds: Tensor | None = None  # as in `Positions`


def _sequences(
    query: Tensor, key: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, plan: str, numbers: list[int]
) -> Iterator[_Sequence]:
    batch, heads = query.shape[:2]
    if cu_seqlens is not None:
        packed = segments(cu_seqlens, query.shape[2])
        if plan in REACHES:
            apart = _apart(packed, REACHES[plan](numbers), key.device)
            yield from _in_groups(0, heads, slice(None), key.shape[2], apart)
            return
        if plan in TAKE_PACKED:
            bounds = cu_seqlens.to(key.device, torch.long)
            yield from _in_groups(0, heads, slice(None), key.shape[2], None, bounds)
            return
        for rows in packed:
            yield from _in_groups(0, heads, rows, rows.stop - rows.start, None)
    elif mask is None or bool(mask.all()):
        yield from _in_groups(0, batch * heads, slice(None), key.shape[2], None)
    else:
        for row in range(batch):
            real = mask[row].nonzero()[:, 0]
            yield from _in_groups(row * heads, (row + 1) * heads, slice(None), key.shape[2], real)


def _apart(packed: list[slice], reach: int, device: torch.device) -> Tensor:
    """The key at each position (-1 for none) if the first of a sequence is `reach` after the last of the one before."""
    lengths = torch.tensor([rows.stop - rows.start for rows in packed], dtype=torch.int64)
    gaps = torch.arange(len(packed)).repeat_interleave(lengths) * (reach - 1)
    keys = torch.arange(len(gaps))
    key_at = torch.full((len(gaps) + max(0, len(packed) - 1) * (reach - 1),), -1)
    key_at[keys + gaps] = keys
    return key_at.to(device)


def _in_groups(
    first: int, last: int, rows: slice, length: int, real: Tensor | None, bounds: Tensor | None = None
) -> Iterator[_Sequence]:
    size = max(1, TOKENS // max(1, length))
    for start in range(first, last, size):
        yield _Sequence(slice(start, min(start + size, last)), rows, real, bounds)


def _plans(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    plan: str,
    numbers: list[int],
    is_causal: bool,
) -> Iterator[tuple[slice, slice, Plan]]:
    for heads, rows, real, bounds in _sequences(query, key, mask, cu_seqlens, plan, numbers):
        q, k = query.flatten(0, 1)[heads, rows], key.flatten(0, 1)[heads, rows]
        at = Positions.of(q.shape[1], k.shape[1], real, q.device, bounds)
        if q.shape[0] and q.shape[1] and len(at.key_at):
            yield heads, rows, PLANS[plan](q, k, at, is_causal, numbers, seed)


@torch.library.custom_op("performers::gathered", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    plan: str,
    numbers: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=dtype)
    log_sum = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    q, k, v, o, s = (x.flatten(0, 1) for x in (query, key, value, out, log_sum))
    with torch.autocast(query.device.type, enabled=False):
        for heads, rows, chosen in _plans(query, key, key_padding_mask, cu_seqlens, seed, plan, numbers, is_causal):
            o[heads, rows], s[heads, rows] = _sequence_forward(
                q[heads, rows], k[heads, rows], v[heads, rows], chosen.parts, scale, chosen.own
            )
    return out, log_sum


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(*query.shape[:3], value.shape[-1], dtype=dtype)
    return out, query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op("performers::gathered_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    out: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    plan: str,
    numbers: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    d_o, o, s, q, k, v = (x.flatten(0, 1) for x in (d_out, out, log_sum, query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        for heads, rows, chosen in _plans(query, key, key_padding_mask, cu_seqlens, seed, plan, numbers, is_causal):
            found = _sequence_backward(
                d_o[heads, rows],
                o[heads, rows],
                s[heads, rows],
                q[heads, rows],
                k[heads, rows],
                v[heads, rows],
                chosen.parts,
                scale,
                chosen.own,
            )
            for target, gradient in zip(gradients, found, strict=True):
                target.flatten(0, 1)[heads, rows] = gradient.to(target.dtype)
    return gradients[0], gradients[1], gradients[2]


@_backward.register_fake
def _(d_out: Tensor, out: Tensor, log_sum: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])
    return q, k, v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.mark_non_differentiable(output[1])
    ctx.arguments = inputs[6:]


def _backward_of(ctx: Any, d_out: Tensor, _: Tensor) -> Any:
    return *_backward(d_out, *ctx.saved_tensors, *ctx.arguments), *[None] * 7


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: str,
    numbers: list[int],
    seed: Tensor | None,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: ExactState | None,
    return_state: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | tuple[Tensor, ExactState]:
    """Softmax attention under a plan.

    Arguments:
        query, key, value, is_causal, key_padding_mask, cu_seqlens, state, return_state, scale, enable_gqa: as in
            `exact_attention`.
        plan: a name in `PLANS`.
        numbers, seed: what it takes.

    Raises:
        InputError: shapes, types or arguments that do not go together; the message says which.
    """
    streaming = state is not None or return_state
    check_attention_arguments(query, key, value, key_padding_mask, cu_seqlens, enable_gqa, streaming)
    after = None
    if streaming:
        after = ExactState.after(state, key, value, key_padding_mask)
        key, value, key_padding_mask = after.key, after.value, after.real
    key, value = repeat_heads(query, key, value)
    scale = attention_scale(scale, query.shape[-1])
    out, _ = _forward(query, key, value, key_padding_mask, cu_seqlens, seed, plan, numbers, is_causal, scale)
    out = out.to(query.dtype)
    return (out, after) if return_state and after is not None else out
