"""The files that `interact predict` leaves: pairs and their probabilities, matrices of groups, and with labels how good they are.

Pairs and groups with their logits come in, in the order of the input, and are written at once. Only of pairs with labels is
something kept, 33 bytes each, so that they can be measured in the end. Nothing here knows how a score comes about.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from performers.tools.interactions.figures import calibration, draw_calibration, measure
from performers.tools.interactions.pairs import Group, LeftOut

_Ints = npt.NDArray[np.int64]


class Asked(NamedTuple):
    """A pair to score: the number of its row, identifiers, and its label or -1."""

    number: int
    a: str
    b: str
    label: int


class Outputs:
    """The files of a prediction, written row by row.

    Arguments:
        path: of the folder, or of the table.
        header: of the table.
        is_folder: whether it is a folder, which holds matrices, too; else the other files go beside the table.
        thresh: of the positives.

    Attributes:
        count, groups: pairs and groups that were written.
    """

    def __init__(self, path: Path, header: tuple[str, ...], *, is_folder: bool, thresh: float) -> None:
        self._header = header
        stem = path.name.removesuffix(".tsv")
        self._files = {
            "predictions": path / "predictions.tsv" if is_folder else path,
            "positives": path / "positives.tsv" if is_folder else self.positives_of(path),
        }
        self._picture = path / "calibration.png" if is_folder else path.with_name(f"{stem}.calibration.png")
        self._figures = path / "figures.json" if is_folder else path.with_name(f"{stem}.figures.json")
        self._matrices = path / "matrices" if is_folder else None
        self.count = self.groups = self._positives = 0
        self.thresh = thresh
        self._labels, self._logits = array("b"), array("d")
        self._ends, self._numbers = array("q"), array("q")

    @staticmethod
    def positives_of(table: Path) -> Path:
        """Where the positives go, beside a table."""
        return table.with_name(f"{table.name.removesuffix('.tsv')}.positives.tsv")

    def __enter__(self) -> Outputs:
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

    def add(self, chunk: Sequence[Asked], table: npt.NDArray[np.int64], logits: npt.NDArray[np.float64]) -> None:
        """Some pairs, the places of their proteins, and their logits."""
        self._write(((pair.a, pair.b) for pair in chunk), sigmoid(logits))
        if chunk and chunk[0].label >= 0:
            self._labels.extend(pair.label for pair in chunk)
            self._numbers.extend(pair.number for pair in chunk)
            self._logits.frombytes(logits.tobytes())
            self._ends.frombytes(np.ascontiguousarray(table).tobytes())

    def add_group(self, group: Group, members: Sequence[str], matrix: npt.NDArray[np.float64]) -> None:
        """A group, its members, and the logits (n, n) of their pairs."""
        rows, columns = np.triu_indices(len(members), 1)
        probabilities = np.full(matrix.shape, np.nan)
        probabilities[rows, columns] = probabilities[columns, rows] = sigmoid(matrix[rows, columns])
        named = ((members[i], members[j], group.name) for i, j in zip(rows.tolist(), columns.tolist(), strict=True))
        self._write(named, probabilities[rows, columns])
        self.groups += 1
        if self._matrices is not None:
            self._matrices.mkdir(exist_ok=True)
            safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in group.name)[:60]
            with (self._matrices / f"{self.groups:04d}-{safe}.tsv").open("w", encoding="utf-8") as stream:
                stream.write("\t".join(("", *members)) + "\n")
                for name, values in zip(members, probabilities.tolist(), strict=True):
                    cells = ("" if np.isnan(value) else f"{value:.8f}" for value in values)
                    stream.write("\t".join((name, *cells)) + "\n")

    def figures(self, verdict: str, ids: Sequence[str]) -> tuple[dict[str, Any], list[LeftOut]]:
        """What there is to say of the whole, also as a file where there were labels; and the pairs that have both labels.

        Those have their score, and are not measured: one of the labels is wrong.

        Arguments:
            verdict: of the model.
            ids: of the proteins, by their places.
        """
        found: dict[str, Any] = {"pairs": self.count, "positives": self._positives, "thresh": self.thresh}
        found |= {"verdict": verdict}
        if self.groups:
            found["groups"] = self.groups
        labels = np.frombuffer(self._labels, dtype=np.int8).astype(np.int64)
        ends = np.frombuffer(self._ends, dtype=np.int64).reshape(-1, 2)
        agrees, contradictory = _contradictions(np.frombuffer(self._numbers, dtype=np.int64), labels, ends, ids)
        labels, ends = labels[agrees], ends[agrees]
        if len(np.unique(labels)) == 2:
            logits = np.frombuffer(self._logits, dtype=np.float64)[agrees]
            figures = measure({"joint": logits}, labels, ends, seed=0, first="joint")
            joint = figures.pop("systems")["joint"]
            curve = calibration(sigmoid(logits), labels)
            draw_calibration({"joint": curve}, self._picture)
            found["measured"] = {**figures, **joint, "calibration": curve}
            self._figures.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return found, contradictory


def _contradictions(
    numbers: _Ints, labels: _Ints, ends: _Ints, ids: Sequence[str]
) -> tuple[npt.NDArray[np.bool_], list[LeftOut]]:
    """Which rows (K,) are of pairs with one label, and the first row of every other pair that contradicts an earlier one."""
    keys = np.sort(ends, axis=1) @ np.array([len(ids), 1])
    _, inverse = np.unique(keys, return_inverse=True)
    ones, rows = np.bincount(inverse, labels), np.bincount(inverse)
    agrees = ((ones == 0) | (ones == rows))[inverse]
    earliest: dict[int, int] = {}
    listed: dict[int, LeftOut] = {}
    for row in np.flatnonzero(~agrees).tolist():
        first = earliest.setdefault(int(inverse[row]), row)
        if labels[row] != labels[first] and first not in listed:
            a, b = (ids[place] for place in ends[row].tolist())
            reason = (
                f"it is labelled {labels[row]} here and {labels[first]} in row {numbers[first]:,}, and is not measured"
            )
            listed[first] = LeftOut(int(numbers[row]), f"{a} {b}", reason)
    return agrees, list(listed.values())


def sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probabilities of logits, of any shape."""
    return np.exp(-np.logaddexp(0.0, -logits))
