"""`interact train`: pairs of proteins and whether they interact in, a model of interactions out.

The proteins are read once by a language model that stays as it is (by default), or are read in every step by one that is
trained along. The pairs are split so that no relative of a held-out protein is learned from; one held-out part chooses the
step whose weights are kept, the other measures them, once, beside the baselines, and the verdict goes into the folder's card.
Steps, checkpoints and resuming are those of every training (`performers.training.loop`); what a step computes is in `learning`.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from performers.data import MAX_LENGTH, FastaReport
from performers.errors import CheckpointError, InputError
from performers.folders import write_file
from performers.tools.interactions.pairs import SETS, LeftOut, labelled_pairs, split_pairs
from performers.tools.proteins import CHAIN_BREAK, Protein, read_proteins
from performers.training.configuration import Number, Paths, TrainConfig
from performers.training.run_folder import RunResult, run_task
from performers.training.runs import describe_file
from performers.training.task import Figures, Task

if TYPE_CHECKING:
    import torch

    from performers.tools.language_model import LanguageModel
    from performers.training.distributed import World

PAIRS, PROTEINS, LEFT_OUT, SPLIT, SUMMARIES, WEIGHTS = (
    "pairs.tsv", "proteins.tsv", "left-out.tsv", "split.json", "proteins", "weights.json"
)  # fmt: skip


class _Interacting(BaseModel):
    """The keys of this training alone: which proteins and pairs, read by which model, how split and how joined."""

    input: Paths = Field(min_length=1, description="The proteins: FASTA files (.gz too), '-' for stdin.")
    pairs: str = Field(min_length=1, description="TSV of two identifiers and a label, 1 or 0; .gz too.")
    model: str | None = Field(
        None, description="Folder of a Performer, of a converted model, or of a Hugging Face protein model."
    )
    split: Literal["cluster", "random"] = Field(
        "cluster", description="No relatives across sets (needs MMseqs2), or pairs at random, which flatters."
    )
    held_out: Number = Field(
        0.15, gt=0, lt=0.5, description="Share held out to choose the weights, and again to measure them."
    )
    identity: Number = Field(0.4, gt=0, le=1, description="Identity of a cluster, a fraction.")
    together: Literal["states", "body"] = Field(
        "states",
        description="Proteins are read once and their attention states added, or read anew in every pair through all layers.",
    )
    train_body: bool = Field(False, description="Train the Performer too, not the head alone.")
    decoys: int = Field(6, ge=0, le=1000, description="Up to so many other proteins join a pair's context.")
    num_features: int = Field(32, ge=1, description="Random features of the states.")
    rank: int = Field(32, ge=1, description="Dimensions in which pairs are compared.")
    toks_per_batch: int = Field(16_384, ge=1, description="Tokens in one forward pass of the language model.")
    max_length: int = Field(MAX_LENGTH, ge=1, description="Residues; a longer record is refused, never cut.")
    on_invalid: Literal["error", "x", "skip"] = Field(
        "error", description="A character that is no residue: stop, X, or skip."
    )


class InteractConfig(TrainConfig, _Interacting):
    """The keys of `interact train`: those of every training, and the above."""

    FREE_ON_RESUME: ClassVar[frozenset[str]] = TrainConfig.FREE_ON_RESUME | {"toks_per_batch"}

    steps: int = Field(1000, ge=1, le=2**40, description="Optimizer steps.")
    batch_size: int = Field(128, ge=1, le=2**24, description="Pairs in one optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Pairs in one forward pass of one process; gradients accumulate. [all at once]"
    )
    learning_rate: Number = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    clip: Number = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")

    @model_validator(mode="after")
    def _body(self) -> Self:
        if self.train_body and self.decoys and self.together == "body":
            raise ValueError(
                "decoys and train_body with together='body' exclude each other: every decoy would be read with a gradient; "
                "give decoys=0."
            )
        return self


def train_interactions(
    proteins: str | Path | list[str],
    pairs: str | Path,
    output: str | Path,
    model: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Trains a model of interactions, or goes on with the run that the output folder holds.

    Arguments:
        proteins: FASTA files.
        pairs: a TSV file with labels.
        output: the run folder.
        model: the folder of a language model.
        settings: further keys of `InteractConfig`.

    Returns:
        What the run leaves; `InteractionModel.open(result.model)` opens the model.

    Raises:
        InputError: an input, a setting, the output folder or a checkpoint is not in order.
        UnsupportedError: the language model cannot do what is asked.
        NonFiniteError, DiskFullError, KeyboardInterrupt, SystemExit: as `performers.pretrain`.
    """
    files = [str(file) for file in (proteins if isinstance(proteins, list) else [proteins])]
    values: dict[str, Any] = {"input": files, "pairs": str(pairs), "output": str(output), **settings}
    if model is not None:
        values["model"] = str(model)
    return run_task(Interaction(InteractConfig.for_run(values)))


class Interaction(Task[InteractConfig]):
    """Learning which proteins interact."""

    command: ClassVar[str] = "interact train"
    elsewhere: ClassVar[str] = "with another --output to train another model"
    needs_less: ClassVar[str] = "A smaller --micro-batch-size or --toks-per-batch needs less."

    def check(self, *, begun: bool) -> None:
        """Opens the language model, and reads and splits the pairs of a run that begins."""
        from performers.tools.interactions.model import check_together

        check_together(self.body, "body" if self.config.train_body else self.config.together)
        if not begun:
            self._files = self._read()

    @functools.cached_property
    def body(self) -> LanguageModel:
        """The language model."""
        from performers.tools.language_model import LanguageModel

        return LanguageModel.open(self.config.model, device=self.config.device, dtype=self.config.dtype)

    def discard(self, run: Path, began: dict[str, Any]) -> None:
        """Removes the pairs, which are read again, and what the language model made of the proteins."""
        for name in (PAIRS, PROTEINS, LEFT_OUT, SPLIT, WEIGHTS):
            (run / name).unlink(missing_ok=True)
        shutil.rmtree(run / SUMMARIES, ignore_errors=True)
        self._files = self._read()

    def prepare(self, run: Path) -> None:
        """Keeps the proteins and the split in the run folder, and reads the proteins if the language model stays as it is.

        Raises:
            CheckpointError: the language model's weights have changed since the run began.
        """
        for name, text in getattr(self, "_files", {}).items():
            write_file(run / name, text)
        weights = self.body.fingerprint()
        if not (run / WEIGHTS).is_file():
            write_file(run / WEIGHTS, json.dumps(weights, indent=1) + "\n")
        if json.loads((run / WEIGHTS).read_text(encoding="utf-8")) != weights:
            raise CheckpointError(
                f"{self.body.folder} is not what it was when the run in {run} began; give a new run folder."
            )
        if not self.config.train_body and not (run / SUMMARIES).is_dir():
            from performers.tools.interactions.summaries import Summariser
            from performers.tools.jobs import run_tool

            config = self.config
            source = [str(run / PROTEINS)]
            options = {"toks_per_batch": config.toks_per_batch, "num_features": config.num_features}
            tool = Summariser(self.body, source, **options)
            run_tool(tool, run / SUMMARIES, sources=source, settings=options)

    def inputs(self) -> list[dict[str, Any]]:
        """The proteins and pairs as the run folder holds them, and the weights."""
        run = Path(self.config.output)
        return [describe_file(file) for file in (run / PROTEINS, run / PAIRS, *self.body.weights)]

    def open(self, checkpoint: Path | None) -> torch.nn.Module:
        """The head, with the Performer if that is trained."""
        from performers.tools.interactions.learning import Lessons

        self._lessons = Lessons(self.config, self.body)
        return self._lessons.model(checkpoint)

    def describe(self) -> str:
        """Pairs."""
        counts = self._lessons.counts
        return f"{counts['train']:,} pairs, {counts['selection']:,} to choose with, {counts['test']:,} to measure on"

    def accumulate(self, model: Any, step: int, world: World, dtype: torch.dtype) -> torch.Tensor:
        """The cross-entropy of a batch of pairs."""
        return self._lessons.accumulate(model, step, world, dtype)

    def tokens(self, step: int) -> int:
        """Residues of the pairs of the step."""
        return self._lessons.tokens(step)

    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        """The pairs to choose with; the weights that do best on them are kept."""
        yield from self._lessons.evaluate(model, world, dtype)

    def save(self, model: Any, folder: Path, *, finished: bool) -> None:
        """What is trained and the best so far, or the finished model, measured beside its baselines."""
        if finished:
            self._lessons.save_model(model, folder)
        else:
            self._lessons.save_checkpoint(model, folder)

    def picture(self, run: Path) -> None:
        """The loss against the step."""
        from performers.training.plots import plot_loss

        plot_loss(run / "log.jsonl", run / "loss.png", "interactions")

    def _read(self) -> dict[str, str]:
        """The files of the run folder: the proteins that are used, the pairs and their sets, what is left out, the counts."""
        config = self.config
        report = FastaReport()
        known = by_identifier(
            read_proteins(config.input, max_length=config.max_length, on_invalid=config.on_invalid, report=report)
        )
        proteins = list(known.values())
        labelled = labelled_pairs(config.pairs, {name: number for number, name in enumerate(known)})
        if len(set(labelled.labels.tolist())) == 1:
            raise InputError(
                f"{config.pairs}: all usable pairs are labelled {labelled.labels[0]}; expected pairs that interact (1) and pairs "
                "that do not (0)."
            )
        for remark in report.remarks():
            _say(remark)
        split = split_pairs(
            ["".join(protein.chains) for protein in proteins],
            labelled,
            by=config.split,
            held_out=config.held_out,
            identity=config.identity,
            seed=config.seed,
            threads=config.threads,
        )
        if config.split == "random":
            _say(
                "--split random puts the same proteins and their relatives on both sides: its figures flatter any model, and "
                "say nothing of new proteins."
            )
        if not split.measured:
            _say(
                "There are too few pairs to hold any out: all are learned from, nothing is measured, and the model's card says "
                "so."
            )
        counts = Counter(SETS[number] if number >= 0 else "between" for number in split.sets.tolist())
        if counts["between"]:
            _say(f"Between two sets of proteins, and in none: {counts['between']:,} of {len(labelled.pairs):,} pairs.")
        if labelled.duplicates:
            rows = "1 row repeats" if labelled.duplicates == 1 else f"{labelled.duplicates:,} rows repeat"
            _say(f"{rows} an earlier pair.")
        say_left_out(labelled.left_out, Path(config.output) / LEFT_OUT)
        names = list(known)
        rows = [
            (names[a], names[b], str(label), SETS[number] if number >= 0 else "between")
            for (a, b), label, number in zip(
                labelled.pairs.tolist(), labelled.labels.tolist(), split.sets.tolist(), strict=True
            )
        ]
        used = {name for row in rows for name in row[:2]}
        sequences = [(name, CHAIN_BREAK.join(known[name].chains)) for name in names if name in used]
        files = {
            PAIRS: _tsv(("a", "b", "label", "set"), rows),
            PROTEINS: _tsv(("id", "sequence"), sequences),
            SPLIT: json.dumps({"by": config.split, "measured": split.measured, **counts}, indent=1) + "\n",
        }
        if labelled.left_out:
            files[LEFT_OUT] = left_out_table(labelled.left_out)
        return files


def by_identifier(proteins: Iterator[Protein]) -> dict[str, Protein]:
    """Proteins by their identifiers; the same protein twice is taken once.

    Raises:
        InputError: two different proteins share an identifier, so that a pair could mean either.
    """
    known: dict[str, Protein] = {}
    for protein in proteins:
        if known.setdefault(protein.id, protein).chains != protein.chains:
            raise InputError(
                f"Records {known[protein.id].number:,} and {protein.number:,} are both called {protein.id!r} and differ; "
                "expected identifiers that name one protein."
            )
    return known


def left_out_table(left_out: list[LeftOut]) -> str:
    """A TSV of what is left out, and why."""
    return _tsv(("row", "name", "reason"), [(str(number), name, reason) for number, name, reason in left_out])


def say_left_out(left_out: list[LeftOut], path: Path) -> None:
    """Says on stderr what is left out, the first few by name."""
    for number, name, reason in left_out[:5]:
        _say(f"Row {number:,} ({name}): {reason}.")
    if left_out:
        problems = "1 such problem" if len(left_out) == 1 else f"{len(left_out):,} such problems"
        _say(f"{problems} in {path}; the other rows are used.")


def _tsv(header: tuple[str, ...], rows: list[Any]) -> str:
    return "".join("\t".join(" ".join(str(cell).split()) for cell in row) + "\n" for row in (header, *rows))


def read_split(run: Path) -> tuple[dict[str, Protein], dict[str, list[tuple[str, str, int]]]]:
    """The proteins of a run, and the pairs of each set."""
    known = by_identifier(read_proteins([str(run / PROTEINS)]))
    sets: dict[str, list[tuple[str, str, int]]] = {name: [] for name in (*SETS, "between")}
    with (run / PAIRS).open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            sets[row["set"]].append((row["a"], row["b"], int(row["label"])))
    return known, sets


def left_out_of(run: Path) -> int:
    """How many problems a run's pairs and proteins had."""
    tables = [path for path in (run / LEFT_OUT, run / SUMMARIES / "failed.tsv") if path.is_file()]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) - 1 for path in tables)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
