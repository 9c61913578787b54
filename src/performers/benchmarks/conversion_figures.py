"""How good a converted model is, in figures with intervals: what was counted in each sequence goes in, shares and means come out.

A figure is a ratio of two sums over sequences, such as right residues over all residues, or a mean, where every sequence counts
one. Intervals are 95 % bootstrap intervals over sequences; where systems are compared, they are compared on the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from performers.tools.assessment import interval

Columns = dict[str, list[float]]
"""By name, a number of each judged sequence."""


class Figure(NamedTuple):
    """What is said of a model.

    Attributes:
        label: for people.
        sums: of which column.
        over: that of which other column; None for the mean.
        is_quality: whether more is better, and none is nothing: a share of the original's means something.
    """

    label: str
    sums: str
    over: str | None = None
    is_quality: bool = True


FIGURES: dict[str, dict[str, Figure]] = {
    "antiberty": {
        "accuracy": Figure("accuracy", "right", "residues"),
        "framework": Figure("framework", "framework_right", "framework_residues"),
        "cdr3": Figure("CDR3", "cdr3_right", "cdr3_residues"),
    },
    "minilm": {
        "cosine": Figure("cosine to the original", "cosine", None, False),
        "nearest_kept": Figure("nearest kept", "nearest_kept", None, False),
        "halves": Figure("halves matched", "halves"),
    },
    "esm2": {
        "contacts": Figure("contacts P@L", "contacts"),
        "long_contacts": Figure("long range", "long_contacts"),
    },
}
HIDDEN = Figure("hidden error", "hidden", None, False)
MAIN = {"antiberty": "accuracy", "minilm": "cosine", "esm2": "contacts"}
"""By which figure the curves of distillation are drawn."""


def summary(model: str, columns: Columns, seed: int) -> dict[str, Any]:
    """The figures of a model: by name {"value", "interval"}.

    Arguments:
        model: a key of `FIGURES`.
        columns: what was counted; figures whose columns are missing are left out.
        seed: of the bootstrap.
    """
    figures = {name: figure for name, figure in _all(model).items() if figure.sums in columns}
    return {
        name: _figure(lambda rows, f=f: _value(f, columns, rows), columns[f.sums], seed) for name, f in figures.items()
    }


def kept(model: str, columns: Columns, original: Columns, seed: int) -> dict[str, Any]:
    """The share of the original model's quality that a converted one has."""

    def share(figure: Figure, rows: npt.NDArray[np.int64]) -> float | None:
        ours, theirs = _value(figure, columns, rows), _value(figure, original, rows)
        return None if ours is None or not theirs else ours / theirs

    return {
        name: _figure(lambda rows, f=figure: share(f, rows), columns[figure.sums], seed)
        for name, figure in FIGURES[model].items()
        if figure.is_quality and figure.sums in columns
    }


def recovered(model: str, columns: Columns, original: Columns, floor: Columns, seed: int) -> dict[str, Any]:
    """The share of the original model's quality above a floor: (ours - floor) / (original - floor).

    None where the original is not above the floor.
    """

    def share(figure: Figure, rows: npt.NDArray[np.int64]) -> float | None:
        ours, theirs, least = (_value(figure, of, rows) for of in (columns, original, floor))
        if ours is None or theirs is None or least is None or theirs <= least:
            return None
        return (ours - least) / (theirs - least)

    return {
        name: _figure(lambda rows, f=figure: share(f, rows), columns[figure.sums], seed)
        for name, figure in FIGURES[model].items()
        if figure.is_quality and figure.sums in columns
    }


def shown(figure: dict[str, Any] | None, *, percent: bool = False) -> str:
    """A figure with its interval, for a table; nothing where there is none."""
    if figure is None or figure["value"] is None:
        return ""
    form = ".1%" if percent else ".3f"
    if figure["interval"] is None:
        return f"{figure['value']:{form}}"
    low, high = figure["interval"]
    return f"{figure['value']:{form}} ({low:{form}} to {high:{form}})"


def labels(model: str) -> dict[str, str]:
    """By name, what the figures of a model are called."""
    return {name: figure.label for name, figure in _all(model).items()}


def _all(model: str) -> dict[str, Figure]:
    return {"hidden": HIDDEN, **FIGURES[model]}


def _value(figure: Figure, columns: Columns, rows: npt.NDArray[np.int64]) -> float | None:
    sums = float(np.asarray(columns[figure.sums])[rows].sum())
    over = float(len(rows)) if figure.over is None else float(np.asarray(columns[figure.over])[rows].sum())
    return sums / over if over else None


def _figure(value: Callable[[npt.NDArray[np.int64]], float | None], column: list[float], seed: int) -> dict[str, Any]:
    return {"value": value(np.arange(len(column))), "interval": interval(value, len(column), seed)}
