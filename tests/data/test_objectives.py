from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from performers.data import (
    BOS,
    EOS,
    FIRST_RESIDUE,
    IGNORED,
    MASK,
    PAD,
    VOCAB_SIZE,
    Contexts,
    in_memory_corpus,
    mask_tokens,
    next_token_labels,
    read_fasta,
)
from performers.errors import InputError

Tokens = npt.NDArray[np.int64]
ROWS = stn.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.integers(0, VOCAB_SIZE - 1))
SCHEMES = st.sampled_from(["bert", "published", "mask"])


def residues(rows: int = 1, length: int = 200_000) -> Tokens:
    return np.random.Generator(np.random.PCG64(0)).integers(FIRST_RESIDUE, FIRST_RESIDUE + 20, (rows, length))


@settings(deadline=None)
@given(tokens=ROWS, scheme=SCHEMES, seed=st.integers(0, 5), step=st.integers(0, 5), proportion=st.floats(0.01, 1))
def test_only_residues_are_hidden_and_labels_are_what_stood_there(
    tokens: Tokens, scheme: str, seed: int, step: int, proportion: float
) -> None:
    before = tokens.copy()
    inputs, labels = mask_tokens(
        tokens,
        range(len(tokens)),
        seed=seed,
        step=step,
        scheme=scheme,
        proportion=proportion,  # type: ignore[arg-type]
    )
    assert (tokens == before).all()
    chosen = labels != IGNORED
    assert (labels[chosen] == tokens[chosen]).all()
    assert (tokens[chosen] >= FIRST_RESIDUE).all()
    assert (inputs[~chosen] == tokens[~chosen]).all()
    has_residues = (tokens >= FIRST_RESIDUE).any(axis=1)
    assert (chosen.any(axis=1) == has_residues).all()
    if scheme == "mask":
        assert (inputs[chosen] == MASK).all()


@settings(deadline=None)
@given(tokens=ROWS, scheme=SCHEMES, seed=st.integers(0, 5), step=st.integers(0, 5))
def test_a_row_is_masked_alike_in_any_batch_and_at_any_length(
    tokens: Tokens, scheme: str, seed: int, step: int
) -> None:
    options = {"seed": seed, "step": step, "scheme": scheme, "proportion": 0.5}
    ids = [10 * row for row in range(len(tokens))]
    inputs, labels = mask_tokens(tokens, ids, **options)  # type: ignore[arg-type]
    for row, row_id in enumerate(ids):
        alone = mask_tokens(tokens[row : row + 1], [row_id], **options)  # type: ignore[arg-type]
        assert (alone[0][0] == inputs[row]).all()
        assert (alone[1][0] == labels[row]).all()
    padded = np.pad(tokens, ((0, 0), (0, 7)), constant_values=PAD)
    longer = mask_tokens(padded[::-1], ids[::-1], **options)  # type: ignore[arg-type]
    assert (longer[0][::-1, :-7] == inputs).all()
    assert (longer[1][::-1, :-7] == labels).all()


@pytest.mark.parametrize(
    ("scheme", "masked", "random"), [("bert", 0.8, 0.1), ("published", 0.1, 0.8), ("mask", 1.0, 0.0)]
)
def test_the_proportions_are_those_of_the_scheme(scheme: str, masked: float, random: float) -> None:
    tokens = residues()
    inputs, labels = mask_tokens(tokens, [0], seed=0, step=0, scheme=scheme)  # type: ignore[arg-type]
    chosen = labels != IGNORED
    count = int(chosen.sum())
    # Four standard errors; a random residue is the original one time in twenty.
    assert abs(chosen.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / tokens.size)
    for share, found in ((masked, inputs[chosen] == MASK), (0.95 * random, _changed(inputs, tokens, chosen))):
        assert abs(found.mean() - share) <= 4 * np.sqrt(share * (1 - share) / count)


def _changed(inputs: Tokens, tokens: Tokens, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return (inputs[chosen] != MASK) & (inputs[chosen] != tokens[chosen])


def test_random_residues_are_uniform_over_the_twenty() -> None:
    tokens = np.full((1, 400_000), FIRST_RESIDUE)
    inputs, labels = mask_tokens(tokens, [0], seed=0, step=0, scheme="published", proportion=1.0)
    replaced = inputs[inputs != MASK]
    counts = np.bincount(replaced, minlength=VOCAB_SIZE)
    assert counts[FIRST_RESIDUE + 20 :].sum() == 0
    others = counts[FIRST_RESIDUE + 1 : FIRST_RESIDUE + 20]  # the first also holds what was kept
    expected = 0.8 * 400_000 / 20
    assert (abs(others - expected) < 4.5 * np.sqrt(expected)).all()
    assert (labels != IGNORED).all()


def test_seeds_steps_and_rows_are_drawn_apart() -> None:
    tokens = residues(1, 500)
    draws = [
        mask_tokens(tokens, [row], seed=seed, step=step)[1].tobytes()
        for row in range(3)
        for seed in range(3)
        for step in range(3)
    ]
    assert len(set(draws)) == 27


def test_a_short_row_has_one_residue_to_predict() -> None:
    for step in range(50):
        _, labels = mask_tokens(np.array([[BOS, 7, EOS, PAD]]), [0], seed=0, step=step, proportion=0.01)
        assert labels.tolist() == [[IGNORED, 7, IGNORED, IGNORED]]


def test_the_draws_are_those_of_earlier_versions() -> None:
    tokens = FIRST_RESIDUE + 7 * np.arange(200).reshape(2, 100) % 20
    inputs, labels = mask_tokens(tokens, [5, 6], seed=1, step=2)
    assert hashlib.sha256(inputs.tobytes() + labels.tobytes()).hexdigest()[:16] == "8f5ca539ac435dd5"


@pytest.mark.parametrize(
    ("options", "says"),
    [({"scheme": "none"}, "expected 'bert'"), ({"proportion": 0}, "at most 1"), ({"proportion": 1.5}, "at most 1")],
)
def test_unknown_ways_of_masking_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        mask_tokens(residues(1, 5), [0], seed=0, step=0, **options)  # type: ignore[arg-type]


def test_as_many_row_ids_as_rows_are_needed() -> None:
    with pytest.raises(InputError, match="1 row ids for 2 rows"):
        mask_tokens(residues(2, 5), [0], seed=0, step=0)


def test_next_token_labels_score_what_has_a_past_in_its_segment() -> None:
    corpus = in_memory_corpus([("a", "MKT"), ("b", "GG"), ("c", "ACDEFGHIK")])
    batch = Contexts(corpus, 8).rows(range(4))
    labels = next_token_labels(batch.input_ids, batch.segments)
    assert labels.shape == batch.input_ids.shape
    assert batch.segments is not None
    starts = np.zeros(labels.size, dtype=bool)
    starts[batch.segments[:-1]] = True
    flat = batch.input_ids.reshape(-1)
    expected = np.where(starts | (flat == PAD), IGNORED, flat)
    assert labels.reshape(-1).tolist() == expected.tolist()
    assert (labels == EOS).sum() >= 2
    assert not (labels == BOS).any()


def test_next_token_labels_of_a_row_that_is_read_together() -> None:
    corpus = in_memory_corpus(read_fasta("bundled:validation"))
    batch = Contexts(corpus, 512, "concatenated").rows([0, 1])
    labels = next_token_labels(batch.input_ids, batch.segments)
    assert (labels[:, 0] == IGNORED).all()
    assert (labels[:, 1:] == batch.input_ids[:, 1:]).all()
    assert batch.input_ids[0, 0] == BOS
