"""The systems, the runs that compare them, and the verdicts, which follow from the figures and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from performers.attention import MECHANISMS
from performers.benchmarks import experiment, quality, redraw
from performers.benchmarks.comparison import Recipe, Spread, all_of, is_above, prepare_proteins
from performers.benchmarks.quality import QualitySettings, measure_quality
from performers.benchmarks.redraw import RedrawSettings, measure_redraw
from performers.benchmarks.systems import LEARNERS, SYSTEMS, architecture
from performers.errors import InputError
from performers.models import PerformerConfig

TINY: dict[str, Any] = {"layers": 1, "d": 16, "d_ff": 16, "context": 64, "batch_size": 2, "threads": 1}


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "identity"])
def test_every_system_is_a_model(name: str) -> None:
    config = PerformerConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=3, **architecture(name, 3))
    assert set(config.mechanisms) == set(SYSTEMS[name].layers) <= set(MECHANISMS)
    for mechanism, kwargs in SYSTEMS[name].kwargs.items():
        for key, value in kwargs.items():
            given = config.kwargs_of(mechanism)[key]
            assert (value.items() <= given.items()) if isinstance(value, dict) else given == value


def test_the_interval_of_a_mean_is_students() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.deviation) == (2.0, 1.0)
    assert spread.high - spread.mean == pytest.approx(4.303 / 3**0.5)
    assert str(spread) == "2.0000 ± 1.0000"


def test_one_seed_decides_nothing() -> None:
    assert is_above(Spread.of([0.9]), Spread.of([0.1])) == "undecided"


def test_overlapping_intervals_are_undecided() -> None:
    low, high = Spread.of([0.100, 0.101, 0.102]), Spread.of([0.200, 0.201, 0.202])
    assert is_above(high, low) == "confirmed"
    assert is_above(low, high) == "refuted"
    assert is_above(high, Spread.of([0.15, 0.20, 0.25])) == "undecided"


def test_a_claim_of_several_things_needs_all_of_them() -> None:
    assert all_of(["confirmed", "confirmed"]) == "confirmed"
    assert all_of(["confirmed", "undecided"]) == "undecided"
    assert all_of(["undecided", "refuted"]) == "refuted"


def scores(**accuracies: list[float]) -> list[dict[str, Any]]:
    """What `quality.collect` makes of these accuracies over a baseline of 0.1."""
    chosen = [{"system": name.replace("_", "-"), "objective": "mlm", "budgets": {"steps": 7}} for name in accuracies]
    cells = [
        {
            "part": "run",
            "status": "done",
            "system": name.replace("_", "-"),
            "objective": "mlm",
            "steps": 7,
            "scores": {
                "random": {
                    "accuracy": value,
                    "accuracy_gain": value - 0.1,
                    "perplexity": 17.0,
                    "baseline_accuracy": 0.1,
                }
            },
        }
        for name, values in accuracies.items()
        for value in values
    ]
    return quality.collect(chosen, cells, ["random"])


@pytest.mark.parametrize(
    ("performer", "transformer", "reformer", "verdict"),
    [
        ([0.30, 0.301, 0.302], [0.25, 0.251, 0.252], [0.20, 0.201, 0.202], "confirmed"),
        ([0.25, 0.251, 0.252], [0.30, 0.301, 0.302], [0.20, 0.201, 0.202], "refuted"),
        ([0.30, 0.301, 0.302], [0.20, 0.201, 0.202], [0.25, 0.251, 0.252], "refuted"),
        ([0.25, 0.251, 0.252], [0.2505, 0.2515, 0.2525], [0.20, 0.201, 0.202], "undecided"),
    ],
)
def test_the_papers_order_is_judged_by_the_figures(
    performer: list[float], transformer: list[float], reformer: list[float], verdict: str
) -> None:
    found = quality.verdicts(scores(performer_relu=performer, transformer=transformer, reformer=reformer))
    assert [row["verdict"] for row in found] == [verdict]
    assert f"is {verdict}" in found[0]["text"]
    assert found[0]["learned"]


def test_an_order_of_models_that_learned_nothing_is_called_so() -> None:
    found = quality.verdicts(
        scores(performer_relu=[0.115, 0.116, 0.115], transformer=[0.11, 0.11, 0.11], reformer=[0.1, 0.1, 0.1])
    )
    assert not found[0]["learned"]
    assert "No system is two points above the unigram baseline" in found[0]["text"]


def test_without_the_systems_of_the_claim_there_is_no_verdict() -> None:
    assert quality.verdicts(scores(transformer=[0.1, 0.2, 0.3], sparse=[0.1, 0.2, 0.3])) == []


def test_whether_redrawing_helps_is_judged_by_the_figures() -> None:
    def row(interval: int, values: list[float]) -> dict[str, Any]:
        return {"interval": interval, "set": "clusters", "perplexity": asdict(Spread.of(values))}

    never = row(0, [17.0, 17.01, 17.02])
    for values, word in (
        ([16.0, 16.01, 16.02], "helps"),
        ([18.0, 18.1, 18.2], "hurts"),
        ([17.0, 17.1, 17.2], "no difference"),
    ):
        (found,) = redraw.verdicts([never, row(10, values)])
        assert word in found["text"]


def test_a_random_set_is_taken_out_of_the_training_proteins(tmp_path: Path) -> None:
    from performers.data import Corpus, read_fasta

    proteins = prepare_proteins(tmp_path, (), None, held_out=30, seed=1)
    held_out = {record.sequence for record in read_fasta(proteins.tests["random"])}
    assert len(held_out) == 30
    train = Corpus.open(proteins.train)
    assert len(train) == 17_000 - 30
    assert not held_out & {record.sequence for record in train.records()}
    assert prepare_proteins(tmp_path, (), None, held_out=30, seed=1) == proteins
    assert prepare_proteins(tmp_path, (), None, held_out=30, seed=2).key != proteins.key


def test_proteins_of_ones_own_are_split_so_that_relatives_stay_together(tmp_path: Path) -> None:
    from performers.data import read_fasta

    records = list(read_fasta("bundled:validation"))[:150]
    fasta = tmp_path / "mine.fasta"
    fasta.write_text("".join(f">{record.id}\n{record.sequence}\n" for record in records))
    proteins = prepare_proteins(tmp_path / "out", [str(fasta)], None, held_out=5, seed=0, threads=1)
    assert set(proteins.tests) == {"random", "clusters"}
    assert len(list(read_fasta(proteins.tests["random"]))) == 5
    with pytest.raises(InputError, match="--labels goes with --input"):
        prepare_proteins(tmp_path / "out", (), "families.tsv", held_out=5, seed=0)


def test_quality_compares_at_equal_steps_and_time_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Timing takes a process each; how long a step takes is not what is tested here.
    seconds = {"transformer": 0.2, "performer-relu": 0.1}
    monkeypatch.setattr(
        quality, "measure_speed", lambda cell, proteins: {"status": "done", "seconds_per_step": seconds[cell["system"]]}
    )
    settings = QualitySettings.of_size(
        True,
        systems=("transformer", "performer-relu"),
        steps=3,
        trial_steps=2,
        learning_rates=(1e-3, 1e-2),
        seeds=(1, 2),
        score_proteins=4,
        held_out=10,
        **TINY,
    )
    report = measure_quality(settings, tmp_path, quick=True)
    chosen = {row["system"]: row for row in report["chosen"]}
    assert chosen["transformer"]["budgets"] == {"steps": 3, "time": 3}
    assert chosen["performer-relu"]["budgets"] == {"steps": 3, "time": 6}
    trials = [cell for cell in report["cells"] if cell["part"] == "trial"]
    assert len(trials) == 4
    for row in report["chosen"]:
        mine = [trial for trial in trials if trial["system"] == row["system"]]
        best = min(mine, key=lambda trial: trial["scores"]["validation"]["perplexity"])
        assert row["learning_rate"] == best["learning_rate"]
    runs = [cell for cell in report["cells"] if cell["part"] == "run"]
    assert len(runs) == 6  # the Transformer's equal time is its equal steps
    for run in runs:
        assert set(run["scores"]) == {"validation", "random", "clusters", "families"}
        assert (tmp_path / run["model"] / "model.safetensors").is_file()
    row = report["scores"][0]
    mine = [run for run in runs if run["system"] == row["system"] and run["steps"] == row["steps"]]
    assert list(row["accuracy"]["values"]) == [run["scores"][row["set"]]["accuracy"] for run in mine]
    assert report["quick"]
    assert report["notes"][0] == experiment.QUICK_NOTE
    words = " ".join(title for title, _, _ in quality.tables(report))
    assert "equal wall time" in words
    for picture in report["pictures"]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "quality.json").read_text())["cells"] == json.loads(json.dumps(report["cells"]))

    capsys.readouterr()
    again = measure_quality(settings, tmp_path, quick=True)
    assert json.dumps(again["cells"]) == json.dumps(report["cells"])
    assert "6 of 6 cells were measured before" in capsys.readouterr().err


def test_without_the_transformer_equal_time_is_that_of_the_first_system_that_could_be_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither timing nor training is what is tested here.
    seconds = {"performer-relu": 0.2, "sparse": 0.1}

    def measure_speed(cell: dict[str, Any], proteins: Any) -> dict[str, Any]:
        if cell["system"] not in seconds:
            return {"status": "skipped", "reason": "a step takes over 10 minutes"}
        return {"status": "done", "seconds_per_step": seconds[cell["system"]]}

    def train(cell: dict[str, Any], log: Any, proteins: Any) -> dict[str, Any]:
        if (cell["part"], cell["system"], cell["seed"]) == ("run", "sparse", 2):
            return {"status": "diverged", "reason": "The loss is nan at step 3."}
        figures = {"accuracy": 0.2, "accuracy_gain": 0.1, "perplexity": 15.0, "baseline_accuracy": 0.1}
        return {"status": "done", "scores": dict.fromkeys(("validation", *proteins.tests), figures)}

    monkeypatch.setattr(quality, "measure_speed", measure_speed)
    monkeypatch.setattr(quality, "train", train)
    settings = QualitySettings.of_size(
        True,
        systems=("reformer", "performer-relu", "sparse"),
        budgets=("time",),
        steps=10,
        seeds=(1, 2),
        held_out=10,
        **TINY,
    )
    report = measure_quality(settings, tmp_path, quick=True)
    assert {row["system"]: row["budgets"]["time"] for row in report["chosen"]} == {"performer-relu": 10, "sparse": 20}
    assert any("the time that Performer-relu takes for its steps" in note for note in report["notes"])
    (rows,) = (rows for title, _, rows in quality.tables(report) if "mean and deviation of 2 seeds" in title)
    assert [row[0] for row in rows] == ["Performer-relu", "Sparse Transformer (1 diverged)", "unigram"]


def test_a_comparison_that_was_cut_off_goes_on_without_repeating_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from performers import training

    settings = RedrawSettings.of_size(
        True, intervals=(0, 4), steps=20, seeds=(1,), score_proteins=2, held_out=10, **TINY
    )
    pretrain, calls = training.pretrain, []

    def interrupted(config: Any) -> Any:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(config.output)
        return pretrain(config)

    monkeypatch.setattr(training, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_redraw(settings, tmp_path, quick=True)
    monkeypatch.setattr(training, "pretrain", lambda config: calls.append(config.output) or pretrain(config))
    report = measure_redraw(settings, tmp_path, quick=True)
    assert len(calls) == len(set(calls)) == 2  # the first run was not repeated
    never, often = report["cells"]
    assert (never["redraw_every"], often["redraw_every"]) == (0, 4)
    assert never["curve"][0] == often["curve"][0]  # until the first redraw they are the same
    assert never["curve"][-1] != often["curve"][-1]
    assert {row["set"] for row in report["verdicts"]} == {"validation", "random", "clusters", "families"}
    assert (tmp_path / "redraw.png").is_file()


def test_a_run_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from performers import training
    from performers.errors import NonFiniteError

    pretrain = training.pretrain

    def diverging(config: Any) -> Any:
        if config.seed == 2:
            raise NonFiniteError("The loss is nan at step 3.")
        return pretrain(config)

    monkeypatch.setattr(training, "pretrain", diverging)
    settings = RedrawSettings.of_size(
        True, intervals=(0, 2), steps=3, seeds=(1, 2), score_proteins=2, held_out=10, **TINY
    )
    report = measure_redraw(settings, tmp_path, quick=True)
    assert [cell["status"] for cell in report["cells"]] == ["done", "done", "diverged", "diverged"]
    assert report["failed"] == 0
    assert report["notes"][-1].startswith("diverged: never redrawn, seed 2 and 1 more: The loss is nan")
    assert all(len(row["accuracy"]["values"]) == 1 for row in report["scores"])
    perplexities = redraw.tables(report)[0][2]
    assert {row[1] for row in perplexities} == {"never redrawn (1 diverged)", "redrawn every 2 steps (1 diverged)"}


def test_what_is_not_in_order_is_refused() -> None:
    with pytest.raises(InputError, match="--system perfomer"):
        QualitySettings.of_size(True, systems=("perfomer",))
    with pytest.raises(InputError, match="--budget money"):
        QualitySettings.of_size(True, budgets=("money",))
    with pytest.raises(InputError, match="--budget: expected at least one of steps, time"):
        QualitySettings.of_size(True, budgets=())
    with pytest.raises(InputError, match="--redraw-every"):
        RedrawSettings.of_size(True, intervals=(5,))
    assert QualitySettings.of_size(False).systems == LEARNERS
    assert QualitySettings.of_size(False, layers=7, device="cpu").recipe == Recipe(layers=7)
