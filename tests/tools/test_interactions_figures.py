"""Figures of pairs: areas, intervals over proteins, verdicts and calibration."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from performers.tools.interactions import figures
from performers.tools.interactions.figures import (
    BETTER,
    NO_BETTER,
    NOT_MEASURED,
    Curve,
    ahead,
    calibration,
    measure,
    per_protein,
    resampled_weights,
    verdict,
    with_interval,
)


def test_areas_are_those_of_scikit_learn_also_with_weights_and_ties() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 12, 300).astype(float), rng.integers(0, 2, 300)
    weights = rng.integers(0, 4, 300).astype(float)
    for given in (None, weights):
        auroc, aupr = Curve(scores, labels).areas(given)
        assert auroc == pytest.approx(metrics.roc_auc_score(labels, scores, sample_weight=given))
        assert aupr == pytest.approx(metrics.average_precision_score(labels, scores, sample_weight=given))


def test_intervals_resample_proteins_and_are_wider_than_those_of_pairs() -> None:
    rng = np.random.default_rng(1)
    pairs = np.array(list(itertools.combinations(range(30), 2)))
    taste = rng.normal(size=30)
    labels = (taste[pairs].sum(1) + 0.3 * rng.normal(size=len(pairs)) > 0).astype(np.int64)
    scores = taste[pairs].sum(1) + rng.normal(size=len(pairs))
    low, high = measure({"x": scores}, labels, pairs, seed=0, first="x")["systems"]["x"]["auroc_interval"]
    naive = []
    for _ in range(200):
        chosen = rng.integers(len(pairs), size=len(pairs))
        naive.append(Curve(scores[chosen], labels[chosen]).areas()[0])
    assert high - low > 1.3 * np.ptp(np.quantile(naive, [0.025, 0.975]))
    weights = np.stack(list(resampled_weights(pairs, 0)))
    assert weights.mean() == pytest.approx(1, abs=0.15)


def test_the_verdict_is_better_only_if_every_baseline_is_surely_behind() -> None:
    rng = np.random.default_rng(0)
    pairs = np.array(list(itertools.combinations(range(40), 2)))
    labels = rng.integers(0, 2, len(pairs))
    good, fair = labels + 0.2 * rng.normal(size=len(pairs)), labels + 2 * rng.normal(size=len(pairs))
    noise = rng.normal(size=len(pairs))
    seen = {name: {"joint": a, "x": b, "y": noise} for name, a, b in (("good", good, fair), ("bad", fair, good))}
    found = {name: measure(scores, labels, pairs, seed=0, first="joint") for name, scores in seen.items()}
    assert verdict(found["good"], "joint") == BETTER
    assert verdict(found["bad"], "joint") == NO_BETTER
    assert verdict(None, "joint") == NOT_MEASURED


def test_where_no_resample_has_both_labels_there_is_no_interval_and_nothing_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(figures, "resampled_weights", lambda pairs, seed: iter([np.array([1.0, 0.0])] * 3))
    scores = {"joint": np.array([1.0, -1.0]), "x": np.array([-1.0, 1.0])}
    found = measure(scores, np.array([1, 0]), np.array([[0, 1], [2, 3]]), seed=0, first="joint")
    assert json.dumps(found, allow_nan=False)
    assert verdict(found, "joint") == NO_BETTER
    joint, other = found["systems"].values()
    assert (with_interval(joint, "auroc"), ahead(joint), ahead(other)) == ("1.000", "", "")


def test_precision_per_protein_gives_nothing_for_popular_proteins() -> None:
    rng = np.random.default_rng(0)
    popular = rng.random(60)
    pairs = np.array(list(itertools.combinations(range(60), 2)))
    labels = (rng.random(len(pairs)) < popular[pairs].prod(1)).astype(np.int64)
    constant = per_protein(np.zeros(len(pairs)), labels, pairs)
    assert constant is not None
    assert constant["aupr"] == pytest.approx(constant["base_rate"])


def test_calibration_compares_what_was_said_with_what_came_true() -> None:
    rng = np.random.default_rng(0)
    said = rng.random(20_000)
    true = (rng.random(20_000) < said).astype(np.int64)
    assert calibration(said, true)["error"] < 0.02
    assert calibration(said**3, true)["error"] > 0.1
