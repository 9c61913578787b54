"""FAVOR++ and FAVOR#: rows drawn from a distribution that fits the queries and keys.

Positive features write exp(q.k) as an expectation over w ~ N(0, I) (2009.14794, Lemma 1). The same expectation can be taken over
any other distribution p, a proposal, if every feature is weighted with N(w; 0, I) / p(w): importance sampling. The estimate stays
unbiased whatever p is, and its variance depends on how well p covers the sums q + k. FAVOR++ and FAVOR# are proposals
N(0, S), with S in closed form from second moments of the tokens:

- "isotropic" (OPRF, the features of FAVOR++, 2205.15317): S = s(mean |q + k|^2 / D) I;
- "dense" (SDERF, the features of FAVOR#, 2302.00787): S = s(mean (q + k)(q + k)^T), s being applied to the matrix.

In the papers' letters, S = I - 4 A. The dense one is applied to tokens that were first brought to a better position, which no
attention can notice, because q.k changes by a term of q alone, which cancels, and a term of k alone, which is known exactly:

- the means of q and of k are subtracted, so that the spread has to cover differences between tokens only;
- q is multiplied and k divided, coordinate by coordinate, by what makes their spreads equal (Psi of SADERF, 2302.00787).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 4096  # of a chunk whose second moments are summed at once
MOST_BALANCE = 4.0  # Psi stays between its inverse and this: where keys hardly vary, more would only cost precision


class Moments(NamedTuple):
    """Of the tokens of one head."""

    mean: Tensor  # (..., D)
    covariance: Tensor  # (..., D, D)


class Proposal(NamedTuple):
    """The distribution of the rows, and the position to which tokens are brought. Units are those of scaled tokens.

    w = factor g for the projection's rows g;  u = balance (q - query_centre);  v = (k - key_centre) / balance.
    """

    factor: Tensor  # (..., D, D)  the Cholesky factor of S
    balance: Tensor  # (..., D)
    query_centre: Tensor  # (..., D)
    key_centre: Tensor  # (..., D)

    @classmethod
    def standard(cls, num_heads: int, head_dim: int) -> Proposal:
        """N(0, I), of shape (H, ...): plain FAVOR+."""
        zeros = torch.zeros(num_heads, head_dim)
        return cls(torch.eye(head_dim).repeat(num_heads, 1, 1), torch.ones_like(zeros), zeros, zeros.clone())

    def draw(self, projection: Tensor) -> tuple[Tensor, Tensor]:
        """The rows w, (..., M, D), and log N(w; 0, I) / p(w), (..., M), of a projection (M, D)."""
        rows = projection @ self.factor.mT
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        return rows, (projection.square().sum(-1) - rows.square().sum(-1)) / 2 + log_det

    def feature_rows(self, projection: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, metric and bias of `FeatureRows`, for tokens that are not scaled yet.

        log phi(k) = w.v - |v|^2 / 2 + a.k, written out in powers of k, with a and b the centres of q and k. Terms of q alone
        and constants are left out: they cancel in attention.
        """
        rows, log_weight = self.draw(projection)
        linear = self.key_centre / self.balance.square() + self.query_centre
        constant = self.balance * self.query_centre + self.key_centre / self.balance
        return (
            rows * self.balance.unsqueeze(-2) * scale**0.5,
            (rows / self.balance.unsqueeze(-2) + linear.unsqueeze(-2)) * scale**0.5,
            scale / self.balance.square(),
            log_weight - (rows @ constant.unsqueeze(-1)).squeeze(-1),
        )

    def log_features(self, projection: Tensor, x: Tensor, is_query: bool) -> Tensor:
        """log phi(x) without 1 / sqrt(M), (..., L, M), for scaled tokens (..., L, D): products estimate exp(q.k) without bias."""
        rows, log_weight = self.draw(projection)
        centre, other = self.query_centre, self.key_centre
        moved = (x - centre.unsqueeze(-2)) * self.balance.unsqueeze(-2)
        if not is_query:
            centre, other = other, centre
            moved = (x - centre.unsqueeze(-2)) / self.balance.unsqueeze(-2)
        # q.k = (q - a).(k - b) + q.b + k.a - a.b, of which either side takes half of the constant.
        known = ((x - centre.unsqueeze(-2) / 2) * other.unsqueeze(-2)).sum(-1, keepdim=True)
        own = moved @ rows.mT - moved.square().sum(-1, keepdim=True) / 2
        return own + known + log_weight.unsqueeze(-2) / 2


def fit(kind: str, query: Moments, key: Moments, scale: float) -> Proposal:
    """The proposal that suits tokens with these moments.

    Arguments:
        kind: "isotropic" or "dense".
        query, key: moments of tokens that are not scaled yet.
        scale: of q.k.
    """
    mean_q, mean_k = query.mean * scale**0.5, key.mean * scale**0.5
    spread_q, spread_k = query.covariance * scale, key.covariance * scale
    eye = torch.eye(mean_q.shape[-1], dtype=mean_q.dtype, device=mean_q.device)
    if kind == "isotropic":
        both = _diagonal(spread_q).sum(-1) + _diagonal(spread_k).sum(-1) + (mean_q + mean_k).square().sum(-1)
        mean_square = (both / mean_q.shape[-1])[..., None, None]  # of a coordinate of q + k
        # S = 1 - 4 A, with the A of 2205.15317 that minimises the variance of a pair with this |q + k|^2.
        factor = ((3 + 2 * mean_square + (1 + 12 * mean_square + 4 * mean_square.square()).sqrt()) / 4).sqrt() * eye
        balance, centre_q, centre_k = torch.ones_like(mean_q), torch.zeros_like(mean_q), torch.zeros_like(mean_q)
    else:
        balance, centre_q, centre_k = _balance(_diagonal(spread_q), _diagonal(spread_k)), mean_q, mean_k
        outer = balance.unsqueeze(-1) * balance.unsqueeze(-2)
        second = spread_q * outer + spread_k / outer
        # s of a matrix without its eigenvectors: 3/2 + x - 1 / (2 + 4 x) agrees with s(x) in value and slope at 0 and in
        # value and slope at infinity, and is off by 2.6 % at most, which costs the variance a square of that.
        inverse = torch.linalg.inv_ex(eye + 2 * second).inverse
        covariance = 1.5 * eye + second - 0.5 * (inverse + inverse.mT) / 2
        factor = torch.linalg.cholesky_ex(covariance).L
    # Tokens so far out that their squares overflow have no moments: FAVOR+ is for them.
    fitted = Proposal(factor, balance, centre_q, centre_k)
    sound = torch.stack([part.flatten(mean_q.dim() - 1).isfinite().all(-1) for part in fitted]).all(0).unsqueeze(-1)
    return Proposal(
        torch.where(sound.unsqueeze(-1), factor, eye),
        torch.where(sound, balance, 1.0),
        torch.where(sound, centre_q, 0.0),
        torch.where(sound, centre_k, 0.0),
    )


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _balance(variance_q: Tensor, variance_k: Tensor) -> Tensor:
    """What makes the spreads of balance q and k / balance equal, coordinate by coordinate."""
    tiny = torch.finfo(variance_q.dtype).tiny
    ratio = (variance_k + tiny) / (variance_q + tiny)
    return ratio.pow(0.25).clamp(1 / MOST_BALANCE, MOST_BALANCE)


def moments(x: Tensor, real: Tensor | None, pooled: bool = False) -> Moments:
    """Mean and covariance of the tokens of each sequence and head, (B, H, ...), in float32 at least. Not differentiable.

    Arguments:
        x: (B, H, L, D).
        real: (B, L) bool, True for a token that counts.
        pooled: over the sequences, (H, ...), every token counting alike.
    """
    return Moments(*_moments(x.detach(), real, pooled))


@torch.library.custom_op("performers::token_moments", mutates_args=())
def _moments(x: Tensor, real: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    mask = None if real is None else real[:, None, :, None].to(x.device)
    count = x.new_full((batch, 1), length, dtype=dtype) if mask is None else mask.sum((1, 2, 3)).to(dtype)[:, None]
    if pooled:
        count = count.sum(0)
    count = count.clamp_min(1).unsqueeze(-1)  # (B, 1, 1) or (1, 1)

    def part(start: int) -> Tensor:
        rows = slice(start, start + ROWS)
        tokens = x[:, :, rows].to(dtype)
        return tokens if mask is None else torch.where(mask[:, :, rows], tokens, 0.0)

    with torch.autocast(x.device.type, enabled=False):
        mean = x.new_zeros(batch, heads, dim, dtype=dtype)
        for start in range(0, length, ROWS):
            mean += part(start).sum(-2)
        mean = (mean.sum(0) if pooled else mean) / count
        second = x.new_zeros(batch, heads, dim, dim, dtype=dtype)
        for start in range(0, length, ROWS):
            centred = part(start) - mean.unsqueeze(-2)
            if mask is not None:
                centred = torch.where(mask[:, :, start : start + ROWS], centred, 0.0)
            second += centred.mT @ centred
        return mean, (second.sum(0) if pooled else second) / count.unsqueeze(-1)


@_moments.register_fake
def _(x: Tensor, real: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor]:
    batch, heads, _, dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (heads, dim) if pooled else (batch, heads, dim)
    return x.new_empty(shape, dtype=dtype), x.new_empty((*shape, dim), dtype=dtype)
