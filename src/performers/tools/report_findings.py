"""What the parts of a report come to: results of its tools in, figures, table rows and pictures of single proteins out.

Results are passed over as often as is needed and never held: memory grows by a few numbers for each protein. What the parts are
and how they are planned knows `performers.tools.reporting`, how a page looks `performers.tools.report_page`.
"""

from __future__ import annotations

import csv
import math
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from performers.data import STANDARD_RESIDUES
from performers.tools.language_model import Unread
from performers.tools.proteins import Protein
from performers.tools.readings import BACKGROUND, Block, Readings, others
from performers.tools.report_page import MOST_POINTS, MOST_ROWS, Point, Row
from performers.tools.tool import Result

MOST_COMPARED = 2000
MOST_SENSITIVE = 10
EMBEDDING, LIKELIHOOD, SATURATION, CONTACTS = "embedding", "likelihood", "saturation", "contacts"
_Floats = npt.NDArray[np.float64]


class Part(NamedTuple):
    """An item of one of the tools that a report is made of: which tool, the number of the protein, and the item."""

    tool: str
    protein: int
    item: Any


class Findings:
    """What there is to say of each protein, by its number; and the readings of the chosen one."""

    def __init__(self, results: Iterable[tuple[Part, Result]]) -> None:
        self.ids: dict[int, str] = {}
        self.failed: dict[int, str] = {}
        lengths = array("q")
        background = array("d")
        self._sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._chosen: list[tuple[Block, Result]] = []
        self.chosen_id = ""
        for part, result in results:
            if isinstance(result, Unread):
                self.failed.setdefault(part.protein, result.reason)
            if part.tool == EMBEDDING:
                self.ids[part.protein] = part.item.id
                lengths.append(part.item.length)
                background.append(_background(part.item.chains))
            elif part.tool in (SATURATION, CONTACTS):
                self.chosen_id = part.item.id
                if part.tool == SATURATION:
                    self._chosen.append((part.item, result))
            elif not isinstance(result, Unread):
                total, count = result["sum"]
                self._sums[part.protein][0] += float(total)
                self._sums[part.protein][1] += float(count)
        self.lengths = np.array(lengths, dtype=np.int64)
        self._background = np.array(background)

    def log_likelihood(self, number: int) -> float | None:
        """Nats per residue."""
        total, count = self._sums.get(number, (0.0, 0.0))
        return None if not count or number in self.failed else total / count

    def gains(self) -> _Floats:
        """(n,) nats per residue beyond the frequencies of residues, in the order of the input; NaN where nothing was read."""
        values = [self.log_likelihood(number) for number in self.ids]
        return np.array([np.nan if value is None else value for value in values]) - self._background

    def chosen(self) -> Readings | None:
        """The readings of the chains of the chosen protein; None if it was not read."""
        if not self._chosen or any(isinstance(result, Unread) for _, result in self._chosen):
            return None
        return Readings.gather(self._chosen, by_table=True)

    def stripes(self) -> int | None:
        """In how many passes the chosen protein's residues were masked; None where each was masked alone."""
        return max((block.passes for block, _ in self._chosen if block.passes < len(block.sequence)), default=None)


class Axes(NamedTuple):
    """The first two principal components of the embeddings: their mean (d,), directions (2, d) and shares of the variance."""

    mean: _Floats
    directions: _Floats
    explained: tuple[float, float]


def _background(chains: Sequence[str]) -> float:
    """The mean log-frequency of a protein's residues in proteins at large."""
    logs = dict(zip(STANDARD_RESIDUES, np.log(BACKGROUND), strict=True))
    known = [logs[letter] for chain in chains for letter in chain if letter in logs]
    return float(np.mean(known)) if known else 0.0


def _means(results: Iterable[tuple[Part, Result]]) -> Iterator[tuple[Protein, npt.NDArray[np.float32] | None]]:
    for part, result in results:
        if part.tool == EMBEDDING:
            yield part.item, None if isinstance(result, Unread) else result["mean"][0]


def principal_axes(results: Iterable[tuple[Part, Result]], size: int) -> Axes:
    """From sums over all proteins, so that memory does not grow with their number."""
    total, squares, count = np.zeros(size), np.zeros((size, size)), 0
    for _, vector in _means(results):
        if vector is not None:
            wide = vector.astype(np.float64)
            total += wide
            squares += np.outer(wide, wide)
            count += 1
    mean = total / max(count, 1)
    values, vectors = np.linalg.eigh(squares / max(count, 1) - np.outer(mean, mean))
    directions = vectors[:, [-1, -2]].T
    # The sign of a direction means nothing; this makes it the same everywhere.
    directions *= np.sign(directions[np.arange(2), np.abs(directions).argmax(axis=1)])[:, None]
    variance = max(float(values.clip(min=0).sum()), 1e-30)
    return Axes(mean, directions, (max(float(values[-1]), 0) / variance, max(float(values[-2]), 0) / variance))


def write_table(
    path: Path, results: Iterable[tuple[Part, Result]], found: Findings, axes: Axes
) -> tuple[list[Row], list[Point]]:
    """Write the row of every protein; the first rows and points of the map are given back."""
    gains = found.gains()
    nearest = _nearest(results) if len(found.ids) <= MOST_COMPARED else {}
    step = max(1, math.ceil(len(found.ids) / MOST_POINTS))
    rows: list[Row] = []
    points: list[Point] = []
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(["number", "id", "residues", "log_likelihood", "gain", "x", "y", "nearest", "cosine"])
        for place, (protein, vector) in enumerate(_means(results)):
            likelihood = found.log_likelihood(protein.number)
            gain = None if likelihood is None else float(gains[place])
            other, similarity = nearest.get(protein.number, ("", None))
            row = Row(protein.number, protein.id, protein.length, likelihood, gain, other, similarity)
            where = None if vector is None else axes.directions @ (vector.astype(np.float64) - axes.mean)
            cells = [likelihood, gain, *((None, None) if where is None else where)]
            shown = ["" if cell is None else f"{cell:.6f}" for cell in cells]
            cosine = "" if similarity is None else f"{similarity:.6f}"
            writer.writerow([row.number, row.id, row.length, *shown, other, cosine])
            if len(rows) < MOST_ROWS:
                rows.append(row)
            if where is not None and place % step == 0:
                points.append(Point(float(where[0]), float(where[1]), gain, protein.id or f"number {protein.number}"))
    return rows, points


def _nearest(results: Iterable[tuple[Part, Result]]) -> dict[int, tuple[str, float]]:
    """For each protein the identifier of the one with the most similar mean embedding, and the cosine, about the centre."""
    known = [(protein, vector) for protein, vector in _means(results) if vector is not None]
    if len(known) < 2:
        return {}
    vectors = np.stack([vector for _, vector in known]).astype(np.float64)
    vectors -= vectors.mean(axis=0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    best = cosines.argmax(axis=1)
    return {
        protein.number: (known[other][0].id or f"number {known[other][0].number}", float(cosines[place, other]))
        for place, ((protein, _), other) in enumerate(zip(known, best.tolist(), strict=True))
    }


def draw_saturation(readings: Readings, place: int, model: str) -> tuple[str, str, bytes]:
    """Heading, caption and picture of the substitutions of one chain."""
    from performers.tools.heat_map import plot_saturation

    chain = f"chain {place + 1}" if len(readings.sequences) > 1 else ""
    with tempfile.TemporaryDirectory(prefix="performers-") as folder:
        picture = Path(folder) / "saturation.png"
        title = f"{readings.ids[place] or 'protein'}{chain and ', '}{chain}: {model}"
        plot_saturation(readings.log_odds(place), readings.sequences[place], picture, title=title, first=1)
        content = picture.read_bytes()
    caption = "Log-odds of every substitution; white is as good as the wild type, red is worse, dots are the wild type."
    if not chain:
        return "Every substitution", caption, content
    return f"Every substitution of {chain}", f"{caption} The chain was read without the others.", content


def least_tolerant(readings: Readings) -> list[tuple[str, float]]:
    """The positions of all chains whose substitutions are worst: name, and mean log-odds of the others."""
    found: list[tuple[str, float]] = []
    for place, sequence in enumerate(readings.sequences):
        log_odds = readings.log_odds(place).astype(np.float64)
        single = others(sequence)
        means = np.where(single, log_odds, 0).sum(axis=1) / single.sum(axis=1)
        chain = f" of chain {place + 1}" if len(readings.sequences) > 1 else ""
        found += [(f"{own}{number + 1}{chain}", float(means[number])) for number, own in enumerate(sequence)]
    return sorted(found, key=lambda position: position[1])[:MOST_SENSITIVE]
