"""What a step of distillation computes: a teacher and a student read the same sequences, and the student is told how they differ.

Rows of token ids come in, losses and figures go out. All that is random, the order of the sequences and which tokens are hidden,
is a function of (seed, step or epoch, row), and every term of a loss belongs to one row or one token, so the figures of a step do
not depend on how its rows are batched or dealt out to processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from performers.conversion import interface, wiring
from performers.conversion.distillation import DISTILLED, DistilConfig
from performers.conversion.measurement import batch_of, longest_input, token_ids
from performers.conversion.saving import copy_companions
from performers.conversion.specification import Specification
from performers.conversion.swap import load
from performers.data import FIRST_RESIDUE, IGNORED, PAD, mask_tokens
from performers.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from performers.randomness import derive_seed
from performers.training.checkpoint import without_bars
from performers.training.distributed import World, autocast
from performers.training.loop import accumulate_gradients
from performers.training.order import Order, shuffled
from performers.training.run_folder import read_log
from performers.training.task import Figures

_TRAINED = "trained.safetensors"
_RESAMPLES = 1000

Batch = dict[str, Tensor]


class Student(nn.Module):
    """A converted model with its mechanisms, which Hugging Face's model does not count among its modules.

    Attributes:
        model: the converted model, with adapters if there are any.
        mechanisms: by the number of their attention module; those that can be learned have parameters.
    """

    def __init__(self, model: nn.Module, mechanisms: dict[int, nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.mechanisms = nn.ModuleDict({str(number): mechanism for number, mechanism in mechanisms.items()})

    def forward(self, **inputs: Any) -> Any:
        """That of the model."""
        return self.model(**inputs)


class Classroom:
    """A teacher, what it teaches on, and how.

    Arguments:
        config: who learns from whom, and how.
        training, validation: sequences as text.

    Attributes:
        kind: "mlm" or "clm" for language models, "encoder" for a model without such a head.
        training, validation: the sequences' token ids.

    Raises:
        InputError: a sequence that the tokenizer does not know, or that is too long.
        ConfigError, UnsupportedError: student, teacher and what is asked do not go together.
    """

    def __init__(self, config: DistilConfig, training: list[str], validation: list[str]) -> None:
        self._config = config
        with without_bars():
            self._student: Any = load(config.model).float()
            self._teacher: Any = load(config.teacher or config.model).float().requires_grad_(False)
        stored = Specification.stored_in(self._student.config)
        if stored is None:
            raise InputError(f"{config.model} is not a converted model: convert it first, with performers convert.")
        self._specification = stored
        exact = replace(stored, layers=[])
        wiring.apply(self._teacher, wiring.attention_modules(self._teacher), exact)
        self._tokenizer = _tokenizer(config.model, config.teacher)
        self.kind = _kind(self._student, self._tokenizer)
        self._check_teacher()
        if self.kind == "encoder" and config.objective == "finetune":
            raise UnsupportedError(
                f"{type(self._student).__name__} has no language modelling head, so it has no original objective to fine-tune on."
            )
        limit = longest_input(self._student)
        limit = min(limit or config.max_tokens or 2**31, config.max_tokens or 2**31)
        self.training = self._encoded(training, limit)
        measured = self._encoded(validation, limit)
        chosen = shuffled(len(measured), derive_seed(config.seed, "evaluation set"))[: config.evaluate_sequences]
        self.validation = [measured[index] for index in np.sort(chosen)]
        self._order = Order(len(self.training), config.batch_size, config.seed)
        self._floor: npt.NDArray[np.float64] | None = None

    def student(self, checkpoint: Path | None) -> Student:
        """The student as the run begins with it, or as a checkpoint has it."""
        model: Any = self._student
        wiring.run(model)
        modules = self._specification.numbered(model)
        self._converted = {number: module for number, module in modules.items() if self._specification.converts(number)}
        made = {number: interface.mechanism_of(module) for number, module in self._converted.items()}
        if self._config.lora is not None:
            model = _with_adapters(model, self._converted.values(), self._config.lora, self._config.seed)
        student = Student(model, {number: made[number] for number in made if made[number] is not None})  # pyright: ignore[reportArgumentType]
        if checkpoint is not None:
            path = checkpoint / _TRAINED
            trained = _trained(student)
            tensors = load_file(path)
            if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in trained.items()}:
                raise CheckpointError(f"{path} does not belong to {self._config.model}: names or shapes differ.")
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(tensors[name])
        return student.train(self._config.dropout)

    # A step.

    def rows(self, step: int) -> list[int]:
        """The sequences of a step over all processes: every epoch has an order of its own, drawn from (seed, epoch)."""
        return self._order.rows(step)

    def tokens(self, step: int) -> int:
        """The tokens of a step, padding not counted."""
        return sum(len(self.training[row]) for row in self.rows(step))

    def accumulate(self, student: Student, step: int, world: World, dtype: torch.dtype) -> Tensor:
        """Adds this process's share of the gradients of a step, and returns its part of the loss."""
        self._teacher.to(world.device)
        name, _, _ = self._config.stage_at(step)
        lesson = {"layers": self._layers_lesson, "end": self._end_lesson, "finetune": self._finetune_lesson}[name]
        rows = self.rows(step)
        mine = range(world.rank, len(rows), world.size)
        at_once = self._config.micro_batch_size or len(mine)
        examples = [
            self._example(
                [self.training[rows[place]] for place in places],
                [step * self._config.batch_size + place for place in places],
                "training",
                self._config.mask_proportion,
            )
            for start in range(0, len(mine), at_once)
            if (places := mine[start : start + at_once])
        ]
        return accumulate_gradients(_Loss(lesson, student), examples, world, dtype)

    def _example(self, sequences: Sequence[Tensor], numbers: list[int], purpose: str, proportion: float) -> Batch:
        """One padded batch, with the tokens to be predicted as labels, -100 elsewhere."""
        batch = batch_of(self._teacher, sequences)
        batch = {key: value.cpu() for key, value in batch.items()}
        labels = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=IGNORED)
        if self.kind == "clm":
            labels[:, 0] = IGNORED
        if self.kind == "mlm":
            # Drawn as in pretraining, whose function knows no other vocabulary than ours.
            special = np.isin(labels.numpy(), [IGNORED, *self._tokenizer.all_special_ids])
            standing_in = np.where(special, PAD, FIRST_RESIDUE)
            seed = derive_seed(self._config.seed, "distillation", purpose)
            _, chosen = mask_tokens(standing_in, numbers, seed=seed, step=0, scheme="mask", proportion=proportion)
            hidden = torch.from_numpy(chosen != IGNORED)
            batch["input_ids"] = batch["input_ids"].masked_fill(hidden, self._tokenizer.mask_token_id)
            labels = labels.masked_fill(~hidden, IGNORED)
        return {**batch, "labels": labels}

    def _layers_lesson(self, student: Student, batch: Batch, items: Tensor) -> Tensor:
        """How far every converted attention layer is from the teacher's, given what the teacher's gets.

        The squared error of a row's outputs over their square, mean over rows and layers. No error propagates, because every
        layer gets the teacher's own hidden states.
        """
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

        def keep(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls[number] = args, kwargs, _first(output)

            return hook

        with torch.no_grad(), _hooks(self._teacher_modules, keep):
            self._run(self._teacher, batch)
        real = _real(batch)
        loss = torch.zeros((), device=real.device)
        for number, module in self._converted.items():
            args, kwargs, expected = calls[number]
            loss = loss + _row_errors(_first(module(*args, **kwargs)), expected, real).sum()
        return loss / (len(self._converted) * self._config.batch_size)

    def _end_lesson(self, student: Student, batch: Batch, items: Tensor) -> Tensor:
        """How far the student's predictions and last hidden states are from the teacher's.

        A language model: the Kullback-Leibler divergence from the teacher's distribution (1503.02531), mean over the predicted
        tokens. Any other: 1 - the cosine of the mean of the hidden states. To either the squared error of a row's last hidden
        states over their square is added, mean over rows.
        """
        with torch.no_grad():
            taught = self._run(self._teacher, batch)
        learned = self._run(student, batch)
        real = _real(batch)
        states = _row_errors(learned.hidden_states[-1], taught.hidden_states[-1], real).sum() / self._config.batch_size
        if self.kind == "encoder":
            cosine = F.cosine_similarity(_embedding(learned, real), _embedding(taught, real), dim=-1)
            return states + (1 - cosine).sum() / self._config.batch_size
        predicted = _predicted(batch["labels"], self.kind)
        return states + _divergence(learned.logits[predicted], taught.logits[predicted]).sum() / items

    def _finetune_lesson(self, student: Student, batch: Batch, items: Tensor) -> Tensor:
        """The original objective: cross-entropy, mean over the predicted tokens."""
        logits = self._run(student, batch).logits[_predicted(batch["labels"], self.kind)]
        targets = _targets(batch["labels"], self.kind)
        return F.cross_entropy(logits.float(), targets, reduction="sum") / items

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
        if self.kind == "clm":
            inputs["use_cache"] = False
        return model(**inputs, output_hidden_states=True)

    # Figures.

    @torch.no_grad()
    def measure(self, student: Student, world: World, dtype: torch.dtype) -> Figures:
        """The student beside the teacher, and beside the floor: the teacher with all attention outputs at zero.

        Predictions are of hidden tokens only, drawn with the seed, or of the next token; intervals are 95 % bootstrap
        intervals over sequences.
        """
        self._teacher.to(world.device)
        was_training = student.training
        student.eval()
        try:
            columns = self._columns(student, world, dtype)
        finally:
            student.train(was_training)
        if self.kind == "encoder":
            return _encoder_figures(columns, self._config.seed)
        if self._floor is None:
            self._floor = self._columns(self._teacher, world, dtype, silenced=True)
        return _language_figures(columns, self._floor, self._config.seed)

    def _columns(
        self, model: nn.Module, world: World, dtype: torch.dtype, *, silenced: bool = False
    ) -> npt.NDArray[np.float64]:
        """Of every validation sequence: predicted tokens, right ones, the teacher's right ones, sums of the negative
        log-likelihoods of both and of the divergence, the cosine of the embeddings, and the relative error of the last states.
        """
        sums = np.zeros((len(self.validation), 8))
        for indices in self._evaluation_batches(world):
            example = self._example([self.validation[i] for i in indices], indices, "evaluation", 0.15)
            batch = {key: value.to(world.device) for key, value in example.items()}
            with autocast(world.device, dtype):
                with _hooks(self._teacher_modules if silenced else {}, lambda number: _silence):
                    found = self._run(model, batch)
                taught = self._run(self._teacher, batch)
            real = _real(batch)
            sums[indices, 6] = F.cosine_similarity(_embedding(found, real), _embedding(taught, real), dim=-1).cpu()
            sums[indices, 7] = _row_errors(found.hidden_states[-1], taught.hidden_states[-1], real).sqrt().cpu()
            if self.kind == "encoder":
                continue
            predicted = _predicted(batch["labels"], self.kind)
            target = _targets(batch["labels"], self.kind)
            logits, expected = found.logits[predicted].float(), taught.logits[predicted].float()
            values = torch.stack(
                (
                    torch.ones_like(target, dtype=torch.float32),
                    (logits.argmax(-1) == target).float(),
                    (expected.argmax(-1) == target).float(),
                    F.cross_entropy(logits, target, reduction="none"),
                    F.cross_entropy(expected, target, reduction="none"),
                    _divergence(logits, expected),
                ),
                dim=1,
            )
            owner = np.asarray(indices)[predicted.nonzero()[:, 0].cpu().numpy()]
            np.add.at(sums, (owner[:, None], np.arange(6)), values.double().cpu().numpy())
        if world.size > 1:
            # Each row is nonzero on one process only, so this sum is exact.
            sums = world.sum_(torch.from_numpy(sums).to(world.device)).cpu().numpy()
        return sums

    def _evaluation_batches(self, world: World) -> Iterator[list[int]]:
        """Neighbours share a batch as long as it has at most `evaluate_tokens` tokens, padding included."""
        batch: list[int] = []
        longest = 0
        for index in range(world.rank, len(self.validation), world.size):
            longest = max(longest, len(self.validation[index]))
            if batch and longest * (len(batch) + 1) > self._config.evaluate_tokens:
                yield batch
                batch, longest = [], len(self.validation[index])
            batch.append(index)
        if batch:
            yield batch

    # What stays.

    def save_trained(self, student: Student, folder: Path) -> None:
        """The parameters that are trained; the others are in the folder of the converted model."""
        save_file({name: x.detach().contiguous() for name, x in _trained(student).items()}, folder / _TRAINED)

    def save_model(self, student: Student, folder: Path) -> None:
        """The converted model, adapters merged into its weights, with its tokenizer."""
        model: Any = student.model if self._config.lora is None else student.model.merge_and_unload()  # pyright: ignore[reportCallIssue]
        setattr(model.config, DISTILLED, {"objective": self._config.objective, "steps": self._config.steps})
        model.save_pretrained(folder)
        copy_companions(Path(self._config.model), folder)

    def _check_teacher(self) -> None:
        student, teacher = self._student, self._teacher
        self._teacher_modules = self._specification.numbered(teacher)
        sizes = [
            (config.vocab_size, config.hidden_size, len(modules))
            for config, modules in (
                (student.config.get_text_config(), self._specification.numbered(student)),
                (teacher.config.get_text_config(), self._teacher_modules),
            )
        ]
        if _kind(teacher, self._tokenizer) != self.kind:
            raise ConfigError(
                f"The teacher is a {type(teacher).__name__}, the student a {type(student).__name__}: expected the same head."
            )
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"The teacher, {type(teacher).__name__}, has {sizes[1][0]:,} tokens, hidden states of {sizes[1][1]} and "
                f"{sizes[1][2]} attention layers, the student {sizes[0][0]:,}, {sizes[0][1]} and {sizes[0][2]}."
            )
        if getattr(student.config, "is_encoder_decoder", False) or student.main_input_name != "input_ids":
            raise UnsupportedError(
                f"{type(student).__name__}: only models that read one sequence of tokens can be distilled."
            )

    def _encoded(self, texts: list[str], limit: int) -> list[Tensor]:
        ids = token_ids(self._student, texts, self._tokenizer)
        long = [number for number, sequence in enumerate(ids, start=1) if len(sequence) > limit]
        if not long:
            return ids
        if self._config.on_long == "error":
            raise InputError(
                f"{len(long)} of {len(ids)} sequences are longer than {limit:,} tokens, first sequence {long[0]} with "
                f"{len(ids[long[0] - 1]):,}: give --on-long cut or skip, or --max-tokens as far as the model has positions."
            )
        if self._config.on_long == "skip":
            kept = [sequence for sequence in ids if len(sequence) <= limit]
            if not kept:
                raise InputError(f"All {len(ids)} sequences are longer than {limit:,} tokens.")
            return kept
        special = set(self._tokenizer.all_special_ids)
        return [_cut(sequence, limit, special) for sequence in ids]


class _Loss:
    """A lesson in the form of a model's forward pass, as `accumulate_gradients` calls it."""

    def __init__(self, lesson: Callable[[Student, Batch, Tensor], Tensor], student: Student) -> None:
        self._lesson = lesson
        self._student = student

    def __call__(self, *, num_items_in_batch: Tensor, **batch: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self._lesson(self._student, batch, num_items_in_batch))


def _kind(model: PreTrainedModel, tokenizer: Any) -> str:
    if model.can_generate():
        return "clm"
    masks = getattr(tokenizer, "mask_token_id", None) is not None
    return "mlm" if masks and model.get_output_embeddings() is not None else "encoder"


def _tokenizer(*folders: str | None) -> Any:
    """That of the first folder that has one.

    Raises:
        InputError: none has.
    """
    for folder in folders:
        if folder is not None:
            with contextlib.suppress(OSError, ValueError):
                return AutoTokenizer.from_pretrained(folder)
    raise InputError(
        f"{folders[0]}: there is no tokenizer in this folder to read sequences with; save the model's there."
    )


def _with_adapters(model: PreTrainedModel, modules: Any, rank: int, seed: int) -> nn.Module:
    """The model with low-rank adapters (2106.09685) in its attention modules, which alone are trained."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    inside = {id(part) for module in modules for part in module.modules()}
    targets = {
        name: part
        for name, part in model.named_modules()
        if id(part) in inside and isinstance(part, (nn.Linear, Conv1D))
    }
    if not targets:
        raise UnsupportedError(f"{type(model).__name__}: its attention layers hold no linear layers to adapt.")
    transposed = any(isinstance(part, Conv1D) for part in targets.values())
    torch.manual_seed(derive_seed(seed, "adapters"))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), fan_in_fan_out=transposed)
    return get_peft_model(model, config)


def _trained(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def _hooks(modules: dict[int, nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """While this is open, every module calls its hook with (module, arguments, keywords, output)."""
    handles = [module.register_forward_hook(make(number), with_kwargs=True) for number, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _real(batch: Batch) -> Tensor:
    """(B, L) float, 1 for a real token."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.float32) if mask is None else mask.float()


def _row_errors(found: Tensor, expected: Tensor, real: Tensor) -> Tensor:
    """|found - expected|^2 / |expected|^2 of each row's real tokens; (B, L, D), (B, L, D), (B, L) -> (B,)."""
    weights = real[..., None]
    error = ((found.float() - expected.float()).square() * weights).sum((1, 2))
    return error / (expected.float().square() * weights).sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)


def _embedding(output: Any, real: Tensor) -> Tensor:
    """The mean of a row's last hidden states, (B, D)."""
    return (output.hidden_states[-1].float() * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def _predicted(labels: Tensor, kind: str) -> Tensor:
    """(B, L) bool, where a prediction is made: at the hidden token, or at the token before."""
    return labels != IGNORED if kind == "mlm" else F.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED


def _targets(labels: Tensor, kind: str) -> Tensor:
    """What is to be predicted there, (predictions,)."""
    labels = labels if kind == "mlm" else labels[:, 1:]
    return labels[labels != IGNORED]


def _divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(expected || found) in nats, (N, V) -> (N,)."""
    found, wanted = F.log_softmax(logits.float(), -1), F.log_softmax(expected.float(), -1)
    return (wanted.exp() * (wanted - found)).sum(-1)


def _cut(sequence: Tensor, limit: int, special: set[int]) -> Tensor:
    """The beginning of a sequence, with the special token that it ends with."""
    if len(sequence) <= limit:
        return sequence
    last = sequence[-1:] if int(sequence[-1]) in special else sequence[:0]
    return torch.cat([sequence[: limit - len(last)], last])


def _resampled(rows: npt.NDArray[np.float64], figure: Callable[..., Any], seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of a figure of column sums, resampling rows."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap")))
    number = len(rows)
    totals = [np.bincount(generator.integers(number, size=number), minlength=number) @ rows for _ in range(_RESAMPLES)]
    low, high = np.nanquantile(figure(np.stack(totals, axis=1)), [0.025, 0.975])
    return float(low), float(high)


def _encoder_figures(columns: npt.NDArray[np.float64], seed: int) -> Figures:
    cosine, error = float(columns[:, 6].mean()), float(columns[:, 7].mean())
    rows = np.stack([columns[:, 6], np.ones(len(columns))], axis=1)
    interval = _resampled(rows, lambda sums: sums[0] / sums[1], seed)
    logged = {
        "loss": 1 - cosine,
        "sequences": len(columns),
        "cosine": cosine,
        "cosine_interval": interval,
        "hidden_error": error,
    }
    sentence = f"cosine of the embeddings to the teacher's {cosine:.4f}, error of the last hidden states {error:.3f}"
    return Figures("validation", logged, {"cosine": cosine, "hidden_error": error}, sentence)


def _language_figures(columns: npt.NDArray[np.float64], floor: npt.NDArray[np.float64], seed: int) -> Figures:
    rows = np.concatenate([columns[:, :3], floor[:, 1:2]], axis=1)

    def recovered(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        above = sums[2] - sums[3]
        return np.where(above > 0, (sums[1] - sums[3]) / np.where(above > 0, above, 1), np.nan)

    total = rows.sum(axis=0)
    count, share = total[0], float(recovered(total[:, None])[0])
    interval = _resampled(rows, recovered, seed) if not math.isnan(share) else None
    figures = {
        "accuracy": total[1] / count,
        "teacher_accuracy": total[2] / count,
        "floor_accuracy": total[3] / count,
        "teacher_loss": columns[:, 4].sum() / count,
        "divergence": columns[:, 5].sum() / count,
        "cosine": columns[:, 6].mean(),
        "hidden_error": columns[:, 7].mean(),
    }
    figures = {name: float(value) for name, value in figures.items()}
    logged = {
        "loss": float(columns[:, 3].sum() / count),
        "sequences": len(columns),
        "tokens": round(float(count)),
        **figures,
        "recovered": None if math.isnan(share) else share,
        "recovered_interval": interval,
    }
    recovery = "" if math.isnan(share) else f", {share:.1%} of the teacher's above the floor recovered"
    sentence = (
        f"accuracy {figures['accuracy']:.4f} (teacher {figures['teacher_accuracy']:.4f}, no attention "
        f"{figures['floor_accuracy']:.4f}){recovery}"
    )
    charted = {name: figures[name] for name in ("accuracy", "divergence", "cosine")}
    return Figures("validation", logged, charted, sentence)


def plot_quality(run: Path, picture: Path) -> None:
    """Draws the figures of the evaluations and the training loss in a run's log against the step.

    Arguments:
        run: the run folder.
        picture: the PNG to write.
    """
    from matplotlib.figure import Figure

    entries = read_log(run)
    measured = [entry for entry in entries if "evaluation" in entry]
    training = [(entry["step"], entry["loss"]) for entry in entries if "learning_rate" in entry]
    if not measured or not training:
        return  # the log has been removed: there is nothing to draw
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [entry["step"] for entry in measured]
    name = "accuracy" if "accuracy" in measured[0] else "cosine"
    left.plot(steps, [entry[name] for entry in measured], "o-", color="#c2410c", markersize=4, label="student")
    if name == "accuracy":
        left.axhline(measured[-1]["teacher_accuracy"], color="black", linestyle="--", linewidth=1, label="teacher")
        left.axhline(measured[-1]["floor_accuracy"], color="black", linestyle=":", linewidth=1, label="no attention")
    else:
        left.axhline(1.0, color="black", linestyle="--", linewidth=1, label="teacher")
    left.set(
        xlabel="optimizer step", ylabel={"cosine": "cosine to the teacher"}.get(name, name), title="Held-out sequences"
    )
    left.legend(frameon=False, fontsize="small")
    right.plot(*zip(*training, strict=True), color="#1f4e79", linewidth=0.8)
    right.set(xlabel="optimizer step", ylabel="training loss", title="Training", yscale="log")
    figure.savefig(picture, dpi=150)
