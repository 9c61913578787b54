"""Chunked FAVOR attention for pointwise features, phi(x) = f(W x): plain sums.

The state is S = sum phi(k) v^T and z = sum phi(k). Causal attention cuts the rows in chunks: a row sees the chunks before
its own through the state, and the keys of its own chunk through a C x C matrix of weights. The backward pass has the state
and, when causal, each row's denominator; features are computed again.

The keys of a `weighted` kernel (softmax-trig) have a factor exp(t) each. |f| is bounded there, so one scale for all features is
enough: a state's log scale c is the largest t so far, and a row's sums are divided by exp(r), r the largest t that the row
sees. Without weights c and r are zero, and every factor below is one and left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from performers.attention.kernels.projected import Projected
from performers.attention.kernels.state import CAUSAL_ROWS, ROWS, StateTensors, chunks, finite, guarded, shifted


class Pointwise(Projected):
    """The pointwise features of one group of heads, and the four passes over them; the same interface as `Exponential`."""

    def query_features(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """u = W q and phi(q) = f(u)."""
        assert self.kernel.function is not None
        u = self.project_queries(q)
        return u, self.kernel.function(u)

    def key_features(self, k: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """u = W k and phi(k) without its weight. Both are zero where a key is padding: whatever stands there, f'(u) is finite."""
        assert self.kernel.function is not None
        u = _masked(self.project_keys(k), real)
        return u, _masked(self.kernel.function(u), real)

    def pull_query_features(self, u: Tensor, d_phi: Tensor, q: Tensor) -> Tensor:
        """The gradient with respect to q, given the one with respect to phi(q)."""
        return self.pull_queries(self.kernel.pull(u, d_phi), q)

    def pull_key_features(
        self, u: Tensor, phi: Tensor, d_phi: Tensor, k: Tensor, real: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        """The gradient with respect to k, given the one with respect to phi(k) times its weight (G, L, 1)."""
        d_log_weights = None
        if weight is not None:
            d_phi = d_phi * weight
            d_log_weights = (d_phi * phi).sum(-1, keepdim=True)
        return self.pull_keys(self.kernel.pull(u, _masked(d_phi, real)), k, d_log_weights)

    def key_log_weights(self, k: Tensor, real: Tensor | None) -> Tensor | None:
        """t of each key, (G, L, 1); None when all are zero."""
        return self.log_weights(k, real) if self.kernel.weighted else None

    def absorb(self, phi: Tensor, v: Tensor, t: Tensor | None, state: StateTensors) -> StateTensors:
        """The state after the keys with features phi, values v and log weights t as well."""
        numerator, denominator, log_scale = state
        if t is not None:
            log_scale = torch.maximum(log_scale, t.amax(-2))
            keep = torch.exp(state.log_scale - finite(log_scale))
            numerator, denominator = numerator * keep.unsqueeze(-1), denominator * keep
            phi = phi * torch.exp(t - finite(log_scale[..., :1]).unsqueeze(-2))
        return StateTensors(numerator + self.multiply(phi.mT, v), denominator + phi.sum(-2), log_scale)

    def absorb_all(self, k: Tensor, v: Tensor, real: Tensor | None, state: StateTensors) -> StateTensors:
        """The state after all keys k."""
        for rows in chunks(k.shape[-2], ROWS):
            real_rows = None if real is None else real[:, rows]
            _, phi = self.key_features(k[:, rows], real_rows)
            state = self.absorb(phi, v[:, rows], self.key_log_weights(k[:, rows], real_rows), state)
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
            numerator, denominator = self.read(self.query_features(q[:, rows])[1], state)
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
        reverse = StateTensors(*d_after, after.log_scale)
        for rows in chunks(q.shape[-2], ROWS):
            u, phi = self.query_features(q[:, rows])
            denominator = guarded(phi @ after.denominator.unsqueeze(-1))
            d_num = d_out[:, rows].to(u.dtype) / denominator
            d_phi = self.multiply(d_num, after.numerator.mT)
            d_den = (phi * d_phi).sum(-1, keepdim=True).div_(denominator).neg_()
            d_q[:, rows] = self.pull_query_features(u, d_phi.add_(d_den * after.denominator.unsqueeze(-2)), q[:, rows])
            reverse = self._collect(phi, d_num, d_den, None, reverse)
        for rows in chunks(k.shape[-2], ROWS):
            d_k[:, rows], d_v[:, rows] = self._pull_reverse(k, v, real, rows, reverse)
        return self._at(past.log_scale, reverse)[:2]

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, past: StateTensors, out: Tensor, normaliser: Tensor
    ) -> StateTensors:
        """Write the output rows and their denominators; return the state after the last key."""
        early, prefix = max(0, q.shape[-2] - k.shape[-2]), max(0, k.shape[-2] - q.shape[-2])
        state = self.absorb_all(k[:, :prefix], v[:, :prefix], None if real is None else real[:, :prefix], past)
        for rows in chunks(early, ROWS):
            numerator, denominator = self.read(self.query_features(q[:, rows])[1], state)
            out[:, rows], normaliser[:, rows] = numerator / guarded(denominator), denominator.squeeze(-1)
        for rows in chunks(q.shape[-2] - early, CAUSAL_ROWS):
            queries, keys = shifted(rows, early), shifted(rows, prefix)
            real_keys = None if real is None else real[:, keys]
            _, phi_q = self.query_features(q[:, queries])
            _, phi_k = self.key_features(k[:, keys], real_keys)
            t = self.key_log_weights(k[:, keys], real_keys)
            numerator, denominator = self.read(phi_q, state)
            weights = self.multiply(phi_q, phi_k.mT).tril_()
            if t is not None:
                share, decay = _causal_factors(state, t)
                numerator, denominator, weights = numerator * share, denominator * share, weights * decay
            denominator = denominator + weights.sum(-1, keepdim=True)
            out[:, queries] = (numerator + self.multiply(weights, v[:, keys])) / guarded(denominator)
            normaliser[:, queries] = denominator.squeeze(-1)
            state = self.absorb(phi_k, v[:, keys], t, state)
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
        dk and dv. Those sums are gradients with respect to a state at the scale c that the keys read them at: every row that
        comes later has r >= c.
        """
        early, prefix = max(0, q.shape[-2] - k.shape[-2]), max(0, k.shape[-2] - q.shape[-2])
        state = self.absorb_all(k[:, :prefix], v[:, :prefix], None if real is None else real[:, :prefix], past)
        denominators = guarded(normaliser).unsqueeze(-1)
        d_denominators = torch.zeros_like(denominators)
        scales = [state.log_scale[..., :1]]  # of the state that the rows of each chunk read
        for rows in chunks(early, ROWS):
            u, phi = self.query_features(q[:, rows])
            d_phi = self.multiply(d_out[:, rows].to(u.dtype) / denominators[:, rows], state.numerator.mT)
            d_den = (phi * d_phi).sum(-1, keepdim=True).div_(denominators[:, rows]).neg_()
            d_q[:, rows] = self.pull_query_features(u, d_phi.add_(d_den * state.denominator.unsqueeze(-2)), q[:, rows])
            d_denominators[:, rows] = d_den
        for rows in chunks(q.shape[-2] - early, CAUSAL_ROWS):
            queries, keys = shifted(rows, early), shifted(rows, prefix)
            real_keys = None if real is None else real[:, keys]
            u_q, phi_q = self.query_features(q[:, queries])
            u_k, phi_k = self.key_features(k[:, keys], real_keys)
            t = self.key_log_weights(k[:, keys], real_keys)
            d_num = d_out[:, queries].to(u_q.dtype) / denominators[:, queries]
            d_phi = self.multiply(d_num, state.numerator.mT)
            slopes = self.multiply(d_num, v[:, keys].mT)
            weights = self.multiply(phi_q, phi_k.mT).tril_()
            share, decay = (None, None) if t is None else _causal_factors(state, t)
            if share is not None and decay is not None:
                d_phi, weights = d_phi * share, weights * decay
            total = (phi_q * d_phi).sum(-1, keepdim=True) + (weights * slopes).sum(-1, keepdim=True)
            d_den = total.div_(denominators[:, queries]).neg_()
            slopes.add_(d_den).tril_()
            d_past = d_den if share is None else d_den * share
            if decay is not None:
                slopes.mul_(decay)
            d_phi.add_(d_past * state.denominator.unsqueeze(-2)).add_(self.multiply(slopes, phi_k))
            d_q[:, queries] = self.pull_query_features(u_q, d_phi, q[:, queries])
            one = None if t is None else torch.ones_like(t)
            d_k[:, keys] = self.pull_key_features(
                u_k, phi_k, self.multiply(slopes.mT, phi_q), k[:, keys], real_keys, one
            )
            d_v[:, keys] = self.multiply(weights.mT, d_num)
            d_denominators[:, queries] = d_den
            state = self.absorb(phi_k, v[:, keys], t, state)
            scales.append(state.log_scale[..., :1])

        def collect(rows: slice, t: Tensor | None, reverse: StateTensors) -> StateTensors:
            d_num = d_out[:, rows].to(denominators.dtype) / denominators[:, rows]
            share = None if t is None else _causal_factors(reverse, t)[0]
            return self._collect(self.query_features(q[:, rows])[1], d_num, d_denominators[:, rows], share, reverse)

        reverse = StateTensors(*d_after, after.log_scale)
        for index, rows in reversed(list(enumerate(chunks(q.shape[-2] - early, CAUSAL_ROWS)))):
            keys = shifted(rows, prefix)
            d_keys, d_values = self._pull_reverse(k, v, real, keys, reverse)
            d_k[:, keys] += d_keys
            d_v[:, keys] += d_values
            t = self.key_log_weights(k[:, keys], None if real is None else real[:, keys])
            reverse = collect(shifted(rows, early), t, self._at(scales[index], reverse))
        for rows in chunks(early, ROWS):
            reverse = collect(rows, None, reverse)
        for rows in chunks(prefix, ROWS):
            d_k[:, rows], d_v[:, rows] = self._pull_reverse(k, v, real, rows, reverse)
        return self._at(past.log_scale, reverse)[:2]

    def _collect(
        self, phi: Tensor, d_num: Tensor, d_den: Tensor, share: Tensor | None, reverse: StateTensors
    ) -> StateTensors:
        """The gradients that reach the state, with these rows' added."""
        if share is not None:
            phi = phi * share
        return StateTensors(
            reverse.numerator + self.multiply(phi.mT, d_num),
            reverse.denominator + (phi.mT @ d_den).squeeze(-1),
            reverse.log_scale,
        )

    def _pull_reverse(
        self, k: Tensor, v: Tensor, real: Tensor | None, rows: slice, reverse: StateTensors
    ) -> tuple[Tensor, Tensor]:
        """The gradients of keys and values that went into the state."""
        real = None if real is None else real[:, rows]
        u, phi = self.key_features(k[:, rows], real)
        t = self.key_log_weights(k[:, rows], real)
        weight = None if t is None else torch.exp(t - finite(reverse.log_scale[..., :1]).unsqueeze(-2))
        d_phi = self.multiply(v[:, rows], reverse.numerator.mT) + reverse.denominator.unsqueeze(-2)
        d_k = self.pull_key_features(u, phi, d_phi, k[:, rows], real, weight)
        return d_k, self.multiply(phi if weight is None else phi * weight, reverse.numerator)

    def _at(self, log_scale: Tensor, reverse: StateTensors) -> StateTensors:
        """Gradients with respect to a state at another scale."""
        if not self.kernel.weighted:
            return reverse
        keep = torch.exp(log_scale - finite(reverse.log_scale))
        return StateTensors(reverse.numerator * keep.unsqueeze(-1), reverse.denominator * keep, log_scale)


def _causal_factors(state: StateTensors, t: Tensor) -> tuple[Tensor, Tensor]:
    """exp(c - r), (G, C, 1), and exp(t_j - r_i) for j <= i, (G, C, C): the factors on a row's sums over past and chunk."""
    past = state.log_scale[..., :1].unsqueeze(-2)
    row = finite(torch.maximum(past, torch.cummax(t, -2).values))
    later = torch.ones(t.shape[-2], t.shape[-2], dtype=torch.bool, device=t.device).triu_(1)
    return torch.exp(past - row), (t.mT - row).masked_fill_(later, -torch.inf).exp_()


def _masked(x: Tensor, real: Tensor | None) -> Tensor:
    """x (G, L, .) with zeros in the rows of padding."""
    return x if real is None else x.masked_fill(~real.unsqueeze(-1), 0.0)
