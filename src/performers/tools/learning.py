"""What a step of finetuning computes: a batch of labelled proteins in, gradients out; and what a model says of the others.

Every protein is a row of its own, padded to the longest of its batch and never cut. All that is random is a function of (seed,
step, row), and every term of the loss belongs to one protein or residue, so the figures of a step do not depend on how its rows
are batched or dealt out to processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from performers import __version__
from performers.conversion.saving import copy_companions
from performers.data import IGNORED
from performers.errors import CheckpointError, UnsupportedError
from performers.randomness import derive_seed
from performers.tools.assessment import assess
from performers.tools.conformal import Calibration, scores_of
from performers.tools.heads import (
    CARD,
    CONVERSION,
    HeadCard,
    add_head,
    body_layers,
    digests,
    head_parameters,
    last_layer,
    rescale_,
    said,
)
from performers.tools.labelled import LabelledProteins
from performers.tools.language_model import LanguageModel, Row
from performers.tools.linear_probe import Examples, StandardisedLinear, fit_linear
from performers.training.distributed import World, autocast, choose_device, choose_dtype
from performers.training.loop import accumulate_gradients
from performers.training.order import Order, shuffled
from performers.training.task import Figures

if TYPE_CHECKING:
    from performers.tools.finetuning import FinetuneConfig

_TRAINED = "trained.safetensors"
_PROBED_PROTEINS, _PROBED_RESIDUES = 5000, 50_000  # that the first head is fitted to, at most


class Lessons:
    """Labelled proteins as a model learns from them.

    Arguments:
        config: how it learns.
        reader: the language model that a head is put on.
        proteins: with sets.
        head: the file of what `fit_head` gave, with which the head of a linear probe begins; None leaves it at zero.

    Attributes:
        mean, std: of the training targets, for regression; 0 and 1 otherwise.
        probed: the number of proteins that `fit_head` reads.
    """

    def __init__(
        self, config: FinetuneConfig, reader: LanguageModel, proteins: LabelledProteins, head: Path | None = None
    ) -> None:
        self._config, self._reader, self._proteins, self._head = config, reader, proteins, head
        self._training, self._validation = proteins.of("train"), proteins.of("validation")
        known = self._with_labels(self._validation)
        chosen = shuffled(len(known), derive_seed(config.seed, "evaluation set"))[: config.evaluate_proteins]
        self._measured = [known[place] for place in np.sort(chosen).tolist()]
        self._order = Order(len(self._training), config.batch_size, config.seed)
        self.mean, self.std = 0.0, 1.0
        if proteins.kind == "regression":
            values = np.concatenate([proteins.targets[row] for row in self._training])
            self.mean, self.std = float(values.mean()), float(values.std())
        self._probed, self._probed_for = self._few(self._training), self._few(self._measured)
        self.probed = len(self._probed) + len(self._probed_for)
        self._reference = sorted(self._probed, key=lambda row: len(proteins.sequences[row]))[len(self._probed) // 2]

    def model(self, checkpoint: Path | None) -> nn.Module:
        """The model as the run begins with it, or as a checkpoint has it."""
        config, proteins = self._config, self._proteins
        model: Any = add_head(self._reader.folder, proteins.kind, proteins.labels, config.seed)
        if config.linear_probe:
            replaced = last_layer(model)
            layer = StandardisedLinear(replaced.in_features, replaced.out_features)
            if self._head is not None:
                layer.load_state_dict(load_file(self._head))
            _replace(model, replaced, layer)
        head = head_parameters(model)
        if config.frozen:
            model.requires_grad_(False)
        if config.lora:
            model = _with_adapters(model, config.lora_rank, config.seed)
        for parameter in head.values():
            parameter.requires_grad_(True)
        if checkpoint is not None:
            path = checkpoint / _TRAINED
            trained, tensors = _trained(model), load_file(path)
            if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in trained.items()}:
                raise CheckpointError(f"{path} does not belong to {self._reader.folder}: names or shapes differ.")
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(tensors[name])
        return model.train(config.dropout)

    @torch.no_grad()
    def fit_head(self) -> dict[str, Tensor]:
        """The state of the last layer that suits what the untouched model gives it best, a `StandardisedLinear`.

        Raises:
            UnsupportedError: the last layer does not see one vector for each target.
        """
        device = choose_device(self._config.device)
        model = add_head(self._reader.folder, self._proteins.kind, self._proteins.labels, self._config.seed).to(device)
        layer = last_layer(model)
        train, validation = (self._seen(model, layer, rows, device) for rows in (self._probed, self._probed_for))
        with torch.enable_grad():
            fitted = fit_linear(train, validation, layer.out_features)
        fitted.reference.copy_(self._seen(model, layer, [self._reference], device).features[0])
        return fitted.state_dict()

    def _seen(self, model: Any, layer: nn.Module, proteins: list[int], device: torch.device) -> Examples:
        """What a layer gets to see of proteins, with the targets."""
        vectors: list[Tensor] = []
        features: list[Tensor] = []
        targets: list[Tensor] = []
        with layer.register_forward_pre_hook(lambda _, inputs: vectors.append(inputs[0])):
            for batch in self._batches(proteins):
                example = self._example([proteins[index] for index in batch])
                _logits(model, example, device, choose_dtype(self._config.dtype, device))
                vector, labels = vectors.pop().cpu(), example["labels"]
                if vector.shape[:-1] != labels.shape:
                    raise UnsupportedError(
                        f"{type(model).__name__}: its last layer does not see one vector for each target; expected "
                        "--no-linear-probe for it."
                    )
                known = labels != IGNORED
                features.append(vector[known])
                targets.append(example.get("targets", labels)[known])
        return Examples(torch.cat(features), torch.cat(targets))

    def _few(self, proteins: list[int]) -> list[int]:
        """Some of them, drawn with the seed, as many as the first head needs."""
        proteins = self._with_labels(proteins)
        order = shuffled(len(proteins), derive_seed(self._config.seed, "linear probe")).tolist()
        chosen = [proteins[place] for place in order[:_PROBED_PROTEINS]]
        if self._proteins.kind != "residue":
            return chosen
        residues = np.cumsum([len(self._proteins.sequences[protein]) for protein in chosen])
        return chosen[: int(np.searchsorted(residues, _PROBED_RESIDUES)) + 1]

    def _with_labels(self, proteins: list[int]) -> list[int]:
        """Those of which something is known; all of them if that is none."""
        if self._proteins.kind != "residue":
            return proteins
        return [row for row in proteins if (self._proteins.targets[row] != IGNORED).any()] or proteins

    # A step.

    def rows(self, step: int) -> list[int]:
        """The proteins of a step, over all processes."""
        return [self._training[place] for place in self._order.rows(step)]

    def tokens(self, step: int) -> int:
        """The tokens of a step, padding not counted."""
        return sum(len(self._row(row)) for row in self.rows(step))

    def accumulate(self, model: nn.Module, step: int, world: World, dtype: torch.dtype) -> Tensor:
        """Adds this process's share of the gradients of a step, and returns its part of the loss."""
        rows = self.rows(step)
        keys = [derive_seed(self._config.seed, "dropout", step, place) for place in range(len(rows))]
        mine = range(world.rank, len(rows), world.size)
        layer = self._following(model)
        beside = 0 if layer is None else len(self._row(self._reference))
        batches = self._batches([rows[place] for place in mine], self._config.micro_batch_size, beside)
        examples = [
            self._example([rows[mine[i]] for i in batch], [keys[mine[i]] for i in batch] if self._keyed else None)
            for batch in batches
        ]
        if layer is not None:
            layer.follows = True
            examples = [self._with_reference(example) for example in examples]
        return accumulate_gradients(_Loss(model, self._proteins.kind), examples, world, dtype)

    def _following(self, model: nn.Module) -> StandardisedLinear | None:
        """The last layer, where its centre follows the reference protein: vectors of residues differ by enough."""
        layers = [module for module in model.modules() if isinstance(module, StandardisedLinear)]
        return layers[0] if layers and self._proteins.kind != "residue" else None

    def _with_reference(self, example: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with the reference protein as its first row, which has no label."""
        first = self._example([self._reference]) | {"labels": torch.tensor([IGNORED])}
        if "dropout_keys" in example:
            first["dropout_keys"] = torch.tensor([derive_seed(self._config.seed, "dropout of the reference")])
        width = max(first["input_ids"].shape[1], example["input_ids"].shape[1])
        filling = {"input_ids": self._padding, "attention_mask": 0}
        for name, value in filling.items():
            for part in (first, example):
                part[name] = F.pad(part[name], (0, width - part[name].shape[1]), value=value)
        return {name: torch.cat((first[name], example[name])) for name in example}

    @property
    def _padding(self) -> int:
        """The token that fills a row."""
        return int(getattr(self._reader.network.config, "pad_token_id", None) or 0)

    @property
    def _keyed(self) -> bool:
        """Whether the model drops elements as a function of keys."""
        return self._config.dropout and self._reader.is_performer

    def _row(self, protein: int) -> Row:
        return self._reader.row([self._proteins.sequences[protein]])

    def _batches(self, proteins: Sequence[int], most: int | None = None, beside: int = 0) -> Iterator[list[int]]:
        """Indices into `proteins` of like length, as many as fit into `toks_per_batch` with their padding, `most` at most.

        Both count a row of `beside` tokens that is read along, if any.
        """
        lengths = [len(self._row(protein)) for protein in proteins]
        batch: list[int] = []
        for index in sorted(range(len(proteins)), key=lambda i: -lengths[i]):
            rows = len(batch) + (beside > 0)
            if batch and (
                (rows + 1) * max(lengths[batch[0]], beside) > self._config.toks_per_batch
                or rows == most
                or len(batch) == most
            ):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _example(self, proteins: Sequence[int], keys: list[int] | None = None) -> dict[str, Tensor]:
        """One padded batch with its targets.

        Returns:
            input_ids and attention_mask (B, T); labels, (B,) classes or (B, T) with -100 where there is no label. Numbers are in
            `targets`, (B,), standardised, and their labels are 0: each counts as one.
        """
        rows = [self._row(protein) for protein in proteins]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._padding, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        of_residues = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        for place, (row, protein) in enumerate(zip(rows, proteins, strict=True)):
            ids[place, : len(row)] = torch.from_numpy(row.ids)
            mask[place, : len(row)] = 1
            if self._proteins.kind == "residue":
                of_residues[place, row.residues] = torch.from_numpy(self._proteins.targets[protein])
        example = {"input_ids": ids, "attention_mask": mask, "labels": of_residues}
        if self._proteins.kind != "residue":
            known = np.concatenate([self._proteins.targets[protein] for protein in proteins])
            example["labels"] = torch.from_numpy(known).long()
            if self._proteins.kind == "regression":
                example["labels"] = torch.zeros(len(rows), dtype=torch.int64)
                example["targets"] = torch.from_numpy((known - self.mean) / self.std).float()
        if keys is not None:
            example["dropout_keys"] = torch.tensor(keys)
        return example

    # Figures.

    @torch.no_grad()
    def predictions(
        self, model: nn.Module, proteins: Sequence[int], world: World, dtype: torch.dtype
    ) -> list[npt.NDArray[np.float64]]:
        """What the model says of proteins, (T, C) each: numbers in the units of the table, or probabilities."""
        was_training = model.training
        model.eval()
        if (layer := self._following(model)) is not None:
            layer.follows = False
            now = self._seen(model, layer, [self._reference], world.device).features[0]
            layer.moved = now.to(world.device) - layer.reference
        sizes = [len(self._proteins.targets[protein]) for protein in proteins]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        found = torch.zeros(int(starts[-1]), max(1, len(self._proteins.labels)), dtype=torch.float64)
        mine = range(world.rank, len(proteins), world.size)
        for batch in self._batches([proteins[place] for place in mine]):
            places = [mine[index] for index in batch]
            example = self._example([proteins[place] for place in places])
            logits = _logits(model, example, world.device, dtype)
            for number, place in enumerate(places):
                values = logits[number : number + 1]
                if self._proteins.kind == "residue":
                    values = logits[number][torch.from_numpy(self._row(proteins[place]).residues)]
                found[starts[place] : starts[place + 1]] = said(values.float(), self._proteins.kind).cpu().double()
        model.train(was_training)
        # Each row is nonzero on one process only, so this sum is exact.
        table = world.sum_(found.to(world.device)).cpu().numpy() if world.size > 1 else found.numpy()
        return np.split(table * self.std + self.mean, starts[1:-1])

    def measure(self, model: nn.Module, world: World, dtype: torch.dtype) -> Figures:
        """The loss and the figures on validation proteins."""
        proteins, kind = self._measured, self._proteins.kind
        predicted = self.predictions(model, proteins, world, dtype)
        truth = [self._proteins.targets[protein] for protein in proteins]
        flat, known = np.concatenate(predicted), np.concatenate(truth)
        if kind == "regression":
            loss = float(np.square((flat[:, 0] - known) / self.std).mean())
        else:
            labelled = known != IGNORED
            right = flat[labelled, known[labelled]]
            loss = float(-np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean())
        figures = {name: figure["value"] for name, figure in assess(kind, predicted, truth, resamples=0).items()}
        logged: dict[str, Any] = {"loss": loss, "proteins": len(proteins), **figures}
        charted = {name: value for name, value in {"loss": loss, **figures}.items() if value is not None}
        return Figures(
            "validation", logged, charted, ", ".join(f"{name} {value:.4f}" for name, value in charted.items())
        )

    # What stays.

    def save_trained(self, model: nn.Module, folder: Path) -> None:
        """The parameters that are trained; the others are in the folder of the language model."""
        save_file({name: x.detach().contiguous() for name, x in _trained(model).items()}, folder / _TRAINED)

    def save_model(self, model: Any, folder: Path, world: World, dtype: torch.dtype) -> None:
        """The whole model, adapters merged into its weights and its numbers in the units of the table, with its tokenizer."""
        kind = self._proteins.kind
        predicted = self.predictions(model, self._validation, world, dtype)
        truth = np.concatenate([self._proteins.targets[protein] for protein in self._validation])
        known = truth != IGNORED if kind == "residue" else np.ones(len(truth), dtype=np.bool_)
        scores = scores_of(np.concatenate(predicted)[known], truth[known], is_number=kind == "regression")
        if self._config.lora:
            model = model.merge_and_unload()
        for layer in [module for module in model.modules() if isinstance(module, StandardisedLinear)]:
            _replace(model, layer, layer.folded())
        if kind == "regression":
            rescale_(model, self.mean, self.std)
        model.save_pretrained(folder)
        card = HeadCard(
            kind=kind,
            target=self._proteins.target,
            labels=self._proteins.labels,
            mean=self.mean,
            std=self.std,
            calibration=Calibration.of(scores),
            weights=digests(folder),
            base=self._reader.name,
            trained_length=self._reader.trained_length,
            version=__version__,
        )
        (folder / CARD).write_text(card.to_json(), encoding="utf-8")
        copy_companions(self._reader.folder, folder)
        if (folder / "README.md").is_file():
            (folder / "README.md").rename(folder / CONVERSION)


class _Loss:
    """The loss of a batch in the form of a model's forward pass, as `accumulate_gradients` calls it."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self._model, self._kind = model, kind

    def __call__(
        self, *, num_items_in_batch: Tensor, labels: Tensor, targets: Tensor | None = None, **inputs: Tensor
    ) -> SimpleNamespace:
        logits: Tensor = self._model(**inputs).logits.float()
        if targets is not None:
            known = labels != IGNORED
            loss = F.mse_loss(logits[known, 0], targets[known], reduction="sum")
        else:
            flat = logits.flatten(0, -2)
            loss = F.cross_entropy(flat, labels.flatten(), reduction="sum", ignore_index=IGNORED)
        return SimpleNamespace(loss=loss / num_items_in_batch)


def _logits(model: Any, example: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a model says of a batch without learning from it."""
    inputs = {name: example[name].to(device) for name in ("input_ids", "attention_mask")}
    with autocast(device, dtype):
        return model(**inputs).logits


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a layer in the place of another."""
    model.set_submodule(next(name for name, module in model.named_modules() if module is old), new)


def _with_adapters(model: Any, rank: int, seed: int) -> nn.Module:
    """The model with low-rank adapters (2106.09685) in the linear layers of its body, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    targets = body_layers(model)
    if not targets:
        raise UnsupportedError(f"{type(model).__name__}: its body holds no linear layers to adapt.")
    torch.manual_seed(derive_seed(seed, "adapters"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for something by a former name
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
