"""What every benchmark shares: cells are measured once, kept as they come, and found again only where they still hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from performers import __version__
from performers.benchmarks import experiment
from performers.benchmarks.experiment import DONE, FAILED, NO_ROOM, CellLog, measure_cells
from performers.benchmarks.isolation import available_memory, run_alone
from performers.errors import InputError, OutputError, RunError
from performers.memory import forget_peak, peak_memory, resident_memory

SOURCE_VERSION = experiment.source_version
CELLS = [{"length": length, "kernel": kernel} for length in (1, 2) for kernel in ("a", "b")]


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


def measure_all(
    folder: Path, cells: list[dict[str, Any]] = CELLS, restart: bool = False, stop_at: int | None = None, **figures: Any
) -> tuple[list[dict[str, Any]], int]:
    """The results, and how many cells were measured for them."""
    measured = 0

    def measure(cell: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal measured
        if measured == stop_at:
            raise KeyboardInterrupt
        measured += 1
        return {"status": DONE, "value": cell["length"] * 10, "before": len(before), **figures}

    log = CellLog(folder, "benchmark test", restart=restart)
    return measure_cells(cells, measure, log, name=str, result=str), measured


def test_cells_measured_before_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, measured = measure_all(tmp_path / "new")
    assert measured == 4
    assert [result["value"] for result in first] == [10, 10, 20, 20]
    assert [result["before"] for result in first] == [0, 1, 2, 3]
    assert "left" in capsys.readouterr().err
    again, measured = measure_all(tmp_path / "new")
    assert measured == 0
    assert again == first
    assert "4 of 4 cells were measured before" in capsys.readouterr().err
    more, measured = measure_all(tmp_path / "new", [*CELLS, {"length": 3, "kernel": "a"}])
    assert measured == 1
    assert more[:4] == first
    assert measure_all(tmp_path / "new", restart=True)[1] == 4


def test_an_interrupted_grid_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure_all(tmp_path, stop_at=3)
    assert f"kept in {tmp_path}" in capsys.readouterr().err
    assert measure_all(tmp_path)[1] == 1


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    measure_all(tmp_path)
    file = tmp_path / "cells.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert measure_all(tmp_path)[1] == 1
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 4


def test_a_cell_that_occurs_twice_is_measured_once(tmp_path: Path) -> None:
    results, measured = measure_all(tmp_path, [*CELLS, *CELLS])
    assert (measured, len(results)) == (4, 4)


def test_another_commit_or_machine_measures_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_all(tmp_path)
    monkeypatch.setattr(experiment, "source_version", lambda: "1.2.3 abc")
    assert measure_all(tmp_path)[1] == 4
    monkeypatch.setattr(experiment, "describe_machine", lambda: {"processor": "another"})
    assert measure_all(tmp_path)[1] == 4
    monkeypatch.setattr(experiment, "source_version", lambda: "1.2.3 abc")
    assert measure_all(tmp_path)[1] == 0


def test_the_version_of_the_code_is_that_of_the_package() -> None:
    assert SOURCE_VERSION().split()[0] == __version__


def test_what_does_not_fit_is_kept_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    measure_all(tmp_path / "a", status=NO_ROOM)
    assert measure_all(tmp_path / "a")[1] == 0
    measure_all(tmp_path / "b", status=FAILED)
    assert measure_all(tmp_path / "b")[1] == 4


def test_figures_that_are_not_finite_become_none(tmp_path: Path) -> None:
    result = measure_all(tmp_path, CELLS[:1], errors=[float("nan"), 1.0], worst={"is": float("inf")})[0][0]
    assert result["errors"] == [None, 1.0]
    assert result["worst"] == {"is": None}


def test_a_folder_in_use_for_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="already in use"):
        CellLog(tmp_path, "benchmark test")
    measure_all(tmp_path / "new")
    with pytest.raises(OutputError, match="performers benchmark test"):
        CellLog(tmp_path / "new", "benchmark other")
    with pytest.raises(OutputError, match="performers benchmark test"):
        CellLog(tmp_path / "new", "benchmark other", restart=True)
    assert measure_all(tmp_path / "new")[1] == 0


def test_a_process_of_its_own_gets_its_environment(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text("import os\ndef figures(name):\n    return {'value': os.environ[name]}\n")
    environment = {"PYTHONPATH": str(tmp_path), "TOLD": "so"}
    assert run_alone("told:figures", environment=environment, name="TOLD")["value"] == "so"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_since_it_was_forgotten() -> None:
    big = bytearray(80_000_000)
    big[::4096] = b"x" * len(big[::4096])
    del big
    forget_peak()
    assert peak_memory() - resident_memory() < 40_000_000
    assert (available_memory() or 0) > 0


def test_bad_arguments_and_failures_of_the_process_are_told_apart(tmp_path: Path) -> None:
    lines = [
        "import time",
        "from performers.errors import InputError",
        "def refuse():",
        "    raise InputError('no such')",
    ]
    lines += ["def crash():", "    raise ValueError('at all')", "def wait():", "    time.sleep(60)"]
    (tmp_path / "told.py").write_text("\n".join(lines))
    environment = {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(InputError, match=r"^no such$"):
        run_alone("told:refuse", environment=environment)
    with pytest.raises(RunError, match=r"ended with status 1: ValueError: at all"):
        run_alone("told:crash", environment=environment)
    with pytest.raises(TimeoutError, match="not done"):
        run_alone("told:wait", environment=environment, timeout=1.0)
