import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from performers.training import PretrainConfig

Run = Callable[..., tuple[int, str, str]]


def test_pretrain_then_evaluate_prints_the_figures_beside_the_baseline(
    run: Run, fasta: Path, small: list[str], tmp_path: Path
) -> None:
    status, out, err = run("pretrain", "-i", fasta, "-o", tmp_path / "run", *small)
    assert status == 0
    assert str(tmp_path / "run" / "model") in out
    assert "step 4/4" in err
    status, out, _ = run("evaluate", "--model", tmp_path / "run" / "model", "-i", fasta)
    assert status == 0
    assert "unigram" in out
    assert "scheme mask" in out


def test_json_output_is_the_figures_alone(run: Run, fasta: Path, small: list[str], tmp_path: Path) -> None:
    status, out, _ = run("pretrain", "-i", fasta, "-o", tmp_path / "run", "--json", "--objective", "clm", *small)
    assert status == 0
    assert json.loads(out)["steps"] == 4
    status, out, _ = run("evaluate", "--model", tmp_path / "run", "-i", fasta, "--json", "--seed", 5)
    figures = json.loads(out)
    assert status == 0
    assert {"accuracy", "perplexity", "tokens", "baseline_accuracy", "baseline_perplexity"} <= set(figures)
    assert 0 <= figures["accuracy"] <= 1
    assert figures["objective"] == "clm"
    assert figures["inputs"][0]["name"] == str(fasta)
    assert len(figures["weights"][0]["sha256"]) == 64


def test_the_same_command_goes_on_and_the_output_folder_alone_is_enough(
    run: Run, fasta: Path, small: list[str], tmp_path: Path
) -> None:
    assert run("pretrain", "-i", fasta, "-o", tmp_path / "run", *small)[0] == 0
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert run("pretrain", "-o", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    assert run("pretrain", "-i", fasta, "-o", tmp_path / "run", *small, "--no-resume")[0] == 2
    status, _, err = run("pretrain", "-o", tmp_path / "run", "--learning-rate", "0.1")
    assert status == 2
    assert "learning_rate=0.1 (the run has 0.001)" in err


def test_a_yaml_file_holds_the_same_keys_and_options_override_it(
    run: Run, fasta: Path, small: list[str], tmp_path: Path
) -> None:
    values = {
        "input": str(fasta),
        "preset": "tiny",
        "architecture": {"hidden_size": 16, "num_hidden_layers": 1},
        "num_features": 8,
        "context": 64,
        "batch_size": 4,
        "steps": 99,
        "threads": 1,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = ("pretrain", "--config", tmp_path / "config.yaml", "-o", tmp_path / "a", "--steps", "4", "--json")
    from_yaml = json.loads(run(*command)[1])
    from_options = json.loads(run("pretrain", "-i", fasta, "-o", tmp_path / "b", "--json", *small)[1])
    assert from_yaml["loss"] == from_options["loss"]


def test_every_key_of_the_configuration_is_an_option(run: Run) -> None:
    out = run("pretrain", "--help")[1]
    for key in PretrainConfig.model_fields:
        assert f"--{key.replace('_', '-')}" in out


def test_split_writes_sets_and_a_record(run: Run, fasta: Path, tmp_path: Path) -> None:
    options = ("--by", "random", "--no-nearest", "--fractions", "0.8,0.1,0.1", "--gzip", "--json")
    status, out, _ = run("split", "-i", fasta, "-o", tmp_path / "sets", *options)
    assert status == 0
    assert json.loads(out)["counts"]["train"] == 24
    assert gzip.decompress((tmp_path / "sets" / "train.fasta.gz").read_bytes()).startswith(b">")
    record = json.loads((tmp_path / "sets" / "run.json").read_text())
    assert record["command"] == "split"
    assert record["inputs"][0]["name"] == str(fasta)
    assert (tmp_path / "sets" / "cite.bibtex").exists()
    status, _, err = run("split", "-i", fasta, "-o", tmp_path / "sets", *options)
    assert status == 2
    assert "in use" in err
    assert run("split", "-i", fasta, "-o", tmp_path / "x", "--fractions", "0.8")[0] == 2


def test_benchmark_training_measures_each_mechanism_in_a_process_of_its_own(run: Run, tmp_path: Path) -> None:
    options = ("--preset", "tiny", "--context", "128", "--steps", "1", "--threads", "1", "--json")
    own = tmp_path / "own.yaml"
    sizes = "{hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1, attention_kwargs: {window: 4}}"
    own.write_text(f"preset: tiny\nattention: [local]\narchitecture: {sizes}\n")
    status, out, err = run("benchmark", "training", "--config", own, "--attention", "exact", *options)
    assert status == 0, err
    local, exact = json.loads(out)
    assert (local["attention"], exact["attention"]) == ("local", "exact")
    assert local["parameters"] == exact["parameters"] < 40_000  # the size of the recipe, not that of the preset
    for figures in (local, exact):
        assert figures["tokens_per_second"] > 0
        assert figures["peak_bytes"] > 50 * 2**20
    own.write_text(
        "preset: tiny\nkernel: elu\nnum_features: 8\narchitecture: {hidden_size: 32, num_hidden_layers: 1}\n"
    )
    status, out, err = run("benchmark", "training", "--config", own, "--attention", "favor", *options)
    assert status == 0, err
    default, favor = json.loads(out)
    assert (default["attention"], favor["attention"]) == ("split", "favor")
    status, _, err = run("benchmark", "training", "--attention", "psychic", *options)
    assert status == 2
    assert "psychic" in err


BAD = {
    "missing file": None,
    "empty file": b"",
    "no header": b"MKTAYIAK\n",
    "not FASTA": b"%PDF-1.4 \x00\x01\x02",
    "truncated gzip": gzip.compress(b">a\nMKT\n" * 100)[:-20],
    "digit": b">a\nMK1T\n",
    "empty record": b">a\n>b\nMKT\n",
}


@pytest.mark.parametrize("command", ["pretrain", "evaluate", "split"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_status_2_and_one_line_that_names_the_file(
    command: str, kind: str, run: Run, tmp_path: Path, small: list[str]
) -> None:
    content = BAD[kind]
    path = tmp_path / "proteins.fasta"
    if content is not None:
        path.write_bytes(content)
    options = {
        "pretrain": ["-o", str(tmp_path / "out"), *small],
        "evaluate": ["--model", str(tmp_path / "model")],
        "split": ["-o", str(tmp_path / "out"), "--by", "random", "--no-nearest"],
    }
    status, out, err = run(command, "-i", path, *options[command])
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("performers: ")
    assert "proteins.fasta" in err
    if kind == "missing file":
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["pretrain", "--steps", "many"], "--steps"),
        (["pretrain", "--unknown", "1"], "--unknown"),
        (["pretrain", "-o", "x"], "input is missing"),
        (["dance"], "dance"),
        (["pretrain", "-i", "bundled:test", "-o", "x", "--architecture", "hidden_size"], "KEY=VALUE"),
        (["pretrain", "--config", "none.yaml"], "none.yaml"),
        (["pretrain", "-i", "bundled:nowhere", "-o", "x"], "nowhere"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_status_2_and_one_line(
    arguments: list[str], word: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert word in err


def test_a_model_that_is_not_there_is_status_2(run: Run, fasta: Path, tmp_path: Path) -> None:
    status, _, err = run("evaluate", "--model", tmp_path, "-i", fasta)
    assert status == 2
    assert "expected a model folder" in err


def test_debug_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    from performers.cli import main
    from performers.errors import InputError

    monkeypatch.setattr(sys, "argv", ["performers", "--debug", "pretrain", "-i", "none.fasta", "-o", "none"])
    with pytest.raises(InputError):
        main()


def test_duplicate_headers_are_kept_and_reported(run: Run, tmp_path: Path, small: list[str]) -> None:
    path = tmp_path / "twins.fasta"
    path.write_text(">a\nMKTAYIAKQR\n>a\nMSKGEELFTG\n")
    status, _, err = run("pretrain", "-i", path, "-o", tmp_path / "run", *small)
    assert status == 0
    assert "2 proteins" in err
    assert "identifier of an earlier record" in err


def test_a_record_over_max_length_is_refused_not_cut(run: Run, fasta: Path, tmp_path: Path, small: list[str]) -> None:
    status, _, err = run("pretrain", "-i", fasta, "-o", tmp_path / "run", "--max-length", "20", *small)
    assert status == 2
    assert "20" in err


def test_help_is_quick_and_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nsys.argv = ['performers', {}'--help']\nfrom performers.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)\n"
    )
    for command in ("", "'pretrain', ", "'evaluate', ", "'benchmark', 'training', "):
        finished = subprocess.run(
            [sys.executable, "-c", code.format(command)], capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
        assert "Usage" in finished.stdout


def test_a_small_file_that_expands_to_a_huge_record_is_refused_in_little_memory(tmp_path: Path) -> None:
    # A gigabyte of one residue, a gzip member per ten megabytes.
    bomb = tmp_path / "bomb.fasta.gz"
    bomb.write_bytes(gzip.compress(b">bomb\n") + 100 * gzip.compress(b"A" * 10_000_000, mtime=0))
    assert bomb.stat().st_size < 2**20 * 1.2
    code = (
        "import sys\n"
        "from performers.memory import peak_memory\n"
        "from performers.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules, peak_memory())\n"
    )
    arguments = ["pretrain", "-i", str(bomb), "-o", str(tmp_path / "run")]
    finished = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    torch_loaded, peak = finished.stdout.split()
    assert finished.returncode == 2
    assert torch_loaded == "False"
    assert int(peak) < 400 * 2**20
    assert "max-length" in finished.stderr
