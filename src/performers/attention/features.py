"""Feature maps: phi(x) for one token at a time, and nothing else.

softmax attention is a ratio of sums of the kernel exp(q.k / sqrt(D)). A feature map writes a kernel as an expected product,
K(q, k) = E[phi(q).phi(k)], and then the sums can be taken over the keys once, in time linear in the sequence length
(2009.14794, section 2). Here phi sees a single token, so nothing can leak from one token to another: everything that compares
tokens (scales, maxima, sums) belongs to the attention kernels.

There are two families, which the attention kernels treat apart:

- exponential: phi(x) = exp(W x - |x|^2 / 2) / sqrt(M), the positive features of the softmax kernel (2009.14794, Lemma 1), and its
  relatives. Their range is enormous, so they are only ever combined in the log domain.
- pointwise: phi(x) = f(W x) / sqrt(M) for any elementwise f, generalised attention (2009.14794, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from performers.attention.projections import PROJECTIONS
from performers.errors import InputError

Pointwise = Callable[[Tensor], Tensor]

# The authors' kernel_epsilon: no ReLU feature is ever zero, so no denominator is (2009.14794, appendix A.4).
RELU_EPSILON = 1e-3


class FeatureRows(NamedTuple):
    """What the attention kernels multiply tokens with: one form for all estimators, with the scale of q.k folded in.

    exponential:  log phi_m(q) = queries_m . q      log phi_m(k) = keys_m . k + bias_m + t(k)
    pointwise:    phi(q) = f(queries q)             phi(k) = f(keys k), times exp(t(k)) if the kernel is `weighted`

    with t(k) = -1/2 sum_d metric_d k_d^2, a token's log weight. A query's own weight cancels in attention and is left out.
    All are float32 (float64 for float64 inputs); Bf is 1 or B, Hf is 1 or H: shared, or per sequence and head.
    """

    queries: Tensor  # (Bf, Hf, M', D)
    keys: Tensor  # (Bf, Hf, M', D)
    metric: Tensor  # (Bf, Hf, D)
    bias: Tensor  # (Bf, Hf, `size`)


@dataclass(frozen=True)
class Kernel:
    """How phi is computed from the projected token u = W x.

    Attributes:
        function: f of the pointwise family, or None for the exponential family.
        derivative: f'(u) as a function of u; None lets autograd find it.
        norm: how many times |x|^2 / 2 is subtracted from the log feature.
        both_signs: of the exponential family, whether exp(-u) is a feature as well, which makes 2M of M rows.
        doubles: of the pointwise family, whether f makes 2M features of M projections, joined along the last dimension.
        weighted: of the pointwise family, whether a token's features are multiplied by exp(-norm |x|^2 / 2).
        row_norm: the norm of every row of W relative to sqrt(D); None leaves the rows as they are drawn.
    """

    function: Pointwise | None = None
    derivative: Pointwise | None = None
    norm: float = 1.0
    both_signs: bool = False
    doubles: bool = False
    weighted: bool = False
    row_norm: float | None = None

    @property
    def exponential(self) -> bool:
        """Whether the features are exponentials, to be combined in the log domain."""
        return self.function is None

    @property
    def scaled(self) -> bool:
        """Whether features are sums at a log scale of their own: the exponential ones, and those with token weights."""
        return self.exponential or self.weighted

    def pull(self, u: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to u, given the one with respect to f(u), of a pointwise kernel."""
        assert self.function is not None
        if self.derivative is not None:
            pulled = gradient * self.derivative(u)
            return pulled[..., : u.shape[-1]] + pulled[..., u.shape[-1] :] if self.doubles else pulled
        return torch.func.vjp(self.function, u)[1](gradient)[0]


def _relu(u: Tensor) -> Tensor:
    return torch.relu(u) + RELU_EPSILON


def _cos_sin(u: Tensor) -> Tensor:
    return torch.cat([torch.cos(u), torch.sin(u)], -1)


def _cos_sin_derivative(u: Tensor) -> Tensor:
    return torch.cat([-torch.sin(u), torch.cos(u)], -1)


KERNELS: dict[str, Kernel] = {
    "softmax": Kernel(),  # SM+, FAVOR+
    "softmax-hyperbolic": Kernel(both_signs=True),  # SMhyp+, 2009.14794, Lemma 1
    "softmax-reg": Kernel(row_norm=1.0),  # SMREG, 2009.14794, section 2.4 (Theorem 1)
    "softmax-trig": Kernel(_cos_sin, _cos_sin_derivative, norm=-1.0, doubles=True, weighted=True),  # FAVOR, 2006.03555
    "exp": Kernel(norm=0.0),
    "relu": Kernel(_relu, lambda u: (u > 0).to(u.dtype)),
    "elu": Kernel(lambda u: nn.functional.elu(u) + 1, lambda u: torch.exp(u.clamp(max=0))),
    "gelu": Kernel(nn.functional.gelu),
    "sigmoid": Kernel(torch.sigmoid),
    "tanh": Kernel(torch.tanh),
    "abs": Kernel(torch.abs, torch.sign),
    "cos": Kernel(torch.cos),
    "identity": Kernel(lambda u: u, torch.ones_like),
}

# An operator's arguments are tensors, numbers and strings: a user's own function travels as its key in this table.
_CALLABLES: dict[str, Kernel] = {}


def kernel_of(key: str) -> Kernel:
    """The kernel that `FavorFeatures.kernel_key` names."""
    return KERNELS.get(key) or _CALLABLES[key]


def _key_of(kernel: str | Pointwise) -> str:
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            known = ", ".join(repr(name) for name in KERNELS)
            raise InputError(f"kernel={kernel!r} is not known: expected one of {known}, or a function of a tensor.")
        return kernel
    if not callable(kernel):
        raise InputError(f"kernel={kernel!r} must be a name or an elementwise function of a tensor.")
    if isinstance(kernel, nn.Module) and any(parameter.requires_grad for parameter in kernel.parameters()):
        raise InputError(
            "kernel is a module with parameters to learn, but no gradient reaches them: freeze them first."
        )
    key = f"callable-{id(kernel)}"
    _CALLABLES[key] = Kernel(kernel)
    return key


class FavorFeatures(nn.Module):
    """The features phi that FAVOR attention uses in place of the exponential of q.k.

    Arguments:
        head_dim: D, the size of a query or key of one head.
        num_features: M, the number of random projections; more is more precise. Without a projection M is D.
        kernel: of the softmax kernel exp(q.k / sqrt(D)): "softmax" (positive features, FAVOR+), "softmax-hyperbolic" (2M features
            of M rows, less variance) or "softmax-reg" (rows of norm sqrt(D): a little biased, less variance). Of other kernels:
            "relu" (relu(u) + 1e-3, the paper's best on proteins), "elu" (elu(u) + 1), "exp", "gelu", "sigmoid", "tanh", "abs",
            "cos", "identity", or any elementwise function of the projected token u, used as it is.
        projection: "orthogonal", "iid", or None for none at all (u = x).
        seed: of the projection; the same seed gives the same projection everywhere.
        precision: "accurate" computes in float32 whatever the inputs are; "fast" allows matrix products in the inputs' type
            (not in float16, whose range is too small for sums over keys).

    Attributes:
        projection: W, a float32 buffer of shape (M, D), saved in the state_dict. Only `redraw_` changes it.
        size: the number of features of a token, M, or 2M for "softmax-hyperbolic".

    Raises:
        InputError: an unknown kernel, projection or precision, or a size that is not a positive integer.
    """

    projection: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int = 256,
        kernel: str | Pointwise = "softmax",
        projection: str | None = "orthogonal",
        seed: int = 0,
        precision: str = "accurate",
    ) -> None:
        super().__init__()
        for name, size in (("head_dim", head_dim), ("num_features", num_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"{name}={size!r} must be a positive integer.")
        if isinstance(seed, bool) or not isinstance(seed, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"seed={seed!r} must be an integer.")
        if projection is not None and projection not in PROJECTIONS:
            known = ", ".join(repr(name) for name in PROJECTIONS)
            raise InputError(f"projection={projection!r} is not known: expected one of {known}, or None.")
        if precision not in ("accurate", "fast"):
            raise InputError(f"precision={precision!r} is not known: expected 'accurate' or 'fast'.")
        self.head_dim = head_dim
        self.num_features = head_dim if projection is None else num_features
        self.kernel = kernel
        self.kernel_key = _key_of(kernel)
        self.projection_name = projection
        self.seed = seed
        self.precision = precision
        with torch.device("cpu"):
            self.register_buffer("projection", self._draw(torch.Generator().manual_seed(seed)))

    def _draw(self, generator: torch.Generator) -> Tensor:
        # Inside a `with torch.device("meta")` block, too, the matrix is drawn for real.
        with torch.device("cpu"):
            if self.projection_name is None:
                return torch.eye(self.head_dim)
            rows = PROJECTIONS[self.projection_name](self.num_features, self.head_dim, generator)
            row_norm = kernel_of(self.kernel_key).row_norm
            if row_norm is None:
                return rows
            return nn.functional.normalize(rows.double(), dim=1).mul(row_norm * self.head_dim**0.5).float()

    @property
    def size(self) -> int:
        """The number of features of a token."""
        kernel = kernel_of(self.kernel_key)
        return self.num_features * (2 if kernel.both_signs or kernel.doubles else 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FavorFeatures:
        # `model.to(torch.bfloat16)` must not round W: its rows would lose their orthogonality and their norms.
        projection = self.projection
        super()._apply(fn, recurse)
        if self.projection.dtype != projection.dtype:
            self.projection = projection.to(self.projection.device)
        return self

    def redraw_(self, generator: torch.Generator) -> None:
        """Draw a new projection, in place, from a CPU generator. Nothing else ever changes it."""
        with torch.no_grad():
            self.projection.copy_(self._draw(generator))

    def rows(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        *,
        is_causal: bool,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        streaming: bool = False,
    ) -> FeatureRows:
        """The features in the form that the attention kernels take."""
        kernel = kernel_of(self.kernel_key)
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            rows = feature_rows(self.projection, kernel).to(query.device, dtype)[None, None] * scale**0.5
            norm = kernel.norm if kernel.exponential or kernel.weighted else 0.0
            metric = rows.new_full((1, 1, self.head_dim), scale * norm)
            return FeatureRows(rows, rows, metric, rows.new_zeros(1, 1, self.size))

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        """phi(x), whose products phi(q).phi(k) estimate the kernel without bias.

        Arguments:
            x: queries or keys, of shape (..., D).
            scale: of q.k; 1 / sqrt(D) when None. Each of q and k is multiplied by its square root.

        Returns:
            A tensor of shape (..., `size`), in float32 at least. The softmax features of far-out tokens overflow here, as the
            kernel itself does; attention never forms them.
        """
        kernel = kernel_of(self.kernel_key)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * attention_scale(scale, self.head_dim) ** 0.5
            u = x @ feature_rows(self.projection, kernel).to(x.dtype).T
            log_weight = x.square().sum(-1, keepdim=True) * (-kernel.norm / 2)
            if kernel.function is None:
                return torch.exp(u + log_weight) * self.size**-0.5
            phi = kernel.function(u) * self.num_features**-0.5
            return phi * torch.exp(log_weight) if kernel.weighted else phi

    def extra_repr(self) -> str:
        """What `print(features)` shows."""
        kernel = self.kernel if isinstance(self.kernel, str) else getattr(self.kernel, "__name__", "callable")
        return (
            f"{self.head_dim}, num_features={self.num_features}, kernel={kernel!r}, projection={self.projection_name!r}"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.kernel_key = _key_of(self.kernel)


def feature_rows(projection: Tensor, kernel: Kernel) -> Tensor:
    """The rows that a token is multiplied with, one per feature, given those of the projection, (M, D)."""
    return torch.cat([projection, -projection]) if kernel.both_signs else projection


def attention_scale(scale: float | None, head_dim: int) -> float:
    """The factor on q.k: 1 / sqrt(D) unless given.

    Raises:
        InputError: it is negative or not finite; its square root goes to each of q and k.
    """
    if scale is None:
        return head_dim**-0.5
    if not 0 <= scale < math.inf:
        raise InputError(f"scale={scale!r} must be a finite number that is not negative.")
    return scale
