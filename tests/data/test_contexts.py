from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from performers.data import BOS, EOS, PAD, Contexts, Corpus, decode, in_memory_corpus, read_fasta
from performers.errors import InputError


def corpus_of(lengths: list[int]) -> Corpus:
    letters = "ACDEFGHIKLMNPQRSTVWY"
    random = np.random.Generator(np.random.PCG64(len(lengths)))
    return in_memory_corpus(
        (f"p{i}", "".join(letters[j] for j in random.integers(0, 20, size))) for i, size in enumerate(lengths)
    )


@pytest.fixture(scope="module")
def proteins() -> Corpus:
    return in_memory_corpus(read_fasta("bundled:test"))


CORPORA = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(corpus_of)


def segments_of(contexts: Contexts, indices: list[int]) -> list[list[int]]:
    """The segments of packed rows, padding left out."""
    batch = contexts.rows(indices)
    assert batch.segments is not None
    flat = batch.input_ids.reshape(-1)
    pieces = [flat[a:b].tolist() for a, b in zip(batch.segments[:-1], batch.segments[1:], strict=True)]
    return [piece for piece in pieces if piece[0] != PAD]


@settings(deadline=None)
@given(corpus=CORPORA, length=st.integers(3, 50), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_a_packed_epoch_holds_every_protein_once_and_whole(corpus: Corpus, length: int, seed: int, epoch: int) -> None:
    contexts = Contexts(corpus, length, "packed", seed=seed)
    first = sum(contexts.contexts_in_epoch(e) for e in range(epoch))
    numbers = list(range(first, first + contexts.contexts_in_epoch(epoch)))
    batch = contexts.rows(numbers)
    assert (batch.input_ids != PAD).sum() == contexts.num_tokens_per_epoch
    expected: Counter[tuple[int, ...]] = Counter()
    for ids in corpus:
        protein = (BOS, *ids.tolist(), EOS)
        expected.update(protein[start : start + length] for start in range(0, len(protein), length))
    assert Counter(map(tuple, segments_of(contexts, numbers))) == expected


def test_packing_leaves_little_padding(proteins: Corpus) -> None:
    # Real lengths; one row after the other, 20 % of the tokens would be padding at 1,024.
    for length, most in ((512, 0.05), (1024, 0.05), (8192, 0.05)):
        contexts = Contexts(proteins, length)
        assert contexts.num_tokens_per_epoch > (1 - most) * contexts.contexts_in_epoch(0) * length


@settings(deadline=None)
@given(corpus=CORPORA, length=st.integers(3, 50), epoch=st.integers(0, 2))
def test_packed_segments_cover_every_row_and_positions_restart_in_each(corpus: Corpus, length: int, epoch: int) -> None:
    contexts = Contexts(corpus, length)
    first = sum(contexts.contexts_in_epoch(e) for e in range(epoch))
    batch = contexts.rows(range(first, first + contexts.contexts_in_epoch(epoch)))
    assert batch.segments is not None
    assert batch.segments.dtype == np.int32
    assert batch.input_ids.dtype == batch.position_ids.dtype == np.int64
    assert batch.segments[0] == 0
    assert batch.segments[-1] == batch.input_ids.size
    sizes = np.diff(batch.segments)
    assert (sizes > 0).all()
    assert set(range(0, batch.input_ids.size, length)) <= set(batch.segments.tolist())
    assert batch.position_ids.reshape(-1).tolist() == [i for size in sizes.tolist() for i in range(size)]
    # The room that is left is padding, and too small for the protein that follows.
    flat = batch.input_ids.reshape(-1)
    for start, end in zip(batch.segments[:-1], batch.segments[1:], strict=True):
        assert len(set((flat[start:end] == PAD).tolist())) == 1


@settings(deadline=None)
@given(corpus=CORPORA, length=st.integers(3, 50), epoch=st.integers(0, 2))
def test_a_concatenated_epoch_is_one_stream_cut_into_rows(corpus: Corpus, length: int, epoch: int) -> None:
    if corpus.num_residues + len(corpus) < length - 1:
        with pytest.raises(InputError, match="smaller --context"):
            Contexts(corpus, length, "concatenated")
        return
    contexts = Contexts(corpus, length, "concatenated")
    count = contexts.contexts_in_epoch(epoch)
    assert count == contexts.contexts_in_epoch(0) == (corpus.num_residues + len(corpus)) // (length - 1)
    assert contexts.num_tokens_per_epoch == count * length
    batch = contexts.rows(range(epoch * count, (epoch + 1) * count))
    assert batch.segments is None
    assert (batch.input_ids[:, 0] == BOS).all()
    assert (batch.input_ids != PAD).all()
    assert (batch.position_ids == np.arange(length)).all()
    stream = batch.input_ids[:, 1:].reshape(-1).tolist()
    proteins: list[str] = [""]
    for token in stream:
        if token == EOS:
            proteins.append("")
        else:
            proteins[-1] += decode([token])
    expected = Counter(record.sequence for record in corpus.records())
    assert not Counter(proteins[:-1]) - expected
    dropped = corpus.num_residues + len(corpus) - len(stream)
    assert 0 <= dropped < length - 1
    assert not proteins[-1] or any(sequence.startswith(proteins[-1]) for sequence in expected)


@pytest.mark.parametrize("mode", ["packed", "concatenated"])
def test_a_row_depends_on_its_number_alone(proteins: Corpus, mode: str) -> None:
    contexts = Contexts(proteins, 512, mode, seed=3)  # type: ignore[arg-type]
    count = contexts.contexts_in_epoch(0) + contexts.contexts_in_epoch(1) + 20
    whole = contexts.rows(range(count))
    numbers = np.random.Generator(np.random.PCG64(0)).permutation(count)[:100]
    fresh = Contexts(proteins, 512, mode, seed=3)  # type: ignore[arg-type]
    for number in numbers.tolist():
        row = fresh.rows([number])
        assert (row.input_ids[0] == whole.input_ids[number]).all()
        assert (row.position_ids[0] == whole.position_ids[number]).all()
    together = fresh.rows(numbers)
    assert (together.input_ids == whole.input_ids[numbers]).all()


def test_each_epoch_and_each_seed_has_its_own_order(proteins: Corpus) -> None:
    def start(seed: int, epoch: int) -> list[int]:
        contexts = Contexts(proteins, 512, seed=seed)
        return contexts.rows([sum(contexts.contexts_in_epoch(e) for e in range(epoch))]).input_ids[0].tolist()

    starts = [start(seed, epoch) for seed in range(2) for epoch in range(3)]
    assert len({tuple(row) for row in starts}) == 6
    assert start(1, 2) == starts[-1]


def test_the_order_is_that_of_earlier_versions() -> None:
    # Runs are continued with newer versions of this package and of numpy: what they read next must not change.
    letters = "ACDEFGHIKLMNPQRSTVWY" * 50
    corpus = in_memory_corpus((f"p{i}", letters[i % 20 :][: 37 * i % 400 + 1]) for i in range(300))
    digests: dict[str, str] = {}
    for mode in ("packed", "concatenated"):
        batch = Contexts(corpus, 512, mode, seed=7).rows([0, 1, 2000])  # type: ignore[arg-type]
        digests[mode] = hashlib.sha256(batch.input_ids.tobytes()).hexdigest()[:16]
    assert digests == {"packed": "b542e5f001d89666", "concatenated": "ca839b7571936b48"}


def test_the_epoch_of_a_context_is_known(proteins: Corpus) -> None:
    contexts = Contexts(proteins, 256)
    first = contexts.contexts_in_epoch(0)
    assert [contexts.epoch_of(n) for n in (0, first - 1, first, first + contexts.contexts_in_epoch(1))] == [0, 0, 1, 2]


def test_a_subset_of_a_corpus_is_cut_like_a_corpus(proteins: Corpus) -> None:
    subset = proteins.subset([3, 1, 4])
    copy = in_memory_corpus(list(subset.records()))
    for mode in ("packed", "concatenated"):
        assert (
            Contexts(subset, 128, mode).rows([0, 1]).input_ids == Contexts(copy, 128, mode).rows([0, 1]).input_ids
        ).all()


def test_no_rows_are_an_empty_batch(proteins: Corpus) -> None:
    batch = Contexts(proteins, 64).rows([])
    assert batch.input_ids.shape == (0, 64)
    assert batch.segments is not None
    assert batch.segments.tolist() == [0]


def test_contexts_that_cannot_be_are_refused(proteins: Corpus) -> None:
    with pytest.raises(InputError, match="expected at least 3"):
        Contexts(proteins, 2)
    with pytest.raises(InputError, match="expected 'packed', 'concatenated' or 'related'"):
        Contexts(proteins, 512, "padded")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fewer than one context of 1,000,000; expected a smaller --context"):
        Contexts(proteins, 1_000_000, "concatenated")
    with pytest.raises(InputError, match="expected numbers from 0"):
        Contexts(proteins, 512).rows([3, -1])


def test_a_packed_context_may_be_longer_than_the_corpus() -> None:
    batch = Contexts(corpus_of([3, 4]), 100).rows([0])
    assert (batch.input_ids != PAD).sum() == 11
    assert batch.segments is not None
    assert batch.segments.tolist() in ([0, 5, 11, 100], [0, 6, 11, 100])
