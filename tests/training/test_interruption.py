"""A run that is killed, stopped or short of room, and goes on, ends with the bits of one that was not."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from victims import as_options, outcome

from performers.training import PretrainResult
from performers.training.run_folder import list_checkpoints, load_progress

Start = Callable[..., BaseProcess]
Settings = Callable[..., dict[str, Any]]
Train = Callable[..., PretrainResult]


def wait_for_lines(log: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline, f"{log} did not come to {number} lines"
        time.sleep(0.005)


def test_a_run_killed_at_random_moments_ends_bit_identical(tmp_path: Path, start: Start, settings: Settings) -> None:
    changes = {"steps": 250, "checkpoint_every": 5, "evaluate_every": 10, "kernel": "softmax", "redraw_every": 7}
    whole = settings(tmp_path / "whole", validation=settings(tmp_path)["input"], evaluate_proteins=3, **changes)
    undisturbed = start("train", whole)
    killed = {**whole, "output": str(tmp_path / "killed")}
    moments = random.Random(0)
    kills = 0
    while kills < 12:
        process = start("train", killed)
        process.join(moments.uniform(0.0, 1.0))
        assert process.exitcode is None, f"the run ended with {process.exitcode} after {kills} kills"
        process.kill()
        process.join()
        kills += 1
    last = start("train", killed)
    last.join()
    undisturbed.join()
    assert (last.exitcode, undisturbed.exitcode) == (0, 0)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_run_killed_in_every_phase_of_a_save_ends_bit_identical(
    tmp_path: Path, start: Start, settings: Settings, train: Train
) -> None:
    changes = {"steps": 60, "checkpoint_every": 3, "evaluate_every": 0, "keep": 1}
    train(tmp_path / "whole", **changes)
    run = tmp_path / "killed"
    first = start("train", settings(run, **changes))
    wait_for_lines(run / "log.jsonl", 5)
    first.kill()
    first.join()
    for event in range(100):
        process = start("train_and_die_in_a_save", settings(run, **changes), event)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        for checkpoint in list_checkpoints(run):
            load_progress(checkpoint)
    assert event >= 12, "a save has at least a dozen moments to die at"
    assert outcome(run) == outcome(tmp_path / "whole")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000060"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_goes_on_from_there(
    number: signal.Signals, status: int, tmp_path: Path, start: Start, settings: Settings, train: Train
) -> None:
    changes = {"steps": 90, "checkpoint_every": 1000, "evaluate_every": 0}
    train(tmp_path / "whole", **changes)
    run = tmp_path / "stopped"
    process = start("command_line", "pretrain", *as_options(settings(run, **changes)))
    wait_for_lines(run / "log.jsonl", 3)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status
    saved = list_checkpoints(run)
    assert len(saved) == 1
    assert 3 <= load_progress(saved[0]).step < 90
    assert not (run / "model").exists()
    train(run, **changes)
    assert outcome(run) == outcome(tmp_path / "whole")


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_goes_on(
    tmp_path: Path, start: Start, settings: Settings, train: Train
) -> None:
    train(tmp_path / "whole")
    run = tmp_path / "full"
    process = start("train_and_run_out_of_disk", settings(run), 8192, str(tmp_path / "stderr"))
    process.join()
    assert process.exitcode == 1
    message = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert re.search(r"There is no room to write [\d,]+ bytes to .*step-00000008", message)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    train(run)
    assert outcome(run) == outcome(tmp_path / "whole")


def test_a_second_process_cannot_enter_the_run_folder(
    tmp_path: Path, start: Start, settings: Settings, train: Train
) -> None:
    run = tmp_path / "run"
    process = start("train", settings(run, steps=2000))
    wait_for_lines(run / "log.jsonl", 1)
    with pytest.raises(ValueError, match="in use by another process"):
        train(run, steps=2000)
    process.kill()
    process.join()
