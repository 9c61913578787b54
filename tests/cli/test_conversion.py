"""`performers convert` and `calibrate` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import EsmConfig, EsmForMaskedLM

import performers
from performers.conversion.calibration import summary
from performers.data import read_fasta

Run = Callable[..., tuple[int, str, str]]

TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ESM with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "esm"
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
    )
    EsmForMaskedLM(config).save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(TOKENS))
    transformers.EsmTokenizer(str(folder / "words.txt")).save_pretrained(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_convert_writes_a_folder_that_opens_with_its_tokenizer_and_says_how_it_was_made(
    run: Run, esm: Path, fasta: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, stdout, err = run(
        "convert", esm, "-o", out, "--num-features", "16", "-i", fasta, "--sequences", "6", "--threads", 1
    )
    assert status == 0, err
    assert "EsmForMaskedLM with favor attention in all layers" in stdout
    assert "the first 6 sequences" in err
    kept = {
        "config.json",
        "model.safetensors",
        "performers.safetensors",
        "README.md",
        "run.json",
        "cite.bibtex",
        "vocab.txt",
    }
    assert kept <= files(out)
    record = json.loads((out / "run.json").read_text())
    assert record["command"] == "convert"
    assert record["arguments"]["num_features"] == 16
    assert record["inputs"][0]["name"] == str(fasta)
    assert record["weights"][0]["sha256"]
    model = performers.load(out)
    assert type(model) is EsmForMaskedLM
    assert model.config.performers["arguments"] == {"kernel": "softmax-prototypes", "num_features": 16}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert model(**tokenizer("MKTAYIAK", return_tensors="pt")).logits.shape == (1, 10, 33)


def test_convert_chooses_layers_by_measuring_and_prints_json_alone(
    run: Run, esm: Path, fasta: Path, tmp_path: Path
) -> None:
    options = ["-i", fasta, "--layers", "auto:0.9", "--sequences", "6", "--threads", 1, "--json"]
    status, stdout, err = run("convert", esm, "-o", tmp_path / "out", *options)
    assert status == 0, err
    figures = json.loads(stdout)
    assert figures["measured"]["error"] <= 0.9
    assert len(figures["measured"]["alone"]) == 2
    assert performers.load(tmp_path / "out").config.performers["layers"] == figures["layers"]
    status, stdout, _ = run("convert", esm, "-o", tmp_path / "last", "--layers", "-1", "--attention", "sparse")
    assert status == 0
    assert "sparse attention in layers [1]" in stdout


def test_convert_puts_a_model_s_own_attention_back(run: Run, esm: Path, tmp_path: Path) -> None:
    assert run("convert", esm, "-o", tmp_path / "linear")[0] == 0
    status, stdout, err = run("convert", tmp_path / "linear", "-o", tmp_path / "back", "--attention", "exact")
    assert status == 0, err
    assert "exact attention in all layers" in stdout
    assert not {"performers.safetensors", "README.md"} & files(tmp_path / "back")
    ids = torch.arange(4, 20)[None]
    torch.testing.assert_close(
        performers.load(tmp_path / "back")(ids).logits, EsmForMaskedLM.from_pretrained(esm).eval()(ids).logits
    )
    status, _, err = run("convert", esm, "-o", tmp_path / "x", "--attention", "exact", "--layers", "0")
    assert (status, "no --layers" in err) == (2, True)


def test_calibrate_writes_the_model_and_a_report_as_table_json_and_picture(run: Run, esm: Path, tmp_path: Path) -> None:
    proteins = tmp_path / "proteins.txt"
    records = [record.sequence for record in read_fasta("bundled:test") if len(record.sequence) <= 120][:5]
    proteins.write_text("\n".join(records) + "\n\n")
    options = ["-i", proteins, "-o", tmp_path / "out", "--num-features", "16", "--length", "32,64", "--threads", 1]
    status, stdout, err = run("calibrate", esm, *options)
    assert status == 0, err
    for words in ("Relative error of attention outputs", "logits", "times faster", "judged on 2 sequences"):
        assert words in stdout
    assert "fitting features" in err
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert len(report["lengths"]) == 2
    assert all(sentence in stdout for sentence in summary(report))
    assert [entry["layer"] for entry in report["layers"]] == [0, 1]
    assert (tmp_path / "out" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"] == "calibrate"
    model = performers.load(tmp_path / "out")
    assert set(model.config.performers["by_layer"]) == {"0", "1"}


def test_bad_input_is_one_line_and_leaves_nothing_behind(run: Run, esm: Path, fasta: Path, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "words.txt").write_text("123 456\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x01")
    out = tmp_path / "out"
    for command, words in (
        (["convert", tmp_path / "nowhere", "-o", out], "there is no model in this folder"),
        (["convert", esm, "-o", used], "already in use"),
        (["convert", esm, "-o", out, "--kernel", "sofmax"], "kernel='sofmax'"),
        (["convert", esm, "-o", out, "--layers", "two"], "--layers two: expected numbers"),
        (["convert", esm, "-o", out, "--layers", "7"], "7 is not the number"),
        (["convert", esm, "-o", out, "--layers", "auto:0.05"], "give some sequences"),
        (["convert", esm, "-o", out, "--attention", "sparse", "--kernel", "relu"], "are of favor"),
        (["convert", esm, "-o", out, "--architecture", "EsmForNothing"], "architecture='EsmForNothing'"),
        (["convert", esm, "-o", out, "-i", tmp_path / "missing.fasta"], "missing.fasta"),
        (["convert", esm, "-o", out, "-i", tmp_path / "empty.txt"], "there is no sequence in it"),
        (["convert", esm, "-o", out, "-i", tmp_path / "bytes.txt"], "bytes.txt cannot be read"),
        (["calibrate", esm, "-o", out, "-i", tmp_path / "words.txt"], "does not know most of it"),
        (["calibrate", esm, "-o", out, "-i", fasta, "--length", "0"], "length 0"),
        (["calibrate", esm, "-o", out, "-i", fasta, "--choices", "many"], "--choices many: expected numbers"),
    ):
        status, stdout, err = run(*command)
        assert status == 2, (command, err)
        assert stdout == ""
        assert words in err.splitlines()[-1]
        assert "Traceback" not in err
        assert not out.exists()
    assert files(used) == {"file"}


def test_the_benchmark_of_conversion_prints_tables_or_json_alone_and_goes_on(
    run: Run, esm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from performers.benchmarks import conversion, experiment

    package = conversion.PACKAGES["esm2"]._replace(architecture="EsmForMaskedLM")
    monkeypatch.setitem(conversion.PACKAGES, "esm2", package)
    monkeypatch.setattr(conversion, "fetch", lambda package, cache: esm)
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")
    command = ["benchmark", "conversion", "--quick", "--model", "esm2,antiberty", "--part", "quality,speed"]
    command += ["--kernel", "softmax-sharp", "--num-features", "8", "--length", "32", "--threads", 1]
    command += ["-o", tmp_path / "report", "--device", "cpu"]
    status, stdout, err = run(*command)
    assert status == 0, err
    for words in ("softmax-sharp", "contacts P@L", "times faster", "antiberty is left out"):
        assert words in stdout
    status, stdout, err = run(*command, "--json")
    assert status == 0
    assert [cell["what"] for cell in json.loads(stdout)["cells"]] == ["quality", "quality", "speed"]
    assert "3 of 3 cells were measured before" in err
    for options, words in (
        (["--part", "all"], "--part all: expected some of quality, layers, speed, distillation"),
        (["--antibodies", tmp_path / "none.tsv"], "there is no such file"),
        (["--steps", "10", "--evaluate-every", "4"], "expected a divisor of --steps, 10"),
    ):
        status, stdout, err = run("benchmark", "conversion", *options, "-o", tmp_path / "other")
        assert (status, stdout) == (2, ""), err
        assert words in err.splitlines()[-1]
