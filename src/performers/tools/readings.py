"""What a language model said of a sequence, put together from the blocks in which it was read, and the scores made of it.

A block is some of the passes over one sequence. The blocks of a wild type make a table of log-probabilities, or, with those of
its variants, log-likelihoods. Nothing here reads a model or a file.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from performers.data import RESIDUES, STANDARD_RESIDUES
from performers.tools.agreement import spearman
from performers.tools.language_model import Unread
from performers.tools.tool import Result
from performers.tools.variants import Variant

LOW_CONFIDENCE = 0.1  # nats per residue that the model knows more than `BACKGROUND`

# Shares of the 20 standard residues in Swiss-Prot, in per cent (release notes of UniProtKB/Swiss-Prot 2014_01, section 6.1).
_SHARES = {
    "A": 8.25, "C": 1.37, "D": 5.45, "E": 6.75, "F": 3.86, "G": 7.07, "H": 2.27, "I": 5.96, "K": 5.84, "L": 9.66,
    "M": 2.42, "N": 4.06, "P": 4.70, "Q": 3.93, "R": 5.53, "S": 6.56, "T": 5.34, "V": 6.87, "W": 1.08, "Y": 2.92,
}  # fmt: skip
BACKGROUND = np.array([_SHARES[letter] for letter in STANDARD_RESIDUES]) / sum(_SHARES.values())

INDEX = {letter: place for place, letter in enumerate(RESIDUES)}
_STANDARD = [INDEX[letter] for letter in STANDARD_RESIDUES]
_Floats = npt.NDArray[np.float64]


class Block(NamedTuple):
    """Some of the passes over one sequence: the unit of work.

    Attributes:
        sheet: the number of the sheet, counted from 0.
        wild_type: the number of the wild type in its sheet, counted from 0.
        row: the variant's row, or 0 for the wild type itself.
        id: of the wild type.
        sequence: what is read.
        what: "table" for the log-probabilities of every letter, "sum" for the sum of those of the sequence's own, "check" for the
            table again, at a few positions masked alone.
        passes: P, of which pass j masks the residues j, j + P, j + 2 P, ...; 0 for one pass with nothing masked. For "check" the
            number of positions.
        start, stop: the passes in this block.
        output: about how many bytes of the output go on the account of this block: all of a sheet's on its first one.
    """

    sheet: int
    wild_type: int
    row: int
    id: str
    sequence: str
    what: str
    passes: int
    start: int
    stop: int
    output: int = 0


class Readings:
    """What was read for one sheet, put together: a table of log-probabilities or a log-likelihood for each wild type.

    Attributes:
        sheet: its number.
        ids, sequences: of the wild types.
    """

    def __init__(self, sheet: int, by_table: bool) -> None:
        self.sheet, self._has_table = sheet, by_table
        self.ids: list[str] = []
        self.sequences: list[str] = []
        self._tables: list[npt.NDArray[np.float32]] = []
        self._checks: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
        self._sums: dict[int, array[float]] = {}  # of rows, by wild type; NaN where nothing was read
        self._counts: dict[int, array[float]] = {}
        self._failed: dict[tuple[int, int], str] = {}
        self._saturated: dict[int, _Floats] = {}
        self._singles: dict[int, _Floats] = {}

    @classmethod
    def gather(cls, group: Iterable[tuple[Block, Result]], *, by_table: bool) -> Readings:
        """Put the blocks of one sheet together."""
        readings: Readings | None = None
        for block, result in group:
            if readings is None:
                readings = cls(block.sheet, by_table)
            readings._add(block, result)
        assert readings is not None
        return readings

    def _add(self, block: Block, result: Result) -> None:
        place = block.wild_type
        if place == len(self.ids):
            self.ids.append(block.id)
            self.sequences.append(block.sequence)
            self._tables.append(np.zeros((len(block.sequence) if self._has_table else 0, len(RESIDUES)), np.float32))
        if isinstance(result, Unread):
            if block.what != "check":
                self._failed[place, block.row] = result.reason
        elif block.what == "table":
            self._tables[place][result["positions"]] = result["table"]
        elif block.what == "check":
            self._checks.append((place, result["positions"], result["table"]))
        else:
            total, count = (float(x) for x in result["sum"])
            sums, counts = self._sums.setdefault(place, array("d")), self._counts.setdefault(place, array("d"))
            while len(sums) <= block.row:
                sums.append(0.0)
                counts.append(0.0)
            sums[block.row] += total
            counts[block.row] += count

    def failed(self, place: int, row: int) -> str | None:
        """Why a variant or its wild type was not read, if so."""
        return self._failed.get((place, 0)) or self._failed.get((place, row))

    def knows_singles(self, place: int) -> bool:
        """Whether there is a score of every single substitution: of `log_odds`."""
        return self._has_table or place in self._saturated

    def log_odds(self, place: int) -> _Floats:
        """(L, 20): of each standard residue against the wild type's; nan where nothing was read."""
        if not self._has_table:
            return self._saturated[place]
        table = self._tables[place].astype(np.float64)
        own = table[np.arange(len(table)), [INDEX[letter] for letter in self.sequences[place]]]
        return table[:, _STANDARD] - own[:, None]

    def by_table(self, place: int, variant: Variant) -> tuple[float, bool]:
        """The sum of the log-odds of its substitutions, and whether the model is near the background at any of them."""
        table = self._tables[place]
        total = 0.0
        is_low = False
        for position, old, new in variant.substitutions:
            total += float(table[position, INDEX[new]]) - float(table[position, INDEX[old]])
            expected = np.exp(table[position, _STANDARD].astype(np.float64))
            expected /= expected.sum()
            divergence = float((expected * np.log(np.maximum(expected, 1e-30) / BACKGROUND)).sum())
            is_low |= divergence < LOW_CONFIDENCE
        return total, is_low

    def by_sequence(self, place: int, row: int) -> tuple[float, bool]:
        """The difference of mean log-likelihoods times the length, and whether that of the wild type is near the background's."""
        sequence = self.sequences[place]
        means = [self._sums[place][number] / self._counts[place][number] for number in (0, row)]
        known = [STANDARD_RESIDUES.index(letter) for letter in sequence if letter in STANDARD_RESIDUES]
        background = float(np.log(BACKGROUND)[known].mean()) if known else 0.0
        return (means[1] - means[0]) * len(sequence), means[0] - background < LOW_CONFIDENCE

    def percentile(self, place: int, value: float) -> float | None:
        """The share of single substitutions that score lower, ties counting half, in per cent; None if they were not read."""
        if not self.knows_singles(place):
            return None
        if place not in self._singles:
            values = self.log_odds(place)[others(self.sequences[place])]
            self._singles[place] = np.sort(values[np.isfinite(values)])
        singles = self._singles[place]
        if not len(singles):
            return None
        below = np.searchsorted(singles, value - 1e-9) + np.searchsorted(singles, value + 1e-9)
        return float(50 * below / len(singles))

    def take_rows_as_singles(self, place: int) -> None:
        """Take the rows of this sheet as the single substitutions, in the order of `saturation`, which they have to be."""
        missing = others(self.sequences[place])
        log_odds = np.where(missing, np.nan, 0.0)
        number = int(missing.sum())
        values = np.full(number, np.nan)
        for row in range(1, min(number + 1, len(self._sums[place]))):
            if self._counts[place][row] and self.failed(place, row) is None:
                values[row - 1], _ = self.by_sequence(place, row)
        log_odds[missing] = values
        self._saturated[place] = log_odds

    def agreement_of_stripes(self) -> float | None:
        """Spearman's correlation between log-odds from stripes and from positions masked alone; None if not measured."""
        striped, alone = [], []
        for place, positions, table in self._checks:
            own = [INDEX[self.sequences[place][position]] for position in positions]
            rows = np.arange(len(positions))
            alone.append((table - table[rows, own][:, None])[:, _STANDARD].ravel())
            striped.append(self.log_odds(place)[positions].ravel())
        if not alone:
            return None
        return spearman(np.concatenate(striped), np.concatenate(alone).astype(np.float64))


def others(sequence: str) -> npt.NDArray[np.bool_]:
    """(L, 20): which of the standard residues is not the one that is there."""
    return np.array([[letter != own for letter in STANDARD_RESIDUES] for own in sequence])
