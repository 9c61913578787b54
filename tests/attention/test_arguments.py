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


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_an_argument_that_does_not_fit_is_named(case: Case, arguments: dict[str, Any], words: str) -> None:
    query, key, value = inputs()
    with pytest.raises(InputError, match=words):
        case.make(8, 16)(**{"query": query, "key": key, "value": value, **arguments})


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
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


def test_a_scale_a_state_and_types_that_make_no_sense_are_named() -> None:
    features = FavorFeatures(8, 16)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="scale="):
            favor_attention(*inputs(), features, scale=scale)
    _, state = exact_attention(*inputs(), return_state=True)
    with pytest.raises(InputError, match="state is a ExactState: expected a FavorState"):
        favor_attention(*inputs(), features, state=state)  # type: ignore[arg-type]
    query, key, value = inputs()
    with pytest.raises(InputError, match="expected one"):
        exact_attention(query, key, value.half())


def test_a_float32_state_serves_float64_queries() -> None:
    features = FavorFeatures(8, 16)
    query, key, value = inputs()
    _, state = favor_attention(query, key, value, features, return_state=True)
    out = favor_attention(*(x.double() for x in (query, key, value)), features, state=state)
    assert out.dtype == torch.float64


def test_a_function_with_parameters_to_learn_is_refused() -> None:
    with pytest.raises(InputError, match="freeze them first"):
        FavorFeatures(8, 16, kernel=torch.nn.PReLU())
    FavorFeatures(8, 16, kernel=torch.nn.PReLU().requires_grad_(False))


@pytest.mark.parametrize("length", [20, 600])
def test_a_state_may_have_any_strides(length: int) -> None:
    features = FavorFeatures(8, 16, kernel="relu")
    first, second = inputs(heads=3, length=length), inputs(heads=3, length=length)
    _, state = favor_attention(*first, features, is_causal=True, return_state=True)
    strided = FavorState(*(x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in state.tensors()))
    plain = FavorState(*(x.clone().requires_grad_() for x in state.tensors()))
    found = []
    for past in (plain, strided):
        out, after = favor_attention(*second, features, is_causal=True, state=past, return_state=True)
        (gradient,) = torch.autograd.grad(out.sum() + after.numerator.sum(), past.numerator)
        found.append((out, after.numerator, gradient))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kernel", ["softmax", "relu", torch.exp])
def test_no_finite_padding_or_future_is_so_large_that_it_shows(kernel: Any) -> None:
    features = FavorFeatures(8, 16, kernel=kernel)
    query, key, value = inputs(length=300)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[:, 200:] = False
    huge = [torch.cat([x[:, :, :200], torch.full_like(x[:, :, 200:], 1e30)], 2) for x in (key, value)]
    for is_causal in (False, True):
        for backend in ("chunked", "reference"):
            out = favor_attention(query, *huge, features, is_causal=is_causal, key_padding_mask=mask, backend=backend)
            plain = favor_attention(
                query[:, :, :200], key[:, :, :200], value[:, :, :200], features, is_causal=is_causal
            )
            assert torch.allclose(out[:, :, :200], plain, atol=1e-4)
    if kernel == "softmax":
        far = torch.cat([key[:, :, :200], torch.full_like(key[:, :, 200:], 3e38)], 2)
        out = favor_attention(query, far, value, features, is_causal=True)
        assert torch.equal(out[:, :, :200], favor_attention(query, key, value, features, is_causal=True)[:, :, :200])


def test_float16_stays_finite_in_fast_precision() -> None:
    query, key, value = (x.half() for x in inputs(length=3000))
    for kernel in ("softmax", "relu"):
        features = FavorFeatures(8, 16, kernel=kernel, precision="fast")
        assert favor_attention(query, key, value + 1, features).isfinite().all()


def test_features_are_computed_in_float32_under_autocast_and_drawn_on_the_cpu_under_a_default_device() -> None:
    features = FavorFeatures(8, 16)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(x), features(x).float())
        under = features(x)
    assert torch.equal(under, features(x))
    with torch.device("meta"):
        features.redraw_(torch.Generator("cpu").manual_seed(3))


def test_exact_attention_takes_a_padding_mask_without_a_matrix_of_its_own() -> None:
    query, key, value = inputs(length=50)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, 30:] = False
    alone = exact_attention(query[:1], key[:1, :, :30], value[:1, :, :30])
    assert torch.allclose(exact_attention(query, key, value, key_padding_mask=mask)[:1], alone, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_packed_sequences_compile_whole(case: Case) -> None:
    torch.compiler.reset()
    mechanism = case.make(8, 16)
    data, offsets = inputs(batch=1, length=40), torch.tensor([0, 11, 11, 40])
    run = torch.compile(lambda q, k, v, c: mechanism(q, k, v, cu_seqlens=c), fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(*data, offsets), mechanism(*data, cu_seqlens=offsets), atol=1e-5)


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
