"""Where the tools' proteins come from, whatever the file: one door, one strictness.

FASTA (through `performers.data`, so plain, gzip, "-" for standard input and "bundled:NAME"), A3M, CSV or TSV or parquet with the
columns `id` and `sequence`, and the chains of PDB and mmCIF files come in, told apart by the ending of the name; a stream of
`Protein`s goes out in bounded memory. A colon inside a sequence separates chains. It knows nothing of tokens and models.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

from performers.data import MAX_LENGTH, RESIDUES, FastaReport, InputFile, Record
from performers.data.alphabet import expected_residues
from performers.data.fasta import FastaReader, OnInvalid, locate
from performers.errors import FastaError, MissingExtraError
from performers.folders import sha256_of
from performers.tools.tables import numbered_columns, read_table, suffix_of

CHAIN_BREAK = ":"
_TABLES = (".csv", ".tsv", ".parquet")
_STRUCTURES = (".pdb", ".ent", ".cif", ".mmcif")
_WHITE_SPACE = str.maketrans("", "", " \t\n\r\v\f")
# In an A3M file lower case is what is inserted against the first sequence, "." fills up for it, and "-" is a residue less.
_ALIGNMENT = str.maketrans("", "", "abcdefghijklmnopqrstuvwxyz.-")
_VALID = str.maketrans("", "", RESIDUES)


class Protein(NamedTuple):
    """One protein, or several chains that belong together.

    Attributes:
        id: as written; may be empty, and need not be unique.
        description: what else the file says of it.
        chains: upper-case residues of the alphabet, at least one chain of at least one residue.
        number: the position among all the records of a run, those that were left out included, counted from 1.
    """

    id: str
    description: str
    chains: tuple[str, ...]
    number: int

    @property
    def length(self) -> int:
        """Residues, in all chains."""
        return sum(map(len, self.chains))


Source: TypeAlias = str | os.PathLike[str]
Proteins: TypeAlias = Source | Sequence[Source] | Iterable[Protein | Record]


def read_proteins(
    sources: Proteins,
    *,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    report: FastaReport | None = None,
) -> Iterator[Protein]:
    """The proteins of one or several sources, in order.

    Arguments:
        sources: files, "-", "bundled:NAME", or records that were read already.
        max_length: residues; a longer record is refused, never cut.
        on_invalid: what to do with a character that is no residue: refuse ("error"), read it as X ("x"), or leave the record
            out and list it ("skip").
        report: what happened while reading is added to it.

    Raises:
        FastaError: a source is missing, damaged or of another format, or a record is empty, too long or holds what is no
            residue; names file, record and residue. Raised at the call for a file that is missing, otherwise while iterating.
        MissingExtraError: a format needs a package that is not installed.
    """
    if on_invalid not in get_args(OnInvalid):
        raise FastaError(f"on_invalid is {on_invalid!r}; expected 'error', 'x' or 'skip'.")
    door = _Door(max_length, on_invalid, FastaReport() if report is None else report)
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    given = list(sources) if isinstance(sources, list | tuple) else sources
    if isinstance(given, list) and all(isinstance(source, str | os.PathLike) for source in given):
        if not given:
            raise FastaError("No input was given; expected at least one file.")
        files = [str(source) for source in given]
        for source in files:
            locate(source)
        streams = [_records_of(source, door) for source in files]
    else:
        streams = [_given_records(given, door)]  # pyright: ignore[reportArgumentType]
    return itertools.chain.from_iterable(streams)


class _Door:
    """The same judgement of letters and lengths for every format, and one numbering of the records of all sources."""

    def __init__(self, max_length: int, on_invalid: OnInvalid, report: FastaReport) -> None:
        self.max_length, self.on_invalid, self.report = max_length, on_invalid, report
        self._count = 0

    def protein(self, source: str, number: int, identifier: str, description: str, text: str) -> Protein | None:
        """A record, the `number`-th of its source, as a protein; None if it is to be left out."""
        self._count += 1
        where = f"{source}, record {number:,}" + (f" ({_shown(identifier)})" if identifier else "")
        text = text.translate(_WHITE_SPACE)
        if not text:
            raise FastaError(f"{where}: the record has no sequence; expected at least one residue.")
        length = len(text) - text.count(CHAIN_BREAK)
        if length > self.max_length:
            raise FastaError(
                f"{where}: the record has {length:,} residues; expected at most {self.max_length:,} "
                "(records are never truncated: raise max-length or leave the record out)."
            )
        upper = text.upper()
        pieces = upper.split(CHAIN_BREAK)
        chains: list[str] = []
        replaced = 0
        for index, piece in enumerate(pieces, start=1):
            place = "" if len(pieces) == 1 else f", chain {index}"
            if not piece:
                raise FastaError(f"{where}{place}: the chain is empty; expected residues on either side of a colon.")
            wrong = piece.translate(_VALID)
            if wrong and self.on_invalid != "x":
                position = next(i for i, letter in enumerate(piece, start=1) if letter not in RESIDUES)
                what = f"{place}, residue {position:,}: {piece[position - 1]!r} is not a residue"
                if self.on_invalid == "skip":
                    self.report.skipped += 1
                    self.report.left_out.append((self._count, identifier, what.removeprefix(", ")))
                    return None
                raise FastaError(
                    f"{where}{what}; expected {expected_residues()} "
                    "(on-invalid 'x' replaces it by X, 'skip' leaves the record out)."
                )
            if wrong:
                replaced += len(wrong)
                piece = "".join(letter if letter in RESIDUES else "X" for letter in piece)
            chains.append(piece)
        self.report.replaced += replaced
        self.report.lower_case += text != upper
        self.report.records += 1
        self.report.residues += length
        return Protein(identifier, description, tuple(chains), self._count)

    def seen(self, identifiers: Iterable[str]) -> None:
        """Count identifiers that occurred before."""
        repeated = self.report.remember(identifiers)
        self.report.duplicates += len(repeated)
        self.report.duplicate_ids += repeated[: 10 - len(self.report.duplicate_ids)]


class _LettersUnjudged(FastaReader):
    """FASTA as `read_fasta` reads it, but with every letter as it stands, for the door above to judge."""

    def clean(self, header: str, sequence: str) -> str:
        """Without white space."""
        return sequence.translate(_WHITE_SPACE)

    def check_start(self, text: bytearray) -> None:
        """As of FASTA, after the first lines of A3M."""
        # ColabFold's A3M files begin with a line like "#120,95 1,1": lengths and copies of the chains.
        while text.startswith(b"#") and suffix_of(self.name) == ".a3m" and b"\n" in text:
            del text[: text.index(b"\n") + 1]
        super().check_start(text)


def _records_of(source: str, door: _Door) -> Iterator[Protein]:
    suffix = suffix_of(source)
    if suffix in _TABLES:
        records = _from_table(source)
    elif suffix in _STRUCTURES:
        records = _from_structure(source)
    else:
        yield from _from_fasta(source, door, is_alignment=suffix == ".a3m")
        return
    path = Path(source)
    known: list[str] = []
    for number, (identifier, description, text) in enumerate(records, start=1):
        protein = door.protein(source, number, identifier, description, text)
        if protein is not None:
            known.append(protein.id)
            yield protein
        if len(known) == 4096:
            door.seen(known)
            known = []
    door.seen(known)
    door.report.inputs.append(InputFile(source, path.stat().st_size, sha256_of(path)))


def _from_fasta(source: str, door: _Door, *, is_alignment: bool) -> Iterator[Protein]:
    raw = FastaReport()
    reader = _LettersUnjudged(source, door.max_length, "error", raw)
    for record in reader:
        text = record.sequence.translate(_ALIGNMENT) if is_alignment else record.sequence
        protein = door.protein(reader.name, record.number, record.id, record.description, text)
        if protein is not None:
            yield protein
    door.report.duplicates += raw.duplicates
    door.report.duplicate_ids += raw.duplicate_ids[: 10 - len(door.report.duplicate_ids)]
    door.report.inputs += raw.inputs


def _from_table(source: str) -> Iterator[tuple[str, str, str]]:
    table = read_table(source)
    columns = numbered_columns(table.columns, ("id", "sequence"))
    for name in ("id", "sequence"):
        if name not in columns:
            raise FastaError(f"{source} has no column {name!r}; its columns are {', '.join(table.columns)}.")
    count = 0
    for _, row in table.rows:
        count += 1
        yield row[columns["id"]], "", row[columns["sequence"]]
    if not count:
        raise FastaError(f"{source} has no rows; expected at least one protein.")


def _from_structure(source: str) -> Iterator[tuple[str, str, str]]:
    """The protein chains of the first model: as deposited (SEQRES) where the file says so, else as observed.

    A modified residue is read as the one that it was made from, and one that gemmi does not know as X.
    """
    try:
        import gemmi
    except ImportError:
        raise MissingExtraError("gemmi", "structures", f"reading {source}") from None
    try:
        with warnings.catch_warnings():
            structure: Any = gemmi.read_structure(source)
            structure.setup_entities()
            model: Any = structure[0]
    except (RuntimeError, ValueError, IndexError, OSError, EOFError, UnicodeDecodeError) as error:
        raise FastaError(f"{source} cannot be read as a structure: {' '.join(str(error).split())}.") from None
    stem = Path(source).name.partition(".")[0]
    count = 0
    for chain in model:
        polymer = chain.get_polymer()
        if not len(polymer) or polymer.check_polymer_type() not in (
            gemmi.PolymerType.PeptideL,
            gemmi.PolymerType.PeptideD,
        ):
            continue
        entity = structure.get_entity_of(polymer)
        deposited = entity.full_sequence if entity is not None else []
        names = [gemmi.Entity.first_mon(name) for name in deposited] or [residue.name for residue in polymer]
        count += 1
        letters = (gemmi.find_tabulated_residue(name).one_letter_code.strip().upper() or "X" for name in names)
        yield f"{stem}_{chain.name}", "", "".join(letters)
    if not count:
        raise FastaError(f"{source} has no protein chain; expected at least one.")


def _given_records(records: Iterable[Protein | Record], door: _Door) -> Iterator[Protein]:
    for number, record in enumerate(records, start=1):
        text = CHAIN_BREAK.join(record.chains) if isinstance(record, Protein) else record.sequence
        protein = door.protein("records", number, record.id, record.description, text)
        if protein is not None:
            yield protein


def _shown(text: str) -> str:
    """An identifier as it may go to a terminal: short, and without control characters."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
