"""`performers models`, and the model that every command takes where none is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from performers.models import bundled
from performers.models.bundled import CAUSAL, INTERACTIONS, MASKED, describe, describe_head
from performers.training import evaluation

Run = Callable[..., tuple[int, str, str]]


def test_the_models_are_listed_with_their_figures(run: Run) -> None:
    status, out, _ = run("models", "list")
    assert status == 0
    for name in (MASKED, CAUSAL):
        (line,) = [line for line in out.splitlines() if line.startswith(name)]
        assert f"{describe(name).held_out['ood']['accuracy']:.1%}" in line
        assert f"{describe(name).parameters:,}" in line
    (line,) = [line for line in out.splitlines() if line.startswith(INTERACTIONS)]
    assert line.endswith(f"{describe_head(INTERACTIONS).verdict}.")
    status, out, _ = run("models", "list", "--json")
    assert [(model["name"], model["objective"]) for model in json.loads(out)] == [
        (CAUSAL, "clm"),
        (MASKED, "mlm"),
        (INTERACTIONS, "interactions"),
    ]


def test_listing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom performers.cli import main\nsys.argv = ['performers', 'models', 'list']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert MASKED in done.stdout


def test_a_card_is_shown_and_a_path_printed(run: Run) -> None:
    status, out, _ = run("models", "show", MASKED)
    assert status == 0
    assert out.strip() == describe(MASKED).card.strip()
    status, out, _ = run("models", "path", CAUSAL)
    assert status == 0
    assert (Path(out.strip()) / "model.safetensors").is_file()
    shown = json.loads(run("models", "show", MASKED, "--json")[1])
    assert shown["held_out"]["test"]["scheme"] == "mask"
    assert json.loads(run("models", "path", MASKED, "--json")[1])["path"] == shown["folder"]


def test_the_model_of_interactions_is_shown_and_found_as_the_others_are(run: Run) -> None:
    from performers.tools.interactions.model import BUNDLED, BUNDLED_NAME, SETTINGS

    assert BUNDLED_NAME == INTERACTIONS
    status, out, _ = run("models", "show", INTERACTIONS)
    assert status == 0
    assert out.strip() == (BUNDLED / "README.md").read_text().strip()
    status, out, _ = run("models", "path", INTERACTIONS)
    assert (status, Path(out.strip())) == (0, BUNDLED)
    assert (BUNDLED / SETTINGS).is_file()
    shown = json.loads(run("models", "show", INTERACTIONS, "--json")[1])
    assert (shown["name"], shown["body"], shown["folder"]) == (INTERACTIONS, MASKED, str(BUNDLED))
    status, out, err = run("embed", "--model", INTERACTIONS, "-i", "bundled:test", "-o", "x.npz")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "for `performers interact predict`" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "show", "performers/nothing"],
        ["models", "path", "performers/nothing"],
        ["evaluate", "--model", "performers/nothing", "-i", "bundled:test"],
        ["embed", "--model", "performers/nothing", "-i", "bundled:test", "-o", "x.npz"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_unknown_name_is_one_line_that_lists_the_others(
    arguments: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "performers/nothing" in err
    assert MASKED in err
    assert CAUSAL in err


def test_without_models_there_is_nothing_to_list_and_a_model_has_to_be_given(
    run: Run, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "WEIGHTS", tmp_path)
    assert run("models", "list")[:2] == (0, "This installation has no bundled models.\n")
    for command in (["evaluate", "-i", fasta], ["embed", "-i", fasta, "-o", tmp_path / "e.npz"]):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert err.startswith("performers: No --model was given")
        assert err.count("\n") == 1


def test_the_bundled_model_reads_where_no_other_is_named(run: Run, fasta: Path, tmp_path: Path) -> None:
    assert run("embed", "-i", fasta, "-o", tmp_path / "a.npz")[0] == 0
    assert run("embed", "-i", fasta, "-o", tmp_path / "b.npz", "--model", MASKED)[0] == 0
    first, second = (np.load(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert first.files == second.files
    assert all(np.array_equal(first[key], second[key]) for key in first.files)
    assert MASKED in (tmp_path / "methods.txt").read_text() or any(
        MASKED in path.read_text() for path in tmp_path.rglob("*methods.txt")
    )


@pytest.mark.parametrize("options", [[], ["--model", CAUSAL]], ids=["masked", "causal"])
def test_evaluate_without_proteins_prints_the_three_held_out_rows(
    options: list[str], run: Run, fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "HELD_OUT", dict.fromkeys(evaluation.HELD_OUT, str(fasta)))
    status, out, _ = run("evaluate", *options)
    assert status == 0
    assert out.startswith(options[-1] if options else MASKED)
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == [
        "random proteins",
        "whole clusters",
        "whole families",
    ]
    result = json.loads(run("evaluate", *options, "--json")[1])
    assert list(result["sets"]) == ["random", "test", "ood"]
    assert result["sets"]["ood"]["scheme"] == (None if options else "mask")
    alone = json.loads(run("evaluate", *options, "-i", fasta, "--json")[1])
    assert alone["accuracy"] == result["sets"]["test"]["accuracy"]
    assert alone["inputs"][0]["name"] == str(fasta)
