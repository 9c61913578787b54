"""The errors of `performers benchmark approximation`, against their definitions and against what theory says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from performers import FavorFeatures, exact_attention, favor_attention
from performers.attention.features import KERNELS
from performers.benchmarks import approximation
from performers.benchmarks.approximation import ApproximationSettings, draw, errors, tables
from performers.errors import InputError
from performers.randomness import derive_seed


def cell(**changed: Any) -> dict[str, Any]:
    """A small cell in float64."""
    return {
        "length": 700,
        "head_dim": 8,
        "num_features": 64,
        "draws": 2,
        "kernel": "softmax",
        "projection": "orthogonal",
        "deviation": 0.5,
        "device": "cpu",
        "dtype": "float64",
        "seed": 3,
        **changed,
    }


@pytest.mark.parametrize("kernel", ["softmax", "softmax-hyperbolic", "softmax-reg", "softmax-optimal", "softmax-sharp"])
def test_the_error_of_the_output_is_that_of_the_attention_function(kernel: str) -> None:
    found = errors(cell(kernel=kernel))
    q, k, v, _ = approximation._exact(700, 8, 0.5, "cpu", "float64", 3)
    exact = exact_attention(q, k, v)
    for number, relative in enumerate(found["output"]["relative"]["draws"]):
        features = FavorFeatures(8, 64, kernel, seed=derive_seed(3, "draw", number))
        if not features.is_calibrated:
            features.calibrate_(q, k)
        estimate = favor_attention(q, k, v, features, backend="reference")
        assert relative == pytest.approx(float((estimate - exact).norm() / exact.norm()), rel=1e-3)
        assert found["output"]["mse"]["draws"][number] == pytest.approx(
            float((estimate - exact).square().mean()), rel=1e-3
        )


def test_the_error_of_the_matrix_is_that_of_its_rows() -> None:
    found = errors(cell(draws=1))
    q, k, _, kernel = approximation._exact(700, 8, 0.5, "cpu", "float64", 3)
    features = FavorFeatures(8, 64, seed=derive_seed(3, "draw", 0))
    estimate = features(q)[0, 0] @ features(k)[0, 0].T
    torch.testing.assert_close(kernel, torch.exp(q[0, 0] @ k[0, 0].T / 8**0.5))
    assert found["kernel"]["mse"]["mean"] == pytest.approx(float((estimate - kernel).square().mean()))
    rows, exact = (weights / weights.sum(-1, keepdim=True) for weights in (estimate, kernel))
    assert found["matrix"]["relative"]["mean"] == pytest.approx(float((rows - exact).norm() / exact.norm()))
    assert found["matrix"]["mse"]["deviation"] == 0.0


def test_more_features_and_smaller_inputs_err_less() -> None:
    of = {
        (features, deviation): errors(cell(num_features=features, deviation=deviation, draws=5))["output"]["relative"]
        for features in (16, 256)
        for deviation in (0.25, 0.75)
    }
    assert of[256, 0.75]["mean"] < of[16, 0.75]["mean"]
    assert of[256, 0.25]["mean"] < of[256, 0.75]["mean"]
    assert of[256, 0.25]["mean"] < 0.1


def test_default_names_that_are_not_there_are_left_out_and_given_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(KERNELS, "softmax-reg")
    settings, notes = ApproximationSettings.of_size(True)
    assert {"softmax", "softmax-hyperbolic"} <= set(settings.kernels) <= set(approximation.KERNELS) - {"softmax-reg"}
    assert "kernel softmax-reg is left out: this version does not have it." in notes
    with pytest.raises(InputError, match="softmax-reg"):
        ApproximationSettings.of_size(True, kernels=("softmax", "softmax-reg"))


@pytest.mark.parametrize(
    "given", [{"projections": ("squint",)}, {"num_features": (0,)}, {"deviations": (-1.0,)}], ids=str
)
def test_a_setting_that_is_not_in_order_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ApproximationSettings.of_size(True, **given)


def test_the_tables_have_a_column_for_every_m_and_the_pictures_are_drawn(tmp_path: Path) -> None:
    cells = [
        {**cell(num_features=m, deviation=deviation), "errors": errors(cell(num_features=m, length=40))}
        for deviation in (1.0, 0.5)
        for m in (4, 8)
    ]
    cells[0]["errors"]["output"]["mse"] |= {"mean": None, "deviation": None}
    settings = {**cell(), "deviations": [1.0, 0.5], "num_features": [4, 8]}
    report = {"cells": cells, "settings": settings}
    for title, header, rows in tables(report, "mse"):
        assert title.startswith("Mean squared error of the ")
        assert header[-2:] == ["M 4", "M 8"]
        assert len(rows) == 2
        assert all(len(row) == len(header) for row in rows)
    assert [path.name for path in draw(report, tmp_path)] == ["approximation-mse.png", "approximation-relative.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
