"""Pairs and groups of proteins as people write them down: TSV in, checked rows out, and sets of pairs that do not leak.

A pairs file has a line for each pair: two identifiers and, where it is known, a label (1: they interact, 0: they do not). A
groups file has a line for each member: the group, and an identifier. Tabs (or commas) separate; gzip is taken, and a header line,
if it is one of the usual ones and names no known protein. What cannot be used is not dropped in silence: it goes to a list, with
the row and the reason. Nothing here knows of models.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TextIO, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from performers.data import in_memory_corpus
from performers.data.splits import cluster_sequences
from performers.errors import InputError
from performers.randomness import derive_seed

By: TypeAlias = Literal["cluster", "random"]
SETS = ("train", "selection", "test")

# The first lines, in lower case, that are taken for a header; any other is a row.
_LABELS = {"label", "labels", "interaction", "interacts", "class", "y", "prob"}
_PAIR_HEADERS = {("p0", "p1"), ("a", "b")} | {
    (f"{stem}{first}", f"{stem}{second}")
    for stem in ("protein", "protein_", "protein ", "id", "id_")
    for first, second in (("1", "2"), ("a", "b"))
}
_GROUP_HEADERS = {(group, member) for group in ("group", "complex") for member in ("id", "protein", "member")}
_LONGEST_LINE = 1 << 20
_ATTEMPTS = 20  # at a split that has both labels in every set
_READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)


class Pair(NamedTuple):
    """One row of a pairs file.

    Attributes:
        number: of the row, counted from 1 without the header.
        a, b: identifiers.
        label: 1, 0, or None where the file has no labels.
    """

    number: int
    a: str
    b: str
    label: int | None


class Group(NamedTuple):
    """A group of proteins that are read together.

    Attributes:
        number: of its first row.
        name: of the group.
        members: identifiers, in the order of the file, each once.
        repeated: row and identifier of each line that names a member again.
    """

    number: int
    name: str
    members: tuple[str, ...]
    repeated: tuple[tuple[int, str], ...] = ()


class LeftOut(NamedTuple):
    """Something that is not used: the number of its first row, what it is, and why, without a full stop."""

    number: int
    name: str
    reason: str


def require_table(path: str | Path) -> None:
    """Refuse a path that is no file.

    Raises:
        InputError: it is none.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; expected a table with tabs between its columns.")


def read_pairs(path: str | Path, known: Collection[str] = (), *, labelled: bool = False) -> Iterator[Pair]:
    """The pairs of a file, in order and in bounded memory.

    Arguments:
        path: the file.
        known: identifiers of proteins; a first line of two columns that names one is a pair, however much it looks like a header.
        labelled: whether every row must have a label; otherwise all rows have one, or none.

    Raises:
        InputError: the file is missing, empty or damaged, or a row is no pair; names file and row.
    """
    columns = None
    for number, fields in _rows(path, lambda fields: _heads_pairs(fields, known)):
        if columns is None:
            columns = len(fields)
            if columns not in ((3,) if labelled else (2, 3)):
                wanted = "two identifiers and a label" if labelled else "two identifiers and, if known, a label"
                raise InputError(
                    f"{path}, row {number:,}: {columns} values; expected {wanted}, with tabs between them."
                )
        if len(fields) != columns or not fields[0] or not fields[1]:
            raise InputError(
                f"{path}, row {number:,}: {_shown(fields)}; expected {columns} values, none of them empty."
            )
        yield Pair(number, fields[0], fields[1], _label(path, number, fields[2]) if columns == 3 else None)
    if columns is None:
        raise InputError(f"{path} has no pairs; expected a line for each, two identifiers with a tab between them.")


def _label(path: str | Path, number: int, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value not in (0.0, 1.0):
        raise InputError(
            f"{path}, row {number:,}: the label is {text[:40]!r}; expected 1 for a pair that interacts, or 0."
        )
    return int(value)


def _heads_pairs(fields: Sequence[str], known: Collection[str]) -> bool:
    lower = [field.lower() for field in fields]
    is_usual, is_strange = tuple(lower[:2]) in _PAIR_HEADERS, not any(field in known for field in fields[:2])
    if len(lower) == 3:
        return lower[2] in _LABELS and (is_usual or is_strange)
    return len(lower) == 2 and is_usual and is_strange


def read_groups(path: str | Path, known: Collection[str] = ()) -> Iterator[Group]:
    """The groups of a file, in the order of their first rows.

    Arguments:
        path: the file.
        known: as in `read_pairs`.

    Raises:
        InputError: as `read_pairs`.
    """
    groups: dict[str, tuple[int, dict[str, None], list[tuple[int, str]]]] = {}
    for number, fields in _rows(path, lambda fields: _heads_groups(fields, known)):
        if len(fields) != 2 or not fields[0]:
            raise InputError(
                f"{path}, row {number:,}: {_shown(fields)}; expected a group and an identifier, with a tab between them."
            )
        _, members, repeated = groups.setdefault(fields[0], (number, {}, []))
        if fields[1] in members:
            repeated.append((number, fields[1]))
        elif fields[1]:  # a group without an identifier is empty, and reported as that
            members[fields[1]] = None
    if not groups:
        raise InputError(f"{path} has no groups; expected a line for each member: the group, a tab and an identifier.")
    for name, (number, members, repeated) in groups.items():
        yield Group(number, name, tuple(members), tuple(repeated))


def _heads_groups(fields: Sequence[str], known: Collection[str]) -> bool:
    return tuple(field.lower() for field in fields) in _GROUP_HEADERS and fields[1] not in known


def _rows(path: str | Path, is_header: Callable[[Sequence[str]], bool]) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line that is not blank, numbered without the header."""
    require_table(path)
    number = 0
    try:
        with _open(Path(path)) as stream:
            is_first = True
            while line := stream.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE or "\0" in line:
                    raise InputError(f"{path}, row {number + 1:,} is no text table; expected tabs between its columns.")
                if not line.strip():
                    continue
                fields = [field.strip() for field in next(csv.reader([line], delimiter="\t" if "\t" in line else ","))]
                was_first, is_first = is_first, False
                if was_first and is_header(fields):
                    continue
                number += 1
                yield number, fields
    except _READ_ERRORS as error:
        raise InputError(f"{path} cannot be read after {number:,} rows: {error}.") from None


def _open(path: Path) -> TextIO:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    opened = gzip.open if packed else open
    return cast("TextIO", opened(path, "rt", encoding="utf-8-sig", newline=""))


def _shown(fields: Sequence[str]) -> str:
    text = " ".join(fields)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


class Unknown:
    """Counts what is asked for and not there, so that each identifier is listed once, however many rows name it."""

    def __init__(self, known: Collection[str], one: str) -> None:
        self._known, self._one = known, one
        self._rows: dict[str, list[int]] = {}

    def refuses(self, number: int, *names: str) -> bool:
        """Whether one of the identifiers of a row is not there; if so it is remembered."""
        missing = [name for name in dict.fromkeys(names) if name not in self._known]
        for name in missing:
            found = self._rows.setdefault(name, [number, 0])
            found[1] += 1
        return bool(missing)

    def left_out(self) -> list[LeftOut]:
        """One entry for each identifier that is not there."""
        return [
            LeftOut(number, name, f"it is not among the proteins, and {self._naming(count)} it")
            for name, (number, count) in self._rows.items()
        ]

    def _naming(self, count: int) -> str:
        return f"1 {self._one} names" if count == 1 else f"{count:,} {self._one}s name"


@dataclass(frozen=True)
class Labelled:
    """Pairs that can be learned from.

    Attributes:
        pairs: (K, 2) indices of proteins, the smaller first.
        labels: (K,) zeros and ones.
        duplicates: rows that repeat an earlier one.
        left_out: rows that are not used, and why.
    """

    pairs: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    duplicates: int
    left_out: list[LeftOut]


def labelled_pairs(path: str | Path, index: dict[str, int]) -> Labelled:
    """The usable pairs of a file, each once.

    Left out and listed are pairs with unknown identifiers, of a protein with itself, and those with both labels.

    Arguments:
        path: of pairs with labels.
        index: of each protein, by its identifier.

    Raises:
        InputError: as `read_pairs`, or no pair is left.
    """
    unknown = Unknown(index, "pair")
    left_out: list[LeftOut] = []
    found: dict[tuple[int, int], tuple[int, int]] = {}
    contradictory: dict[tuple[int, int], None] = {}
    duplicates = 0
    for pair in read_pairs(path, index, labelled=True):
        if unknown.refuses(pair.number, pair.a, pair.b):
            continue
        i, j = sorted((index[pair.a], index[pair.b]))
        if i == j:
            left_out.append(LeftOut(pair.number, f"{pair.a} {pair.b}", "it is a pair of a protein with itself"))
            continue
        label = cast("int", pair.label)
        earlier = found.setdefault((i, j), (pair.number, label))
        if earlier[0] != pair.number:
            duplicates += 1
            if earlier[1] != label and (i, j) not in contradictory:
                contradictory[i, j] = None
                reason = f"it is labelled {label} here and {earlier[1]} in row {earlier[0]:,}"
                left_out.append(LeftOut(pair.number, f"{pair.a} {pair.b}", reason))
    for key in contradictory:
        del found[key]
    left_out = sorted([*left_out, *unknown.left_out()])
    if not found:
        first = f", first {left_out[0].name}: {left_out[0].reason}" if left_out else ""
        raise InputError(f"{path}: none of its pairs can be used{first}.")
    pairs = np.array(list(found), dtype=np.int64).reshape(-1, 2)
    labels = np.array([label for _, label in found.values()], dtype=np.int64)
    return Labelled(pairs, labels, duplicates, left_out)


@dataclass(frozen=True)
class PairSplit:
    """Which set each pair is in.

    Attributes:
        sets: (K,) indices into `SETS`, -1 for pairs that lie between two sets.
        between: how many those are.
        measured: whether the held-out sets have pairs of both labels, so that there is something to select and measure with.
    """

    sets: npt.NDArray[np.int64]
    between: int
    measured: bool


def split_pairs(
    sequences: Sequence[str],
    labelled: Labelled,
    *,
    by: By,
    held_out: float,
    identity: float,
    seed: int,
    threads: int | None = None,
) -> PairSplit:
    """Pairs to learn from, to select with and to measure on.

    By cluster, every cluster of similar proteins belongs to one set, and so does a pair if both of its proteins do; pairs between
    two sets are in none, so that neither protein of a held-out pair has a relative among those learned from (the strictest of
    the three classes of Park and Marcotte, 2012). A random split takes pairs, and knows most proteins already.

    Arguments:
        sequences: of the proteins.
        labelled: the pairs.
        by: "cluster" or "random".
        held_out: the share of the proteins (by cluster), or of the pairs (random), in either held-out set.
        identity: of a cluster, a fraction.
        seed: of the draw.
        threads: of MMseqs2.

    Raises:
        MissingExtraError, RunError: as `cluster_sequences`.
    """
    if by == "random":
        groups = np.arange(len(labelled.pairs))
    else:
        corpus = in_memory_corpus((str(i), sequence) for i, sequence in enumerate(sequences))
        groups = cluster_sequences(corpus, identity=identity, threads=threads)
    for attempt in range(_ATTEMPTS):
        drawn = _draw(groups, held_out, derive_seed(seed, "pair split", attempt))
        sets = drawn if by == "random" else _of_pairs(drawn, labelled.pairs)
        split = PairSplit(sets, int((sets < 0).sum()), _has_both(sets, labelled.labels, (1, 2)))
        if split.measured and _has_both(sets, labelled.labels, (0,)):
            return split
    # Too few pairs to hold any out: all of them are for learning, and nothing can be measured.
    return PairSplit(np.zeros(len(labelled.pairs), dtype=np.int64), 0, False)


def _draw(groups: npt.NDArray[np.int64], held_out: float, seed: int) -> npt.NDArray[np.int64]:
    """A set for each element, the same for a whole group."""
    names, inverse = np.unique(groups, return_inverse=True)
    keys = np.random.Generator(np.random.Philox(seed)).permutation(len(names))
    sizes = np.bincount(inverse)
    filled = np.empty(len(names), dtype=np.float64)
    filled[keys] = np.cumsum(sizes[keys]) / len(groups)
    return np.where(filled <= held_out, 2, np.where(filled <= 2 * held_out, 1, 0))[inverse]


def _of_pairs(sets: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    a, b = sets[pairs].T
    return np.where(a == b, a, -1)


def _has_both(sets: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], wanted: Sequence[int]) -> bool:
    return all(len(np.unique(labels[sets == number])) == 2 for number in wanted)
