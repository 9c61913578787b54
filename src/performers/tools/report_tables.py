"""The tables that a report shows beside its proteins: what `interact` and `generate` made, read and checked."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from performers.errors import InputError
from performers.tools.report_page import MOST_ROWS
from performers.tools.tables import read_table

MOST_NAMES = 2000
_Floats = npt.NDArray[np.float64]


def read_interactions(path: str | Path) -> tuple[list[str], _Floats]:
    """Identifiers and their symmetric matrix of probabilities, NaN where there is none.

    Raises:
        InputError: the table lacks a column or has several groups, or a probability is none.
    """
    table = read_table(path)
    table.require("p0", "p1", "prob")
    found: dict[tuple[str, str], float] = {}
    group: str | None = None
    for row, values in table.rows:
        if group is not None and values.get("group", "") != group:
            raise InputError(
                f"{path}, row {row:,}, is of group {values.get('group', '')!r} and the rows before it of {group!r}: a report "
                "shows one group, expected the rows of one."
            )
        group = values.get("group", "")
        try:
            probability = float(values["prob"])
        except ValueError:
            probability = math.nan
        if not 0 <= probability <= 1:
            raise InputError(f"{path}, row {row:,}: prob is {values['prob']!r}; expected a number from 0 to 1.")
        found[values["p0"], values["p1"]] = probability
    names = list(dict.fromkeys(name for pair in found for name in pair))
    if len(names) > MOST_NAMES:
        raise InputError(
            f"{path} has {len(names):,} proteins; a report shows the interactions of at most {MOST_NAMES:,}."
        )
    places = {name: place for place, name in enumerate(names)}
    matrix = np.full((len(names), len(names)), np.nan)
    for (first, second), probability in found.items():
        matrix[places[first], places[second]] = matrix[places[second], places[first]] = probability
    return names, matrix


def read_designs(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """Header and the first rows of a table.

    Raises:
        InputError: it has no rows.
    """
    table = read_table(path)
    first = itertools.islice(table.rows, MOST_ROWS)
    rows = [[values.get(name, "") for name in table.columns] for _, values in first]
    if not rows:
        raise InputError(f"{path} has no rows; expected designs.")
    return list(table.columns), rows
