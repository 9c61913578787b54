"""Prototypes: features that are clusters of the queries of a trained model.

Random features cover all queries that there could be. A trained model has few kinds of them. A prototype c stands for the queries
around it, and a query q attends as a mixture of prototypes does:

    attention(k | q) = sum_m weight_m(q) exp(c_m . k) / Z_m,      weight_m(q) ~ exp(-b |q - c_m|_G^2 / 2),      |x|_G^2 = x.Gx.

|q|_G^2 is the same for all m and cancels, so the logarithm of every feature is linear in q and in k, as that of a positive random
feature is, and prototypes run in the same kernels. The two are ends of one family: w = c / t makes of the features of FAVOR+

    exp(c.q / t^2 - |c|^2 / 2 t^2) exp(c.k - t^2 |k|^2 / 2),

unbiased over all of space for any t. Here t is small, so that a feature is for the queries near it, and c are where queries are.
The result is biased and has no noise; more features make finer clusters.

- The prototypes are means of clusters (Lloyd's algorithm), as in clustered attention (2007.04825), but soft, and found once for
  a model, not for every sequence.
- G is the covariance of the keys: |q - c|_G^2 / 2 is, to second order, how far the attention of c diverges from that of q.
- Z_m is what it is for the sequences that were clustered, on (geometric) average. So all keys can be summed in one pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention.proposals import Moments

ROUNDS = 8  # of Lloyd's algorithm
MOST_TOKENS = 16_384  # of a head that are clustered: more are sampled
# b, relative to what it would be in a mixture of Gaussians of this variance: softer weights interpolate, and err less.
SHARPNESS = 0.125
FINEST = 0.01  # of the variance of the queries: no cluster counts as narrower


class Prototypes(NamedTuple):
    """Of every head; log phi(q) = queries . q and log phi(k) = keys . k + bias. Units are those of scaled tokens."""

    queries: Tensor  # (..., M, D)
    keys: Tensor  # (..., M, D)
    bias: Tensor  # (..., M)

    @classmethod
    def standard(cls, num_heads: int, num_features: int, head_dim: int) -> Prototypes:
        """All alike, of shape (H, ...): uniform attention."""
        zeros = torch.zeros(num_heads, num_features, head_dim)
        return cls(zeros, zeros.clone(), zeros[..., 0].clone())

    def feature_rows(self, projection: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, metric and bias of `FeatureRows`, for tokens that are not scaled yet. No projection is needed."""
        metric = torch.zeros_like(self.keys[..., 0, :])
        return self.queries * scale**0.5, self.keys * scale**0.5, metric, self.bias

    def log_features(self, projection: Tensor, x: Tensor, is_query: bool) -> Tensor:
        """log phi(x) without 1 / sqrt(M), (..., L, M), for scaled tokens (..., L, D). Those of a query sum to one."""
        if is_query:
            return torch.log_softmax(x @ self.queries.mT + self.bias.unsqueeze(-2), -1)
        return x @ self.keys.mT


def fit_prototypes(
    query: Tensor,
    key: Tensor,
    real: tuple[Tensor | None, Tensor | None],
    key_moments: Moments,
    num_features: int,
    scale: float,
    generator: torch.Generator,
) -> Prototypes:
    """The prototypes of every head, (H, ...), in float32.

    Arguments:
        query, key: (B, H, L, D), not scaled yet.
        real: (B, L) bool of queries and of keys, True for a token that counts.
        key_moments: of each head, (H, ...), over all sequences.
        num_features: M.
        scale: of q.k.
        generator: on the CPU, to choose where clusters begin, and tokens if there are too many.
    """
    tokens = _joined(query, real[0], generator) * scale**0.5
    metric = (key_moments.covariance * scale).float()
    # The same for all heads, so that none depends on the others.
    order = torch.randperm(tokens.shape[1], generator=generator).repeat(-(-num_features // tokens.shape[1]))
    heads = [_cluster(*head, order[:num_features].to(query.device)) for head in zip(tokens, metric, strict=True)]
    prototypes, mean, precision = (torch.stack(parts) for parts in zip(*heads, strict=True))
    away = (prototypes - mean.unsqueeze(-2)) @ metric * precision[:, None, None]
    # -b |q - c|^2_G / 2 around the mean query, without what q alone decides.
    weight = -(away * (prototypes + mean.unsqueeze(-2))).sum(-1) / 2
    return Prototypes(away, prototypes, weight - _log_sums(prototypes, key, real[1], scale))


def _joined(x: Tensor, real: Tensor | None, generator: torch.Generator) -> Tensor:
    """The real tokens of all sequences, or a sample of them, (H, N, D), in float32."""
    real = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device) if real is None else real.to(x.device)
    sequence, place = real.nonzero(as_tuple=True)
    if len(place) > MOST_TOKENS:
        sample = torch.randperm(len(place), generator=generator)[:MOST_TOKENS].to(x.device)
        sequence, place = sequence[sample], place[sample]
    return x.detach()[sequence, :, place].transpose(0, 1).float()


def _cluster(tokens: Tensor, metric: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centres, (M, D), of clusters of tokens (N, D), the mean token, and the precision b of the weights.

    Clusters begin at the tokens that `start` numbers, (M,). One that loses all of its tokens stays where it is.
    """
    centres = nearest = tokens[start]
    for _ in range(ROUNDS):
        towards = centres @ metric
        number = (tokens @ towards.T - (towards * centres).sum(-1) / 2).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, number, tokens)
        count = torch.bincount(number, minlength=len(centres)).unsqueeze(-1)
        centres = torch.where(count > 0, sums / count.clamp_min(1), centres)
        nearest = centres[number]
    mean = tokens.mean(0)
    within, spread, size = (((x @ metric) * x).sum(-1).mean() for x in (tokens - nearest, tokens - mean, tokens))
    rounding = torch.finfo(tokens.dtype)
    variance = torch.stack([within, FINEST * spread, rounding.eps * size]).amax().clamp_min(rounding.tiny)
    return centres, mean, SHARPNESS * tokens.shape[-1] / variance


def _log_sums(prototypes: Tensor, key: Tensor, real: Tensor | None, scale: float) -> Tensor:
    """log Z, (H, M), less the logarithm of the number of keys, averaged over sequences."""
    found: list[Tensor] = []
    for number, of_sequence in enumerate(key.detach()):
        keys = of_sequence if real is None else of_sequence[:, real[number].to(key.device)]
        if keys.shape[1]:
            scores = prototypes @ (keys.float() * scale**0.5).mT
            found.append(torch.logsumexp(scores, -1) - math.log(keys.shape[1]))
    return torch.stack(found).mean(0)
