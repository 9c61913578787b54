"""Chunked FAVOR attention for pointwise features, phi(x) = f(W x): plain sums, no scales.

The state is S = sum phi(k) v^T and z = sum phi(k). Causal attention cuts the rows in chunks: a row sees the chunks before
its own through the state, and the keys of its own chunk through a C x C matrix of weights. The backward pass has the state
and, when causal, each row's denominator; features are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from performers.attention.features import Kernel
from performers.attention.kernels.state import CAUSAL_ROWS, ROWS, StateTensors, chunks, guarded, shifted


@dataclass
class Pointwise:
    """The features of one call, and the four passes over them; the same interface as `Exponential`.

    Attributes:
        kernel: f and its derivative.
        weight: (M, D), the projection times the square root of the scale.
        product_dtype: the type in which matrix products are taken.
    """

    kernel: Kernel
    weight: Tensor
    product_dtype: torch.dtype

    exponential = False

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """x @ y, in the type for products, given back in the type for sums."""
        return (x.to(self.product_dtype) @ y.to(self.product_dtype)).to(self.weight.dtype)

    def project(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """u = W x, zero where a key is padding: whatever stands there, f(u) and f'(u) are finite."""
        return _masked(self.multiply(x, self.weight.T), real)

    def features(self, u: Tensor, real: Tensor | None = None) -> Tensor:
        """f(u), zero where a key is padding."""
        assert self.kernel.function is not None
        return _masked(self.kernel.function(u), real)

    def pull(self, u: Tensor, d_phi: Tensor, real: Tensor | None = None) -> Tensor:
        """The gradient with respect to x, given the one with respect to phi(x)."""
        return self.multiply(self.kernel.pull(u, _masked(d_phi, real)), self.weight)

    def absorb(self, phi: Tensor, v: Tensor, state: StateTensors) -> StateTensors:
        """The state after the keys with features phi and values v as well."""
        return StateTensors(
            state.numerator + self.multiply(phi.mT, v), state.denominator + phi.sum(-2), state.log_scale
        )

    def absorb_all(self, k: Tensor, v: Tensor, real: Tensor | None, state: StateTensors) -> StateTensors:
        """The state after all keys k."""
        for rows in chunks(k.shape[-2], ROWS):
            real_rows = None if real is None else real[:, rows]
            state = self.absorb(self.features(self.project(k[:, rows], real_rows), real_rows), v[:, rows], state)
        return state

    def read(self, phi: Tensor, state: StateTensors) -> tuple[Tensor, Tensor]:
        """Numerator (G, L, Dv) and denominator (G, L, 1) of rows that see the state alone."""
        return self.multiply(phi, state.numerator), phi @ state.denominator.unsqueeze(-1)

    def bidirectional(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, past: StateTensors, out: Tensor
    ) -> StateTensors:
        """Write the output rows; return the state of past and present keys."""
        state = self.absorb_all(k, v, real, past)
        for rows in chunks(q.shape[-2], ROWS):
            numerator, denominator = self.read(self.features(self.project(q[:, rows])), state)
            out[:, rows] = numerator / guarded(denominator)
        return state

    def bidirectional_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        past: StateTensors,
        after: StateTensors,
        d_out: Tensor,
        d_after: tuple[Tensor, Tensor],
        d_q: Tensor,
        d_k: Tensor,
        d_v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write the gradients of q, k and v; return those of the past numerator and denominator."""
        reverse = d_after
        for rows in chunks(q.shape[-2], ROWS):
            u = self.project(q[:, rows])
            phi = self.features(u)
            denominator = guarded(phi @ after.denominator.unsqueeze(-1))
            d_num = d_out[:, rows].to(u.dtype) / denominator
            d_phi = self.multiply(d_num, after.numerator.mT)
            d_den = (phi * d_phi).sum(-1, keepdim=True).div_(denominator).neg_()
            d_q[:, rows] = self.pull(u, d_phi.add_(d_den * after.denominator.unsqueeze(-2)))
            reverse = self._collect(phi, d_num, d_den, reverse)
        for rows in chunks(k.shape[-2], ROWS):
            d_k[:, rows], d_v[:, rows] = self._pull_reverse(k, v, real, rows, reverse)
        return reverse

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, past: StateTensors, out: Tensor, normaliser: Tensor
    ) -> StateTensors:
        """Write the output rows and their denominators; return the state after the last key."""
        early, prefix = max(0, q.shape[-2] - k.shape[-2]), max(0, k.shape[-2] - q.shape[-2])
        state = self.absorb_all(k[:, :prefix], v[:, :prefix], None if real is None else real[:, :prefix], past)
        for rows in chunks(early, ROWS):
            numerator, denominator = self.read(self.features(self.project(q[:, rows])), state)
            out[:, rows], normaliser[:, rows] = numerator / guarded(denominator), denominator.squeeze(-1)
        for rows in chunks(q.shape[-2] - early, CAUSAL_ROWS):
            queries, keys = shifted(rows, early), shifted(rows, prefix)
            phi_q = self.features(self.project(q[:, queries]))
            real_keys = None if real is None else real[:, keys]
            phi_k = self.features(self.project(k[:, keys], real_keys), real_keys)
            numerator, denominator = self.read(phi_q, state)
            weights = self.multiply(phi_q, phi_k.mT).tril_()
            denominator = denominator + weights.sum(-1, keepdim=True)
            out[:, queries] = (numerator + self.multiply(weights, v[:, keys])) / guarded(denominator)
            normaliser[:, queries] = denominator.squeeze(-1)
            state = self.absorb(phi_k, v[:, keys], state)
        return state

    def causal_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        past: StateTensors,
        after: StateTensors,
        normaliser: Tensor,
        d_out: Tensor,
        d_after: tuple[Tensor, Tensor],
        d_q: Tensor,
        d_k: Tensor,
        d_v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write the gradients of q, k and v; return those of the past numerator and denominator.

        A forward scan of the state gives dq and what a chunk owes itself; a reverse scan of the queries' sums gives the rest of
        dk and dv.
        """
        early, prefix = max(0, q.shape[-2] - k.shape[-2]), max(0, k.shape[-2] - q.shape[-2])
        state = self.absorb_all(k[:, :prefix], v[:, :prefix], None if real is None else real[:, :prefix], past)
        denominators = guarded(normaliser).unsqueeze(-1)
        d_denominators = torch.zeros_like(denominators)
        for rows in chunks(early, ROWS):
            u = self.project(q[:, rows])
            d_phi = self.multiply(d_out[:, rows].to(u.dtype) / denominators[:, rows], state.numerator.mT)
            d_den = (self.features(u) * d_phi).sum(-1, keepdim=True).div_(denominators[:, rows]).neg_()
            d_q[:, rows] = self.pull(u, d_phi.add_(d_den * state.denominator.unsqueeze(-2)))
            d_denominators[:, rows] = d_den
        for rows in chunks(q.shape[-2] - early, CAUSAL_ROWS):
            queries, keys = shifted(rows, early), shifted(rows, prefix)
            real_keys = None if real is None else real[:, keys]
            u_q, u_k = self.project(q[:, queries]), self.project(k[:, keys], real_keys)
            phi_q, phi_k = self.features(u_q), self.features(u_k, real_keys)
            d_num = d_out[:, queries].to(u_q.dtype) / denominators[:, queries]
            d_phi = self.multiply(d_num, state.numerator.mT)
            slopes = self.multiply(d_num, v[:, keys].mT)
            weights = self.multiply(phi_q, phi_k.mT).tril_()
            total = (phi_q * d_phi).sum(-1, keepdim=True) + (weights * slopes).sum(-1, keepdim=True)
            d_den = total.div_(denominators[:, queries]).neg_()
            slopes.add_(d_den).tril_()
            d_phi.add_(d_den * state.denominator.unsqueeze(-2)).add_(self.multiply(slopes, phi_k))
            d_q[:, queries] = self.pull(u_q, d_phi)
            d_k[:, keys] = self.pull(u_k, self.multiply(slopes.mT, phi_q), real_keys)
            d_v[:, keys] = self.multiply(weights.mT, d_num)
            d_denominators[:, queries] = d_den
            state = self.absorb(phi_k, v[:, keys], state)

        def collect(rows: slice) -> tuple[Tensor, Tensor]:
            d_num = d_out[:, rows].to(denominators.dtype) / denominators[:, rows]
            return self._collect(self.features(self.project(q[:, rows])), d_num, d_denominators[:, rows], reverse)

        reverse = d_after
        for rows in reversed(list(chunks(q.shape[-2] - early, CAUSAL_ROWS))):
            keys = shifted(rows, prefix)
            d_keys, d_values = self._pull_reverse(k, v, real, keys, reverse)
            d_k[:, keys] += d_keys
            d_v[:, keys] += d_values
            reverse = collect(shifted(rows, early))
        for rows in chunks(early, ROWS):
            reverse = collect(rows)
        for rows in chunks(prefix, ROWS):
            d_k[:, rows], d_v[:, rows] = self._pull_reverse(k, v, real, rows, reverse)
        return reverse

    def _collect(
        self, phi: Tensor, d_num: Tensor, d_den: Tensor, reverse: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The gradients that reach the state, with these rows' added."""
        return reverse[0] + self.multiply(phi.mT, d_num), reverse[1] + (phi.mT @ d_den).squeeze(-1)

    def _pull_reverse(
        self, k: Tensor, v: Tensor, real: Tensor | None, rows: slice, reverse: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The gradients of keys and values that went into the state."""
        real = None if real is None else real[:, rows]
        u = self.project(k[:, rows], real)
        d_phi = self.multiply(v[:, rows], reverse[0].mT) + reverse[1].unsqueeze(-2)
        return self.pull(u, d_phi, real), self.multiply(self.features(u, real), reverse[0])


def _masked(x: Tensor, real: Tensor | None) -> Tensor:
    """x (G, L, .) with zeros in the rows of padding."""
    return x if real is None else x.masked_fill(~real.unsqueeze(-1), 0.0)
