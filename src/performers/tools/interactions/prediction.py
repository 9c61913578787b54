"""`interact predict`: proteins in, and the probability that they interact for pairs, for all pairs, or for groups.

Every protein is read once, in shards that are kept and resumed; then pairs are scored as they stream from their file, so that
memory holds proteins and not pairs. A group is one context: its proteins are read in the presence of all others, and one reading
gives the matrix of all its pairs. Rows that name proteins that are not there are listed, and the others scored.
"""

from __future__ import annotations

import itertools
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from performers.data import FastaReport
from performers.errors import InputError
from performers.folders import sha256_of
from performers.tools.interactions.figures import calibration, draw_calibration, measure
from performers.tools.interactions.model import HEAD, SETTINGS, InteractionModel
from performers.tools.interactions.pairs import Group, LeftOut, Unknown, read_groups, read_pairs
from performers.tools.interactions.scorer import Scorer
from performers.tools.interactions.summaries import Summariser
from performers.tools.interactions.training import by_identifier
from performers.tools.jobs import run_tool
from performers.tools.language_model import Unread
from performers.tools.proteins import Protein
from performers.tools.tool import Outcome, Result, Written

_CHUNK = 8192
_COLUMNS = ("p0", "p1", "prob")


class _Asked(NamedTuple):
    """A pair to score: the number of its row, identifiers, and its label or -1."""

    number: int
    a: str
    b: str
    label: int


class Predictor(Summariser):
    """`interact predict` as a `Tool`: its items are proteins, and `write` scores the pairs.

    Arguments:
        model: what scores.
        sources: files of proteins.
        pairs, groups: the file of pairs, or of groups; neither for all pairs.
        thresh: pairs of at least this probability are also written on their own.
        as_table: whether the output is one .tsv file, with the others beside it; else a folder.
        options: those of `Embedder`: toks_per_batch, max_length, on_invalid.
    """

    command: ClassVar[str] = "interact predict"
    noun: ClassVar[str] = "pairs"

    def __init__(
        self,
        model: InteractionModel,
        sources: Sequence[str],
        *,
        pairs: str | None = None,
        groups: str | None = None,
        thresh: float = 0.5,
        as_table: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model.body, sources, num_features=model.settings.shape.num_features, **options)
        self._interactions, self._pairs, self._groups, self._thresh = model, pairs, groups, thresh
        self.makes_folder = not as_table

    def items(self, report: FastaReport) -> Iterator[Protein]:
        """The proteins that are named, each once."""
        named: set[str] | None = None
        if self._pairs is not None:
            named = {name for pair in read_pairs(self._pairs) for name in (pair.a, pair.b)}
        elif self._groups is not None:
            named = {name for group in read_groups(self._groups) for name in group.members}
        known = by_identifier(super().items(report))
        if named is not None and named.isdisjoint(known):
            example = next(iter(sorted(named)), "none")
            raise InputError(
                f"{self._pairs or self._groups} names none of the {len(known):,} proteins; its first identifier is {example}."
            )
        yield from (protein for name, protein in known.items() if named is None or name in named)

    def about(self, report: FastaReport) -> str:
        """How many there are in the files."""
        return f"{report.records:,} proteins, {report.residues:,} residues"

    def write(self, results: Iterable[tuple[Protein, Result]], path: Path) -> Written:
        """Predictions, those above the threshold, and with labels the figures and the calibration curve."""
        if self.makes_folder:
            path.mkdir()
        header = _COLUMNS if self._groups is None else (*_COLUMNS, "group")
        outputs = _Outputs(path, header, self.makes_folder, self._thresh)
        scorer = Scorer(self._interactions, self.toks_per_batch)
        failed: list[tuple[int, str, str]] = []
        for protein, result in results:
            if isinstance(result, Unread):
                failed.append((protein.number, protein.id, result.reason))
            else:
                scorer.add(protein, result)
        places = {protein.id: place for place, protein in enumerate(scorer.proteins)}
        with outputs:
            left_out = self._score_groups(scorer, places, outputs) if self._groups is not None else []
            if self._groups is None:
                left_out = self._score_pairs(scorer, places, outputs)
        outcome = outputs.figures(self._interactions)
        unread = {name for _, name, _ in failed}
        failed += [(number, name, reason) for number, name, reason in left_out if name not in unread]
        return Written(outputs.count + len(failed), failed, outcome)

    def _score_pairs(self, scorer: Scorer, places: dict[str, int], outputs: _Outputs) -> list[LeftOut]:
        unknown = Unknown(places, "pairs")
        left_out: list[LeftOut] = []
        chunk: list[_Asked] = []

        def score() -> None:
            table = np.array([[places[pair.a], places[pair.b]] for pair in chunk], dtype=np.int64)
            logits = scorer.pairs(table)
            read = ~np.isnan(logits)
            for place in np.flatnonzero(~read).tolist():
                pair, reason = chunk[place], scorer.unread[tuple(sorted(table[place].tolist()))]
                left_out.append(LeftOut(pair.number, f"{pair.a} {pair.b}", reason))
            outputs.add(list(itertools.compress(chunk, read)), table[read], logits[read])
            chunk.clear()

        for pair in self._asked(places):
            if unknown.refuses(pair.number, pair.a, pair.b):
                continue
            if pair.a == pair.b:
                left_out.append(LeftOut(pair.number, f"{pair.a} {pair.b}", "it is a pair of a protein with itself"))
                continue
            chunk.append(pair)
            if len(chunk) == _CHUNK:
                score()
        if chunk:
            score()
        return sorted([*left_out, *unknown.left_out()])

    def _asked(self, places: dict[str, int]) -> Iterator[_Asked]:
        if self._pairs is not None:
            for pair in read_pairs(self._pairs):
                yield _Asked(pair.number, pair.a, pair.b, -1 if pair.label is None else pair.label)
            return
        names = list(places)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                yield _Asked(0, a, b, -1)

    def _score_groups(self, scorer: Scorer, places: dict[str, int], outputs: _Outputs) -> list[LeftOut]:
        assert self._groups is not None
        unknown = Unknown(places, "groups")
        left_out: list[LeftOut] = []
        for group in read_groups(self._groups):
            for name in group.members:
                unknown.refuses(group.number, name)
            members = [name for name in group.members if name in places]
            if len(members) < 2:
                reason = f"it has {len(members)} known proteins, and a group needs two"
                left_out.append(LeftOut(group.number, group.name, reason))
                continue
            context = [places[name] for name in members]
            matrix = scorer.group(context)
            reason = scorer.unread.get(tuple(sorted(context)))
            if reason is not None:
                left_out.append(LeftOut(group.number, group.name, reason))
                continue
            outputs.add_group(group, members, matrix)
        return sorted([*left_out, *unknown.left_out()])

    def methods(self, outcome: Outcome) -> str:
        """A few sentences."""
        settings = self._interactions.settings
        how = (
            "each read once, and their attention states were added up to the context of a pair or group"
            if settings.together == "states"
            else "read together, pair by pair or group by group"
        )
        return (
            f"Interactions were predicted with performers from sequences alone; proteins were {how}. The model, on the language "
            f"model {self.model.name}, is {settings.verdict}."
        )


class _Outputs:
    """The files of a prediction, written row by row."""

    def __init__(self, path: Path, header: tuple[str, ...], is_folder: bool, thresh: float) -> None:
        self._header = header
        stem = path.name.removesuffix(".tsv")
        self._files = {
            "predictions": path / "predictions.tsv" if is_folder else path,
            "positives": path / "positives.tsv" if is_folder else path.with_name(f"{stem}.positives.tsv"),
        }
        self._picture = path / "calibration.png" if is_folder else path.with_name(f"{stem}.calibration.png")
        self._figures = path / "figures.json" if is_folder else path.with_name(f"{stem}.figures.json")
        self._matrices = path / "matrices" if is_folder else None
        self.count = self._positives = self._groups = 0
        self.thresh = thresh
        self._labels, self._logits = array("b"), array("d")
        self._ends = array("q")

    def __enter__(self) -> _Outputs:
        self._stack = ExitStack()
        self._streams: dict[str, TextIO] = {
            name: self._stack.enter_context(file.open("w", encoding="utf-8", newline=""))
            for name, file in self._files.items()
        }
        for stream in self._streams.values():
            stream.write("\t".join(self._header) + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _write(self, rows: Iterable[tuple[str, ...]], probabilities: npt.NDArray[np.float64]) -> None:
        everything, positives = self._streams["predictions"], self._streams["positives"]
        for row, probability in zip(rows, probabilities.tolist(), strict=True):
            line = "\t".join((row[0], row[1], f"{probability:.8f}", *row[2:])) + "\n"
            everything.write(line)
            self.count += 1
            if probability >= self.thresh:
                positives.write(line)
                self._positives += 1

    def add(self, chunk: Sequence[_Asked], table: npt.NDArray[np.int64], logits: npt.NDArray[np.float64]) -> None:
        """Some pairs, the places of their proteins, and their logits."""
        self._write(((pair.a, pair.b) for pair in chunk), _sigmoid(logits))
        if chunk and chunk[0].label >= 0:
            self._labels.extend(pair.label for pair in chunk)
            self._logits.frombytes(logits.tobytes())
            self._ends.frombytes(np.ascontiguousarray(table).tobytes())

    def add_group(self, group: Group, members: Sequence[str], matrix: npt.NDArray[np.float64]) -> None:
        """A group, its members, and the logits (n, n) of their pairs."""
        rows, columns = np.triu_indices(len(members), 1)
        probabilities = np.full(matrix.shape, np.nan)
        probabilities[rows, columns] = probabilities[columns, rows] = _sigmoid(matrix[rows, columns])
        named = ((members[i], members[j], group.name) for i, j in zip(rows.tolist(), columns.tolist(), strict=True))
        self._write(named, probabilities[rows, columns])
        self._groups += 1
        if self._matrices is not None:
            self._matrices.mkdir(exist_ok=True)
            safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in group.name)[:60]
            with (self._matrices / f"{self._groups:04d}-{safe}.tsv").open("w", encoding="utf-8") as stream:
                stream.write("\t".join(("", *members)) + "\n")
                for name, values in zip(members, probabilities.tolist(), strict=True):
                    cells = ("" if np.isnan(value) else f"{value:.8f}" for value in values)
                    stream.write("\t".join((name, *cells)) + "\n")

    def figures(self, model: InteractionModel) -> dict[str, Any]:
        """What there is to say of the whole, also as a file where there were labels."""
        found: dict[str, Any] = {"pairs": self.count, "positives": self._positives, "thresh": self.thresh}
        found |= {"verdict": model.settings.verdict}
        if self._groups:
            found["groups"] = self._groups
        labels = np.frombuffer(self._labels, dtype=np.int8).astype(np.int64)
        if len(np.unique(labels)) == 2:
            logits = np.frombuffer(self._logits, dtype=np.float64)
            ends = np.frombuffer(self._ends, dtype=np.int64).reshape(-1, 2)
            figures = measure({"joint": logits}, labels, ends, seed=0, first="joint")
            curve = calibration(_sigmoid(logits), labels)
            draw_calibration({"joint": curve}, self._picture)
            found["measured"] = {**figures, **figures.pop("systems")["joint"], "calibration": curve}
            self._figures.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found


def _sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -logits))


def predict_to(
    output: str | Path,
    sources: Sequence[str],
    model: str | Path | None,
    *,
    pairs: str | None = None,
    groups: str | None = None,
    thresh: float = 0.5,
    device: str = "auto",
    dtype: str = "auto",
    dry_run: bool = False,
    restart: bool = False,
    **options: Any,
) -> Outcome:
    """Predicts interactions into a folder or a .tsv file.

    Arguments:
        output: a .tsv file, or a folder for `predictions.tsv`, `positives.tsv` and, where there are any, figures and matrices.
        sources: files of proteins, "-" or "bundled:NAME".
        model: a folder that `performers interact train` made.
        pairs: TSV of pairs; with labels in a third column they are measured.
        groups: TSV of groups and members, instead; without either, all pairs are scored.
        thresh: of the positives.
        device, dtype: as in `LanguageModel.open`.
        dry_run, restart: as in `run_tool`.
        options: toks_per_batch, max_length, on_invalid, as in `Embedder`.

    Raises:
        InputError, RunError: as in `run_tool`, `read_pairs` and `InteractionModel.open`.
    """
    if pairs is not None and groups is not None:
        raise InputError("pairs and groups exclude each other: give one of them.")
    if not 0 <= thresh <= 1:
        raise InputError(f"thresh is {thresh}: expected a probability.")
    path = Path(output)
    if path.suffix == ".gz":
        raise InputError(f"{output}: expected a .tsv file or a folder.")
    opened = InteractionModel.open(model, device=device, dtype=dtype)
    print(f"{opened.folder} is {opened.settings.verdict}.", file=sys.stderr, flush=True)
    asked = pairs or groups
    if asked is not None:
        next(iter(read_groups(asked) if groups is not None else read_pairs(asked)))  # refused before anything is read
    tool = Predictor(
        opened, sources, pairs=pairs, groups=groups, thresh=thresh, as_table=path.suffix == ".tsv", **options
    )
    settings = {
        "pairs": pairs,
        "groups": groups,
        "asked": None if asked is None else sha256_of(Path(asked)),
        "thresh": thresh,
        "head": sha256_of(opened.folder / HEAD),
        "settings": sha256_of(opened.folder / SETTINGS),
        "toks_per_batch": tool.toks_per_batch,
        "max_length": tool.max_length,
        "on_invalid": tool.on_invalid,
    }
    return run_tool(tool, output, sources=sources, settings=settings, dry_run=dry_run, restart=restart)
