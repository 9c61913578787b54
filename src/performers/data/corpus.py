"""Proteins as one flat array of residue ids, on disk or in memory.

`build_corpus` reads FASTA once and leaves a folder; `Corpus.open` memory-maps it, so a corpus of 10^11 residues costs no memory
and any stretch of it is a slice. A corpus holds residues and headers, nothing else: no special tokens, no contexts, no order
of training.

The folder (format 1):

| file | content |
|---|---|
| `tokens.bin` | uint8 ids of `performers.data.alphabet`, all proteins one after the other |
| `offsets.npy` | int64, N + 1: protein i is `tokens[offsets[i]:offsets[i + 1]]` |
| `headers.bin`, `header_offsets.npy` | the headers in UTF-8, likewise |
| `corpus.json` | format, counts, settings, and what the reader reported, with the SHA-256 of every input |

It is written in a sibling folder `.NAME.building` and renamed when complete, so the final name never holds half a corpus. A
build that was cut off continues after the last input that was finished, if that input and the settings are still the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from performers.data.alphabet import ENCODING_TABLE, decode, encode
from performers.data.fasta import MAX_LENGTH, FastaReport, OnInvalid, Record, Source, locate, read_fasta
from performers.errors import CorpusError, FastaError, InputError, MissingExtraError, OutputError
from performers.folders import building_folder, check_unused, fsync, publish, writing

if TYPE_CHECKING:
    import datasets

FORMAT = 1

_FLUSH_BYTES = 1 << 22
_OFFSETS_AT_ONCE = 1 << 20
_STREAMS = ("tokens.bin", "lengths.bin", "headers.bin", "header_lengths.bin")


class Corpus:
    """A sequence of proteins; `corpus[i]` is a read-only view of shape (length of protein i,), uint8.

    Made by `build_corpus`, `Corpus.open`, `in_memory_corpus` or `subset`.

    Attributes:
        tokens: the flat ids, shape (at least `num_residues`,), uint8.
        starts: where each protein begins in `tokens`, shape (N,), int64.
        lengths: its residues, shape (N,), int64.
        metadata: the content of `corpus.json`; empty for a corpus in memory.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.uint8],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        headers: npt.NDArray[np.uint8],
        header_starts: npt.NDArray[np.int64],
        header_lengths: npt.NDArray[np.int64],
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.tokens = tokens
        self.starts = starts
        self.lengths = lengths
        self.metadata = metadata or {}
        self._headers = headers
        self._header_starts = header_starts
        self._header_lengths = header_lengths

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Corpus:
        """Memory-map a corpus folder.

        Raises:
            CorpusError: the folder is missing, of another format, or its files do not fit together.
        """
        path = Path(folder)
        metadata = _read_metadata(path)
        if metadata.get("format") != FORMAT:
            raise CorpusError(
                f"{path} is a corpus of format {metadata.get('format')!r}; expected {FORMAT}: build it again."
            )
        tokens, offsets = _open_stream(path, "tokens.bin", "offsets.npy", metadata, "residues")
        headers, header_offsets = _open_stream(path, "headers.bin", "header_offsets.npy", metadata, "header_bytes")
        return cls(
            tokens, offsets[:-1], np.diff(offsets), headers, header_offsets[:-1], np.diff(header_offsets), metadata
        )

    @classmethod
    def from_datasets(
        cls,
        dataset: Iterable[Mapping[str, Any]],
        folder: str | os.PathLike[str],
        *,
        column: str = "sequence",
    ) -> Corpus:
        """Write a Hugging Face dataset as a corpus folder.

        Arguments:
            dataset: a `datasets.Dataset`, or any rows with the residues in `column` and optionally "id" and "description".
            folder: must not exist, or be empty.

        Raises:
            CorpusError: a row has no such column, no residues, or a character that is not a residue.
            OutputError: the folder is in use or cannot be written.
        """
        path = Path(folder)
        check_unused(path)
        with _Builder(path, {"dataset_column": column}) as builder:
            builder.start_again()
            for number, row in enumerate(dataset, start=1):
                if column not in row:
                    raise CorpusError(f"Row {number} has no column {column!r}; expected it among {', '.join(row)}.")
                if not isinstance(row[column], str | bytes):
                    raise CorpusError(f"Row {number} has {row[column]!r} in {column!r}; expected residues as text.")
                try:
                    ids = encode(row[column])
                except InputError as error:
                    raise CorpusError(f"Row {number}: {error}") from error
                if not len(ids):
                    raise CorpusError(f"Row {number} has no residues; expected at least one.")
                builder.add(ids.tobytes(), _header(row.get("id"), row.get("description")))
                builder.report.records += 1
                builder.report.residues += len(ids)
            if not builder.report.records:
                raise CorpusError("The dataset is empty; expected at least one row.")
            builder.finish()
        return cls.open(path)

    def to_datasets(self) -> datasets.Dataset:
        """The proteins as a Hugging Face dataset with the columns id, description and sequence, in memory.

        Raises:
            MissingExtraError: the package `datasets` is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError("datasets", "datasets", "exporting a corpus to Hugging Face datasets") from error
        records = list(self.records())
        return datasets.Dataset.from_dict(
            {
                "id": [record.id for record in records],
                "description": [record.description for record in records],
                "sequence": [record.sequence for record in records],
            }
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        return (self[index] for index in range(len(self)))

    @property
    def num_residues(self) -> int:
        """The residues of all proteins."""
        return int(self.lengths.sum())

    def header(self, index: int) -> str:
        """The header of a protein as it was read, without the ">"."""
        start = self._header_starts[index]
        return self._headers[start : start + self._header_lengths[index]].tobytes().decode("utf-8")

    def name(self, index: int) -> str:
        """The identifier of a protein: the first word of its header; need not be unique."""
        return next(iter(self.header(index).split(maxsplit=1)), "")

    def records(self) -> Iterator[Record]:
        """The proteins as text; `number` counts from 1."""
        for index, ids in enumerate(self):
            words = self.header(index).split(maxsplit=1)
            yield Record(words[0] if words else "", words[1] if len(words) > 1 else "", decode(ids), index + 1)

    def subset(self, indices: npt.ArrayLike) -> Corpus:
        """The proteins at `indices`, in that order, without copying a residue."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Corpus(
            self.tokens,
            self.starts[chosen],
            self.lengths[chosen],
            self._headers,
            self._header_starts[chosen],
            self._header_lengths[chosen],
            self.metadata,
        )

    def first_identical(self) -> npt.NDArray[np.int64]:
        """For each protein the index of the first with the same sequence, shape (N,) (by 128-bit BLAKE2b of the residues)."""
        digests = b"".join(hashlib.blake2b(ids.tobytes(), digest_size=16).digest() for ids in self)
        _, first, inverse = np.unique(np.frombuffer(digests, dtype="V16"), return_index=True, return_inverse=True)
        return first[inverse].astype(np.int64)

    def deduplicate(self) -> npt.NDArray[np.int64]:
        """The indices of the first of each set of identical sequences, in order."""
        return np.flatnonzero(self.first_identical() == np.arange(len(self)))


def in_memory_corpus(records: Iterable[Record | tuple[str, str]]) -> Corpus:
    """A corpus without files, from records or (identifier, sequence) pairs.

    Raises:
        InputError: there is no record, or a sequence is empty or holds a character that is not a residue.
    """
    sequences: list[bytes] = []
    headers: list[bytes] = []
    for record in records:
        if isinstance(record, Record):
            header, sequence = _header(record.id, record.description), record.sequence
        else:
            header, sequence = _header(record[0]), record[1]
        if not sequence:
            raise InputError(f"The sequence of {header!r} is empty; expected at least one residue.")
        sequences.append(encode(sequence).tobytes())
        headers.append(header.encode("utf-8"))
    if not sequences:
        raise InputError("There are no records; expected at least one.")
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    header_lengths = np.array([len(header) for header in headers], dtype=np.int64)
    return Corpus(
        np.frombuffer(b"".join(sequences), dtype=np.uint8),
        np.cumsum(lengths) - lengths,
        lengths,
        np.frombuffer(b"".join(headers), dtype=np.uint8),
        np.cumsum(header_lengths) - header_lengths,
        header_lengths,
    )


def build_corpus(
    inputs: Source | Sequence[Source],
    folder: str | os.PathLike[str],
    *,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    progress: Callable[[FastaReport], None] | None = None,
) -> Corpus:
    """Read FASTA once and leave a corpus folder; continues a build of the same inputs that was cut off.

    Arguments:
        inputs: what `read_fasta` takes. Several inputs are several points from which a build can continue.
        folder: where the corpus goes; must not exist, be empty, or hold the corpus of exactly these inputs, which is opened.
        max_length: see `read_fasta`.
        on_invalid: see `read_fasta`.
        progress: called with the counts so far after every few megabytes.

    Raises:
        FastaError: see `read_fasta`.
        OutputError: the folder is in use for something else or cannot be written.
        DiskFullError: there is no room; what was finished is kept beside the folder for the next attempt.
    """
    path = Path(folder)
    sources = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    # A missing input is found before anything is written.
    read_fasta(sources, max_length=max_length, on_invalid=on_invalid)
    settings: dict[str, Any] = {"max_length": max_length, "on_invalid": on_invalid}
    if (path / "corpus.json").exists() and _is_built_from(_read_metadata(path), settings, sources):
        return Corpus.open(path)
    check_unused(path, "a new or empty folder, or the corpus of these inputs")
    with _Builder(path, settings) as builder:
        for source in sources[builder.resume(sources) :]:
            for record in read_fasta(source, max_length=max_length, on_invalid=on_invalid, report=builder.report):
                ids = record.sequence.encode("ascii").translate(ENCODING_TABLE)
                flushed = builder.add(ids, _header(record.id, record.description))
                if flushed and progress is not None:
                    progress(builder.report)
            builder.finish_input()
        if not builder.report.records:
            names = ", ".join(os.fspath(source) for source in sources)
            raise FastaError(f"{names}: all {builder.report.skipped:,} records were left out; expected one to remain.")
        builder.finish()
    return Corpus.open(path)


def is_corpus_of(
    inputs: Source | Sequence[Source], folder: str | os.PathLike[str], *, max_length: int, on_invalid: OnInvalid
) -> bool:
    """Whether a folder holds the corpus that `build_corpus` would build of these files as they are now."""
    sources = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    settings: dict[str, Any] = {"max_length": max_length, "on_invalid": on_invalid}
    return (Path(folder) / "corpus.json").exists() and _is_built_from(_read_metadata(Path(folder)), settings, sources)


class _Builder:
    """A corpus under construction, in a folder beside its final name."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.building = building_folder(folder)
        self.settings = settings
        self.report = FastaReport()
        self._tokens = bytearray()
        self._headers = bytearray()
        self._lengths: list[int] = []
        self._header_lengths: list[int] = []
        self._sizes: dict[str, int] = dict.fromkeys(_STREAMS, 0)
        self._lock = -1

    def __enter__(self) -> _Builder:
        with writing(self.building):
            self.building.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.building, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise OutputError(
                f"{self.folder} is being built by another process; wait for it or choose another folder."
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # After bad input there is nothing to continue from unless an earlier input was finished.
        if isinstance(error, InputError) and not (self.building / "progress.json").exists():
            shutil.rmtree(self.building, ignore_errors=True)
        os.close(self._lock)

    def start_again(self) -> None:
        """Forget whatever an earlier build left."""
        with writing(self.building):
            for path in self.building.iterdir():
                path.unlink()
            for name in _STREAMS:
                (self.building / name).touch()

    def resume(self, sources: Sequence[Source]) -> int:
        """How many of the sources an earlier build has finished and need not be read again."""
        try:
            state: dict[str, Any] = json.loads((self.building / "progress.json").read_text("utf-8"))
            finished = _num_inputs(state)
            same = finished and state["settings"] == self.settings and _num_same(state, sources) == finished
            usable = same and all(_size(self.building / name) >= size for name, size in state["sizes"].items())
        except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
            usable, finished, state = False, 0, {}
        if not usable:
            self.start_again()
            return 0
        self._sizes = state["sizes"]
        with writing(self.building):
            for name, size in self._sizes.items():
                os.truncate(self.building / name, size)
        self.report = FastaReport.from_dict(state["report"])
        ends = np.cumsum(np.fromfile(self.building / "header_lengths.bin", dtype="<i8"))
        headers = (self.building / "headers.bin").read_bytes()
        starts = [0, *ends.tolist()]
        self.report.remember(
            headers[a:b].decode("utf-8").split(" ", 1)[0] for a, b in zip(starts, ends.tolist(), strict=False)
        )
        return finished

    def add(self, tokens: bytes, header: str) -> bool:
        """Add one protein; True when that filled the buffer and it was written."""
        name = header.encode("utf-8")
        self._tokens += tokens
        self._headers += name
        self._lengths.append(len(tokens))
        self._header_lengths.append(len(name))
        if len(self._tokens) + len(self._headers) < _FLUSH_BYTES:
            return False
        self._flush()
        return True

    def finish_input(self) -> None:
        """Make everything so far durable, so that a later build can continue here."""
        self._flush()
        for name in _STREAMS:
            fsync(self.building / name)
        state = {"settings": self.settings, "sizes": self._sizes, "report": self.report.to_dict()}
        self._write_json("progress.json", state)

    def finish(self) -> None:
        """Complete the folder and give it its final name."""
        self._flush()
        with writing(self.building):
            self._write_offsets("lengths.bin", "offsets.npy")
            self._write_offsets("header_lengths.bin", "header_offsets.npy")
            for name in ("tokens.bin", "headers.bin", "offsets.npy", "header_offsets.npy"):
                fsync(self.building / name)
            metadata = {
                "format": FORMAT,
                "proteins": self.report.records,
                "residues": self._sizes["tokens.bin"],
                "header_bytes": self._sizes["headers.bin"],
                "settings": self.settings,
                "report": self.report.to_dict(),
            }
            self._write_json("corpus.json", metadata)
            for name in ("lengths.bin", "header_lengths.bin", "progress.json"):
                (self.building / name).unlink(missing_ok=True)
        publish(self.building, self.folder)

    def _flush(self) -> None:
        streams = {
            "tokens.bin": self._tokens,
            "lengths.bin": np.array(self._lengths, dtype="<i8").tobytes(),
            "headers.bin": self._headers,
            "header_lengths.bin": np.array(self._header_lengths, dtype="<i8").tobytes(),
        }
        for name, content in streams.items():
            with writing(self.building / name, len(content)), (self.building / name).open("ab", buffering=0) as stream:
                left = memoryview(content)
                while left:
                    left = left[stream.write(left) :]
                left.release()
            self._sizes[name] += len(content)
        self._tokens, self._headers, self._lengths, self._header_lengths = bytearray(), bytearray(), [], []

    def _write_offsets(self, lengths_name: str, offsets_name: str) -> None:
        # Written from front to back: a full disk is an error then, where a memory map would kill the process.
        count = self._sizes[lengths_name] // 8
        path = self.building / offsets_name
        header = {"descr": "<i8", "fortran_order": False, "shape": (count + 1,)}
        total = np.zeros(1, dtype="<i8")
        with (self.building / lengths_name).open("rb") as lengths, path.open("wb") as offsets:
            np.lib.format.write_array_header_1_0(offsets, header)
            offsets.write(total.tobytes())
            for _ in range(0, count, _OFFSETS_AT_ONCE):
                ends = total + np.cumsum(np.fromfile(lengths, dtype="<i8", count=_OFFSETS_AT_ONCE))
                offsets.write(ends.tobytes())
                total = ends[-1:]

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        path = self.building / f".{name}"
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        with writing(path, len(text)):
            path.write_text(text, encoding="utf-8")
            fsync(path)
            path.rename(self.building / name)
            fsync(self.building)


def _header(name: object, description: object = None) -> str:
    header = (
        f"{name if name is not None else ''} {description}" if description else str(name if name is not None else "")
    )
    return header if header.isprintable() else header.replace("\n", " ").replace("\r", " ")


def _read_metadata(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CorpusError(f"{folder} is not a folder; expected one that `build_corpus` wrote.")
    try:
        metadata = json.loads((folder / "corpus.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise CorpusError(f"{folder} holds no corpus.json; expected a folder that `build_corpus` wrote.") from error
    except ValueError as error:
        raise CorpusError(f"{folder / 'corpus.json'} is damaged ({error}); build the corpus again.") from error
    if not isinstance(metadata, dict):
        raise CorpusError(f"{folder / 'corpus.json'} is damaged (not an object); build the corpus again.")
    return cast("dict[str, Any]", metadata)


def _open_stream(
    folder: Path, content_name: str, offsets_name: str, metadata: dict[str, Any], key: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    path = folder / content_name
    count, size = metadata.get("proteins"), metadata.get(key)
    try:
        offsets = np.lib.format.open_memmap(folder / offsets_name, mode="r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{folder / offsets_name} is missing or damaged ({error}); build the corpus again."
        ) from error
    if offsets.dtype != np.int64 or offsets.shape != (count + 1 if isinstance(count, int) else -1,):
        raise CorpusError(
            f"{folder / offsets_name} holds {offsets.dtype} of shape {offsets.shape}; expected int64 offsets of {count} proteins."
        )
    rising = all(
        (np.diff(offsets[i : i + _OFFSETS_AT_ONCE + 1]) >= 0).all() for i in range(0, len(offsets), _OFFSETS_AT_ONCE)
    )
    if not rising:
        raise CorpusError(f"{folder / offsets_name} is damaged (offsets do not rise); build the corpus again.")
    if _size(path) != size or offsets[0] != 0 or offsets[-1] != size:
        raise CorpusError(f"{path} holds {_size(path):,} bytes; expected {size}: build the corpus again.")
    if not size:
        return np.zeros(0, dtype=np.uint8), offsets
    return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray), offsets


def _num_inputs(state: dict[str, Any]) -> int:
    return len(state.get("report", {}).get("inputs", []))


def _is_built_from(metadata: dict[str, Any], settings: dict[str, Any], sources: Sequence[Source]) -> bool:
    count = _num_inputs(metadata)
    return metadata.get("settings") == settings and count == len(sources) and _num_same(metadata, sources) == count


def _num_same(state: dict[str, Any], sources: Sequence[Source]) -> int:
    """How many of the recorded inputs are, byte for byte, the first of `sources`."""
    same = 0
    for known, source in zip(state["report"]["inputs"], sources, strict=False):
        path = locate(os.fspath(source))
        if path is None or not path.is_file() or path.stat().st_size != known["num_bytes"]:
            break
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != known["sha256"]:
                break
        same += 1
    return same


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
