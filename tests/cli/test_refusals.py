"""What a user can get wrong on the command line: one line on stderr, the right status, and nothing already done is lost."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from performers import PerformerConfig, PerformerForMaskedLM
from performers.errors import RunError
from performers.training import PretrainConfig, loop, open_model, pretrain

Run = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_model_that_brings_code_is_refused_without_a_question(run: Run, fasta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    PerformerForMaskedLM(PerformerConfig.preset("tiny", num_hidden_layers=1)).save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForMaskedLM": "evil.EvilForMaskedLM"}
    evil = {"model_type": "evil", "architectures": ["EvilForMaskedLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(evil))
    refused(run("evaluate", "--model", folder, "-i", fasta, "--json"), "type 'evil'", "expected a Performer")
    assert not (tmp_path / "ran").exists()


def test_another_familys_model_is_refused(run: Run, fasta: Path, small: list[str], tmp_path: Path) -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    refused(run("evaluate", "--model", tmp_path / "bert", "-i", fasta), "'bert'")
    refused(run("pretrain", "-i", fasta, "-o", tmp_path / "run", "--init-from", tmp_path / "bert"), "'bert'")


def test_a_split_leaves_a_folder_in_use_as_it_was_and_takes_an_empty_one(run: Run, fasta: Path, tmp_path: Path) -> None:
    used, empty = tmp_path / "used", tmp_path / "empty"
    used.mkdir()
    empty.mkdir()
    (used / "run.json").write_text('{"command": "pretrain"}')
    options = ["-i", fasta, "--by", "random", "--no-nearest"]
    refused(run("split", *options, "-o", used), "already in use")
    assert [file.name for file in used.iterdir()] == ["run.json"]
    assert (used / "run.json").read_text() == '{"command": "pretrain"}'
    refused(run("split", *options, "-o", fasta), "already in use")
    refused(run("split", *options, "-o", "/dev/null/x"), "/dev/null")
    assert run("split", *options, "-o", empty)[0] == 0
    assert json.loads((empty / "run.json").read_text())["command"] == "split"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--architecture", "hidden_size=[1"], "hidden_size=[1"),
        (["--architecture", "vocab_size=10"], "vocab_size=10"),
        (["--device", "meta"], "meta"),
        (["--threads", "99999999999"], "threads"),
        (["--context", "100000000000000000000"], "context"),
        (["--resume-from", "step-00000004"], "holds no run"),
    ],
)
def test_a_wrong_value_is_named(run: Run, fasta: Path, tmp_path: Path, options: list[str], words: str) -> None:
    refused(run("pretrain", "-i", fasta, "-o", tmp_path / "run", "--preset", "tiny", *options), words)


def test_fractions_that_are_no_numbers_are_refused(run: Run, fasta: Path, tmp_path: Path) -> None:
    options = ["--by", "random", "--no-nearest", "--fractions", "0.5,nan,0.5"]
    refused(run("split", "-i", fasta, "-o", tmp_path / "sets", *options), "fractions")


def test_the_options_of_a_refused_attempt_do_not_stick(run: Run, fasta: Path, small: list[str], tmp_path: Path) -> None:
    output = ["-i", fasta, "-o", tmp_path / "run"]
    refused(run("pretrain", *output, *small, "--kernel", "nope"), "kernel='nope'")
    assert run("pretrain", *output, *small)[0] == 0


def test_a_file_that_was_mended_after_a_failed_start_is_read_again(
    run: Run, fasta: Path, small: list[str], tmp_path: Path
) -> None:
    proteins = tmp_path / "mine.fasta"
    proteins.write_text(fasta.read_text())
    output = ["pretrain", "-i", proteins, "-o", tmp_path / "run", *small]
    refused(run(*output, "--device", "cuda" if not torch.cuda.is_available() else "mps"), "device")
    proteins.write_text("".join(fasta.read_text().splitlines(keepends=True)[:20]))
    status, _, err = run(*output)
    assert status == 0
    assert " 10 proteins" in err


def test_half_precision_weights_are_trained_in_float32_and_recorded(fasta: Path, tmp_path: Path) -> None:
    model = PerformerForMaskedLM(PerformerConfig.preset("tiny", hidden_size=16, num_hidden_layers=1))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    values = {"input": str(fasta), "output": str(tmp_path / "run"), "context": 64, "steps": 1, "batch_size": 2}
    result = pretrain(PretrainConfig.parse({**values, "init_from": str(tmp_path / "half")}))
    trained = open_model(result.model)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert json.loads((result.model / "config.json").read_text())["dtype"] == "float32"
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    assert any("half" in file["name"] and len(file["sha256"]) == 64 for file in inputs)


def test_a_step_that_does_not_fit_into_memory_is_explained(fasta: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    command = [sys.executable, "-m", "performers", "pretrain", "-i", str(fasta), "-o", str(tmp_path / "run")]
    options = ["--preset", "tiny", "--context", "4000000", "--batch-size", "8", "--steps", "2", "--device", "cpu"]
    done = subprocess.run([*command, *options], preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "does not fit into memory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_compiler_is_explained(tmp_path: Path) -> None:
    class CppCompileError(RuntimeError):
        __module__ = "torch._inductor.exc"

    with pytest.raises(RunError, match="C\\+\\+ compiler"), loop._explained(3, None):
        raise CppCompileError("no compiler\nmany lines")
    with pytest.raises(RuntimeError, match="something else"), loop._explained(3, None):
        raise RuntimeError("something else")
