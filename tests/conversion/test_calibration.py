"""Calibration: kernels, features and layers chosen by measurement, and the report that says what came of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import GO, build, hidden, inputs_of

import performers
from performers.conversion.calibration import SOFTMAX_KERNELS, allocate, draw, pays_from, summary, tables
from performers.conversion.measurement import batch_of, longest_input, outcome, relative_error
from performers.errors import InputError


def sequences(number: int = 6, length: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 24, (length - i,), generator=generator).tolist() for i in range(number)]


def error_of(model: Any, exact: Any, batch: dict[str, torch.Tensor]) -> float:
    out, target = (m(**batch, output_hidden_states=True).hidden_states[-1] for m in (model, exact))
    return relative_error(out, target, batch["attention_mask"].bool())


@pytest.mark.parametrize("name", ["BertModel", "AlbertModel", "LlamaForCausalLM", "BartForConditionalGeneration"])
def test_the_report_holds_errors_by_depth_and_what_was_chosen(name: str) -> None:
    model = build(name, *GO[name])
    found = performers.calibrate(model, sequences(), num_features=32, lengths=(8, 16))
    report = json.loads(json.dumps(found.report))
    assert found.model is model
    layers = report["layers"]
    assert len(layers) == {"AlbertModel": 1, "BartForConditionalGeneration": 6}.get(name, 2)
    for entry in layers:
        assert entry["kernel"] in SOFTMAX_KERNELS
        best = min(errors[str(entry["size"])] for errors in entry["candidates"].values())
        assert entry["error_alone"] == best > 0
        assert entry["error_within"] > 0
    assert sum(entry["size"] for entry in layers) <= 32 * len(layers)
    assert len(report["hidden"]) == {"BartForConditionalGeneration": 6}.get(name, 3)
    assert report["hidden"][0] == 0
    assert [row["converted"] for row in report["up_to"]] == list(range(1, len(layers) + 1))
    assert report["up_to"][-1]["hidden"] == pytest.approx(report["hidden"][-1])
    assert report["up_to"][-1]["logits"] == report["logits"]
    assert (report["logits"] is None) == (name in ("BertModel", "AlbertModel"))
    assert [cost["length"] for cost in report["lengths"]] == [8, 16]
    assert report["judged_on"] == {"sequences": 3, "tokens": 63, "held_out": True}


def test_a_calibrated_model_is_closer_to_the_original_than_one_that_is_not_and_is_saved_so(tmp_path: Path) -> None:
    model, exact = (build("BertModel", *GO["BertModel"]) for _ in range(2))
    plain = performers.convert(build("BertModel", *GO["BertModel"]), "favor", num_features=32)
    others = batch_of(exact, [torch.tensor(ids) for ids in sequences(12)[6:]])
    found = performers.calibrate(model, sequences(), num_features=32)
    with torch.no_grad():
        assert error_of(model, exact, others) < error_of(plain, exact, others)
    model.save_pretrained(tmp_path)
    again = performers.load(tmp_path)
    assert torch.equal(hidden(again, inputs_of(model)), hidden(model, inputs_of(model)))
    assert again.config.performers["by_layer"] == {
        str(entry["layer"]): {"kernel": entry["kernel"], "num_features": entry["num_features"]}
        for entry in found.report["layers"]
    }


def test_the_reported_error_is_that_of_the_model_that_comes_back() -> None:
    model, exact = (build("BertModel", *GO["BertModel"]) for _ in range(2))
    report = performers.calibrate(model, sequences(), num_features=32, kernels=["softmax"], choices=[16, 32]).report
    judged = batch_of(exact, [torch.tensor(ids) for ids in sequences()[1::2]])
    with torch.no_grad():
        assert error_of(model, exact, judged) == pytest.approx(report["hidden"][-1], rel=1e-3)
    assert {entry["kernel"] for entry in report["layers"]} == {"softmax"}


def test_one_sequence_is_fitted_to_and_judged_on_and_the_report_says_so() -> None:
    report = performers.calibrate(build("BertModel", *GO["BertModel"]), sequences(1), num_features=16).report
    assert not report["judged_on"]["held_out"]
    assert "also what was fitted to" in summary(report)[0]


def test_layers_join_by_sensitivity_as_long_as_the_joint_error_stays_under_the_bound() -> None:
    settings = {"kernel": "softmax", "num_features": 64, "sequences": sequences()}
    free = performers.convert(build("BertModel", *GO["BertModel"]), layers="auto:100", **settings)
    measured = free.config.performers["measured"]
    assert free.config.performers["layers"] == [0, 1]
    easiest = min((0, 1), key=measured["alone"].__getitem__)
    bound = (measured["alone"][easiest] + measured["error"]) / 2
    model = performers.convert(build("BertModel", *GO["BertModel"]), layers=f"auto:{bound}", **settings)
    assert model.config.performers["layers"] == [easiest]
    assert model.config.performers["measured"]["error"] == measured["alone"][easiest] <= bound
    exact = build("BertModel", *GO["BertModel"])
    judged = batch_of(exact, [torch.tensor(ids) for ids in sequences()[1::2]])
    with torch.no_grad():
        assert error_of(model, exact, judged) == pytest.approx(measured["alone"][easiest], rel=1e-3)
    report = performers.calibrate(
        build("BertModel", *GO["BertModel"]), sequences(), num_features=64, layers=f"auto:{bound}"
    ).report
    assert report["measured"]["error"] <= bound
    assert report["hidden"][-1] == pytest.approx(report["measured"]["error"])


def test_a_bound_that_no_layer_meets_leaves_the_model_exact_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build("BertModel", *GO["BertModel"])
    exact = hidden(model, inputs_of(model))
    performers.convert(model, layers="auto:1e-9", sequences=sequences(), num_features=16)
    assert "no layer can be converted with an error under 1e-09" in caplog.text
    torch.testing.assert_close(hidden(model, inputs_of(model)), exact, atol=1e-5, rtol=1e-4)


def test_features_go_where_they_take_most_of_the_error_away() -> None:
    errors = {0: {8: 0.1, 16: 0.09, 32: 0.08}, 1: {8: 1.0, 16: 0.9, 32: 0.2}, 2: {8: 0.5, 16: 0.5, 32: 0.6}}
    assert allocate(errors, 16) == {0: 8, 1: 32, 2: 8}
    assert allocate(errors, 8) == {0: 8, 1: 8, 2: 8}
    assert allocate(errors, 1000) == {0: 32, 1: 32, 2: 8}


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [([0.5, 2.0], 2000), ([0.5, 0.9], None), ([1.5, 3.0], 1000), ([2.0, 0.5], None), ([], None)],
)
def test_the_length_from_which_conversion_pays_is_read_off_the_measured_ones(
    speedups: list[float], expected: int | None
) -> None:
    costs = [{"length": length, "speedup": s} for length, s in zip((1000, 4000), speedups, strict=False)]
    assert pays_from(costs) == expected


def test_the_tables_and_the_picture_hold_the_report(tmp_path: Path) -> None:
    found = performers.calibrate(
        build("GPT2LMHeadModel", *GO["GPT2LMHeadModel"]), sequences(), num_features=16, layers=[0], lengths=(16, 32)
    )
    texts = " ".join(" ".join(row) for _, _, rows in tables(found.report) for row in rows)
    assert f"{found.report['layers'][0]['error_alone']:.3f}" in texts
    assert any(
        "tokens on" in sentence or "not faster" in sentence or "shortest" in sentence
        for sentence in summary(found.report)
    )
    draw(found.report, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertModel", 512),
        ("RobertaModel", 510),
        ("GPT2LMHeadModel", 64),
        ("OPTForCausalLM", 2048),
        ("BioGptForCausalLM", 1024),
        ("BartForConditionalGeneration", 1024),
        ("EsmModel", None),
        ("LlamaForCausalLM", None),
    ],
)
def test_how_long_an_input_may_be_is_known_of_learned_positions_and_rotary_ones_go_on(
    name: str, expected: int | None
) -> None:
    assert longest_input(build(name, *GO[name])) == expected


def test_sequences_longer_than_the_models_configuration_says_are_read_where_positions_are_rotary() -> None:
    config, settings = GO["EsmModel"]
    model = build("EsmModel", config, {**settings, "max_position_embeddings": 16})
    report = performers.calibrate(model, sequences(2, 40), num_features=16, lengths=(64,)).report
    assert report["tokens"] == 79


def test_lengths_and_sequences_beyond_learned_positions_are_refused() -> None:
    model = build("GPT2LMHeadModel", *GO["GPT2LMHeadModel"])
    with pytest.raises(InputError, match="65 tokens, but GPT2LMHeadModel has learned 64 positions"):
        performers.calibrate(model, [[5] * 65])
    with pytest.raises(InputError, match=r"length 100: expected 1 to 64 tokens"):
        performers.calibrate(model, sequences(), lengths=(32, 100))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernels": ["sofmax"]}, "kernel='sofmax'"),
        ({"kernels": []}, "kernels is empty"),
        ({"num_features": 1}, "num_features=1"),
        ({"choices": [512]}, r"one of them within num_features=256"),
        ({"layers": [9]}, "9 is not the number"),
        ({"layers": "auto:-1"}, "'auto:' and an error"),
        ({"projection": "diagonal"}, "projection='diagonal'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        performers.calibrate(build("BertModel", *GO["BertModel"]), sequences(), **arguments)


def test_strings_are_read_with_the_folders_tokenizer_and_residues_are_set_apart_where_it_needs_that(
    tmp_path: Path,
) -> None:
    model = build("BertModel", *GO["BertModel"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    report = performers.calibrate(tmp_path, ["ACDEFG", "MNPQ"], num_features=16).report
    assert report["tokens"] == 6 + 4 + 4
    assert report["opened_from"] == str(tmp_path)
    with pytest.raises(InputError, match="sequence 2: the model's tokenizer does not know most of it"):
        performers.calibrate(tmp_path, ["ACDEFG", "xyz"], num_features=16)


def test_outcomes_of_the_same_model_do_not_differ() -> None:
    model = performers.convert(build("BertModel", *GO["BertModel"]), layers=[])
    batch = batch_of(model, [torch.tensor(ids) for ids in sequences()])
    first, second = (outcome(model, batch) for _ in range(2))
    assert relative_error(first.hidden[-1], second.hidden[-1], first.real) == 0
    assert logging.getLogger("performers").level == logging.NOTSET
