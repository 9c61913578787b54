"""The arithmetic of `performers benchmark attention`, on figures made up, and its measurements at tiny sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from performers import FavorFeatures, favor_attention
from performers.benchmarks import attention, attention_cell
from performers.benchmarks.attention import (
    AttentionSettings,
    compare,
    exponent,
    grid,
    growth,
    limit_flops,
    tables,
    why_not,
)
from performers.benchmarks.attention_cell import (
    decoding_time,
    dense_rate,
    layer_memory,
    layer_time,
    rows_in_float64,
)
from performers.benchmarks.experiment import DONE, NO_ROOM, SKIPPED
from performers.errors import InputError

SETTINGS = AttentionSettings(
    lengths=(32, 64),
    kernels=("softmax",),
    directions=("causal",),
    dtypes=("float32",),
    backends=("chunked",),
    heads=2,
    head_dim=8,
    num_features=16,
    positions=(10, 300),
    threads=1,
    seconds=0.0,
    product=64,
)


def result(system: str, length: int, seconds: float, **figures: Any) -> dict[str, Any]:
    """What measuring a cell could have come to."""
    exact = system in ("sdpa", "materialised")
    cell: dict[str, Any] = {
        "part": "layer",
        "system": system,
        "kernel": None if exact else "softmax",
        "direction": "causal",
        "backend": "auto" if system == "performers" else None,
        "precision": None,
        "dtype": "float32",
        "device": "cpu",
        "device_name": None,
        "threads": 1,
        "threads_used": 1,
        "length": length,
        "batch_size": 1,
        "heads": 8,
        "head_dim": 64,
        "num_features": 256,
        "features": 256,
    }
    measured = {"dense_rate": 400e9, "dense_product": "2,048^3 by oneDNN", "extra_bytes": 5e6, "error": 1e-6}
    needed = {"needed_bytes": length * 16_384, "total_bytes": length * 16_384 + 5e6}
    return {**cell, "status": DONE, "seconds": seconds, **measured, **needed, **figures}


def cell(system: str = "performers", **changed: Any) -> dict[str, Any]:
    """A small cell of a system."""
    settings = {"against": () if system == "performers" else (system,)}
    cells, _ = grid(AttentionSettings(**{**vars(SETTINGS), **settings}))
    return {**next(cell for cell in cells if cell["system"] == system), **changed}


def test_the_limit_is_twelve_matrix_products_at_the_dense_rate() -> None:
    ours = result("performers", 16_384, 0.258)
    assert limit_flops(ours, 256) == 24 * 8 * 16_384 * 256 * 64
    compared = compare([ours])[0]
    assert compared["limit_seconds"] == pytest.approx(0.12885, rel=1e-3)
    assert compared["ratio"] == pytest.approx(2.0023, rel=1e-3)
    assert limit_flops({**ours, "batch_size": 3}, 512) == 6 * limit_flops(ours, 256)


def test_speed_ups_compare_the_same_setting_only() -> None:
    results = [
        result("performers", 1024, 0.1),
        result("performers", 2048, 0.2),
        result("sdpa", 1024, 0.3),
        result("textbook", 1024, 0.5),
        result("textbook", 1024, 0.9, kernel="relu"),
        result("textbook", 2048, 0.7, direction="bidirectional"),
        result("sdpa", 2048, 0.7, dtype="bfloat16"),
        {"status": SKIPPED, **{key: result("sdpa", 2048, 0)[key] for key in ("system", "length", "dtype", "kernel")}},
    ]
    compared = compare(results)
    assert compared[0]["speedup"] == pytest.approx({"sdpa": 3.0, "textbook": 5.0})
    assert compared[1]["speedup"] == {}
    assert compared[2]["speedup"] == {}
    assert compared[3]["speedup"] == pytest.approx({"sdpa": 0.6})
    assert compared[7]["status"] == SKIPPED


def test_growth_is_fitted_from_8192_tokens_up() -> None:
    assert exponent([(x, 3 * x**1.25) for x in (2, 8, 64)]) == pytest.approx(1.25)
    results = [result("performers", length, length / 1e5) for length in (8192, 65_536, 1_048_576)]
    results += [result("performers", 1024, 99.0), result("sdpa", 8192, 1.0)]
    (entry,) = growth(results)
    assert entry["time"] == pytest.approx(1.0)
    assert 0.95 < entry["memory"] < 1.0
    assert (entry["from"], entry["to"], entry["system"]) == (8192, 1_048_576, "performers")


def test_a_cell_that_would_take_too_long_or_too_much_memory_is_skipped() -> None:
    assert why_not(1024, [], 10, 10**10) is None
    exact = [result("sdpa", 1024, 0.05), result("sdpa", 4096, 0.8)]
    assert why_not(16_384, exact, 10, 10**11) is None
    assert "minutes" in (why_not(1_048_576, exact, 10, 10**11) or "")
    assert "minutes" in (why_not(1_048_576, exact[:1], 10, 10**11) or "")
    ours = [result("performers", 1024, 0.05), result("performers", 4096, 0.2)]
    assert why_not(1_048_576, ours, 10, 10**11) is None
    assert "GB of memory" in (why_not(1_048_576, ours, 10, 10**10) or "")
    assert why_not(1_048_576, ours, 10, None) is None
    assert (
        why_not(8192, [*ours, {**ours[0], "status": NO_ROOM, "reason": "memory ran out"}], 10, None) == "memory ran out"
    )


def test_exact_rivals_are_measured_once_for_all_kernels_and_bfloat16_in_both_precisions() -> None:
    changed = {
        "kernels": ("softmax", "relu", "elu"),
        "dtypes": ("float32", "bfloat16"),
        "against": ("sdpa", "textbook"),
    }
    cells, notes = grid(AttentionSettings(**{**vars(SETTINGS), **changed}))
    assert notes == []
    layers = {str(cell): cell for cell in cells if cell["part"] == "layer" and cell["length"] == 32}.values()
    systems = [(cell["system"], cell["kernel"], cell["dtype"], cell["precision"]) for cell in layers]
    assert sum(system == "sdpa" for system, *_ in systems) == 2
    assert sum(system == "textbook" for system, *_ in systems) == 4
    assert [precision for system, kernel, dtype, precision in systems if (system, kernel) == ("performers", "elu")] == [
        *("accurate", "accurate", "fast")
    ]
    assert sum(cell["part"] == "decoding" for cell in cells) == 6


def test_a_rival_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    cells, notes = grid(AttentionSettings(**{**vars(SETTINGS), "against": ("performer-pytorch", "sdpa")}))
    assert notes == ["performer-pytorch is needed for the comparison with it: pip install 'performers[bench]'"]
    assert {cell["system"] for cell in cells} == {"performers", "sdpa"}


def test_a_rival_that_needs_a_gpu_is_left_out_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: True)
    cells, notes = grid(AttentionSettings(**{**vars(SETTINGS), "against": ("flash-linear-attention",)}))
    assert notes == ["flash-linear-attention is left out: it needs a CUDA device."]
    assert {cell["system"] for cell in cells} == {"performers"}


@pytest.mark.parametrize(
    "given",
    [
        {"against": ("flash",)},
        {"backends": ("fastest",)},
        {"directions": ("sideways",)},
        {"dtypes": ("int8",)},
        {"kernels": ("sotfmax",)},
        {"lengths": (0,)},
        {"positions": (-1, 10)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_name_or_number_that_is_not_in_order_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=str(next(iter(given.values()))[0])):
        AttentionSettings.of_size(True, "cpu", **given)


@pytest.mark.parametrize("causal", [False, True])
def test_checked_rows_are_those_of_attention(causal: bool) -> None:
    q, k, v = (
        torch.randn(2, 3, 1500, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    rows = [0, 1, 700, 1499]
    exact = scaled_dot_product_attention(q, k, v, is_causal=causal)[:, :, rows]
    torch.testing.assert_close(rows_in_float64(q, k, v, rows, causal, None), exact)
    features = FavorFeatures(8, 16, "relu")
    ours = favor_attention(q, k, v, features, is_causal=causal, backend="reference")[:, :, rows]
    torch.testing.assert_close(rows_in_float64(q, k, v, rows, causal, features), ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("system", ["performers", "sdpa", "textbook", "materialised", "performer-pytorch"])
def test_every_system_computes_what_it_says(system: str, kernel: str, direction: str) -> None:
    if system == "performer-pytorch":
        pytest.importorskip("performer_pytorch")
    exact = system in ("sdpa", "materialised")
    figures = layer_time(**cell(system, direction=direction, kernel=None if exact else kernel, length=300))
    assert figures["status"] == DONE
    assert len(figures["all_seconds"]) == 2
    assert figures["dense_rate"] > 0
    # performer-pytorch adds 1e-4 to every feature of the softmax kernel, textbook 1e-6.
    tolerance = {"performer-pytorch": 1.0, "textbook": 0.1}.get(system, 1e-4) if kernel == "softmax" else 1e-3
    assert figures["error"] < tolerance


def test_memory_beside_inputs_and_outputs_is_what_the_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(cell: Any, features: Any) -> Any:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
            if q.shape[2] > 64:
                torch.ones(50_000_000)  # 200 MB, gone before there are gradients
            return q * k * v

        return attend

    monkeypatch.setitem(attention_cell._SYSTEMS, "performers", greedy)
    monkeypatch.setattr(attention_cell, "refuse_beyond_available_memory", lambda: None)
    figures = layer_memory(**cell(length=4096, heads=8, head_dim=64))
    one = 4096 * 8 * 64 * 4
    assert figures["needed_bytes"] == 8 * one  # q, k, v, out, and the gradient of each
    assert 200e6 - 4 * one < figures["extra_bytes"] + 1e6 < 200e6 + 20e6
    assert figures["total_bytes"] == figures["needed_bytes"] + figures["extra_bytes"]


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(cell: Any, features: Any) -> Any:
        return lambda q, k, v, causal: torch.empty(2**60)

    monkeypatch.setitem(attention_cell._SYSTEMS, "performers", hungry)
    monkeypatch.setattr(attention_cell, "refuse_beyond_available_memory", lambda: None)
    assert layer_memory(**cell())["status"] == NO_ROOM


def test_decoding_is_timed_at_every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cell, "refuse_beyond_available_memory", lambda: None)
    cells, _ = grid(SETTINGS)
    figures = decoding_time(**next(cell for cell in cells if cell["part"] == "decoding"))
    assert len(figures["seconds_per_token"]) == 2
    assert figures["ratio"] == figures["seconds_per_token"][1] / figures["seconds_per_token"][0]
    assert figures["state_bytes"] == 2 * 16 * (8 + 1 + 1) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_rate_says_by_what_it_was_reached(dtype: torch.dtype) -> None:
    rate, product = dense_rate(64, dtype, torch.device("cpu"))
    assert 0 < rate < math.inf
    assert product.startswith("64^3 by ")


def test_the_tables_and_pictures_show_every_system(tmp_path: Path) -> None:
    results = [
        result(system, length, length / 1e5)
        for length in (8192, 16_384)
        for system in ("performers", "sdpa", "performer-pytorch")
    ]
    decoding = {**cell(part="decoding"), "status": DONE, "positions": [10, 20], "seconds_per_token": [1e-3, 1.1e-3]}
    report = {
        "cells": compare(results),
        "growth": growth(results),
        "decoding": [{**decoding, "ratio": 1.1}],
        "settings": {**vars(SETTINGS), "lengths": [8192, 16_384]},
    }
    shown = {title: (header, rows) for title, header, rows in tables(report)}
    assert len(shown["Forward and backward"][1]) == 6
    assert shown["Growth with the length"][1][0][-2] == "L^1.000"
    for header, rows in shown.values():
        assert rows
        assert all(len(row) == len(header) for row in rows)
    (path,) = attention.draw(report, tmp_path)
    assert path.name == "attention-softmax-causal-float32.png"
    assert path.read_bytes().startswith(b"\x89PNG")
