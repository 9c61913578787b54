"""The benchmark commands: tables or JSON alone, pictures, going on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from performers.benchmarks import experiment

Run = Callable[..., tuple[int, str, str]]

ATTENTION = [
    *("benchmark", "attention", "--quick", "--threads", "1", "--heads", "2", "--head-dim", "8", "--num-features", "16"),
    *("--length", "32,64", "--kernel", "relu", "--direction", "bidirectional", "--backend", "chunked"),
]
APPROXIMATION = [
    *("benchmark", "approximation", "--quick", "--threads", "1", "--length", "64", "--num-features", "4,8"),
    *("--kernel", "softmax,softmax-reg", "--projection", "iid", "--draws", "2", "--deviation", "0.5"),
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
    assert "[5/5]" in err
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
    assert "5 of 5 cells were measured before" in err
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
