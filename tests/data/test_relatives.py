"""Clusters as contexts: members of one are together in a row, and who reads whom is a function of seed, step and row."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from performers.data import BOS, Contexts, Corpus, Record, in_memory_corpus
from performers.data.relatives import draw_relatives, read_clusters
from performers.errors import InputError


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Clusters 0 to 19 of 1 to 20 members, each of one letter of its own and 20 to 39 residues long."""
    draws = np.random.default_rng(0)
    records = [
        Record(f"c{cluster}m{member}", "", "ACDEFGHIKLMNPQRSTVWY"[cluster] * int(draws.integers(20, 40)), 0)
        for cluster in range(20)
        for member in range(cluster + 1)
    ]
    return in_memory_corpus(records)


@pytest.fixture(scope="module")
def clusters(corpus: Corpus) -> np.ndarray:
    return np.array([int(corpus.name(index)[1:].split("m")[0]) for index in range(len(corpus))])


def test_clusters_are_read_by_name(corpus: Corpus, clusters: np.ndarray, tmp_path: Path) -> None:
    lines = "".join(f"c{c}m0\t{corpus.name(i)}\n" for i, c in enumerate(clusters) if c != 3)
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(f"representative\tmember\n{lines}".encode()))
    found = read_clusters(tmp_path / "c.tsv.gz", corpus)
    same = found[:, None] == found
    expected = (clusters[:, None] == clusters) & (clusters != 3)
    np.fill_diagonal(expected, True)  # those that are in no cluster are alone
    assert (same == expected).all()


def test_tables_that_are_not_clusters_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    for text, message in (("c0m0\n", "line 1"), ("x\ty\n", "none of the"), ("a\t\n", "a tab and a member")):
        (tmp_path / "c.tsv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_clusters(tmp_path / "c.tsv", corpus)
    with pytest.raises(InputError, match="cannot be read"):
        read_clusters(tmp_path / "other.tsv", corpus)
    with pytest.raises(InputError, match="need the cluster"):
        Contexts(corpus, 256, mode="related")
    with pytest.raises(InputError, match="only they take"):
        Contexts(corpus, 256, clusters=np.zeros(len(corpus), np.int64))


def test_every_protein_is_in_every_epoch_once_among_its_relatives(corpus: Corpus, clusters: np.ndarray) -> None:
    contexts = Contexts(corpus, 256, mode="related", seed=1, clusters=clusters)
    for epoch in range(2):
        first = sum(contexts.contexts_in_epoch(e) for e in range(epoch))
        batch = contexts.rows(range(first, first + contexts.contexts_in_epoch(epoch)))
        assert batch.families is not None
        assert batch.segments is not None
        ids = batch.input_ids.ravel()
        pieces = [ids[a:b] for a, b in zip(batch.segments[:-1], batch.segments[1:], strict=True)]
        read = [piece for piece, family in zip(pieces, batch.families, strict=True) if family >= 0]
        assert len(read) == len(corpus)
        assert all(piece[0] == BOS for piece in read)
        assert sum(len(piece) - 2 for piece in read) == corpus.num_residues
        # The second token tells the cluster.
        letters = {int(piece[1]): int(f) for piece, f in zip(pieces, batch.families, strict=True) if f >= 0}
        assert len(letters) == 20
        for piece, family in zip(pieces, batch.families, strict=True):
            assert (family >= 0) == bool(piece[0])
            assert family < 0 or letters[int(piece[1])] == family
        rows = batch.segments[:-1] // 256
        # A cluster of 20 members of 31 tokens fills no more rows than it has to, and one more for what remains.
        assert len(set(rows[batch.families == 19].tolist())) <= 4
    assert np.array_equal(
        contexts.rows([5]).input_ids,
        Contexts(corpus, 256, mode="related", seed=1, clusters=clusters).rows([5]).input_ids,
    )


def test_who_reads_whom_depends_on_seed_step_and_row_alone(corpus: Corpus, clusters: np.ndarray) -> None:
    contexts = Contexts(corpus, 256, mode="related", clusters=clusters)
    rows = np.arange(12)
    batch = contexts.rows(rows)
    whole = draw_relatives(batch, rows, seed=3, step=7)
    assert batch.families is not None
    related = batch.families[:, None] == batch.families
    assert not whole[~related].any()
    assert not np.diag(whole).any()
    assert not whole[batch.families < 0].any()
    assert 0.2 < whole.any(1)[batch.families > 9].mean() < 0.9
    start = 0
    for row in rows:
        alone = draw_relatives(contexts.rows([row]), np.array([row]), seed=3, step=7)
        size = len(alone)
        assert np.array_equal(alone, whole[start : start + size, start : start + size])
        assert not whole[start : start + size, start + size :].any()
        start += size
    assert (draw_relatives(batch, rows, seed=3, step=8) != whole).any()
    assert not draw_relatives(batch, rows, seed=3, step=7, alone=1.0).any()
