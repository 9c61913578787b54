"""`performers benchmark family` on families made up of bundled proteins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from performers.benchmarks.families import Families, prepare_families, read_by_profile
from performers.benchmarks.family import FamilySettings, accuracies, measure_family, tables, verdicts
from performers.data import Record, read_fasta
from performers.errors import InputError

TINY: dict[str, Any] = {"d": 16, "heads": 2, "layers": 1, "d_ff": 16, "steps": 2, "families": 3, "context": 256}


def test_own_none_and_wrong_are_measured_for_each_system(tmp_path: Path) -> None:
    settings = FamilySettings.of_size(True, **TINY, systems=("performer-relu", "transformer"), threads=1)
    report = measure_family(settings, tmp_path / "out", quick=True)
    rows = {(row["model"], row["context"]): row for row in report["accuracy"]}
    for model in ("Performer-relu", "Transformer"):
        assert len({rows[model, context]["residues"] for context in ("none", "own", "wrong")}) == 1
        assert len({rows[model, context]["perplexity"] for context in ("none", "own", "wrong")}) == 3
    assert {(row["model"], row["against"]) for row in report["verdicts"]} >= {
        ("Performer-relu", "none"),
        ("Performer-relu", "wrong"),
    }
    assert tables(report)
    assert any("figures mean nothing" in note for note in report["notes"])
    # Trained and measured once: the same command only shows.
    again = measure_family(settings, tmp_path / "out", quick=True)
    assert again["accuracy"] == report["accuracy"]


def test_held_out_families_are_not_trained_on_and_share_nothing(tmp_path: Path) -> None:
    families = prepare_families(tmp_path, (), None, held_out=(), families=5, members=4, max_length=500, seed=0)
    from performers.data import Corpus

    assert families.proteins is not None
    trained = {record.id.split(".")[0] for record in Corpus.open(families.proteins.train).records()}
    validated = {record.id.split(".")[0] for record in read_fasta(families.proteins.validation)}
    held_out = [{record.id.split(".")[0] for record in members} for members in families.held_out]
    assert len(held_out) == 5
    assert all(len(names) == 1 for names in held_out)
    assert not set.union(*held_out) & (trained | validated)
    assert not trained & validated
    assert all(families.wrong(number) != number for number in range(5))


def test_a_gain_is_stated_only_where_its_interval_says_so() -> None:
    def cell(context: str, right: list[int]) -> dict[str, Any]:
        return {"model": "m", "context": context, "right": right, "residues": [50] * 20, "loss": [100.0] * 20}

    cells = [cell("none", [5] * 20), cell("own", [25] * 20), cell("wrong", [24, 26] * 10)]
    texts = {row["against"]: row["text"] for row in verdicts(cells, 0)}
    assert "own context above no context (+0.4000" in texts["none"]
    assert "undecided against a wrong family" in texts["wrong"]
    assert accuracies(cells, 0)[1]["accuracy"] == 0.5


def test_a_profile_of_the_family_predicts_its_members(made_up: Families) -> None:
    pytest.importorskip("pyhmmer")
    own, wrong = (read_by_profile(made_up, context, 2, 0) for context in ("own", "wrong"))
    assert own["residues"] == wrong["residues"]
    assert sum(own["right"]) > 0.8 * sum(own["residues"])
    assert sum(wrong["right"]) < 0.5 * sum(wrong["residues"])


@pytest.fixture
def made_up() -> Families:
    parents = [record.sequence for record in read_fasta("bundled:test") if 80 < len(record.sequence) < 120][:3]

    def copies(parent: str) -> list[Record]:
        return [Record("", "", parent[:at] + "A" + parent[at + 1 :], 0) for at in (3, 20, 40, 60)]

    return Families("", None, "", [copies(parent) for parent in parents])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": ["x.fasta"]}, "belong together"),
        ({"families": 1}, "at least two families"),
        ({"targets": 9}, "as many targets"),
        ({"assay": "x.csv"}, "--homologs belong together"),
        ({"systems": ("unknown",)}, "unknown"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FamilySettings.of_size(True, **given)


def test_real_families_are_asked_for_outside_quick_settings() -> None:
    with pytest.raises(InputError, match="are needed"):
        FamilySettings.of_size(False)
