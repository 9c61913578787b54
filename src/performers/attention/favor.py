"""FAVOR attention: softmax attention's estimate, or a generalised kernel's attention, in time and memory linear in the length.

    out_i = sum_j phi(q_i).phi(k_j) v_j  /  sum_j phi(q_i).phi(k_j)          (2009.14794, equation 4 and section 2.2)

Because phi(q_i) comes out of both sums, they are taken over the keys once. The kernel's estimate is unbiased; the output is a
ratio of two estimates and is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from performers.attention.arguments import check_attention_arguments, repeat_heads
from performers.attention.features import FavorFeatures, Pointwise, attention_scale
from performers.attention.kernels import StateTensors, attend, check_backend
from performers.attention.kernels.state import compute_dtype, finite
from performers.attention.mechanism import Mechanism
from performers.attention.published import published_attention
from performers.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from performers.attention.parallel import SequenceShard


@dataclass(frozen=True)
class FavorState:
    """What causal FAVOR attention remembers of the tokens it has seen: of fixed size, however many there were.

    Attributes:
        numerator: (B, H, M, Dv), the sum of phi(k) v^T, divided by exp(log_scale) feature by feature.
        denominator: (B, H, M), the sum of phi(k), divided likewise.
        log_scale: (B, H, M), the largest log feature so far; zero for pointwise kernels. A constant to autograd.

    All are float32 (float64 for float64 inputs), and differentiable.
    """

    numerator: Tensor
    denominator: Tensor
    log_scale: Tensor

    def reorder(self, index: Tensor) -> FavorState:
        """The state of batch rows `index`, (B',) integers: what beam search asks for."""
        return FavorState(*(tensor.index_select(0, index.to(tensor.device)) for tensor in self.tensors()))

    def is_finite(self) -> bool:
        """Whether its sums are."""
        return bool(self.numerator.isfinite().all() and self.denominator.isfinite().all())

    def to(self, device: torch.device) -> FavorState:
        """The same on a device."""
        return FavorState(*(tensor.to(device) for tensor in self.tensors()))

    def rows(self) -> list[FavorState]:
        """The state of each row of the batch, as a batch of one."""
        return [FavorState(*row) for row in zip(*(tensor.split(1) for tensor in self.tensors()), strict=True)]

    def joined(self, others: Sequence[FavorState]) -> FavorState:
        """The rows of this state and then those of the others."""
        of = zip(self.tensors(), *(other.tensors() for other in others), strict=True)
        return FavorState(*(torch.cat(tensors) for tensors in of))

    def mixed(self, weights: Tensor) -> FavorState:
        """Sums of these states: row r is that of the rows j, weights[r, j] times each.

        A state summed of others is the state after all of their tokens, in any order: a row of ones reads what all have read, a
        weight of 0 leaves a state out, and -1 takes one out of a sum that it is in. Differentiable.

        Arguments:
            weights: (R, B).

        Returns:
            A state of R rows.
        """
        with torch.autocast(self.denominator.device.type, enabled=False):
            return self._mixed(weights.to(self.denominator))

    def _mixed(self, weights: Tensor) -> FavorState:
        if not self.log_scale.any():  # plain sums, as of all pointwise kernels
            numerator, denominator = (torch.tensordot(weights, x, 1) for x in (self.numerator, self.denominator))
            return FavorState(numerator, denominator, torch.zeros_like(denominator))
        weights = weights[:, :, None, None]
        # Of a state that is left out not even the scale counts.
        scales = torch.where(weights != 0, self.log_scale, -torch.inf)
        log_scale = scales.amax(1)
        factors = weights * torch.exp(scales - finite(log_scale)[:, None])
        return FavorState(
            torch.einsum("rbhm,bhmd->rhmd", factors, self.numerator),
            torch.einsum("rbhm,bhm->rhm", factors, self.denominator),
            log_scale,
        )

    def tensors(self) -> StateTensors:
        """The three tensors, as the backends take them."""
        return StateTensors(self.numerator, self.denominator, self.log_scale)

    @property
    def nbytes(self) -> int:
        """The memory that the state takes."""
        return sum(tensor.nbytes for tensor in self.tensors())


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FavorFeatures,
    *,
    is_causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    state: FavorState | None = ...,
    return_state: Literal[False] = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FavorFeatures,
    *,
    is_causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    state: FavorState | None = ...,
    return_state: Literal[True],
    scale: float | None = ...,
    enable_gqa: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, FavorState]: ...
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FavorFeatures,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: FavorState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, FavorState]:
    """Attention by random features, shaped like `torch.nn.functional.scaled_dot_product_attention`.

    Arguments:
        query: (B, H, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        features: the feature map, with D = `features.head_dim`.
        is_causal: a query sees no later key; when Lq and Lk differ, the last query is aligned with the last key. Exact:
            no bit of an output depends on a later token.
        key_padding_mask: (B, Lk) bool, True for a real token. A padded key leaves numerator and denominator.
        cu_seqlens: (N + 1,) int32 or int64, from 0 to L: packed sequences along L (B = 1), each of which sees itself alone.
            Sequences may be empty.
        state: what `return_state` gave for the tokens before these, with the same features; every query sees all of it.
        return_state: also return the state after the last key, for the next call.
        scale: the factor on q.k, 1 / sqrt(D) when None.
        enable_gqa: allow Hkv < H, each key head serving H / Hkv consecutive query heads.
        backend: "auto" takes the first that can compute this of "triton" (GPUs), "native" (C++ for the CPU, compiled on first
            use) and "chunked" (PyTorch, any device and kernel); "reference" is the oracle, quadratic and in float64.

    Returns:
        (B, H, Lq, Dv) in the query's type; with `return_state` a pair of it and a `FavorState`. A query with nothing to
        attend to gives zeros. Sums and exponentials are taken in float32 whatever autocast says (float64 for float64 inputs).

    Raises:
        InputError: shapes, types or arguments that do not go together; the message says which.
        UnsupportedError: a state or packed sequences with features of the published formula.
    """
    streaming = state is not None or return_state
    check_attention_arguments(query, key, value, key_padding_mask, cu_seqlens, enable_gqa, streaming)
    if query.shape[-1] != features.head_dim:
        raise InputError(
            f"query has head size {query.shape[-1]}, but features were made for head_dim={features.head_dim}."
        )
    key, value = repeat_heads(query, key, value)
    check_backend(backend)
    if features.compatibility is not None:
        if streaming or cu_seqlens is not None:
            raise UnsupportedError(
                "compatibility='published': the published stabiliser is the maximum over all keys, so there is neither a state "
                "to carry on nor a way to keep packed sequences apart."
            )
        return published_attention(
            query, key, value, features, attention_scale(scale, features.head_dim), is_causal, key_padding_mask
        )
    past = _matching_state(state, query, value, features) if state is not None else None
    out, after = attend(
        query,
        key,
        value,
        features,
        scale=attention_scale(scale, features.head_dim),
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        state=past,
        streaming=streaming,
        backend=backend,
    )
    return (out, FavorState(*after)) if return_state else out


def _matching_state(state: FavorState, query: Tensor, value: Tensor, features: FavorFeatures) -> StateTensors:
    if not isinstance(state, FavorState):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"state is a {type(state).__name__}: expected a FavorState.")
    expected = (query.shape[0], query.shape[1], features.size, value.shape[-1])
    if state.numerator.shape != expected:
        raise InputError(
            f"state has shape {tuple(state.numerator.shape)}, expected {expected} (batch, heads, features, value size)."
        )
    return StateTensors(*(tensor.to(compute_dtype(query.dtype)) for tensor in state.tensors()))


class FavorAttention(Mechanism):
    """FAVOR as a mechanism of a model: a feature map of its own, and `favor_attention`.

    Arguments:
        head_dim: D of queries and keys.
        seed: of the projection.
        kernel, num_features, projection, precision, trainable, compatibility, calibrated_heads: as in `FavorFeatures`.
        backend: as in `favor_attention`.
    """

    def __init__(
        self,
        head_dim: int,
        seed: int = 0,
        *,
        kernel: str | Pointwise = "softmax",
        num_features: int = 256,
        projection: str | None = "orthogonal",
        precision: str = "accurate",
        trainable: bool = False,
        compatibility: str | None = None,
        calibrated_heads: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.features = FavorFeatures(
            head_dim,
            num_features,
            kernel,
            projection,
            seed,
            precision,
            trainable=trainable,
            compatibility=compatibility,
            calibrated_heads=calibrated_heads,
        )
        self.backend = backend

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, FavorState]:
        """As `favor_attention`."""
        return favor_attention(query, key, value, self.features, backend=self.backend, **arguments)

    def shareable(self, state: FavorState) -> FavorState:
        """All of it."""
        return state

    def attend_sharded(
        self, query: Tensor, key: Tensor, value: Tensor, sequence: SequenceShard, **arguments: Any
    ) -> Tensor:
        """As `sharded_favor_attention`."""
        from performers.attention.parallel import sharded_favor_attention  # which is made of the functions above

        return sharded_favor_attention(
            query,
            key,
            value,
            self.features,
            sequence.group,
            stretches=sequence.stretches,
            backend=self.backend,
            **arguments,
        )

    @property
    def shards_sequences(self) -> bool:
        """Whether the tokens of a sequence may lie on several processes: they exchange states of fixed size."""
        return self.has_fixed_state

    @property
    def shared_kinds(self) -> tuple[type, ...]:
        """Its own."""
        return (FavorState,)

    def redraw_(self, generator: torch.Generator) -> None:
        """Draw a new projection, in place."""
        self.features.redraw_(generator)

    @property
    def redraws_by_default(self) -> bool:
        """Whether training gains from redrawing: it does for estimates of the softmax kernel (2009.14794, appendix D.2)."""
        return str(self.features.kernel).startswith("softmax") and not self.features.trainable

    @property
    def has_fixed_state(self) -> bool:
        """Whether any number of keys goes into a state of fixed size and is read from it to the same answer.

        Not so the published formula, nor features that would be fitted to each sequence as a whole.
        """
        return self.features.compatibility is None and self.features.is_calibrated
