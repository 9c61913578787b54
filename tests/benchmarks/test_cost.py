"""Cost, memory limits and energy: the arithmetic on figures, and small measurements of real steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from performers.benchmarks import concatenated, cost, energy, experiment
from performers.benchmarks.concatenated import ConcatenatedSettings, continued, measure_concatenated
from performers.benchmarks.cost import GIB, CostSettings, grid, longest_that_fits, measure_cost, why_not
from performers.benchmarks.cost_cell import step_energy, step_memory, step_time
from performers.benchmarks.experiment import DONE, NO_ROOM, extrapolated
from performers.errors import InputError

CELL: dict[str, Any] = {
    "part": "model",
    "system": "performer-relu",
    "size": {"heads": 2, "layers": 2, "d_ff": 16, "d": 16},
    "objective": "mlm",
    "recomputation": "none",
    "optimizer": True,
    "dtype": "float32",
    "length": 128,
    "batch_size": 1,
    "device": "cpu",
    "threads": 1,
    "seed": 0,
    "seconds": 0.0,
}


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


def weighed(length: int, gib: float, system: str = "performer-relu", **more: Any) -> dict[str, Any]:
    return {"length": length, "peak_bytes": gib * GIB, "base_bytes": 0, "system": system, "status": DONE, **more}


def test_a_power_law_goes_on_between_a_line_and_a_square() -> None:
    assert extrapolated([(1, 1.0)], 4, unknown=2.0) == 16.0
    assert extrapolated([(1, 1.0), (2, 2.0**1.5)], 4, unknown=1.0) == pytest.approx(8.0)
    assert extrapolated([(1, 1.0), (2, 1.0)], 4, unknown=1.0) == 2.0
    assert extrapolated([(1, 1.0), (2, 16.0)], 4, unknown=1.0) == 64.0


def test_the_longest_that_fits_is_measured_or_called_extrapolated() -> None:
    line = [weighed(1024, 1.0), weighed(2048, 2.0), weighed(4096, 4.0)]
    assert longest_that_fits(line, 2.5 * GIB) == {"longest": 2048, "how": "measured"}
    assert longest_that_fits(line, 0.5 * GIB) == {"longest": None, "how": "measured"}
    assert longest_that_fits(line, 17 * GIB) == {"longest": 16_384, "how": "extrapolated"}
    square = [weighed(1024, 1.0), weighed(2048, 4.0), {**weighed(4096, 0.0), "status": NO_ROOM}]
    assert longest_that_fits(square, 15 * GIB) == {"longest": 2048, "how": "extrapolated"}
    assert longest_that_fits(square, 17 * GIB) == {"longest": 4096, "how": "extrapolated"}
    assert longest_that_fits([], GIB)["longest"] is None


def test_what_would_take_too_long_or_too_much_is_flagged() -> None:
    cell = {"system": "transformer", "length": 65_536, "measure": "memory"}
    before = [weighed(16_384, 1.0, seconds=30.0), weighed(32_768, 4.0, seconds=120.0)]
    assert "8 minutes" in (why_not(cell, before, 5.0, None, None) or "")
    assert "would need about 16.0 GiB" in (why_not(cell, before, 10.0, 10 * GIB, None) or "")
    assert why_not(cell, before, 10.0, 20 * GIB, None) is None
    assert why_not(cell, [], 10.0, 1, None) is None
    tried = [*before, {"status": NO_ROOM, "reason": "memory ran out"}]
    assert why_not(cell, tried, 10.0, None, None) == "memory ran out"


def test_memory_goes_on_in_tokens_or_in_pairs_of_tokens() -> None:
    def step(system: str, batch: int, length: int, gib: float) -> dict[str, Any]:
        return weighed(length, gib, system, batch_size=batch)

    performer = [step("performer-relu", 1, 8192, 2.0), step("performer-relu", 4, 8192, 5.0)]
    assert continued(performer, step("performer-relu", 16, 8192, 0.0)) == pytest.approx(17.0 * GIB)
    matrices = [step("transformer-materialised", 1, 2048, 2.0), step("transformer-materialised", 1, 4096, 5.0)]
    assert continued(matrices, step("transformer-materialised", 1, 8192, 0.0)) == pytest.approx(17.0 * GIB)


@pytest.mark.parametrize("part", ["layer", "model"])
@pytest.mark.parametrize("system", ["performer-relu", "transformer-materialised", "reformer", "identity"])
def test_a_step_is_timed_and_weighed(part: str, system: str) -> None:
    cell = {**CELL, "part": part, "system": system}
    assert step_time(**cell)["seconds"] > 0
    memory = step_memory(**cell)
    assert memory["peak_bytes"] >= memory["base_bytes"] > 0


@pytest.mark.parametrize("recomputation", ["none", "layers", "reversible", "default"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_every_recomputation_takes_a_step(recomputation: str, objective: str) -> None:
    assert step_time(**CELL)["status"] == DONE
    assert step_time(**{**CELL, "recomputation": recomputation, "objective": objective})["status"] == DONE


def test_identity_costs_no_attention() -> None:
    import torch

    from performers.benchmarks.cost_cell import IdentityAttention

    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    assert torch.equal(IdentityAttention()(q, k, v), v)


def test_energy_is_read_from_counters_that_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("package-0", "dram")):
        domain = tmp_path / f"intel-rapl:{number}"
        domain.mkdir()
        for file, text in (("name", name), ("energy_uj", "900000"), ("max_energy_range_uj", "1000000")):
            (domain / file).write_text(f"{text}\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    found = energy.energy_of(lambda: (tmp_path / "intel-rapl:0" / "energy_uj").write_text("400000\n"), "cpu")
    assert found["joules"] == pytest.approx(0.5)
    assert found["source"].startswith("measured: RAPL counters of 1 ")
    figures = step_energy(**CELL)
    assert figures["tokens"] == 128
    assert figures["joules_per_million_tokens"] == pytest.approx(0.0)


def test_without_counters_and_codecarbon_energy_is_not_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    figures = step_energy(**CELL)
    assert figures["status"] == "unavailable"
    assert "pip install 'performers[carbon]'" in figures["reason"]


def test_hybrids_are_measured_as_models_alone() -> None:
    cells = grid(CostSettings.of_size(False))
    assert {cell["part"] for cell in cells if cell["system"] == "performer-relu+sparse"} == {"model"}
    assert {cell["part"] for cell in cells if cell["system"] == "identity"} == {"layer", "model"}


def test_cost_writes_tables_and_pictures_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = CostSettings.of_size(
        True, systems=("performer-relu",), parts=("model",), lengths=(64,), longest=64, energy_length=0, threads=1
    )
    report = measure_cost(settings, tmp_path, quick=True)
    assert [(cell["measure"], cell["length"], cell["status"]) for cell in report["cells"]] == [
        ("memory", 64, DONE),
        ("time", 64, DONE),
    ]
    assert [row["cap_gib"] for row in report["longest"]] == [4.0, 8.0, 16.0]
    assert all(row["how"] == "extrapolated" for row in report["longest"])
    titles = [title for title, _, _ in cost.tables(report)]
    assert any("longest power of two" in title for title in titles)
    for picture in report["pictures"]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert measure_cost(settings, tmp_path, quick=True)["cells"] == report["cells"]
    assert "2 of 2 cells were measured before" in capsys.readouterr().err


def test_concatenated_weighs_both_alike_and_trains_the_rival_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a step takes is measured in processes elsewhere; here only the largest size is too large.
    def run_step(measurement: str, cell: dict[str, Any], minutes: float) -> dict[str, Any]:
        pairs = cell["batch_size"] * cell["length"] ** 2 if "materialised" in cell["system"] else 0
        gib = cell["size"]["d"] * (pairs / 2**20 + cell["batch_size"] * cell["length"] / 2**20)
        return {"status": DONE, "base_bytes": 0, "peak_bytes": gib * GIB, "seconds": 1.0}

    monkeypatch.setattr(concatenated, "run_step", run_step)
    monkeypatch.setattr(concatenated, "available_memory", lambda: 100 * GIB)
    monkeypatch.setattr(
        concatenated, "measure_speed", lambda cell, _: {"status": DONE, "seconds_per_step": 1.0, "parameters": 10}
    )
    settings = ConcatenatedSettings.of_size(
        True, context=256, minutes=0.05, cap=2.5, score_proteins=2, held_out=10, threads=1
    )
    report = measure_concatenated(settings, tmp_path, quick=True)
    assert len(report["memory"]) == 3 * 2 * 2
    assert all(row["how"] == "measured" for row in report["memory"])
    size = {row["system"]: row["size"] for row in report["contestants"]}
    assert size["performer-relu"] == size["transformer"] == settings.size
    assert size["transformer-materialised"] == settings.shrunk[0]
    for row in report["contestants"]:
        assert row["steps"] == 3
        assert row["curves"][0][-1]["minutes"] == pytest.approx(0.05)
    (_, header, rows), (_, _, trained) = concatenated.tables(report)
    assert header[-2:] == ["float32", "bfloat16"]
    assert any("does not fit" in row[-1] for row in rows)
    assert len(trained) == 3
    assert (tmp_path / "concatenated.png").is_file()


def test_what_is_not_in_order_is_refused() -> None:
    for given, words in (
        ({"systems": ("slow",)}, "--system slow"),
        ({"sizes": ("huge",)}, "--size huge"),
        ({"recomputations": ("all",)}, "--recompute all"),
        ({"lengths": (3,)}, "--length 3"),
    ):
        with pytest.raises(InputError, match=words):
            CostSettings.of_size(True, **given)
    with pytest.raises(InputError, match="--recompute"):
        ConcatenatedSettings.of_size(True, recomputations=("all",))
