from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from performers import PerformerForCausalLM, PerformerForMaskedLM, PerformerForTokenClassification, PerformerModel
from performers.errors import CheckpointError

from .conftest import MIXTURES, residues

Make = Callable[..., Any]
ELSEWHERE = """
import random, sys, numpy, torch
random.seed(9), numpy.random.seed(9), torch.manual_seed(9)
from safetensors.torch import save_file
from performers import PerformerForMaskedLM
ids = torch.tensor([[1, 14, 12, 20, 3, 5, 2]])
with torch.no_grad():
    save_file({f: PerformerForMaskedLM.from_pretrained(f).eval()(ids).logits for f in sys.argv[1:]}, "logits.safetensors")
"""


def test_a_saved_model_gives_the_same_numbers_in_another_process(make: Make, tmp_path: Path) -> None:
    expected = {}
    for name, mixture in MIXTURES.items():
        model = make(PerformerForMaskedLM, **mixture)
        model.redraw_features_(seed=3, step=1)  # so that the configuration's seed does not tell the projections
        model.save_pretrained(tmp_path / name)
        expected[name] = model(torch.tensor([[1, 14, 12, 20, 3, 5, 2]])).logits
    subprocess.run([sys.executable, "-c", ELSEWHERE, *MIXTURES], check=True, cwd=tmp_path)
    logits = load_file(tmp_path / "logits.safetensors")
    assert all(torch.equal(logits[name], expected[name]) for name in MIXTURES)


def test_the_files_hold_projections_and_tied_weights_once(make: Make, tmp_path: Path) -> None:
    make(PerformerForMaskedLM).save_pretrained(tmp_path / "tied")
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    assert "performer.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights
    assert weights["performer.layers.0.attention.mechanism.features.projection"].shape == (256, 16)
    untied = make(PerformerForMaskedLM, tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "untied")
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path / "untied")
    assert torch.equal(loaded.lm_head.weight, untied.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def test_tied_weights_stay_tied_after_loading(make: Make, tmp_path: Path) -> None:
    make(PerformerForMaskedLM).save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_one_checkpoint_serves_every_head(make: Make, tmp_path: Path) -> None:
    model = make(PerformerForCausalLM)
    model.save_pretrained(tmp_path)
    ids = residues(1, 9)
    base = PerformerModel.from_pretrained(tmp_path, is_causal=True).eval()
    assert torch.equal(base(ids).last_hidden_state, model.performer(ids).last_hidden_state)
    classifier = PerformerForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.performer.norm.weight, model.performer.norm.weight)
    base.save_pretrained(tmp_path / "base")
    again = PerformerForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.performer.norm.weight, model.performer.norm.weight)


def test_projections_that_a_checkpoint_lacks_are_those_of_the_configurations_seed(make: Make, tmp_path: Path) -> None:
    model = make(PerformerForMaskedLM, seed=4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "mechanism" not in k}, file, metadata={"format": "pt"})
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_loaded_in_bfloat16_keeps_its_projections_exact(make: Make, tmp_path: Path) -> None:
    model = make(PerformerForMaskedLM)
    model.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        if "projection" in name:
            assert torch.equal(loaded.state_dict()[name], value)


def test_a_pickle_is_never_opened(make: Make, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    make(PerformerForMaskedLM).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"lm_head.bias": Payload()}, tmp_path / "pytorch_model.bin")
    for opener in (PerformerForMaskedLM, AutoModelForMaskedLM):
        for options in ({}, {"use_safetensors": False}):
            with pytest.raises(CheckpointError, match=r"pytorch_model.bin: a pickle can run code .* Convert it"):
                opener.from_pretrained(tmp_path, **options)
    assert not (tmp_path / "executed").exists()


def _header(tensors: dict[str, Any]) -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not safetensors at all",
        struct.pack("<Q", 2**62) + b"{}",
        _header({"lm_head.bias": {"dtype": "F32", "shape": [29], "data_offsets": [0, 2**60]}}) + bytes(116),
        _header({"lm_head.bias": {"dtype": "F32", "shape": [-29], "data_offsets": [0, 116]}}) + bytes(116),
        _header({"lm_head.bias": {"dtype": "F32", "shape": [30], "data_offsets": [0, 116]}}) + bytes(116),
        _header({name: {"dtype": "F32", "shape": [29], "data_offsets": [0, 116]} for name in "ab"}) + bytes(116),
    ],
    ids=["empty", "text", "header of 4 EB", "tensor of 1 EB", "negative shape", "shape and size differ", "overlap"],
)
def test_a_hostile_safetensors_file_is_refused(content: bytes, make: Make, tmp_path: Path) -> None:
    make(PerformerForMaskedLM).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="the weights are not a valid safetensors file"):
        PerformerForMaskedLM.from_pretrained(tmp_path)


def test_a_truncated_file_is_refused(make: Make, tmp_path: Path) -> None:
    make(PerformerForMaskedLM).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="the weights are not a valid safetensors file"):
        PerformerForMaskedLM.from_pretrained(tmp_path)
