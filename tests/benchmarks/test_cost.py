"""Cost, memory limits and energy: the arithmetic on figures, and small measurements of real steps."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from performers.benchmarks import concatenated, cost_report, energy, experiment
from performers.benchmarks.concatenated import ConcatenatedSettings, continued, measure_concatenated
from performers.benchmarks.cost import (
    CostSettings,
    grid,
    longest_lengths,
    longest_that_fits,
    measure_cost,
    why_not,
)
from performers.benchmarks.cost_cell import step_energy, step_memory, step_time
from performers.benchmarks.cost_report import GIB
from performers.benchmarks.experiment import DONE, NO_ROOM, SKIPPED, extrapolated
from performers.errors import InputError

MEASURES = ("memory", "time", "energy")
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


def test_memory_is_weighed_at_every_power_of_two_whatever_lengths_are_shown() -> None:
    settings = CostSettings.of_size(
        False, systems=("performer-relu",), sizes=("small",), parts=("model",), lengths=(3000, 700), longest=10_000
    )
    lengths = {
        measure: [cell["length"] for cell in grid(settings) if cell["measure"] == measure] for measure in MEASURES
    }
    assert lengths == {"memory": [700, 1024, 2048, 3000, 4096, 8192], "time": [700, 3000], "energy": [1024]}


def test_the_longest_that_fits_is_compared_with_the_materialised_transformer() -> None:
    def line(system: str, *gib: float) -> list[dict[str, Any]]:
        kind = {"measure": "memory", "part": "model", "size_name": "small", "recomputation": "none"}
        return [weighed(1000 + place, one, system, **kind) for place, one in enumerate(gib)] + [
            weighed(1024 * 2**place, one, system, **kind) for place, one in enumerate(gib)
        ]

    cells = [*line("transformer-materialised", 1.0, 4.0, 16.0), *line("performer-relu", 1.0, 2.0, 3.0)]
    rows = {(row["system"], row["cap_gib"]): row for row in longest_lengths(cells, (0.5, 2.0, 4.0))}
    found = {key: (row["longest"], row["times_materialised"], row["times_how"]) for key, row in rows.items()}
    assert found == {
        ("transformer-materialised", 0.5): (None, None, "not measured"),
        ("transformer-materialised", 2.0): (1024, 1.0, "measured"),
        ("transformer-materialised", 4.0): (2048, 1.0, "measured"),
        ("performer-relu", 0.5): (None, None, "not measured"),
        ("performer-relu", 2.0): (2048, 2.0, "measured"),
        ("performer-relu", 4.0): (4096, 2.0, "extrapolated"),
    }
    settings = {"lengths": [1024], "sizes": [], "caps": [0.5, 2.0, 4.0]}
    ((_, header, table),) = cost_report.tables({"settings": settings, "longest": [*rows.values()], "cells": []})
    assert header[-1] == "times the materialised Transformer, at 0.5, 2, 4 GiB"
    assert [row[-1] for row in table] == ["not known, 1, 1", "not known, 2, ~2"]
    alone = longest_lengths(line("performer-relu", 1.0), (2.0,))
    assert alone[0]["times_materialised"] is None


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


@pytest.mark.parametrize(
    ("system", "batch_size", "seconds"),
    [
        ("performer-relu", 16, lambda cell: 100.0 * cell["batch_size"]),
        ("transformer-materialised", 1, lambda cell: 400.0 * (cell["length"] / 4096) ** 2),
    ],
    ids=["batch", "length"],
)
def test_a_step_that_would_take_over_ten_minutes_is_not_begun_and_its_peak_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, batch_size: int, seconds: Callable[..., float]
) -> None:
    begun: list[tuple[int, int]] = []

    def run_step(measurement: str, cell: dict[str, Any], minutes: float) -> dict[str, Any]:
        begun.append((cell["batch_size"], cell["length"]))
        extent = cell["batch_size"] * cell["length"] / 8192
        gib = 1.0 + (extent**2 if batch_size == 1 else extent)
        return {"status": DONE, "base_bytes": GIB, "peak_bytes": gib * GIB, "seconds": seconds(cell)}

    monkeypatch.setattr(concatenated, "run_step", run_step)
    monkeypatch.setattr(concatenated, "available_memory", lambda: 1000 * GIB)
    settings = ConcatenatedSettings.of_size(
        False, weighed=((system, batch_size),), recomputations=("none",), minutes=0.0, threads=1
    )
    report = measure_concatenated(settings, tmp_path)
    assert begun == ([(1, 8192), (4, 8192)] if batch_size == 16 else [(1, 2048), (1, 4096)]) * 2
    for row in report["memory"]:
        assert row["how"] == "extrapolated"
        assert row["peak_bytes"] == pytest.approx((17.0 if batch_size == 16 else 2.0) * GIB)
    flagged = [cell for cell in report["cells"] if cell["status"] != DONE]
    assert {cell["status"] for cell in flagged} == {SKIPPED}
    assert {cell["reason"] for cell in flagged} == {"a step would take about 27 minutes"}
    assert any("about 27 minutes" in note for note in report["notes"])


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


def test_without_counters_energy_is_estimated_and_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("codecarbon")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **options: asked.append(host) or [])
    figures = step_energy(**CELL)
    assert asked == []  # where the machine stands is nobody's business
    assert capfd.readouterr().err == ""
    assert figures["status"] == DONE
    assert figures["source"].startswith("estimated: codecarbon")
    assert figures["joules_per_million_tokens"] > 0
    assert figures["tokens"] == 128


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
    (header, rows) = next(found for title, *found in cost_report.tables(report) if "longest power of two" in title)
    assert header[-3:] == [
        "4 GiB",
        "8 GiB",
        "16 GiB",
    ]  # without the materialised Transformer nothing is compared with it
    assert len(rows) == 1
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
    (_, header, rows), (_, columns, trained) = concatenated.tables(report)
    assert header[-2:] == ["float32", "bfloat16"]
    assert any("does not fit" in row[-1] for row in rows)
    assert len(trained) == 3
    assert columns[-1] == "above unigram (95 %)"
    first = report["contestants"][0]["scores"][0]["validation"]
    low, high = first["accuracy_gain_interval"]
    assert trained[0][-1] == f"{first['accuracy_gain']:+.4f} ({low:+.4f} to {high:+.4f})"
    assert (tmp_path / "concatenated.png").is_file()


def test_what_is_not_in_order_is_refused() -> None:
    for given, words in (
        ({"systems": ("slow",)}, "--system slow"),
        ({"sizes": ("huge",)}, "--size huge"),
        ({"recomputations": ("all",)}, "--recompute all"),
        ({"recomputations": ()}, "--recompute: expected at least one of none, layers"),
        ({"systems": ()}, "--system: expected at least one of"),
        ({"lengths": (3,)}, "--length 3"),
    ):
        with pytest.raises(InputError, match=words):
            CostSettings.of_size(True, **given)
    for given, words in (
        ({"recomputations": ("all",)}, "--recompute all"),
        ({"recomputations": ()}, "--recompute: expected at least one of none, layers"),
        ({"size": (8, 6, 512)}, "--size 8,6,512: expected four positive numbers"),
        ({"size": (8, 6, 512, -128)}, "--size 8,6,512,-128: expected four positive numbers"),
        ({"size": ()}, "--size: expected four positive numbers"),
        ({"size": (8, 6, 512, 100)}, "multiple of twice the heads"),
    ):
        with pytest.raises(InputError, match=words):
            ConcatenatedSettings.of_size(True, **given)


def test_the_regular_model_can_have_another_size() -> None:
    settings = ConcatenatedSettings.of_size(False, size=(8, 6, 512, 128))
    assert settings.size == {"heads": 8, "layers": 6, "d_ff": 512, "d": 128}
    assert (settings.recipe.heads, settings.recipe.layers, settings.recipe.d_ff, settings.recipe.d) == (8, 6, 512, 128)
    assert (settings.recipe.context, settings.recipe.contexts) == (8192, "concatenated")
