"""`performers distil` as a user runs it: killed and started again, its tables, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import performers
from performers.conversion.distillation import DistilConfig
from performers.folders import sha256_of

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = performers.PerformerTokenizer(add_eos=True)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        attention_probs_dropout_prob=0.0,
    )
    folder = tmp_path_factory.mktemp("model") / "converted"
    model = performers.convert(transformers.BertForMaskedLM(config), "favor", num_features=16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def command(converted: Path, fasta: Path) -> list[object]:
    return ["distil", converted, "-i", fasta, "--batch-size", 2, "--threads", 1, "--device", "cpu"]


def test_the_table_shows_what_was_recovered_against_steps(run: Run, command: list[object], tmp_path: Path) -> None:
    status, out, err = run(*command, "-o", tmp_path / "run", "--stages", "layers:2,end:2", "--evaluate-every", 2)
    assert status == 0, err
    assert "recovered above the floor" in out
    assert "held out" in out
    assert str(tmp_path / "run" / "model") in out
    assert "step 4/4" in err


def test_json_is_the_figures_alone_and_the_folder_is_enough_to_go_on(
    run: Run, command: list[object], converted: Path, tmp_path: Path
) -> None:
    status, out, _ = run(*command, "-o", tmp_path / "run", "--stages", "end:2", "--json")
    assert status == 0
    figures = json.loads(out)
    assert figures["steps"] == 2
    assert [entry["step"] for entry in figures["measured"]] == [0, 1, 2]
    assert run("distil", "-o", tmp_path / "run", "--json")[1] == out
    status, _, err = run("distil", converted, "-o", tmp_path / "run", "--learning-rate", "0.1")
    assert status == 2
    assert "learning_rate=0.1 (the run has 2e-05)" in err


def test_a_distillation_that_is_killed_ends_bit_identical(run: Run, command: list[object], tmp_path: Path) -> None:
    options = ["--stages", "layers:40,end:40", "--checkpoint-every", 7, "--evaluate-every", 20]
    assert run(*command, "-o", tmp_path / "whole", *options)[0] == 0
    launcher = [sys.executable, "-m", "performers", *map(str, [*command, "-o", tmp_path / "killed", *options])]
    log = tmp_path / "killed" / "log.jsonl"
    for lines, number in ((12, signal.SIGKILL), (50, signal.SIGTERM)):
        process = subprocess.Popen(launcher, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        os.kill(process.pid, number)
        assert process.wait() in (-signal.SIGKILL, 143)
    assert run(*command, "-o", tmp_path / "killed", *options)[0] == 0
    assert log.read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    weights = [sha256_of(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(run: Run, command: list[object], tmp_path: Path) -> None:
    options = ["--stages", "layers:3,end:3", "--evaluate-every", 3]
    assert run(*command, "-o", tmp_path / "one", *options)[0] == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "performers"]
    line = [*launcher, *map(str, [*command, "-o", tmp_path / "two", *options])]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert two["step"] == one["step"]
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_every_key_of_the_configuration_is_an_option(run: Run) -> None:
    out = run("distil", "--help")[1]
    for key in DistilConfig.model_fields:
        assert key == "model" or f"--{key.replace('_', '-')}" in out


def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    run: Run, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    status, out, err = run(*command, "-o", tmp_path / "run", "--lora", 4)
    assert (status, out) == (2, "")
    assert err == "performers: peft is needed for --lora: pip install 'performers[peft]'\n"


def test_what_is_no_converted_model_is_refused(run: Run, fasta: Path, tmp_path: Path) -> None:
    status, _, err = run("distil", tmp_path, "-i", fasta, "-o", tmp_path / "run")
    assert status == 2
    assert err.count("\n") == 1
    assert "expected the folder of a model" in err
