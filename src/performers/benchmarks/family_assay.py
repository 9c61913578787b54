"""A protein's family as context for scoring its variants: how well scores agree with measurements, with it and without.

A table of measured variants, their wild type and its relatives come in; the scores of each variant go out, by a model alone, with
the summed states of the relatives, and with those of as many proteins of other families. Beside them stand two that ask no model:
BLOSUM62, which knows no family, and a profile HMM of the same relatives. Figures and intervals are made of the scores in
`performers.benchmarks.family_figures`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from performers.benchmarks.experiment import DONE, UNAVAILABLE, Figures
from performers.benchmarks.families import Families
from performers.data import STANDARD_RESIDUES, Record, read_fasta
from performers.errors import InputError, MissingExtraError, UnsupportedError
from performers.tools.blosum import in_blosum62
from performers.tools.measurements import measurement
from performers.tools.tables import read_table
from performers.tools.variants import Substitution, parse_variant

MEASUREMENT = "DMS_score"
_FEWEST = 10  # variants: fewer have no correlation worth the name


@dataclass(frozen=True)
class Assay:
    """Measured variants of a protein, and what may be read before they are scored.

    Attributes:
        wild_type: the protein.
        table: a file with the columns mutant or mutated_sequence, and `MEASUREMENT`.
        contexts: for "none", "own" and "wrong", the proteins to read; as many in "wrong" as in "own".
    """

    wild_type: Record
    table: str
    contexts: dict[str, Sequence[Record]]


def prepare_assay(table: str, wild_type: str, homologs: str, families: Families) -> Assay:
    """An assay with its own family, the wild type left out, and a wrong one, from the held-out families.

    Arguments:
        table: as of `Assay`.
        wild_type: FASTA of one protein.
        homologs: FASTA of its relatives.
        families: held out from what the models were trained on.

    Raises:
        InputError: a file is not in order, or the held-out families have fewer proteins than the own one.
    """
    records = list(read_fasta(wild_type))
    if len(records) != 1:
        raise InputError(f"{wild_type} has {len(records):,} proteins; expected one, the wild type of {table}.")
    own = [record for record in read_fasta(homologs) if record.sequence != records[0].sequence]
    if not own:
        raise InputError(f"{homologs} has no protein besides the wild type; expected its relatives.")
    read_table(table).require(MEASUREMENT)
    return Assay(records[0], table, {"none": (), "own": own, "wrong": families.unlike(own, len(own))})


def score_by_model(folder: Path, assay: Assay, context: str, device: str) -> Figures:
    """The variants' scores by a masked or causal model in a context.

    Arguments:
        folder: of the model.
        assay: what to score.
        context: one of the assay's.
        device: by name.

    Returns:
        "rows" of the table, counted from 1, with their "scores" and what was "measured"; or why there are none.

    Raises:
        InputError: a measurement is no number, or fewer than ten variants can be scored.
    """
    from performers.tools.context_states import read_context
    from performers.tools.language_model import LanguageModel
    from performers.tools.scoring import score

    opened = LanguageModel.open(folder, device=device)
    try:
        if assay.contexts[context]:
            opened.use_context(read_context(opened, assay.contexts[context]))
    except UnsupportedError as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    found = score(assay.wild_type.sequence, assay.table, opened)
    # The wild type itself, as a table may have it, is no variant.
    return _figures(
        assay, [(one.row, one.score, one.values) for one in found if one.score is not None and one.mutations]
    )


def score_by_matrix(assay: Assay) -> Figures:
    """As `score_by_model`, by the sum of BLOSUM62 over the substitutions."""

    def value(substitutions: Sequence[Substitution]) -> float | None:
        found = in_blosum62(substitutions)
        return None if found is None else found[0]

    return _by_substitutions(assay, value)


def score_by_profile(assay: Assay, context: str) -> Figures:
    """As `score_by_model`, by a profile HMM of a context: the sum of log P(new) - log P(old) where the wild type aligns."""
    from performers.benchmarks.family_profiles import Profile

    try:
        chances = Profile(assay.contexts[context]).expected(assay.wild_type.sequence)
    except MissingExtraError as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    logs = np.log(np.maximum(chances, 1e-12))

    def value(substitutions: Sequence[Substitution]) -> float | None:
        letters = [(STANDARD_RESIDUES.find(old), STANDARD_RESIDUES.find(new)) for _, old, new in substitutions]
        if min(map(min, letters)) < 0:
            return None
        at = [position for position, _, _ in substitutions]
        return float(sum(logs[at, [new for _, new in letters]] - logs[at, [old for old, _ in letters]]))

    return _by_substitutions(assay, value)


def _by_substitutions(assay: Assay, value: Callable[[Sequence[Substitution]], float | None]) -> Figures:
    """A function of the substitutions of every variant that is made of some; None leaves a variant out."""
    found: list[tuple[int, float, dict[str, str]]] = []
    for row, cells in read_table(assay.table).rows:
        variant = parse_variant(assay.wild_type.sequence, cells.get("mutant", ""), cells.get("mutated_sequence", ""))
        if variant.substitutions and (number := value(variant.substitutions)) is not None:
            found.append((row, number, cells))
    return _figures(assay, found)


def _figures(assay: Assay, found: Sequence[tuple[int, float, dict[str, str]]]) -> Figures:
    figures: dict[str, list[Any]] = {"rows": [], "scores": [], "measured": []}
    for row, value, cells in found:
        measured = measurement(cells, MEASUREMENT, f"{assay.table}, row {row:,}")
        if measured is not None:
            for name, number in zip(figures, (row, value, measured), strict=True):
                figures[name].append(number)
    if len(figures["rows"]) < _FEWEST:
        raise InputError(
            f"{assay.table}: {len(figures['rows'])} variants have a number as {MEASUREMENT} and can be scored; expected at "
            f"least {_FEWEST}."
        )
    return {"status": DONE, **figures}
