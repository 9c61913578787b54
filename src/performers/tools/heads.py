"""A model with a head: how one is made from a language model, what its folder says of it, and how it is asked.

The folder of a finetuned model is an ordinary Hugging Face folder, whose configuration names the labels and whose head gives
numbers in the user's units. Beside the weights, `head.json` says what the head was trained for, on which weights it sits, and how
far it was off on proteins that it had not learned from. What comes in here is a folder; what goes out predicts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from performers.conversion import load
from performers.errors import CheckpointError, InputError, UnsupportedError
from performers.folders import sha256_of
from performers.randomness import derive_seed
from performers.tools.conformal import Calibration
from performers.tools.labelled import Kind
from performers.tools.language_model import LanguageModel, Reading, Row, Unread
from performers.training.checkpoint import find_model, weights_files, without_bars
from performers.training.distributed import autocast

CARD = "head.json"
CONVERSION = "CONVERSION.md"
"""What was the README of a converted model; that of the output is about the head."""


@dataclass(frozen=True)
class HeadCard:
    """What `head.json` says.

    Attributes:
        kind: "regression", "classification" or "residue".
        target: the column that was learned.
        labels: in the order of the logits; none for regression.
        mean, std: of the training targets; the head's weights include them already.
        calibration: the scores of the validation proteins.
        weights: the SHA-256 of each weights file.
        base: the name of the model that was finetuned.
        trained_length: tokens that it was trained on at a time, or None where that is not known.
        version: of performers.
    """

    kind: Kind
    target: str
    labels: tuple[str, ...]
    mean: float
    std: float
    calibration: Calibration
    weights: dict[str, str]
    base: str
    trained_length: int | None
    version: str

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """That of a model folder.

        Raises:
            InputError: the model has no head that `performers finetune` made.
            CheckpointError: the head belongs to other weights, or its card is damaged.
        """
        path = folder / CARD
        if not path.is_file():
            raise InputError(
                f"{folder} has no head: expected a folder that `performers finetune` made, with {CARD} in it."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            scores = content["calibration"]
            calibration = Calibration(scores["count"], tuple(scores["ranks"]), tuple(scores["scores"]))
            card = cls(**{**content, "labels": tuple(content["labels"]), "calibration": calibration})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} is damaged: expected what `performers finetune` wrote.") from None
        if card.weights != digests(folder):
            raise CheckpointError(
                f"{path} is about other weights than those in {folder}: the head was trained on another model."
            )
        return card


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each weights file of a model folder."""
    return {file.name: sha256_of(file) for file in weights_files(folder)}


def class_for(folder: Path, kind: Kind) -> str:
    """The class that puts a head for a task on the language model in a folder.

    Raises:
        InputError: the model has such a head already.
        UnsupportedError: it reads in one direction only, or no head for it exists.
    """
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    was = str((content.get("architectures") or ["model without a name"])[0])
    if was.endswith("Classification"):
        raise InputError(f"{folder} holds a {was}: expected the language model that it was made from, without a head.")
    if was.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedError(
            f"{folder} holds a {was}, in which a residue sees only those before it: expected a masked language model."
        )
    name = _class_name(content["model_type"], kind)
    if name is None:
        raise UnsupportedError(f"{folder}: there is no model of type {content['model_type']} for {kind}.")
    return name


def add_head(folder: Path, kind: Kind, labels: Sequence[str], seed: int) -> Any:
    """The language model in a folder with a new head in place of its own, on the CPU and in evaluation mode.

    Arguments:
        folder: of a masked language model.
        kind, labels: what the head is for.
        seed: of its initial weights.

    Raises:
        InputError, UnsupportedError: as `class_for`.
    """
    name = class_for(folder, kind)
    settings: dict[str, Any] = {"num_labels": 1}
    if kind == "regression":
        settings["problem_type"] = "regression"
    else:
        settings = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }
        if kind == "classification":
            settings["problem_type"] = "single_label_classification"
    torch.manual_seed(derive_seed(seed, "head"))
    with without_bars(), _without_reports():
        model: Any = load(folder, name, **settings)
    last_layer(model)
    return model.float().eval()


def _class_name(model_type: str, kind: Kind) -> str | None:
    if model_type == "performer":
        return "PerformerForTokenClassification" if kind == "residue" else "PerformerForSequenceClassification"
    of_residues = modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    of_proteins = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return (of_residues if kind == "residue" else of_proteins).get(model_type)


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters outside the body; a pooling layer is the head's."""
    inside = f"{model.base_model_prefix}."
    return {name: x for name, x in model.named_parameters() if not name.startswith(inside) or ".pooler." in name}


def body_layers(model: Any) -> list[str]:
    """The names of the linear layers of the body, for adapters."""
    inside = f"{model.base_model_prefix}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside) and ".pooler." not in name
    ]


def last_layer(model: Any) -> nn.Linear:
    """The linear layer that gives the number of a regression or the logits of the labels.

    Raises:
        UnsupportedError: the head does not end in one.
    """
    inside = f"{model.base_model_prefix}."
    outside = [module for name, module in model.named_modules() if not name.startswith(inside)]
    linear = [
        module for module in outside if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not linear:
        raise UnsupportedError(f"{type(model).__name__}: its head does not end in a linear layer.")
    return linear[-1]


@torch.no_grad()
def rescale_(model: Any, mean: float, std: float) -> None:
    """Makes the head of a regression, in place, give mean + std * what it gave."""
    layer = last_layer(model)
    layer.weight.mul_(std)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(1))
    layer.bias.mul_(std).add_(mean)


def _compute_exactly(layer: nn.Linear) -> None:
    """Keeps a head out of autocast: vectors of variants of one protein differ by less than bfloat16 resolves in its products."""
    forward = layer.forward

    def exact(input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return forward(input.float())

    layer.forward = exact


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Keeps off the screen that a new head has no weights yet: that is what is asked for."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class HeadedModel(LanguageModel):
    """A finetuned model, ready to predict. `HeadedModel.of` makes one.

    Attributes:
        card: what the head is for.
        family: the type of model, as "performer" or "esm".
        files: the names of those in its folder.
    """

    card: HeadCard

    def __init__(self, model: Any, folder: Path, **arguments: Any) -> None:
        super().__init__(model, folder, **arguments)
        self.family: str = model.config.model_type
        self.files = sorted(file.name for file in folder.iterdir())
        self.is_performer = False  # a head reads rows padded, also that of a Performer
        _compute_exactly(last_layer(model))

    @classmethod
    def of(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> HeadedModel:
        """That of the folder of a finetuned model.

        Arguments:
            folder, device, dtype: as of `LanguageModel.open`.

        Raises:
            InputError: there is no head in it, or one of another model; CheckpointError and others as `LanguageModel.open`.
        """
        path = find_model(folder)
        card = HeadCard.read(path)
        opened: Any = cls.open(path, device=device, dtype=dtype)
        opened.card, opened.trained_length = card, card.trained_length
        return opened

    def predict(
        self, rows: Sequence[Row], *, toks_per_batch: int = 16_384
    ) -> Iterator[tuple[int, npt.NDArray[np.float32] | Unread]]:
        """What the head says of rows of one chain each.

        Returns:
            The index of each row and, float32, its number (1, 1), the probabilities of the labels (1, C), or those of each
            residue (L, C), in the order in which batches are done.
        """
        for index, reading in self.read(rows, layers=(self._head,), toks_per_batch=toks_per_batch):
            if isinstance(reading, Unread):
                yield index, reading
                continue
            values = reading.hidden[self._head]
            if self.card.kind == "residue":
                values = values[torch.from_numpy(rows[index].residues).to(values.device)]
            yield index, said(values, self.card.kind).cpu().numpy()

    @property
    def _head(self) -> int:
        """The number of the head, counted as one layer more."""
        return self.num_layers + 1

    def _forward(self, rows: list[Row], layers: tuple[int, ...], log_probabilities: bool) -> list[Reading]:
        with torch.inference_mode(), autocast(self.device, self.dtype):
            output, slots = self._padded(rows, ())
        logits = output.logits.float()
        places = slots if self.card.kind == "residue" else [slice(n, n + 1) for n in range(len(rows))]
        return [Reading({self._head: logits[place]}) for place in places]


def said(logits: Tensor, kind: Kind) -> Tensor:
    """The numbers or the probabilities that logits (n, C) stand for."""
    return logits if kind == "regression" else torch.softmax(logits, dim=-1)
