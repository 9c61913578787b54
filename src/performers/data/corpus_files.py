"""The files of a corpus folder: how they are written so that a kill at any moment loses little, and how they are opened.

The folder (format 1):

| file | content |
|---|---|
| `tokens.bin` | uint8 ids of `performers.data.alphabet`, all proteins one after the other |
| `offsets.npy` | int64, N + 1: protein i is `tokens[offsets[i]:offsets[i + 1]]` |
| `headers.bin`, `header_offsets.npy` | the headers in UTF-8, likewise |
| `corpus.json` | format, counts, settings, and what the reader reported, with the SHA-256 of every input |

A `Streams` appends to the files that grow, in bounded memory. A `CorpusWriter` owns a folder's sibling `.NAME.building`, where
the corpus comes to be, and renames it when it is complete, so the final name never holds half a corpus. Nothing here reads FASTA.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from performers.data.fasta import FastaReport
from performers.errors import CorpusError, InputError, OutputError
from performers.folders import building_folder, fsync, publish, write_file, writing

FORMAT = 1

_FLUSH_BYTES = 1 << 22
_OFFSETS_AT_ONCE = 1 << 20
_HASHES_AT_ONCE = 1 << 22
# The hash of every identifier serves to count those that occur twice.
_STREAMS = ("tokens.bin", "lengths.bin", "headers.bin", "header_lengths.bin", "id_hashes.bin")
_PROGRESS = "progress.json"


class CountsOnly(FastaReport):
    """A report that remembers no identifiers: `CorpusWriter.finish` counts those that occur twice, from the disk."""

    def remember(self, ids: Iterable[str]) -> list[str]:
        """Forgets them."""
        return []


class Streams:
    """The files of a corpus that grow while it is built; what is added is buffered, a few megabytes at most.

    Attributes:
        folder: where they are.
        sizes: the bytes of each file, without what is still in the buffer.
    """

    def __init__(self, folder: Path, sizes: dict[str, int] | None = None) -> None:
        self.folder = folder
        self.sizes = sizes or dict.fromkeys(_STREAMS, 0)
        self._empty_buffers()
        with writing(folder):
            for name, size in self.sizes.items():
                (folder / name).touch()
                os.truncate(folder / name, size)

    def add(self, tokens: bytes, identifier: object, description: object = None) -> bool:
        """Adds one protein; True when that filled the buffer and it was written."""
        header = header_of(identifier, description).encode("utf-8")
        name = "" if identifier is None else str(identifier)
        self._tokens += tokens
        self._headers += header
        self._lengths.append(len(tokens))
        self._header_lengths.append(len(header))
        self._hashes += hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
        if len(self._tokens) + len(self._headers) < _FLUSH_BYTES:
            return False
        self._flush()
        return True

    def append(self, other: Path) -> None:
        """Adds all that other streams hold, in the folder `other`."""
        self._flush()
        for name in _STREAMS:
            size = _size(other / name)
            with (
                writing(self.folder / name, size),
                (other / name).open("rb") as source,
                (self.folder / name).open("ab") as stream,
            ):
                shutil.copyfileobj(source, stream, _FLUSH_BYTES)
            self.sizes[name] += size

    def sync(self) -> None:
        """Returns when all that was added is on the disk."""
        self._flush()
        for name in _STREAMS:
            fsync(self.folder / name)

    def _flush(self) -> None:
        contents = (
            self._tokens,
            np.array(self._lengths, dtype="<i8").tobytes(),
            self._headers,
            np.array(self._header_lengths, dtype="<i8").tobytes(),
            self._hashes,
        )
        for name, content in zip(_STREAMS, contents, strict=True):
            with writing(self.folder / name, len(content)), (self.folder / name).open("ab", buffering=0) as stream:
                left = memoryview(content)
                while left:
                    left = left[stream.write(left) :]
                left.release()
            self.sizes[name] += len(content)
        self._empty_buffers()

    def _empty_buffers(self) -> None:
        self._tokens, self._headers, self._hashes = bytearray(), bytearray(), bytearray()
        self._lengths: list[int] = []
        self._header_lengths: list[int] = []


class CorpusWriter:
    """A corpus under construction, in a folder beside its final name, by one process at a time.

    Attributes:
        building: the folder.
        report: what was read so far.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.building = building_folder(folder)
        self.settings = settings
        self.report: FastaReport = CountsOnly()
        self._streams: Streams
        self._lock = -1

    def __enter__(self) -> CorpusWriter:
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
        # After bad input there is nothing to continue from unless something was finished.
        if isinstance(error, InputError) and not any(self.building.glob(f"**/{_PROGRESS}")):
            shutil.rmtree(self.building, ignore_errors=True)
        os.close(self._lock)

    def start_again(self) -> None:
        """Forgets whatever an earlier build left in these streams."""
        with writing(self.building):
            (self.building / _PROGRESS).unlink(missing_ok=True)
        self._streams = Streams(self.building)

    def resume(self) -> list[dict[str, Any]]:
        """Goes on with what an earlier build of these settings left; the inputs that it had finished."""
        state = read_progress(self.building, self.settings)
        if state is None:
            self.start_again()
            return []
        self._streams = Streams(self.building, state["sizes"])
        self.report = CountsOnly.from_dict(state["report"])
        return state["report"]["inputs"]

    def add(self, tokens: bytes, identifier: object, description: object = None) -> bool:
        """Adds one protein; True when a few megabytes were written with it."""
        return self._streams.add(tokens, identifier, description)

    def append(self, part: Path, report: FastaReport) -> None:
        """Adds the proteins of streams in another folder, and what was reported of them."""
        self._streams.append(part)
        for name in ("records", "residues", "lower_case", "replaced", "skipped", "inputs"):
            setattr(self.report, name, getattr(self.report, name) + getattr(report, name))

    def finish_input(self) -> None:
        """Makes everything so far durable, so that a later build can continue here."""
        self._streams.sync()
        note_progress(self._streams, self.settings, self.report)

    def finish(self) -> None:
        """Completes the folder and gives it its final name."""
        self._streams.sync()
        sizes = self._streams.sizes
        with writing(self.building):
            self._write_offsets("lengths.bin", "offsets.npy")
            self._write_offsets("header_lengths.bin", "header_offsets.npy")
            for name in ("offsets.npy", "header_offsets.npy"):
                fsync(self.building / name)
        self._count_duplicates()
        metadata = {
            "format": FORMAT,
            "proteins": self.report.records,
            "residues": sizes["tokens.bin"],
            "header_bytes": sizes["headers.bin"],
            "settings": self.settings,
            "report": self.report.to_dict(),
        }
        write_file(self.building / "corpus.json", _as_text(metadata))
        kept = {"tokens.bin", "headers.bin", "offsets.npy", "header_offsets.npy", "corpus.json"}
        with writing(self.building):
            for path in self.building.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in kept:
                    path.unlink()
        publish(self.building, self.folder)

    def _write_offsets(self, lengths_name: str, offsets_name: str) -> None:
        # Written from front to back: a full disk is an error then, where a memory map would kill the process.
        count = self._streams.sizes[lengths_name] // 8
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

    def _count_duplicates(self) -> None:
        """How many records have the identifier of an earlier one, and the first ten of these identifiers.

        The hashes are read from the disk once for every few million of them, each time those of one range of values: memory
        stays the same for any number of records. Two different identifiers collide with probability 2^-64, which would count
        one duplicate too many and change nothing else.
        """
        count = self._streams.sizes["id_hashes.bin"] // 8
        bits = max(0, (-(-count // _HASHES_AT_ONCE) - 1).bit_length())
        found = np.zeros(0, dtype=np.int64)
        for span in range(1 << bits if count else 0):
            hashes, numbers = _hashes_in_span(self.building / "id_hashes.bin", bits, span)
            order = np.argsort(hashes, kind="stable")  # so that the first of equal ones is the earliest record
            repeated = numbers[order][1:][hashes[order][1:] == hashes[order][:-1]]
            self.report.duplicates += len(repeated)
            found = np.sort(np.concatenate([found, repeated]))[:10]
        if len(found):
            offsets = np.lib.format.open_memmap(self.building / "header_offsets.npy", mode="r")
            with (self.building / "headers.bin").open("rb") as headers:
                for number in found:
                    headers.seek(offsets[number])
                    header = headers.read(int(offsets[number + 1] - offsets[number])).decode("utf-8")
                    self.report.duplicate_ids.append(header.split(" ", 1)[0])


def _hashes_in_span(path: Path, bits: int, span: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """The hashes whose first `bits` bits are `span`, and the numbers of their records."""
    hashes: list[npt.NDArray[np.uint64]] = []
    numbers: list[npt.NDArray[np.int64]] = []
    first = 0
    with path.open("rb") as stream:
        while len(block := np.fromfile(stream, dtype="<u8", count=_OFFSETS_AT_ONCE)):
            chosen = np.flatnonzero(block >> np.uint64(64 - bits) == span) if bits else np.arange(len(block))
            hashes.append(block[chosen])
            numbers.append(chosen + first)
            first += len(block)
    return np.concatenate(hashes), np.concatenate(numbers)


def note_progress(streams: Streams, settings: dict[str, Any], report: FastaReport) -> None:
    """Writes down what streams hold, after `Streams.sync`, for `read_progress`."""
    state = {"settings": settings, "sizes": streams.sizes, "report": report.to_dict()}
    write_file(streams.folder / _PROGRESS, _as_text(state))


def read_progress(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `note_progress` wrote, if it is of these settings and the streams hold as much."""
    try:
        state: dict[str, Any] = json.loads((folder / _PROGRESS).read_text("utf-8"))
        report = CountsOnly.from_dict(state["report"])
        usable = bool(report.inputs) and state["settings"] == settings and set(state["sizes"]) == set(_STREAMS)
        usable = usable and all(_size(folder / name) >= size for name, size in state["sizes"].items())
        return {**state, "report": {**report.to_dict()}} if usable else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError, TypeError):
        return None


def header_of(identifier: object, description: object = None) -> str:
    """The header of a record on one line: its identifier and, after a space, the rest."""
    name = "" if identifier is None else str(identifier)
    header = f"{name} {description}" if description else name
    return header if header.isprintable() else header.replace("\n", " ").replace("\r", " ")


def read_metadata(folder: Path) -> dict[str, Any]:
    """The content of `corpus.json`.

    Raises:
        CorpusError: there is none, or it is damaged.
    """
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


def open_stream(
    folder: Path, content_name: str, offsets_name: str, metadata: dict[str, Any], key: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """A file of a corpus and where its pieces begin and end, both memory-mapped.

    Raises:
        CorpusError: a file is missing or damaged, or they do not fit together.
    """
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


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
