"""Tables that people bring: CSV or TSV (plain or gzip) and parquet, row by row in bounded memory.

A source goes in, the names of its columns and a stream of numbered rows come out; every value is text, as in the file. What the
columns mean is the tool's business.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from performers.errors import InputError, MissingExtraError

_MAX_LINE = 64 * 1024 * 1024
_PARQUET_ROWS = 4096
_READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)


@dataclass(frozen=True)
class Table:
    """A table that is read once.

    Attributes:
        name: of the file.
        columns: in the order of the file.
        rows: the number of each row, counted from 1 without the header, and its values by column.
    """

    name: str
    columns: tuple[str, ...]
    rows: Iterator[tuple[int, dict[str, str]]]

    def require(self, *names: str) -> None:
        """Refuse a table without these columns.

        Raises:
            InputError: names the first that is missing, and those that are there.
        """
        for name in names:
            if name not in self.columns:
                raise InputError(f"{self.name} has no column {name!r}; its columns are {', '.join(self.columns)}.")


def suffix_of(source: str | Path) -> str:
    """The ending that says what a file is, in lower case and without .gz."""
    path = Path(source)
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def read_table(source: str | Path) -> Table:
    """The rows of a CSV, TSV or parquet file; the first line of a text file names the columns.

    Raises:
        InputError: the file is missing, empty, damaged or no table, or a row has not as many values as there are columns; names
            file and row. Raised here for what the header shows, while iterating for the rest.
        MissingExtraError: parquet needs pyarrow.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source} does not exist; expected a table with a header, as CSV, TSV or parquet.")
    return _parquet(path) if suffix_of(path) == ".parquet" else _text(path)


def _text(path: Path) -> Table:
    csv.field_size_limit(_MAX_LINE)  # a process has one limit, and the usual one is shorter than long proteins
    try:
        with _open(path) as stream:
            header = next(_lines(path, stream), "")
        delimiter = "\t" if "\t" in header and "," not in header.partition("\t")[0] else ","
        columns = tuple(name.strip() for name in next(csv.reader([header], delimiter=delimiter), []))
    except _READ_ERRORS as error:
        raise InputError(f"{path} cannot be read as a table: {error}.") from None
    if not any(columns):
        raise InputError(f"{path} is empty; expected a header that names the columns, and rows.")
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} has two columns of the same name: {', '.join(columns)}.")
    return Table(str(path), columns, _text_rows(path, columns, delimiter))


def _text_rows(path: Path, columns: tuple[str, ...], delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    number = 0
    try:
        with _open(path) as stream:
            stream.readline(_MAX_LINE)
            for values in csv.reader(_lines(path, stream), delimiter=delimiter):
                if not any(values):
                    continue
                number += 1
                if len(values) != len(columns):
                    raise InputError(
                        f"{path}, row {number:,}: {len(values)} values; expected {len(columns)}, one for each of "
                        f"{', '.join(columns)}."
                    )
                yield number, {name: value.strip() for name, value in zip(columns, values, strict=True)}
    except _READ_ERRORS as error:
        raise InputError(f"{path} cannot be read after {number:,} rows: {error}.") from None


def _lines(path: Path, stream: TextIO) -> Iterator[str]:
    while line := stream.readline(_MAX_LINE):
        if len(line) == _MAX_LINE:
            raise InputError(f"{path} has a line of more than {_MAX_LINE:,} characters; expected a table.")
        if "\0" in line:
            raise InputError(f"{path} holds a NUL byte; expected text.")
        yield line


def _open(path: Path) -> TextIO:
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    opened = gzip.open if is_gzip else open
    return opened(path, "rt", encoding="utf-8-sig", newline="")  # pyright: ignore[reportReturnType]


def _parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet", f"reading {path}") from None
    try:
        file: Any = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {' '.join(str(error).split())}.") from None
    columns = tuple(str(name) for name in file.schema_arrow.names)

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        number = 0
        try:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    texts = {name: "" if values[name] is None else str(values[name]) for name in columns}
                    if any("\0" in text for text in texts.values()):
                        raise InputError(f"{path}, row {number:,} holds a NUL byte; expected text.")
                    yield number, texts
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            what = " ".join(str(error).split())
            raise InputError(f"{path} cannot be read after {number:,} rows: {what}.") from None

    return Table(str(path), columns, rows())


def numbered_columns(names: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """For each wanted name the column of that name whatever its case; those that are missing are left out."""
    by_lower = {name.lower(): name for name in reversed(names)}
    return {name: by_lower[name.lower()] for name in wanted if name.lower() in by_lower}
