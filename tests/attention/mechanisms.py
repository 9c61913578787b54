"""Every mechanism that has to obey the laws, one line each, and the oracle it is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from performers.attention import ExactAttention, FavorAttention, favor_attention, visible_keys

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


@dataclass(frozen=True)
class Case:
    """A mechanism under the laws.

    Attributes:
        make: (head_dim, num_features) -> module; mechanisms without features ignore the second.
        oracle: (mechanism, q, k, v, **arguments) -> output in float64, differentiable.
        positive: all weights are positive, so that rounding is not amplified by cancellation.
        has_features: the number of features means something.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    oracle: Oracle
    positive: bool = True
    has_features: bool = True

    def __str__(self) -> str:
        return self.name


def _favor(head_dim: int, num_features: int, **arguments: Any) -> nn.Module:
    return FavorAttention(head_dim, num_features=num_features, **arguments)


def favor(name: str, positive: bool = True, **arguments: Any) -> Case:
    """A case of FAVOR attention."""
    return Case(f"favor-{name}", partial(_favor, **arguments), favor_oracle, positive)


CASES = [
    favor("softmax", kernel="softmax"),
    favor("softmax-iid", kernel="softmax", projection="iid"),
    favor("softmax-hyperbolic", kernel="softmax-hyperbolic"),
    favor("softmax-reg", kernel="softmax-reg"),
    favor("softmax-trig", kernel="softmax-trig", positive=False),
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
    Case("exact", lambda head_dim, _: ExactAttention(head_dim), exact_oracle, has_features=False),
]
POSITIVE_CASES = [case for case in CASES if case.positive]


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
