"""`performers benchmark family` on families made up of bundled proteins."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from performers.benchmarks.families import Families, prepare_families, read_by_profile
from performers.benchmarks.family import FamilySettings, measure_family, tables
from performers.benchmarks.family_figures import accuracies, agreements, verdicts
from performers.data import STANDARD_RESIDUES, Record, read_fasta
from performers.errors import InputError
from performers.tools.agreement import spearman
from performers.tools.blosum import blosum62

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
    texts = [row["text"] for row in verdicts(cells, 0)]
    assert "its own family above no context (+0.4000" in texts[0]
    assert "its own family undecided against a wrong family" in texts[1]
    assert "a wrong family above no context (+0.4000" in texts[2]
    assert accuracies(cells, 0)[1]["accuracy"] == 0.5


def test_correlations_are_of_the_variants_that_all_have_scored_and_compared_in_pairs() -> None:
    draw = random.Random(0)
    truth = [draw.gauss(0, 1) for _ in range(200)]

    def cell(context: str, noise: float, rows: int) -> dict[str, Any]:
        scores = [value + draw.gauss(0, noise) for value in truth[:rows]]
        found = {"rows": list(range(rows)), "scores": scores, "measured": truth[:rows]}
        return {"model": "m", "context": context, **found}

    cells = [cell("none", 1.0, 200), cell("own", 0.1, 190), cell("wrong", 1e9, 200)]
    cells.append({**cells[0], "model": "flat", "scores": [1.0] * 200})
    rows, gains = agreements(cells, 0)
    assert {row["variants"] for row in rows} == {190}
    for row, one in zip(rows[:3], cells, strict=False):
        expected = spearman(np.array(one["scores"][:190]), np.array(truth[:190]))
        assert row["spearman"] == pytest.approx(expected)
        assert row["interval"][0] < row["spearman"] < row["interval"][1]
    assert np.isnan(rows[3]["spearman"])
    assert rows[3]["interval"] is None
    assert [gain["text"].split(" (")[0] for gain in gains] == [
        "m: its own family above no context",
        "m: its own family above a wrong family",
        "m: a wrong family below no context",
    ]
    assert gains[0]["gain"] == pytest.approx(rows[1]["spearman"] - rows[0]["spearman"])
    # In pairs, what two scores share is no part of the uncertainty.
    again = [cells[0], {**cells[0], "context": "own", "scores": [value + 1e-12 for value in cells[0]["scores"]]}]
    assert agreements(again, 0)[1][0]["interval"] == pytest.approx([0, 0], abs=1e-6)
    assert agreements([], 0) == ([], [])


def test_an_assay_alone_is_scored_with_its_family_a_wrong_one_and_by_what_reads_no_model(tmp_path: Path) -> None:
    pytest.importorskip("pyhmmer")
    settings = FamilySettings.of_size(
        True, **TINY, systems=("performer-relu",), threads=1, targets=0, **assay_files(tmp_path)
    )
    report = measure_family(settings, tmp_path / "out", quick=True)
    assert report["accuracy"] == []
    found = {(row["model"], row["context"]): row for row in report["assays"]}
    contexts = [("Performer-relu", context) for context in ("none", "own", "wrong")]
    assert [*found] == [*contexts, ("BLOSUM62", "none"), ("profile HMM of the context", "own")]
    scores = [tuple(cell["scores"]) for cell in report["cells"] if cell.get("model") == "Performer-relu"]
    assert len({*scores}) == len(scores) == 3
    # The measurements are BLOSUM62's own numbers, and one row measures nothing.
    assert found["BLOSUM62", "none"]["spearman"] == pytest.approx(1)
    assert {row["variants"] for row in report["assays"]} == {12}
    assert report["relatives"] == 5
    assert len(report["assay_verdicts"]) == 3
    (correlations, verdicts_of) = tables(report)
    assert "5 relatives" in correlations[0]
    assert len(verdicts_of[2]) == 3


def assay_files(folder: Path) -> dict[str, str]:
    parent = next(record.sequence for record in read_fasta("bundled:test") if 80 < len(record.sequence) < 120)
    relatives = [parent[:at] + ("C" if parent[at] != "C" else "D") + parent[at + 1 :] for at in range(5)]
    rows = [f"{parent[at]}{at + 1}{new},{blosum_of(parent[at], new)}" for at in (5, 9) for new in other(parent[at])]
    for name, text in (
        ("wild-type.fasta", f">w\n{parent}\n"),
        ("homologs.fasta", "".join(f">{at}\n{one}\n" for at, one in enumerate([parent, *relatives]))),
        ("assay.csv", "\n".join(["mutant,DMS_score", *rows, f"{parent[3]}4{other(parent[3])[0]},"]) + "\n"),
    ):
        (folder / name).write_text(text)
    names = {"assay": "assay.csv", "wild_type": "wild-type.fasta", "homologs": "homologs.fasta"}
    return {option: str(folder / name) for option, name in names.items()}


def blosum_of(old: str, new: str) -> float:
    return float(blosum62()[STANDARD_RESIDUES.index(old), STANDARD_RESIDUES.index(new)])


def other(own: str) -> str:
    return "".join(letter for letter in "ACDEFGHK" if letter != own)[:6]


def test_an_assay_that_cannot_be_scored_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    files = assay_files(tmp_path)
    two = tmp_path / "two.fasta"
    two.write_text(">a\nMKTA\n>b\nMKTAY\n")
    many = tmp_path / "many.fasta"
    many.write_text("".join(f">{number}\nMKTA{'Y' * number}\n" for number in range(1, 40)))
    for given, message in (
        ({"wild_type": str(two)}, "has 2 proteins; expected one"),
        ({"homologs": files["wild_type"]}, "no protein besides the wild type"),
        ({"homologs": str(many)}, "that are not among the 39 relatives: expected as many"),
        ({"assay": str(tmp_path / "plain.csv")}, "DMS_score"),
    ):
        (tmp_path / "plain.csv").write_text("mutant\nM1A\n")
        settings = FamilySettings.of_size(True, **TINY, targets=0, **{**files, **given})
        with pytest.raises(InputError, match=message):
            measure_family(settings, tmp_path / "out", quick=True)
    assert not list((tmp_path / "out").glob("runs/*"))


def test_a_wrong_family_has_as_many_proteins_as_the_own_one(made_up: Families) -> None:
    own = made_up.held_out[0]
    wrong = made_up.unlike(own, 7)
    assert len(wrong) == 7
    assert not {record.sequence for record in wrong} & {record.sequence for record in own}
    with pytest.raises(InputError, match="have 8 proteins"):
        made_up.unlike(own, 9)


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
        ({"targets": 0}, "nothing to measure but an assay"),
        ({"systems": ("unknown",)}, "unknown"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FamilySettings.of_size(True, **given)


def test_real_families_are_asked_for_outside_quick_settings() -> None:
    with pytest.raises(InputError, match="are needed"):
        FamilySettings.of_size(False)
