"""Contexts of pairs: what is in a row, in which order, and which tables are refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from performers.data import BOS, EOS, PAD, Corpus, in_memory_corpus
from performers.data.pair_contexts import PairContexts, read_pairs
from performers.errors import InputError

PROTEINS = {"a": "MKT", "b": "GGGGG", "c": "AW", "d": "CCCC"}


@pytest.fixture
def corpus() -> Corpus:
    return in_memory_corpus(list(PROTEINS.items()))


def seen(corpus: Corpus, contexts: PairContexts, indices: range) -> list[tuple[str, str]]:
    """The pairs in some contexts, in order; checks tokens, positions and segments on the way."""
    names = {bytes(ids): name for name, ids in zip(PROTEINS, corpus, strict=True)}
    found: list[tuple[str, str]] = []
    batch = contexts.rows(indices)
    assert batch.segments is not None
    ids, positions = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
    assert batch.segments[0] == 0
    assert batch.segments[-1] == len(ids)
    for start, stop in zip(batch.segments[:-1], batch.segments[1:], strict=True):
        piece = ids[start:stop]
        assert start // contexts.length == (stop - 1) // contexts.length
        if piece[0] == PAD:
            assert not piece.any()
            continue
        middle = int(np.flatnonzero(piece == BOS)[1])
        chains = [piece[:middle], piece[middle:]]
        for chain, place in zip(
            chains, (positions[start : start + middle], positions[start + middle : stop]), strict=True
        ):
            assert chain[0] == BOS
            assert chain[-1] == EOS
            assert place.tolist() == list(range(len(chain)))
        first, second = (names[bytes(chain[1:-1].astype(np.uint8))] for chain in chains)
        found.append((first, second))
    return found


def test_every_pair_comes_once_an_epoch_in_either_order(corpus: Corpus) -> None:
    contexts = PairContexts(corpus, np.array([[0, 1], [1, 2], [2, 3]]), 24, seed=3)
    pairs: list[tuple[str, str]] = []
    number = 0
    while len(pairs) < 12:
        pairs += seen(corpus, contexts, range(number, number + 1))
        number += 1
    expected = {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("c", "d"), ("d", "c")}
    assert set(pairs[:6]) == set(pairs[6:]) == expected
    assert Counter(pairs).most_common(1)[0][1] == 2
    assert pairs[:6] != pairs[6:]


def test_a_context_is_a_function_of_its_number(corpus: Corpus) -> None:
    pairs = np.array([[0, 1], [1, 2], [2, 3]])
    straight = seen(corpus, PairContexts(corpus, pairs, 24, seed=3), range(9))
    contexts = PairContexts(corpus, pairs, 24, seed=3)
    seen(corpus, contexts, range(8, 9))
    assert [pair for i in range(9) for pair in seen(corpus, contexts, range(i, i + 1))] == straight
    assert seen(corpus, PairContexts(corpus, pairs, 24, seed=4), range(9)) != straight


def test_a_pair_is_never_cut(corpus: Corpus) -> None:
    with pytest.raises(InputError, match="The pair a and b has 12 tokens: expected a --context of at least as many"):
        PairContexts(corpus, np.array([[0, 1]]), 11)


def test_true_pairs_are_read_once_in_whatever_order(corpus: Corpus, tmp_path: Path) -> None:
    table = tmp_path / "pairs.tsv"
    for text in ("first\tsecond\tlabel\n", ""):
        table.write_text(text + "a\tb\t1\nb\ta\t1\nb\tc\t0\nd\td\t1\nd\tc\t1\n")
        assert read_pairs(table, corpus).tolist() == [[0, 1], [2, 3]]
    table.write_text("a\tb\nc\td\n")
    assert read_pairs(table, corpus).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\tb\t1\na\te\t1\n", "line 2: e is not among the proteins"),
        ("a\tb\t1\na\tc\tyes\n", "line 2: the label is 'yes'"),
        ("a\n", "expected two identifiers and a tab"),
        ("a\tb\t0\nc\tc\t1\n", "no true pair"),
    ],
)
def test_tables_that_are_no_pairs_are_refused(corpus: Corpus, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_pairs(tmp_path / "pairs.tsv", corpus)
