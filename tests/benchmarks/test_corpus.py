"""The benchmark of corpora, and the arithmetic of training on a large one, as they are run by users."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from performers.benchmarks.corpus import CorpusSettings, measure_corpus, tables
from performers.errors import InputError

ROOT = Path(__file__).parents[2]


def test_a_quick_benchmark_measures_every_cell_and_leaves_no_proteins(tmp_path: Path) -> None:
    settings = CorpusSettings.of_size(True, residues=(20_000, 40_000), files=2, contexts=20, records=(5,))
    report = measure_corpus(settings, tmp_path / "out", quick=True)
    assert [cell["what"] for cell in report["cells"]] == ["build"] * 3 + ["read"] * 4 + ["embed"]
    assert {cell["status"] for cell in report["cells"]} == {"done"}
    assert all(cell["peak_bytes"] > 10_000_000 for cell in report["cells"])
    building, reading, embedding = tables(report)
    assert [row[0] for row in building[2]] == ["20,000", "40,000", "40,000"]
    assert (len(reading[2]), len(embedding[2])) == (4, 1)
    assert not (tmp_path / "out" / "proteins").exists()


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="--residues"):
        CorpusSettings.of_size(True, residues=(10,))
    with pytest.raises(InputError, match="--workers"):
        CorpusSettings.of_size(True, workers=(0,))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs `scripts/plan_training.py`; the lines that it printed."""

    def run(*options: str) -> list[str]:
        script = str(ROOT / "scripts" / "plan_training.py")
        monkeypatch.setattr(sys, "argv", [script, *options])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_the_plan_follows_its_assumptions(plan: Callable[..., list[str]]) -> None:
    def cells(*options: str) -> dict[str, list[str]]:
        lines = plan("--preset", "tiny", "--gpus", "8", *options)
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
        return {row[0]: row for row in rows if len(row) in (4, 8)}

    once, twice = cells(), cells("--residues", "2e11")
    assert once["corpus: residues, a byte each"][1] == "100.0"
    assert twice["corpus: residues, a byte each"][1] == "200.0"
    hours, more_hours = (float(rows["8"][6].replace(",", "")) for rows in (once, twice))
    assert more_hours == pytest.approx(2 * hours, rel=0.2, abs=0.11)


def test_the_plan_in_the_documentation_is_what_the_command_beside_it_prints(plan: Callable[..., list[str]]) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    command = re.search(r"^python scripts/plan_training\.py (.+)$", page, re.MULTILINE)
    assert command is not None
    assert "\n".join(plan(*command[1].split())) in page
