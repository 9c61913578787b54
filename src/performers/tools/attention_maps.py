"""The attention of a model over one protein: queries and keys of every layer are kept, and maps come out a block at a time.

A `LanguageModel` and a row go in, an `AttentionMaps` comes out, whose memory is linear in the length. Its maps are over residues
alone; start and end tokens are left out. `corrected` is what contacts are read from: a map plus its transpose, less the average
product of its sums (Dunn, Wahl and Gloor, 2008), which takes out what a residue gives to or gets from everything. Those sums come
first, and then any block can be had. It knows nothing of contacts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from performers.attention.weights import BLOCK, AttentionWeights, attention_weights
from performers.errors import UnsupportedError
from performers.tools.language_model import LanguageModel, Row, Unread


class AttentionMaps:
    """The maps of all layers and heads over L residues.

    Arguments:
        layers: for each layer the weights of its heads.
        residues: (L,) where among the tokens the residues are.

    Attributes:
        length: L.
        device: where its blocks are.
        heads: of each layer.
        has_linear_sums: whether what comes before the first block takes time linear in the length.
    """

    def __init__(self, layers: list[list[AttentionWeights]], residues: Tensor) -> None:
        self._layers = [_Layer(weights, residues) for weights in layers]
        self._residues = residues
        self.length, self.device = len(residues), residues.device
        self.heads = [layer.heads for layer in self._layers]
        self.has_linear_sums = all(part.has_linear_sums for weights in layers for part in weights)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of rows from `start` to `stop` and of the columns from there on: the upper triangle, diagonal blocks whole."""
        for first in range(start, stop, BLOCK):
            for second in range(first, self.length, BLOCK):
                yield slice(first, min(first + BLOCK, stop)), slice(second, min(second + BLOCK, self.length))

    def raw(self, layer: int, rows: slice, columns: slice) -> Tensor:
        """(H, r, c): the attention of the residues `rows` to the residues `columns`."""
        return self._layers[layer].block(self._residues[rows], self._residues[columns])

    def sums(self, layer: int) -> tuple[Tensor, Tensor]:
        """(H, L) twice, in float64: what residues give to all residues, and what they get from them."""
        return self._layers[layer].sums()

    def corrected(self, layer: int, rows: slice, columns: slice) -> Tensor:
        """(H, r, c): S_ij - S_i S_j / S with S = A + A^T and S_i its sums, times L, so that even attention has weight 1."""
        given, got = self.sums(layer)
        sums = given + got
        both = self.raw(layer, rows, columns) + self.raw(layer, columns, rows).mT
        expected = sums[:, rows, None] * (sums[:, None, columns] / sums.sum(1)[:, None, None])
        return (both - expected) * self.length


class _Layer:
    def __init__(self, parts: list[AttentionWeights], residues: Tensor) -> None:
        self._parts, self._residues = parts, residues
        self.heads = sum(part.heads for part in parts)
        self._sums: tuple[Tensor, Tensor] | None = None

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.cat([part.block(rows, columns) for part in self._parts])

    def sums(self) -> tuple[Tensor, Tensor]:
        if self._sums is None:
            given, got = zip(*(part.sums(self._residues) for part in self._parts), strict=True)
            self._sums = (torch.cat(given), torch.cat(got))
        return self._sums


@torch.inference_mode()
def attention_maps(model: LanguageModel, row: Row) -> AttentionMaps | Unread:
    """The maps of a row, read alone; why it cannot be read, if so.

    Raises:
        UnsupportedError: the model's attention weights cannot be had.
    """
    if model.context is not None:
        raise UnsupportedError(
            f"{model.folder}: attention to a context is summed up, so it has no map; read without one."
        )
    calls: dict[int, _Call] = {}
    with _listening(model, calls):
        ((_, reading),) = model.read([row])
    if isinstance(reading, Unread):
        return reading
    if len(calls) < model.num_layers:
        raise UnsupportedError(
            f"{model.folder}: {len(calls)} of its {model.num_layers} attention layers show their queries and keys: its attention "
            "maps cannot be had (the Jacobian needs none)."
        )
    if not all(call.is_finite for call in calls.values()):
        return Unread("the model's numbers for it are not finite")
    layers = [calls[number].weights() for number in sorted(calls)]
    return AttentionMaps(layers, torch.from_numpy(row.residues).to(layers[0][0].device))


class _Call:
    """What one attention module was called with; a long sequence comes in several pieces."""

    def __init__(self, mechanism: nn.Module | None) -> None:
        self._mechanism = mechanism
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._arguments: dict[str, Any] = {}

    def add(self, query: Tensor, key: Tensor, arguments: dict[str, Any]) -> None:
        """Keep queries (1, H, Lq, D) and keys (1, Hkv, Lk, D)."""
        if query.device.type == "mps":  # which has no float64
            query, key = query.cpu(), key.cpu()
        if query.shape[2]:
            self._queries.append(query[0])
        if key.shape[2]:
            self._keys.append(key[0].repeat_interleave(query.shape[1] // key.shape[1], 0))
        self._arguments |= {name: value for name, value in arguments.items() if value is not None}

    @property
    def is_finite(self) -> bool:
        return all(bool(piece.isfinite().all()) for piece in (*self._queries, *self._keys))

    def weights(self) -> list[AttentionWeights]:
        return attention_weights(
            self._mechanism,
            torch.cat(self._queries, 1),
            torch.cat(self._keys, 1),
            is_causal=bool(self._arguments.get("is_causal")),
            scale=self._arguments.get("scale"),
            packed="cu_seqlens" in self._arguments,
        )


@contextmanager
def _listening(model: LanguageModel, calls: dict[int, _Call]) -> Iterator[None]:
    """While this is open, every attention layer's calls are kept, by its number."""
    listen = _listening_to_performer if model.is_performer else _listening_to_others
    with listen(model.network, calls):
        yield


@contextmanager
def _listening_to_performer(network: Any, calls: dict[int, _Call]) -> Iterator[None]:
    def keep(number: int) -> Any:
        def hook(mechanism: nn.Module, positional: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
            calls.setdefault(number, _Call(mechanism)).add(positional[0], positional[1], arguments)

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(network.performer.layers):
            handle = layer.attention.mechanism.register_forward_pre_hook(keep(number), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _listening_to_others(network: Any, calls: dict[int, _Call]) -> Iterator[None]:
    """Converted layers tell by themselves; exact ones go through the attention function that all models share."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from performers.conversion import interface

    numbers: dict[nn.Module, int] = {}

    def number_of(module: nn.Module) -> int:
        return numbers.setdefault(module, len(numbers))

    def keep(call: interface.Call) -> None:
        kept = calls.setdefault(number_of(call.module), _Call(interface.mechanism_of(call.module)))
        kept.add(call.query, call.key, call.arguments)

    exact: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def listened(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
        for name in ("position_bias", "softcap", "sliding_window", "s_aux"):
            if arguments.get(name) is not None:
                raise UnsupportedError(
                    f"{type(module).__name__}: its attention has a {name}, which is not in queries and keys: its maps cannot "
                    "be had."
                )
        causal = arguments.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        calls.setdefault(number_of(module), _Call(None)).add(
            query, key, {"is_causal": causal, "scale": arguments.get("scaling")}
        )
        return exact(module, query, key, value, mask, **arguments)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = listened
    try:
        with interface.listening(keep):
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
