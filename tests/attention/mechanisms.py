"""Every mechanism that has to obey the laws, one line each, and the oracle it is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn

from performers.attention import (
    ExactAttention,
    FavorAttention,
    LocalAttention,
    MaterialisedAttention,
    SplitAttention,
    favor_attention,
    visible_keys,
)
from performers.attention.reformer import ReformerAttention, hash_buckets
from performers.attention.sparse import SparseAttention

Oracle = Callable[..., Tensor]


def favor_oracle(mechanism: FavorAttention, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """The quadratic form of the same features, in float64."""
    return favor_attention(q.double(), k.double(), v.double(), mechanism.features, backend="reference", **arguments)


def exact_oracle(
    mechanism: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, written out in float64."""
    q, k, v = q.double(), k.double(), v.double()
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    visible = visible_keys(
        q.shape[2], k.shape[2], is_causal=is_causal, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens
    )
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -1e300)
    return (torch.softmax(logits, -1) * visible) @ v


def _sees(mechanism: SparseAttention | LocalAttention, i: Tensor, j: Tensor) -> Tensor:
    """Which positions j those at i see, before causality."""
    if isinstance(mechanism, LocalAttention):
        return (i - j).abs() < mechanism.window
    stride, summary = mechanism.stride, mechanism.summary
    assert stride is not None
    if mechanism.pattern == "strided":
        return ((i - j).abs() <= stride) | ((i - j) % stride == 0)
    assert summary is not None
    return (i // stride == j // stride) | (j % stride >= stride - summary)


def sparse_oracle(
    mechanism: SparseAttention | LocalAttention, q: Tensor, k: Tensor, v: Tensor, **arguments: Any
) -> Tensor:
    """Exact attention, one sequence after the other, under the pattern written out as a matrix over its real tokens."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    rows, q = [], q.double()
    cuts = arguments.get("cu_seqlens")
    spans = [(0, q.shape[2])] if cuts is None else list(pairwise(cuts.tolist()))
    for row in range(q.shape[0]):
        outs = []
        for start, stop in spans:
            many = (k if cuts is None else q).shape[2] if cuts is None else stop - start
            at_q, at_k = slice(start, stop), slice(start, start + many)
            mask = arguments.get("key_padding_mask")
            real = torch.ones(many, dtype=torch.bool) if mask is None else mask[row]
            num_queries, early = stop - start, max(0, stop - start - many)
            # positions: real keys count from 0; queries before the first key come before them
            position = torch.cat([torch.arange(-early, 0), torch.where(real, real.cumsum(0) - 1, -(10**6))])
            p_k, p_q = position[early:], position[len(position) - num_queries :]
            i, j = p_q[:, None], p_k[None]
            visible = _sees(mechanism, i, j) & (i > -(10**6)) & (j > -(10**6))
            if arguments.get("is_causal"):
                visible = visible & (j <= i)
            logits = (q[row, :, at_q] @ k[row, :, at_k].mT * q.shape[-1] ** -0.5).masked_fill(~visible, -1e300)
            outs.append((torch.softmax(logits, -1) * visible) @ v[row, :, at_k])
        rows.append(torch.cat(outs, 1))
    return torch.stack(rows)


def reformer_oracle(mechanism: ReformerAttention, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """Exact attention, one sequence and head after the other, under what each round of hashing shows.

    With one tensor for queries and keys, shared-QK attention: keys q / |q|, a token to itself only if it sees nothing else.
    """
    shared = k is q
    k = torch.nn.functional.normalize(k, dim=-1) if shared else k
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    q, cuts, mask = q.double(), arguments.get("cu_seqlens"), arguments.get("key_padding_mask")
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    size, hashes = mechanism.bucket_size, mechanism.num_hashes
    for row, head in product(range(q.shape[0]), range(q.shape[1])):
        for start, stop in [(0, None)] if cuts is None else pairwise(cuts.tolist()):
            one_q, one_k, one_v = (x[row, head, start:stop] for x in (q, k, v))
            late = len(one_k) - len(one_q)
            real = torch.ones(len(one_k), dtype=torch.bool) if mask is None else mask[row]
            count = int(real.sum())
            kept = [i for i in range(len(one_q)) if i + late < 0 or real[i + late]]
            if not count or not kept:
                continue
            place = torch.tensor([i + late if i + late < 0 else int(real[: i + late].sum()) for i in kept])
            visible = torch.zeros(len(kept), count, dtype=torch.bool)
            buckets = [
                hash_buckets(x.float(), int(mechanism.rotation_seed), hashes, count, size)
                for x in (one_q[kept], one_k[real])
            ]
            for q_bucket, k_bucket in zip(*buckets, strict=True):
                mine = q_bucket * (count + 1) + place.clamp(min=-1) + 1
                theirs = k_bucket * (count + 1) + torch.arange(count) + 1
                q_chunk = (theirs[None] < mine[:, None]).sum(-1).clamp(max=count - 1) // size
                k_chunk = (theirs[None] < theirs[:, None]).sum(-1) // size
                ahead = q_chunk[:, None] - k_chunk[None]
                visible |= (ahead == 0) | (ahead == 1)
            if arguments.get("is_causal"):
                visible &= torch.arange(count) <= place[:, None]
            logits = one_q[kept] @ one_k[real].T * q.shape[-1] ** -0.5
            if shared:
                logits = logits.masked_fill(place[:, None] == torch.arange(count), -1e5)
            logits = logits.masked_fill(~visible, -1e300)
            rows = torch.arange(q.shape[2])[start:stop][kept]
            attended = (torch.softmax(logits, -1) * visible) @ one_v[real]
            out = out.index_put((torch.tensor(row), torch.tensor(head), rows), attended)
    return out


def split_oracle(mechanism: SplitAttention, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """Each half's own oracle."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    arguments.pop("enable_gqa", None)
    at = mechanism.first_heads(q.shape[1])
    local, favor = mechanism.first, mechanism.second
    assert isinstance(local, LocalAttention)
    assert isinstance(favor, FavorAttention)
    first, second = ([x[:, heads] for x in (q, k, v)] for heads in (slice(None, at), slice(at, None)))
    return torch.cat([sparse_oracle(local, *first, **arguments), favor_oracle(favor, *second, **arguments)], 1)


@dataclass(frozen=True)
class Case:
    """A mechanism under the laws.

    Attributes:
        make: (head_dim, num_features) -> module; mechanisms without features ignore the second.
        oracle: (mechanism, q, k, v, **arguments) -> output in float64, differentiable.
        positive: all weights are positive, so that rounding is not amplified by cancellation.
        has_features: the number of features means something.
        hashes: which keys a query sees follows from a hash of all of them, so that outputs depend a little on later ones and
            cannot be streamed exactly.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    oracle: Oracle
    positive: bool = True
    has_features: bool = True
    hashes: bool = False

    def __str__(self) -> str:
        return self.name


def _favor(head_dim: int, num_features: int, **arguments: Any) -> FavorAttention:
    mechanism = FavorAttention(head_dim, num_features=num_features, **arguments)
    if arguments.get("kernel") in ("softmax-optimal", "softmax-sharp", "softmax-prototypes"):
        # Tokens of another distribution than those of the laws, so that none of the parameters is one or zero; and many of
        # them, so that prototypes are clusters and not single tokens.
        generator = torch.Generator().manual_seed(head_dim)
        q, k = (torch.randn(1, 1, 4000, head_dim, generator=generator) for _ in range(2))
        stretch = torch.linspace(0.3, 0.7, head_dim)
        mechanism.features.calibrate_(q * stretch + 0.1, k * stretch.flip(0) - 0.1)
    return mechanism


def favor(name: str, positive: bool = True, **arguments: Any) -> Case:
    """A case of FAVOR attention."""
    return Case(f"favor-{name}", partial(_favor, **arguments), favor_oracle, positive)


CASES = [
    favor("softmax", kernel="softmax"),
    favor("softmax-iid", kernel="softmax", projection="iid"),
    favor("softmax-hyperbolic", kernel="softmax-hyperbolic"),
    favor("softmax-reg", kernel="softmax-reg"),
    favor("softmax-trig", kernel="softmax-trig", positive=False),
    favor("softmax-optimal", kernel="softmax-optimal"),
    favor("softmax-sharp", kernel="softmax-sharp"),
    favor("softmax-prototypes", kernel="softmax-prototypes"),
    favor("softmax-hadamard", kernel="softmax", projection="hadamard"),
    favor("softmax-givens", kernel="softmax", projection="givens"),
    # "auto" takes the native backend where it can: this is the one that remains without a compiler
    favor("softmax-chunked", kernel="softmax", backend="chunked"),
    favor("softmax-sharp-chunked", kernel="softmax-sharp", backend="chunked"),
    favor("relu-chunked", kernel="relu", backend="chunked"),
    favor("exp", kernel="exp"),
    favor("relu", kernel="relu"),
    favor("relu-iid", kernel="relu", projection="iid"),
    favor("relu-unprojected", kernel="relu", projection=None),
    favor("elu", kernel="elu"),
    favor("gelu", kernel="gelu", positive=False),
    favor("sigmoid", kernel="sigmoid"),
    favor("tanh", kernel="tanh", positive=False),
    favor("abs", kernel="abs"),
    favor("cos", kernel="cos", positive=False),
    favor("identity", kernel="identity", positive=False),
    favor("callable", kernel=torch.nn.functional.softplus),
    Case(
        "sparse-strided",
        lambda head_dim, _: SparseAttention(head_dim, pattern="strided", stride=16),
        sparse_oracle,
        has_features=False,
    ),
    Case(
        "sparse-fixed",
        lambda head_dim, _: SparseAttention(head_dim, pattern="fixed", stride=16, summary=3),
        sparse_oracle,
        has_features=False,
    ),
    Case(
        "reformer",
        lambda head_dim, _: ReformerAttention(head_dim, num_hashes=2, bucket_size=16),
        reformer_oracle,
        has_features=False,
        hashes=True,
    ),
    Case("exact", lambda head_dim, _: ExactAttention(head_dim), exact_oracle, has_features=False),
    Case("exact-materialised", lambda head_dim, _: MaterialisedAttention(head_dim), exact_oracle, has_features=False),
    Case("local", lambda head_dim, _: LocalAttention(head_dim, window=16), sparse_oracle, has_features=False),
    Case(
        "split-local-favor",
        lambda head_dim, num_features: SplitAttention(
            head_dim,
            first_kwargs={"window": 16},
            second_kwargs={"kernel": "softmax", "num_features": num_features},
        ),
        split_oracle,
    ),
]
POSITIVE_CASES = [case for case in CASES if case.positive]
EXACTLY_CAUSAL_CASES = [case for case in CASES if not case.hashes]


def condition(case: Case, mechanism: nn.Module, q: Tensor, k: Tensor, **arguments: Any) -> Tensor:
    """kappa = sum |phi(q).phi(k)| / |denominator| of each row, (B, H, Lq): how much cancellation amplifies rounding."""
    if case.positive:
        return q.new_ones(q.shape[:3], dtype=torch.float64)
    assert isinstance(mechanism, FavorAttention)
    gqa = q.shape[1] // k.shape[1]
    arguments.pop("enable_gqa", None)
    phi_q, phi_k = mechanism.features(q.double()), mechanism.features(k.double().repeat_interleave(gqa, 1))
    visible = visible_keys(q.shape[2], k.shape[2], **arguments)
    total = ((phi_q.abs() @ phi_k.abs().mT) * visible).sum(-1)
    return (total / ((phi_q @ phi_k.mT) * visible).sum(-1).abs().clamp_min(1e-300)).clamp_min(1.0)
