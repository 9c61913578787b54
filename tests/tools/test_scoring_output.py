"""What `score` leaves: pictures, sizes as predicted, a methods text of what was done, and what is refused before the work."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from performers.data import STANDARD_RESIDUES, FastaReport
from performers.errors import InputError
from performers.tools import LanguageModel, score_to
from performers.tools.scorer import Scorer, Sheet
from performers.tools.tool import all_results_of

WILD_TYPE = "MKTAYIAKQRQISFVK"
GYM = "DMS_id,DMS_filename,target_seq\nfirst,one.csv,MKTAY\nsecond,two.csv,WWCAK\n"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def gym(folder: Path, one: str, two: str) -> str:
    folder.mkdir()
    for name, text in (("one.csv", one), ("two.csv", two)):
        (folder / name).write_text(f"mutant,mutated_sequence,DMS_score\n{text}")
    (folder / "reference.csv").write_text(GYM)
    return str(folder)


@pytest.mark.parametrize("strategy", ["likelihood", "pseudo-ppl"])
def test_a_saturation_by_whole_sequences_is_drawn_like_one_by_marginals(
    masked: Path, tmp_path: Path, strategy: Any
) -> None:
    model = LanguageModel.open(masked, device="cpu")
    tool = Scorer(model, lambda _: [Sheet((("a", "MKXA"),), None)], strategy=strategy)
    [(_, readings, scores)] = tool.scores(all_results_of(tool, tool.items(FastaReport())))
    found = readings.log_odds(0)
    assert found.shape == (4, 20)
    saturated = list(scores)
    for score in saturated:
        assert score.score == found[int(score.mutant[1:-1]) - 1, STANDARD_RESIDUES.index(score.mutant[-1])]
        assert score.percentile is not None
    assert len(saturated) == np.count_nonzero(found) == 3 * 19 + 20
    score_to(tmp_path / "s.csv", "MKTA", masked, strategy=strategy, device="cpu")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_named_variants_by_whole_sequences_have_no_percentile_and_no_picture(masked: Path, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("mutant\nK2R\nWT\n")
    options: dict[str, Any] = {"variants": str(tmp_path / "v.csv"), "strategy": "pseudo-ppl", "device": "cpu"}
    outcome = score_to(tmp_path / "s.csv", WILD_TYPE, masked, **options)
    assert [row["percentile"] for row in rows_of(tmp_path / "s.csv")] == ["", ""]
    assert not (tmp_path / "s.png").exists()
    assert outcome.figures["percentiles"] is False


@pytest.mark.parametrize(("strategy", "length"), [("masked-marginals", 22), ("wt-marginals", 300), ("likelihood", 22)])
def test_a_saturation_takes_about_the_bytes_that_were_predicted(
    masked: Path, tmp_path: Path, strategy: Any, length: int
) -> None:
    wild_type = (WILD_TYPE * 20)[:length]
    options: dict[str, Any] = {"strategy": strategy, "device": "cpu"}
    predicted = score_to(tmp_path / "s.csv", wild_type, masked, dry_run=True, **options).estimate["bytes"]
    score_to(tmp_path / "s.csv", wild_type, masked, **options)
    actual = sum((tmp_path / name).stat().st_size for name in ("s.csv", "s.png"))
    assert 0.7 < predicted / actual < 1.5


def test_a_table_takes_about_the_bytes_that_were_predicted(masked: Path, tmp_path: Path) -> None:
    rows = [f"K2R,{number},a note of some length that has to be copied" for number in range(2000)]
    (tmp_path / "v.csv").write_text("mutant,number,note\n" + "\n".join(rows) + "\n")
    options: dict[str, Any] = {"variants": str(tmp_path / "v.csv"), "heat_map": False, "device": "cpu"}
    predicted = score_to(tmp_path / "s.csv", WILD_TYPE, masked, dry_run=True, **options).estimate["bytes"]
    score_to(tmp_path / "s.csv", WILD_TYPE, masked, **options)
    assert 0.8 < predicted / (tmp_path / "s.csv").stat().st_size < 1.2


@pytest.mark.parametrize(
    ("variants", "options", "said", "not_said"),
    [
        (None, {}, ["by itself", "percentiles", "Meier"], ["stripes"]),
        (None, {"stripes": 4}, ["its residues being masked in 4 stripes (j, j + 4, j + 8 and"], ["16", "by itself"]),
        (None, {"strategy": "wt-marginals"}, ["nothing being masked", "percentiles", "Meier"], ["stripes"]),
        ("K2R", {"strategy": "pseudo-ppl"}, ["by itself", "pseudo-log-likelihood", "Meier"], ["percentiles"]),
        ("K2R", {"strategy": "likelihood"}, ["nothing being masked", "mean log-likelihood"], ["percentiles", "Meier"]),
    ],
)
def test_the_methods_are_two_sentences_about_what_was_done(
    masked: Path, tmp_path: Path, variants: str | None, options: dict[str, Any], said: list[str], not_said: list[str]
) -> None:
    if variants is not None:
        (tmp_path / "v.csv").write_text(f"mutant\n{variants}\n")
        options = {**options, "variants": str(tmp_path / "v.csv")}
    score_to(tmp_path / "s.csv", WILD_TYPE, masked, device="cpu", heat_map=False, **options)
    text = (tmp_path / "methods.txt").read_text()
    assert len(re.findall(r"\.(?=\s)", text)) == 2
    assert "not for clinical use" in text
    for words in said:
        assert words in text
    for words in not_said:
        assert words not in text


def test_what_failed_is_counted_in_variants_and_what_was_used_is_cited(
    masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v.csv").write_text("mutant\nK2R\nA2R\nK2W\n")
    score_to(tmp_path / "s.csv", WILD_TYPE, masked, variants=str(tmp_path / "v.csv"), device="cpu")
    assert "1 of 3 variants failed" in capsys.readouterr().err
    cited = (tmp_path / "cite.bibtex").read_text()
    assert "choromanski2021rethinking" in cited
    assert "meier2021language" in cited


def test_the_references_are_those_that_the_methods_name(masked: Path, causal: Path) -> None:
    def sheets(_: FastaReport) -> list[Sheet]:
        return []

    assert "meier2021language" in Scorer(LanguageModel.open(masked, device="cpu"), sheets).references
    assert Scorer(LanguageModel.open(causal, device="cpu"), sheets).references == ""


def test_one_assay_with_insertions_does_not_decide_for_the_others(masked: Path, tmp_path: Path) -> None:
    folder = gym(tmp_path / "gym", "K2W,MWTAY,1\nT3A,MKAAY,2\n", "x,WWCGGAK,1\nW1A,AWCAK,2\n")
    outcome = score_to(tmp_path / "out", None, masked, proteingym=folder, device="cpu")
    assert outcome.figures["strategy"] == "masked-marginals, pseudo-ppl"
    assert outcome.failed == []
    assert {row["assay"]: row["strategy"] for row in rows_of(tmp_path / "out" / "agreement.csv")} == {
        "first": "masked-marginals",
        "second": "pseudo-ppl",
    }
    score_to(tmp_path / "s.csv", "MKTAY", masked, variants=f"{folder}/one.csv", device="cpu")
    first, alone = rows_of(tmp_path / "out" / "first.csv"), rows_of(tmp_path / "s.csv")
    assert [row["score"] for row in first] == [row["score"] for row in alone]
    assert all(row["percentile"] for row in first)
    assert (tmp_path / "out" / "first.png").exists()
    assert not (tmp_path / "out" / "second.png").exists()


def test_a_measurement_that_is_no_number_is_refused_with_its_assay(masked: Path, tmp_path: Path) -> None:
    folder = gym(tmp_path / "gym", "K2W,MWTAY,1\n", "W1A,AWCAK,x\n")
    with pytest.raises(InputError, match=r"two\.csv, row 1: DMS_score is 'x'"):
        score_to(tmp_path / "out", None, masked, proteingym=folder, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["gym"]


@pytest.mark.parametrize("name", ["s", "s.xlsx", "s.tsv", "s.csv.gz"])
def test_scores_are_written_to_csv_and_to_nothing_else(masked: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"ends in \.csv"):
        score_to(tmp_path / name, WILD_TYPE, masked, device="cpu")


@pytest.mark.parametrize("strategy", ["wt-marginals", "pseudo-ppl", "likelihood"])
def test_stripes_are_not_checked_where_there_are_none(masked: Path, tmp_path: Path, strategy: Any) -> None:
    with pytest.raises(InputError, match=f"check-stripes is 4: .* {strategy}"):
        score_to(tmp_path / "s.csv", WILD_TYPE, masked, strategy=strategy, check_stripes=4, device="cpu")


def test_wild_types_that_are_left_out_leave_the_others(masked: Path, tmp_path: Path) -> None:
    folder = gym(tmp_path / "gym", "K2W,MWTAY,1\n", "W1A,AWCAK,2\n")
    (tmp_path / "gym" / "reference.csv").write_text(GYM.replace("WWCAK", "WW1AK"))
    outcome = score_to(tmp_path / "out", None, masked, proteingym=folder, on_invalid="skip", device="cpu")
    assert outcome.figures["statuses"] == {"ok": 1}
    assert not (tmp_path / "out" / "second.csv").exists()
    (tmp_path / "w.fasta").write_text(">bad\nWW1\n")
    with pytest.raises(InputError):
        score_to(
            tmp_path / "s.csv",
            str(tmp_path / "w.fasta"),
            masked,
            variants=f"{folder}/two.csv",
            on_invalid="skip",
            device="cpu",
        )
