"""Calibrated models on the disk: the same numbers whichever way they are opened, and errors in words where that cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import GO, build, hidden, inputs_of

import performers
from performers.conversion.saving import TENSORS
from performers.errors import CheckpointError, ConfigError, UnsupportedError

SEQUENCES = [[4, 9, 11, 5, 20, 6, 7, 13], [8, 4, 17, 21, 5, 9], [12, 13, 14, 15, 16, 5, 4]]


def calibrated(name: str = "BertModel", **arguments: Any) -> Any:
    arguments = {"kernel": "softmax-sharp", "num_features": 32, **arguments}
    return performers.convert(build(name, *GO[name]), "favor", sequences=SEQUENCES, **arguments)


@pytest.mark.parametrize("name", ["BertModel", "AlbertModel", "LlamaForCausalLM", "BartForConditionalGeneration"])
def test_a_calibrated_model_is_the_same_after_any_number_of_saves_from_either_kind_of_opening(
    name: str, tmp_path: Path
) -> None:
    model = calibrated(name)
    inputs = inputs_of(model)
    expected = hidden(model, inputs)
    stock = getattr(transformers, name)
    for turn in range(4):
        folder = tmp_path / str(turn)
        model.save_pretrained(folder)
        model = (
            stock.from_pretrained(folder, attn_implementation="favor").eval() if turn % 2 else performers.load(folder)
        )
        if turn != 1:  # one of them is saved before it was ever called
            assert torch.equal(hidden(model, inputs), expected)
    first, last = ((tmp_path / turn / TENSORS).read_bytes() for turn in "03")
    assert first == last


def test_calibration_changes_the_numbers_and_stays_out_of_the_weights(tmp_path: Path) -> None:
    model = calibrated()
    plain = performers.convert(build("BertModel", *GO["BertModel"]), "favor", kernel="softmax-sharp", num_features=32)
    inputs = inputs_of(model)
    assert not torch.allclose(hidden(model, inputs), hidden(plain, inputs), atol=1e-4)
    assert model.state_dict().keys() == build("BertModel", *GO["BertModel"]).state_dict().keys()
    model.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["performers"]["tensors"]) == 64
    _, info = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]


def test_without_a_calibration_there_is_no_second_file(tmp_path: Path) -> None:
    performers.convert(build("BertModel", *GO["BertModel"]), "favor").save_pretrained(tmp_path)
    assert not (tmp_path / TENSORS).exists()
    build("BertModel", *GO["BertModel"]).save_pretrained(tmp_path / "exact")
    assert sorted(path.name for path in (tmp_path / "exact").iterdir()) == ["config.json", "model.safetensors"]


def test_what_was_learned_in_a_mechanism_is_saved_too(tmp_path: Path) -> None:
    from performers.conversion.interface import mechanism_of
    from performers.conversion.wiring import attention_modules

    model = performers.convert(build("BertModel", *GO["BertModel"]), "favor", num_features=32)
    before = hidden(model, inputs_of(model))
    module = [module for module in model.modules() if mechanism_of(module) is not None][1]
    mechanism: Any = mechanism_of(module)
    mechanism.redraw_(torch.Generator().manual_seed(5))
    changed = hidden(model, inputs_of(model))
    assert not torch.allclose(before, changed, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = performers.load(tmp_path)
    assert torch.equal(hidden(again, inputs_of(model)), changed)
    assert len(attention_modules(again)) == 2


def test_a_missing_or_damaged_calibration_is_named_and_never_left_out(tmp_path: Path) -> None:
    model = calibrated()
    model.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / TENSORS).unlink()
    stock = transformers.BertModel.from_pretrained(tmp_path / "b", attn_implementation="favor").eval()
    for attempt in (lambda: performers.load(tmp_path / "b"), lambda: hidden(stock, inputs_of(stock))):
        with pytest.raises(
            CheckpointError, match=r"performers\.safetensors.*open the model's folder with performers\.load"
        ):
            attempt()
    with pytest.raises(CheckpointError, match="not opened from"):
        hidden(transformers.AutoModel.from_config(model.config, attn_implementation="favor").eval(), inputs_of(model))
    content = bytearray((tmp_path / "a" / TENSORS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "a" / TENSORS).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or another model's"):
        performers.load(tmp_path / "a")


def test_a_marker_of_another_version_is_refused(tmp_path: Path) -> None:
    model = calibrated()
    model.config.performers = {**model.config.performers, "shape": "round"}
    with pytest.raises(ConfigError, match="this version"):
        model.save_pretrained(tmp_path)


def test_pushing_while_saving_is_refused_because_files_would_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="push_to_hub"):
        calibrated().save_pretrained(tmp_path, push_to_hub=True)


def test_the_readme_says_what_the_folder_is_and_somebody_elses_readme_stays(tmp_path: Path) -> None:
    model = calibrated()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for words in ("BertModel", "kernel='softmax-sharp'", "performers.load(", 'attn_implementation="favor"', TENSORS):
        assert words in text
    performers.convert(model, "reformer").save_pretrained(tmp_path)
    assert "`reformer` attention" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# My model\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My model\n"


def test_without_performers_the_folder_gives_the_original_or_fails_as_its_readme_says(tmp_path: Path) -> None:
    model = build("BertModel", *GO["BertModel"])
    exact = hidden(model, inputs_of(model))
    performers.convert(model, "favor", kernel="softmax-sharp", sequences=SEQUENCES).save_pretrained(tmp_path / "model")
    torch.save((inputs_of(model), exact), tmp_path / "expected.pt")
    code = f"""
import sys, torch, transformers
assert "performers" not in sys.modules
inputs, exact = torch.load({str(tmp_path / "expected.pt")!r})
model = transformers.AutoModel.from_pretrained({str(tmp_path / "model")!r}).eval()
torch.testing.assert_close(model(**inputs)[0][inputs["attention_mask"].bool()], exact, atol=1e-5, rtol=1e-4)
try:
    transformers.AutoModel.from_pretrained({str(tmp_path / "model")!r}, attn_implementation="favor")
except ValueError as error:
    assert "favor" in str(error)
else:
    raise AssertionError("it was opened")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_converting_back_forgets_everything(tmp_path: Path) -> None:
    model = calibrated()
    inputs = inputs_of(model)
    exact = hidden(build("BertModel", *GO["BertModel"]), inputs)
    torch.testing.assert_close(hidden(performers.convert(model, "exact"), inputs), exact, atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "performers" not in json.loads((tmp_path / "config.json").read_text())
