"""FAVOR attention as one pair of `torch.library` operators, whatever computes them.

A backend is a module with three functions: `supports`, which says whether it can take these inputs, `forward` and `backward`.
The operators, their gradient and their shapes for `torch.compile`, which sees one node each and not a loop over a million tokens,
are the same for all of them and are here. The backward operator computes features again; what is kept between the two is the
state after the last key and, when causal, one number per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from performers.attention.arguments import segments
from performers.attention.features import FavorFeatures, FeatureRows, kernel_of
from performers.attention.kernels import chunked, native, triton_backend
from performers.attention.kernels.reference import reference
from performers.attention.kernels.state import Request, StateTensors, Upstream, compute_dtype
from performers.errors import InputError


class Backend(Protocol):
    """What computes FAVOR attention; see `chunked` for what the functions give."""

    supports: Callable[[Request], bool]
    forward: Callable[[Request], tuple[Tensor, Tensor, StateTensors]]
    backward: Callable[[Upstream, Request], tuple[Tensor, ...]]


# In the order in which "auto" asks them.
_BACKENDS: dict[str, Backend] = {"triton": triton_backend, "native": native, "chunked": chunked}
BACKENDS = ("auto", "reference", *_BACKENDS)


def check_backend(name: str) -> None:
    """Refuse what is not one of `BACKENDS`.

    Raises:
        InputError: an unknown name.
    """
    if name not in BACKENDS:
        raise InputError(f"backend={name!r} is not known: expected one of {', '.join(map(repr, BACKENDS))}.")


def attend(
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
    streaming: bool,
    backend: str,
) -> tuple[Tensor, StateTensors]:
    """The output (B, H, Lq, Dv) and the state after the last key; arguments as in `favor_attention`.

    Raises:
        InputError: the backend that was asked for cannot take these inputs.
    """
    with torch.autocast(query.device.type, enabled=False):
        rows = features.rows(
            query,
            key,
            scale,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            streaming=streaming,
        )
    kernel = features.kernel_key
    if state is None:
        like = torch.empty((), dtype=compute_dtype(query.dtype), device=query.device)
        scaled = kernel_of(kernel).scaled
        state = StateTensors.empty(query.shape[:2], features.size, value.shape[-1], scaled, like)
    learned = any(x.requires_grad for x in rows[:2])
    fast = features.precision == "fast"
    request = Request(query, key, value, rows, state, key_padding_mask, cu_seqlens, kernel, is_causal, fast, learned)
    if backend == "reference":
        return reference(request)
    out, _, *after = _forward(*request[:3], *rows, *state, *request[5:], backend)
    return out, StateTensors(*after)


def _choose(backend: str, request: Request) -> Backend:
    """The backend to compute with, the same one in the forward and in the backward operator.

    It is chosen inside of them: looking for a compiler or for Triton is nothing that `torch.compile` could trace.
    """
    for name in _BACKENDS if backend == "auto" else (backend,):
        if _BACKENDS[name].supports(request):
            return _BACKENDS[name]
    query = request.query
    raise InputError(
        f"backend={backend!r} cannot compute kernel={request.kernel!r} for {query.dtype} on {query.device.type} with head size "
        f"{query.shape[-1]}{' and learned rows' if request.learned else ''} here; backend='auto' finds one that can."
    )


def _contiguous_like(x: Tensor) -> Tensor:
    """Room for a result of the shape of x, whatever the strides of x are."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("performers::favor", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_rows: Tensor,
    key_rows: Tensor,
    metric: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    log_scale: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kernel: str,
    is_causal: bool,
    fast: bool,
    learned: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        segments(cu_seqlens, query.shape[2])  # refuses offsets that do not rise; a backend may take them as they are
    rows, past = FeatureRows(query_rows, key_rows, metric, bias), StateTensors(numerator, denominator, log_scale)
    request = Request(query, key, value, rows, past, key_padding_mask, cu_seqlens, kernel, is_causal, fast, learned)
    with torch.autocast(query.device.type, enabled=False):
        out, normaliser, after = _choose(backend, request).forward(request)
    return out, normaliser, after.numerator, after.denominator, after.log_scale


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    numerator, denominator, log_scale = arguments[4:7]
    is_causal = arguments[10]
    return (
        query.new_empty(*query.shape[:3], value.shape[-1]),
        numerator.new_empty(query.shape[:3] if is_causal else (0,)),
        _contiguous_like(numerator),
        _contiguous_like(denominator),
        _contiguous_like(log_scale),
    )


@torch.library.custom_op("performers::favor_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_numerator: Tensor,
    d_denominator: Tensor,
    normaliser: Tensor,
    after_numerator: Tensor,
    after_denominator: Tensor,
    after_log_scale: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_rows: Tensor,
    key_rows: Tensor,
    metric: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    log_scale: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kernel: str,
    is_causal: bool,
    fast: bool,
    learned: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, past = FeatureRows(query_rows, key_rows, metric, bias), StateTensors(numerator, denominator, log_scale)
    request = Request(query, key, value, rows, past, key_padding_mask, cu_seqlens, kernel, is_causal, fast, learned)
    after = StateTensors(after_numerator, after_denominator, after_log_scale)
    upstream = Upstream(d_out, d_numerator, d_denominator, normaliser, after)
    with torch.autocast(query.device.type, enabled=False):
        gradients = _choose(backend, request).backward(upstream, request)
    if learned:
        return gradients  # pyright: ignore[reportReturnType]
    return *gradients, query_rows.new_zeros(0), key_rows.new_zeros(0)  # pyright: ignore[reportReturnType]


@_backward.register_fake
def _(
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key, value, query_rows, key_rows, _, _, numerator, denominator = arguments[7:16]
    learned = arguments[-2]
    rows = [_contiguous_like(x) if learned else x.new_empty(0) for x in (query_rows, key_rows)]
    d_inputs = (_contiguous_like(x) for x in (query, key, value, numerator, denominator))
    return *d_inputs, *rows  # pyright: ignore[reportReturnType]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, flags = inputs[:12], inputs[12:]
    ctx.set_materialize_grads(False)  # a gradient of the normaliser, which has none, would be as large as it
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(output[1], output[4])
    ctx.flags = flags


def _backward_of(
    ctx: Any, d_out: Tensor | None, _: Any, d_numerator: Tensor | None, d_denominator: Tensor | None, __: Any
) -> Any:
    saved = ctx.saved_tensors
    _, numerator, denominator, _, query, _, value, *_ = saved
    if d_out is None:
        d_out = query.new_zeros(*query.shape[:3], value.shape[-1])
    # What comes back through a sum of states has the strides that the sum left it with; backends read whole rows.
    d_numerator, d_denominator = (
        x.new_zeros(x.shape) if gradient is None else gradient.contiguous()
        for gradient, x in ((d_numerator, numerator), (d_denominator, denominator))
    )
    gradients = _backward(d_out, d_numerator, d_denominator, *saved, *ctx.flags)
    d_q, d_k, d_v, d_past_numerator, d_past_denominator, *d_rows = gradients
    d_rows = d_rows if ctx.flags[-2] else [None, None]
    return d_q, d_k, d_v, *d_rows, None, None, d_past_numerator, d_past_denominator, *[None] * 8


_forward.register_autograd(_backward_of, setup_context=_setup_context)
