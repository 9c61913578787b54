"""What became of a variant: its status, its score where there is one, and what else a row of the output says of it.

What was read and a parsed variant come in (`Readings`, `Variant`), a `Score` goes out. Nothing here knows of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from performers.tools.blosum import in_blosum62
from performers.tools.readings import Readings
from performers.tools.variants import Status, Variant

Strategy: TypeAlias = Literal["masked-marginals", "wt-marginals", "pseudo-ppl", "likelihood"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
# From the log-odds of a wild type, rather than from whole sequences.
MARGINAL = ("masked-marginals", "wt-marginals")

OUR_COLUMNS = ("status", "score", "percentile", "low_confidence", "reason")


@dataclass(frozen=True)
class Score:
    """What became of one variant.

    Attributes:
        id: of the wild type.
        row: the number of the variant in its table, counted from 1.
        mutant: its name, as given.
        status: "ok" and "synonymous" have a score.
        score: nats; higher is better tolerated. None where there is none.
        percentile: the share of the protein's single substitutions that score lower, in per cent; None where they are not known.
        low_confidence: whether the model is near the frequencies of residues at large; None without a score.
        reason: what is wrong, or "".
        values: the other columns of the table.
        mutations: how many residues differ; None where residues came or went.
        blosum62: the sum of that matrix over the substitutions; None without a score, or for residues that it has not.
        blosum62_change: the same less what the matrix gives the old residues; as in `performers.tools.blosum.in_blosum62`.
    """

    id: str
    row: int
    mutant: str
    status: Status
    score: float | None = None
    percentile: float | None = None
    low_confidence: bool | None = None
    reason: str = ""
    values: dict[str, str] = field(default_factory=dict[str, str])
    mutations: int | None = None
    blosum62: float | None = None
    blosum62_change: float | None = None


def is_unreadable(variant: Variant, by_table: bool) -> bool:
    """Whether a variant's sequence is not known, or cannot be scored by a table."""
    return variant.status == "indel" and (variant.sequence is None or by_table)


def scored(score: Score, place: int, variant: Variant, readings: Readings, strategy: Strategy) -> Score:
    """A variant with its score, or the reason why it has none.

    Arguments:
        score: what is known of it.
        place: of its wild type among those that were read.
        variant: what it is; "ok", "indel" or "synonymous".
        readings: what was read.
        strategy: what a score is.
    """
    about = (score.id, score.row, score.mutant)
    by_table = strategy in MARGINAL
    if is_unreadable(variant, by_table):
        reason = variant.reason if variant.sequence is None else f"{strategy} scores substitutions only"
        return Score(*about, "indel", reason=reason, values=score.values)
    reason = readings.failed(place, score.row)
    if reason is not None:
        return Score(*about, "unread", reason=reason, values=score.values)
    if variant.status == "synonymous":
        return Score(*about, "synonymous", 0.0, readings.percentile(place, 0.0), False, "", score.values, 0)
    value, is_low = readings.by_table(place, variant) if by_table else readings.by_sequence(place, score.row)
    mutations, matrix = None, None
    if variant.sequence is None:
        mutations, matrix = len(variant.substitutions), in_blosum62(variant.substitutions)
    percentile = readings.percentile(place, value)
    return Score(*about, "ok", value, percentile, is_low, "", score.values, mutations, *(matrix or (None, None)))


def cells(score: Score) -> list[str]:
    """A score as text, in the order of `OUR_COLUMNS`."""
    return [
        score.status,
        "" if score.score is None else f"{score.score:.6f}",
        "" if score.percentile is None else f"{score.percentile:.2f}",
        "" if score.low_confidence is None else str(score.low_confidence).lower(),
        score.reason,
    ]
