"""The benchmark commands: tables or JSON alone, pictures, going on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from performers.benchmarks import cost, experiment

Run = Callable[..., tuple[int, str, str]]

ATTENTION = [
    *("benchmark", "attention", "--quick", "--threads", "1", "--heads", "2", "--head-dim", "8", "--num-features", "16"),
    *("--length", "32", "--kernel", "relu", "--direction", "bidirectional", "--backend", "chunked"),
]
APPROXIMATION = [
    *("benchmark", "approximation", "--quick", "--threads", "1", "--length", "64", "--num-features", "4,8"),
    *("--kernel", "softmax,softmax-reg", "--projection", "iid", "--draws", "2", "--deviation", "0.5"),
]
RECALL = [
    *("benchmark", "recall", "--quick", "--threads", "1", "--system", "transformer,performer-relu"),
    *("--length", "128,256", "--first-steps", "2", "--steps", "1", "--batch-tokens", "256"),
]
REDRAW = [
    *("benchmark", "redraw", "--quick", "--threads", "1", "--redraw-every", "0,2", "--steps", "3", "--seeds", "1,2"),
    *("--context", "64", "--batch-size", "2", "--layers", "1", "--d", "16", "--d-ff", "16", "--score-proteins", "2"),
]


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


def test_attention_prints_ratios_and_writes_report_and_pictures(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*ATTENTION, "--against", "sdpa", "--position", "10,300", "-o", tmp_path)
    assert status == 0, err
    for word in ("performers chunked", "sdpa", "vs sdpa", "of the limit", "extra memory", "at 300", "GFLOP/s"):
        assert word in out
    assert "[3/3]" in err
    report = json.loads((tmp_path / "attention.json").read_text())
    assert report["machine"]["processor"]
    assert report["machine"]["torch"]
    ours = next(cell for cell in report["cells"] if cell["system"] == "performers")
    assert ours["ratio"] == pytest.approx(ours["seconds"] / ours["limit_seconds"])
    assert ours["speedup"]["sdpa"] > 0
    assert ours["error"] < 1e-4
    assert ours["all_seconds"]
    assert report["decoding"][0]["seconds_per_token"]
    for picture in report["pictures"]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "benchmark attention"

    status, out, err = run(*ATTENTION, "--against", "sdpa", "--position", "10,300", "-o", tmp_path, "--json")
    assert status == 0
    again = json.loads(out)
    assert [cell["seconds"] for cell in again["cells"]] == [cell["seconds"] for cell in report["cells"]]
    assert "3 of 3 cells were measured before" in err
    assert "[" not in err


def test_attention_names_what_cannot_be_measured_and_goes_on(run: Run, tmp_path: Path) -> None:
    # The triton backend needs a GPU; the tests run without one.
    options = ["--against", "none", "--position", "none", "--device", "cpu", "--length", "32", "-o", tmp_path, "--json"]
    status, out, err = run(*ATTENTION, "--backend", "triton,chunked", *options)
    assert status == 0, err
    report = json.loads(out)
    assert [cell["status"] for cell in report["cells"]] == ["unavailable", "done"]
    assert len(report["notes"]) == 1
    assert report["notes"][0].startswith("performers triton: unavailable")


def test_attention_that_measures_nothing_fails(run: Run, tmp_path: Path) -> None:
    options = ["--against", "none", "--position", "none", "--backend", "triton", "--device", "cpu", "-o", tmp_path]
    status, out, err = run(*ATTENTION, *options)
    assert status == 1
    assert out == ""
    assert "Nothing could be measured: performers triton" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--against", "flash"], "--against flash"),
        (["--kernel", "sotfmax"], "sotfmax"),
        (["--length", "long"], "--length long"),
        (["--length", "0"], "--length 0"),
        (["--backend", "fastest"], "'fastest'"),
        (["--dtype", "int4"], "--dtype int4"),
        (["--direction", "sideways"], "--direction sideways"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_refuses_what_it_does_not_know_in_one_line(
    run: Run, options: list[str], words: str, tmp_path: Path
) -> None:
    status, out, err = run(*ATTENTION, *options, "-o", tmp_path / "new")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for command in (ATTENTION, APPROXIMATION):
        status, _, err = run(*command, "-o", tmp_path)
        assert status == 2
        assert "already in use" in err


def test_approximation_prints_errors_and_writes_report_and_pictures(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*APPROXIMATION, "-o", tmp_path, "--error", "mse")
    assert status == 0, err
    for word in ("Mean squared error of the attention output", "softmax-reg", "iid", "M 8", "±"):
        assert word in out
    report = json.loads((tmp_path / "approximation.json").read_text())
    assert len(report["cells"]) == 4
    assert len(report["cells"][0]["errors"]["matrix"]["relative"]["draws"]) == 2
    for picture in report["pictures"]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    status, out, err = run(*APPROXIMATION, "-o", tmp_path, "--json")
    assert status == 0
    assert json.loads(out)["cells"] == report["cells"]
    assert "4 of 4 cells were measured before" in err


def test_approximation_refuses_what_it_does_not_know_in_one_line(run: Run, tmp_path: Path) -> None:
    for options in (["--kernel", "sotfmax"], ["--projection", "squint"], ["--deviation", "0"], ["--num-features", "x"]):
        status, out, err = run(*APPROXIMATION, *options, "-o", tmp_path / "new")
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert options[1] in err or options[0] in err


def test_recall_prints_a_table_marks_quick_figures_and_goes_on(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*RECALL, "-o", tmp_path)
    assert status == 0, err
    for word in ("chance is 0.125", "Performer-relu", "L 256", "Quick settings", str(tmp_path)):
        assert word in out
    assert "[4/4]" in err
    report = json.loads((tmp_path / "recall.json").read_text())
    assert report["quick"]
    assert report["machine"]["processor"]
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "benchmark recall"
    status, out, err = run(*RECALL, "-o", tmp_path, "--json")
    assert status == 0
    assert json.loads(out)["cells"] == report["cells"]
    assert "4 of 4 cells were measured before" in err


def test_redraw_prints_means_spreads_and_a_verdict(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*REDRAW, "-o", tmp_path)
    assert status == 0, err
    for word in (
        "mean and deviation of 2 seeds",
        "redrawn every 2 steps",
        "±",
        "Does redrawing help?",
        "held-out clusters",
    ):
        assert word in out
    assert "step 3/3" in err  # the progress of a run
    assert (tmp_path / "redraw.png").is_file()


def test_no_recomputation_is_one_way_among_others(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a step takes is measured in processes elsewhere.
    figures = {"status": experiment.DONE, "base_bytes": 1, "peak_bytes": 2, "seconds": 1.0}
    monkeypatch.setattr(cost, "run_step", lambda measure, cell, minutes: figures)
    options = ["--system", "identity", "--part", "model", "--length", "64", "--longest", "64", "--energy-length", "0"]
    for given, expected in (("none", ["none"]), ("none,layers", ["none", "layers"])):
        status, out, err = run("benchmark", "cost", "--quick", *options, "--recompute", given, "-o", tmp_path, "--json")
        assert status == 0, err
        assert [*dict.fromkeys(cell["recomputation"] for cell in json.loads(out)["cells"])] == expected


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("cost", ["--system", "perfomer"], "--system perfomer"),
        ("cost", ["--size", "huge"], "--size huge"),
        ("cost", ["--cap", "much"], "--cap much"),
        ("cost", ["--recompute", "some"], "--recompute some"),
        ("concatenated", ["--other", "xlnet"], "xlnet"),
        ("cost", ["--recompute", ","], "--recompute: expected at least one of none, layers"),
        ("cost", ["--system", "none"], "--system: expected at least one of"),
        ("concatenated", ["--recompute", "some"], "--recompute some"),
        ("concatenated", ["--recompute", ","], "--recompute: expected at least one of none, layers"),
        ("concatenated", ["--size", "8,6,512"], "--size 8,6,512: expected four positive numbers"),
        ("concatenated", ["--size", "8,6,512,0"], "--size 8,6,512,0: expected four positive numbers"),
        ("concatenated", ["--size", "regular"], "--size regular: expected numbers"),
        ("quality", ["--system", "identity"], "--system identity"),
        ("quality", ["--budget", "money"], "--budget money"),
        ("quality", ["--objective", "win"], "--objective win"),
        ("quality", ["--input", "nowhere.fasta"], "nowhere.fasta"),
        ("context", ["--system", "perfomer"], "--system perfomer"),
        ("context", ["--window", "1"], "--window"),
        ("redraw", ["--redraw-every", "5"], "--redraw-every"),
        ("redraw", ["--labels", "families.tsv"], "--labels"),
        ("recall", ["--length", "10"], "--length 10"),
        ("recall", ["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_experiments_refuse_what_they_do_not_know_in_one_line(
    run: Run, command: str, options: list[str], words: str, tmp_path: Path
) -> None:
    status, out, err = run("benchmark", command, "--quick", *options, "-o", tmp_path / "new")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err
