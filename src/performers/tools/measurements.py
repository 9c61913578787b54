"""Measurements of variants beside their scores: cells of a table in, figures of agreement out.

The baselines are two readings of BLOSUM62 (`performers.tools.blosum`). Nothing here knows of models.
"""

from __future__ import annotations

import csv
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from performers.errors import InputError
from performers.tools.agreement import agreement

BASELINES = ("blosum62", "blosum62_change")
_NOTHING = ("", "na", "nan", "none", "null")
_MANY = 10**6  # insertions and deletions have no number of mutations: they count among the many


def measurement(values: dict[str, str], column: str, where: str) -> float | None:
    """The measurement in a row of a table; None where the cell is empty.

    Arguments:
        values: of the row, by column.
        column: the one with measurements.
        where: table and row, for people.

    Raises:
        InputError: the cell holds something else than a number.
    """
    text = values.get(column, "")
    if text.lower() in _NOTHING:
        return None
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{where}: {column} is {text!r}; expected a number or nothing.")
    return value


class Measurements:
    """The variants of one table that have both a score and a measurement."""

    def __init__(self) -> None:
        self._scores, self._measured, self._bins, self._mutations = array("d"), array("d"), array("d"), array("q")
        self._baselines = {name: array("d") for name in BASELINES}

    def __len__(self) -> int:
        return len(self._scores)

    def add(
        self,
        score: float,
        measured: float,
        binned: str,
        mutations: int | None,
        baselines: tuple[float | None, float | None],
    ) -> None:
        """Note a variant.

        Arguments:
            score, measured: more is better in both.
            binned: "1" where the table says that the measurement is a good one, "0" where not, or "".
            mutations: how many residues differ; None where residues came or went.
            baselines: other scores, in the order of `BASELINES`.
        """
        self._scores.append(score)
        self._measured.append(measured)
        self._bins.append(float(binned) if binned in ("0", "1", "0.0", "1.0") else np.nan)
        self._mutations.append(_MANY if mutations is None else mutations)
        for noted, value in zip(self._baselines.values(), baselines, strict=True):
            noted.append(np.nan if value is None else value)

    def agreement(self) -> list[dict[str, Any]]:
        """The figures of `agreement`; measurements above the median are positive where the table does not say which are."""
        measured, bins = np.array(self._measured), np.array(self._bins)
        is_positive = bins == 1 if np.isfinite(bins).all() else measured > np.median(measured)
        baselines = {name: np.array(values) for name, values in self._baselines.items()}
        return agreement(np.array(self._scores), measured, is_positive, np.array(self._mutations), baselines)


def write_agreements(path: Path, agreements: dict[str, list[dict[str, Any]]], strategies: dict[str, str]) -> None:
    """Write a table with the figures of several assays.

    Arguments:
        path: a CSV file.
        agreements: by assay what `Measurements.agreement` found.
        strategies: by assay how it was scored.
    """
    baselines = [f"{name}{end}" for name in BASELINES for end in ("", "_low", "_high")]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        figures = ["spearman", "low", "high", *baselines, "auc", "ndcg"]
        writer.writerow(["assay", "strategy", "mutations", "variants", *figures])
        for name, rows in agreements.items():
            for row in rows:
                found: list[float | None] = []
                for one in (row, *(row["baselines"][baseline] for baseline in BASELINES)):
                    found += [one["spearman"], *(one["interval"] or (None, None))]
                found += [row["auc"], row["ndcg"]]
                cells = ["" if value is None else f"{value:.6f}" for value in found]
                writer.writerow([name, strategies[name], row["mutations"], row["variants"], *cells])
