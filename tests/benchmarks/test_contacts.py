"""Precision of contacts: the figures are what they are called, and the report says what is above the prior."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
from performers.benchmarks import experiment
from performers.benchmarks.contacts import ContactSettings, measure_contacts, precisions, tables
from performers.errors import InputError
from performers.tools import LanguageModel
from performers.tools.contact_regression import Regression


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"num_features": 8})).save_pretrained(path)
    PerformerTokenizer().save_pretrained(path)
    return path


def test_precision_is_the_share_of_contacts_among_the_best_of_a_range() -> None:
    generator = np.random.default_rng(0)
    length = 60
    scores = generator.normal(size=(length, length))
    contacts = generator.random((length, length)) < 0.2
    contacts |= contacts.T
    found = precisions(contacts, scores)
    for name, least, most in (("all", 6, 10**6), ("medium", 12, 24), ("long", 24, 10**6)):
        pairs = [(i, j) for i in range(length) for j in range(i + 1, length) if least <= j - i < most]
        best = sorted(pairs, key=lambda pair: -scores[pair])
        for measure, count in (("P@L", 60), ("P@L/5", 12)):
            assert found[f"{name} {measure}"] == pytest.approx(np.mean([contacts[pair] for pair in best[:count]]))


def test_equal_scores_stand_in_all_orders_at_once() -> None:
    generator = np.random.default_rng(0)
    contacts = np.triu(generator.random((40, 40)) < 0.3)
    i, j = np.triu_indices(40, 24)
    assert precisions(contacts, np.zeros((40, 40)))["long P@L"] == pytest.approx(contacts[i, j].mean())
    # Ten pairs first, of which four are contacts; the other 30 of 40 are as all the rest.
    scores = np.zeros((40, 40))
    contacts[0, 30:40] = np.arange(10) < 4
    scores[0, 30:40] = 1
    rest = (contacts[i, j].sum() - 4) / (len(i) - 10)
    assert precisions(contacts, scores)["long P@L"] == pytest.approx((4 + 30 * rest) / 40)


def test_the_report_has_a_row_for_each_system_and_range(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    settings = ContactSettings.of_size(
        True, model=str(folder), systems=("attention", "separation", "random"), chains=3, device="cpu", threads=1
    )
    report = measure_contacts(settings, tmp_path / "out", quick=True)
    assert [(row["system"], row["range"]) for row in report["rows"]] == [
        (system, name) for system in ("attention", "separation", "random") for name in ("all", "medium", "long")
    ]
    by_name = {(row["system"], row["range"]): row for row in report["rows"]}
    # Even on few chains what touches depends on the separation, and a model that was never trained knows no more than that.
    assert by_name["separation", "all"]["P@L"] > by_name["random", "all"]["P@L"]
    for row in report["rows"]:
        low, high = row["P@L interval"]
        assert low <= row["P@L"] <= high
        assert row["chains"] == 3
    difference = by_name["attention", "long"]["P@L above separation"]
    expected = by_name["attention", "long"]["P@L"] - by_name["separation", "long"]["P@L"]
    assert difference == pytest.approx(expected)
    ((_, header, rows),) = tables(report)
    assert all(len(row) == len(header) for row in rows)
    assert (tmp_path / "out" / "contacts.png").read_bytes().startswith(b"\x89PNG")
    # The regression that was used is there, to go beside the weights.
    fitted = Regression.load(tmp_path / "out" / "contact-regression.json", LanguageModel.open(folder, device="cpu"))
    assert len(fitted.chains) == 20


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(InputError, match="expected some of attention"):
        ContactSettings.of_size(True, systems=("attention", "oracle"))
