"""BLOSUM62: how often residues stand for each other in related proteins, which every model of proteins is measured against."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from performers.data import STANDARD_RESIDUES
from performers.tools.variants import Substitution

# Henikoff and Henikoff (1992), in half bits, as NCBI distributes it; the lower triangle in the order of `_ORDER`.
_ORDER = "ARNDCQEGHILKMFPSTWYV"
_LOWER = """
4
-1 5
-2 0 6
-2 -2 1 6
0 -3 -3 -3 9
-1 1 0 0 -3 5
-1 0 0 2 -4 2 5
0 -2 0 -1 -3 -2 -2 6
-2 0 1 -1 -3 0 0 -2 8
-1 -3 -3 -3 -1 -3 -3 -4 -3 4
-1 -2 -3 -4 -1 -2 -3 -4 -3 2 4
-1 2 0 -1 -3 1 1 -2 -1 -3 -2 5
-1 -1 -2 -3 -1 0 -2 -3 -2 1 2 -1 5
-2 -3 -3 -3 -2 -3 -3 -3 -1 0 0 -3 0 6
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4 7
1 -1 1 0 -1 0 0 0 -1 -2 -2 0 -1 -2 -1 4
0 -1 0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1 1 5
-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1 1 -4 -3 -2 11
-2 -2 -2 -3 -2 -1 -2 -3 2 -1 -1 -2 -1 3 -3 -2 -2 2 7
0 -3 -3 -3 -1 -2 -2 -3 -3 3 1 -2 1 -1 -2 -2 0 -3 -1 4
"""


@functools.cache
def blosum62() -> npt.NDArray[np.float64]:
    """(20, 20) in the order of `STANDARD_RESIDUES`; one array for all, which cannot be written to."""
    lower = np.zeros((20, 20))
    for row, line in enumerate(_LOWER.split("\n")[1:-1]):
        lower[row, : row + 1] = [int(value) for value in line.split()]
    whole = lower + np.tril(lower, -1).T
    order = [_ORDER.index(letter) for letter in STANDARD_RESIDUES]
    matrix = whole[np.ix_(order, order)]
    matrix.setflags(write=False)
    return matrix


def in_blosum62(substitutions: Iterable[Substitution]) -> tuple[float, float] | None:
    """What the matrix says of some substitutions; None where a residue is not one of the 20.

    Returns:
        The sum of B[old, new], and that of B[old, new] - B[old, old]: what a substitution scores, and what it loses against no
        substitution at all, which is more where the old residue is a rare one.
    """
    matrix = blosum62()
    total = change = 0.0
    for _, old, new in substitutions:
        row, column = STANDARD_RESIDUES.find(old), STANDARD_RESIDUES.find(new)
        if row < 0 or column < 0:
            return None
        total += float(matrix[row, column])
        change += float(matrix[row, column] - matrix[row, row])
    return total, change
