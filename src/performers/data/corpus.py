"""Proteins as one flat array of residue ids, on disk or in memory.

`build_corpus` reads FASTA once and leaves a folder; `Corpus.open` memory-maps it, offsets and all, so a corpus of 10^11 residues
costs no memory and any stretch of it is a slice. A corpus holds residues and headers, nothing else: no special tokens, no
contexts, no order of training. `performers.data.corpus_files` says what is in the folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from performers.data.alphabet import decode, encode
from performers.data.corpus_files import FORMAT, CorpusWriter, header_of, open_stream, read_metadata
from performers.data.fasta import Record
from performers.errors import CorpusError, InputError, MissingExtraError
from performers.folders import check_unused

if TYPE_CHECKING:
    import datasets

_Int64s = npt.NDArray[np.int64]


class Corpus:
    """A sequence of proteins; `corpus[i]` is a read-only view of shape (length of protein i,), uint8.

    Made by `build_corpus`, `Corpus.open`, `in_memory_corpus` or `subset`.

    Attributes:
        tokens: the flat ids, shape (at least `num_residues`,), uint8.
        metadata: the content of `corpus.json`; empty for a corpus in memory.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.uint8],
        offsets: _Int64s,
        headers: npt.NDArray[np.uint8],
        header_offsets: _Int64s,
        *,
        indices: _Int64s | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.tokens = tokens
        self.metadata = metadata or {}
        # Protein i is the one with number indices[i] in the files, or i where there is no choice; number k lies at
        # tokens[offsets[k]:offsets[k + 1]].
        self._indices = indices
        self._offsets = offsets
        self._headers = headers
        self._header_offsets = header_offsets

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Corpus:
        """Memory-map a corpus folder.

        Raises:
            CorpusError: the folder is missing, of another format, or its files do not fit together.
        """
        path = Path(folder)
        metadata = read_metadata(path)
        if metadata.get("format") != FORMAT:
            raise CorpusError(
                f"{path} is a corpus of format {metadata.get('format')!r}; expected {FORMAT}: build it again."
            )
        tokens, offsets = open_stream(path, "tokens.bin", "offsets.npy", metadata, "residues")
        headers, header_offsets = open_stream(path, "headers.bin", "header_offsets.npy", metadata, "header_bytes")
        return cls(tokens, offsets, headers, header_offsets, metadata=metadata)

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
        with CorpusWriter(path, {"dataset_column": column}) as writer:
            writer.start_again()
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
                writer.add(ids.tobytes(), row.get("id"), row.get("description"))
                writer.report.records += 1
                writer.report.residues += len(ids)
            if not writer.report.records:
                raise CorpusError("The dataset is empty; expected at least one row.")
            writer.finish()
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
        return len(self._offsets) - 1 if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        number = self._number(index)
        return self.tokens[self._offsets[number] : self._offsets[number + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> _Int64s:
        """The residues of every protein, shape (N,), int64: an array in memory, made when first asked for."""
        return np.diff(self._offsets) if self._indices is None else self.lengths_of(np.arange(len(self)))

    def lengths_of(self, indices: _Int64s) -> _Int64s:
        """The residues of the proteins at `indices`, int64; of the offsets it reads theirs alone."""
        numbers = indices if self._indices is None else self._indices[indices]
        return self._offsets[numbers + 1] - self._offsets[numbers]

    def residues_before(self, positions: _Int64s) -> _Int64s:
        """How many residues the proteins before each of the positions 0 ... N have together, int64."""
        if self._indices is None:
            return self._offsets[positions]
        return np.concatenate([[0], np.cumsum(self.lengths)])[positions]

    @cached_property
    def num_residues(self) -> int:
        """The residues of all proteins."""
        return int(self.residues_before(np.array([len(self)]))[0])

    def header(self, index: int) -> str:
        """The header of a protein as it was read, without the ">"."""
        number = self._number(index)
        return self._headers[self._header_offsets[number] : self._header_offsets[number + 1]].tobytes().decode("utf-8")

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
        if len(chosen) and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(f"proteins {chosen.min()} to {chosen.max()} of {len(self)}")
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        return Corpus(
            self.tokens,
            self._offsets,
            self._headers,
            self._header_offsets,
            indices=chosen if self._indices is None else self._indices[chosen],
            metadata=self.metadata,
        )

    def _number(self, index: int) -> int:
        """The number in the files of the protein at an index, which may count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"protein {index} of {len(self)}")
        place = index % len(self)
        return place if self._indices is None else int(self._indices[place])

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
            header, sequence = header_of(record.id, record.description), record.sequence
        else:
            header, sequence = header_of(record[0]), record[1]
        if not sequence:
            raise InputError(f"The sequence of {header!r} is empty; expected at least one residue.")
        sequences.append(encode(sequence).tobytes())
        headers.append(header.encode("utf-8"))
    if not sequences:
        raise InputError("There are no records; expected at least one.")
    return Corpus(
        np.frombuffer(b"".join(sequences), dtype=np.uint8),
        _offsets_of(sequences),
        np.frombuffer(b"".join(headers), dtype=np.uint8),
        _offsets_of(headers),
    )


def _offsets_of(pieces: list[bytes]) -> _Int64s:
    return np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
