"""The attention weights of one sequence, a block at a time: what a query gives to a key, without the L x L matrix.

A mechanism with the queries and keys that it was called with goes in. Out come blocks of normalised weights, and the sums of rows
and columns that say where the mass of the matrix lies. For FAVOR the weights are phi(q_i).phi(k_j) / sum_j phi(q_i).phi(k_j)
(2009.14794, equation 4), and where attention is bidirectional their sums need no matrix either: a sum over keys comes out of the
product. For exact attention the sums take a sweep over the blocks. Memory is linear in the length.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from performers.attention.exact import ExactAttention
from performers.attention.favor import FavorAttention
from performers.attention.features import FavorFeatures, attention_scale, kernel_of
from performers.attention.kernels.state import finite, guarded
from performers.attention.local import LocalAttention
from performers.attention.mechanism import Mechanism
from performers.attention.split import SplitAttention
from performers.errors import UnsupportedError

BLOCK = 512  # rows and columns of the blocks that a sweep takes

_Seen = Callable[[Tensor, Tensor], Tensor]


class AttentionWeights(abc.ABC):
    """The weights of H heads over one sequence of L tokens.

    Attributes:
        heads, length: H and L.
        has_linear_sums: whether `sums` takes time linear in the length.
    """

    has_linear_sums = False

    def __init__(self, heads: int, length: int, device: torch.device) -> None:
        self.heads, self.length, self.device = heads, length, device

    @abc.abstractmethod
    def block(self, rows: Tensor, keys: Tensor) -> Tensor:
        """The weights (H, r, c) that the queries at `rows`, r positions, give to the keys at `keys`, c positions."""

    def sums(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of the rows and of the columns of the square of some tokens.

        Arguments:
            tokens: n positions.

        Returns:
            Two tensors (H, n), in float64: what each token gives to all of them, and what it gets from all of them.
        """
        given = torch.zeros(self.heads, len(tokens), dtype=torch.float64, device=self.device)
        got = torch.zeros_like(given)
        for start in range(0, len(tokens), BLOCK):
            rows = slice(start, start + BLOCK)
            for first in range(0, len(tokens), BLOCK):
                keys = slice(first, first + BLOCK)
                block = self.block(tokens[rows], tokens[keys]).double()
                given[:, rows] += block.sum(2)
                got[:, keys] += block.sum(1)
        return given, got


class _LogWeights(AttentionWeights):
    """Weights that are exponentials: exp(log weight - log normaliser).

    Arguments:
        visible: whether the queries at some positions see the keys at others, (r, c) of (r, 1) and (1, c); None if they do.
    """

    def __init__(self, heads: int, length: int, device: torch.device, visible: _Seen | None) -> None:
        super().__init__(heads, length, device)
        self._visible = visible
        self._normaliser: Tensor | None = None

    @abc.abstractmethod
    def log_weights(self, rows: Tensor, keys: Tensor) -> Tensor:
        """(H, r, c), before normalisation, whether or not the queries see the keys."""

    def log_normalisers(self) -> Tensor:
        """(H, L): the logarithm of the sum of every row."""
        everything = torch.arange(self.length, device=self.device)
        parts: list[Tensor] = []
        for rows in everything.split(BLOCK):
            sums = [self._seen(rows, keys).logsumexp(2) for keys in everything.split(BLOCK)]
            parts.append(torch.stack(sums).logsumexp(0))
        return torch.cat(parts, 1)

    def block(self, rows: Tensor, keys: Tensor) -> Tensor:
        """As `AttentionWeights.block`."""
        if self._normaliser is None:
            self._normaliser = finite(self.log_normalisers())
        return torch.exp(self._seen(rows, keys) - self._normaliser[:, rows, None])

    def _seen(self, rows: Tensor, keys: Tensor) -> Tensor:
        log = self.log_weights(rows, keys)
        return log if self._visible is None else log.masked_fill(~self._visible(rows[:, None], keys[None]), -torch.inf)


class _ExactWeights(_LogWeights):
    """softmax(q k^T scale), also of a window."""

    def __init__(self, query: Tensor, key: Tensor, scale: float, visible: _Seen | None) -> None:
        super().__init__(query.shape[0], query.shape[1], query.device, visible)
        self._query, self._key, self._scale = query, key, scale

    def log_weights(self, rows: Tensor, keys: Tensor) -> Tensor:
        """As `_LogWeights.log_weights`."""
        return (self._query[:, rows].float() * self._scale) @ self._key[:, keys].float().mT


class _ExponentialWeights(_LogWeights):
    """FAVOR with features exp(a), exp(b): products in float64, where they span enough."""

    def __init__(self, features: _Features, query: Tensor, key: Tensor, visible: _Seen | None) -> None:
        super().__init__(query.shape[0], query.shape[1], query.device, visible)
        self._features, self._query, self._key = features, query, key
        self.has_linear_sums = visible is None

    def log_weights(self, rows: Tensor, keys: Tensor) -> Tensor:
        """As `_LogWeights.log_weights`."""
        a, b = self._a(rows), self._b(keys)
        peak_a, peak_b = a.amax(2, keepdim=True), finite(b.amax(2, keepdim=True))
        products = (a - peak_a).exp() @ (b - peak_b).exp().mT
        return products.clamp_min(1e-300).log() + peak_a + peak_b.mT

    def log_normalisers(self) -> Tensor:
        """As `_LogWeights.log_normalisers`; linear where every key is seen."""
        if not self.has_linear_sums:
            return super().log_normalisers()
        everything = torch.arange(self.length, device=self.device)
        return self._log_given(everything, self._log_sum_of_keys(everything))

    def sums(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `AttentionWeights.sums`."""
        if not self.has_linear_sums:
            return super().sums(tokens)
        if self._normaliser is None:
            self._normaliser = self.log_normalisers()
        log_normaliser = self._normaliser
        given = torch.exp(self._log_given(tokens, self._log_sum_of_keys(tokens)) - log_normaliser[:, tokens])
        queries = [torch.logsumexp(self._a(rows) - log_normaliser[:, rows, None], 1) for rows in tokens.split(BLOCK)]
        of_queries = torch.stack(queries).logsumexp(0).unsqueeze(1)
        got = torch.cat([torch.logsumexp(self._b(keys) + of_queries, 2) for keys in tokens.split(BLOCK)], 1)
        return given, got.exp()

    def _log_sum_of_keys(self, keys: Tensor) -> Tensor:
        """(H, 1, M): the logarithm of the sum of their features."""
        parts = [torch.logsumexp(self._b(some), 1) for some in keys.split(BLOCK)]
        return torch.stack(parts).logsumexp(0).unsqueeze(1)

    def _log_given(self, rows: Tensor, of_keys: Tensor) -> Tensor:
        return torch.cat([torch.logsumexp(self._a(some) + of_keys, 2) for some in rows.split(BLOCK)], 1)

    def _a(self, rows: Tensor) -> Tensor:
        return self._features.queries(self._query[:, rows])

    def _b(self, keys: Tensor) -> Tensor:
        x = self._key[:, keys]
        return self._features.keys(x) + self._features.bias + self._features.log_weight(x)


class _PointwiseWeights(AttentionWeights):
    """FAVOR with features f(W x), which may be of either sign."""

    def __init__(self, features: _Features, query: Tensor, key: Tensor, visible: _Seen | None) -> None:
        super().__init__(query.shape[0], query.shape[1], query.device)
        self._features, self._query, self._key, self._visible = features, query, key, visible
        self.has_linear_sums = visible is None
        self._peak: Tensor | None = None
        if features.is_weighted:  # a scale for the whole sequence, which cancels
            self._peak = features.log_weight(key).amax(1, keepdim=True)
        self._normaliser: Tensor | None = None

    def block(self, rows: Tensor, keys: Tensor) -> Tensor:
        """As `AttentionWeights.block`."""
        return self._raw(rows, keys) / self._normalisers()[:, rows, None]

    def sums(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `AttentionWeights.sums`."""
        if not self.has_linear_sums:
            return super().sums(tokens)
        normaliser = self._normalisers().double()
        of_keys = self._sum_of_keys(tokens)
        given, of_queries = [], torch.zeros_like(of_keys)
        for rows in tokens.split(BLOCK):
            phi = self._phi_q(rows).double() / normaliser[:, rows, None]
            given.append((phi @ of_keys.mT).squeeze(2))
            of_queries += phi.sum(1, keepdim=True)
        got = [(self._phi_k(keys).double() @ of_queries.mT).squeeze(2) for keys in tokens.split(BLOCK)]
        return torch.cat(given, 1), torch.cat(got, 1)

    def _normalisers(self) -> Tensor:
        if self._normaliser is not None:
            return self._normaliser
        everything = torch.arange(self.length, device=self.device)
        if self.has_linear_sums:
            of_keys = self._sum_of_keys(everything)
            sums = [(self._phi_q(rows).double() @ of_keys.mT).squeeze(2) for rows in everything.split(BLOCK)]
        else:
            sums = [
                torch.stack([self._raw(rows, keys).double().sum(2) for keys in everything.split(BLOCK)]).sum(0)
                for rows in everything.split(BLOCK)
            ]
        self._normaliser = guarded(torch.cat(sums, 1)).to(self._features.dtype)
        return self._normaliser

    def _raw(self, rows: Tensor, keys: Tensor) -> Tensor:
        products = self._phi_q(rows) @ self._phi_k(keys).mT
        return products if self._visible is None else products * self._visible(rows[:, None], keys[None])

    def _sum_of_keys(self, keys: Tensor) -> Tensor:
        """(H, 1, M) in float64."""
        return torch.stack([self._phi_k(some).double().sum(1, keepdim=True) for some in keys.split(BLOCK)]).sum(0)

    def _phi_q(self, rows: Tensor) -> Tensor:
        return self._features.queries(self._query[:, rows])

    def _phi_k(self, keys: Tensor) -> Tensor:
        x = self._key[:, keys]
        phi = self._features.keys(x)
        return phi if self._peak is None else phi * (self._features.log_weight(x) - self._peak).exp()


class _Features:
    """The features of one call of FAVOR attention, as its kernels multiply them out."""

    def __init__(
        self, features: FavorFeatures, query: Tensor, key: Tensor, scale: float, packed: bool, causal: bool
    ) -> None:
        kernel = kernel_of(features.kernel_key)
        self.is_exponential, self.is_weighted, self._function = kernel.exponential, kernel.weighted, kernel.function
        self.dtype = torch.float64 if kernel.scaled else torch.float32
        # Packed or causal, features that are not calibrated have not looked at the tokens: neither may these.
        rows = features.rows(query[None], key[None], scale, is_causal=causal, streaming=packed)
        self._queries, self._keys, metric, bias = (x[0].to(self.dtype) for x in rows)
        self._metric, self.bias = metric.unsqueeze(1), bias.unsqueeze(1)

    def queries(self, x: Tensor) -> Tensor:
        """(H, r, M): phi, or its logarithm where features are exponentials."""
        return self._phi(x.to(self.dtype) @ self._queries.mT)

    def keys(self, x: Tensor) -> Tensor:
        """Likewise, of keys, without their weights."""
        return self._phi(x.to(self.dtype) @ self._keys.mT)

    def log_weight(self, x: Tensor) -> Tensor:
        """(H, c, 1): t of each key."""
        return (x.to(self.dtype).square() * self._metric).sum(2, keepdim=True) * -0.5

    def _phi(self, u: Tensor) -> Tensor:
        return u if self._function is None else self._function(u)


def attention_weights(
    mechanism: nn.Module | None,
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    packed: bool = False,
) -> list[AttentionWeights]:
    """The weights that a mechanism gave in one call, on one sequence in which every key is real.

    Arguments:
        mechanism: what was called; None for exact attention.
        query: (H, L, D), as the mechanism got them.
        key: (H, L, D), heads already repeated.
        is_causal, scale: as it was called.
        packed: whether it was called with `cu_seqlens`.

    Returns:
        One for all heads, or one for each part of a split.

    Raises:
        UnsupportedError: the mechanism's weights depend on more than a query and a key, as those of hashes and patterns do.
    """
    if isinstance(mechanism, SplitAttention):
        at = mechanism.first_heads(query.shape[0])
        halves = ((mechanism.first, slice(None, at)), (mechanism.second, slice(at, None)))
        return [
            weights
            for part, heads in halves
            for weights in attention_weights(
                part, query[heads], key[heads], is_causal=is_causal, scale=scale, packed=packed
            )
        ]
    factor = attention_scale(scale, query.shape[-1])
    causal: _Seen | None = (lambda i, j: i >= j) if is_causal else None
    if isinstance(mechanism, LocalAttention):
        window = mechanism.window
        near: _Seen = lambda i, j: (i - j).abs() < window  # noqa: E731
        return [_ExactWeights(query, key, factor, near if causal is None else lambda i, j: near(i, j) & (i >= j))]
    if mechanism is None or isinstance(mechanism, ExactAttention):
        return [_ExactWeights(query, key, factor, causal)]
    if isinstance(mechanism, FavorAttention) and mechanism.features.compatibility is None:
        features = _Features(mechanism.features, query, key, factor, packed, is_causal)
        kind = _ExponentialWeights if features.is_exponential else _PointwiseWeights
        return [kind(features, query, key, causal)]
    name = type(mechanism).__name__ if isinstance(mechanism, Mechanism) else "this attention"
    raise UnsupportedError(f"{name}: its weights cannot be written as a function of a query and a key, block by block.")
