"""Feature maps: phi(x) for one token at a time, and nothing else.

softmax attention is a ratio of sums of the kernel exp(q.k / sqrt(D)). A feature map writes a kernel as an expected product,
K(q, k) = E[phi(q).phi(k)], and then the sums can be taken over the keys once, in time linear in the sequence length
(2009.14794, section 2). Here phi sees a single token, so nothing can leak from one token to another: everything that compares
tokens (scales, maxima, sums) belongs to the attention kernels.

There are two families, which the attention kernels treat apart:

- exponential: phi(x) = exp(W x - |x|^2 / 2) / sqrt(M), the positive features of the softmax kernel (2009.14794, Lemma 1), and its
  relatives. Their range is enormous, so they are only ever combined in the log domain.
- pointwise: phi(x) = f(W x) / sqrt(M) for any elementwise f, generalised attention (2009.14794, section 2.2).

FAVOR++ and FAVOR# are of the exponential family, with rows from a distribution that fits the tokens (`proposals.py`); so are
prototypes, whose rows are clusters of them (`prototypes.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from performers.attention.projections import PROJECTIONS, hadamard_project, hadamard_rows, hadamard_signs
from performers.attention.proposals import Moments, Proposal, fit, moments
from performers.attention.prototypes import Prototypes, fit_prototypes
from performers.errors import InputError, UnsupportedError
from performers.randomness import derive_seed

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
        fitted: of the exponential family, what is fitted to the tokens: a distribution from which the rows are drawn in place of
            N(0, I) ("isotropic" or "dense"), or the rows themselves ("prototypes").
    """

    function: Pointwise | None = None
    derivative: Pointwise | None = None
    norm: float = 1.0
    both_signs: bool = False
    doubles: bool = False
    weighted: bool = False
    row_norm: float | None = None
    fitted: str | None = None

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
    "softmax-optimal": Kernel(fitted="isotropic"),  # OPRF, FAVOR++, 2205.15317
    "softmax-sharp": Kernel(fitted="dense"),  # SDERF, FAVOR#, 2302.00787
    "softmax-prototypes": Kernel(norm=0.0, fitted="prototypes"),
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


class UncalibratedWarning(UserWarning):
    """A kernel that needs statistics of the tokens had none, and plain FAVOR+ took its place."""


# The softmax kernels of the authors' code.
_PUBLISHED = {"softmax", "softmax-reg", "softmax-trig"}
# What is fitted, by kind, and the buffers that hold it.
_FITTED: dict[str, type[Proposal] | type[Prototypes]] = {
    "isotropic": Proposal,
    "dense": Proposal,
    "prototypes": Prototypes,
}


class FavorFeatures(nn.Module):
    """The features phi that FAVOR attention uses in place of the exponential of q.k.

    Arguments:
        head_dim: D, the size of a query or key of one head.
        num_features: M, the number of random projections; more is more precise. Without a projection M is D.
        kernel: of the softmax kernel exp(q.k / sqrt(D)): "softmax" (positive features, FAVOR+), "softmax-hyperbolic" (2M features
            of M rows, less variance), "softmax-reg" (rows of norm sqrt(D): a little biased, less variance), "softmax-trig" (the
            original FAVOR: cosines and sines, 2M features of M rows; unbiased, but weights can be negative), "softmax-optimal"
            (FAVOR++, OPRF) or "softmax-sharp" (FAVOR#: SDERF, on tokens that are centred and balanced; see `calibrate_`), or
            "softmax-prototypes" (clusters of the queries of a trained model: biased, without noise, by far the closest to its
            attention, and refused until `calibrate_` was called). Of other kernels: "relu" (relu(u) + 1e-3, the paper's best on
            proteins), "elu" (elu(u) + 1), "exp", "gelu", "sigmoid", "tanh", "abs", "cos", "identity", or any elementwise
            function of the projected token u, used as it is.
        projection: "orthogonal", "iid", "hadamard" (structured: signs in place of a matrix, nearly unbiased), "givens" (products
            of rotations), or None for none at all (u = x).
        seed: of the projection; the same seed gives the same projection everywhere.
        precision: "accurate" computes in float32 whatever the inputs are; "fast" allows matrix products in the inputs' type
            (not in float16, whose range is too small for sums over keys).
        trainable: whether the projection is a parameter to learn, which starts from the random one.
        compatibility: None, or "published" for attention by the formula of the authors' code, for comparison with results that
            were obtained with it (`performers.attention.published`). It breaks what this package promises: the stabiliser
            is the largest projection of all keys and an epsilon is added to every feature after it, so outputs of causal
            attention depend on later tokens, padded and packed sequences on their neighbours, and nothing can be streamed.
        calibrated_heads: of kernels that are calibrated, how many heads a saved calibration has that will be loaded by a loader
            which, unlike `load_state_dict`, needs to find every tensor in place. Until then "softmax-optimal" and
            "softmax-sharp" are plain FAVOR+, and "softmax-prototypes" is uniform attention.

    Attributes:
        projection: W, (M, D), in float32: a buffer, or a parameter if trainable; saved in the state_dict. Only `redraw_` or
            training changes it. With "hadamard" the state_dict holds `signs` and `norms`, and W is written out on demand.
        size: the number of features of a token, M, or 2M for "softmax-hyperbolic" and "softmax-trig".

    Raises:
        InputError: an unknown kernel, projection, precision or compatibility, a size that is not a positive integer, or
            arguments that exclude each other.
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
        *,
        trainable: bool = False,
        compatibility: str | None = None,
        calibrated_heads: int = 0,
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
        self.trainable = trainable
        self.compatibility = compatibility
        self._warned = False
        self._check_combinations(calibrated_heads)
        generator = torch.Generator().manual_seed(seed)
        # Inside a `with torch.device("meta")` block, too, everything is drawn for real.
        with torch.device("cpu"):
            for name, tensor in self._draw(generator).items():
                if trainable:
                    self.register_parameter(name, nn.Parameter(tensor))
                else:
                    self.register_buffer(name, tensor)
            start = self._uncalibrated(calibrated_heads) if calibrated_heads else [None] * len(self._fitted_names)
            for name, tensor in zip(self._fitted_names, start, strict=True):
                self.register_buffer(name, tensor)

    def _check_combinations(self, calibrated_heads: int) -> None:
        if self.trainable and self.projection_name in (None, "hadamard"):
            why = "nothing is projected" if self.projection_name is None else "its rows are made of signs"
            raise InputError(
                f"projection={self.projection_name!r} leaves nothing to learn, because {why}: not trainable."
            )
        if self.trainable and self._fitted_kind is not None:
            raise InputError(f"kernel={self.kernel!r} takes its rows from a fit to the tokens: not trainable.")
        if self.compatibility not in (None, "published"):
            raise InputError(f"compatibility={self.compatibility!r} is not known: expected 'published' or None.")
        if self.compatibility and self.kernel_key.startswith("softmax") and self.kernel_key not in _PUBLISHED:
            raise InputError(f"kernel={self.kernel!r} has no published code to be compatible with.")
        if isinstance(calibrated_heads, bool) or not isinstance(calibrated_heads, int) or calibrated_heads < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"calibrated_heads={calibrated_heads!r} must be an integer that is not negative.")
        if calibrated_heads and self._fitted_kind is None:
            raise InputError(f"kernel={self.kernel!r} has nothing to calibrate: leave calibrated_heads at 0.")

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors that make up the projection, by the names under which they are saved."""
        row_norm = kernel_of(self.kernel_key).row_norm
        norm = None if row_norm is None else row_norm * self.head_dim**0.5
        if self.projection_name is None:
            return {"projection": torch.eye(self.head_dim)}
        if self.projection_name == "hadamard":
            signs, norms = hadamard_signs(self.num_features, self.head_dim, generator)
            if norm is not None:
                norms *= norm / hadamard_rows(signs, norms, self.head_dim).norm(dim=1)
            return {"signs": signs, "norms": norms}
        rows = PROJECTIONS[self.projection_name](self.num_features, self.head_dim, generator)
        if norm is not None:
            rows = nn.functional.normalize(rows.double(), dim=1).mul(norm).float()
        return {"projection": rows}

    def _matrix(self) -> Tensor:
        if self.projection_name == "hadamard":
            return hadamard_rows(self.signs, self.norms, self.head_dim)
        return self.projection

    def __getattr__(self, name: str) -> Any:
        if name == "projection" and "signs" in self.__dict__.get("_buffers", {}):
            return self._matrix()
        return super().__getattr__(name)

    @property
    def size(self) -> int:
        """The number of features of a token."""
        kernel = kernel_of(self.kernel_key)
        return self.num_features * (2 if kernel.both_signs or kernel.doubles else 1)

    @property
    def _fitted_kind(self) -> str | None:
        return kernel_of(self.kernel_key).fitted

    @property
    def _fitted_names(self) -> list[str]:
        """The buffers that a calibration sets."""
        if self._fitted_kind is None:
            return []
        fitted = _FITTED[self._fitted_kind]
        prefix = "proposal" if fitted is Proposal else "prototype"
        return [f"{prefix}_{name}" for name in fitted._fields]

    def _uncalibrated(self, heads: int) -> Proposal | Prototypes:
        if self._fitted_kind == "prototypes":
            return Prototypes.standard(heads, self.num_features, self.head_dim)
        return Proposal.standard(heads, self.head_dim)

    @property
    def _calibration(self) -> Proposal | Prototypes | None:
        buffers = [self._buffers.get(name) for name in self._fitted_names]
        if self._fitted_kind is None or any(buffer is None for buffer in buffers):
            return None
        return _FITTED[self._fitted_kind](*buffers)  # pyright: ignore[reportArgumentType]

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate_` has set parameters, or a state_dict has brought them. True of kernels that need none."""
        return self._fitted_kind is None or self._calibration is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FavorFeatures:
        # `model.to(torch.bfloat16)` must not round W: its rows would lose their orthogonality and their norms.
        before = {
            name: tensor.data
            for name, tensor in (*self._buffers.items(), *self._parameters.items())
            if tensor is not None
        }
        super()._apply(fn, recurse)
        for name, exact in before.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != exact.dtype:
                tensor.data = exact.to(tensor.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A calibration is loaded whatever the number of its heads is; without one in the file there is none afterwards.
        expected = self._uncalibrated(1) if self._fitted_names else ()
        for name, of_one_head in zip(self._fitted_names, expected, strict=True):
            saved, own = state_dict.get(prefix + name), self._buffers[name]
            if saved is None:
                self._buffers[name] = None
            elif own is None or own.shape != saved.shape:
                self._buffers[name] = self._like().new_empty(*saved.shape[:1], *of_one_head.shape[1:])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def redraw_(self, generator: torch.Generator) -> None:
        """Draw a new projection, in place, from a CPU generator. A calibration stays as it is.

        Raises:
            UnsupportedError: the projection is trainable: a new draw would throw away what was learned.
        """
        if self.trainable:
            raise UnsupportedError(
                "a trainable projection is learned and never redrawn: a new draw would undo the training."
            )
        with torch.no_grad(), torch.device("cpu"):
            for name, tensor in self._draw(generator).items():
                self.get_buffer(name).copy_(tensor)

    def calibrate_(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None = None, scale: float | None = None
    ) -> FavorFeatures:
        """Fit the features to queries and keys, head by head, and keep the result.

        The parameters of "softmax-optimal" and "softmax-sharp" are closed forms of means and second moments of all real tokens
        of the batch, those of "softmax-prototypes" are clusters of its queries (of which it should have several times M). They
        are saved in the state_dict, serve bidirectional, causal, packed and streamed attention alike, and stay when the
        projection is redrawn.

        Not calibrated, "softmax-prototypes" is refused. With the others, bidirectional attention of unpacked sequences takes
        the moments from each sequence and head on its own, from its real tokens, without a gradient; all other attention
        is then exactly FAVOR+ and says so once (`UncalibratedWarning`), because the future must not be looked at.

        Arguments:
            query: (B, H, Lq, D), as attention will get them (after rotary positions).
            key: (B, Hkv, Lk, D), H a multiple of Hkv.
            key_padding_mask: (B, Lk) bool, True for a real token; holds for the queries, too, if Lq is Lk.
            scale: of q.k, 1 / sqrt(D) when None.

        Returns:
            These features.

        Raises:
            InputError: shapes that do not go together, tokens that are not finite, or no token at all.
            UnsupportedError: the kernel has nothing to calibrate.
        """
        kind = self._fitted_kind
        if kind is None:
            having = ", ".join(repr(name) for name, kernel in KERNELS.items() if kernel.fitted)
            raise UnsupportedError(f"kernel={self.kernel!r} has nothing to calibrate, as {having} have.")
        for name, x in (("query", query), ("key", key)):
            if x.dim() != 4 or x.shape[-1] != self.head_dim:
                raise InputError(
                    f"{name} has shape {tuple(x.shape)}, expected (batch, heads, length, {self.head_dim})."
                )
        if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
            raise InputError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or heads.")
        if key_padding_mask is not None and key_padding_mask.shape != (key.shape[0], key.shape[2]):
            raise InputError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected {(key.shape[0], key.shape[2])}."
            )
        if (
            query.numel() == 0
            or key.numel() == 0
            or (key_padding_mask is not None and not bool(key_padding_mask.any()))
        ):
            raise InputError("there is no token to calibrate with.")
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        real = _real(query, key, key_padding_mask)
        found = [moments(x, mask, pooled=True) for x, mask in zip((query, key), real, strict=True)]
        if not all(bool(tensor.isfinite().all()) for moment in found for tensor in moment):
            raise InputError("the tokens to calibrate with are not finite numbers, or their squares are not.")
        query_moments, key_moments = (Moments(*(tensor.double() for tensor in moment)) for moment in found)
        scale = attention_scale(scale, self.head_dim)
        if kind == "prototypes":
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "prototypes"))
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                fitted = fit_prototypes(query, key, real, key_moments, self.num_features, scale, generator)
        else:
            fitted = fit(kind, query_moments, key_moments, scale)
        for name, tensor in zip(self._fitted_names, fitted, strict=True):
            self._buffers[name] = tensor.float().to(self._like().device)
        return self

    def _like(self) -> Tensor:
        """A float32 tensor on the device where this module's tensors are."""
        return self.norms if self.projection_name == "hadamard" else self.projection

    def _fitted(
        self, query: Tensor, key: Tensor, scale: float, key_padding_mask: Tensor | None, may_look: bool
    ) -> Proposal | Prototypes | None:
        """What is fitted to the tokens of this call, None for plain FAVOR+."""
        kind, calibration = self._fitted_kind, self._calibration
        if kind is None:
            return None
        if calibration is not None:
            heads = calibration[0].shape[0]
            if heads not in (1, query.shape[1]):
                raise InputError(f"features were calibrated for {heads} heads, but the query has {query.shape[1]}.")
            return type(calibration)(*[tensor.unsqueeze(0) for tensor in calibration])
        if kind == "prototypes":
            raise self._nothing_fitted()
        if may_look:
            with torch.no_grad():
                real = _real(query, key, key_padding_mask)
                return fit(kind, moments(query, real[0]), moments(key, real[1]), scale)
        if not self._warned:
            self._warned = _say_uncalibrated(str(self.kernel))
        return None

    def _nothing_fitted(self) -> InputError:
        return InputError(
            f"kernel={self.kernel!r} is not calibrated: call features.calibrate_(query, key) with tokens of the model first."
        )

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
        """The features in the form that the attention kernels take, for one call of attention.

        Arguments:
            query: (B, H, Lq, D).
            key: (B, H, Lk, D), heads already repeated.
            scale: of q.k.
            is_causal, key_padding_mask, cu_seqlens: as in `favor_attention`.
            streaming: a state is given or asked for.

        Returns:
            Rows that are shared by sequences and heads, by sequences (calibrated), or of every sequence and head.
        """
        kernel = kernel_of(self.kernel_key)
        dtype = torch.promote_types(query.dtype, torch.float32)
        may_look = not (is_causal or streaming or cu_seqlens is not None)
        with torch.autocast(query.device.type, enabled=False):
            matrix = self._matrix().to(query.device, dtype)
            fitted = self._fitted(query, key, scale, key_padding_mask, may_look)
            if fitted is not None:
                moved = type(fitted)(*[tensor.to(query.device, dtype) for tensor in fitted])
                return FeatureRows(*moved.feature_rows(matrix, scale))
            rows = feature_rows(matrix, kernel)[None, None] * scale**0.5
            norm = kernel.norm if kernel.exponential or kernel.weighted else 0.0
            metric = rows.new_full((1, 1, self.head_dim), scale * norm)
            return FeatureRows(rows, rows, metric, rows.new_zeros(1, 1, self.size))

    def project(self, x: Tensor) -> Tensor:
        """W x, (..., M), in the type of x (..., D); by a fast Hadamard transform where the projection is "hadamard"."""
        if self.projection_name == "hadamard":
            return hadamard_project(x, self.signs, self.norms)
        return x @ self.projection.to(x.dtype).T

    def forward(self, x: Tensor, scale: float | None = None, side: str = "query") -> Tensor:
        """phi(x), whose products phi(q).phi(k) estimate the kernel: of the softmax kernels without bias, but for prototypes.

        Arguments:
            x: queries or keys, of shape (..., D); (..., H, L, D) for features that were calibrated for several heads.
            scale: of q.k; 1 / sqrt(D) when None. Each of q and k is multiplied by its square root.
            side: "query" or "key". Only calibrated features tell them apart ("softmax-sharp": uncalibrated ones are FAVOR+).

        Returns:
            A tensor of shape (..., `size`), in float32 at least. The softmax features of far-out tokens overflow here, as the
            kernel itself does; attention never forms them.
        """
        if side not in ("query", "key"):
            raise InputError(f"side={side!r} is not known: expected 'query' or 'key'.")
        kernel, calibration = kernel_of(self.kernel_key), self._calibration
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * attention_scale(scale, self.head_dim) ** 0.5
            if calibration is not None:
                if calibration[0].shape[0] == 1:
                    calibration = type(calibration)(*[tensor.squeeze(0) for tensor in calibration])
                calibration = type(calibration)(*[tensor.to(x.dtype) for tensor in calibration])
                log_phi = calibration.log_features(self._matrix().to(x.dtype), x, side == "query")
                return torch.exp(log_phi) * self.size**-0.5
            if self._fitted_kind == "prototypes":
                raise self._nothing_fitted()
            u = self.project(x)
            log_weight = x.square().sum(-1, keepdim=True) * (-kernel.norm / 2)
            if kernel.function is None:
                u = torch.cat([u, -u], -1) if kernel.both_signs else u
                return torch.exp(u + log_weight) * self.size**-0.5
            phi = kernel.function(u) * self.num_features**-0.5
            return phi * torch.exp(log_weight) if kernel.weighted else phi

    def extra_repr(self) -> str:
        """What `print(features)` shows."""
        kernel = self.kernel if isinstance(self.kernel, str) else getattr(self.kernel, "__name__", "callable")
        shown = (
            f"{self.head_dim}, num_features={self.num_features}, kernel={kernel!r}, projection={self.projection_name!r}"
        )
        if self.trainable:
            shown += ", trainable=True"
        if self.compatibility is not None:
            shown += f", compatibility={self.compatibility!r}"
        return shown if self._calibration is None else f"{shown}, calibrated_heads={self._calibration[0].shape[0]}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.kernel_key = _key_of(self.kernel)


@torch.compiler.assume_constant_result  # so that it is said while compiling, and does not break the graph
def _say_uncalibrated(kernel: str) -> bool:
    warnings.warn(
        f"kernel={kernel!r} is not calibrated: causal, packed and streamed attention use plain FAVOR+ instead. "
        "Call features.calibrate_(query, key) on some tokens first.",
        UncalibratedWarning,
        stacklevel=6,
    )
    return True


def _real(query: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which queries and which keys are real. Of queries that are not the keys' own tokens nothing is known."""
    return (key_padding_mask if query.shape[2] == key.shape[2] else None), key_padding_mask


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
