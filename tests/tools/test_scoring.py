"""Scores of variants: their definition by hand, every status, long proteins in stripes, and agreement with measurements."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score, roc_auc_score

from performers import PerformerForMaskedLM, PerformerTokenizer
from performers.data import RESIDUES, STANDARD_RESIDUES, read_fasta
from performers.errors import InputError, UnsupportedError
from performers.tools import LanguageModel, Score, readings, score, score_to, scorer
from performers.tools.agreement import agreement, auc, ndcg, spearman, spearman_interval
from performers.tools.language_model import Reading
from performers.tools.tool import Tool
from performers.tools.variants import parse_variant

Folders = Callable[[str], Path]
Start = Callable[..., BaseProcess]
WILD_TYPE = "MKTAYIAKQRQISFVK"


@pytest.fixture(scope="module")
def model(masked: Path) -> LanguageModel:
    return LanguageModel.open(masked, device="cpu")


def stock_log_probabilities(folder: Path, sequence: str, masked: list[int]) -> np.ndarray:
    """(L, vocabulary) by the stock classes, with these residues masked."""
    model, tokenizer = PerformerForMaskedLM.from_pretrained(folder).eval(), PerformerTokenizer()
    ids = tokenizer(sequence, return_tensors="pt")["input_ids"]
    for position in masked:
        ids[0, position + 1] = tokenizer.mask_token_id
    with torch.inference_mode():
        return torch.log_softmax(model(ids).logits[0, 1:-1].float(), -1).numpy()


def token(letter: str) -> int:
    return PerformerTokenizer().convert_tokens_to_ids(letter)


def one(variant: str, model: Any, **options: Any) -> Score:
    (found,) = score(WILD_TYPE, [variant], model, device="cpu", **options)
    return found


def test_a_masked_marginal_is_the_log_odds_at_the_masked_position(masked: Path, model: LanguageModel) -> None:
    expected = 0.0
    for position, old, new in ((1, "K", "W"), (4, "Y", "A")):
        table = stock_log_probabilities(masked, WILD_TYPE, [position])
        expected += table[position, token(new)] - table[position, token(old)]
    found = one("K2W:Y5A", model)
    assert (found.status, found.mutations) == ("ok", 2)
    assert found.score == pytest.approx(expected, abs=1e-5)
    assert one("Y5A:K2W", model).score == found.score


def test_a_wild_type_marginal_masks_nothing(masked: Path, model: LanguageModel) -> None:
    table = stock_log_probabilities(masked, WILD_TYPE, [])
    found = one("K2W", model, strategy="wt-marginals")
    assert found.score == pytest.approx(table[1, token("W")] - table[1, token("K")], abs=1e-5)


def test_pseudo_perplexity_masks_every_residue_of_the_mutated_sequence(masked: Path, model: LanguageModel) -> None:
    def total(sequence: str) -> float:
        tables = [stock_log_probabilities(masked, sequence, [i])[i, token(sequence[i])] for i in range(len(sequence))]
        return float(np.sum(tables))

    mutated = "MWTAYIAKQRQISFVK"
    found = one("K2W", model, strategy="pseudo-ppl")
    assert found.score == pytest.approx(total(mutated) - total(WILD_TYPE), abs=1e-4)
    assert found.percentile is None


def test_a_causal_likelihood_is_the_sum_over_residues_given_those_before(causal: Path) -> None:
    model = LanguageModel.open(causal, device="cpu")

    def total(sequence: str) -> float:
        reading = dict(model.read([model.row([sequence])], log_probabilities=True))[0]
        assert isinstance(reading, Reading)
        assert reading.log_probabilities is not None
        pairs = zip(reading.log_probabilities, sequence, strict=True)
        return float(sum(row[RESIDUES.index(letter)] for row, letter in pairs))

    found = one("K2W", model)
    assert found.score == pytest.approx(total("MWTAYIAKQRQISFVK") - total(WILD_TYPE), abs=1e-4)
    with pytest.raises(UnsupportedError, match="causal"):
        one("K2W", model, strategy="masked-marginals")


def test_insertions_and_deletions_are_scored_by_their_sequence(model: LanguageModel, tmp_path: Path) -> None:
    rows = [WILD_TYPE[:5] + "GGG" + WILD_TYPE[5:], WILD_TYPE[:5] + WILD_TYPE[7:], WILD_TYPE, "MWTAYIAKQRQISFVK"]
    table = tmp_path / "v.csv"
    table.write_text("mutated_sequence\n" + "\n".join(rows) + "\n")
    found = list(score(WILD_TYPE, table, model, device="cpu"))
    assert [variant.status for variant in found] == ["ok", "ok", "synonymous", "ok"]
    assert all(variant.score is not None and np.isfinite(variant.score) for variant in found)
    assert found[3].score == pytest.approx(one("K2W", model, strategy="pseudo-ppl").score, abs=1e-4)
    by_marginals = list(score(WILD_TYPE, table, model, device="cpu", strategy="masked-marginals"))
    assert [variant.status for variant in by_marginals] == ["indel", "indel", "synonymous", "ok"]
    assert "substitutions only" in by_marginals[0].reason


@pytest.mark.parametrize(
    ("mutant", "mutated", "status", "words"),
    [
        ("K2W", "", "ok", ""),
        ("k2w", "", "ok", ""),
        ("p.Lys2Trp", "", "ok", ""),
        ("NP_0001.1:p.(Lys2Trp)", "", "ok", ""),
        ("p.[Lys2Trp;Tyr5Ala]", "", "ok", ""),
        ("K2W,Y5A", "", "ok", ""),
        ("K2K", "", "synonymous", ""),
        ("p.Lys2=", "", "synonymous", ""),
        ("WT", "", "synonymous", ""),
        ("K2*", "", "stop", "stop"),
        ("p.Lys2Ter", "", "stop", "stop"),
        ("K2W:Y5*", "", "stop", "stop"),
        ("A2W", "", "wrong wild type", "residue 2 of the wild type is K"),
        ("K99W", "", "out of range", "residues 1 to 16"),
        ("K0W", "", "out of range", "residues 1 to 16"),
        ("K-3W", "", "out of range", "residues 1 to 16"),
        ("K2W:K2A", "", "malformed", "twice"),
        ("K2J", "", "malformed", "not a substitution"),
        ("2W", "", "malformed", "not a substitution"),
        ("", "", "malformed", "neither"),
        ("rubbish\n", "", "malformed", "not a substitution"),
        ("K99999999999999999999W", "", "malformed", "not a substitution"),
        ("p.Lys2del", "", "indel", "mutated_sequence"),
        ("p.Lys2_Thr3insGln", "", "indel", "mutated_sequence"),
        ("p.Lys2fs", "", "indel", "mutated_sequence"),
        ("", "mwtayiakqrqisfvk", "ok", ""),
        ("anything", "MWTAYIAKQRQISFVK", "ok", ""),
        ("K2W", "MWTAYIAKQRQISFVK", "ok", ""),
        ("K2A", "MWTAYIAKQRQISFVK", "malformed", "not what K2A makes"),
        ("", "MWTAYIAKQRQISFVK*", "ok", ""),
        ("", "MWT*AYIA", "stop", "stop"),
        ("", "MW1", "malformed", "'1'"),
    ],
)
def test_every_variant_has_one_status(mutant: str, mutated: str, status: str, words: str) -> None:
    variant = parse_variant(WILD_TYPE, mutant, mutated)
    assert variant.status == status
    assert words in variant.reason
    if status == "ok":
        assert variant.apply(WILD_TYPE)[1] == "W"


def test_the_first_residue_has_the_number_that_is_said() -> None:
    assert parse_variant(WILD_TYPE, "K1W", offset_idx=0).apply(WILD_TYPE)[1] == "W"
    assert parse_variant(WILD_TYPE, "K26W", offset_idx=25).apply(WILD_TYPE)[1] == "W"
    assert parse_variant(WILD_TYPE, "K1W").status == "wrong wild type"


def test_saturation_has_every_substitution_once_and_percentiles_are_among_them(model: LanguageModel) -> None:
    found = list(score(WILD_TYPE, None, model, device="cpu"))
    assert len(found) == 19 * len(WILD_TYPE)
    assert len({variant.mutant for variant in found}) == len(found)
    by_score = sorted(found, key=lambda variant: variant.score or 0)
    percentiles = [variant.percentile for variant in by_score]
    assert percentiles == sorted(percentiles)  # pyright: ignore[reportArgumentType]
    assert 0 < percentiles[0] < 1  # pyright: ignore[reportOptionalOperand]
    single = one(by_score[100].mutant, model)
    assert single.score == pytest.approx(by_score[100].score, abs=1e-6)
    assert single.percentile == pytest.approx(by_score[100].percentile)


def test_saturation_by_whole_sequences_has_percentiles_too(causal: Path) -> None:
    found = list(score("MKTA", None, causal, device="cpu"))
    assert len(found) == 76
    assert sorted(round(v.percentile or 0, 3) for v in found)[0] == pytest.approx(100 * 0.5 / 76, abs=1e-3)


def test_long_proteins_are_masked_in_stripes(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "LONGEST_WITHOUT_STRIPES", 40)
    long = WILD_TYPE * 3
    read: list[int] = []
    real = LanguageModel.read

    def counted(self: LanguageModel, rows: Any, **options: Any) -> Any:
        read.append(len(rows))
        return real(self, rows, **options)

    monkeypatch.setattr(LanguageModel, "read", counted)
    striped = list(score(long, ["K2W", "Y37A"], model))
    assert sum(read) == 16
    # A stripe masks residues 1, 17 and 33 together.
    table = stock_log_probabilities(model.folder, long, [1, 17, 33])
    assert striped[0].score == pytest.approx(table[1, token("W")] - table[1, token("K")], abs=1e-5)
    read.clear()
    list(score(long, ["K2W"], model, stripes=0))
    assert sum(read) == 48


def test_stripes_agree_with_single_masks_as_far_as_is_measured(model: LanguageModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "stripes": 8, "check_stripes": 6}
    outcome = score_to(tmp_path / "s.csv", WILD_TYPE * 4, str(model.folder), **options)
    assert -1 <= outcome.figures["stripes_agreement"]["spearman"] <= 1
    alone = {v.mutant: v.score for v in score(WILD_TYPE * 4, None, model, stripes=0)}
    striped = {v.mutant: v.score for v in score(WILD_TYPE * 4, None, model, stripes=8)}
    positions = np.linspace(0, 63, 6).astype(int) + 1
    chosen = [name for name in alone if int(name[1:-1]) in positions]
    expected = spearmanr([striped[name] for name in chosen], [alone[name] for name in chosen])[0]
    assert outcome.figures["stripes_agreement"]["spearman"] == pytest.approx(expected, abs=0.05)  # its wild types tie


def test_confidence_is_low_where_the_model_knows_no_more_than_frequencies(masked: Path) -> None:
    model = LanguageModel.open(masked, device="cpu")
    assert one("K2W", model).low_confidence is False
    stock = model._model
    stock.lm_head.weight = torch.nn.Parameter(torch.zeros_like(stock.lm_head.weight))
    bias = torch.full((stock.config.vocab_size,), -30.0)
    for letter, share in zip(STANDARD_RESIDUES, readings.BACKGROUND, strict=True):
        bias[token(letter)] = float(np.log(share))
    stock.lm_head.bias = torch.nn.Parameter(bias)
    for strategy in scorer.STRATEGIES:
        assert one("K2W", model, strategy=strategy).low_confidence is True


def test_the_background_is_that_of_real_proteins() -> None:
    counts = np.zeros(20)
    for record in read_fasta("bundled:train"):
        counts += [record.sequence.count(letter) for letter in STANDARD_RESIDUES]
    frequencies = counts / counts.sum()
    assert float((frequencies * np.log(frequencies / readings.BACKGROUND)).sum()) < 0.01


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_output_has_a_row_for_every_row_of_the_input(masked: Path, tmp_path: Path) -> None:
    mutants = ["K2W", "K2W", "A2W", "K99W", "K2*", "nonsense", "K2K", "p.Tyr5Ala", "p.Lys2del"]
    (tmp_path / "v.csv").write_text("score,mutant,note\n" + "".join(f'{i},{m},"a, b"\n' for i, m in enumerate(mutants)))
    outcome = score_to(tmp_path / "out.csv", WILD_TYPE, masked, variants=str(tmp_path / "v.csv"), device="cpu")
    found = rows_of(tmp_path / "out.csv")
    assert [row["mutant"] for row in found] == mutants
    assert [row["input_score"] for row in found] == [str(i) for i in range(len(mutants))]
    assert {row["note"] for row in found} == {"a, b"}
    statuses = ["ok", "ok", "wrong wild type", "out of range", "stop", "malformed", "synonymous", "ok", "indel"]
    assert [row["status"] for row in found] == statuses
    assert [bool(row["score"]) for row in found] == [status in ("ok", "synonymous") for status in statuses]
    assert found[0]["score"] == found[1]["score"]
    assert float(found[6]["score"]) == 0
    assert 0 <= float(found[0]["percentile"]) <= 100
    # What is wrong with the input is a failure; a stop or a synonymous variant is not.
    assert [number for number, _, _ in outcome.failed] == [3, 4, 6, 9]
    assert (tmp_path / "failed.tsv").read_text().count("\n") == 5
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "not for clinical use" in (tmp_path / "methods.txt").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["results"]["figures"]["statuses"]["ok"] == 3


def test_several_wild_types_share_a_table(masked: Path, tmp_path: Path) -> None:
    (tmp_path / "w.fasta").write_text(">a\nMKTAY\n>b\nWWCAK\n")
    (tmp_path / "v.tsv").write_text("id\tmutant\nb\tW1A\na\tM1A\nc\tM1A\n")
    (tmp_path / "none.csv").write_text("mutant\nM1A\n")
    sources = {"variants": str(tmp_path / "v.tsv"), "device": "cpu"}
    score_to(tmp_path / "out.csv", str(tmp_path / "w.fasta"), masked, **sources)
    found = rows_of(tmp_path / "out.csv")
    assert [row["status"] for row in found] == ["ok", "ok", "malformed"]
    (alone,) = score("WWCAK", ["W1A"], masked, device="cpu")
    assert float(found[0]["score"]) == pytest.approx(alone.score, abs=1e-5)
    with pytest.raises(InputError, match="no column 'id'"):
        score_to(tmp_path / "n.csv", str(tmp_path / "w.fasta"), masked, variants=str(tmp_path / "none.csv"))
    score_to(tmp_path / "all.csv", str(tmp_path / "w.fasta"), masked, device="cpu")
    assert [row["id"] for row in rows_of(tmp_path / "all.csv")] == ["a"] * 95 + ["b"] * 95
    assert (tmp_path / "all.png").exists()
    assert (tmp_path / "all-2.png").exists()


def test_baselines_have_intervals_as_the_scores_have() -> None:
    generator = np.random.default_rng(0)
    scores, measured, other = generator.normal(size=(3, 400))
    mutations = generator.integers(1, 3, size=400)
    rows = agreement(scores, measured, measured > 0, mutations, {"other": other})
    for row, chosen in zip(rows, (mutations > 0, mutations == 1, mutations == 2), strict=True):
        expected = spearmanr(other[chosen], measured[chosen])[0]
        assert row["baselines"]["other"]["spearman"] == pytest.approx(expected)
        assert row["baselines"]["other"]["interval"] == spearman_interval(
            row["baselines"]["other"]["spearman"], int(chosen.sum())
        )
        assert row["interval"] == spearman_interval(row["spearman"], int(chosen.sum()))


def test_a_proteingym_folder_is_scored_assay_by_assay(masked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gym"
    folder.mkdir()
    header = "mutant,mutated_sequence,DMS_score,DMS_score_bin\n"
    (folder / "one.csv").write_text(header + "K2W,MWTAY,1.5,1\nT3A,MKAAY,-1,0\nM1A:K2A,AATAY,0.5,1\nY5F,MKTAF,,\n")
    (folder / "two.csv").write_text(header + "W1A,AWC,2,1\nW2A,WAC,1,0\n")
    (folder / "reference.csv").write_text("DMS_id,DMS_filename,target_seq\nfirst,one.csv,MKTAY\nsecond,two.csv,WWC\n")
    outcome = score_to(tmp_path / "out", None, masked, proteingym=str(folder), device="cpu")
    found = rows_of(tmp_path / "out" / "first.csv")
    assert [row["mutant"] for row in found] == ["K2W", "T3A", "M1A:K2A", "Y5F"]
    assert [row["variants"] for row in outcome.figures["agreement"]["first"]] == [3, 2, 1]
    assert outcome.figures["agreement"]["second"][0]["spearman"] is not None
    assert len(rows_of(tmp_path / "out" / "agreement.csv")) == 5
    assert (tmp_path / "out" / "first.png").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"] == "score"
    (folder / "reference.csv").write_text("DMS_id,DMS_filename,target_seq\n../evil,one.csv,MKTAY\n")
    with pytest.raises(InputError, match="cannot be the name of a file"):
        score_to(tmp_path / "bad", None, masked, proteingym=str(folder), device="cpu")


def test_figures_are_those_of_scipy_and_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    for ties in (1000, 4):
        scores = generator.integers(ties, size=200).astype(float)
        measured = scores + generator.normal(size=200) * ties
        positive = measured > 0.5 * ties
        assert spearman(scores, measured) == pytest.approx(spearmanr(scores, measured)[0])
        assert auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    gains = (measured - measured.min()) / np.ptp(measured)
    different = generator.normal(size=200)
    assert ndcg(different, measured) == pytest.approx(ndcg_score(gains[None], different[None], k=20))
    groups = agreement(scores, measured, positive, generator.integers(1, 9, size=200))
    assert [group["mutations"] for group in groups] == ["all", "1", "2", "3", "4", "5+"]
    assert sum(group["variants"] for group in groups[1:]) == groups[0]["variants"] == 200
    assert spearman(np.ones(5), np.arange(5.0)) is None


def test_the_interval_of_a_rank_correlation_holds_what_resampling_finds() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=300)
    y = x + generator.normal(size=300)
    found = [spearman(x[rows], y[rows]) or 0.0 for rows in generator.integers(300, size=(1000, 300))]
    assert spearman_interval(spearman(x, y), 300) == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=0.02)
    assert spearman_interval(1.0, 300) is None
    assert spearman_interval(0.5, 9) is None


def test_the_baseline_of_an_agreement_is_the_sum_of_blosum62_over_the_substitutions(
    masked: Path, tmp_path: Path
) -> None:
    # W to F is 1, to A -3; K to R 2, to D -1; together K2R:W3F is 3.
    (tmp_path / "v.csv").write_text("mutant,DMS_score\nW3F,5\nW3A,1\nK2R,4\nK2D,2\nK2R:W3F,3\n")
    outcome = score_to(tmp_path / "s.csv", "MKWAY", masked, variants=str(tmp_path / "v.csv"), device="cpu")
    rows = outcome.figures["agreement"]["s"]
    assert [row["mutations"] for row in rows] == ["all", "1", "2"]
    found = rows[0]["baselines"]
    assert found["blosum62"]["spearman"] == pytest.approx(spearmanr([1, -3, 2, -1, 3], [5, 1, 4, 2, 3])[0])
    # Less W to W, which is 11, and K to K, which is 5.
    assert found["blosum62_change"]["spearman"] == pytest.approx(spearmanr([-10, -14, -3, -6, -13], [5, 1, 4, 2, 3])[0])
    (tmp_path / "x.csv").write_text("mutant,DMS_score\nW3X,5\nW3A,1\nK2R,4\n")
    outcome = score_to(tmp_path / "x-s.csv", "MKWAY", masked, variants=str(tmp_path / "x.csv"), device="cpu")
    assert outcome.figures["agreement"]["x-s"][0]["baselines"]["blosum62"]["spearman"] is None


def test_measurements_that_are_not_numbers_are_refused_before_the_work(masked: Path, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("mutant,DMS_score\nK2W,1\nT3A,high\n")
    with pytest.raises(InputError, match=r"v\.csv, row 2: DMS_score is 'high'; expected a number"):
        score_to(tmp_path / "out.csv", WILD_TYPE, masked, variants=str(tmp_path / "v.csv"), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["v.csv"]


@pytest.mark.parametrize(
    ("wild_type", "table", "options", "words"),
    [
        ("MKT1", "mutant\nM1A\n", {}, "neither a file nor"),
        ("MKT:MKT", "mutant\nM1A\n", {}, "neither a file nor"),
        ("MKTAY", "mutant\n", {}, "no rows"),
        ("MKTAY", "variant\nM1A\n", {}, "neither a column 'mutant'"),
        ("MKTAY", "mutant\nM1A\n", {"measurement_column": "y"}, "no column 'y'"),
    ],
)
def test_what_is_wrong_with_the_whole_is_refused(
    masked: Path, tmp_path: Path, wild_type: str, table: str, options: dict[str, Any], words: str
) -> None:
    (tmp_path / "v.csv").write_text(table)
    with pytest.raises(InputError, match=words):
        score_to(tmp_path / "out.csv", wild_type, masked, variants=str(tmp_path / "v.csv"), device="cpu", **options)


def test_scores_do_not_depend_on_the_batch(folders: Folders) -> None:
    for kind in ("masked", "esm", "bert"):
        model = LanguageModel.open(folders(kind), device="cpu")
        few = [v.score for v in score(WILD_TYPE, None, model, toks_per_batch=18)]
        many = [v.score for v in score(WILD_TYPE, None, model, toks_per_batch=10_000)]
        np.testing.assert_allclose(few, many, atol=1e-5)


def test_a_killed_run_ends_with_the_bytes_of_a_whole_one(
    masked: Path, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.fasta").write_text(f">a\n{WILD_TYPE}\n>b\n{WILD_TYPE[::-1]}\n")
    arguments = {"wild_type": str(tmp_path / "w.fasta"), "model": str(masked), "device": "cpu"}
    monkeypatch.setattr(Tool, "shard_tokens", 100)
    score_to(tmp_path / "whole" / "s.csv", **arguments)
    process = start("run_and_die", "score", {"output": str(tmp_path / "killed" / "s.csv"), **arguments}, 5, 100)
    process.join()
    assert process.exitcode == -9
    score_to(tmp_path / "killed" / "s.csv", **arguments)
    for name in ("s.csv", "s.png", "s-2.png", "methods.txt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
