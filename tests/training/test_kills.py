"""Several processes that are killed at random moments and started again end with the bits of a run that was not disturbed."""

import random
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import ranks
from victims import outcome

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
    changes = {**changes, "steps": steps, "checkpoint_every": 5, "kernel": "softmax", "redraw_every": 7}
    whole = settings(tmp_path / "whole", validation=settings(tmp_path)["input"], evaluate_proteins=3, **changes)
    undisturbed = ranks.launch(context, ranks.train, 2, whole)
    killed = {**whole, "output": str(tmp_path / "killed")}
    moments = random.Random(0)
    for _ in range(kills):
        processes = ranks.launch(context, ranks.train, 2, killed)
        processes[0].join(moments.uniform(0.5, 2.0))
        for process in processes:
            process.kill()
        assert -9 in ranks.statuses(processes), "the run ended before it was killed"
    assert ranks.statuses(ranks.launch(context, ranks.train, 2, killed)) == [0, 0]
    assert ranks.statuses(undisturbed) == [0, 0]
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
