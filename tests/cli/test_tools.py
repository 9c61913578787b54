"""The tools as commands: outputs, figures, exit statuses, and one line on stderr for what is wrong."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from performers import (
    PerformerConfig,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerTokenizer,
)
from performers.data import STANDARD_RESIDUES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "masked"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"num_features": 8})).save_pretrained(folder)
    PerformerTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that has positions for 20 tokens."""
    folder = tmp_path_factory.mktemp("tools") / "bert"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *STANDARD_RESIDUES]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=len(tokens), max_position_embeddings=20)).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(folder)
    return folder


def refused(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_embed_takes_lists_with_spaces_or_commas(run: Run, model: Path, fasta: Path, tmp_path: Path) -> None:
    options = ["embed", "-i", fasta, "--model", model]
    for name, kinds in (("a", ["mean,per_tok", "--layers", "-1,0"]), ("b", ["mean", "per_tok", "--layers", "-1", "0"])):
        status, out, err = run(*options, "-o", tmp_path / f"{name}.npz", "--include", *kinds)
        assert status == 0, err
        assert "30 of 30 done" in out
        assert "30 records" in err
    first, second = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert sorted(first.files) == ["ids", "lengths", "mean", "per_tok"]
    assert first["mean"].shape == (30, 2, 16)
    np.testing.assert_array_equal(first["per_tok"], second["per_tok"])
    refused(run(*options, "-o", tmp_path / "c.npz", "--include", "mean", "everything"), "everything")
    refused(run(*options, "-o", tmp_path / "c.npz", "--layers", "last"), "--layers")


def test_embed_json_and_dry_run(run: Run, model: Path, fasta: Path, tmp_path: Path) -> None:
    status, out, _ = run("embed", "-i", fasta, "-o", tmp_path / "e.npz", "--model", model, "--dry-run", "--json")
    assert status == 0
    figures = json.loads(out)
    assert (figures["items"], figures["done"]) == (30, False)
    assert set(figures["estimate"]) >= {"seconds", "bytes"}
    assert list(tmp_path.iterdir()) == []


def test_embed_reads_standard_input(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "performers", "embed", "-i", "-", "-o", "e.npz", "--model", str(model)]
    for _ in range(2):  # the second time it is complete
        done = subprocess.run(command, input=b">a\nMKT\n", capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert b"is complete" in done.stderr
    assert np.load(tmp_path / "e.npz")["ids"].tolist() == ["a"]


def test_records_that_fail_are_listed_and_the_status_says_so(run: Run, short: Path, tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(f">good\nMKT\n>long\n{'M' * 30}\n")
    status, out, err = run("embed", "-i", tmp_path / "x.fasta", "-o", tmp_path / "e.npz", "--model", short)
    assert status == 3
    assert "1 of 2 done" in out
    assert "failed.tsv" in err
    assert "2\tlong\t" in (tmp_path / "failed.tsv").read_text()


def test_what_embed_cannot_do_is_one_line(run: Run, model: Path, short: Path, fasta: Path, tmp_path: Path) -> None:
    refused(run("embed", "-i", fasta, "-o", tmp_path / "e.npz", "--model", "facebook/esm2"), "expected a model folder")
    refused(run("embed", "-i", fasta, "-o", tmp_path / "e.txt", "--model", model), "e.txt", ".h5")
    refused(run("embed", "-i", tmp_path / "none.fasta", "-o", tmp_path / "e.npz", "--model", model), "does not exist")
    (tmp_path / "bad.fasta").write_text(">a\nMK*T\n")
    refused(
        run("embed", "-i", tmp_path / "bad.fasta", "-o", tmp_path / "e.npz", "--model", model), "record 1", "residue 3"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.fasta"]


def test_a_missing_extra_is_one_line_with_the_command(
    run: Run, model: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    command = ["embed", "-i", fasta, "-o", tmp_path / "e.parquet", "--model", model]
    refused(run(*command), "pyarrow", "pip install 'performers[parquet]'")


def test_score_prints_statuses_and_agreement_and_is_not_for_clinical_use(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("mutant,DMS_score\nM1A,1\nK2A,2\nT3A,3\nT3*,4\nK2K,5\n")
    command = ["score", "--wild-type", "MKTAY", "--variants", tmp_path / "v.csv", "--model", model]
    status, out, err = run(*command, "-o", tmp_path / "s.csv")
    assert status == 0, err
    for word in ("Not for clinical use", "masked-marginals", "synonymous", "Spearman"):
        assert word in out
    assert "5 variants of 1 proteins" in err
    status, out, _ = run(*command, "-o", tmp_path / "t.csv", "--json")
    assert status == 0
    assert json.loads(out)["figures"]["agreement"]["t"][0]["variants"] == 3
    (tmp_path / "v.csv").write_text("mutant\nM1A\nA1M\n")
    assert run(*command, "-o", tmp_path / "u.csv")[0] == 3


def test_score_saturates_a_file(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "w.fasta").write_text(">w\nMKTAY\n")
    status, _, err = run(
        "score", "--wild-type", tmp_path / "w.fasta", "--saturate", "-o", tmp_path / "s.csv", "--model", model
    )
    assert status == 0, err
    with (tmp_path / "s.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 95
    assert list(rows[0]) == ["id", "mutant", "status", "score", "percentile", "low_confidence", "reason"]
    assert (tmp_path / "s.png").exists()


def test_what_score_cannot_do_is_one_line(run: Run, model: Path, tmp_path: Path) -> None:
    command = ["score", "--model", model, "-o", tmp_path / "s.csv"]
    refused(run(*command, "--wild-type", "MKT"), "--saturate")
    refused(run(*command, "--saturate"), "--wild-type")
    refused(run(*command, "--saturate", "--wild-type", "MK1"), "neither a file nor a sequence")
    refused(run(*command, "--wild-type", "MKT", "--variants", tmp_path / "none.csv"), "none.csv does not exist")
    refused(run("score", "--saturate", "--wild-type", "MKT", "-o", tmp_path / "s", "--model", model), ".csv")


@pytest.mark.parametrize("command", ["embed", "score"])
def test_help_of_tools_loads_neither_torch_nor_transformers(command: str) -> None:
    code = (
        "import sys\nfrom performers.cli import main\nsys.argv = ['performers', sys.argv[1], '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_second_file_without_its_option_is_named(run: Run, model: Path, fasta: Path, tmp_path: Path) -> None:
    command = ["embed", "-i", fasta, "two.fasta", "-o", tmp_path / "e.npz", "--model", model]
    refused(run(*command), "two.fasta stands alone", f"-i {fasta} -i two.fasta")


def test_read_leaves_a_record_and_has_nothing_to_do_a_second_time(
    run: Run, model: Path, fasta: Path, tmp_path: Path
) -> None:
    command = ["read", fasta, "-o", tmp_path / "family.state", "--model", model, "--toks-per-batch", "500"]
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    assert "30 proteins" in out
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "read"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cite.bibtex",
        "family.state",
        "methods.txt",
        "run.json",
    ]
    status, out, err = run(*command, "--json")
    assert status == 0
    assert "is complete" in err
    assert json.loads(out)["proteins"] == 30
    refused(run(*command, "--dtype", "bfloat16"), "already there, of other settings", "--restart")


def test_a_model_that_cannot_score_is_bad_input(run: Run, model: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    head = PerformerForSequenceClassification(
        PerformerConfig(**sizes, attention_kwargs={"num_features": 8}, num_labels=1)
    )
    head.save_pretrained(tmp_path / "ft")
    PerformerTokenizer().save_pretrained(tmp_path / "ft")
    command = ["score", "--wild-type", "MKTAY", "--saturate", "-o", tmp_path / "s.csv", "--model", tmp_path / "ft"]
    refused(run(*command), "predicts no residues")
