"""Swapping the attention of a pretrained model, in place, and back; and opening what was saved."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from performers.conversion import interface, multihead, saving
from performers.conversion.calibration import choose_layers, error_bound, fit_tensors
from performers.conversion.measurement import (
    Inputs,
    Sequence_,
    batch_of,
    halves,
    longest_input,
    outcome,
    random_ids,
    relative_error,
    token_ids,
)
from performers.conversion.specification import Specification
from performers.conversion.wiring import (
    anything,
    apply,
    attention_modules,
    layer_numbers,
    open_model,
    restore,
    run,
)
from performers.errors import InputError, UnsupportedError
from performers.models.configuration_performer import PerformerConfig
from performers.randomness import derive_seed

_log = logging.getLogger(__name__)

# Kernels that need statistics of all queries and keys: bidirectional attention takes those of its input.
_FITTED_IF_CAUSAL = ("softmax-sharp", "softmax-optimal")
# Tokens to measure on where no sequences are given.
_RANDOM_TOKENS = 64

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model | str | Path,
    attention: str = "favor",
    *,
    layers: list[int] | str | None = None,
    sequences: Iterable[Sequence_] | None = None,
    tokenizer: Any = None,
    architecture: str | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Model:
    """Replace the attention of a model, in place.

    Arguments:
        model: a Hugging Face model, the folder of one, or any module with `nn.MultiheadAttention` in it.
        attention: "favor", "reformer", "sparse", "local" or "split"; "exact" puts the model's own back.
        layers: the numbers of the attention modules to replace, in the order of `model.modules()`, negative ones from the end;
            None for all; "auto:0.05" for as many as keep the relative error of the last hidden states under 0.05 on
            `sequences`, those first that do the least harm (the figures are kept in `config.performers["measured"]`).
        sequences: a handful, strings or lists of token ids, of a Hugging Face model. Kernels that fit queries and keys
            ("softmax-prototypes", "softmax-sharp", "softmax-optimal") are fitted to half of them; errors are measured on the
            other half.
        tokenizer: for strings; None takes the one in the model's folder.
        architecture: the class of a model that is opened from a folder, where config.json names none that is known.
        seed: of the random projections.
        arguments: of the mechanism, as in kernel="softmax-sharp", num_features=256.

    Returns:
        The model. The configuration of a Hugging Face model says what was done (`config.performers`), so `save_pretrained`
        keeps it, and `performers.load(folder)`, or any stock class with `attn_implementation` of the same name, opens it to
        the same numbers.

    Raises:
        InputError: an argument that is not valid.
        UnsupportedError: the model's attention cannot be replaced; the message names the model and the feature.
    """
    opened: Any = open_model(model, architecture) if isinstance(model, (str, Path)) else model
    if attention not in (*interface.NAMES, "exact"):
        known = ", ".join(map(repr, (*interface.NAMES, "exact")))
        raise InputError(f"attention={attention!r} is not known: expected one of {known}.")
    if not isinstance(opened, PreTrainedModel):
        if sequences is not None or isinstance(layers, str):
            raise InputError(
                f"{type(opened).__name__} is no model of Hugging Face: nothing can be measured on sequences."
            )
        multihead.convert(opened, attention, layers, seed, arguments)
    elif isinstance(opened.config, PerformerConfig):
        raise UnsupportedError(
            f"{type(opened).__name__} is a Performer already: its attention is chosen in its configuration."
        )
    elif attention == "exact":
        restore(opened)
    else:
        _convert(opened, attention, layers, sequences, tokenizer, seed, arguments)
    return cast("Model", opened)


def _convert(
    model: PreTrainedModel,
    attention: str,
    layers: list[int] | str | None,
    sequences: Iterable[Sequence_] | None,
    tokenizer: Any,
    seed: int,
    arguments: dict[str, Any],
) -> None:
    bound = error_bound(layers)
    if bound is not None and sequences is None:
        raise InputError(f"layers={layers!r} is chosen by measuring: give some sequences to measure on.")
    Specification(attention, arguments).mechanism(16, 0)  # refuses arguments that the mechanism does not know
    if sequences is None and arguments.get("kernel") == "softmax-prototypes":
        raise InputError(
            "kernel='softmax-prototypes' is made of the model's own queries: give some sequences to fit it to."
        )
    modules = attention_modules(model)
    numbers = None if isinstance(layers, str) else layer_numbers(layers, len(modules))
    classes = sorted({type(module).__name__ for module in modules})
    if (
        sequences is None
        and arguments.get("kernel") in _FITTED_IF_CAUSAL
        and any(getattr(m, "is_causal", False) for m in modules)
    ):
        raise InputError(
            f"kernel={arguments['kernel']!r}: causal attention cannot look at all queries and keys before it begins: give some "
            f"sequences to fit it to."
        )
    specification = Specification(attention, arguments, numbers, classes, seed)
    specification.to_json()  # refuses what a file cannot hold
    tensors, judge_on = {}, None
    if sequences is not None:
        ids = token_ids(model, sequences, tokenizer, at_most=longest_input(model))
        fit_to, judge_on = (batch_of(model, half) for half in halves(ids))
        tensors = fit_tensors(model, modules, specification, fit_to)
    if bound is not None and judge_on is not None:
        specification = choose_layers(model, modules, specification, tensors, judge_on, bound)
        if not specification.layers:
            _log.warning(
                "%s: no layer can be converted with an error under %g: all of them stay exact.",
                type(model).__name__,
                bound,
            )
    apply(model, modules, specification, tensors)
    run(model)
    features = [getattr(interface.mechanism_of(module), "features", None) for module in modules]
    few = next((f for f in features if f is not None and f.num_features < f.head_dim), None)
    if few is not None:
        what = "the sequences"
        if judge_on is None:
            what, judge_on = _anything_random(model, seed)
        apply(model, modules, replace(specification, layers=[]), tensors)
        exact = outcome(model, judge_on)
        apply(model, modules, specification, tensors)
        error = relative_error(outcome(model, judge_on).hidden[-1], exact.hidden[-1], exact.real)
        _log.warning(
            "%s: num_features=%d is less than the head size, %d: on %s the last hidden states are off by %.0f %%.",
            type(model).__name__,
            few.num_features,
            few.head_dim,
            what,
            100 * error,
        )


def _anything_random(model: PreTrainedModel, seed: int) -> tuple[str, Inputs]:
    """What to measure on where there is nothing better, and its name."""
    if model.main_input_name == "input_ids":
        length = min(_RANDOM_TOKENS, longest_input(model) or _RANDOM_TOKENS)
        return "random tokens", batch_of(model, [random_ids(model, length, seed)])
    generator = torch.Generator().manual_seed(derive_seed(seed, "pixels"))
    images = {name: torch.randn(x.shape, generator=generator).to(x) for name, x in anything(model).items()}
    return "random pixels", images


def load(folder: str | Path, architecture: str | None = None, **settings: Any) -> PreTrainedModel:
    """Open a Performer, or a converted model, as what it was saved as.

    Arguments:
        folder: of the model.
        architecture: the class to open it as instead, as in "PerformerForSequenceClassification"; a head that the folder has no
            weights for is new.
        settings: keys of its configuration to replace, as in num_labels=3.

    Raises:
        CheckpointError: the folder holds no model, or what belongs to it is missing or damaged.
    """
    model = open_model(folder, architecture, **settings)
    specification = Specification.stored_in(model.config)
    if specification is not None:
        tensors = saving.read_tensors(model.config, specification)
        apply(model, attention_modules(model), specification, tensors)
    return model
