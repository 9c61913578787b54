"""Proteins with something known about each: a table in, sequences, targets and the set of each protein out.

A target is a number (regression), one of several labels (classification), or a string of one label per residue (residue). As
arrays all three look alike: of each protein a row of targets, one for the protein or one for each of its residues. Whatever a
table can have wrong with it is said here, with the numbers of the rows. It knows nothing of models.
"""

from __future__ import annotations

import csv
import io
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from performers.data import IGNORED, encode, split_records
from performers.errors import InputError
from performers.folders import write_file
from performers.tools.proteins import CHAIN_BREAK
from performers.tools.tables import numbered_columns, read_table

Kind: TypeAlias = Literal["regression", "classification", "residue"]
Targets: TypeAlias = npt.NDArray[Any]

SETS = ("train", "validation", "test")
FEWEST = 10  # proteins that can be split into three sets
UNLABELLED = "_"  # of a residue

_SET_NAMES = {"train": "train", "training": "train", "valid": "validation", "val": "validation", "test": "test"}
_SET_NAMES |= {"validation": "validation"}
_MISSING = ("", "nan", "none", "null")
_ROWS_NAMED = 5


@dataclass(frozen=True)
class LabelledProteins:
    """N proteins and what is known of them.

    Attributes:
        kind: what a target is.
        target: the name of its column.
        labels: C labels in order; none for regression.
        ids: N identifiers, which may repeat or be empty.
        sequences: N, upper-case.
        targets: N arrays: float64 (1,) for regression, int64 (1,) for classification, int64 (L,) for residues, where -100 is a
            residue without a label.
        sets: N names out of `SETS`; empty where the table does not say.
    """

    kind: Kind
    target: str
    labels: tuple[str, ...]
    ids: tuple[str, ...]
    sequences: tuple[str, ...]
    targets: tuple[Targets, ...]
    sets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sequences)

    def of(self, name: str) -> list[int]:
        """The indices of the proteins of a set."""
        return [index for index, found in enumerate(self.sets) if found == name]

    def text(self, index: int) -> str:
        """A target as the table has it."""
        values = self.targets[index].tolist()
        if self.kind == "regression":
            return repr(values[0])
        return "".join(UNLABELLED if value == IGNORED else self.labels[value] for value in values)


def read_labelled(path: str | Path, target: str, kind: Kind, split_column: str = "split") -> LabelledProteins:
    """The proteins of a table with the columns `sequence`, that of the target, `id` (optional) and that of the set (optional).

    Raises:
        InputError: a column is missing, a sequence holds what is no residue, a target is missing or not of its kind, they are
            all the same, or there are too few; names the rows, counted from 1 without the header.
        MissingExtraError: parquet needs pyarrow.
    """
    table = read_table(path)
    columns = numbered_columns(table.columns, ("id", "sequence"))
    table.require(columns.get("sequence", "sequence"), target)
    if target in (*columns.values(), split_column):
        raise InputError(f"{path}: the target is in a column of its own; {target!r} is the column of something else.")
    ids: list[str] = []
    sequences: list[str] = []
    texts: list[str] = []
    sets: list[str] = []
    for number, row in table.rows:
        identifier = row[columns["id"]] if "id" in columns else ""
        ids.append(identifier)
        sequences.append(_sequence(row[columns["sequence"]], _where(path, number, identifier)))
        texts.append(row[target])
        if split_column in table.columns:
            name = _SET_NAMES.get(row[split_column].lower())
            if name is None:
                raise InputError(
                    f"{_where(path, number, identifier)}: {split_column} is {row[split_column]!r}; expected train, validation or "
                    f"test."
                )
            sets.append(name)
    if len(sequences) < FEWEST:
        raise InputError(
            f"{path} has {len(sequences):,} rows; expected at least {FEWEST}, to train on, to choose by and to test on."
        )
    _refuse(path, texts, lambda text: text.lower() in _MISSING, f"{target} is missing")
    labels, targets = _PARSERS[kind](path, target, texts, sequences)
    found = LabelledProteins(kind, target, labels, tuple(ids), tuple(sequences), tuple(targets), tuple(sets))
    if sets:
        _check_sets(found, f"{path}, column {split_column}")
    return found


def write_labelled(path: Path, proteins: LabelledProteins) -> None:
    """The proteins as a table that `read_labelled` takes."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "sequence", proteins.target, "split"])
    for index in range(len(proteins)):
        writer.writerow([proteins.ids[index], proteins.sequences[index], proteins.text(index), proteins.sets[index]])
    write_file(path, text.getvalue())


def split_labelled(
    proteins: LabelledProteins,
    *,
    by: Literal["identity", "random"],
    identity: float = 0.5,
    held_out: float | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[LabelledProteins, dict[str, Any]]:
    """Deals the proteins out to the sets; identical sequences stay together.

    Where (nearly) all sequences are in one cluster, as variants of one protein are, no relatives can be held out: they are dealt
    out at random then, although "identity" was asked for.

    Arguments:
        proteins: to split.
        by: "identity" keeps clusters of similar sequences together (MMseqs2); "random" does not.
        identity: of a cluster.
        held_out: the share of the validation set and that of the test set; None is 15 %, or more where that is fewer than ten
            proteins, up to 25 %.
        seed, threads: as of `split_records`.

    Returns:
        The proteins with their sets, and what there is to say of the split; `remark_on_split` has it in words.

    Raises:
        InputError: there are too few sequences, or training targets are all the same.
        MissingExtraError: MMseqs2 is needed and not installed.
    """
    unique = list(dict.fromkeys(proteins.sequences))
    if len(unique) < FEWEST:
        raise InputError(f"There are {len(unique)} different sequences; expected at least {FEWEST}, to split them.")
    share = held_out_share(len(unique), held_out)
    about: dict[str, Any] = {"by": by, "held_out": share}
    dealt, median = _dealt(proteins, unique, share, by=by, identity=identity, seed=seed, threads=threads)
    if by == "identity" and min(map(len, map(dealt.of, SETS[1:]))) < share * len(proteins) / 3:
        about |= {"by": "random", "too_few_clusters_at": identity}
        dealt, _ = _dealt(proteins, unique, share, by="random", identity=identity, seed=seed, threads=threads)
    elif by == "identity":
        about |= {"identity": identity, "median_identity_to_training": median}
    _check_sets(dealt, "the split")
    return dealt, about


def held_out_share(sequences: int, asked: float | None = None) -> float:
    """The share of the validation set and of the test set of so many different sequences."""
    return min(max(0.15, 10 / sequences), 0.25) if asked is None else asked


def remark_on_split(about: dict[str, Any]) -> str:
    """What a user should know of a split before looking at figures; "" where relatives are kept together."""
    if about["by"] != "random":
        return ""
    remark = "The split is random: relatives of test proteins may be trained on, so the figures hold for such relatives only."
    if "too_few_clusters_at" not in about:
        return remark
    identity = f"{about['too_few_clusters_at']:.0%} identity"
    return f"At {identity} there are too few clusters to hold relatives out, as with variants of one protein. {remark}"


def _dealt(
    proteins: LabelledProteins,
    unique: list[str],
    share: float,
    *,
    by: Literal["identity", "random"],
    identity: float,
    seed: int,
    threads: int | None,
) -> tuple[LabelledProteins, dict[str, float]]:
    """The proteins with their sets, and the median identity of each held-out set to the training set."""
    with tempfile.TemporaryDirectory(prefix="performers-") as name:
        file, folder = Path(name) / "proteins.fasta", Path(name) / "split"
        file.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(unique)), encoding="ascii")
        result = split_records(
            file,
            folder,
            by=by,
            identity=identity,
            fractions=(1 - 2 * share, share, share),
            nearest=by == "identity",
            seed=seed,
            threads=threads,
        )
        rows = read_table(folder / "split.tsv").rows
        set_of = {unique[int(row["id"])]: row["set"] for _, row in rows}
    return replace(proteins, sets=tuple(set_of[text] for text in proteins.sequences)), result.median_identity


def _sequence(text: str, where: str) -> str:
    sequence = "".join(text.split()).upper()
    if not sequence:
        raise InputError(f"{where}: the row has no sequence.")
    if CHAIN_BREAK in sequence:
        raise InputError(f"{where}: the row has several chains; expected one, which is what a head reads.")
    try:
        encode(sequence)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return sequence


def _numbers(
    path: str | Path, target: str, texts: list[str], sequences: list[str]
) -> tuple[tuple[str, ...], list[Targets]]:
    _refuse(path, texts, lambda text: _number(text) is None, f"{target} is not a number (expected one for regression)")
    values = [float(text) for text in texts]
    if min(values) == max(values):
        raise InputError(f"{path}: {target} is {texts[0]} in all {len(texts):,} rows, so there is nothing to learn.")
    return (), [np.array([value]) for value in values]


def _classes(
    path: str | Path, target: str, texts: list[str], sequences: list[str]
) -> tuple[tuple[str, ...], list[Targets]]:
    labels = _in_order(set(texts))
    if len(labels) == 1:
        raise InputError(f"{path}: {target} is {texts[0]} in all {len(texts):,} rows, so there is nothing to learn.")
    if len(labels) > len(texts) / 2:
        raise InputError(
            f"{path}: {target} has {len(labels):,} different labels in {len(texts):,} rows; expected several rows for each "
            "(numbers are for --task regression)."
        )
    code = {label: number for number, label in enumerate(labels)}
    return labels, [np.array([code[text]]) for text in texts]


def _residues(
    path: str | Path, target: str, texts: list[str], sequences: list[str]
) -> tuple[tuple[str, ...], list[Targets]]:
    for number, (text, sequence) in enumerate(zip(texts, sequences, strict=True), start=1):
        if len(text) != len(sequence):
            raise InputError(
                f"{path}, row {number:,}: {target} has {len(text):,} labels and the sequence {len(sequence):,} residues; "
                "expected one label for each residue."
            )
    labels = _in_order(set("".join(texts)) - {UNLABELLED})
    if len(labels) < 2:
        raise InputError(
            f"{path}: {target} has the labels {', '.join(labels) or 'none'}; expected at least two different ones."
        )
    code = {label: number for number, label in enumerate(labels)} | {UNLABELLED: IGNORED}
    return labels, [np.array([code[letter] for letter in text]) for text in texts]


_PARSERS: dict[str, Callable[..., tuple[tuple[str, ...], list[Targets]]]] = {
    "regression": _numbers,
    "classification": _classes,
    "residue": _residues,
}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """As numbers where all are, else as text."""
    if all(_number(label) is not None for label in labels):
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    return tuple(sorted(labels))


def _refuse(path: str | Path, texts: Sequence[str], is_wrong: Callable[[str], bool], what: str) -> None:
    """Names the rows that are wrong.

    Raises:
        InputError: there are any.
    """
    rows = [number for number, text in enumerate(texts, start=1) if is_wrong(text)]
    if rows:
        more = f" and {len(rows) - _ROWS_NAMED:,} more" if len(rows) > _ROWS_NAMED else ""
        named = ", ".join(f"{row:,}" for row in rows[:_ROWS_NAMED])
        shown = texts[rows[0] - 1]
        raise InputError(
            f"{path}, row{'s' if len(rows) > 1 else ''} {named}{more}: {what}{f', first {shown!r}' if shown else ''}; correct or "
            "remove what is wrong."
        )


def _check_sets(proteins: LabelledProteins, where: str) -> None:
    """Refuse sets that cannot be learned from or measured on.

    Raises:
        InputError: a set is empty, or the training set holds one target only.
    """
    counts = Counter(proteins.sets)
    empty = [name for name in SETS if not counts[name]]
    if empty:
        raise InputError(f"{where}: there is nothing in {' and '.join(empty)}; expected {', '.join(SETS)}.")
    for name in SETS:
        if (
            all((proteins.targets[index] == IGNORED).all() for index in proteins.of(name))
            and proteins.kind == "residue"
        ):
            raise InputError(f"{where}: no residue of the {name} proteins has a label.")
    known = np.concatenate([proteins.targets[index] for index in proteins.of("train")])
    if len(np.unique(known[known != IGNORED] if proteins.kind == "residue" else known)) < 2:
        raise InputError(
            f"{where}: all training proteins have the same {proteins.target}, so there is nothing to learn."
        )


def _where(path: str | Path, number: int, identifier: str) -> str:
    return f"{path}, row {number:,}" + (f" ({identifier[:60]})" if identifier.isprintable() and identifier else "")
