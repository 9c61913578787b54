"""The attention functions' arguments: what is accepted, and what is refused in which words."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from mechanisms import CASES, Case

from performers.attention import FavorFeatures, FavorState, exact_attention, favor_attention
from performers.errors import InputError, PerformersError


def inputs(batch: int = 2, heads: int = 4, length: int = 10, head_dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, length, head_dim) for _ in range(3)]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.randn(2, 10, 8)}, r"query has shape \(2, 10, 8\)"),
    ({"query": torch.ones(2, 4, 10, 8, dtype=torch.int64)}, "query has type torch.int64"),
    ({"value": torch.randn(2, 4, 9, 8)}, "key .* and value .* differ"),
    ({"query": torch.randn(3, 4, 10, 8)}, "query .* and key .* differ"),
    ({"query": torch.randn(2, 8, 10, 8)}, "enable_gqa=True allows"),
    ({"query": torch.randn(2, 6, 10, 8), "enable_gqa": True}, "multiple of Hkv"),
    ({"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)}, r"expected \(2, 10\) bool"),
    ({"key_padding_mask": torch.ones(2, 10)}, r"expected \(2, 10\) bool"),
    ({"cu_seqlens": torch.tensor([0, 10])}, "batch of one"),
    ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "int32 or int64"),
]


@pytest.mark.parametrize("case", CASES[::7], ids=str)
@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_an_argument_that_does_not_fit_is_named(case: Case, arguments: dict[str, Any], words: str) -> None:
    query, key, value = inputs()
    with pytest.raises(InputError, match=words):
        case.make(8, 16)(**{"query": query, "key": key, "value": value, **arguments})


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_padding_and_packing_do_not_combine(case: Case) -> None:
    offsets, mask = torch.tensor([0, 10]), torch.ones(1, 10, dtype=torch.bool)
    with pytest.raises(InputError, match="cannot be combined"):
        case.make(8, 16)(*inputs(batch=1), cu_seqlens=offsets, key_padding_mask=mask)
    with pytest.raises(InputError, match="cannot be combined"):
        case.make(8, 16)(*inputs(batch=1), cu_seqlens=offsets, return_state=True)


@pytest.mark.parametrize("offsets", [[1, 10], [0, 9], [0, 7, 5, 10]])
def test_offsets_that_do_not_rise_from_zero_to_the_length_are_refused(offsets: list[int]) -> None:
    with pytest.raises(InputError, match="cu_seqlens must rise from 0 to the length 10"):
        favor_attention(*inputs(batch=1), FavorFeatures(8, 16), cu_seqlens=torch.tensor(offsets))
    with pytest.raises(InputError, match="cu_seqlens must rise from 0 to the length 10"):
        exact_attention(*inputs(batch=1), cu_seqlens=torch.tensor(offsets))


def test_features_of_another_head_size_a_wrong_state_and_an_unknown_backend_are_named() -> None:
    with pytest.raises(InputError, match="query has head size 8, but features were made for head_dim=16"):
        favor_attention(*inputs(), FavorFeatures(16, 32))
    features = FavorFeatures(8, 16)
    _, state = favor_attention(*inputs(), features, return_state=True)
    with pytest.raises(InputError, match=r"state has shape \(2, 4, 16, 8\), expected \(1, 4, 16, 8\)"):
        favor_attention(*inputs(batch=1), features, state=state)
    with pytest.raises(InputError, match="backend='fast' is not known"):
        favor_attention(*inputs(), features, backend="fast")


def test_a_refusal_is_a_value_error_too() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, PerformersError)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_empty_sequence_gives_an_empty_output(case: Case) -> None:
    mechanism = case.make(8, 16)
    for is_causal in (False, True):
        assert mechanism(*inputs(length=0), is_causal=is_causal).shape == (2, 4, 0, 8)
    packed = mechanism(*inputs(batch=1, length=0), cu_seqlens=torch.tensor([0, 0]))
    assert packed.shape == (1, 4, 0, 8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strided_inputs_are_taken_as_they_are(case: Case) -> None:
    mechanism = case.make(8, 16)
    for length in (30, 700):
        as_linear_layers_give_them = [torch.randn(2, length, 4, 8).transpose(1, 2) for _ in range(3)]
        out = mechanism(*as_linear_layers_give_them)
        expected = mechanism(*(x.contiguous() for x in as_linear_layers_give_them))
        assert torch.allclose(out, expected, atol=1e-5, rtol=1e-4)


def test_bidirectional_attention_reads_a_state_too() -> None:
    features = FavorFeatures(8, 16)
    q, k, v = inputs(length=20)
    _, state = favor_attention(q[:, :, :5], k[:, :, :5], v[:, :, :5], features, return_state=True)
    out = favor_attention(q, k[:, :, 5:], v[:, :, 5:], features, state=state)
    assert torch.allclose(out, favor_attention(q, k, v, features), atol=1e-5)


def test_the_scale_multiplies_the_products_of_queries_and_keys() -> None:
    features = FavorFeatures(8, 16)
    q, k, v = inputs()
    assert torch.allclose(
        favor_attention(q, k, v, features, scale=1.0), favor_attention(q * 8**0.25, k * 8**0.25, v, features), atol=1e-5
    )


def test_a_state_is_as_large_after_ten_thousand_tokens_as_after_ten() -> None:
    features = FavorFeatures(8, 16)
    sizes = {favor_attention(*inputs(length=length), features, return_state=True)[1].nbytes for length in (10, 10_000)}
    assert sizes == {2 * 4 * 16 * (8 + 1 + 1) * 4}
    assert isinstance(favor_attention(*inputs(), features, return_state=True)[1], FavorState)


def test_features_with_a_function_are_copied_and_pickled() -> None:
    features = FavorFeatures(8, 16, kernel=torch.nn.functional.softplus)
    q, k, v = inputs()
    expected = favor_attention(q, k, v, features)
    for other in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert torch.equal(favor_attention(q, k, v, other), expected)


def test_fast_precision_stays_near_the_accurate_one() -> None:
    q, k, v = (torch.randn(1, 2, 500, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    for kernel in ("softmax", "relu"):
        for is_causal in (False, True):
            out = {
                precision: favor_attention(
                    q, k, v, FavorFeatures(64, 256, kernel, precision=precision), is_causal=is_causal
                ).double()
                for precision in ("accurate", "fast")
            }
            features = FavorFeatures(64, 256, kernel)
            oracle = favor_attention(
                q.double(), k.double(), v.double(), features, is_causal=is_causal, backend="reference"
            )
            assert (out["accurate"] - oracle).norm() < 0.004 * oracle.norm()
            assert (out["fast"] - oracle).norm() < 0.04 * oracle.norm()
