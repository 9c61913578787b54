"""Two processes under torchrun take the steps that one process takes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from victims import as_options, outcome

from performers.errors import ConfigError
from performers.training import PretrainResult

Train = Callable[..., PretrainResult]


def torchrun(values: dict[str, Any], processes: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    finished = subprocess.run(
        [*launcher, "-m", "performers", "pretrain", *as_options(values)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_two_processes_give_the_losses_of_one(
    tmp_path: Path, fasta: Path, settings: Callable[..., dict[str, Any]], train: Train
) -> None:
    changes = {"steps": 20, "checkpoint_every": 10, "keep": 5, "validation": [str(fasta)], "learning_rate": 3e-3}
    train(tmp_path / "one", **changes)
    torchrun(settings(tmp_path / "two", **changes), 2)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1])
    for one, two in zip(*logs, strict=True):
        assert one["step"] == two["step"]
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    # A run that two processes began goes on in one: weights, moments and log belong to no process.
    train(tmp_path / "two", resume_from="step-00000010", **changes)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["sessions"][1]["status"] == "finished"
    last = [json.loads(line)["loss"] for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()][-1]
    assert last == pytest.approx(logs[0][-1]["loss"], abs=1e-5)
    assert outcome(tmp_path / "two")[0]


def test_a_batch_that_cannot_be_shared_equally_is_refused(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    import torch

    from performers.training import loop
    from performers.training.distributed import World

    world = contextlib.nullcontext(World(0, 3, torch.device("cpu")))
    monkeypatch.setattr(loop, "join_world", lambda device: world)
    with pytest.raises(ConfigError, match="batch_size=4: expected a multiple of the 3 processes"):
        train(tmp_path)
