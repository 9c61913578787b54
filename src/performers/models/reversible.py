"""Reversible layers (RevNet, 1707.04585; Reformer, 2001.04451, section 4.2): memory that does not grow with the number of layers.

Two streams run through the model, and what a layer was given follows from what it put out:

    y1 = x1 + attention(norm(x2))            x2 = y2 - feed_forward(norm(y1))
    y2 = x2 + feed_forward(norm(y1))         x1 = y1 - attention(norm(x2))

So a layer keeps nothing. The streams after the last one are kept; in the backward pass each layer computes its inputs from its
outputs, runs both of its blocks again with a graph, and leaves the inputs on a tape for the layer before. Dropout is drawn by
keys, or else from torch's generators as they were, so a replay drops what was dropped.

Sums are undone but for rounding. The streams are therefore float32 at least, whatever the model computes in.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from performers.models.chunking import Replay, precision, precision_of

if TYPE_CHECKING:
    from performers.attention import SequenceShard
    from performers.models.modeling_performer import DropoutKeys, ReversibleLayer


# What the backward pass hands from a layer to the one before it: the streams behind as many layers, to be changed in place.
Tape = dict[int, tuple[Tensor, Tensor]]


class Streams(NamedTuple):
    """The two residual streams behind some layers.

    Attributes:
        first, second: (B, L, d).
        depth: the number of layers.
        tape: of a forward pass whose layers keep nothing; None if autograd keeps what it needs.
    """

    first: Tensor
    second: Tensor
    depth: int
    tape: Tape | None

    @classmethod
    def of(cls, hidden: Tensor, tape: Tape | None) -> Streams:
        """Both begin as the embeddings."""
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return cls(hidden, hidden, 0, tape)

    def after(self, first: Tensor, second: Tensor) -> Streams:
        """The streams behind one layer more."""
        return Streams(first, second, self.depth + 1, self.tape)

    def merged(self) -> Tensor:
        """Their mean, (B, L, d); with a tape, both are kept for the backward pass."""
        if self.tape is None:
            return (self.first + self.second) / 2
        return _Merged.apply(self.tape, self.depth, self.first, self.second)  # pyright: ignore[reportReturnType]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, depth: int, first: Tensor, second: Tensor) -> Tensor:
        ctx.tape, ctx.depth = tape, depth
        ctx.save_for_backward(first, second)
        return (first + second) / 2

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[None, None, Tensor, Tensor]:
        first, second = ctx.saved_tensors
        ctx.tape[ctx.depth] = first.clone(), second.clone()
        half = gradients[0] / 2
        return None, None, half, half


@dataclasses.dataclass
class Call:
    """A layer, and what it takes besides the streams."""

    layer: ReversibleLayer
    rotary: tuple[Tensor, Tensor]
    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    dropout_keys: DropoutKeys | None
    sequence: SequenceShard | None

    def attended(self, second: Tensor) -> Tensor:
        """What attention adds to the first stream."""
        return self.layer.attended(
            second, self.rotary, self.key_padding_mask, self.cu_seqlens, self.dropout_keys, self.sequence
        )

    def fed_forward(self, first: Tensor, rows: slice) -> Tensor:
        """What the feed-forward block adds to these tokens of the second stream, given those of the first."""
        keys = self.dropout_keys
        return self.layer.fed_forward(first, None if keys is None else keys._replace(start=keys.start + rows.start))

    def pieces(self, length: int) -> list[slice]:
        """The tokens that go through the feed-forward block at a time."""
        size = self.layer.feed_forward.chunk_size or max(1, length)
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def run_reversibly(call: Call, streams: Streams) -> Streams:
    """The streams after a layer, of which nothing is kept."""
    assert streams.tape is not None
    parameters = [parameter for parameter in call.layer.parameters() if parameter.requires_grad]
    first, second = _LayerReversibly.apply(call, streams, parameters, streams.first, streams.second, *parameters)  # pyright: ignore[reportGeneralTypeIssues]
    return streams.after(first, second)


class _LayerReversibly(torch.autograd.Function):
    """A layer without a graph, and the same with one, from its outputs, in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, streams: Streams, parameters: list[torch.nn.Parameter], x1: Tensor, x2: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.tape, ctx.depth, ctx.parameters = call, streams.tape, streams.depth, parameters
        ctx.precision = precision_of(x1)
        with precision(ctx.precision):
            ctx.before_attention = _Generators.now(x1)
            y1 = x1 + call.attended(x2)
            ctx.before_feed_forward = _Generators.now(x1)
            y2 = torch.empty_like(x2, memory_format=torch.contiguous_format)
            for rows in call.pieces(x1.shape[1]):
                torch.add(x2[:, rows], call.fed_forward(y1[:, rows], rows), out=y2[:, rows])
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        d_y1, d_y2 = gradients
        first, second = ctx.tape.pop(ctx.depth + 1)
        replay = Replay(ctx.parameters)
        with torch.enable_grad(), precision(ctx.precision), _forked(first):
            ctx.before_feed_forward.restore(first)
            d_first = torch.empty_like(d_y1, memory_format=torch.contiguous_format)
            for rows in call.pieces(first.shape[1]):
                x = first[:, rows].detach().requires_grad_()
                update = call.fed_forward(x, rows)
                d_x, _ = replay([update], [d_y2[:, rows].to(update.dtype)], x, None)
                torch.add(d_y1[:, rows], d_x, out=d_first[:, rows])
                second[:, rows] -= update.detach()
            ctx.before_attention.restore(first)
            x = second.detach().requires_grad_()
            update = call.attended(x)
            first -= update.detach()
            d_x, _ = replay([update], [d_first.to(update.dtype)], x, None)
        if ctx.depth:
            ctx.tape[ctx.depth] = first, second
        return None, None, None, d_first, d_y2 + d_x, *replay.parameter_gradients()


class _Generators(NamedTuple):
    """The states of torch's global generators: ours draw by keys, but a module put into the model may not."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, x: Tensor) -> _Generators:
        return cls(torch.get_rng_state(), *get_device_states(x))

    def restore(self, x: Tensor) -> None:
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=x.device.type)


@contextlib.contextmanager
def _forked(x: Tensor) -> Iterator[None]:
    """Leaves torch's global generators as they are at the beginning."""
    before = _Generators.now(x)
    try:
        yield
    finally:
        before.restore(x)
