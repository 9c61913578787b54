"""Chunked FAVOR attention for exponential features, phi(x) = exp(log phi(x)), combined in the log domain.

Letters: a = log phi(q), b = log phi(k), (G, L, M) for G heads; S, z, c the state (numerator, denominator, log scale). A state
stands for the sums S exp(c) and z exp(c), with c_m the largest b_m so far. A query takes c over, and its own maximum is then
removed: exp(a + c - max) S / exp(a + c - max) z. The largest term of the denominator is then at least 1, whatever the inputs.

Causal attention cuts the rows in chunks: a row sees the chunks before its own through the state, and the keys of its own
chunk through an explicit C x C matrix of weights. Nothing of a row may depend on a later key, not even a scale, so that matrix
is built from scales of single tokens and running maxima. These can underflow where queries and keys peak at different
features; such rows are computed again by halving the chunk, where every key of the first half precedes every query of the
second half and the scale per feature is allowed again.

The backward pass has the state and, when causal, the log denominator of each row; features are computed again, and so is
d_out . out: read from an output that was rounded to 16 bits, it would spoil gradients that nearly cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention.kernels.projected import Projected
from performers.attention.kernels.state import CAUSAL_ROWS, ROWS, StateTensors, chunks, finite, guarded, shifted

BLOCK_ROWS = 8  # at which halving stops and every product of features is formed
# In float32 a product of features is exact to rounding down to exp(-87) of its scale. A row whose sum stays within exp(-60)
# has lost nothing; an exponential below exp(40) times one above exp(-103) is at most 1 and loses less than exp(-60).
LOST_BELOW = 60.0
SAFE_ABOVE = 40.0


class _Rows(NamedTuple):
    """Queries of a chunk, in the backward pass."""

    a: Tensor  # (G, C, M)
    d_o: Tensor  # (G, C, Dv)
    log_sum: Tensor  # (G, C, 1)  log denominator
    slope: Tensor  # (G, C, 1)  d_o . out, written to
    d_a: Tensor  # (G, C, M)  added to

    def part(self, rows: slice) -> _Rows:
        return _Rows(*(tensor[:, rows] for tensor in self))


class _Keys(NamedTuple):
    """Keys of a chunk, in the backward pass."""

    b: Tensor  # (G, C, M)
    v: Tensor  # (G, C, Dv)
    d_b: Tensor  # (G, C, M)  added to
    d_v: Tensor  # (G, C, Dv)  added to

    def part(self, rows: slice) -> _Keys:
        return _Keys(*(tensor[:, rows] for tensor in self))


class _Products(NamedTuple):
    """Queries and keys of a chunk, multiplied out, in the backward pass."""

    phi_q: Tensor  # (G, C, M)  divided by the rows' denominators
    phi_k: Tensor  # (G, C, M)
    weights: Tensor  # (G, C, C)
    slopes: Tensor  # (G, C, C)  d_o . v


class Exponential(Projected):
    """The exponential features of one group of heads, and the four passes over them."""

    def log_queries(self, q: Tensor) -> Tensor:
        """a without -|q|^2 / 2, which cancels between numerator and denominator."""
        return self.project_queries(q)

    def log_keys(self, k: Tensor, real: Tensor | None) -> Tensor:
        """b, -inf where a key is padding or so far out that |k|^2 overflows."""
        log_weights = self.log_weights(k, real)
        b = self.project_keys(k).add_(log_weights)
        if self.biased:
            b.add_(self.rows.bias)
        nothing = log_weights == -torch.inf
        # A far-out key's products overflow as well, and inf - inf is not a number.
        return b.masked_fill_(nothing, -torch.inf) if bool(nothing.any()) else b

    def absorb(self, b: Tensor, v: Tensor, state: StateTensors) -> StateTensors:
        """The state after the keys b and values v as well."""
        log_scale = torch.maximum(state.log_scale, b.amax(-2))
        shift = finite(log_scale)
        keep = torch.exp(state.log_scale - shift)
        phi = torch.exp(b - shift.unsqueeze(-2))
        return StateTensors(
            state.numerator * keep.unsqueeze(-1) + self.multiply(phi.mT, v),
            state.denominator * keep + phi.sum(-2),
            log_scale,
        )

    def absorb_all(self, k: Tensor, v: Tensor, real: Tensor | None, state: StateTensors) -> StateTensors:
        """The state after all keys k."""
        for rows in chunks(k.shape[-2], ROWS):
            b = self.log_keys(k[:, rows], None if real is None else real[:, rows])
            state = self.absorb(b, v[:, rows].to(self.rows.queries.dtype), state)
        return state

    def read(self, a: Tensor, state: StateTensors) -> tuple[Tensor, Tensor, Tensor]:
        """Numerator (G, L, Dv), denominator and log scale (G, L, 1) of rows that see the state alone."""
        shifted = a + finite(state.log_scale).unsqueeze(-2)
        peak = shifted.amax(-1, keepdim=True)
        phi = shifted.sub_(peak).exp_()
        return self.multiply(phi, state.numerator), phi @ state.denominator.unsqueeze(-1), peak

    def bidirectional(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, past: StateTensors, out: Tensor
    ) -> StateTensors:
        """Write the output rows; return the state of past and present keys."""
        state = self.absorb_all(k, v, real, past)
        for rows in chunks(q.shape[-2], ROWS):
            numerator, denominator, _ = self.read(self.log_queries(q[:, rows]), state)
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
        """Write the gradients of q, k and v; return those of the past numerator and denominator.

        d_numerator and d_denominator are taken with respect to S and z at the scale of `after`: phi(q) / denominator is at
        most 1 / z <= 1 there, and exp(b - c) <= 1.
        """
        d_numerator, d_denominator = d_after
        shift = finite(after.log_scale).unsqueeze(-2)
        for rows in chunks(q.shape[-2], ROWS):
            a = self.log_queries(q[:, rows]).add_(shift)
            phi = a.sub_(a.amax(-1, keepdim=True)).exp_()
            phi.div_(guarded(phi @ after.denominator.unsqueeze(-1)))
            d_o = d_out[:, rows].to(phi.dtype)
            d_phi = self.multiply(d_o, after.numerator.mT)
            slope = (phi * d_phi).sum(-1, keepdim=True)
            d_numerator = d_numerator + self.multiply(phi.mT, d_o)
            d_denominator = d_denominator - (phi.mT @ slope).squeeze(-1)
            d_phi.sub_(slope * after.denominator.unsqueeze(-2))
            d_q[:, rows] = self.pull_queries(d_phi.mul_(phi), q[:, rows])
        reverse = StateTensors(d_numerator, d_denominator, -shift.squeeze(-2))
        for rows in chunks(k.shape[-2], ROWS):
            b = self.log_keys(k[:, rows], None if real is None else real[:, rows])
            d_k[:, rows], d_v[:, rows] = self._pull_reverse(b, k[:, rows], v[:, rows], reverse)
        keep = torch.exp(past.log_scale + reverse.log_scale)
        return d_numerator * keep.unsqueeze(-1), d_denominator * keep

    def causal(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        past: StateTensors,
        out: Tensor,
        normaliser: Tensor,
    ) -> StateTensors:
        """Write the output rows and their log denominators; return the state after the last key."""
        early, prefix = max(0, q.shape[-2] - k.shape[-2]), max(0, k.shape[-2] - q.shape[-2])
        state = self.absorb_all(k[:, :prefix], v[:, :prefix], None if real is None else real[:, :prefix], past)
        for rows in chunks(early, ROWS):
            numerator, denominator, peak = self.read(self.log_queries(q[:, rows]), state)
            out[:, rows] = numerator / guarded(denominator)
            normaliser[:, rows] = (peak + denominator.log()).squeeze(-1)
        for rows in chunks(q.shape[-2] - early, CAUSAL_ROWS):
            queries, keys = shifted(rows, early), shifted(rows, prefix)
            a = self.log_queries(q[:, queries])
            b = self.log_keys(k[:, keys], None if real is None else real[:, keys])
            values = v[:, keys].to(a.dtype)
            out[:, queries], normaliser[:, queries] = self._causal_chunk(a, b, values, state)
            state = self.absorb(b, values, state)
        return state

    def _causal_chunk(self, a: Tensor, b: Tensor, v: Tensor, state: StateTensors) -> tuple[Tensor, Tensor]:
        """Output (G, C, Dv) and log denominator (G, C) of one chunk."""
        numerator, denominator, peak = self.read(a, state)
        log_past = peak + denominator.log()

        peak_a, peak_b = a.amax(-1, keepdim=True), b.amax(-1)
        products = self.multiply(torch.exp(a - peak_a), torch.exp(b - finite(peak_b).unsqueeze(-1)).mT)
        running = finite(torch.cummax(peak_b, -1).values).unsqueeze(-1)
        decay = (peak_b.unsqueeze(-2) - running).masked_fill_(_later(a), -torch.inf).exp_()
        weights = products.mul_(decay)
        own = weights.sum(-1, keepdim=True)
        scale = peak_a + running
        log_own = scale + own.log()

        log_all = torch.logaddexp(log_past, log_own)
        safe = finite(log_all)
        share_past = torch.where(denominator > 0, torch.exp(peak - safe), 0.0)
        share_own = torch.where(own > 0, torch.exp(scale - safe), 0.0)
        out = numerator * share_past + self.multiply(weights, v) * share_own

        # The decision is made row by row: a row's bits must not depend on whether a later one had to be computed again.
        lost = (log_all < scale - LOST_BELOW) & (torch.cummax(peak_b, -1).values > -torch.inf).unsqueeze(-1)
        if bool(lost.any()):
            past_out = numerator / guarded(denominator)
            own_out, own_log = self._halved(a, b, v)
            exact_out, exact_log = _merge((past_out, log_past), (own_out, own_log))
            out, log_all = torch.where(lost, exact_out, out), torch.where(lost, exact_log, log_all)
        return out, log_all.squeeze(-1)

    def _halved(self, a: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (G, C, Dv) and log denominator (G, C, 1) of a chunk that sees itself alone, by halving."""
        length = a.shape[-2]
        if length <= BLOCK_ROWS:
            log_weights = torch.logsumexp(a.unsqueeze(-2) + b.unsqueeze(-3), -1)
            log_weights.masked_fill_(_later(a), -torch.inf)
            log_sum = torch.logsumexp(log_weights, -1, keepdim=True)
            return torch.exp(log_weights - finite(log_sum)) @ v, log_sum
        half = length // 2
        top = self._halved(a[:, :half], b[:, :half], v[:, :half])
        bottom = self._halved(a[:, half:], b[:, half:], v[:, half:])
        nothing = StateTensors.empty(a.shape[:1], a.shape[-1], v.shape[-1], True, a)
        numerator, denominator, peak = self.read(a[:, half:], self.absorb(b[:, :half], v[:, :half], nothing))
        bottom = _merge(bottom, (numerator / guarded(denominator), peak + denominator.log()))
        return torch.cat([top[0], bottom[0]], -2), torch.cat([top[1], bottom[1]], -2)

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

        With w_ij = sum_m exp(a_im + b_jm - log denominator_i), the weights, and g_ij = d_out_i . (v_j - out_i):
        d a_im = sum_j exp(a_im + b_jm - ...) g_ij, and likewise d b_jm over i. The keys of earlier chunks are summed in the
        state, scanned forward; the queries of later chunks in R (M, Dv) and r (M), scanned backward at a scale of their own:
        every exponent a_im + b_jm - log denominator_i with j <= i is at most 0, so nothing overflows.
        """
        early, prefix = max(0, q.shape[-2] - k.shape[-2]), max(0, k.shape[-2] - q.shape[-2])
        real_prefix = None if real is None else real[:, :prefix]
        slopes = normaliser.new_zeros(*normaliser.shape, 1)

        def rows_at(rows: slice) -> _Rows:
            a = self.log_queries(q[:, rows])
            # A row with nothing to attend to has the log denominator -inf; +inf in its place makes all its weights zero.
            log_sum = torch.where(normaliser[:, rows] == -torch.inf, torch.inf, normaliser[:, rows]).unsqueeze(-1)
            return _Rows(a, d_out[:, rows].to(a.dtype), log_sum, slopes[:, rows], torch.zeros_like(a))

        state = self.absorb_all(k[:, :prefix], v[:, :prefix], real_prefix, past)
        for rows in chunks(early, ROWS):
            queries = rows_at(rows)
            self._rows_backward(queries, None, state)
            d_q[:, rows] = self.pull_queries(queries.d_a, q[:, rows])
        for rows in chunks(q.shape[-2] - early, CAUSAL_ROWS):
            at_queries, at_keys = shifted(rows, early), shifted(rows, prefix)
            b = self.log_keys(k[:, at_keys], None if real is None else real[:, at_keys])
            values = v[:, at_keys].to(b.dtype)
            queries = rows_at(at_queries)
            keys = _Keys(b, values, torch.zeros_like(b), torch.zeros_like(values))
            self._rows_backward(queries, keys, state)
            d_q[:, at_queries] = self.pull_queries(queries.d_a, q[:, at_queries])
            d_k[:, at_keys] = self._pull_keys(keys.d_b, k[:, at_keys])
            d_v[:, at_keys] = keys.d_v
            state = self.absorb(b, values, state)

        reverse = StateTensors(*d_after, -finite(after.log_scale))
        for rows in reversed(list(chunks(q.shape[-2] - early, CAUSAL_ROWS))):
            at_keys = shifted(rows, prefix)
            b = self.log_keys(k[:, at_keys], None if real is None else real[:, at_keys])
            d_keys, d_values = self._pull_reverse(b, k[:, at_keys], v[:, at_keys], reverse)
            d_k[:, at_keys] += d_keys
            d_v[:, at_keys] += d_values
            reverse = self._collect(rows_at(shifted(rows, early)), reverse)
        for rows in chunks(early, ROWS):
            reverse = self._collect(rows_at(rows), reverse)
        for rows in chunks(prefix, ROWS):
            b = self.log_keys(k[:, rows], None if real is None else real[:, rows])
            d_k[:, rows], d_v[:, rows] = self._pull_reverse(b, k[:, rows], v[:, rows], reverse)
        keep = torch.exp(past.log_scale + reverse.log_scale)
        return reverse.numerator * keep.unsqueeze(-1), reverse.denominator * keep

    def _rows_backward(self, rows: _Rows, keys: _Keys | None, state: StateTensors) -> None:
        """Write the slopes and the gradients of rows that see the state and, causally, the keys of their own chunk."""
        phi = torch.exp(rows.a + state.log_scale.unsqueeze(-2) - rows.log_sum)
        d_phi = self.multiply(rows.d_o, state.numerator.mT)
        rows.slope.copy_((phi * d_phi).sum(-1, keepdim=True))
        own = None
        later = None if keys is None else _later(rows.a)
        if keys is not None:
            own = self._products(rows, keys, later)
            if own is not None:
                rows.slope.add_((own.weights * own.slopes).sum(-1, keepdim=True))
            else:
                out, log_sum = self._halved(rows.a, keys.b, keys.v)
                rows.slope.add_(torch.exp(log_sum - rows.log_sum) * (rows.d_o * out).sum(-1, keepdim=True))
        rows.d_a.copy_(d_phi.sub_(rows.slope * state.denominator.unsqueeze(-2)).mul_(phi))
        if keys is not None:
            if own is not None:
                self._add_products(rows, keys, own, later)
            else:
                self._halved_backward(rows, keys)

    def _pull_keys(self, d_b: Tensor, k: Tensor) -> Tensor:
        return self.pull_keys(d_b, k, d_b.sum(-1, keepdim=True))

    def _pull_reverse(self, b: Tensor, k: Tensor, v: Tensor, reverse: StateTensors) -> tuple[Tensor, Tensor]:
        """The gradients of keys and values, from the queries collected in `reverse`. Overwrites b."""
        phi = b.add_(reverse.log_scale.unsqueeze(-2)).exp_()
        d_phi = self.multiply(v, reverse.numerator.mT).add_(reverse.denominator.unsqueeze(-2))
        return self._pull_keys(d_phi.mul_(phi), k), self.multiply(phi, reverse.numerator)

    def _collect(self, rows: _Rows, reverse: StateTensors) -> StateTensors:
        """The gradients that reach earlier keys, with these rows' added."""
        a = rows.a - rows.log_sum
        log_scale = torch.maximum(reverse.log_scale, a.amax(-2))
        keep = torch.exp(reverse.log_scale - log_scale)
        phi = a.sub_(log_scale.unsqueeze(-2)).exp_()
        return StateTensors(
            reverse.numerator * keep.unsqueeze(-1) + self.multiply(phi.mT, rows.d_o),
            reverse.denominator * keep - (phi.mT @ rows.slope).squeeze(-1),
            log_scale,
        )

    def _products(self, rows: _Rows, keys: _Keys, later: Tensor | None) -> _Products | None:
        """Weights and slopes of queries and keys, scaled per feature; None where that could overflow.

        `later` marks the pairs that do not count; None when every key precedes every query, and nothing can overflow.
        """
        shift = keys.b.amax(-2, keepdim=True)
        exponents = rows.a + shift - rows.log_sum
        if later is not None and bool(exponents.amax() > SAFE_ABOVE):
            return None
        phi_q, phi_k = exponents.exp_(), torch.exp(keys.b - finite(shift))
        weights, slopes = self.multiply(phi_q, phi_k.mT), self.multiply(rows.d_o, keys.v.mT)
        return _Products(phi_q, phi_k, weights if later is None else weights.masked_fill_(later, 0.0), slopes)

    def _add_products(self, rows: _Rows, keys: _Keys, own: _Products, later: Tensor | None) -> None:
        """Add the gradients that queries and keys owe each other."""
        slopes = own.slopes - rows.slope
        if later is not None:
            slopes.masked_fill_(later, 0.0)
        keys.d_v.add_(self.multiply(own.weights.mT, rows.d_o))
        rows.d_a.add_(self.multiply(slopes, own.phi_k).mul_(own.phi_q))
        keys.d_b.add_(self.multiply(slopes.mT, own.phi_q).mul_(own.phi_k))

    def _halved_backward(self, rows: _Rows, keys: _Keys) -> None:
        """Add the gradients of a chunk that sees itself alone, by halving."""
        length = rows.a.shape[-2]
        if length <= BLOCK_ROWS:
            exponents = rows.a.unsqueeze(-2) + keys.b.unsqueeze(-3) - rows.log_sum.unsqueeze(-1)
            terms = exponents.masked_fill_(_later(rows.a).unsqueeze(-1), -torch.inf).exp_()  # (G, C, C, M)
            keys.d_v.add_(terms.sum(-1).mT @ rows.d_o)
            terms.mul_((rows.d_o @ keys.v.mT - rows.slope).unsqueeze(-1))
            rows.d_a.add_(terms.sum(-2))
            keys.d_b.add_(terms.sum(-3))
            return
        top, bottom = slice(0, length // 2), slice(length // 2, length)
        cross = self._products(rows.part(bottom), keys.part(top), None)
        assert cross is not None
        self._add_products(rows.part(bottom), keys.part(top), cross, None)
        for half in (top, bottom):
            self._halved_backward(rows.part(half), keys.part(half))


def _later(a: Tensor) -> Tensor:
    """The pairs of a chunk, (C, C) bool, whose key comes after the query."""
    return torch.ones(a.shape[-2], a.shape[-2], dtype=torch.bool, device=a.device).triu_(1)


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One row's attention over two sets of keys, from its output and log denominator over each."""
    log_sum = torch.logaddexp(first[1], second[1])
    safe = finite(log_sum)
    return first[0] * torch.exp(first[1] - safe) + second[0] * torch.exp(second[1] - safe), log_sum
