"""The oracle: FAVOR attention written out as an L x L matrix, in float64, differentiated by autograd.

Slow and obvious on purpose. Every other backend must agree with it, in values and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from performers.attention.features import FeatureRows, Kernel, kernel_of
from performers.attention.kernels.state import Request, StateTensors, compute_dtype, finite, guarded
from performers.attention.visibility import visible_keys


def reference(request: Request) -> tuple[Tensor, StateTensors]:
    """The output (B, H, Lq, Dv) and the state after the last key."""
    query, key_padding_mask, kernel = request.query, request.key_padding_mask, kernel_of(request.kernel)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (x.double() for x in request[:3])
        rows, past = (
            FeatureRows(*(x.double() for x in request.rows)),
            StateTensors(*(x.double() for x in request.state)),
        )
        visible = visible_keys(
            q.shape[-2],
            k.shape[-2],
            is_causal=request.is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=request.cu_seqlens,
            device=q.device,
        )
        real = None if key_padding_mask is None else key_padding_mask[:, None, :, None]
        u_q, u_k = q @ rows.queries.mT, k @ rows.keys.mT  # (B, H, L, M)
        t = k.square().mul(rows.metric.unsqueeze(-2)).sum(-1, keepdim=True) * -0.5  # (B, H, Lk, 1)
        if kernel.exponential:
            b = u_k + rows.bias.unsqueeze(-2) + t
            out, after = _exponential(u_q, b, v, visible, real, past)
        else:
            out, after = _pointwise(kernel, u_q, u_k, t, v, visible, real, past)
    kept = compute_dtype(query.dtype)
    return out.to(query.dtype), StateTensors(*(tensor.to(kept) for tensor in after))


def _pointwise(
    kernel: Kernel,
    u_q: Tensor,
    u_k: Tensor,
    t: Tensor,
    v: Tensor,
    visible: Tensor,
    real: Tensor | None,
    past: StateTensors,
) -> tuple[Tensor, StateTensors]:
    f = kernel.function
    assert f is not None
    phi_q, phi_k = f(u_q), f(u_k if real is None else u_k.masked_fill(~real, 0.0))
    if real is not None:
        phi_k, t = phi_k.masked_fill(~real, 0.0), t.masked_fill(~real, -torch.inf)
    weights, past_share, log_scale = (phi_q @ phi_k.mT) * visible, 1.0, past.log_scale
    numerator, denominator = past.numerator, past.denominator
    if kernel.weighted:  # each row at the scale of the largest weight that it sees
        seen = t.mT.masked_fill(~visible, -torch.inf)
        past_scale = past.log_scale[..., :1].unsqueeze(-1)
        row_scale = finite(
            torch.cat([seen, past_scale.expand(*seen.shape[:-1], 1)], -1).detach().amax(-1, keepdim=True)
        )
        weights, past_share = weights * (seen - row_scale).exp(), (past_scale - row_scale).exp()
        log_scale = torch.cat(
            [past.log_scale.unsqueeze(-2), t.detach().expand(*t.shape[:-1], phi_k.shape[-1])], -2
        ).amax(-2)
        keep, phi_k = (past.log_scale - finite(log_scale)).exp(), phi_k * (t - finite(log_scale).unsqueeze(-2)).exp()
        numerator, denominator = numerator * keep.unsqueeze(-1), denominator * keep
    out = weights @ v + (phi_q * past_share) @ past.numerator
    row_sum = weights.sum(-1) + ((phi_q * past_share) @ past.denominator.unsqueeze(-1)).squeeze(-1)
    after = StateTensors(numerator + phi_k.mT @ v, denominator + phi_k.sum(-2), log_scale)
    return out / guarded(row_sum).unsqueeze(-1), after


def _exponential(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    visible: Tensor,
    real: Tensor | None,
    past: StateTensors,
) -> tuple[Tensor, StateTensors]:
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
