"""`predict`: proteins in, what a finetuned model says of them out, with how sure it can be.

A number comes with an interval, a label with a set of labels, and the label of a residue with such a set for each residue; the
truth is in it with the probability that was asked for, on proteins like those of the validation set of the finetuning (see
`performers.tools.conformal`). The model comes from `performers finetune`; it reads one chain per protein.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from performers import __version__
from performers.data import MAX_LENGTH, FastaReport
from performers.data.fasta import OnInvalid
from performers.errors import InputError
from performers.tools.conformal import label_sets
from performers.tools.engine import EngineName, choose_engine, use_own_gpu
from performers.tools.heads import HeadCard, HeadedModel
from performers.tools.jobs import run_tool
from performers.tools.language_model import Row, Unread
from performers.tools.proteins import Protein, Proteins, read_proteins
from performers.tools.tool import Outcome, Result, Tool, results_of


@dataclass(frozen=True)
class Prediction:
    """What a model says of one protein of L residues.

    Attributes:
        id, description: as in the input.
        number: the position in the input, counted from 1.
        prediction: a number, a label, or a string of one label per residue.
        interval: of a number; infinite where the calibration set was too small for the confidence.
        probabilities: float32 (C,) of the labels in order, or (L, C); None for a number.
        label_sets: the labels that cannot be ruled out, for the protein or for each residue; none for a number.
    """

    id: str
    description: str
    number: int
    prediction: float | str
    interval: tuple[float, float] | None = None
    probabilities: npt.NDArray[np.float32] | None = None
    label_sets: tuple[tuple[str, ...], ...] = ()


class Predictor(Tool[Protein]):
    """`predict` as a `Tool`.

    Arguments:
        model: what predicts.
        proteins: as `read_proteins` takes them.
        confidence: the probability that the truth is in an interval or a set.
        toks_per_batch: tokens in one forward pass.
        max_length, on_invalid: as in `read_proteins`.

    Raises:
        InputError: an argument is out of range.
    """

    command: ClassVar[str] = "predict"

    def __init__(
        self,
        model: HeadedModel,
        proteins: Proteins,
        *,
        confidence: float = 0.9,
        toks_per_batch: int = 16_384,
        max_length: int = MAX_LENGTH,
        on_invalid: OnInvalid = "error",
    ) -> None:
        if not 0 < confidence < 1 or toks_per_batch < 1:
            raise InputError(f"confidence is {confidence}: expected more than 0 and less than 1, such as 0.9.")
        self.model, self.card = model, model.card
        self.proteins, self.confidence = proteins, confidence
        self.toks_per_batch, self.max_length = toks_per_batch, max_length
        self.on_invalid: OnInvalid = on_invalid
        self.threshold = model.card.calibration.threshold(confidence)

    def items(self, report: FastaReport) -> Iterator[Protein]:
        """The proteins."""
        return read_proteins(self.proteins, max_length=self.max_length, on_invalid=self.on_invalid, report=report)

    def to_json(self, item: Protein) -> Any:
        """A list of four."""
        return item

    def from_json(self, content: Any) -> Protein:
        """The protein in a list of four."""
        identifier, description, chains, number = content
        return Protein(identifier, description, tuple(chains), number)

    def label(self, item: Protein) -> tuple[int, str]:
        """Number and identifier."""
        return item.number, item.id

    def tokens(self, item: Protein) -> int:
        """Residues, and two tokens for each chain."""
        return item.length + 2 * len(item.chains)

    def refusal(self, item: Protein) -> str | None:
        """Several chains, or more tokens than the model has positions for."""
        if len(item.chains) > 1:
            return f"it has {len(item.chains)} chains, and a head reads one"
        return self.model.refusal(self.tokens(item))

    def num_bytes(self, item: Protein) -> int:
        """A line of text."""
        return 16 * (4 + len(self.card.labels)) + (4 * item.length if self.card.kind == "residue" else 0)

    def compute(self, items: Sequence[Protein]) -> Sequence[Result]:
        """For each protein `said`: (1, 1) its number, (1, C) or (L, C) probabilities."""
        results: list[Result] = []
        rows: list[Row] = []
        places: list[int] = []
        for place, item in enumerate(items):
            refusal = self.refusal(item)
            results.append(Unread(refusal or "it was not read"))
            if refusal is None:
                places.append(place)
                rows.append(self.model.row(item.chains))
        for index, said in self._headed().predict(rows, toks_per_batch=self.toks_per_batch):
            results[places[index]] = said if isinstance(said, Unread) else {"said": said}
        return results

    def _headed(self) -> HeadedModel:
        """The model with its head; a worker of a cluster opens it as the tool begins to work there, without."""
        if not isinstance(self.model, HeadedModel):
            dtype = str(self.model.dtype).removeprefix("torch.")
            self.model = HeadedModel.of(self.model.folder, device=str(self.model.device), dtype=dtype)
        return self.model

    def write(self, results: Iterable[tuple[Protein, Result]], path: Path) -> None:
        """A CSV file, a line for each protein that has a prediction."""
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["id", *columns(self.card)])
            for item, result in results:
                if not isinstance(result, Unread):
                    writer.writerow([item.id, *cells(self.card, result["said"], self.threshold)])

    def methods(self, outcome: Outcome) -> str:
        """Two sentences."""
        card = self.card
        what = "intervals" if card.kind == "regression" else "sets of labels"
        return (
            f"{card.target} of {outcome.items - len(outcome.failed):,} proteins was predicted with performers {__version__} by "
            f"{self.model.name}, which was finetuned from the protein language model {card.base} "
            f"({self.model.num_parameters:,} parameters; {card.kind}). "
            f"Split-conformal {what} of {self.confidence:.0%} confidence were calibrated on {card.calibration.count:,} "
            f"validation {'residues' if card.kind == 'residue' else 'proteins'}."
        )


def predict(
    proteins: Proteins,
    model: HeadedModel | str | Path,
    *,
    confidence: float = 0.9,
    toks_per_batch: int = 16_384,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    device: str = "auto",
    dtype: str = "auto",
    failures: list[tuple[int, str, str]] | None = None,
) -> Iterator[Prediction]:
    """What a finetuned model says of proteins, in order, in bounded memory.

    ```text
    for protein in predict("proteins.fasta", "model"):
        print(protein.id, protein.prediction, protein.interval)
    ```

    Arguments:
        proteins: a FASTA, CSV, parquet, PDB or mmCIF file, several of them, or records.
        model: the folder that `finetune` made, or opened.
        confidence, toks_per_batch, max_length, on_invalid: as in `Predictor`.
        device, dtype: as in `LanguageModel.open`, for a folder.
        failures: gets number, identifier and reason of each protein that fails and is left out; without it the first raises.

    Raises:
        InputError: an argument, a protein or the folder is not in order.
        RunError: a protein failed and nobody takes the failures.
    """
    if not isinstance(model, HeadedModel):
        model = HeadedModel.of(model, device=device, dtype=dtype)
    options: dict[str, Any] = {"max_length": max_length, "on_invalid": on_invalid}
    tool = Predictor(model, proteins, confidence=confidence, toks_per_batch=toks_per_batch, **options)
    return (
        _prediction(tool, protein, result["said"])
        for protein, result in results_of(tool, tool.items(FastaReport()), failures)
    )


def predict_to(
    output: str | Path,
    sources: Sequence[str],
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    dry_run: bool = False,
    restart: bool = False,
    engine: EngineName = "auto",
    workers: int | None = None,
    **options: Any,
) -> Outcome:
    """`predict` into a CSV file, resumed where it was interrupted.

    Arguments:
        output: the file.
        sources: files, "-" or "bundled:NAME".
        model, device, dtype: as in `predict`.
        dry_run, restart: as in `run_tool`.
        engine, workers: where the work is done; as in `performers.tools.engine.choose_engine`.
        options: those of `Predictor`.

    Raises:
        InputError, RunError: as in `run_tool` and `Predictor`.
    """
    if Path(output).suffix.lower() != ".csv":
        raise InputError(f"{output}: expected a file whose name ends in .csv.")
    chosen_engine = choose_engine(engine, workers)
    use_own_gpu()
    tool = Predictor(HeadedModel.of(model, device=device, dtype=dtype), sources, **options)
    if math.isinf(tool.threshold):
        calibration = tool.card.calibration
        print(
            f"The model was calibrated on {calibration.count}: at a confidence of {tool.confidence:g}, which takes "
            f"{calibration.needed(tool.confidence)}, nothing can be ruled out.",
            file=sys.stderr,
        )
    settings = {
        "confidence": tool.confidence,
        "toks_per_batch": tool.toks_per_batch,
        "max_length": tool.max_length,
        "on_invalid": tool.on_invalid,
    }
    return run_tool(
        tool, output, sources=sources, settings=settings, dry_run=dry_run, restart=restart, engine=chosen_engine
    )


def columns(card: HeadCard) -> list[str]:
    """The columns of a prediction."""
    if card.kind == "regression":
        return ["prediction", "lower", "upper"]
    if card.kind == "classification":
        return ["prediction", "label_set", *(f"p_{label}" for label in card.labels)]
    return ["prediction", "label_sets", "probability"]


def cells(card: HeadCard, said: npt.NDArray[np.floating[Any]], threshold: float) -> list[str]:
    """The values in those columns; a set of residue labels is a letter, or several in brackets."""
    if card.kind == "regression":
        value = float(said[0, 0])
        return [f"{number:.7g}" for number in (value, value - threshold, value + threshold)]
    best = [card.labels[label] for label in said.argmax(axis=1)]
    sets = _sets(card, said, threshold)
    if card.kind == "classification":
        return [best[0], ";".join(sets[0]), *(f"{probability:.6f}" for probability in said[0])]
    shown = "".join(labels[0] if len(labels) == 1 else f"[{''.join(labels)}]" for labels in sets)
    return ["".join(best), shown, f"{said.max(axis=1).mean():.6f}"]


def _sets(card: HeadCard, said: npt.NDArray[np.floating[Any]], threshold: float) -> tuple[tuple[str, ...], ...]:
    chosen = label_sets(said.astype(np.float64), threshold)
    return tuple(tuple(card.labels[label] for label in np.flatnonzero(row)) for row in chosen)


def _prediction(tool: Predictor, protein: Protein, said: npt.NDArray[np.float32]) -> Prediction:
    card, threshold = tool.card, tool.threshold
    if card.kind == "regression":
        value = float(said[0, 0])
        interval = (value - threshold, value + threshold)
        return Prediction(protein.id, protein.description, protein.number, value, interval)
    best = [card.labels[label] for label in said.argmax(axis=1)]
    one = card.kind == "classification"
    return Prediction(
        protein.id,
        protein.description,
        protein.number,
        best[0] if one else "".join(best),
        probabilities=said[0] if one else said,
        label_sets=_sets(card, said, threshold),
    )
