from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from performers import PerformerConfig, PerformerForMaskedLM, PerformerModel
from performers.errors import ConfigError
from performers.models import PRESETS


@pytest.mark.parametrize(
    ("name", "millions"),
    [("paper-regular", 18.9), ("paper-trembl", 75.7), ("tiny", 1.0), ("small", 7.4), ("base", 37.8)],
)
def test_presets_have_the_sizes_they_are_named_for(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = PerformerForMaskedLM(PerformerConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_papers_presets_are_the_papers() -> None:
    shape = ("num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_size")
    assert [PRESETS["paper-regular"][key] for key in shape] == [8, 6, 2048, 512]
    assert [PRESETS["paper-trembl"][key] for key in shape] == [8, 36, 1024, 512]


def test_a_preset_takes_overrides_and_an_unknown_one_is_refused() -> None:
    assert PerformerConfig.preset("tiny", num_hidden_layers=2).num_hidden_layers == 2
    with pytest.raises(ConfigError, match="preset='huge': expected one of paper-regular"):
        PerformerConfig.preset("huge")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 64}, "hiden_size=64: there is no such key; a Performer is configured by attention"),
        ({"hidden_size": "64"}, "hidden_size='64': it should be a valid integer"),
        ({"hidden_size": 64.0}, r"hidden_size=64.0: it should be a valid integer"),
        ({"hidden_size": 0}, "hidden_size=0: it should be greater than 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True: it should be a valid integer"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob=1: it should be less than 1"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob=None: it should be a valid number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf: it should be a finite number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: it should be a valid boolean"),
        ({"attention_kwargs": {"kernel": torch.relu}}, "attention_kwargs=.*JSON"),
        ({"hidden_size": 100}, "hidden_size=100: expected a multiple of num_attention_heads=8"),
        ({"hidden_size": 24}, "makes heads of 3: expected an even size"),
        ({"attention": "linear"}, "attention='linear': expected one of favor, exact"),
        ({"attention": ["favor"]}, "expected one name for all layers, or num_hidden_layers=6 names"),
        ({"attention": 3}, "attention=3: it should be a valid string, or it should be a valid list"),
        (
            {"attention_kwargs": {"features": 3}},
            "attention_kwargs has features=3: 'favor' attention has no such argument",
        ),
        ({"attention": "exact", "attention_kwargs": {"kernel": "relu"}}, "expected none"),
        ({"reversible": 1}, "reversible=1: it should be a valid boolean"),
        (
            {"attention": "split", "attention_kwargs": {"heads": 8}},
            "heads=8: with num_attention_heads=8 a split leaves",
        ),
        ({"attention": "split", "attention_kwargs": {"heads": 0}}, "heads=0: with num_attention_heads=8"),
        ({"attention": "split", "num_attention_heads": 1}, "heads=None: with num_attention_heads=1"),
        ({"attention": "split", "attention_kwargs": {"second": "linear"}}, "second='linear': expected one of favor"),
        ({"attention": "split", "attention_kwargs": {"first": ["local"]}}, r"first=\['local'\]: expected one of favor"),
        ({"attention": "split", "attention_kwargs": {"first_kwargs": 3}}, "first_kwargs=3: expected a dictionary"),
        (
            {"attention": "split", "attention_kwargs": {"first_kwargs": {"kernel": "relu"}}},
            "attention_kwargs has kernel='relu': 'local' attention has no such argument; expected window",
        ),
        (
            {"attention": ["favor", "exact"] * 3, "attention_kwargs": {"num_features": 8}},
            "a dictionary for each of exact, favor",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        PerformerConfig(**values)


def test_a_wrong_config_json_is_refused(tmp_path: Path) -> None:
    PerformerConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for change, message in (({"hidden_sizes": 3}, "hidden_sizes=3"), ({"hidden_size": "x"}, "hidden_size='x'")):
        file.write_text(json.dumps({**values, **change}))
        with pytest.raises(ConfigError, match=message):
            AutoConfig.from_pretrained(tmp_path)


def test_a_value_is_checked_when_it_is_changed_too() -> None:
    config = PerformerConfig()
    with pytest.raises(ConfigError, match="seed='a'"):
        config.seed = "a"  # pyright: ignore[reportAttributeAccessIssue]
    config.num_attention_heads = 3
    with pytest.raises(ConfigError, match="expected a multiple of num_attention_heads=3"):
        PerformerModel(config)


def test_integers_stand_for_floats() -> None:
    config = PerformerConfig(hidden_dropout_prob=0, rope_theta=10_000)
    assert isinstance(config.hidden_dropout_prob, float)
    assert isinstance(config.rope_theta, float)


def test_favor_uses_relu_unless_told_otherwise() -> None:
    assert PerformerConfig().attention_kwargs == {"kernel": "relu"}
    assert PerformerConfig(attention_kwargs={"kernel": "softmax"}).attention_kwargs == {"kernel": "softmax"}
    hybrid = PerformerConfig(attention=["favor", "exact"] * 3, attention_kwargs={"favor": {"num_features": 8}})
    assert hybrid.attention_kwargs == {"exact": {}, "favor": {"kernel": "relu", "num_features": 8}}
    split = PerformerConfig(attention="split", attention_kwargs={"second_kwargs": {"num_features": 8}})
    assert split.attention_kwargs == {
        "first": "local",
        "first_kwargs": {},
        "second": "favor",
        "second_kwargs": {"kernel": "relu", "num_features": 8},
    }


def test_a_saved_configuration_comes_back_equal(tmp_path: Path) -> None:
    generic = {"num_labels": 7, "problem_type": "regression", "dtype": "bfloat16"}
    config = PerformerConfig(attention=["favor", "exact"] * 3, seed=5, chunk_size_feed_forward=0, **generic)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PerformerConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_a_hugging_face_attention_implementation_is_refused() -> None:
    config = PerformerConfig(attn_implementation="sdpa")
    with pytest.raises(ConfigError, match="chosen by its configuration, attention='favor'"):
        PerformerModel(config)
