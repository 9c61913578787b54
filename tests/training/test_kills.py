"""Several processes that are killed at random moments and started again end with the bits of a run that was not disturbed."""

import json
import random
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import ranks
from victims import outcome

from performers.training.run_folder import list_checkpoints

Settings = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("kills", "changes"),
    [
        (3, {"sharding": "none"}),
        pytest.param(3, {"sharding": "full"}, marks=pytest.mark.slow),
        pytest.param(15, {"sharding": "none", "sequence_parallel": 2}, marks=pytest.mark.slow),
        pytest.param(15, {"sharding": "full", "objective": "clm"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_killed_at_random_moments_end_bit_identical(
    kills: int, changes: dict[str, Any], tmp_path: Path, settings: Settings, context: ForkServerContext
) -> None:
    steps = 50 * kills
    changes = {**changes, "steps": steps, "checkpoint_every": 5, "keep": 5, "kernel": "softmax", "redraw_every": 7}
    whole = settings(tmp_path / "whole", validation=settings(tmp_path)["input"], evaluate_proteins=3, **changes)
    undisturbed = ranks.launch(context, ranks.train, 2, whole)
    run = tmp_path / "killed"
    killed = {**whole, "output": str(run)}
    moments, times_gone_on = random.Random(0), 0
    for _ in range(kills):
        before = {path: path.stat().st_mtime_ns for path in list_checkpoints(run)}
        processes = ranks.launch(context, ranks.train, 2, killed)
        deadline = time.monotonic() + 300
        while before.keys() >= set(list_checkpoints(run)):
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in processes)
            time.sleep(0.005)
        processes[0].join(moments.uniform(0, 0.1))
        for process in processes:
            process.kill()
        assert -9 in ranks.statuses(processes), "the run ended before it was killed"
        left = [path for path in before if path.exists()]
        assert [path.stat().st_mtime_ns for path in left] == [before[path] for path in left], "it began anew"
        times_gone_on += bool(left)
    assert times_gone_on
    assert ranks.statuses(ranks.launch(context, ranks.train, 2, killed)) == [0, 0]
    assert ranks.statuses(undisturbed) == [0, 0]
    assert outcome(run) == outcome(tmp_path / "whole")
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert [session["status"] for session in sessions] == ["running"] * kills + ["finished"]
