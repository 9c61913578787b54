"""Pretrained models of Hugging Face with linear attention: every family that goes, and every one that is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import BART, DECODERS, GO, PAGE, REFUSED, SMALL, VISION, build, coverage_page, hidden, inputs_of

import performers
from performers.attention import MECHANISMS, ExactAttention
from performers.conversion.measurement import call_error, outcome
from performers.conversion.specification import Specification
from performers.errors import CheckpointError, InputError, UnsupportedError


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", GO)
def test_exact_attention_through_our_path_is_the_original(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This proves the wires, not the estimate."""
    monkeypatch.setitem(MECHANISMS, "sparse", ExactAttention)
    model = build(name, *GO[name])
    inputs = inputs_of(model, padded=padded)
    before = hidden(model, inputs)
    performers.convert(model, "sparse")
    torch.testing.assert_close(hidden(model, inputs), before, atol=1e-5, rtol=1e-4)
    performers.convert(model, "exact")
    torch.testing.assert_close(hidden(model, inputs), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", GO)
def test_favor_approaches_exact_attention_as_features_are_added(name: str) -> None:
    """Judged on attention outputs, given the exact queries, keys and values."""
    model = build(name, *GO[name])
    performers.convert(model, "favor", layers=[])
    calls = outcome(model, inputs_of(model), keep_calls=True).calls
    errors = {}
    for num_features in (16, 4096):
        specification = Specification("favor", {"kernel": "softmax-sharp", "num_features": num_features})
        outputs, exact = [], []
        for layer, of_layer in calls.items():
            for call in of_layer:
                mechanism = specification.mechanism(call.query.shape[-1], layer)
                mask, scale = call.arguments.get("key_padding_mask"), call.arguments["scale"]
                mechanism.features.calibrate_(call.query, call.key, mask, scale)
                outputs.append(mechanism(call.query, call.key, call.value, **call.arguments))
                exact.append(call)
        errors[num_features] = call_error(outputs, exact)
    assert errors[4096] < 0.15
    assert errors[4096] < errors[16] / 2


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


@pytest.mark.parametrize(
    ("attention", "arguments"),
    [
        ("local", {"window": 3}),
        ("split", {"first_kwargs": {"window": 3}, "second_kwargs": {"num_features": 32}}),
    ],
)
def test_windows_and_heads_split_between_a_window_and_favor_are_saved_and_opened(
    attention: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = build("BertModel", *GO["BertModel"])
    inputs = inputs_of(model)
    before = hidden(model, inputs)
    performers.convert(model, "local", window=64)  # sees everything
    torch.testing.assert_close(hidden(model, inputs), before, atol=1e-5, rtol=1e-4)
    performers.convert(model, attention, **arguments)
    expected = hidden(model, inputs)
    assert not torch.allclose(expected, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(hidden(performers.load(tmp_path), inputs), expected)
    stock = transformers.BertModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert torch.equal(hidden(stock, inputs), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_linear_attention_cannot_express_is_refused_by_name(name: str) -> None:
    config, settings, words = REFUSED[name]
    model = build(name, config, settings)
    with pytest.raises(UnsupportedError, match=words):
        performers.convert(model, "favor")


@pytest.mark.parametrize("attention", ["sparse", "reformer", "local"])
def test_patterns_and_hashes_refuse_cross_attention_to_padded_keys(attention: str) -> None:
    model = build("BartForConditionalGeneration", *GO["BartForConditionalGeneration"])
    performers.convert(model, attention)
    ids = torch.randint(4, 24, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    model(input_ids=ids, decoder_input_ids=ids)
    mask[0, 5:] = 0
    with pytest.raises(UnsupportedError, match="cross-attention to padded keys"):
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    performers.convert(model, "exact")
    performers.convert(model, attention, layers=[])  # what stays exact sees padding as before
    model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids)


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
    sizes = []
    for number in (4, 20):
        changed = {**settings, "max_new_tokens": number, "return_dict_in_generate": True}
        layers = model.generate(**inputs, **changed).past_key_values.layers
        sizes.append([layer.state.nbytes for layer in layers])
    assert sizes[0] == sizes[1], "a state does not grow"


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


def test_cross_attention_sees_no_padding_of_the_encoder() -> None:
    model = performers.convert(build("BartForConditionalGeneration", *GO["BartForConditionalGeneration"]), "favor")
    ids, decoder_ids = (torch.randint(4, 24, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 5))
    padded = torch.nn.functional.pad(ids, (0, 4), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    with torch.no_grad():
        alone = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
        with_padding = model(input_ids=padded, attention_mask=mask, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(with_padding, alone, atol=1e-5, rtol=1e-4)


def test_an_encoder_decoder_generates_what_recomputing_gives() -> None:
    model = performers.convert(build("BartForConditionalGeneration", *GO["BartForConditionalGeneration"]), "favor")
    ids = torch.randint(4, 24, (2, 9), generator=torch.Generator().manual_seed(2))
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "forced_eos_token_id": None,
    }
    for beams in (1, 3):
        cached = model.generate(input_ids=ids, num_beams=beams, **settings)
        assert torch.equal(cached, model.generate(input_ids=ids, num_beams=beams, use_cache=False, **settings))


def test_padding_on_the_left_is_invisible_to_a_decoder() -> None:
    model = performers.convert(build("LlamaForCausalLM", *GO["LlamaForCausalLM"]), "favor")
    ids = torch.randint(4, 24, (1, 9), generator=torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(ids, (3, 0), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        shifted = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 3:]
        torch.testing.assert_close(shifted, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-4)


def test_chains_whose_tokens_alternate_are_refused() -> None:
    model = performers.convert(build("EsmcModel", *GO["EsmcModel"]), "favor", num_features=64)
    ids = torch.randint(4, 24, (1, 6), generator=torch.Generator().manual_seed(2))
    with pytest.raises(UnsupportedError, match="not next to each other"):
        model(ids, sequence_id=torch.tensor([[0, 1, 0, 1, 0, 1]]))


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


@pytest.mark.parametrize("name", GO)
def test_attention_weights_cannot_be_asked_for(name: str) -> None:
    model = performers.convert(build(name, *GO[name]), "favor")
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**inputs_of(model), output_attentions=True)


def test_requests_that_cannot_be_met_are_refused_in_words() -> None:
    model = performers.convert(build("BertModel", *GO["BertModel"]), "favor")
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="ready-made attention mask of 4 dimensions"):
        model(ids, attention_mask=torch.zeros(1, 1, 4, 4))
    decoder = performers.convert(build("LlamaForCausalLM", *GO["LlamaForCausalLM"]), "favor")
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="packing by cu_seq_lens"):
        decoder(ids, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, use_cache=False)
    for settings in ({}, {"attention_mask": ids}):
        cache = transformers.StaticCache(config=decoder.config, max_cache_len=8)
        with pytest.raises(UnsupportedError, match=r"a cache of fixed length \(8\)"):
            decoder(ids, past_key_values=cache, **settings)


def test_a_window_is_refused_from_the_first_token_that_it_would_hide() -> None:
    config, settings, _ = REFUSED["MistralForCausalLM"]
    model = performers.convert(build("MistralForCausalLM", config, {**settings, "sliding_window": 12}), "favor")
    ids = torch.randint(4, 24, (1, 13), generator=torch.Generator().manual_seed(0))
    model(ids[:, :12])
    with pytest.raises(UnsupportedError, match="sliding window of 12"):
        model(ids)
    asked = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(ids[:, :8], max_new_tokens=4, **asked).shape == (1, 12)
    with pytest.raises(UnsupportedError, match="sliding window of 12"):
        model.generate(ids[:, :8], max_new_tokens=6, **asked)


@pytest.mark.parametrize(
    ("name", "config", "settings", "words"),
    [
        ("CLIPModel", "CLIPConfig", {"text_config": SMALL, "vision_config": VISION}, "made of several models"),
        ("WhisperModel", "WhisperConfig", {**BART, "pad_token_id": 1}, "reads input_features"),
    ],
)
def test_a_model_that_is_not_one_stack_of_tokens_or_pixels_is_refused(
    name: str, config: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        performers.convert(getattr(transformers, name)(getattr(transformers, config)(**settings)), "favor")


def test_layers_that_training_drops_at_random_are_all_converted() -> None:
    config = transformers.M2M100Config(**BART, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    model = performers.convert(transformers.M2M100Model(config).train(), "favor", num_features=16)
    assert model.config.performers["layers"] is None
    assert model.training


@pytest.mark.parametrize("kernel", ["softmax-sharp", "softmax-optimal"])
def test_causal_attention_has_such_features_fitted_or_refused(kernel: str) -> None:
    model = build("LlamaForCausalLM", *GO["LlamaForCausalLM"])
    with pytest.raises(InputError, match="give some sequences to fit it to"):
        performers.convert(model, "favor", kernel=kernel)
    performers.convert(model, "favor", kernel=kernel, sequences=[[5, 6, 7, 8], [9, 10, 11]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention": "linear"}, "attention='linear'"),
        ({"layers": [2]}, "2 is not the number"),
        ({"kernel": "sofmax"}, "kernel='sofmax'"),
        ({"kernel": torch.relu}, "given by its name"),
        ({"kernel": "softmax-prototypes"}, "made of the model's own queries: give some sequences"),
        ({"layers": "auto:0.05"}, "give some sequences"),
        ({"layers": "auto:none"}, "'auto:' and an error"),
        ({"layers": "first"}, "'auto:' and an error"),
        ({"sequences": []}, "no sequence"),
        ({"sequences": "MKT"}, "is one string"),
        ({"sequences": ["MKT"]}, "need a tokenizer"),
        ({"sequences": [[4, 5], []]}, "sequence 2 is empty"),
        ({"sequences": [[4, 99]]}, "ids from 4 to 99, but the model has 50"),
        ({"sequences": [[4] * 513]}, "513 tokens, but BertModel has learned 512 positions"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        performers.convert(build("BertModel", *GO["BertModel"]), **arguments)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model"):
        performers.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not the JSON"),
        ("[]", "not the JSON"),
        ("{}", "cannot be opened"),
        ('{"model_type": "bert"}', "cannot be opened"),
        ('{"model_type": "bert", "architectures": ["Mine"]}', "was saved as Mine"),
        ('{"auto_map": {"AutoConfig": "mine.Mine"}, "model_type": "mine"}', "cannot be opened"),
    ],
)
def test_a_folder_that_cannot_be_opened_is_named_in_one_sentence(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        performers.convert(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_class_of_somebody_elses_is_opened_by_the_class_that_is_named(tmp_path: Path) -> None:
    model = build("BertModel", *GO["BertModel"])
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"BertModel"', '"AntiBERTy"'))
    assert type(performers.convert(tmp_path, architecture="BertModel")).__name__ == "BertModel"
    with pytest.raises(InputError, match="'AntiBERTy'"):
        performers.convert(tmp_path, architecture="AntiBERTy")


def test_few_features_are_said_with_the_measured_error(caplog: pytest.LogCaptureFixture) -> None:
    model = build("BertModel", *GO["BertModel"])
    performers.convert(model, "favor", num_features=64)
    assert "num_features" not in caplog.text
    performers.convert(model, "favor", num_features=4, sequences=[[5, 6, 7, 8], [9, 10, 11]])
    assert (
        "num_features=4 is less than the head size, 8: on the sequences the last hidden states are off by"
        in caplog.text
    )
    caplog.clear()
    performers.convert(model, "favor", num_features=4)
    assert "on random tokens" in caplog.text
    caplog.clear()
    performers.convert(build("ViTModel", *GO["ViTModel"]), "favor", num_features=4)
    assert "on random pixels the last hidden states are off by" in caplog.text


def test_the_list_of_families_in_the_documentation_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == coverage_page(), "run python tests/conversion/families.py"


def test_a_performer_is_opened_by_the_same_function_and_not_converted(tmp_path: Path) -> None:
    config = performers.PerformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    performers.PerformerForMaskedLM(config).save_pretrained(tmp_path)
    assert type(performers.load(tmp_path)).__name__ == "PerformerForMaskedLM"
    with pytest.raises(UnsupportedError, match="is a Performer already"):
        performers.convert(tmp_path)
