"""Processes that are started again meet those of their own attempt, whatever earlier ones left in the store."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed as dist

from performers.errors import RunError
from performers.training.meeting import meet

PATIENCE = timedelta(seconds=30)


def attempt(store: dist.Store, number: int, order: list[int]) -> None:
    """Processes that arrive in this order, a moment apart, and leave their addresses to each other."""

    def arrive(place: int, rank: int) -> list[str]:
        time.sleep(0.05 * place)
        own = meet(store, rank, len(order), PATIENCE)
        own.set(f"address of {rank}", f"{rank} in attempt {number}")
        return [own.get(f"address of {other}").decode() for other in range(len(order))]

    with ThreadPoolExecutor(len(order)) as pool:
        found = list(pool.map(arrive, range(len(order)), order))
    assert found == [[f"{rank} in attempt {number}" for rank in range(len(order))]] * len(order)


def test_no_process_reads_what_an_earlier_attempt_left() -> None:
    store = dist.HashStore()
    for number, order in enumerate([[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]]):
        attempt(store, number, order)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_attempt_that_was_broken_off_while_they_met_does_not_matter(rank: int) -> None:
    store = dist.HashStore()
    attempt(store, 0, [0, 1])
    with pytest.raises(RunError, match="The 2 processes of the run did not meet within 0 seconds"):
        meet(store, rank, 2, timedelta(seconds=0.1))
    attempt(store, 1, [1, 0])
