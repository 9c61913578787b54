"""Our attention mechanisms as `attn_implementation` of Hugging Face's models.

A model calls its attention function with queries, keys, values and whatever a mask function of the same name made of its masks.
Ours makes a padding mask of two dimensions, or the segments of packed sequences; what linear attention cannot express is refused
in words. Nothing is stored on a model but plain Python attributes, so its state_dict stays what it was: what a mechanism needs
to be made again is in the configuration, `config.performers`, and in a file beside it, both of which every `save_pretrained`
writes, whichever way the model was opened.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from transformers.utils.output_capturing import _active_collector  # no public name says what a call is to return

from performers.attention import MECHANISMS, exact_attention
from performers.conversion import saving
from performers.conversion.saving import LayerTensors
from performers.conversion.specification import Specification
from performers.errors import UnsupportedError

NAMES = ("favor", "reformer", "sparse", "local", "split")

_MECHANISM = "_performers_mechanism"  # on an attention module: its mechanism, not registered as a submodule
LAYER = "_performers_layer"  # on an attention module: its number, where `convert` has counted
_TENSORS = "_performers_tensors"  # on an attention module: what of its mechanism is not drawn
CACHE = "_performers_cache"  # on a tensor of keys: the cache layer that handed it out


def _cells(function: Callable[..., Any]) -> dict[str, Any]:
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


_AND = and_masks(causal_mask_function).__code__
_PACKED = packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_REMAPPED = remap_positions_for_packed_sequence(causal_mask_function, torch.zeros(1, 1)).__code__
_WINDOWS = (sliding_window_overlay(1).__code__, sliding_window_bidirectional_overlay(1).__code__)


def _segments_of(mask_function: Callable[..., Any], length: int, model: str) -> Tensor | None:
    """The numbers of packed sequences, (B, L), in a mask function of Hugging Face's; None if nothing is packed.

    Raises:
        UnsupportedError: the function is none that linear attention can follow.
    """
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return None
    code = getattr(mask_function, "__code__", None)
    what = f"the mask {getattr(mask_function, '__qualname__', repr(mask_function)).partition('.')[0]}"
    if code is _PACKED:
        return _cells(mask_function)["packed_sequence_mask"]
    if code is _REMAPPED:
        return _segments_of(_cells(mask_function)["mask_function"], length, model)
    if code is _AND:
        parts = [_segments_of(part, length, model) for part in _cells(mask_function)["mask_functions"]]
        found = [segments for segments in parts if segments is not None]
        if len(found) <= 1:
            return found[0] if found else None
    if code in _WINDOWS:
        window = _cells(mask_function)["sliding_window"]
        if length <= window:
            return None
        what = f"a sliding window of {window} tokens, fewer than {length},"
    raise UnsupportedError(f"{model}: its attention has {what} which linear attention cannot express.")


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """What Hugging Face hands to the attention function as its mask.

    Returns:
        (B, kv_length) bool, True for a real token; or (B, kv_length) integers, the numbers of packed sequences; or None.

    Raises:
        UnsupportedError: a mask that linear attention cannot express.
    """
    model = type(config).__name__.removesuffix("Config") if config is not None else "this model"
    seen = int(q_offset) + q_length  # a state has no keys to count
    segments = _segments_of(mask_function, max(kv_length, seen), model)
    if segments is not None:
        return segments.long()
    has_empty_slots = mask_function is not bidirectional_mask_function and kv_length > seen
    if has_empty_slots or (attention_mask is not None and attention_mask.shape[-1] < kv_length):
        raise UnsupportedError(
            f"{model}: a cache of fixed length ({kv_length}) is asked for, which linear attention does not need."
        )
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def _number(module: nn.Module, specification: Specification) -> int:
    """The number of an attention module, the same in every process that opens the model.

    Hugging Face's attention modules do not know the model they belong to, and some not even their layer: the model is looked
    for once among the callers.
    """
    if LAYER not in module.__dict__:
        model: Any = module
        frame = sys._getframe()
        while (frame := frame.f_back) is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, PreTrainedModel):
                model = caller
        number_modules(specification.numbered(model, module), saving.read_tensors(model.config, specification))
        module.__dict__.setdefault(LAYER, 0)
    return module.__dict__[LAYER]


def number_modules(numbered: dict[int, nn.Module], tensors: LayerTensors) -> None:
    """Tell attention modules their numbers, and to make their mechanisms anew, with these tensors."""
    for number, module in numbered.items():
        module.__dict__[LAYER] = number
        module.__dict__[_TENSORS] = tensors.get(number, {})
        module.__dict__.pop(_MECHANISM, None)


def forget(module: nn.Module) -> None:
    """Take everything of ours from an attention module."""
    for name in (LAYER, _TENSORS, _MECHANISM):
        module.__dict__.pop(name, None)


def _mechanism(module: nn.Module, name: str, query: Tensor) -> Callable[..., Any]:
    """What an attention module computes; made on first use, from the configuration, the number of the layer and its tensors."""
    device, wanted = query.device, (name, query.shape[-1])
    found = module.__dict__.get(_MECHANISM)
    if found is None or found[0] != wanted:
        specification = Specification.of(module.config, name)
        number = _number(module, specification)
        if not specification.converts(number):
            found = (wanted, exact_attention, None)
        else:
            made = specification.mechanism(query.shape[-1], number, module.__dict__.get(_TENSORS))
            found = (wanted, made.to(device), device)
        module.__dict__[_MECHANISM] = found
    elif found[2] is not None and found[2] != device:
        found = (wanted, found[1].to(device), device)
        module.__dict__[_MECHANISM] = found
    return found[1]


def layer_tensors(model: PreTrainedModel, specification: Specification) -> LayerTensors:
    """What of a converted model's mechanisms cannot be drawn again, by the number of the layer."""
    numbered = specification.numbered(model)
    if any(LAYER not in module.__dict__ for module in numbered.values()):
        number_modules(numbered, saving.read_tensors(model.config, specification))
    tensors: LayerTensors = {}
    for number, module in numbered.items():
        _, mechanism, device = module.__dict__.get(_MECHANISM, (None, None, None))
        if device is None:  # not made yet, or exact
            own = module.__dict__.get(_TENSORS, {})
        else:
            head_dim = module.__dict__[_MECHANISM][0][1]
            own = specification.not_drawn(mechanism, head_dim, number)
        if own:
            tensors[number] = own
    return tensors


def mechanism_of(module: nn.Module) -> nn.Module | None:
    """The mechanism of a converted attention module that has been called; None of an exact one."""
    found = module.__dict__.get(_MECHANISM)
    return None if found is None or found[2] is None else found[1]


class Call(NamedTuple):
    """One call of an attention module, as a listener gets it.

    Attributes:
        module: the attention module.
        query, key, value: as the mechanism got them: (B, H, L, D), or (1, H, B * L, D) where sequences are packed.
        arguments: the mechanism's other arguments.
        out: what it gave, (B, H, L, Dv).
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    arguments: dict[str, Any]
    out: Tensor

    @property
    def number(self) -> int:
        """The number of the module."""
        return self.module.__dict__[LAYER]


_listeners: list[Callable[[Call], None]] = []


@contextmanager
def listening(listener: Callable[[Call], None]) -> Iterator[None]:
    """While this is open, the listener gets every call of an attention module."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _check(
    module: nn.Module, name: str, mask: Tensor | None, dropout: float, kwargs: dict[str, Any], num_keys: int
) -> None:
    model = type(module).__name__
    refused = {
        "an additive position bias": kwargs.get("position_bias") is not None,
        "a soft-capped logit": kwargs.get("softcap") is not None,
        "a sliding window": kwargs.get("sliding_window") is not None and num_keys > kwargs["sliding_window"],
        "attention sinks": kwargs.get("s_aux") is not None,
        "a head mask": kwargs.get("head_mask") is not None,
        "a paged cache": kwargs.get("cache") is not None,
        "packing by cu_seq_lens": kwargs.get("cu_seq_lens_q") is not None
        and (mask is None or mask.dtype == torch.bool),
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedError(f"{model}: {what} cannot be expressed by attn_implementation={name!r}.")
    # Some models keep the argument from their attention, and collect what it returns.
    collected = _active_collector.get() or ()
    asked = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    if asked or "attentions" in collected or "cross_attentions" in collected:
        raise UnsupportedError(
            f"{model}: output_attentions=True, but attn_implementation={name!r} never forms attention weights."
        )
    if mask is not None and mask.ndim != 2:
        raise UnsupportedError(
            f"{model}: a ready-made attention mask of {mask.ndim} dimensions cannot be used with "
            f"attn_implementation={name!r}: give a padding mask (batch, length)."
        )
    if module.training and dropout:
        raise UnsupportedError(
            f"{model}: attention dropout is {dropout}, but there are no attention weights to drop. Set the attention dropout "
            f"of the configuration to 0.0 (performers.convert does)."
        )


def _is_cross_attention(module: nn.Module) -> bool:
    """Whether queries and keys are of two sequences."""
    is_causal = getattr(module, "is_causal", True)
    named = getattr(module, "is_cross_attention", "CrossAttention" in type(module).__name__)
    return named or (getattr(module, "is_decoder", False) and not is_causal)


def _attend(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as Hugging Face calls it: (B, H, L, D) in, (B, L, H, D) out, and no weights."""
    if _listeners:
        dropout = 0.0  # not yet converted
    _check(module, name, attention_mask, dropout, kwargs, key.shape[2])
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    arguments: dict[str, Any] = {"is_causal": causal, "scale": scaling, "enable_gqa": True}
    shape = query.shape
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        query, key, value = (_in_one_row(x) for x in (query, key, value))
        arguments["cu_seqlens"] = _offsets(attention_mask, type(module).__name__)
    elif attention_mask is not None:
        arguments["key_padding_mask"] = attention_mask[:, -key.shape[2] :]
    cache = getattr(key, CACHE, None)
    mechanism = _mechanism(module, name, query)
    if attention_mask is not None and getattr(mechanism, "needs_one_sequence", False) and _is_cross_attention(module):
        raise UnsupportedError(
            f"{type(module).__name__}: cross-attention to padded keys cannot be expressed by attn_implementation={name!r}."
        )
    if cache is not None:
        out, cache.state = mechanism(query, key, value, state=cache.state, return_state=True, **arguments)
    else:
        out = mechanism(query, key, value, **arguments)
    for listener in _listeners:
        listener(Call(module, query, key, value, arguments, out))
    out = out.transpose(1, 2)
    return out.reshape(shape[0], shape[2], *out.shape[2:]), None


def _in_one_row(x: Tensor) -> Tensor:
    """(B, H, L, D) as (1, H, B * L, D)."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _offsets(segments: Tensor, model: str) -> Tensor:
    """cu_seqlens of the rows of `segments`, one after the other.

    Raises:
        UnsupportedError: a packed sequence is not in one piece.
    """
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    for row, new in zip(segments, starts, strict=True):
        if len(row[new].unique()) != int(new.sum()):
            raise UnsupportedError(f"{model}: the tokens of a packed sequence are not next to each other.")
    begin = starts.flatten().nonzero()[:, 0]
    return torch.cat([begin, begin.new_tensor([segments.numel()])])


def _function(name: str) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ):
        return _attend(name, module, query, key, value, attention_mask, **kwargs)

    attention.__name__ = f"{name}_attention_forward"
    return attention


_save_pretrained = PreTrainedModel.save_pretrained


@functools.wraps(_save_pretrained)
def _save_all(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *rest: Any,
    **kwargs: Any,
) -> None:
    specification = Specification.stored_in(model.config)
    if specification is None:
        return _save_pretrained(model, save_directory, is_main_process, *rest, **kwargs)
    if kwargs.get("push_to_hub"):
        raise UnsupportedError(
            "save_pretrained(push_to_hub=True) would leave out what belongs to the converted attention: use "
            "model.push_to_hub(name)."
        )
    folder = Path(save_directory)
    packed = saving.pack(layer_tensors(model, specification))
    specification = replace(specification, tensors=None if packed is None else packed[1])
    model.config.performers = specification.to_json()
    if packed is not None and is_main_process:
        saving.write_tensors(folder, packed[0])
    _save_pretrained(model, save_directory, is_main_process, *rest, **kwargs)
    if is_main_process and (folder / "config.json").is_file():  # of adapters alone there is none
        saving.write_readme(folder, type(model).__name__, specification)


# A model opened by a stock class has no other place that could know of the file beside its weights.
PreTrainedModel.save_pretrained = _save_all  # pyright: ignore[reportAttributeAccessIssue]

for _name in NAMES:
    assert _name in MECHANISMS
    AttentionInterface.register(_name, _function(_name))
    AttentionMaskInterface.register(_name, padding_mask)
