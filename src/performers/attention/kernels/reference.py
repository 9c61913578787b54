"""The oracle: FAVOR attention written out as an L x L matrix, in float64, differentiated by autograd.

Slow and obvious on purpose. Every other backend must agree with it, in values and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from performers.attention.features import FavorFeatures, Kernel, feature_rows, kernel_of
from performers.attention.kernels.state import StateTensors, compute_dtype, finite, guarded
from performers.attention.visibility import visible_keys


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FavorFeatures,
    *,
    scale: float,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: StateTensors | None,
) -> tuple[Tensor, StateTensors]:
    """The output (B, H, Lq, Dv) and the state after the last key; arguments as in `favor_attention`."""
    kernel = kernel_of(features.kernel_key)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (x.double() * factor for x, factor in ((query, scale**0.5), (key, scale**0.5), (value, 1.0)))
        visible = visible_keys(
            q.shape[-2],
            k.shape[-2],
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            device=q.device,
        )
        if state is None:
            past = StateTensors.empty(q.shape[:2], features.size, v.shape[-1], kernel.exponential, q)
        else:
            past = StateTensors(*(tensor.double() for tensor in state))
        w = feature_rows(features.projection, kernel).double()
        real = None if key_padding_mask is None else key_padding_mask[:, None, :, None]
        attend = _exponential if kernel.exponential else _pointwise
        out, after = attend(kernel, q, k, v, w, visible, real, past)
    kept = compute_dtype(query.dtype)
    return out.to(query.dtype), StateTensors(*(tensor.to(kept) for tensor in after))


def _pointwise(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    visible: Tensor,
    real: Tensor | None,
    past: StateTensors,
) -> tuple[Tensor, StateTensors]:
    f = kernel.function
    assert f is not None
    u = k @ w.T
    phi_q, phi_k = f(q @ w.T), f(u if real is None else u.masked_fill(~real, 0.0))
    if real is not None:
        phi_k = phi_k.masked_fill(~real, 0.0)
    weights = (phi_q @ phi_k.mT) * visible
    numerator = weights @ v + phi_q @ past.numerator
    denominator = weights.sum(-1) + (phi_q @ past.denominator.unsqueeze(-1)).squeeze(-1)
    after = StateTensors(past.numerator + phi_k.mT @ v, past.denominator + phi_k.sum(-2), past.log_scale)
    return numerator / guarded(denominator).unsqueeze(-1), after


def _exponential(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    visible: Tensor,
    real: Tensor | None,
    past: StateTensors,
) -> tuple[Tensor, StateTensors]:
    a = q @ w.T - q.square().sum(-1, keepdim=True) * (kernel.norm / 2)  # (B, H, Lq, M) log phi(q)
    b = k @ w.T - k.square().sum(-1, keepdim=True) * (kernel.norm / 2)  # (B, H, Lk, M) log phi(k)
    if real is not None:
        b = b.masked_fill(~real, -torch.inf)
    peak_a, peak_b = a.detach().amax(-1, keepdim=True), finite(b.detach().amax(-1, keepdim=True))
    # In float64 a product of features spans 10^-308 to 1 below its two tokens' peaks, enough for inputs 20 times unit normal.
    log_weights = ((a - peak_a).exp() @ (b - peak_b).exp().mT).clamp_min(1e-300).log() + peak_a + peak_b.mT
    log_weights = log_weights.masked_fill(~visible, -torch.inf)
    if real is not None:
        log_weights = log_weights.masked_fill(~real.mT, -torch.inf)
    shifted = a + past.log_scale.unsqueeze(-2)
    peak = finite(torch.cat([log_weights, shifted], -1).detach().amax(-1, keepdim=True))
    weights, phi_q = (log_weights - peak).exp(), (shifted - peak).exp()
    numerator = weights @ v + phi_q @ past.numerator
    denominator = weights.sum(-1) + (phi_q @ past.denominator.unsqueeze(-1)).squeeze(-1)

    log_scale = torch.cat([past.log_scale.unsqueeze(-2), b.detach()], -2).amax(-2)
    phi_k, keep = (b - finite(log_scale).unsqueeze(-2)).exp(), (past.log_scale - finite(log_scale)).exp()
    after = StateTensors(
        past.numerator * keep.unsqueeze(-1) + phi_k.mT @ v, past.denominator * keep + phi_k.sum(-2), log_scale
    )
    return numerator / guarded(denominator).unsqueeze(-1), after
