"""What the backends share: what they are asked, the summary of past keys, and how a row is divided by its sum of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention.features import FeatureRows

ROWS = 512  # of a bidirectional chunk: its features stay in cache
CAUSAL_ROWS = 128  # of a causal chunk: its weights cost C per row, the state M

# A row whose weights sum to less than this has nothing to attend to and gives zeros. A signed kernel's denominator can come
# this close to zero by cancellation, too; every backend then divides by the same floor.
DENOMINATOR_FLOOR = 1e-12


class StateTensors(NamedTuple):
    """All that FAVOR remembers of the keys and values it has seen: sums over the keys, divided by exp(log_scale).

    The scale is one number per feature: the largest log feature so far. A single scale per token or per sequence would let
    most features underflow when queries and keys are far from the origin. It is a constant to autograd, which changes
    nothing: outputs depend on numerator * exp(log_scale) only.
    """

    numerator: Tensor  # (..., M, Dv)  sum of phi(k) v^T
    denominator: Tensor  # (..., M)      sum of phi(k)
    log_scale: Tensor  # (..., M)      zero for pointwise kernels, -inf before the first key for exponential ones

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], num_features: int, value_dim: int, exponential: bool, like: Tensor
    ) -> StateTensors:
        """The state before the first key."""
        nothing = -torch.inf if exponential else 0.0
        return cls(
            like.new_zeros(*shape, num_features, value_dim),
            like.new_zeros(*shape, num_features),
            like.new_full((*shape, num_features), nothing),
        )


class Request(NamedTuple):
    """One call of attention, as every backend takes it.

    Attributes:
        query, key, value: as in `favor_attention`, with as many heads each.
        rows: the features.
        state: of the keys before these.
        key_padding_mask, cu_seqlens: as in `favor_attention`.
        kernel: `FavorFeatures.kernel_key`.
        is_causal: as in `favor_attention`.
        fast: whether products may be taken in the inputs' type.
        learned: whether the backward pass is asked for the gradients of the rows of queries and of keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rows: FeatureRows
    state: StateTensors
    key_padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    kernel: str = "softmax"
    is_causal: bool = False
    fast: bool = False
    learned: bool = False

    def output(self) -> Tensor:
        """Room for the output, (B, H, Lq, Dv)."""
        return self.query.new_empty(*self.query.shape[:3], self.value.shape[-1])

    def normaliser(self) -> Tensor:
        """Room for one number per row, (B, H, Lq), which only causal attention keeps."""
        return self.state.numerator.new_empty(self.query.shape[:3] if self.is_causal else (0,))


class Upstream(NamedTuple):
    """What a backward pass starts from: the gradients of the results of the forward pass, and what that kept.

    Attributes:
        d_out, d_numerator, d_denominator: the gradients of the output and of the state after the last key.
        normaliser, after: what the forward pass returned.
    """

    d_out: Tensor
    d_numerator: Tensor
    d_denominator: Tensor
    normaliser: Tensor
    after: StateTensors


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums and exponentials are taken: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def finite(log: Tensor) -> Tensor:
    """`log` with zero in place of -inf, so that exp(x - log) is defined where there is nothing to scale."""
    return torch.where(log == -torch.inf, 0.0, log)


def guarded(denominator: Tensor) -> Tensor:
    """The denominator, kept away from zero with its sign."""
    floor = torch.copysign(torch.full_like(denominator, DENOMINATOR_FLOOR), denominator)
    return torch.where(denominator.abs() < DENOMINATOR_FLOOR, floor, denominator)


def chunks(length: int, rows: int) -> Iterator[slice]:
    """The slices of at most `rows` that make up `length`."""
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


def shifted(rows: slice, offset: int) -> slice:
    """The slice `offset` further on."""
    return slice(rows.start + offset, rows.stop + offset)
