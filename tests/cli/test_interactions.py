"""`interact` as a user runs it: figures, exit statuses, and one line on stderr for what is wrong."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
from performers.data import read_fasta

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interact") / "masked"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"num_features": 8})).save_pretrained(folder)
    PerformerTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(fasta: Path) -> Path:
    """All pairs of the proteins, with labels, without a header."""
    ids = [record.id for record in read_fasta(str(fasta))]
    path = fasta.with_name("pairs.tsv")
    text = (f"{ids[i]}\t{ids[j]}\t{(i * j + i + j) % 2}\n" for i, j in itertools.combinations(range(len(ids)), 2))
    path.write_text("".join(text))
    return path


def test_train_and_predict(run: Run, model: Path, fasta: Path, pairs: Path, tmp_path: Path) -> None:
    small = ["--steps", "4", "--batch-size", "8", "--num-features", "4", "--rank", "4", "--threads", "1"]
    train = ["interact", "train", "-i", fasta, "--pairs", pairs, "-o", tmp_path / "run", "--model", model, *small]
    status, out, err = run(*train)
    assert status == 0, err
    for word in ("additive", "homology", "baselines on held-out proteins", "interact predict --model"):
        assert word in out
    predict = ["interact", "predict", "-i", fasta, "--model", tmp_path / "run"]
    status, out, err = run(*predict, "--pairs", pairs, "-o", tmp_path / "out")
    assert status == 0, err
    assert "AUROC" in out
    assert "baselines on held-out proteins" in err
    lines = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    assert lines[0] == "p0\tp1\tprob"
    assert len(lines) == 1 + 30 * 29 / 2

    ids = [record.id for record in read_fasta(str(fasta))]
    (tmp_path / "g.tsv").write_text("".join(f"c\t{name}\n" for name in [*ids[:5], "nobody"]))
    status, out, err = run(*predict, "--groups", tmp_path / "g.tsv", "-o", tmp_path / "groups", "--json")
    assert status == 3
    assert json.loads(out)["figures"]["pairs"] == 10
    assert "nobody" in (tmp_path / "groups" / "failed.tsv").read_text()


def test_pairs_that_cannot_be_used_are_listed_and_the_status_says_so(
    run: Run, model: Path, fasta: Path, pairs: Path, tmp_path: Path
) -> None:
    first = pairs.read_text().splitlines()[0].split("\t")[0]
    (tmp_path / "p.tsv").write_text(pairs.read_text() + f"{first}\t{first}\t1\n{first}\tnobody\t0\n")
    small = ["--steps", "2", "--num-features", "4", "--split", "random", "--threads", "1"]
    status, _, err = run(
        *("interact", "train", "-i", fasta, "--pairs", tmp_path / "p.tsv", "-o", tmp_path / "run", "--model", model),
        *small,
    )
    assert status == 3, err
    assert "nobody" in err
    listed = (tmp_path / "run" / "left-out.tsv").read_text()
    assert "a protein with itself" in listed
    assert "nobody" in listed


def test_what_interact_cannot_do_is_one_line(run: Run, model: Path, fasta: Path, pairs: Path, tmp_path: Path) -> None:
    def refused(*words: object, command: tuple[object, ...]) -> None:
        status, out, err = run("interact", *command)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        for word in words:
            assert str(word) in err

    predict = ("predict", "-i", fasta, "-o", tmp_path / "o")
    refused("--pairs, --groups and --all", command=predict)
    refused("expected the folder of a model of interactions", command=(*predict, "--pairs", pairs, "--model", model))
    train = ("train", "-i", fasta, "-o", tmp_path / "r", "--model", model)
    refused("none.tsv does not exist", command=(*train, "--pairs", tmp_path / "none.tsv"))
    (tmp_path / "bad.tsv").write_text("a\tb\t7\n")
    refused("row 1", "the label is '7'", command=(*train, "--pairs", tmp_path / "bad.tsv"))
    refused("held_out=0.9", command=(*train, "--pairs", pairs, "--held-out", "0.9"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tsv"]


@pytest.mark.parametrize("command", ["train", "predict"])
def test_help_of_interact_loads_neither_torch_nor_transformers(command: str) -> None:
    code = (
        "import sys\nfrom performers.cli import main\nsys.argv = ['performers', 'interact', sys.argv[1], '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
