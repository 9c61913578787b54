"""What local windows, heads split between two mechanisms and the materialised baseline promise beyond the laws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from performers import exact_attention
from performers.attention import (
    FavorAttention,
    LocalAttention,
    ReformerAttention,
    SplitAttention,
    local_attention,
    materialised_attention,
    reformer_attention,
)
from performers.errors import InputError


def draw(length: int, heads: int = 4, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, length, dim, generator=generator) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, 5), (50, 1), (50, 7), (64, 16), (20, 64), (333, 20)])
def test_local_attention_is_exact_attention_in_a_band(length: int, window: int, is_causal: bool) -> None:
    inputs = [x.double().requires_grad_() for x in draw(length)]
    q, k, v = inputs
    ahead = torch.arange(length)[:, None] - torch.arange(length)
    visible = (ahead.abs() < window) & ((ahead >= 0) | (not is_causal))
    out = local_attention(q, k, v, window=window, is_causal=is_causal)
    expected = torch.softmax((q @ k.mT * 16**-0.5).masked_fill(~visible, -torch.inf), -1) @ v
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_a_local_state_holds_the_last_real_tokens_of_each_row_and_no_more() -> None:
    q, k, v = draw(100)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0, 90:], mask[1, ::2] = False, False
    _, state = local_attention(q, k, v, window=8, is_causal=True, key_padding_mask=mask, return_state=True)
    assert state.real.all()
    assert torch.equal(state.key[0], k[0, :, 83:90])
    assert torch.equal(state.value[1], v[1, :, 87::2])
    sizes = set()
    for length in (10, 1000):
        q, k, v = draw(length)
        sizes.add(local_attention(q, k, v, window=8, is_causal=True, return_state=True)[1].nbytes)
    assert len(sizes) == 1


def test_the_materialised_baseline_keeps_its_matrix_and_fused_attention_does_not() -> None:
    largest = []
    for attend in (materialised_attention, exact_attention):
        q, k, v = (x.requires_grad_() for x in draw(200))
        kept: list[int] = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            attend(q, k, v, is_causal=True)
        largest.append(max(kept))
    assert largest[0] == 2 * 4 * 200 * 200
    assert largest[1] == 2 * 4 * 200 * 16


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_a_split_gives_each_half_what_its_mechanism_gives(heads: int | None, is_causal: bool) -> None:
    q, k, v = draw(60)
    split = SplitAttention(16, seed=3, heads=heads, first_kwargs={"window": 5}, second_kwargs={"num_features": 32})
    at = 2 if heads is None else heads
    out = split(q, k, v, is_causal=is_causal)
    first, second = ([x[:, part] for x in (q, k, v)] for part in (slice(None, at), slice(at, None)))
    assert torch.equal(out[:, :at], local_attention(*first, window=5, is_causal=is_causal))
    assert torch.equal(out[:, at:], split.second(*second, is_causal=is_causal))


def test_any_mechanisms_go_together_and_a_half_may_be_split_again() -> None:
    q, k, v = draw(60)
    split = SplitAttention(
        16,
        heads=1,
        first="exact",
        second="split",
        second_kwargs={"heads": 1, "first": "sparse", "first_kwargs": {"stride": 4}},
    )
    whole, state = split(q, k, v, is_causal=True, return_state=True)
    torch.testing.assert_close(whole[:, :1], exact_attention(q[:, :1], k[:, :1], v[:, :1], is_causal=True))
    pieces, before = [], None
    for part in (slice(0, 30), slice(30, 31), slice(31, 60)):
        piece, before = split(*(x[:, :, part] for x in (q, k, v)), is_causal=True, state=before, return_state=True)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=1e-4, atol=1e-5)
    assert before.nbytes == state.nbytes
    assert not split.has_fixed_state
    assert not split.has_fixed_causal_state  # exact attention keeps every key
    assert SplitAttention(16).has_fixed_causal_state
    assert not SplitAttention(16).has_fixed_state  # a bidirectional window cannot be read from a state


def test_a_split_draws_from_its_seed_and_redraws_both_halves() -> None:
    def projections(split: SplitAttention) -> list[Tensor]:
        return [half.features.projection for half in (split.first, split.second) if isinstance(half, FavorAttention)]

    one, same, other = (SplitAttention(16, seed=seed, first="favor") for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(projections(one), projections(same), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(projections(one), projections(other), strict=True))
    assert not torch.equal(*projections(one))
    other.redraw_(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(projections(one), projections(other), strict=True))
    assert one.redraws_by_default
    assert not SplitAttention(16, second="exact").redraws_by_default


def test_hashing_halves_share_queries_and_keys_if_both_hash() -> None:
    hashing = {"num_hashes": 2, "bucket_size": 8}
    both = SplitAttention(16, first="reformer", second="reformer", first_kwargs=hashing, second_kwargs=hashing)
    assert both.shares_query_and_key
    assert not SplitAttention(16, first="reformer").shares_query_and_key
    q, _, v = draw(60)
    assert isinstance(both.first, ReformerAttention)
    alone = reformer_attention(q[:, :2], q[:, :2], v[:, :2], seed=both.first.rotation_seed, **hashing)
    assert torch.equal(both(q, q, v)[:, :2], alone)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: local_attention(q, q, q, window=0), "window=0"),
        (lambda q: LocalAttention(16, window=2.5), "window=2.5"),  # type: ignore[arg-type]
        (lambda q: SplitAttention(16, first="linear"), "first='linear': expected one of favor, exact"),
        (lambda q: SplitAttention(16, heads=0), "heads=0"),
        (lambda q: SplitAttention(16, heads=4)(q, q, q), "heads=4 of 4: a split leaves at least one head"),
        (lambda q: SplitAttention(16)(q[:, :1], q[:, :1], q[:, :1]), "heads=None of 1"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[Tensor], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(torch.randn(1, 4, 10, 16))
