"""Pretrained models of Hugging Face with linear attention: every family that goes, and every one that is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import performers
from performers.errors import CheckpointError, InputError, UnsupportedError

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PADDED = {**SMALL, "pad_token_id": 1}
LLAMA = {**SMALL, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 50}

GO: dict[str, tuple[str, dict[str, Any]]] = {
    "EsmModel": ("EsmConfig", {**PADDED, "mask_token_id": 32, "position_embedding_type": "rotary"}),
    "EsmcModel": ("EsmcConfig", {**SMALL, "vocab_size": 64}),
    "BertModel": ("BertConfig", PADDED),
    "RobertaModel": ("RobertaConfig", PADDED),
    "ElectraModel": ("ElectraConfig", {**PADDED, "embedding_size": 16}),
    "AlbertModel": ("AlbertConfig", {**PADDED, "embedding_size": 16}),
    "DistilBertModel": (
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL),
    "OPTForCausalLM": (
        "OPTConfig",
        {**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "Qwen3ForCausalLM": ("Qwen3Config", {**LLAMA, "head_dim": 8}),
    "BioGptForCausalLM": ("BioGptConfig", PADDED),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "ViTModel": ("ViTConfig", VISION),
    "Dinov2Model": ("Dinov2Config", VISION),
    "CLIPTextModel": ("CLIPTextConfig", SMALL),
}
DECODERS = [name for name in GO if name.endswith(("CausalLM", "LMHeadModel"))]
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "T5EncoderModel": (
        "T5Config",
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64},
        "additive position bias",
    ),
    "DebertaV2Model": ("DebertaV2Config", PADDED, "no AttentionInterface"),
    "RoFormerModel": ("RoFormerConfig", PADDED, "no AttentionInterface"),
    "MPNetModel": ("MPNetConfig", PADDED, "no AttentionInterface"),
    "BigBirdModel": ("BigBirdConfig", PADDED, "no AttentionInterface"),
    "LongformerModel": ("LongformerConfig", PADDED, "no AttentionInterface"),
    "ConvBertModel": ("ConvBertConfig", {**PADDED, "embedding_size": 32}, "no AttentionInterface"),
    "XLNetModel": (
        "XLNetConfig",
        {"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "no AttentionInterface",
    ),
    "BloomModel": (
        "BloomConfig",
        {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "no AttentionInterface",
    ),
    "GPTJModel": (
        "GPTJConfig",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        "no AttentionInterface",
    ),
    "FalconModel": (
        "FalconConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "no AttentionInterface",
    ),
    "MistralForCausalLM": ("MistralConfig", {**LLAMA, "sliding_window": 4}, "sliding window of 4"),
    "ModernBertModel": ("ModernBertConfig", {**PADDED, "local_attention": 8}, "sliding window"),
    "Gemma2ForCausalLM": ("Gemma2Config", {**LLAMA, "head_dim": 8}, "soft-capped"),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def build(name: str, config: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    # Tiny random weights make attention nearly uniform: sharper ones show a wrong wire.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def inputs_of(model: Any, length: int = 20, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    inputs = {"input_ids": torch.randint(4, 24, (2, length), generator=generator)}
    if padded:
        inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        inputs["attention_mask"][1, length - 7 :] = 0
    return inputs


@torch.no_grad()
def hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    return out if mask is None else out[mask.bool()]


@pytest.mark.parametrize("name", GO)
def test_exact_attention_through_our_path_is_the_original(name: str) -> None:
    """`sparse` with a window that covers everything is exact attention: this proves the wires, not the estimate."""
    model = build(name, *GO[name])
    inputs = inputs_of(model)
    before = hidden(model, inputs)
    performers.convert(model, "sparse", stride=64)
    torch.testing.assert_close(hidden(model, inputs), before, atol=1e-5, rtol=1e-4)
    performers.convert(model, "exact")
    torch.testing.assert_close(hidden(model, inputs), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", GO)
def test_a_converted_model_is_saved_and_opened_to_the_same_numbers_again_and_again(name: str, tmp_path: Path) -> None:
    model = build(name, *GO[name])
    inputs = inputs_of(model)
    performers.convert(model, "favor", num_features=64)
    expected = hidden(model, inputs)
    for turn in range(2):
        model.save_pretrained(tmp_path / str(turn))
        model = performers.load(tmp_path / str(turn))
        assert torch.equal(hidden(model, inputs), expected)
    stock = getattr(transformers, name).from_pretrained(tmp_path / "1", attn_implementation="favor").eval()
    assert torch.equal(hidden(stock, inputs), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_linear_attention_cannot_express_is_refused_by_name(name: str) -> None:
    config, settings, words = REFUSED[name]
    model = build(name, config, settings)
    with pytest.raises(UnsupportedError, match=words):
        performers.convert(model, "favor")


@pytest.mark.parametrize("name", DECODERS)
def test_generating_from_a_state_equals_recomputing(name: str) -> None:
    model = build(name, *GO[name])
    inputs = {"input_ids": torch.randint(4, 24, (2, 9), generator=torch.Generator().manual_seed(2))}
    inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    inputs["attention_mask"][0, :4] = 0  # padded on the left, as prompts are
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    performers.convert(model, "favor", num_features=32)
    recomputed = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings), recomputed)
    beams = {**settings, "num_beams": 3}
    assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, **beams, use_cache=False))
    out = model.generate(**inputs, **settings, return_dict_in_generate=True)
    assert {layer.state.nbytes for layer in out.past_key_values.layers} == {out.past_key_values.layers[0].state.nbytes}


def test_the_name_alone_works_after_importing_performers_in_either_order() -> None:
    body = (
        "import torch; torch.manual_seed(0); config = transformers.BertConfig(vocab_size=9, hidden_size=8, "
        "num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, attention_probs_dropout_prob=0.0); "
        "model = transformers.AutoModel.from_config(config, attn_implementation='favor').eval(); "
        "print(model(torch.ones(1, 4, dtype=torch.long))[0].sum().item())"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", f"import {first}; import {second}; {body}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for first, second in (("transformers", "performers"), ("performers", "transformers"))
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "first", ["from transformers import BertModel", "from transformers import AutoModel", "performers.PerformerModel"]
)
def test_every_way_into_transformers_finds_our_names(first: str) -> None:
    code = (
        f"import performers; {first}; from transformers import AttentionInterface, AutoModel, BertModel; "
        "assert 'favor' in AttentionInterface(); "
        "AutoModel.from_config(performers.PerformerConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = performers.convert(build("LlamaForCausalLM", *GO["LlamaForCausalLM"]), "favor", num_features=64)
    ids = torch.randint(4, 24, (1, 20), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, :7], model(ids[:, :7]).logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(packed[:, 7:], model(ids[:, 7:]).logits, atol=1e-5, rtol=1e-4)


def test_chains_do_not_see_each_other() -> None:
    model = performers.convert(build("EsmcModel", *GO["EsmcModel"]), "favor", num_features=64)
    ids = torch.randint(4, 24, (1, 20), generator=torch.Generator().manual_seed(2))
    chains = torch.tensor([[0] * 7 + [1] * 13])
    changed = ids.clone()
    changed[:, :7] = 5
    with torch.no_grad():
        first, second = (model(x, sequence_id=chains)[0][:, 7:] for x in (ids, changed))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_some_layers_are_converted_and_the_others_stay_exact() -> None:
    name = "BertModel"
    model = build(name, *GO[name])
    inputs = inputs_of(model)
    exact = model(**inputs, output_hidden_states=True).hidden_states
    performers.convert(model, "favor", layers=[-1], num_features=16)
    half = model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(half[1][real], exact[1][real], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(half[2][real], exact[2][real], atol=1e-3)
    assert model.config.performers["layers"] == [1]


def test_dropout_of_weights_that_are_not_there_is_set_to_zero_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = build("BertModel", *GO["BertModel"])
    stock = build("BertModel", *GO["BertModel"])
    stock.set_attn_implementation("favor")
    with pytest.raises(UnsupportedError, match=r"attention dropout is 0\.1"):
        stock.train()(torch.ones(1, 4, dtype=torch.long))
    performers.convert(model, "favor")
    assert model.config.attention_probs_dropout_prob == 0.0
    assert "attention dropout is set to 0" in caplog.text
    model.train()(torch.ones(1, 4, dtype=torch.long))[0].sum().backward()


def test_requests_that_cannot_be_met_are_refused_in_words() -> None:
    model = performers.convert(build("BertModel", *GO["BertModel"]), "favor")
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="ready-made attention mask of 4 dimensions"):
        model(ids, attention_mask=torch.zeros(1, 1, 4, 4))
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention": "linear"}, "attention='linear'"),
        ({"layers": [2]}, "2 is not the number"),
        ({"kernel": "sofmax"}, "kernel='sofmax'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        performers.convert(build("BertModel", *GO["BertModel"]), **arguments)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model"):
        performers.load(tmp_path)


def test_a_performer_is_opened_by_the_same_function(tmp_path: Path) -> None:
    config = performers.PerformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    performers.PerformerForMaskedLM(config).save_pretrained(tmp_path)
    assert type(performers.load(tmp_path)).__name__ == "PerformerForMaskedLM"
