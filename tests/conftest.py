"""What every test shares: quiet libraries, and the count of law cells that a run covered."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Compiled graphs are cached by the names of our operators, whose definitions are what is being worked on.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# Ray starts its workers at niceness 15: beside tests that use every core they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture
def record_cell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Count this test as a cell of the named grid."""

    def record(grid: str) -> None:
        request.node.user_properties.append(("grid", grid))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many cells of each grid ran: `make test` runs a pairwise cover, `make test-all` every cell."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    counts = Counter(value for report in reports for name, value in report.user_properties if name == "grid")
    for grid, count in counts.items():
        terminalreporter.write_line(f"law grid '{grid}': {count} cells ran")
