"""A layer over a long sequence, a chunk of tokens at a time: only its input and the attention states are kept.

All that a layer does concerns one token, except for attention; and attention by a mechanism with a state of fixed size (FAVOR's
is M x (D + 1) numbers a head) sees the other tokens through the state alone. So a causal layer carries its state from chunk to
chunk, and a bidirectional one first absorbs all chunks and then reads the state for each. The backward pass runs every chunk
again from the state before it, in reverse where states were carried, as in SLiM Performer (2012.11346, section 3).

A state is a dataclass of tensors, or of such states.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from performers.models.modeling_performer import DropoutKeys, PerformerLayer

Gradients = Sequence[Tensor | None]


def state_tensors(state: Any) -> tuple[Tensor, ...]:
    """The tensors of a state that gradients reach; none before the first token."""
    if isinstance(state, Tensor):
        return (state,) if state.is_floating_point() else ()
    parts = () if state is None else (getattr(state, field.name) for field in dataclasses.fields(state))
    return tuple(tensor for part in parts for tensor in state_tensors(part))


def detached(state: Any) -> Any:
    """The same numbers as the beginning of a new graph, in which their gradients can be asked for."""
    if isinstance(state, Tensor):
        return state.detach().requires_grad_(state.is_floating_point())
    if state is None:
        return None
    return type(state)(*(detached(getattr(state, field.name)) for field in dataclasses.fields(state)))


def with_gradients(outputs: Sequence[Tensor], gradients: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that have a gradient and lead back to something, and these gradients."""
    pairs = [(out, d) for out, d in zip(outputs, gradients, strict=True) if d is not None and out.requires_grad]
    return [out for out, _ in pairs], [d for _, d in pairs]


def run_in_chunks(
    layer: PerformerLayer,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    key_padding_mask: Tensor | None,
    dropout_keys: DropoutKeys | None,
) -> Tensor:
    """What the layer makes of `hidden`, (B, L, d), `layer.chunk_size` tokens at a time; of the type of `hidden`.

    Under autocast a chunk is computed from its float32 form, so a float32 stream gives what the whole layer gives.
    """
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    chunks = _Chunks(layer, rotary, key_padding_mask, dropout_keys, parameters)
    return _LayerInChunks.apply(chunks, hidden, *parameters)  # pyright: ignore[reportReturnType]


@dataclasses.dataclass
class _Chunks:
    """A layer and all that it takes besides the hidden states, whole; cut to a chunk when that is run."""

    layer: PerformerLayer
    rotary: tuple[Tensor, Tensor]
    key_padding_mask: Tensor | None
    dropout_keys: DropoutKeys | None
    parameters: list[torch.nn.Parameter]

    def slices(self, length: int) -> list[slice]:
        size = self.layer.chunk_size
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def advance(self, rows: slice, hidden: Tensor, state: Any) -> tuple[Tensor, Any]:
        """A chunk of a causal layer: its outputs and the state after it."""
        return self.layer.advance(
            hidden, self._rotary(rows), self._mask(rows), self._keys(rows), state=state, return_state=True
        )

    def absorb(self, rows: slice, hidden: Tensor, state: Any) -> Any:
        return self.layer.absorb(hidden, self._rotary(rows), self._mask(rows), state)

    def read(self, rows: slice, hidden: Tensor, state: Any) -> Tensor:
        return self.layer.read(hidden, self._rotary(rows), state, self._keys(rows))

    def _rotary(self, rows: slice) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary
        return cos[:, :, rows], sin[:, :, rows]

    def _mask(self, rows: slice) -> Tensor | None:
        return None if self.key_padding_mask is None else self.key_padding_mask[:, rows]

    def _keys(self, rows: slice) -> DropoutKeys | None:
        return None if self.dropout_keys is None else self.dropout_keys._replace(start=rows.start)


class _LayerInChunks(torch.autograd.Function):
    """The chunks forward without a graph, and each of them again, with one, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.chunks = chunks
        ctx.precision = precision_of(hidden)
        ctx.save_for_backward(hidden)
        ctx.states = [None]  # before each chunk, and after the last
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        slices = chunks.slices(hidden.shape[1])
        with precision(ctx.precision) as cast:
            if chunks.layer.attention.is_causal:
                for rows in slices:
                    out[:, rows], state = chunks.advance(rows, cast(hidden[:, rows]), ctx.states[-1])
                    ctx.states.append(state)
            else:
                for rows in slices:
                    ctx.states.append(chunks.absorb(rows, cast(hidden[:, rows]), ctx.states[-1]))
                for rows in slices:
                    out[:, rows] = chunks.read(rows, cast(hidden[:, rows]), ctx.states[-1])
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (d_out,), (hidden,), chunks = gradients, ctx.saved_tensors, ctx.chunks
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        slices = chunks.slices(hidden.shape[1])
        d_state: Gradients = [None] * len(state_tensors(ctx.states[-1]))
        replay = Replay(chunks.parameters)
        with torch.enable_grad(), precision(ctx.precision) as cast:
            if not chunks.layer.attention.is_causal:
                after = detached(ctx.states[-1])
                for rows in slices:
                    x = cast(hidden[:, rows]).detach().requires_grad_()
                    out = chunks.read(rows, x, after)
                    d_x, d_read = replay([out], [d_out[:, rows].to(out.dtype)], x, after)
                    d_hidden[:, rows] = d_x
                    d_state = [_sum(total, d) for total, d in zip(d_state, d_read, strict=True)]
            for rows, state in zip(reversed(slices), reversed(ctx.states[:-1]), strict=True):
                x, past = cast(hidden[:, rows]).detach().requires_grad_(), detached(state)
                if chunks.layer.attention.is_causal:
                    out, after = chunks.advance(rows, x, past)
                    d_x, d_state = replay(
                        [out, *state_tensors(after)], [d_out[:, rows].to(out.dtype), *d_state], x, past
                    )
                    d_hidden[:, rows] = d_x
                else:
                    after = chunks.absorb(rows, x, past)
                    d_x, d_state = replay(state_tensors(after), d_state, x, past)
                    d_hidden[:, rows] = d_hidden[:, rows].to(d_x.dtype).add_(d_x)
        return None, d_hidden, *replay.parameter_gradients()


class Replay:
    """Gradients of one chunk after the other; those of the parameters are added up, in float32 at least."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def __call__(
        self, outputs: Sequence[Tensor], gradients: Gradients, x: Tensor, state: Any
    ) -> tuple[Tensor, Gradients]:
        """The gradients of a chunk's hidden states and of the state before it, given those of what it put out."""
        past = state_tensors(state)
        outputs, given = with_gradients(outputs, gradients)
        d_x, *found = torch.autograd.grad(outputs, (x, *past, *self._parameters), given, allow_unused=True)
        for index, d in enumerate(found[len(past) :]):
            wide = None if d is None else d.to(torch.promote_types(d.dtype, torch.float32))
            self._sums[index] = _sum(self._sums[index], wide)
        return d_x, found[: len(past)]

    def parameter_gradients(self) -> list[Tensor | None]:
        """Their sums over the chunks, each in its parameter's type."""
        return [
            None if d is None else d.to(parameter.dtype)
            for d, parameter in zip(self._sums, self._parameters, strict=True)
        ]


def _sum(total: Tensor | None, addend: Tensor | None) -> Tensor | None:
    """`total` + `addend`, where None is zero."""
    if total is None or addend is None:
        return addend if total is None else total
    return total + addend


Precision = tuple[str, torch.dtype, bool]


def precision_of(hidden: Tensor) -> Precision:
    """How autocast stands on the device of `hidden`."""
    kind = hidden.device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


@contextlib.contextmanager
def precision(autocast: Precision) -> Iterator[Callable[[Tensor], Tensor]]:
    """Autocast as it was in the forward pass, and what brings a chunk of the kept hidden states to the layer's precision."""
    kind, dtype, enabled = autocast
    with torch.autocast(kind, dtype=dtype, enabled=enabled):
        try:
            yield (lambda x: x.float()) if enabled else (lambda x: x)
        finally:
            # Weights that autocast rounded without a graph must not be taken for those of one.
            torch.clear_autocast_cache()
