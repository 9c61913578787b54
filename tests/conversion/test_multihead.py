"""PyTorch's own attention module, alone and in its Transformer layers, with linear attention."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import performers
from performers.attention import MECHANISMS, ExactAttention
from performers.errors import InputError, UnsupportedError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a mechanism that is exact attention: this proves the wires."""
    monkeypatch.setitem(MECHANISMS, "sparse", ExactAttention)
    return "sparse"


def tokens(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def encoder(batch_first: bool = True, **settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first, **settings)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not settings).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 20}])
def test_the_module_gives_what_the_original_gives(
    bias: bool, batch_first: bool, sizes: dict[str, int], exact: str
) -> None:
    module = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first, **sizes).eval()
    query, key, value = tokens(2, 7, 16), tokens(2, 9, sizes.get("kdim", 16)), tokens(2, 9, sizes.get("vdim", 16))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    expected, _ = module(query, key, value, key_padding_mask=padding, need_weights=False)
    names = list(module.state_dict())
    converted = performers.convert(module, exact)
    out, weights = converted(query, key, value, key_padding_mask=padding, need_weights=False)
    assert converted is module
    assert weights is None
    assert list(module.state_dict()) == names
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_a_sequence_without_a_batch_is_read_too(exact: str) -> None:
    module = nn.MultiheadAttention(16, 4).eval()
    x = tokens(7, 16)
    padding = torch.arange(7) > 4
    expected, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
    performers.convert(module, exact)
    torch.testing.assert_close(
        module(x, x, x, key_padding_mask=padding, need_weights=False)[0], expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_an_encoder_gives_what_the_original_gives_and_no_fast_path_goes_around_it(
    batch_first: bool, grad: bool, causal: bool, exact: str
) -> None:
    model = encoder(batch_first)
    x = tokens(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    x = x if batch_first else x.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    settings = {
        "src_key_padding_mask": padding.float().masked_fill(padding, -math.inf) if causal else padding,
        "mask": mask,
    }
    with torch.set_grad_enabled(grad):
        expected = model(x, **settings)
        performers.convert(model, exact)
        out = model(x, **settings)
        performers.convert(model, "favor", num_features=8)
        estimate = model(x, **settings)
    real = ~padding if batch_first else ~padding.T
    torch.testing.assert_close(out[real], expected[real], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(estimate[real], expected[real], atol=1e-2)


def test_few_features_are_said_with_the_measured_error(caplog: pytest.LogCaptureFixture) -> None:
    performers.convert(encoder(), "favor", num_features=64)
    assert "num_features" not in caplog.text
    performers.convert(encoder(), "favor", num_features=2)
    assert "num_features=2 is less than the head size, 4: on random vectors" in caplog.text


def test_a_decoder_with_attention_across_converts(exact: str) -> None:
    layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    x, memory = tokens(2, 6, 16), tokens(2, 9, 16)
    padding = torch.arange(9)[None].expand(2, -1) > 6
    settings = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(6), "tgt_is_causal": True}
    settings["memory_key_padding_mask"] = padding
    expected = model(x, memory, **settings)
    performers.convert(model, exact)
    torch.testing.assert_close(model(x, memory, **settings), expected, atol=1e-5, rtol=1e-4)


def test_causal_attention_needs_no_mask() -> None:
    module = performers.convert(nn.MultiheadAttention(16, 4, batch_first=True).eval(), "favor", num_features=32)
    x = tokens(1, 9, 16)
    changed = x.clone()
    changed[:, 5:] = 7
    for settings in ({"is_causal": True}, {"attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1)}):
        first, second = (module(y, y, y, need_weights=False, **settings)[0][:, :5] for y in (x, changed))
        assert torch.equal(first, second)


def test_favor_approaches_the_original_as_features_are_added() -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = tokens(2, 40, 16) / 4
    expected, _ = module(x, x, x, need_weights=False)
    errors = []
    for num_features in (16, 4096):
        performers.convert(module, "favor", num_features=num_features)
        errors.append(((module(x, x, x, need_weights=False)[0] - expected).norm() / expected.norm()).item())
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 2


def test_the_same_seed_and_the_same_weights_give_the_same_numbers() -> None:
    model = performers.convert(encoder(), "favor", num_features=16, seed=3)
    other = performers.convert(encoder(), "favor", num_features=16, seed=3)
    other.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    x = tokens(2, 9, 16)
    assert torch.equal(model(x), other(x))
    assert torch.equal(model(x), copied(x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_some_layers_convert_and_all_convert_back() -> None:
    model = encoder()
    x = tokens(2, 9, 16)
    padding = torch.arange(9)[None].expand(2, -1) > 6
    with torch.no_grad():
        exact = model(x, src_key_padding_mask=padding)
        performers.convert(model, "favor", layers=[-1], num_features=8)
        assert [type(layer.self_attn).__name__ for layer in model.layers] == [
            "MultiheadAttention",
            "LinearMultiheadAttention",
        ]
        assert not torch.allclose(model(x, src_key_padding_mask=padding), exact, atol=1e-2)
        performers.convert(model, "exact")
        again = model(x, src_key_padding_mask=padding)
    assert {type(layer.self_attn) for layer in model.layers} == {nn.MultiheadAttention}
    assert torch.equal(again, exact)
    assert model.use_nested_tensor


def test_a_module_inside_a_larger_one_is_found(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(16, 16), encoder(), nn.Linear(16, 2))
    model[1].layers[0].self_attn.dropout = 0.1
    performers.convert(model, "favor", num_features=8)
    assert "attention dropout is set to 0" in caplog.text
    assert model.train()(tokens(2, 9, 16)).shape == (2, 9, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "need_weights=True"),
        ({"need_weights": False, "attn_mask": torch.eye(9)}, "attn_mask is not the causal mask"),
        ({"need_weights": False, "attn_mask": torch.eye(9, dtype=torch.bool)}, "attn_mask is not the causal mask"),
        ({"need_weights": False, "attn_mask": torch.eye(9), "is_causal": True}, "attn_mask is not the causal mask"),
        ({"need_weights": False, "key_padding_mask": torch.full((2, 9), 0.5)}, "adds to the logits"),
    ],
)
def test_what_linear_attention_cannot_express_is_refused(settings: dict[str, Any], words: str) -> None:
    module = performers.convert(nn.MultiheadAttention(16, 4, batch_first=True), "favor")
    x = tokens(2, 9, 16)
    with pytest.raises(UnsupportedError, match=words):
        module(x, x, x, **settings)


def test_what_cannot_be_converted_is_named_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, add_bias_kv=True))
    with pytest.raises(UnsupportedError, match=r"^1: add_bias_kv"):
        performers.convert(model, "favor")
    assert type(model[0]) is nn.MultiheadAttention
    with pytest.raises(InputError, match=r"no nn\.MultiheadAttention"):
        performers.convert(nn.Linear(4, 4), "favor")
    with pytest.raises(InputError, match="kernel='sofmax'"):
        performers.convert(model[:1], "favor", kernel="sofmax")
    with pytest.raises(InputError, match="2 is not the number of one of the 1"):
        performers.convert(model[:1], "favor", layers=[2])
    with pytest.raises(InputError, match="no model of Hugging Face"):
        performers.convert(model[:1], "favor", layers="auto:0.1")
