"""What `performers contacts` writes: a table and a picture for each record, a summary, and tables and pictures of heads.

Everything is numbered; identifiers stand in tables and titles and never become file names. It knows nothing of models.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.data import STANDARD_RESIDUES
from performers.tools.attention_patterns import Patterns, Similarity
from performers.tools.blosum import blosum62
from performers.tools.pairs import Geometry, Pairs

MEDIUM, LONG = 12, 24  # separations from which a contact is of medium and of long range
LIKELY = 0.5
SUMMARY = "summary.tsv"
_ORDER = "CFYWMLIVGPATSNHQEDKR"  # amino acids as pictures of BLOSUM62 show them
_SUMMARY_COLUMNS = (
    "number",
    "id",
    "residues",
    "chains",
    "pairs",
    "likely",
    "likely_long_range",
    "likely_between_chains",
    "table",
    "picture",
    "reason",
)


@dataclass(frozen=True)
class Entry:
    """A record and what was found in it.

    Attributes:
        number, id, chains: of the record.
        pairs: the best ones, or None where it could not be read.
        reason: why not, or "".
    """

    number: int
    id: str
    chains: tuple[str, ...]
    pairs: Pairs | None
    reason: str = ""


def write_table(path: Path, entry: Entry, geometry: Geometry, score: str) -> None:
    """A row for each pair, best first.

    Arguments:
        path: the file.
        entry: of a record that could be read.
        geometry: of its chains.
        score: the name of the last column.
    """
    assert entry.pairs is not None
    i, j, values = entry.pairs
    first, second = geometry.chain_of(i), geometry.chain_of(j)
    sequence = "".join(entry.chains)
    columns = ["chain_i", "i", "residue_i", "chain_j", "j", "residue_j", "separation", "between_chains", score]
    lines = ["\t".join(columns)]
    for a, b, value, chain_a, chain_b in zip(i, j, values, first, second, strict=True):
        within = chain_a == chain_b
        cells = (
            chain_a + 1,
            a - geometry.starts[chain_a] + 1,
            sequence[a],
            chain_b + 1,
            b - geometry.starts[chain_b] + 1,
            sequence[b],
            b - a if within else "",
            "false" if within else "true",
            f"{value:.6g}",
        )
        lines.append("\t".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Summary:
    """The table of all records, written as they come.

    Attributes:
        figures: of all records together.
    """

    def __init__(self, path: Path, *, probabilities: bool) -> None:
        self._stream = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._stream, delimiter="\t", lineterminator="\n")
        self._writer.writerow(_SUMMARY_COLUMNS)
        self._probabilities = probabilities
        self.figures: dict[str, Any] = {"pairs": 0}
        if probabilities:
            self.figures |= {"likely": 0, "likely_long_range": 0, "likely_between_chains": 0}

    def add(self, entry: Entry, geometry: Geometry, table: str, picture: str) -> None:
        """A row; `table` and `picture` are file names, or ""."""
        found: dict[str, Any] = {}
        if entry.pairs is not None:
            found["pairs"] = len(entry.pairs.i)
            if self._probabilities:
                i, j, values = entry.pairs
                likely = values >= LIKELY
                within = geometry.chain_of(i) == geometry.chain_of(j)
                found["likely"] = int(likely.sum())
                found["likely_long_range"] = int((likely & within & (j - i >= LONG)).sum())
                found["likely_between_chains"] = int((likely & ~within).sum())
            for name, count in found.items():
                self.figures[name] += count
        lengths = ",".join(str(len(chain)) for chain in entry.chains)
        row = {
            "number": entry.number,
            "id": " ".join(entry.id.split()),
            "residues": sum(map(len, entry.chains)),
            "chains": lengths,
            "table": table,
            "picture": picture,
            "reason": " ".join(entry.reason.split()),
            **found,
        }
        self._writer.writerow([row.get(column, "") for column in _SUMMARY_COLUMNS])

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()


def draw_contacts(path: Path, entry: Entry, geometry: Geometry, score: str) -> None:
    """The best pairs as points, in both triangles; darker is better, orange is between chains, lines are chain breaks."""
    from matplotlib.figure import Figure

    assert entry.pairs is not None
    i, j, values = entry.pairs
    length = int(geometry.starts[-1])
    figure = Figure(figsize=(5.4, 5.6), layout="constrained")
    axes = figure.subplots()
    between = geometry.chain_of(i) != geometry.chain_of(j)
    # The weakest first, so that better ones lie on top.
    size = float(np.clip(40_000 / max(length, 1) ** 1.2, 1.0, 40.0))
    low, high = (0.0, 1.0) if score == "probability" else _range(values)
    low -= 0.4 * (high - low)  # so that the weakest can be seen
    for chosen, colours in ((~between, "Blues"), (between, "Oranges")):
        x, y, colour = i[chosen][::-1], j[chosen][::-1], values[chosen][::-1]
        style: dict[str, Any] = {"cmap": colours, "s": size, "marker": "s", "linewidths": 0, "vmin": low, "vmax": high}
        axes.scatter(np.concatenate((x, y)) + 1, np.concatenate((y, x)) + 1, c=np.tile(colour, 2), **style)
    for start in geometry.starts[1:-1]:
        axes.axhline(start + 0.5, color="grey", linewidth=0.6)
        axes.axvline(start + 0.5, color="grey", linewidth=0.6)
    axes.set_xlim(0.5, length + 0.5)
    axes.set_ylim(length + 0.5, 0.5)
    axes.set_aspect("equal")
    axes.set_xlabel("residue, through all chains" if len(entry.chains) > 1 else "residue")
    axes.set_ylabel(axes.get_xlabel())
    axes.set_title(f"{_title(entry)}\nbest {len(i):,} pairs by {score}", fontsize=9)
    _save(figure, path)


def draw_heads(path: Path, picture: npt.NDArray[np.float32], heads: Sequence[int], entry: Entry) -> None:
    """The attention of every head to one protein, a layer a row, from its sums over G x G cells: (heads of all layers, G, G)."""
    from matplotlib.figure import Figure

    rows, columns = len(heads), max(heads)
    figure = Figure(figsize=(min(0.3 + 1.1 * columns, 24), min(0.6 + 1.15 * rows, 40)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    length, cells = sum(map(len, entry.chains)), picture.shape[1]
    sizes = np.bincount(np.arange(length) * cells // length)
    means = picture / (sizes[:, None] * sizes[None])
    number = 0
    for layer, count in enumerate(heads):
        for head in range(columns):
            axes = grid[layer, head]
            axes.set_xticks([])
            axes.set_yticks([])
            if head >= count:
                axes.set_axis_off()
                continue
            image = means[number]
            axes.imshow(
                image, cmap="magma", vmin=0, vmax=float(np.quantile(image, 0.995)) or 1.0, interpolation="nearest"
            )
            axes.set_title(f"{layer + 1}.{head + 1}", fontsize=6, pad=1)
            number += 1
    figure.suptitle(f"{_title(entry)}: attention of each layer and head", fontsize=9)
    _save(figure, path)


def write_patterns(path: Path, patterns: Patterns, heads: Sequence[int]) -> None:
    """A row for each layer and head."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(["layer", "head", "diagonal", "vertical", "block", "kind"])
        number = 0
        for layer, count in enumerate(heads, start=1):
            for head in range(1, count + 1):
                measures = (patterns.diagonal[number], patterns.vertical[number], patterns.block[number])
                cells = ["" if np.isnan(value) else f"{value:.4f}" for value in measures]
                writer.writerow([layer, head, *cells, patterns.kind(number)])
                number += 1


def draw_patterns(path: Path, patterns: Patterns, heads: Sequence[int]) -> None:
    """The three measures, layers by heads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.4 + 0.3 * len(heads)), layout="constrained")
    all_axes = figure.subplots(1, 3)
    for axes, name in zip(all_axes, ("diagonal", "vertical", "block"), strict=True):
        image = np.full((len(heads), max(heads)), np.nan)
        parts = np.split(getattr(patterns, name), np.cumsum(heads)[:-1])
        for layer, part in enumerate(parts):
            image[layer, : len(part)] = part
        shown = axes.imshow(image, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(max(heads)), [str(head + 1) for head in range(max(heads))], fontsize=7)
        axes.set_yticks(range(len(heads)), [str(layer + 1) for layer in range(len(heads))], fontsize=7)
        axes.set_xlabel("head", fontsize=8)
        axes.set_title(name, fontsize=9)
        if axes is all_axes[-1]:
            figure.colorbar(shown, ax=list(all_axes), shrink=0.9)
    all_axes[0].set_ylabel("layer", fontsize=8)
    _save(figure, path)


def write_similarity(path: Path, found: Similarity) -> None:
    """A row for each two amino acids, and what BLOSUM62 says of them."""
    reference = blosum62()
    lines = ["first\tsecond\tattention\tblosum62"]
    for a, first in enumerate(STANDARD_RESIDUES):
        for b, second in enumerate(STANDARD_RESIDUES[:a]):
            value = found.matrix[a, b]
            lines.append(f"{first}\t{second}\t{'' if np.isnan(value) else f'{value:.4f}'}\t{reference[a, b]:.0f}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_similarity(path: Path, found: Similarity) -> None:
    """BLOSUM62 and the similarity to attention, side by side."""
    from matplotlib.figure import Figure

    order = [STANDARD_RESIDUES.index(letter) for letter in _ORDER]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    said = "" if found.spearman is None else f": Spearman {found.spearman:.2f}"
    if found.interval is not None:
        said += f" ({found.interval[0]:.2f} to {found.interval[1]:.2f})"
    titles = ("BLOSUM62", f"attention{said}")
    for axes, matrix, title in zip((left, right), (blosum62(), found.matrix), titles, strict=True):
        image = matrix[np.ix_(order, order)].copy()
        np.fill_diagonal(image, np.nan)  # it would take up the scale
        axes.imshow(image, cmap="viridis", interpolation="nearest")
        axes.set_xticks(range(20), list(_ORDER), fontsize=7)
        axes.set_yticks(range(20), list(_ORDER), fontsize=7)
        axes.set_title(title, fontsize=9)
    _save(figure, path)


def _range(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _title(entry: Entry) -> str:
    shown = entry.id if entry.id.isprintable() else repr(entry.id)
    # What follows a dollar sign would be set as mathematics.
    shown = (shown if len(shown) <= 60 else shown[:57] + "...").replace("$", r"\$")
    return f"{entry.number}: {shown}"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
