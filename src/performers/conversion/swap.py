"""Swapping the attention of a pretrained model, in place, and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from performers.conversion import interface
from performers.conversion.cache import state_cache
from performers.conversion.specification import Specification
from performers.errors import CheckpointError, InputError, UnsupportedError

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
_CONFIG_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def convert(
    model: PreTrainedModel | str | Path,
    attention: str = "favor",
    *,
    layers: list[int] | None = None,
    seed: int = 0,
    **arguments: Any,
) -> PreTrainedModel:
    """Replace the attention of a Hugging Face model, in place.

    Arguments:
        model: a model, or the folder of one.
        attention: "favor", "reformer" or "sparse"; "exact" puts the model's own back.
        layers: the numbers of the attention modules to replace, in the order of `model.modules()`, negative ones from the end;
            None for all.
        seed: of the random projections.
        arguments: of the mechanism, as in kernel="softmax-sharp", num_features=256.

    Returns:
        The model. Its configuration says what was done (`config.performers`), so `save_pretrained` keeps it, and
        `performers.load(folder)`, or any stock class with `attn_implementation` of the same name, opens it to the same numbers.

    Raises:
        InputError: an argument that is not valid.
        UnsupportedError: the model's attention cannot be replaced; the message names the model and the feature.
    """
    if not isinstance(model, PreTrainedModel):
        model = _open(Path(model))
    if attention == "exact":
        return _restore(model)
    if attention not in interface.NAMES:
        known = ", ".join(map(repr, (*interface.NAMES, "exact")))
        raise InputError(f"attention={attention!r} is not known: expected one of {known}.")
    if not model._can_set_attn_implementation():
        raise UnsupportedError(
            f"{type(model).__name__}: its attention is written into its layers, where Hugging Face lets nothing else in "
            f"(no AttentionInterface), so it cannot be replaced."
        )
    modules = attention_modules(model)
    numbers, classes = _numbers(layers, len(modules)), sorted({type(module).__name__ for module in modules})
    specification = Specification(attention, arguments, numbers, classes, seed)
    specification.mechanism(16, 0)  # refuses arguments that the mechanism does not know
    _apply(model, modules, specification)
    _run(model)
    return model


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that call an attention function, in the order of `model.modules()`.

    Raises:
        UnsupportedError: some of the model's layers do not call one.
    """
    called: list[nn.Module] = []
    with _listening(model, called):
        _run(model)
    expected = _number_of_attentions(model)
    if len(called) < expected:
        raise UnsupportedError(
            f"{type(model).__name__}: {len(called)} of its {expected} attention layers go through Hugging Face's "
            f"AttentionInterface; the others would escape the conversion."
        )
    return [module for module in model.modules() if any(module is other for other in called)]


@contextmanager
def _listening(model: PreTrainedModel, called: list[nn.Module]) -> Iterator[None]:
    before = str(model.config._attn_implementation)
    try:
        model.set_attn_implementation("favor")
        with interface.listening(called):
            yield
    finally:
        model.set_attn_implementation(before)


def _number_of_attentions(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return getattr(config, "encoder_layers", 0) + 2 * getattr(config, "decoder_layers", 0)
    return getattr(config, "num_hidden_layers", 1)


@torch.no_grad()
def _run(model: PreTrainedModel) -> None:
    """One forward pass over anything, in training mode, where dropout shows."""
    inputs = _anything(model)
    was_training = model.training
    with torch.random.fork_rng(devices=[]):
        try:
            model.train()(**inputs)
        finally:
            model.train(was_training)


def _anything(model: PreTrainedModel) -> dict[str, Tensor]:
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


def _numbers(layers: list[int] | None, count: int) -> list[int] | None:
    if layers is None:
        return None
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise InputError(f"layers: {layer!r} is not the number of one of the {count} attention layers.")
    return sorted({layer % count for layer in layers})


def _apply(model: PreTrainedModel, modules: list[nn.Module], specification: Specification) -> None:
    dropped = False
    interface.number_modules(dict(enumerate(modules)))
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


def _restore(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        interface.forget(module)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "performers"):
            del config.performers
    model.__dict__.pop("_prepare_cache_for_generation", None)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return model


def load(folder: str | Path) -> PreTrainedModel:
    """Open a Performer, or a converted model, as what it was saved as.

    Raises:
        CheckpointError: the folder holds no model.
    """
    path = Path(folder)
    model = _open(path)
    stored = getattr(model.config, "performers", None)
    if stored is None:
        return model
    specification = Specification.of(model.config, stored["attention"])
    _apply(model, attention_modules(model), specification)
    return model


def _open(path: Path) -> PreTrainedModel:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: there is no model in this folder (no config.json).")
    try:
        architectures = json.loads((path / "config.json").read_text()).get("architectures") or []
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'}: not valid JSON ({error}).") from error
    config = AutoConfig.from_pretrained(path)
    import performers.models as models

    for name in architectures:
        cls = getattr(models, name, None) or getattr(transformers, name, None)
        if cls is not None:
            return cls.from_pretrained(path, config=config).eval()
    return transformers.AutoModel.from_pretrained(path, config=config).eval()
