"""A handful of sequences out of files, to measure and to fit with: proteins from FASTA, or a line each from plain text."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO, cast

from performers.data import BUNDLED, read_fasta
from performers.errors import InputError


def read_sequences(sources: Sequence[str], limit: int) -> tuple[list[str], bool]:
    """The first sequences of some files.

    Arguments:
        sources: FASTA as in `read_fasta`, or text files (.gz too) with a sequence in every line. A file whose first character
            is > is FASTA.
        limit: how many to read at most.

    Returns:
        The sequences, and whether there are more.

    Raises:
        InputError: a file cannot be read, or holds nothing.
    """
    found = list(islice(_sequences(sources), limit + 1))
    if not found:
        raise InputError(f"{', '.join(sources)}: there is no sequence in it.")
    return found[:limit], len(found) > limit


def _sequences(sources: Iterable[str]) -> Iterator[str]:
    for source in sources:
        path = Path(source)
        if source == "-" or source.removeprefix("bundled:") in BUNDLED or not path.is_file() or _is_fasta(path):
            for record in read_fasta(source):
                yield record.sequence
        else:
            yield from read_lines(path)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file (.gz too) that are not blank, without white space around them.

    Raises:
        InputError: it cannot be read.
    """
    with _text(path) as stream:
        yield from (line.strip() for line in stream if line.strip())


def _is_fasta(path: Path) -> bool:
    with _text(path) as stream:
        first = next((line for line in stream if line.strip("\ufeff \t\r\n")), "")
    return first.lstrip("\ufeff \t").startswith(">")


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with cast("TextIO", (gzip.open if packed else open)(path, "rt", encoding="utf-8")) as stream:
            yield stream
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as FASTA or text: {error}.") from error
