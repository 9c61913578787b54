"""Which proteins are related, and which of its relatives a protein is read with in a step of training.

A table of clusters comes in as a file; the cluster of every protein of a corpus goes out, as numbers. `draw_relatives` then says
who reads whom in some rows of "related" contexts (see `performers.data.contexts`), as a pure function of (seed, step, row).
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TextIO, cast

import numpy as np
import numpy.typing as npt

from performers.data.contexts import ContextBatch
from performers.data.corpus import Corpus
from performers.errors import InputError
from performers.randomness import derive_seed

ALONE = 0.25  # of the proteins read nobody, so that one protein alone still works
_HEADER = ("representative", "member")


def read_clusters(path: str | Path, corpus: Corpus) -> npt.NDArray[np.int64]:
    """The cluster of each protein of a corpus, by a table of representatives and members (TSV, also gzip), as MMseqs2 writes it.

    Proteins that are not in the table have a cluster each. A protein that is in it twice is in the cluster named last.

    Returns:
        (N,) numbers from 0, equal where proteins share a cluster.

    Raises:
        InputError: the file cannot be read, a line has no two columns, or none of the proteins is in it.
    """
    path = Path(path)
    representatives: dict[str, str] = {}
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (
            cast("TextIO", gzip.open(path, "rt", encoding="utf-8")) if packed else path.open(encoding="utf-8") as lines
        ):
            for number, line in enumerate(lines, start=1):
                columns = line.rstrip("\r\n").split("\t")
                if columns == [""] or (number == 1 and tuple(columns[:2]) == _HEADER):
                    continue
                if len(columns) < 2 or not columns[0] or not columns[1]:
                    raise InputError(
                        f"{path}, line {number}: found {line.rstrip()[:60]!r}; expected a representative, a tab and a member."
                    )
                representatives[columns[1]] = columns[0]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as clusters: {error}.") from error
    numbers: dict[str, int] = {}
    clusters = np.empty(len(corpus), dtype=np.int64)
    found = 0
    for index in range(len(corpus)):
        representative = representatives.get(corpus.name(index))
        found += representative is not None
        # A tab is in no identifier, so a protein of its own shares its key with none.
        key = f"\t{index}" if representative is None else representative
        clusters[index] = numbers.setdefault(key, len(numbers))
    if not found:
        raise InputError(
            f"{path} has none of the {len(corpus):,} proteins; expected their identifiers in its second column."
        )
    return clusters


def draw_relatives(
    batch: ContextBatch, row_ids: npt.NDArray[np.int64], *, seed: int, step: int, alone: float = ALONE
) -> npt.NDArray[np.float32]:
    """Who reads whom: of its relatives in the row, each protein reads a share drawn between none and all, or nobody.

    Arguments:
        batch: rows of "related" contexts.
        row_ids: the number of each row.
        seed, step: of the run.
        alone: probability that a protein reads nobody although there are relatives.

    Returns:
        (S, S): 1 where segment i reads segment j, 0 elsewhere. Padding reads nobody and is not read.
    """
    assert batch.families is not None
    assert batch.segments is not None
    length = batch.input_ids.shape[1]
    rows = np.asarray(batch.segments[:-1]) // length
    relatives = np.zeros((len(rows), len(rows)), dtype=np.float32)
    for row, row_id in enumerate(row_ids):
        members = np.flatnonzero(rows == row)
        families = batch.families[members]
        bits = np.random.Philox(key=derive_seed(seed, "relatives", step, int(row_id))).random_raw(
            len(members) * (len(members) + 2)
        )
        draws = np.ldexp((bits >> np.uint64(11)).astype(np.float64), -53).reshape(len(members), -1)
        is_alone, share, choice = draws[:, :1] < alone, draws[:, 1:2], draws[:, 2:]
        related = (families[:, None] == families) & (families >= 0) & ~np.eye(len(members), dtype=bool)
        relatives[np.ix_(members, members)] = related & ~is_alone & (choice < share)
    return relatives
