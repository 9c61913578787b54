"""The page of `report`: figures in, one HTML file out that needs no network.

Pictures are inside the file, text from the input is escaped, and nothing depends on the time or the machine, so the same figures
give the same bytes. What the figures mean, and how they come about, knows `performers.tools.reporting`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TEMPLATE = Path(__file__).with_name("report_page.html")
MOST_ROWS, MOST_POINTS = 1000, 2000

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """A protein in the page's table.

    Attributes:
        number: in the input, counted from 1.
        id: as in the input.
        length: residues.
        log_likelihood: nats per residue; None if it was not read.
        gain: by how much that exceeds the frequencies of residues at large, in nats per residue.
        nearest: the identifier of the protein with the most similar embedding, "" if there is none.
        similarity: the cosine of the two.
    """

    number: int
    id: str
    length: int
    log_likelihood: float | None
    gain: float | None
    nearest: str = ""
    similarity: float | None = None


@dataclass(frozen=True)
class Point:
    """A protein on the map: where, how well it is known, and what it is called."""

    x: float
    y: float
    gain: float | None
    label: str


@dataclass
class Page:
    """All that the page shows.

    Attributes:
        tiles: the figures at the top: name and value.
        rows: of the table; the first `MOST_ROWS` of `count`.
        count: how many proteins there are.
        table: the name of the file with all rows.
        lengths, gains: of all proteins.
        points: of the map, at most `MOST_POINTS`.
        explained: the share of the variance on each axis of the map.
        chosen: the identifier of the protein that is looked at closely.
        pictures: heading, caption and PNG of each picture of the chosen protein.
        sensitive: the chosen protein's least tolerant positions: name, and mean log-odds of all substitutions.
        interactions: identifiers and their matrix of probabilities; NaN where there is none.
        designs: header and rows of a table of designs.
        failed: number, identifier and reason of proteins without a result.
        notes: sentences under the heading.
        methods: how all of this was made.
        citations: what to cite.
    """

    tiles: list[tuple[str, str]]
    rows: list[Row]
    count: int
    table: str
    lengths: npt.NDArray[np.int64]
    gains: _Floats
    points: list[Point]
    explained: tuple[float, float]
    chosen: str = ""
    pictures: list[tuple[str, str, bytes]] = field(default_factory=list[tuple[str, str, bytes]])
    sensitive: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    interactions: tuple[list[str], _Floats] | None = None
    designs: tuple[list[str], list[list[str]]] | None = None
    failed: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])
    notes: list[str] = field(default_factory=list[str])
    methods: str = ""
    citations: str = ""


def render(page: Page) -> str:
    """The HTML of a page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["picture"] = lambda content: f"data:image/png;base64,{base64.b64encode(content).decode()}"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        page=page,
        lengths=_histogram(page.lengths.astype(np.float64), "residues", "proteins", is_logarithmic=True),
        gains=_histogram(page.gains, "nats per residue above the frequencies of residues", "proteins"),
        points=_placed(page.points),
        interactions=None if page.interactions is None else _matrix(*page.interactions),
    )


def _histogram(values: _Floats, x: str, y: str, *, is_logarithmic: bool = False) -> bytes | None:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None

    def draw(axes: Any) -> None:
        bins: Any = 30
        if is_logarithmic and finite.max() > finite.min():
            bins = np.geomspace(finite.min(), finite.max(), 31)
            axes.set_xscale("log")
        axes.hist(finite, bins=bins, color="#2f6f8f")
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    return drawn(draw, size=(4.6, 2.6))


def _matrix(names: Sequence[str], values: _Floats) -> bytes:
    def draw(axes: Any) -> None:
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
        if len(names) <= 40:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.figure.colorbar(image, label="probability of interaction")

    return drawn(draw, size=(6, 5))


def drawn(draw: Callable[[Any], None], *, size: tuple[float, float]) -> bytes:
    """The PNG of what `draw` does to a pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def _placed(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points in the coordinates of the map, 600 x 420 with the origin at the top left, and their colours."""
    if not points:
        return []
    places = np.array([(point.x, point.y) for point in points])
    low, high = places.min(axis=0), places.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    unit = (places - low) / span
    gains = np.array([np.nan if point.gain is None else point.gain for point in points])
    finite = gains[np.isfinite(gains)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return [
        {
            "x": round(20 + 560 * float(x), 1),
            "y": round(400 - 380 * float(y), 1),
            "label": point.label,
            "colour": _colour(point.gain, least, most),
        }
        for point, (x, y) in zip(points, unit, strict=True)
    ]


def _colour(gain: float | None, least: float, most: float) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if gain is None or not np.isfinite(gain):
        return "#bbbbbb"
    return to_hex(colormaps["viridis"]((gain - least) / (most - least) if most > least else 0.5))
