"""How a run becomes a bundled model: `scripts/bundle_models.py` as its author runs it, on a run of seconds."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from performers.data import Corpus, in_memory_corpus, read_fasta
from performers.folders import verify_folder
from performers.models import bundled
from performers.training import PretrainConfig, pretrain
from performers.training.checkpoint import open_model
from performers.training.configuration import read_config
from performers.training.evaluation import HELD_OUT, evaluate_folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
Bundle = Callable[..., Path]


def few() -> dict[str, Corpus]:
    """A handful of short proteins of each held-out set."""
    sets = {}
    for name, source in HELD_OUT.items():
        short = [record for record in read_fasta(source) if len(record.sequence) <= 100]
        sets[name] = in_memory_corpus(short[:6])
    return sets


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a tiny finished run, by objective and attention."""
    root = tmp_path_factory.mktemp("runs")
    proteins = root / "proteins.fasta"
    records = [record for record in read_fasta("bundled:validation") if len(record.sequence) <= 120][:20]
    proteins.write_text("".join(f">{record.id}\n{record.sequence}\n" for record in records))

    def run(objective: str, attention: str = "favor") -> Path:
        output = root / f"{objective}-{attention}"
        if not output.exists():
            values: dict[str, Any] = {
                "input": [str(proteins)],
                "validation": [str(proteins)],
                "output": str(output),
                "objective": objective,
                "scheme": "mask",
                "attention": attention,
                "preset": "tiny",
                "architecture": {"hidden_size": 16, "num_hidden_layers": 2},
                "context": 64,
                "batch_size": 2,
                "steps": 4,
                "threads": 1,
            }
            pretrain(PretrainConfig.parse(values))
        return output

    return run


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("bundle_models")
    monkeypatch.setattr(module, "held_out_sets", few)
    return module


@pytest.fixture
def bundle(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Runs the script; returns the folder that it wrote."""

    def call(run: Path, name: str, *options: object) -> Path:
        arguments = ["bundle_models.py", run, name, "--output", tmp_path / "weights", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        script.main()
        return tmp_path / "weights" / name

    return call


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_run_becomes_a_model_that_opens_with_rounded_weights(
    objective: str, runs: Callable[..., Path], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs(objective)
    folder = bundle(run, "protein-tiny", "--hardware", "an abacus")
    verify_folder(folder)
    monkeypatch.setattr(bundled, "WEIGHTS", folder.parent)
    trained, opened = open_model(run), open_model("performers/protein-tiny")
    assert type(opened) is type(trained)
    for (key, tensor), (_, rounded) in zip(trained.state_dict().items(), opened.state_dict().items(), strict=True):
        assert torch.equal(rounded, tensor if ".mechanism." in key else tensor.bfloat16().float()), key
    known = bundled.describe("performers/protein-tiny")
    assert (known.objective, known.context, list(known.held_out)) == (objective, 64, ["random", "test", "ood"])
    assert "an abacus" in known.card
    assert "20 proteins" in known.card
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["input"] == ["proteins.fasta"]
    assert str(run.parent) not in known.card


def test_a_training_in_two_parts_is_told_as_one(
    runs: Callable[..., Path], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runs("mlm")
    settings = read_config(first / "config.yaml")
    shape = dict.fromkeys(("preset", "attention", "kernel", "num_features", "projection")) | {"architecture": {}}
    start = str(first / "checkpoints" / "step-00000004")
    pretrain(
        PretrainConfig.parse({**settings, **shape, "init_from": start, "output": str(tmp_path / "run"), "seed": 1})
    )
    with pytest.raises(SystemExit, match="give that one with --before"):
        bundle(tmp_path / "run", "protein-tiny")
    with pytest.raises(SystemExit, match="did not begin with the weights in"):
        bundle(tmp_path / "run", "protein-tiny", "--before", runs("clm"))
    folder = bundle(tmp_path / "run", "protein-tiny", "--before", first)
    assert read_config(folder / "config-part-1.yaml")["preset"] == "tiny"
    assert read_config(folder / "config.yaml")["init_from"] == "step-00000004"
    card = (folder / "README.md").read_text()
    assert "4 of 2 contexts (learning rate 0.001 to" in card
    assert "; then 4 of 2 contexts" in card
    assert f"| tokens read | {2 * 4 * 2 * 64:,} " in card
    assert "evaluation in training was" in card
    assert "at step 8, on" in " ".join(card.split())


def test_figures_are_measured_once_for_the_same_weights(
    runs: Callable[..., Path], bundle: Bundle, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle(runs("mlm"), "protein-tiny")
    first = json.loads((folder / "evaluation.json").read_text())
    monkeypatch.setattr(script, "held_out_sets", lambda: pytest.fail("measured again"))
    folder = bundle(runs("mlm"), "protein-tiny")
    assert json.loads((folder / "evaluation.json").read_text()) == first
    elsewhere = folder.parent.parent / "evaluation.json"
    elsewhere.write_text(json.dumps(first))
    bundle(runs("mlm"), "protein-other", "--evaluation", elsewhere)
    with pytest.raises(SystemExit, match="figures of other weights"):
        bundle(runs("clm"), "protein-third", "--evaluation", elsewhere)
    assert not (folder.parent / "protein-third").exists()


def test_an_exact_transformer_stands_beside_it_if_it_is_the_same_model_on_the_same_residues(
    runs: Callable[..., Path], bundle: Bundle, tmp_path: Path
) -> None:
    exact = evaluate_folder(runs("mlm", "exact"), few())
    file = tmp_path / "exact.json"
    file.write_text(json.dumps(exact))
    folder = bundle(runs("mlm"), "protein-tiny", "--exact", file)
    assert f"{exact['sets']['ood']['accuracy']:.2%}" in (folder / "README.md").read_text()
    assert "exact Transformer" in (folder / "README.md").read_text()
    exact["sets"]["ood"]["seed"] = 1
    file.write_text(json.dumps(exact))
    with pytest.raises(SystemExit, match="ood figures are of other residues"):
        bundle(runs("mlm"), "protein-tiny", "--exact", file)
    file.write_text(json.dumps({**exact, "attention": ["favor"]}))
    with pytest.raises(SystemExit, match="expected exact attention"):
        bundle(runs("mlm"), "protein-tiny", "--exact", file)
    assert "exact Transformer" in (folder / "README.md").read_text()  # what was there stays


def test_more_than_the_package_can_hold_is_refused(
    runs: Callable[..., Path], bundle: Bundle, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="expected at most 1,000"):
        bundle(runs("mlm"), "protein-tiny")


def test_the_time_of_the_exact_transformer_is_that_of_the_runs_that_made_it(
    runs: Callable[..., Path], bundle: Bundle, tmp_path: Path
) -> None:
    run, exact = runs("mlm"), runs("mlm", "exact")
    file = tmp_path / "exact.json"
    file.write_text(json.dumps(evaluate_folder(exact, few())))
    folder = bundle(
        run, "protein-tiny", "--exact", file, "--exact-run", exact, "--exact-but", "It was trained by night."
    )
    (session,) = json.loads((exact / "run.json").read_text())["sessions"]
    assert json.loads((folder / "evaluation.json").read_text())["exact"]["seconds"] == session["seconds"]
    card = (folder / "README.md").read_text()
    assert "It was trained by night. Time was not equal: it took 0.00 hours" in card
    with pytest.raises(SystemExit, match="did not make the exact Transformer that was evaluated"):
        bundle(run, "protein-tiny", "--exact", file, "--exact-run", run)
    settings = read_config(exact / "config.yaml")
    other = tmp_path / "other"
    pretrain(PretrainConfig.parse({**settings, "learning_rate": 0.5, "output": str(other)}))
    file.write_text(json.dumps(evaluate_folder(other, few())))
    with pytest.raises(SystemExit, match=r"trained with learning_rate \[0.5\]; expected \[0.001\]"):
        bundle(run, "protein-tiny", "--exact", file, "--exact-run", other)
