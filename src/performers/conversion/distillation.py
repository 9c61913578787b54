"""Winning back what a conversion cost: a converted model learns from the original, on sequences without labels.

The converted model is the student; the original, which is the same weights with exact attention, is the teacher. First every
converted attention layer learns on its own to give the teacher's outputs for the teacher's inputs, so that no layer has to make
up for the errors of those before it; then the whole model learns the teacher's predictions. Plain fine-tuning on the original
objective is there, too. Sequences come in from FASTA or text files, a run folder goes out, whose `model/` opens with
`performers.load`. Steps, checkpoints and resuming are those of every training (`performers.training.loop`); what a step computes
is in `performers.conversion.teaching`. Torch is imported only when the inputs are in order.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from performers.conversion.sequences import read_sequences
from performers.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from performers.folders import sha256_of, write_file
from performers.randomness import derive_seed
from performers.training.configuration import Names, Number, Paths, TrainConfig
from performers.training.run_folder import RunResult, run_task
from performers.training.runs import describe_file
from performers.training.task import Figures, Task

if TYPE_CHECKING:
    import torch

    from performers.training.distributed import World

STAGES = ("layers", "end")
_DEFAULT_STAGES = ["layers:300", "end:700"]
_WEIGHTS = "weights.json"
_ALL = sys.maxsize - 1


class _Distilling(BaseModel):
    """The keys of distillation alone: who learns from whom, on what, and how well it is measured."""

    model: str = Field(
        min_length=1, description="The converted model's folder: the student, as performers convert wrote it."
    )
    input: Paths = Field(
        min_length=1, description="Sequences: FASTA files, or text files with one a line; .gz too, '-' for stdin."
    )
    teacher: str | None = Field(
        None, description="The original model's folder. [the converted model's weights with exact attention]"
    )
    objective: Literal["distil", "finetune"] = Field(
        "distil", description="Learn the teacher's outputs, or the model's original objective on the sequences."
    )
    stages: Names | None = Field(
        None,
        description="Steps layer by layer, then end to end, as layers:300,end:700. [those, or 3/10 and 7/10 of the steps]",
    )
    layers_learning_rate: Number = Field(2e-4, gt=0, description="Peak learning rate layer by layer.")
    lora: int | None = Field(
        None,
        ge=1,
        description="Train adapters of this rank in the attention layers only (needs peft); merged at the end.",
    )
    dropout: bool = Field(False, description="Keep the model's dropout while it is trained.")
    mask_proportion: Number = Field(0.15, gt=0, lt=1, description="Share of the tokens hidden from a masked model.")
    max_tokens: int | None = Field(
        None, ge=3, description="Longest sequence in tokens. [as many as the model has learned positions for]"
    )
    on_long: Literal["error", "cut", "skip"] = Field(
        "error", description="What to do with a longer sequence: stop, read its beginning, or leave it out."
    )
    validation: Paths = Field(
        [], description="Sequences to measure on, which are not trained on. [a part of the input]"
    )
    held_out: Number = Field(0.1, gt=0, lt=1, description="Share of the input to measure on, without --validation.")
    evaluate_sequences: int = Field(256, ge=1, description="At most so many sequences are measured on.")
    evaluate_tokens: int = Field(8192, ge=1, description="Tokens evaluated at once.")


class DistilConfig(TrainConfig, _Distilling):
    """The keys of a distillation: those of every training, and who learns from whom, on what."""

    FREE_ON_RESUME: ClassVar[frozenset[str]] = TrainConfig.FREE_ON_RESUME | {"evaluate_sequences", "evaluate_tokens"}

    steps: int = Field(1000, ge=1, le=2**40, description="Optimizer steps; with --stages their sum.")
    batch_size: int = Field(16, ge=1, le=2**24, description="Sequences in one optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Sequences in one forward pass of one process; gradients accumulate. [all at once]"
    )
    learning_rate: Number = Field(2e-5, gt=0, description="Peak learning rate of AdamW, end to end and in fine-tuning.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up in each stage. [a tenth of the stage, at most 1000]"
    )
    weight_decay: Number = Field(0.0, ge=0, description="Weight decay of matrices; biases and norms have none.")
    clip: Number = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")

    @model_validator(mode="before")
    @classmethod
    def _steps_and_stages(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if values.get("objective") == "finetune":
            if values.get("stages"):
                raise ValueError("stages and objective='finetune' exclude each other: give steps.")
            return values
        stages, steps = values.get("stages"), values.get("steps")
        if stages is None and isinstance(steps, int) and steps > 0:
            alone = round(0.3 * steps)
            values["stages"] = [*([f"layers:{alone}"] if alone else []), f"end:{steps - alone}"]
        elif stages is None:
            values["stages"] = _DEFAULT_STAGES
        if "steps" not in values:
            lengths = [length for _, length in _parsed(values["stages"])]
            values["steps"] = sum(lengths)
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.final_learning_rate > self.layers_learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate}: expected at most layers_learning_rate="
                f"{self.layers_learning_rate}."
            )
        if self.stages is not None:
            if sum(length for _, length in _parsed(self.stages)) != self.steps:
                raise ValueError(f"stages={','.join(self.stages)}: expected their sum to be steps={self.steps}.")
            shortest = min(length for _, length in _parsed(self.stages))
            if self.warmup_steps is not None and self.warmup_steps >= shortest:
                raise ValueError(f"warmup_steps={self.warmup_steps}: expected fewer than a stage has, {shortest}.")
        return self

    def stage_at(self, step: int) -> tuple[str, int, int]:
        """The stage of a step, "layers", "end" or "finetune", its first step and its number of steps."""
        if self.stages is None:
            return "finetune", 0, self.steps
        first = 0
        for name, length in _parsed(self.stages):
            if step < first + length:
                return name, first, length
            first += length
        raise ConfigError(f"step {step} is after the last stage.")

    def learning_rate_at(self, step: int) -> float:
        """The schedule of any training, anew in each stage."""
        stage, first, length = self.stage_at(step)
        peak = self.layers_learning_rate if stage == "layers" else self.learning_rate
        return self.scheduled(step - first, length, peak)


def _parsed(stages: Any) -> list[tuple[str, int]]:
    """("layers:300", "end:700") as names and steps.

    Raises:
        ValueError: something else.
    """
    try:
        stages = (stages if isinstance(stages, str) else ",".join(stages)).split(",")
        found = [(name.strip(), int(steps)) for name, steps in (stage.split(":") for stage in stages)]
        if [name for name, _ in found] not in (["layers"], ["end"], list(STAGES)) or any(n < 1 for _, n in found):
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        shown = ",".join(map(str, stages)) if isinstance(stages, (list, tuple)) else stages
        raise ValueError(f"stages={shown}: expected layers:STEPS, end:STEPS, or both in this order.") from None
    return found


def distil(
    model: str | Path,
    data: str | Path | list[str],
    output: str | Path,
    *,
    teacher: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Trains a converted model to do what the original did, or goes on with the run that the output folder holds.

    Arguments:
        model: the folder of a converted model, from `performers.convert(...)` and `save_pretrained`.
        data: FASTA or text files with sequences.
        output: the run folder.
        teacher: the folder of the original; None for the weights of `model` with exact attention.
        settings: further keys of `DistilConfig`, as in stages=["layers:300", "end:700"], lora=8.

    Returns:
        What the run leaves; `performers.load(result.model)` opens the model.

    Raises:
        InputError: an input, a setting, the output folder or a checkpoint is not in order.
        UnsupportedError: the model cannot learn what is asked.
        NonFiniteError, DiskFullError, KeyboardInterrupt, SystemExit: as `performers.pretrain`.
    """
    files = [str(file) for file in (data if isinstance(data, list) else [data])]
    values = {"model": str(model), "input": files, "output": str(output), **settings}
    if teacher is not None:
        values["teacher"] = str(teacher)
    return run_task(Distillation(DistilConfig.for_run(values)))


class Distillation(Task[DistilConfig]):
    """A converted model that learns from its original, or goes on with its original objective."""

    command: ClassVar[str] = "distil"
    evaluates_at_the_start: ClassVar[bool] = True
    elsewhere: ClassVar[str] = "with {model} as the model and --teacher to go on from its weights"
    needs_less: ClassVar[str] = "A smaller --micro-batch-size or --max-tokens needs less, and so does --lora."

    def check(self, *, begun: bool) -> None:
        """Refuses what is no converted model, and reads the sequences of a run that begins."""
        config = self.config
        if config.lora is not None and importlib.util.find_spec("peft") is None:
            raise MissingExtraError("peft", "peft", "--lora")
        content = _configuration(Path(config.model))
        if not content.get("performers"):
            raise InputError(f"{config.model} is not a converted model: convert it first, with performers convert.")
        if content.get(DISTILLED) and config.teacher is None:
            raise InputError(
                f"{config.model} was trained after its conversion, so its weights are no longer the original's: give the "
                f"original with --teacher."
            )
        if config.teacher is not None:
            _configuration(Path(config.teacher))
        if not begun:
            self._texts = self._read()

    def discard(self, run: Path, began: dict[str, Any]) -> None:
        """Removes the sequences, which are read again."""
        for name in (*_FILES, _WEIGHTS):
            (run / name).unlink(missing_ok=True)
        self._texts = self._read()

    def prepare(self, run: Path) -> None:
        """Keeps the sequences in the run folder, so that it goes on with the same ones, and notes whose weights it began with.

        Raises:
            CheckpointError: the student's or the teacher's weights have changed since.
        """
        if hasattr(self, "_texts"):
            for name, texts in zip(_FILES, self._texts, strict=True):
                write_file(run / name, "".join(f"{text}\n" for text in texts))
        self.training, self.validation = ((run / name).read_text(encoding="utf-8").splitlines() for name in _FILES)
        weights = {str(file): sha256_of(file) for file in self._weights()}
        path = run / _WEIGHTS
        if not path.is_file():
            write_file(path, json.dumps(weights, indent=1) + "\n")
        began = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in weights | began if weights.get(name) != began.get(name)]
        if changed:
            raise CheckpointError(
                f"{changed[0]} is not what it was when the run in {run} began; give a new run folder."
            )

    def inputs(self) -> list[dict[str, Any]]:
        """The sequences as the run folder holds them, and the weights."""
        run = Path(self.config.output)
        return [describe_file(file) for file in (*(run / name for name in _FILES), *self._weights())]

    def open(self, checkpoint: Path | None) -> torch.nn.Module:
        """The student; the teacher is kept beside it, and neither saved nor trained."""
        from performers.conversion.teaching import Classroom

        self._classroom = Classroom(self.config, self.training, self.validation)
        return self._classroom.student(checkpoint)

    def describe(self) -> str:
        """Sequences."""
        return f"{len(self._classroom.training):,} sequences, {len(self._classroom.validation):,} held out"

    def accumulate(self, model: Any, step: int, world: World, dtype: torch.dtype) -> torch.Tensor:
        """One lesson."""
        return self._classroom.accumulate(model, step, world, dtype)

    def tokens(self, step: int) -> int:
        """Of whole sequences, so steps differ."""
        return self._classroom.tokens(step)

    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        """The student beside the teacher and the floor, on sequences that are not trained on."""
        yield self._classroom.measure(model, world, dtype)

    def save(self, model: Any, folder: Path, *, finished: bool) -> None:
        """What is trained, or the whole converted model with its tokenizer."""
        if finished:
            self._classroom.save_model(model, folder)
        else:
            self._classroom.save_trained(model, folder)

    def picture(self, run: Path) -> None:
        """Quality and training loss against the step."""
        from performers.conversion.teaching import plot_quality

        plot_quality(run, run / "quality.png")

    def _weights(self) -> list[Path]:
        folders = [Path(folder) for folder in (self.config.model, self.config.teacher) if folder is not None]
        found = [sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")) for folder in folders]
        return [file for files in found for file in files]

    def _read(self) -> tuple[list[str], list[str]]:
        """Sequences to train on, and to measure on: other files, or a part drawn with the seed, repeats on one side.

        Raises:
            InputError: there are too few.
        """
        config = self.config
        texts, _ = read_sequences(config.input, _ALL)
        if config.validation:
            return texts, read_sequences(config.validation, _ALL)[0]
        bound = int(config.held_out * 2**63)
        held_out = [derive_seed(config.seed, "held out", text) < bound for text in texts]
        training = [text for text, held in zip(texts, held_out, strict=True) if not held]
        validation = [text for text, held in zip(texts, held_out, strict=True) if held]
        if not training or not validation:
            raise InputError(
                f"{', '.join(config.input)}: {len(texts)} sequences are too few to hold out {config.held_out:.0%} of them; give "
                f"more, or others with --validation."
            )
        return training, validation


DISTILLED = "performers_trained"
"""The key of a model's config.json that says that its weights are no longer the original's."""

_FILES = ("sequences.txt", "validation.txt")


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise CheckpointError(f"{folder}: expected the folder of a model, with config.json and model.safetensors.")
