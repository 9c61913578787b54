"""The models that come with the package: their names, where they are, and what is known of them.

A name such as "performers/protein-masked" comes in, a folder whose files have been verified goes out; Hugging Face's methods and
this package's then open it like any other, and no network is asked. A language model's folder in `performers/weights` holds its
weights, configuration, tokenizer, the settings of its training (config.yaml), its figures on the held-out sets (evaluation.json)
and the model card made from all of them (README.md), sealed by a manifest. `scripts/bundle_models.py` makes it. A head on a
language model, which answers a question of its own (interactions.json, by `scripts/bundle_interactions.py`), has a name, a card
and a manifest too, but only its tool opens it. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from performers.errors import CheckpointError, InputError
from performers.folders import verify_folder

MASKED = "performers/protein-masked"
"""What reads proteins where no other model is asked for."""

CAUSAL = "performers/protein-causal"
"""What writes proteins where no other model is asked for."""

INTERACTIONS = "performers/protein-interactions"
"""What tells which proteins interact where no other model is asked for: a head on the masked model."""

WEIGHTS = Path(__file__).parents[1] / "weights"
CARD, EVALUATION, SETTINGS = "README.md", "evaluation.json", "config.yaml"
HEAD_SETTINGS = "interactions.json"
_NAMESPACE = "performers/"

ModelName = str | Path


@dataclass(frozen=True)
class Bundled:
    """What is known of anything that is bundled.

    Attributes:
        name: what it is opened by.
        folder: where it is.
        objective: "mlm" (masked residues), "clm" (each residue from those before it) or "interactions" (of two proteins).
        num_bytes: of its weights file.
    """

    name: str
    folder: Path
    objective: str
    num_bytes: int

    @property
    def card(self) -> str:
        """The model card, in Markdown."""
        return (self.folder / CARD).read_text(encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """All of it but the card, fit for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class BundledModel(Bundled):
    """What is known of a bundled language model.

    Attributes:
        parameters: how many numbers it has learned.
        context: tokens that it was trained on at a time, at the end of its training.
        version: of the package that measured its figures.
        held_out: for each held-out set what `Evaluation` tells of it, as a dictionary.
    """

    parameters: int
    context: int
    version: str
    held_out: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class BundledHead(Bundled):
    """What is known of a bundled model that sits on a language model.

    Attributes:
        body: the language model that it was trained on.
        verdict: how it did against its baselines, in words.
    """

    body: str
    verdict: str


def bundled_names() -> list[str]:
    """The names of the language models that come with this installation."""
    return _names("config.json")


def head_names() -> list[str]:
    """The names of the heads that come with this installation."""
    return _names(HEAD_SETTINGS)


def _names(file: str) -> list[str]:
    return sorted(_NAMESPACE + path.parent.name for path in WEIGHTS.glob(f"*/{file}"))


def is_bundled(model: object) -> bool:
    """Whether this names a bundled language model; a folder of that name comes first, as in Hugging Face's methods."""
    return isinstance(model, str | Path) and _text(model) in bundled_names() and not os.path.isdir(model)


def bundled_folder(name: ModelName) -> Path:
    """The folder of a bundled model or head, after every file of it has been verified.

    Raises:
        InputError: there is no such model; the sentence lists those that there are.
        CheckpointError: a file is missing or damaged.
    """
    text = _text(name)
    if text not in (names := sorted(bundled_names() + head_names())):
        raise InputError(f"{text} is not a bundled model; expected {_choices(names)}.")
    folder = WEIGHTS / text.removeprefix(_NAMESPACE)
    try:
        verify_folder(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} It belongs to the package: install it again (pip install --force-reinstall --no-deps performers)."
        ) from None
    return folder


def located(model: Any) -> Any:
    """The folder behind a language model's name, as text; whatever names nothing bundled stays as it is.

    Raises:
        InputError: "performers/..." that is neither a folder nor the name of a language model.
        CheckpointError: as `bundled_folder`.
    """
    if not isinstance(model, str | Path) or os.path.exists(model):
        return model
    text = _text(model)
    if not text.startswith(_NAMESPACE) or "/" in text.removeprefix(_NAMESPACE):
        return model
    if text in head_names():
        raise InputError(
            f"{text} is a head on a language model, for `performers interact predict`; expected a folder, or "
            f"{_choices(bundled_names())}."
        )
    if text not in bundled_names():
        raise InputError(
            f"{text} is neither a folder nor a bundled model; expected a folder, or {_choices(bundled_names())}."
        )
    return str(bundled_folder(text))


def model_or_default(model: ModelName | None, default: str = MASKED) -> ModelName:
    """The model that was asked for, or the bundled one that stands in for it.

    Raises:
        InputError: none was asked for, and this installation has no such model.
    """
    if model is None and default not in bundled_names():
        raise InputError(
            f"No --model was given, and {default} is not part of this installation: give the folder of a model, for example "
            f"one that `performers pretrain` made."
        )
    return default if model is None else model


def describe(name: str) -> BundledModel:
    """What is known of a bundled language model.

    Raises:
        InputError: there is no such model; the sentence lists those that there are.
        CheckpointError: as `bundled_folder`.
    """
    if _text(name) in head_names():
        raise InputError(f"{name} is a head, not a language model; expected {_choices(bundled_names())}.")
    folder = bundled_folder(name)
    evaluation = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    return BundledModel(
        name=_text(name),
        folder=folder,
        objective=settings["objective"],
        parameters=evaluation["parameters"],
        num_bytes=(folder / "model.safetensors").stat().st_size,
        context=settings["context"],
        version=evaluation["version"],
        held_out=evaluation["sets"],
    )


def describe_head(name: str) -> BundledHead:
    """What is known of a bundled head.

    Raises:
        InputError: there is no such head; the sentence lists those that there are.
        CheckpointError: as `bundled_folder`.
    """
    if _text(name) in bundled_names():
        raise InputError(f"{name} is a language model, not a head; expected {_choices(head_names())}.")
    folder = bundled_folder(name)
    settings = json.loads((folder / HEAD_SETTINGS).read_text(encoding="utf-8"))
    return BundledHead(
        name=_text(name),
        folder=folder,
        objective="interactions",
        num_bytes=(folder / "head.safetensors").stat().st_size,
        body=settings["body"],
        verdict=settings["verdict"],
    )


def name_of(folder: Path) -> str | None:
    """The name of the bundled model in a folder; None where it is another folder."""
    return _NAMESPACE + folder.name if folder.resolve().parent == WEIGHTS.resolve() else None


def take_names(auto: Any) -> None:
    """Lets an Auto class of Hugging Face's take the names of bundled models; anything else it treats as ever."""
    original = auto.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        model = pretrained_model_name_or_path
        return original(cls, str(bundled_folder(model)) if is_bundled(model) else model, *arguments, **options)

    auto.from_pretrained = classmethod(from_pretrained)


def _text(model: ModelName) -> str:
    return os.fspath(model).replace(os.sep, "/")


def _choices(names: list[str]) -> str:
    if not names:
        return "none: this installation has no bundled models"
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
