"""FAVOR attention by the formula of the authors' code, to compare with results that were obtained with it.

Source: google-research/performer/fast_attention/jax/fast_attention.py, with its defaults.

    softmax:      phi(x) = (exp(w.x - |x|^2 / 2 - s) + epsilon) / sqrt(M),    epsilon = 1e-6
                  s = max_m w_m.q of a query;  s = max_jm w_m.k_j over *all* keys of the head
    trig:         phi(x) = exp(|x|^2 / 2 - max_j |x_j|^2 / 2) cat[cos W x, sin W x] / sqrt(M)
    generalised:  phi(x) = f(W x) + 1e-3

Differences of convenience: tokens are multiplied by the square root of the scale here for generalised kernels, too, and the
projection is the features' own instead of one that is drawn again from the sum of the queries.

What it breaks, and `favor_attention` does not:

- Causality. The maximum runs over later keys. Without epsilon it would cancel; with it, a large later key makes all earlier
  features sink towards epsilon, and outputs of the past move.
- Padding and packing. The maximum runs over padded keys as well.
- Streaming. The maximum of keys that are still to come is not known, so there is no state to go on from.
- Far-out inputs. Features below epsilon are noise: where queries and keys are large, attention becomes uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from performers.attention.features import FavorFeatures, Kernel, kernel_of

SOFTMAX_EPSILON = 1e-6
GENERALISED_EPSILON = 1e-3
ROWS = 256  # of a causal chunk


def published_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FavorFeatures,
    scale: float,
    is_causal: bool,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Attention by the published formula: linear in the length, but every feature is stored.

    Arguments:
        query: (B, H, Lq, D).
        key: (B, H, Lk, D).
        value: (B, H, Lk, Dv).
        features: with compatibility="published".
        scale: of q.k.
        is_causal: a query sees no later key in the *sums*; the last query is aligned with the last key. The published
            stabiliser sees them all.
        key_padding_mask: (B, Lk) bool, True for a real token. A padded key leaves the sums, not the stabiliser.

    Returns:
        (B, H, Lq, Dv), in the query's type; differentiable by autograd.
    """
    kernel = kernel_of(features.kernel_key)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        w = features.projection.to(query.device, dtype)
        v = value.to(dtype)
        epsilon = 0.0 if features.kernel_key == "relu" else GENERALISED_EPSILON  # ours holds it already
        q, k = (
            _features(x.to(dtype) * scale**0.5, w, kernel, epsilon, is_query)
            for x, is_query in ((query, True), (key, False))
        )
        if key_padding_mask is not None:
            k = torch.where(key_padding_mask[:, None, :, None], k, 0.0)
        if is_causal:
            numerator, denominator = _causal_sums(q, k, v)
        else:
            numerator, denominator = q @ (k.mT @ v), q @ k.sum(-2).unsqueeze(-1)
        floor = SOFTMAX_EPSILON if features.kernel_key.startswith("softmax") else 0.0
        denominator = denominator + 2 * floor * (denominator.abs() <= floor)
        return (numerator / torch.where(denominator == 0, 1.0, denominator)).to(query.dtype)


def _features(x: Tensor, w: Tensor, kernel: Kernel, epsilon: float, is_query: bool) -> Tensor:
    u = x @ w.T
    half_norm = x.square().sum(-1, keepdim=True) / 2
    ratio = w.shape[0] ** -0.5
    if kernel.weighted:
        assert kernel.function is not None
        largest = half_norm.amax(-2, keepdim=True) if x.shape[-2] else 0.0
        return kernel.function(u) * torch.exp(half_norm - largest) * ratio
    if kernel.function is not None:
        return kernel.function(u) + epsilon
    if kernel.norm == 0:
        return torch.exp(u) + epsilon
    over = -1 if is_query or not x.shape[-2] else (-1, -2)
    stabiliser = u.amax(over, keepdim=True)
    return ratio * (torch.exp(u - half_norm - stabiliser) + SOFTMAX_EPSILON)


def _causal_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator (B, H, Lq, Dv) and denominator (B, H, Lq, 1) over the keys up to each query."""
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    offset = k.shape[-2] - q.shape[-2]
    state = k.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1])
    seen, parts = 0, [q.new_zeros(*q.shape[:-2], 0, v.shape[-1])]
    for start in range(0, q.shape[-2], ROWS):
        rows = q[..., start : start + ROWS, :]
        before, after = max(0, start + offset), max(0, start + rows.shape[-2] + offset)
        state = state + k[..., seen:before, :].mT @ v[..., seen:before, :]
        seen = before
        own_k, own_v = k[..., before:after, :], v[..., before:after, :]
        last = torch.arange(start, start + rows.shape[-2], device=q.device) + offset
        visible = torch.arange(before, after, device=q.device) <= last.unsqueeze(-1)
        parts.append(rows @ state + (rows @ own_k.mT * visible) @ own_v)
    sums = torch.cat(parts, -2)
    return sums[..., :-1], sums[..., -1:]
