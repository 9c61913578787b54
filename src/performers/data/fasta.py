"""The one door through which protein sequences come in.

`read_fasta` turns FASTA (a file, standard input, a bundled set, or several of them; plain or gzip, told apart by content) into
a stream of `Record`s whose sequences hold upper-case residues of the alphabet and nothing else. needletail finds the records;
what stands in front of it here bounds the memory (so a small gzip file that expands to gigabytes is refused early), evens out
line ends, and turns every malformed input into one sentence. Nothing is truncated or dropped in silence. It knows nothing of
tokens, models or training.

Accepted as harmless: a UTF-8 byte order mark, CR and CRLF line ends, blank lines, spaces and tabs inside sequence lines, lower
case (upper-cased), a header without an identifier, any number of gzip members. Identifiers that occur twice are kept and
counted in the `FastaReport`.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from performers.data.alphabet import RESIDUES, expected_residues
from performers.errors import FastaError

MAX_LENGTH = 10_000_000
BUNDLED = ("train", "validation", "test", "ood", "random")

Source: TypeAlias = str | os.PathLike[str]
OnInvalid: TypeAlias = Literal["error", "x", "skip"]

_BLOCK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 22
_LONG_HEADER = f"the header is longer than {_MAX_HEADER_BYTES:,} characters; expected one line of text"
_SAMPLE_FOLDER = Path(__file__).parent / "sample"
_WHITESPACE = b" \t\n\r\v\f"
_VALID_BYTES = RESIDUES.encode("ascii")
_TO_UPPER = bytes(range(256)).upper()
_COMPRESSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}
_NAMES = {
    "*": "a stop",
    "-": "a gap",
    ".": "a gap",
    "J": "leucine or isoleucine",
    "\ufffd": "a byte that is not UTF-8 text",
}


class Record(NamedTuple):
    """One protein.

    Attributes:
        id: the first word of the header, as written; may be empty, and need not be unique.
        description: the rest of the header.
        sequence: upper-case residues of the alphabet, at least one.
        number: the position of the record in its file, counted from 1.
    """

    id: str
    description: str
    sequence: str
    number: int


@dataclass(frozen=True)
class InputFile:
    """What was read, byte for byte: its name, the number of bytes and their SHA-256 (before decompression)."""

    name: str
    num_bytes: int
    sha256: str


@dataclass
class FastaReport:
    """What happened while reading; complete when the iterator is exhausted.

    Attributes:
        records: records handed out.
        residues: residues in them.
        lower_case: records that were upper-cased.
        replaced: residues that were replaced by X (`on_invalid="x"`).
        skipped: records that were left out (`on_invalid="skip"`).
        duplicates: records whose identifier an earlier record has already; they are kept.
        duplicate_ids: the first ten such identifiers.
        inputs: the files, each when it has been read to its end.
        left_out: number, identifier and reason of each record that was left out, where the reader lists them
            (`performers.tools.proteins` does); not part of `to_dict`.
    """

    records: int = 0
    residues: int = 0
    lower_case: int = 0
    replaced: int = 0
    skipped: int = 0
    duplicates: int = 0
    duplicate_ids: list[str] = field(default_factory=list[str])
    inputs: list[InputFile] = field(default_factory=list[InputFile])
    left_out: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]], init=False, compare=False)
    _seen: _SeenIds = field(default_factory=lambda: _SeenIds(), init=False, repr=False, compare=False)

    def remember(self, ids: Iterable[str]) -> list[str]:
        """Note identifiers as seen; returns those that were seen before, in order."""
        return self._seen.add(list(ids))

    def to_dict(self) -> dict[str, Any]:
        """The counts and inputs, fit for JSON."""
        content = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        return {**content, "inputs": [asdict(file) for file in self.inputs]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> FastaReport:
        """The inverse of `to_dict`; identifiers seen are not part of it."""
        report = cls(**content)
        report.inputs = [InputFile(**file) for file in content["inputs"]]
        return report

    def remarks(self) -> list[str]:
        """What a user should be told, one sentence each; empty if there was nothing remarkable."""
        remarks: list[str] = []
        if self.duplicates:
            examples = ", ".join(_shown(name) for name in self.duplicate_ids[:3])
            more = ", ..." if self.duplicates > 3 else ""
            remarks.append(
                f"{self.duplicates:,} of {self.records:,} records have the identifier of an earlier record "
                f"({examples}{more}); all of them were kept."
            )
        if self.replaced:
            remarks.append(f"{self.replaced:,} characters that are not residues were replaced by X.")
        if self.skipped:
            remarks.append(f"{self.skipped:,} records with characters that are not residues were left out.")
        if self.lower_case:
            remarks.append(f"{self.lower_case:,} records held lower-case residues, which were read as upper case.")
        return remarks


def read_fasta(
    source: Source | Sequence[Source],
    *,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    report: FastaReport | None = None,
) -> Iterator[Record]:
    """The records of one or several FASTA sources, in order, in bounded memory.

    Arguments:
        source: a path, "-" for standard input, "bundled:train" (or validation, test, ood, random) for the packaged sample, or a
            list of these.
        max_length: the most residues a record may have; a longer one is an error, never truncated.
        on_invalid: what to do with a character that is not a residue (stops, gaps, digits, J...): "error" refuses the file,
            "x" puts X in its place, "skip" leaves the record out.
        report: counts what happened.

    Returns:
        An iterator; files are opened when it gets to them, but a missing file is found before the first record.

    Raises:
        FastaError: a source is missing, empty, damaged or not FASTA, or holds a record that is empty, too long or invalid;
            names file, record and residue. Raised at the call for what can be seen then, otherwise while iterating.
    """
    if on_invalid not in get_args(OnInvalid):
        raise FastaError(f"on_invalid is {on_invalid!r}; expected 'error', 'x' or 'skip'.")
    if max_length < 1:
        raise FastaError(f"max_length is {max_length}; expected at least 1 residue.")
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not sources:
        raise FastaError("No FASTA file was given; expected at least one.")
    readers = [FastaReader(one, max_length, on_invalid, report) for one in sources]
    return (record for reader in readers for record in reader)


class FastaReader:
    """The records of one source. Other readers of the same files override what they judge differently."""

    def __init__(self, source: Source, max_length: int, on_invalid: OnInvalid, report: FastaReport | None) -> None:
        self.path = locate(os.fspath(source))
        self.name = "standard input" if self.path is None else str(source)
        self.max_length = max_length
        self.on_invalid = on_invalid
        self.report = report
        self.number = 0  # of the record that was parsed last

    def __iter__(self) -> Iterator[Record]:
        if self.path is None:
            yield from self._records(sys.stdin.buffer)
            return
        try:
            stream = self.path.open("rb", buffering=0)
        except OSError as error:
            raise FastaError(f"{self.name} cannot be read: {error.strerror}.") from error
        with stream:
            yield from self._records(stream)

    def _records(self, stream: BinaryIO) -> Iterator[Record]:
        for chunk in self._chunks(self._text_blocks(stream)):
            if self.report is None:
                yield from self._parse(chunk)
                continue
            ids: list[str] = []
            for record in self._parse(chunk):
                ids.append(record.id)
                self.report.records += 1
                self.report.residues += len(record.sequence)
                yield record
            repeated = self.report.remember(ids)
            self.report.duplicates += len(repeated)
            self.report.duplicate_ids += repeated[: 10 - len(self.report.duplicate_ids)]

    def _raw_blocks(self, stream: BinaryIO) -> Iterator[bytes]:
        digest = hashlib.sha256() if self.report is not None else None
        num_bytes = 0
        while True:
            try:
                block = stream.read(_BLOCK_BYTES)
            except OSError as error:
                raise FastaError(f"{self.name} cannot be read: {error.strerror}{self._progress()}.") from error
            if not block:
                break
            num_bytes += len(block)
            if digest is not None:
                digest.update(block)
            yield block
        if self.report is not None and digest is not None:
            self.report.inputs.append(InputFile(self.name, num_bytes, digest.hexdigest()))

    def _text_blocks(self, stream: BinaryIO) -> Iterator[bytes]:
        """Blocks of text: decompressed if need be, every line end a newline, no byte order mark."""
        start, blocks = _peek(self._raw_blocks(stream))
        if start.startswith(b"\x1f\x8b"):
            start, blocks = _peek(self._gunzip(blocks))
        elif (kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)) is not None:
            raise FastaError(f"{self.name} is compressed with {kind}; expected FASTA, plain or compressed with gzip.")
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise FastaError(f"{self.name} is UTF-16 text; expected FASTA in ASCII or UTF-8.")
        first = True
        for block in blocks:
            # Half a CRLF at the end of a block does no harm: CR and LF both become newlines, and blank lines are allowed.
            text = block.replace(b"\r", b"\n") if b"\r" in block else block
            yield text.removeprefix(b"\xef\xbb\xbf") if first else text
            first = False

    def _gunzip(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Decompressed blocks of bounded size; every member's checksum and length are verified."""
        member = zlib.decompressobj(wbits=31)
        position = 0
        members = 0  # that are complete
        for block in blocks:
            position += len(block)
            rest = block
            while rest:
                if member.eof:
                    # Tape archivers pad with zeros, which gzip ignores; anything else has to be another member.
                    rest = rest.lstrip(b"\0")
                    if not rest:
                        break
                    member = zlib.decompressobj(wbits=31)
                    members += 1
                try:
                    text = member.decompress(rest, _BLOCK_BYTES)
                except zlib.error as error:
                    reason = str(error).rpartition(": ")[2]  # "Error -3 while decompressing data: incorrect data check"
                    after = f" after {members:,} complete members" if members else ""
                    raise FastaError(
                        f"{self.name} is not valid gzip data near byte {position:,}{after} ({reason}){self._progress()}; "
                        "expected an undamaged file with nothing after it."
                    ) from error
                rest = member.unused_data if member.eof else member.unconsumed_tail
                if text:
                    yield text
        tail = member.flush()
        if not member.eof:
            raise FastaError(
                f"{self.name} ends in the middle of its gzip data, at byte {position:,}{self._progress()}; "
                "expected a complete file."
            )
        if tail:
            yield tail

    def _chunks(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Byte strings of whole records, each starting with ">"; memory is bounded by one block and one record."""
        pending = bytearray()
        for block in blocks:
            searched = max(len(pending) - 1, 0)
            pending += block
            if self.number == 0 and not pending.startswith(b">"):
                pending = pending.lstrip(_WHITESPACE)
                if not pending:
                    continue
                self.check_start(pending)
                searched = 0
            boundary = pending.rfind(b"\n>", searched)
            if boundary >= 0:
                yield bytes(pending[: boundary + 1])
                del pending[: boundary + 1]
            if len(pending) > _MAX_HEADER_BYTES and pending.find(b"\n", 0, _MAX_HEADER_BYTES) < 0:
                raise self._error(self.number + 1, "", _LONG_HEADER)
            if len(pending) > self.max_length:
                pending = self._without_whitespace(pending)
        if not pending:
            raise FastaError(
                f"{self.name} is empty; expected FASTA records, each a line that starts with '>' and a sequence."
            )
        yield bytes(pending)

    def check_start(self, text: bytearray) -> None:
        """Refuses text that is not FASTA by its first bytes."""
        if text.startswith(b">"):
            return
        found = f"found {_shown(text[:20].decode('utf-8', 'replace'))} at its start"
        if text.startswith(b"@"):
            raise FastaError(
                f"{self.name} looks like FASTQ: {found}; expected protein FASTA, whose records start with '>'."
            )
        line = bytes(text.split(b"\n", 1)[0]).upper().translate(None, _VALID_BYTES + _WHITESPACE)
        if not line:
            raise FastaError(
                f"{self.name} has no header: {found}; expected a line that starts with '>' before each sequence."
            )
        raise FastaError(f"{self.name} is not FASTA: {found}; expected a line that starts with '>'.")

    def _without_whitespace(self, pending: bytearray) -> bytearray:
        """The unfinished record at the end of what was read, made compact; refused as soon as it is too long."""
        header, newline, body = pending.partition(b"\n")
        residues = body.translate(None, _WHITESPACE)
        if len(residues) > self.max_length:
            raise self._error(
                self.number + 1, header[1:].decode("utf-8", "replace"), self._too_long(f"more than {self.max_length:,}")
            )
        return header + newline + residues + (newline if body.endswith(newline) else b"")

    def _parse(self, chunk: bytes) -> Iterator[Record]:
        from needletail import parse_fastx_string

        # The blank lines keep needletail from failing on a last record without a sequence, which is reported here.
        for raw in parse_fastx_string(chunk.decode("utf-8", "replace") + "\n\n\n"):
            self.number += 1
            header, sequence = raw.id, raw.seq
            if sequence.encode("utf-8").translate(None, _VALID_BYTES):
                cleaned = self.clean(header, sequence)
                if cleaned is None:
                    continue
                sequence = cleaned
            if not sequence:
                raise self._error(self.number, header, "the record has no sequence; expected at least one residue")
            if len(sequence) > self.max_length:
                raise self._error(self.number, header, self._too_long(f"{len(sequence):,}"))
            if len(header) >= _MAX_HEADER_BYTES:
                raise self._error(self.number, "", _LONG_HEADER)
            if "\0" in header:
                raise self._error(self.number, header.replace("\0", ""), "the header holds a NUL byte; expected text")
            words = header.split(maxsplit=1)
            yield Record(words[0] if words else "", words[1] if len(words) > 1 else "", sequence, self.number)

    def clean(self, header: str, sequence: str) -> str | None:
        """Without spaces, in upper case, and with `on_invalid` applied; None if the record is to be left out."""
        encoded = sequence.encode("utf-8").translate(None, _WHITESPACE)
        upper = encoded.translate(_TO_UPPER)
        letters = upper.decode("utf-8")
        if upper.translate(None, _VALID_BYTES):
            position = next(i for i, letter in enumerate(letters) if letter not in RESIDUES)
            if self.on_invalid == "error":
                raise self._error(
                    self.number,
                    header,
                    f"{_described(letters[position])} is not a residue; expected {expected_residues()} "
                    "(on-invalid 'x' replaces it by X, 'skip' leaves the record out)",
                    position + 1,
                )
            if self.on_invalid == "skip":
                if self.report is not None:
                    self.report.skipped += 1
                return None
            replaced = "".join(letter if letter in RESIDUES else "X" for letter in letters)
            if self.report is not None:
                self.report.replaced += sum(1 for letter in letters if letter not in RESIDUES)
            letters = replaced
        if self.report is not None and upper != encoded:
            self.report.lower_case += 1
        return letters

    def _too_long(self, count: str) -> str:
        return (
            f"the record has {count} residues; expected at most {self.max_length:,} "
            "(records are never truncated: raise max-length or leave the record out)"
        )

    def _error(self, number: int, header: str, what: str, position: int | None = None) -> FastaError:
        words = header.split(maxsplit=1)
        name = f" ({_shown(words[0])})" if words else ""
        residue = "" if position is None else f", residue {position:,}"
        return FastaError(f"{self.name}, record {number:,}{name}{residue}: {what}.")

    def _progress(self) -> str:
        return f", after {self.number:,} complete records"


class _SeenIds:
    """The identifiers seen so far, as sorted runs of 64-bit hashes: eight bytes each, whatever their length.

    Two runs of like size are merged, so there are few runs and each hash is moved a logarithmic number of times. Two different
    identifiers collide with probability 2^-64, which would overcount the duplicates by one and change nothing else.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.int64]] = []

    def add(self, ids: list[str]) -> list[str]:
        """Remember `ids`; returns those that were seen before, in order."""
        hashes = np.fromiter(map(hash, ids), dtype=np.int64, count=len(ids))
        repeated = np.ones(len(ids), dtype=np.bool_)
        repeated[np.unique(hashes, return_index=True)[1]] = False
        for earlier in self._runs:
            found = np.minimum(np.searchsorted(earlier, hashes), len(earlier) - 1)
            repeated |= earlier[found] == hashes
        run = hashes[~repeated]
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
        if len(run):
            run.sort(kind="stable")
            self._runs.append(run)
        return [ids[i] for i in np.flatnonzero(repeated)]


def locate(source: str) -> Path | None:
    """The path behind a source; None is standard input.

    Raises:
        FastaError: there is no such file.
    """
    if source == "-":
        return None
    if source.startswith("bundled:"):
        name = source.removeprefix("bundled:")
        if name not in BUNDLED:
            raise FastaError(
                f"{source} is not a bundled set; expected {', '.join(f'bundled:{known}' for known in BUNDLED)}."
            )
        return _SAMPLE_FOLDER / f"{name}.fasta.gz"
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise FastaError(f"{source} does not exist; expected a FASTA file.") from error
    except (OSError, ValueError) as error:
        raise FastaError(f"{_shown(source)} cannot be opened ({error}); expected a FASTA file.") from error
    if stat.S_ISDIR(mode):
        raise FastaError(f"{source} is a folder; expected a FASTA file.")
    return path


def _peek(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first few bytes, enough for any magic number, and all the blocks."""
    start = b""
    for block in blocks:
        start += block
        if len(start) >= 8:
            break
    return start, chain([start], blocks)


def _shown(text: str) -> str:
    """Text from a file as it may go to a terminal: short, and without control characters."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _described(letter: str) -> str:
    if letter == "\0":
        return "a NUL byte"
    name = _NAMES.get(letter)
    return repr(letter) if name is None else f"{letter!r} ({name})"
