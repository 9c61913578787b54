"""The mechanics of a swap: which modules of a model attend, how they are told to attend otherwise, and how a folder is opened."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from performers.conversion import interface, saving
from performers.conversion.cache import state_cache
from performers.conversion.saving import LayerTensors
from performers.conversion.specification import Specification
from performers.errors import CheckpointError, InputError, PerformersError, UnsupportedError
from performers.models.bundled import located

_log = logging.getLogger(__name__)

# Under which names Hugging Face's modules and configurations keep the probability to drop an attention weight.
_DROPOUTS = (
    "attention_dropout",
    "attn_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "dropout_prob",
)
# The parts of a configuration that are of models of their own.
_PARTS = ("text_config", "vision_config", "audio_config")
_CONFIG_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that call an attention function, in the order of `model.modules()`.

    Raises:
        UnsupportedError: some of the model's layers do not call one, or ours cannot do what it asks for.
    """
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        raise UnsupportedError(
            f"{name}: its attention is written into its layers, where Hugging Face lets nothing else in "
            f"(no AttentionInterface), so it cannot be replaced."
        )
    if sum(getattr(model.config, part, None) is not None for part in _PARTS) > 1:
        raise UnsupportedError(f"{name} is made of several models: convert one of them, its text model for instance.")
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise UnsupportedError(
            f"{name} reads {model.main_input_name}: only models that read tokens or pixels can be converted."
        )
    called: list[nn.Module] = []
    with _listening(model, called):
        run(model)
    expected = _number_of_attentions(model)
    if len(called) < max(1, expected):
        raise UnsupportedError(
            f"{name}: {len(called)} of its {expected} attention layers go through Hugging Face's "
            f"AttentionInterface; the others would escape the conversion."
        )
    return [module for module in model.modules() if any(module is other for other in called)]


@contextmanager
def _listening(model: PreTrainedModel, called: list[nn.Module]) -> Iterator[None]:
    before = str(model.config._attn_implementation)
    try:
        model.set_attn_implementation("favor")
        with interface.listening(lambda call: called.append(call.module)):
            yield
    finally:
        model.set_attn_implementation(before)


def _number_of_attentions(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return getattr(config, "encoder_layers", 0) + 2 * getattr(config, "decoder_layers", 0)
    return getattr(config, "num_hidden_layers", 1)


@torch.no_grad()
def run(model: PreTrainedModel) -> None:
    """One forward pass over anything, in evaluation mode, in which every layer takes part."""
    was_training = model.training
    try:
        model.eval()(**anything(model))
    finally:
        model.train(was_training)


def anything(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs that the model can read: a few tokens, or a black image."""
    config = model.config
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else [vision.image_size] * 2
        return {"pixel_values": torch.zeros(1, getattr(vision, "num_channels", 3), *size, device=model.device)}
    ids = torch.full((1, 8), min(5, config.get_text_config().vocab_size - 1), device=model.device)
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def layer_numbers(layers: list[int] | None, count: int) -> list[int] | None:
    """The numbers of `count` attention layers, negative ones counted from the end, in order and once each; None for all.

    Raises:
        InputError: there is no such layer.
    """
    if layers is None:
        return None
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise InputError(f"layers: {layer!r} is not the number of one of the {count} attention layers.")
    return sorted({layer % count for layer in layers})


def apply(
    model: PreTrainedModel,
    modules: list[nn.Module],
    specification: Specification,
    tensors: LayerTensors | None = None,
) -> None:
    """Give a model the attention of a specification, in place.

    Arguments:
        model: the model.
        modules: its `attention_modules`.
        specification: the attention.
        tensors: what of it cannot be drawn.
    """
    dropped = False
    own = {layer: entries for layer, entries in (tensors or {}).items() if specification.converts(layer)}
    packed = saving.pack(own)
    specification = replace(specification, tensors=None if packed is None else packed[1])
    interface.number_modules(dict(enumerate(modules)), own)
    for module in modules:
        dropped |= _without_dropout(module)
    for config in {id(module.config): module.config for module in [model, *modules]}.values():
        config.performers = specification.to_json()
        for name in _CONFIG_DROPOUTS:
            if getattr(config, name, 0.0):
                setattr(config, name, 0.0)
                dropped = True
    if dropped:
        _log.warning(
            "%s: attention dropout is set to 0: linear attention has no weights to drop.", type(model).__name__
        )
    model.set_attn_implementation(specification.attention)
    if model.can_generate() and not getattr(model.config, "is_encoder_decoder", False) and specification.layers is None:
        model.__dict__["_prepare_cache_for_generation"] = MethodType(_with_state_cache, model)


def _without_dropout(module: nn.Module) -> bool:
    found = False
    for name in _DROPOUTS:
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout) and value.p:
            value.p, found = 0.0, True
        elif isinstance(value, float) and value:
            setattr(module, name, 0.0)
            found = True
    return found


def _with_state_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any) -> None:
    """In place of Hugging Face's method of this name: a cache of constant size, unless another one is asked for."""
    asked = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
    if not asked and generation_config.use_cache is not False:
        model_kwargs["past_key_values"] = state_cache(model.config.get_text_config(decoder=True).num_hidden_layers)
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *arguments)


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Put the model's own attention back."""
    for module in model.modules():
        interface.forget(module)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "performers"):
            del config.performers
    model.__dict__.pop("_prepare_cache_for_generation", None)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return model


def open_model(folder: str | Path, architecture: str | None = None, **settings: Any) -> PreTrainedModel:
    """The model in a folder, as the class it was saved from, in evaluation mode.

    Arguments:
        folder: as `save_pretrained` writes it, or the name of a bundled model.
        architecture: the name of the class in transformers or performers, in place of the one in config.json.
        settings: keys of the configuration to replace.

    Raises:
        CheckpointError: there is no model in it, or it cannot be opened.
        InputError: there is no such class, or no bundled model of that name.
    """
    path = Path(located(folder))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: there is no model in this folder (no config.json).")
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
        saved_as = list(content.get("architectures") or [])
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / 'config.json'}: not the JSON of a model ({error}).") from error
    names = [architecture] if architecture else saved_as
    classes = [cls for name in names if (cls := _class_of(name)) is not None]
    if architecture and not classes:
        raise InputError(
            f"architecture={architecture!r}: neither transformers nor performers has a model of this name."
        )
    if names and not classes:
        raise CheckpointError(
            f"{path} was saved as {', '.join(saved_as)}, which neither transformers nor performers has: say which of their "
            f"classes opens it, as in architecture='BertForMaskedLM' (--architecture)."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **settings)
        return (classes or [transformers.AutoModel])[0].from_pretrained(path, config=config).eval()
    except PerformersError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} cannot be opened as a model: {reason}") from error


def _class_of(name: str) -> Any:
    """The model class of this name; of ours, or of transformers."""
    import performers.models as models

    cls = getattr(models, name, None) or getattr(transformers, name, None)
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None
