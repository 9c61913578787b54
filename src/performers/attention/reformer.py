"""Reformer's attention (2001.04451): each query sees the keys that a locality-sensitive hash puts near it.

Queries and keys are hashed by random rotations (section 3, h(x) = argmax [xR; -xR]). The keys are sorted by bucket, then by
position, and cut in chunks of `bucket_size`; a query sees the keys of the chunk that it falls into and of the one before. That
is done `num_hashes` times, and softmax is taken over the union of what the rounds show (section 3, equations 3 to 6).

What it cannot do: in causal attention a query sees no later key, but which earlier ones it sees depends on how all keys fill the
chunks, the later ones too. By construction, then, outputs depend a little on the future (docs/systems.md measures how much), and
no state can be carried on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.exact import ExactState
from performers.attention.gathered import PLANS, TAKE_PACKED, Blocks, Plan, Positions, gathered_attention
from performers.attention.mechanism import Mechanism
from performers.errors import InputError

# Beyond as many buckets a hash is a pair of hashes, which need the square root of the work (section 4.1).
MOST_ROTATIONS = 64
PRODUCTS = 2**22  # of vectors and rotations at a time


def reformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_hashes: int = 4,
    bucket_size: int = 64,
    seed: int | Tensor = 0,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: ExactState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | tuple[Tensor, ExactState]:
    """Softmax attention to the keys that hash near a query, in O(L log L) time and linear memory.

    With `key` equal to `query` this is the paper's shared-QK attention: keys are q / |q|, and a token attends to itself only if
    it sees nothing else. Otherwise queries and keys are hashed by the same rotations, and the keys are used as they are, which
    is not the paper's. Under `torch.compile` they are equal only if they are one tensor.

    Arguments:
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        num_hashes: rounds of hashing; more find more of the near keys.
        bucket_size: keys in a chunk, and about as many in a bucket. Any length goes. Where one chunk holds all keys, this is
            exact attention.
        seed: of the rotations, an integer or a tensor of one; the same seed gives the same rotations everywhere.
        is_causal: a query sees no later key; when Lq and Lk differ, the last query is aligned with the last key.
        key_padding_mask: (B, Lk) bool, True for a real token. Padding is not hashed, wherever it stands; a query that is padding
            itself gives zeros.
        cu_seqlens: (N + 1,) int32 or int64, from 0 to L: packed sequences along L (B = 1), each of which sees itself alone.
        state: the keys and values before these. All keys are hashed anew with these, so outputs differ from those of one pass.
        return_state: also return the state after the last key.
        scale: the factor on q.k, 1 / sqrt(D) when None.
        enable_gqa: allow Hkv < H, each key head serving H / Hkv consecutive query heads.

    Returns:
        (B, H, Lq, Dv) in the query's type; with `return_state` a pair of it and an `ExactState`. A query with nothing to attend
        to gives zeros.

    Raises:
        InputError: shapes, types or arguments that do not go together; the message says which.
    """
    check_hashing(num_hashes, bucket_size)
    shared = key is query
    if not shared and not torch.compiler.is_compiling():
        shared = key.shape == query.shape and torch.equal(key, query)
    if shared:
        key = F.normalize(key.to(torch.promote_types(key.dtype, torch.float32)), dim=-1).to(key.dtype)
    return gathered_attention(
        query,
        key,
        value,
        "lsh",
        [num_hashes, bucket_size, int(shared)],
        seed if isinstance(seed, Tensor) else torch.tensor(seed),
        is_causal,
        key_padding_mask,
        cu_seqlens,
        state,
        return_state,
        scale,
        enable_gqa,
    )


def check_hashing(num_hashes: int, bucket_size: int) -> None:
    """Refuse what are not positive integers.

    Raises:
        InputError: saying which.
    """
    for name, number in (("num_hashes", num_hashes), ("bucket_size", bucket_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{name}={number!r} must be a positive integer.")


def hash_buckets(x: Tensor, seed: int, num_hashes: int, num_keys: int, bucket_size: int) -> Tensor:
    """The bucket of each vector in each round: h(x) = argmax [xR; -xR] (2001.04451, section 3; Andoni et al. 2015).

    Arguments:
        x: (..., L, D).
        seed: of the rotations R.
        num_hashes: rounds.
        num_keys, bucket_size: there are as many buckets as chunks of keys, made even.

    Returns:
        (..., rounds, L) integers.
    """
    wanted = -(-num_keys // bucket_size)
    if wanted <= 1:
        return torch.zeros(*x.shape[:-2], num_hashes, x.shape[-2], dtype=torch.long, device=x.device)
    # Halves of the numbers of buckets: rotations come in pairs of directions.
    halves = [-(-wanted // 2)]
    if wanted > MOST_ROTATIONS:
        first = round(wanted**0.5 / 2)
        halves = [first, -(-wanted // (4 * first))]
    generator = torch.Generator().manual_seed(seed)
    rotations = torch.randn(num_hashes, sum(halves), x.shape[-1], generator=generator, dtype=torch.float64)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    factors = rotations.to(x).split(halves, dim=1)
    size = max(1, PRODUCTS // (x.shape[:-2].numel() * num_hashes * max(halves)))

    def bucket(piece: Tensor) -> Tensor:
        found = torch.zeros((), dtype=torch.long, device=x.device)
        for rotation in factors:
            # The rounds side by side make one product; the largest of [y; -y] is the largest |y|, with its sign.
            turned = (piece @ rotation.flatten(0, 1).mT).unflatten(-1, rotation.shape[:2])  # (..., size, rounds, half)
            largest = turned.abs().argmax(-1, keepdim=True)
            side = largest + rotation.shape[1] * (turned.gather(-1, largest) < 0)
            found = found * (2 * rotation.shape[1]) + side.squeeze(-1)
        return found.mT

    return torch.cat([bucket(piece) for piece in x.split(size, dim=-2)], -1)


class _Cuts(NamedTuple):
    """How N sequences, one after the other, are cut into chunks, which are numbered through."""

    of: Tensor  # (P,) the sequence of each position
    start: Tensor  # (N,) the position where each begins
    end: Tensor  # (N,)
    first: Tensor  # (N,) the first chunk of each
    chunks: Tensor  # (N,) how many each has
    sizes: list[int]  # the numbers of chunks that occur
    total: int  # chunks of all

    @classmethod
    def of_sequences(cls, at: Positions, bucket_size: int) -> _Cuts:
        num_keys, device = len(at.key_at), at.key_at.device
        bounds = torch.tensor([0, num_keys], device=device) if at.bounds is None else at.bounds
        start, end = bounds[:-1], bounds[1:].contiguous()
        chunks = (end - start + bucket_size - 1) // bucket_size
        of = torch.searchsorted(end, torch.arange(num_keys, device=device), right=True)
        counts: list[int] = chunks.tolist()
        sizes = sorted({count for count in counts if count})
        return cls(of, start, end, chunks.cumsum(0) - chunks, chunks, sizes, sum(counts))

    def chunk(self, of: Tensor, rank: Tensor, bucket_size: int) -> Tensor:
        """The chunk of ranks (..., L) of sequences (L,)."""
        return self.first[of] + (rank - self.start[of]) // bucket_size


class _Hashed(NamedTuple):
    """Where the queries and keys of Z heads fall in each round."""

    query_chunk: Tensor  # (Z, rounds, Lq) int32, by the index of the query
    key_chunk: Tensor  # (Z, rounds, P) int32, by the position of the key
    order: Tensor  # (Z, rounds, P)  the positions of the keys, sorted: sequence by sequence, each by bucket
    cuts: _Cuts


def _hash_sequences(x: Tensor, of: Tensor, cuts: _Cuts, seed: int, num_hashes: int, bucket_size: int) -> Tensor:
    """`hash_buckets` of each sequence: of tokens (Z, L, D) of sequences (L,), (Z, rounds, L)."""
    if len(cuts.sizes) == 1:
        return hash_buckets(x, seed, num_hashes, cuts.sizes[0] * bucket_size, bucket_size)
    buckets = torch.zeros(x.shape[0], num_hashes, x.shape[1], dtype=torch.long, device=x.device)
    for size in cuts.sizes:
        rows = (cuts.chunks[of] == size).nonzero()[:, 0]
        found = hash_buckets(x.index_select(1, rows), seed, num_hashes, size * bucket_size, bucket_size)
        buckets.index_copy_(2, rows, found)
    return buckets


def _hash(query: Tensor, key: Tensor, at: Positions, seed: int, num_hashes: int, bucket_size: int) -> _Hashed:
    num_keys = len(at.key_at)
    cuts = _Cuts.of_sequences(at, bucket_size)
    position = torch.arange(num_keys, device=key.device)
    query_position = at.of_queries(query.shape[1]).clamp(min=-1)
    query_of = cuts.of[query_position.clamp(min=0)]
    buckets = _hash_sequences(key.index_select(1, at.key_at), cuts.of, cuts, seed, num_hashes, bucket_size)
    query_buckets = _hash_sequences(query, query_of, cuts, seed, num_hashes, bucket_size)
    # A key's place in the order: by sequence, by bucket, then by position. Queries fall in where their own key would.
    most = torch.maximum(buckets.max(), query_buckets.max()) + 1
    places, order = torch.sort((cuts.of * most + buckets) * (num_keys + 1) + position + 1, dim=-1)
    rank = torch.empty_like(order).scatter_(-1, order, position.expand_as(order))
    own = (query_of * most + query_buckets) * (num_keys + 1) + query_position + 1
    query_rank = torch.searchsorted(places, own).minimum(cuts.end[query_of] - 1)
    return _Hashed(
        cuts.chunk(query_of, query_rank, bucket_size).int(),
        cuts.chunk(cuts.of, rank, bucket_size).int(),
        order,
        cuts,
    )


def _round(hashed: _Hashed, number: int, at: Positions, bucket_size: int, is_causal: bool) -> Blocks:
    """The blocks of one round: the queries of each chunk, in as many blocks of `bucket_size` as they need."""
    num_keys, device = len(at.key_at), at.key_at.device
    cuts, num_chunks = hashed.cuts, hashed.cuts.total
    position = at.of_queries(hashed.query_chunk.shape[-1])
    # A query that is padding goes to a chunk after the last one, and from there into no block.
    chunk, queries = torch.sort(
        hashed.query_chunk[:, number].where(position >= at.first, num_chunks).long(), dim=-1, stable=True
    )
    num, num_queries = chunk.shape
    count = torch.zeros(num, num_chunks + 1, dtype=torch.long, device=device)
    count.scatter_add_(1, chunk, torch.ones_like(chunk))
    within = torch.arange(num_queries, device=device) - (count.cumsum(1) - count).gather(1, chunk)
    last_block = (-(-count[:, :-1] // bucket_size)).cumsum(1)  # of each chunk, exclusive
    block = F.pad(last_block, (1, 0)).gather(1, chunk) + within // bucket_size
    total = int(last_block[:, -1].max())
    slot = (block * bucket_size + within % bucket_size).where(chunk < num_chunks, total * bucket_size)
    blocks_of_queries = torch.full((num, total * bucket_size + 1), -1, device=device).scatter_(1, slot, queries)
    blocks_of_queries = blocks_of_queries[:, :-1].unflatten(1, (total, bucket_size))

    numbers = torch.arange(total, device=device).expand(num, -1).contiguous()
    chunk_of_block = torch.searchsorted(last_block, numbers, right=True)
    sequence = torch.searchsorted(cuts.first + cuts.chunks, chunk_of_block, right=True).clamp(max=len(cuts.first) - 1)
    start, end = cuts.start[sequence].unsqueeze(-1), cuts.end[sequence].unsqueeze(-1)
    near = torch.arange(-bucket_size, bucket_size, device=device)
    rank = start + (chunk_of_block - cuts.first[sequence]).unsqueeze(-1) * bucket_size + near
    keys = _at(hashed.order[:, number], rank.clamp(0, num_keys - 1))

    def visible(blocks: slice) -> Tensor:
        q, k = blocks_of_queries[:, blocks].clamp(min=0), keys[:, blocks]
        seen = torch.ones((), dtype=torch.bool, device=device)
        if is_causal:
            seen = position[q].unsqueeze(-1) >= k.unsqueeze(-2)
        for earlier in range(number):
            q_chunk, k_chunk = _at(hashed.query_chunk[:, earlier], q), _at(hashed.key_chunk[:, earlier], k)
            ahead = q_chunk.unsqueeze(-1) - k_chunk.unsqueeze(-2)
            seen = seen & (ahead.bitwise_right_shift_(1) != 0)  # neither 0 nor 1
        return seen

    inside = (rank >= start) & (rank < end)
    return Blocks(blocks_of_queries, at.key_at[keys].where(inside, -1), visible)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x (Z, L) at (Z, n, b) indices."""
    return x.gather(1, index.flatten(1)).view_as(index)


def _plan(query: Tensor, key: Tensor, at: Positions, is_causal: bool, numbers: list[int], seed: Tensor | None) -> Plan:
    num_hashes, bucket_size, shared = numbers
    assert seed is not None
    hashed = _hash(query, key, at, int(seed), num_hashes, bucket_size)

    def rounds() -> Iterator[Blocks]:
        for number in range(num_hashes):
            yield _round(hashed, number, at, bucket_size, is_causal)

    own = None
    if shared:
        position = at.of_queries(query.shape[1])
        own = at.key_at[position.clamp(min=0)].where(position >= 0, -2)
    return Plan(rounds(), own)


PLANS["lsh"] = _plan
TAKE_PACKED.add("lsh")


class ReformerAttention(Mechanism):
    """Reformer's attention as a mechanism of a model.

    Two laws do not apply: exact causality, and that streaming equals the whole. A query's chunk depends on how all keys fill the
    chunks, so later keys move an output a little, and a state brings other chunks than the whole sequence has. No weight ever
    goes to a later key. And where reversible layers are computed again, a token that rounding has moved over the border of two
    buckets sees other keys. Unbiasedness has no meaning for it: it estimates nothing, its hashes choose the keys that are seen.

    Arguments:
        head_dim: D of queries and keys; not needed, given to every mechanism.
        seed: of the rotations.
        num_hashes, bucket_size: as in `reformer_attention`.

    Attributes:
        rotation_seed: a buffer of one integer, saved in the state_dict. Only `redraw_` changes it.
    """

    rotation_seed: Tensor

    def __init__(self, head_dim: int, seed: int = 0, *, num_hashes: int = 4, bucket_size: int = 64) -> None:
        super().__init__()
        check_hashing(num_hashes, bucket_size)
        self.num_hashes, self.bucket_size = num_hashes, bucket_size
        with torch.device("cpu"):
            self.register_buffer("rotation_seed", torch.zeros((), dtype=torch.long))
            self.redraw_(torch.Generator().manual_seed(seed))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, ExactState]:
        """As `reformer_attention`."""
        return reformer_attention(
            query,
            key,
            value,
            num_hashes=self.num_hashes,
            bucket_size=self.bucket_size,
            seed=self.rotation_seed,
            **arguments,
        )

    def redraw_(self, generator: torch.Generator) -> None:
        """Draw new rotations."""
        with torch.no_grad():
            self.rotation_seed.copy_(torch.randint(2**31, (), generator=generator))

    @property
    def redraws_by_default(self) -> bool:
        """Whether training draws new rotations as it goes: as in the paper's code, which draws them at every step."""
        return True

    @property
    def needs_one_sequence(self) -> bool:
        """Always: a token is hashed in the order of its sequence."""
        return True

    @property
    def shares_query_and_key(self) -> bool:
        """Always: shared-QK attention."""
        return True
