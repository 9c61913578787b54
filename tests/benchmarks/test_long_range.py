"""Cut proteins and recall over long distances."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from performers.benchmarks import context, experiment, recall
from performers.benchmarks.context import WHOLE, ContextSettings, distances, losses, measure_context
from performers.benchmarks.recall import RecallSettings, measure_recall, sequences, verdict, wilson
from performers.errors import InputError


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


def test_every_question_is_answered_in_the_first_quarter_and_nowhere_else() -> None:
    batch = sequences(3, 256, 16, seed=1)
    assert batch.tokens.equal(sequences(3, 256, 16, seed=1).tokens)
    assert not batch.tokens.equal(sequences(3, 256, 16, seed=2).tokens)
    assert int(batch.tokens.max()) < recall.VOCABULARY
    first_pair = recall.VOCABULARY - recall.KEYS * recall.VALUES
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        pairs = {divmod(token - first_pair, recall.VALUES) for token in tokens if token >= first_pair}
        value_of = dict(pairs)
        assert len(value_of) == len(pairs) == recall.KEYS
        assert all(token < first_pair for token in tokens[64:])
        asked = [place for place, label in enumerate(labels) if label >= 0]
        assert len(asked) == 16
        assert min(asked) >= 192
        for place in asked:
            key = tokens[place] - recall.NOISE
            assert labels[place] == recall.NOISE + recall.KEYS + value_of[key]


def test_the_verdict_on_recall_follows_from_the_interval() -> None:
    assert verdict(*wilson(990, 1000)) == "solved"
    assert verdict(*wilson(125, 1000)) == "at chance"
    assert verdict(*wilson(400, 1000)) == "partly"
    assert verdict(*wilson(9, 9)) == "partly"  # too few to call it solved
    low, high = wilson(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_recall_learns_at_one_length_from_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = RecallSettings.of_size(
        True,
        systems=("performer-relu", "local"),
        lengths=(512, 1024),
        first_steps=2,
        steps=1,
        batch_tokens=1024,
        tests=2,
        d=16,
        d_ff=16,
        threads=1,
    )
    report = measure_recall(settings, tmp_path, quick=True)
    assert [(cell["system"], cell["length"], cell["steps_taken"]) for cell in report["cells"]] == [
        ("performer-relu", 512, 2),
        ("performer-relu", 1024, 1),
        ("local", 512, 2),
        ("local", 1024, 1),
    ]
    assert all((tmp_path / cell["weights"]).is_file() for cell in report["cells"])
    ((title, header, rows),) = recall.tables(report)
    assert "chance is 0.125" in title
    assert header[1:] == ["L 512", "L 1,024"]
    assert len(rows) == 2
    assert (tmp_path / "recall.png").is_file()
    capsys.readouterr()
    assert measure_recall(settings, tmp_path, quick=True)["cells"] == report["cells"]
    assert "4 of 4 cells were measured before" in capsys.readouterr().err


def test_longer_sequences_get_as_many_tokens_and_at_least_ten_steps(tmp_path: Path) -> None:
    settings = RecallSettings.of_size(
        True,
        systems=("performer-relu",),
        lengths=(128, 256, 512),
        first_steps=2,
        steps=30,
        batch_tokens=128,
        tests=1,
        d=16,
        d_ff=16,
        threads=1,
    )
    report = measure_recall(settings, tmp_path, quick=True)
    assert [cell["steps_taken"] for cell in report["cells"]] == [2, 15, 10]


def test_what_has_no_room_for_the_questions_is_refused() -> None:
    with pytest.raises(InputError, match="expected at least 128"):
        RecallSettings.of_size(True, lengths=(64,))


def window(size: int, hits: list[str], near: list[str] | None = None) -> dict[str, Any]:
    return {"part": "window", "window": size, "hits": hits, "near": near or []}


def test_a_loss_is_stated_where_its_interval_leaves_zero_out() -> None:
    whole = window(WHOLE, ["1111"] * 30)
    cut, same, mixed = window(512, ["1101"] * 30), window(1024, ["1111"] * 30), window(2048, ["0111", "1111"] * 15)
    rows = {row["window"]: row for row in losses([cut, same, mixed, whole])}
    assert "less accurate than the whole" in rows[512]["text"]
    assert rows[512]["loss"] == pytest.approx(0.25)
    assert "undecided" in rows[1024]["text"]
    assert "less accurate" in rows[2048]["text"]
    uneven = window(512, ["1111"] * 15 + ["0000"] + ["1111"] * 14)
    assert "undecided" in losses([uneven, whole])[0]["text"]


def test_accuracy_near_a_cut_is_compared_on_the_same_residues() -> None:
    rows = distances([window(512, ["1001"], ["0-17"]), window(WHOLE, ["1110"], ["----"])])
    assert [(row["from"], row["accuracy"], row["whole"]) for row in rows] == [
        (0, 1.0, 1.0),
        (8, 0.0, 1.0),
        (512, 1.0, 0.0),
    ]
    assert all(row["interval"] == [-1, 1] for row in rows)  # one protein says nothing of others


def test_what_is_lost_near_a_cut_has_an_interval_over_the_proteins_that_have_one() -> None:
    proteins = 30
    cut = window(512, ["01"] * proteins + ["1"], ["05"] * proteins + ["-"])
    near, far = distances([cut, window(WHOLE, ["11"] * proteins + ["1"])])
    assert (near["residues"], near["loss"], near["interval"]) == (proteins, 1.0, [1.0, 1.0])
    assert (far["loss"], far["interval"]) == (0.0, [0.0, 0.0])
    uneven = window(512, ["0"] + ["1"] * 14, ["0"] * 15)
    (row,) = distances([uneven, window(WHOLE, ["1"] * 15)])
    assert row["loss"] == pytest.approx(1 / 15)
    assert row["interval"][0] == 0 < row["loss"] < row["interval"][1]


def test_what_is_not_given_does_not_replace_what_an_experiment_trains_at() -> None:
    for quick, tokens in ((False, 4096), (True, 1024)):
        recipe = ContextSettings.of_size(quick, context=None, batch_size=None).recipe
        assert (recipe.context, recipe.batch_size) == (tokens, 1)
    recipe = ContextSettings.of_size(False, context=128, batch_size=3).recipe
    assert (recipe.context, recipe.batch_size) == (128, 3)


def test_windows_cut_long_proteins_and_hide_the_same_residues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ContextSettings.of_size(
        True, windows=(512, 4096), proteins=3, steps=2, layers=1, d=16, d_ff=16, context=128, threads=1
    )
    report = measure_context(settings, tmp_path, quick=True)
    cells = {cell["window"]: cell for cell in report["cells"] if cell["part"] == "window"}
    assert set(cells) == {512, 4096, WHOLE}
    for cell in cells.values():
        assert [len(hits) for hits in cell["hits"]] == [len(hits) for hits in cells[WHOLE]["hits"]]
        assert [len(near) for near in cell["near"]] == [len(hits) for hits in cell["hits"]]
    assert set("".join(cells[512]["near"])) > {"5"}
    assert set("".join(cells[WHOLE]["near"])) == {"-"}
    longer = [number for number, near in enumerate(cells[4096]["near"]) if set(near) != {"-"}]
    for number in set(range(3)) - set(longer):  # a window that holds the whole protein is the whole protein
        assert cells[4096]["hits"][number] == cells[WHOLE]["hits"][number]
    titles = [title for title, _, _ in context.tables(report)]
    assert [("Accuracy" in title, "nearest cut" in title) for title in titles[:3]] == [
        (True, False),
        (True, True),
        (False, True),
    ]
    assert (tmp_path / "context.png").is_file()
    capsys.readouterr()
    # The model of the first report, given by name, is read like the one that was trained.
    trained = next(cell for cell in report["cells"] if cell["part"] == "run")
    given = ContextSettings.of_size(True, model=str(tmp_path / trained["model"]), windows=(512,), proteins=3, threads=1)
    other = measure_context(given, tmp_path / "given", quick=True)
    assert other["cells"][0]["hits"] == cells[512]["hits"]
    # Proteins of one's own are known by their content, not by the name of their file.
    mine = tmp_path / "mine.fasta"
    given = replace(given, sources=(str(mine),), longer_than=30)
    for sequence, measured_before in (("MKTAYIAKQR" * 4, False), ("MKTAYIAKQR" * 4, True), ("ACDEFGHIKL" * 4, False)):
        mine.write_text(f">mine\n{sequence}\n")
        capsys.readouterr()
        report = measure_context(given, tmp_path / "given", quick=True)
        assert ("2 of 2 cells were measured before" in capsys.readouterr().err) == measured_before
        assert report["cells"][0]["files"] == [hashlib.sha256(mine.read_bytes()).hexdigest()]


def test_proteins_that_are_all_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no protein has more than 100,000 residues"):
        measure_context(ContextSettings.of_size(True, longer_than=100_000), tmp_path)
