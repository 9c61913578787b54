"""Embeddings: what the vectors are, that nothing but the protein decides them, and that a killed run ends as a whole one."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import shutil
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
from performers.data import Record
from performers.errors import DiskFullError, InputError, OutputError, RunError, UnsupportedError
from performers.memory import forget_peak, peak_memory, resident_memory
from performers.tools import Embedding, LanguageModel, embed, embed_to, jobs
from performers.tools.embedding import Embedder
from performers.tools.tool import Outcome, Tool

Folders = Callable[[str], Path]
Start = Callable[..., BaseProcess]
EVERYTHING = ("mean", "per_tok", "cls")


def embedded(proteins: Any, model: Any, **options: Any) -> list[Embedding]:
    return list(embed(proteins, model, include=EVERYTHING, device="cpu", **options))


@pytest.fixture(scope="module")
def model(masked: Path) -> LanguageModel:
    return LanguageModel.open(masked, device="cpu")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of one to three proteins."""
    monkeypatch.setattr(Tool, "shard_tokens", 60)


def test_vectors_are_means_without_start_and_end_tokens(masked: Path, model: LanguageModel) -> None:
    stock = PerformerForMaskedLM.from_pretrained(masked).eval()
    with torch.inference_mode():
        inputs = PerformerTokenizer()("MKTAYIAK", return_tensors="pt")
        states = stock.performer(inputs["input_ids"]).last_hidden_state[0].numpy()
    (found,) = embedded([Record("a", "its description", "MKTAYIAK", 7)], model)
    assert (found.id, found.description, found.number, found.layers) == ("a", "its description", 1, (2,))
    np.testing.assert_allclose(found.mean, states[1:-1].mean(0), atol=1e-6)
    np.testing.assert_allclose(found.cls, states[0], atol=1e-6)
    assert found.per_tok is not None
    assert found.per_tok.dtype == np.float16
    np.testing.assert_allclose(found.per_tok, states[1:-1], atol=5e-3)


def test_order_and_company_change_nothing(model: LanguageModel, records: list[Record], small_shards: None) -> None:
    order = random.Random(2).sample(range(len(records)), len(records))
    forward = embedded(records, model)
    shuffled = embedded([records[i] for i in order], model, toks_per_batch=200)
    assert [embedding.id for embedding in shuffled] == [records[i].id for i in order]
    for place, index in enumerate(order):
        (alone,) = embedded([records[index]], model)
        for other in (forward[index], shuffled[place]):
            np.testing.assert_allclose(other.mean, alone.mean, atol=1e-5)
            np.testing.assert_allclose(other.cls, alone.cls, atol=1e-5)
            np.testing.assert_allclose(other.per_tok, alone.per_tok, atol=1e-5, rtol=2e-3)  # a step of float16


def test_bfloat16_stays_near_float32(masked: Path, records: list[Record]) -> None:
    precise, fast = (list(embed(records, masked, device="cpu", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for one, other in zip(precise, fast, strict=True):
        assert one.mean is not None
        assert other.mean is not None
        assert not np.array_equal(one.mean, other.mean)
        assert np.linalg.norm(one.mean - other.mean) < 0.03 * np.linalg.norm(one.mean)


def test_isolated_chains_are_the_proteins_they_are_alone_and_joint_ones_are_not(model: LanguageModel) -> None:
    whole, first, second = embedded([Record("", "", text, 1) for text in ("MKTAY:WWC", "MKTAY", "WWC")], model)
    assert first.per_tok is not None
    assert second.per_tok is not None
    assert first.mean is not None
    assert second.mean is not None
    expected = np.concatenate([first.per_tok, second.per_tok])
    np.testing.assert_allclose(whole.per_tok, expected, atol=1e-5, rtol=2e-3)
    np.testing.assert_allclose(whole.mean, (5 * first.mean + 3 * second.mean) / 8, atol=1e-5)
    (joint,) = embedded([Record("", "", "MKTAY:WWC", 1)], model, chains="joint")
    assert joint.per_tok is not None
    assert joint.per_tok.shape == (8, 16)
    assert np.abs(joint.per_tok.astype(np.float32) - expected.astype(np.float32)).max() > 1e-2


def test_layers_count_from_either_end(model: LanguageModel, records: list[Record]) -> None:
    (found,) = embedded(records[:1], model, layers=[0, -1, 2, -2])
    assert found.layers == (0, 2, 1)
    assert found.mean is not None
    assert found.mean.shape == (3, 16)
    (last,) = embedded(records[:1], model)
    np.testing.assert_allclose(found.mean[1], last.mean, atol=1e-6)
    with pytest.raises(InputError, match="layers has 3"):
        embed(records, model, layers=[3])


@pytest.mark.parametrize("length", [1, 2, 8192, 100_000, 1_000_000])
def test_any_length_gives_finite_numbers(model: LanguageModel, length: int) -> None:
    sequence = ("MKTAYIAKQRQISFVKSHFSRQ" * (length // 22 + 1))[:length]
    (found,) = embedded([Record("long", "", sequence, 1)], model)
    assert found.per_tok is not None
    assert found.per_tok.shape == (length, 16)
    assert np.isfinite(found.per_tok).all()
    assert np.isfinite(found.mean).all()


def read_h5(path: Path) -> list[tuple[str, Any]]:
    with h5py.File(path) as file:
        return [(entry.attrs["id"], entry[()] if isinstance(entry, h5py.Dataset) else {k: v[()] for k, v in entry.items()})
                for entry in file.values()]  # fmt: skip


def test_hdf5_is_keyed_by_identifiers_whatever_they_are(masked: Path, tmp_path: Path) -> None:
    names = ["a/b", "a/b", "A/B", "..", ".", "", "a/b", "x" * 300, "sp|P1|é", "a%2Fb"]
    (tmp_path / "x.csv").write_text("id,sequence\n" + "".join(f"{name},MKT{'A' * i}\n" for i, name in enumerate(names)))
    embed_to(tmp_path / "e.h5", [str(tmp_path / "x.csv")], masked, device="cpu")
    with h5py.File(tmp_path / "e.h5") as file:
        keys = ["a%2Fb", "a%2Fb#2", "A%2FB", "..", "%2E", "unnamed", "a%2Fb#3", "x" * 300, "sp|P1|é", "a%2Fb#4"]
        assert list(file) == keys
        assert [file[key].attrs["id"] for key in keys] == names
        assert {file[key].shape for key in keys} == {(16,)}
        assert file[keys[0]].dtype == np.float32
    expected = embed(str(tmp_path / "x.csv"), masked, device="cpu")
    for (_, vector), embedding in zip(read_h5(tmp_path / "e.h5"), expected, strict=True):
        np.testing.assert_allclose(vector, embedding.mean, atol=1e-6)


def test_every_format_holds_the_same_numbers(masked: Path, fasta: Path, records: list[Record], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for layers in ([-1], [0, 2]):
        expected = [
            {kind: np.atleast_2d(getattr(e, kind)) if kind != "per_tok" else getattr(e, kind) for kind in EVERYTHING}
            for e in embedded(str(fasta), masked, layers=layers)
        ]
        several = len(layers) > 1
        made = {name: tmp_path / f"{len(layers)}{name}" for name in ("e.h5", "e.npz", "e.parquet", "folder")}
        for output in made.values():
            outcome = embed_to(output, [str(fasta)], masked, include=EVERYTHING, layers=layers, device="cpu")
            assert (outcome.items, outcome.failed) == (len(records), [])
        archive = np.load(made["e.npz"])
        assert archive["ids"].tolist() == [record.id for record in records]
        assert archive["lengths"].tolist() == [len(record.sequence) for record in records]
        starts = np.concatenate(([0], np.cumsum(archive["lengths"])))
        rows = parquet.read_table(made["e.parquet"]).to_pylist()
        for index, ((identifier, entry), arrays) in enumerate(zip(read_h5(made["e.h5"]), expected, strict=True)):
            assert identifier == records[index].id == rows[index]["id"]
            saved = torch.load(made["folder"] / f"{identifier}.pt", weights_only=True)
            assert saved["label"] == identifier
            for kind, name in (
                ("mean", "mean_representations"),
                ("cls", "bos_representations"),
                ("per_tok", "representations"),
            ):
                array = arrays[kind]
                by_layer = array if several or kind != "per_tok" else array[None]
                np.testing.assert_array_equal(np.reshape(entry[kind], by_layer.shape), by_layer)
                for place, layer in enumerate([0, 2] if several else [2]):
                    np.testing.assert_array_equal(saved[name][layer].numpy(), by_layer[place])
                    column = f"{kind}_layer_{layer}" if several else kind
                    assert np.array(rows[index][column], by_layer.dtype).tolist() == by_layer[place].ravel().tolist()
                    part = (
                        archive[kind][starts[index] : starts[index + 1]] if kind == "per_tok" else archive[kind][index]
                    )
                    found = part[..., place, :] if several else part
                    np.testing.assert_array_equal(found, by_layer[place])


def test_pt_files_stay_in_their_folder(masked: Path, tmp_path: Path) -> None:
    names = ["../../evil", "a/b", "A/B", "..", ".hidden", "", "x" * 300, "C:\\evil|"]
    (tmp_path / "x.csv").write_text("id,sequence\n" + "".join(f"{name},MKT\n" for name in names))
    embed_to(tmp_path / "out" / "pt", [str(tmp_path / "x.csv")], masked, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.csv"]
    files = list((tmp_path / "out" / "pt").glob("*.pt"))
    assert len({file.name.casefold() for file in files}) == len(names)
    assert sorted(torch.load(file, weights_only=True)["label"] for file in files) == sorted(names)


def content(path: Path) -> dict[str, bytes]:
    """A file, or the files of a folder but for the record of when it was made."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.name != "run.json"}


@pytest.mark.parametrize(
    "name",
    ["e.h5", "e.npz", pytest.param("e.parquet", marks=pytest.mark.slow), pytest.param("pt", marks=pytest.mark.slow)],
)
def test_a_run_killed_at_every_moment_ends_with_the_bytes_of_a_whole_one(
    name: str, masked: Path, fasta: Path, tmp_path: Path, start: Start, small_shards: None
) -> None:
    arguments = {"sources": [str(fasta)], "model": str(masked), "include": EVERYTHING, "device": "cpu"}
    embed_to(tmp_path / "whole" / name, **arguments)
    killed = 0
    # Every shard and the end have some ten moments to die at; each run gets a little further than the one before.
    for event in range(100):
        process = start(
            "run_and_die", "embed", {"output": str(tmp_path / "killed" / name), **arguments}, 3 + 6 * event, 60
        )
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if (tmp_path / "killed" / name).exists():  # it has its name: then it is whole, if not yet its record
            found, whole = (content(tmp_path / run / name) for run in ("killed", "whole"))
            vectors = whole.keys() - {"methods.txt", "cite.bibtex"}
            assert {key: found.get(key) for key in vectors} == {key: whole[key] for key in vectors}
        killed += 1
    assert killed >= 3
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not any(path.name.startswith(".") for path in (tmp_path / "killed").iterdir())


def test_what_was_done_is_not_done_again(
    masked: Path, fasta: Path, tmp_path: Path, start: Start, small_shards: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments: dict[str, Any] = {"sources": [str(fasta)], "model": str(masked), "device": "cpu"}
    process = start("run_and_be_interrupted", "embed", {"output": str(tmp_path / "e.npz"), **arguments}, 60)
    process.join()
    assert process.exitcode == 143
    saved: list[int] = []
    save = jobs._Work.save

    def counted(work: Any, index: int, results: Any) -> None:
        saved.append(index)
        save(work, index, results)

    monkeypatch.setattr(jobs._Work, "save", counted)
    with pytest.raises(OutputError, match="another include"):
        embed_to(tmp_path / "e.npz", include=["cls"], **arguments)
    embed_to(tmp_path / "e.npz", **arguments)
    assert saved[0] == 3
    assert "3 of" in capsys.readouterr().err
    saved.clear()
    again = embed_to(tmp_path / "e.npz", **arguments)
    assert (saved, again.items, again.done) == ([], 12, True)
    assert "is complete" in capsys.readouterr().err
    with pytest.raises(OutputError, match="already there"):
        embed_to(tmp_path / "e.npz", layers=[0], **arguments)
    embed_to(tmp_path / "e.npz", layers=[0], restart=True, **arguments)
    assert saved[0] == 0


def test_the_input_of_unfinished_work_may_not_change(masked: Path, fasta: Path, tmp_path: Path, start: Start) -> None:
    copy = tmp_path / "copy.fasta"
    copy.write_bytes(fasta.read_bytes())
    arguments: dict[str, Any] = {"output": str(tmp_path / "e.npz"), "sources": [str(copy)], "model": str(masked)}
    start("run_and_be_interrupted", "embed", {**arguments, "device": "cpu"}, 60).join()
    copy.write_text(copy.read_text() + ">new\nMKT\n")
    with pytest.raises(OutputError, match="on other input"):
        embed_to(**arguments, device="cpu")


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(
    masked: Path, fasta: Path, records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    residues = sum(len(record.sequence) for record in records)
    outcome = embed_to(tmp_path / "e.npz", [str(fasta)], masked, dry_run=True, device="cpu")
    assert not outcome.done
    assert outcome.estimate["bytes"] > 12 * 16 * 4
    assert f"12 records, {residues:,} residues" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    masked: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    for dry_run in (False, True):
        with pytest.raises(DiskFullError, match="1,000 are free"):
            embed_to(tmp_path / "e.npz", [str(fasta)], masked, device="cpu", dry_run=dry_run)
        assert list(tmp_path.iterdir()) == []


def test_a_poisonous_record_fails_alone_and_is_listed(folders: Folders, tmp_path: Path, records: list[Record]) -> None:
    (tmp_path / "x.fasta").write_text(f">good\n{records[0].sequence}\n>long one\n{'M' * 100}\n>fine\nMKT\n")
    outcome = embed_to(tmp_path / "e.npz", [str(tmp_path / "x.fasta")], folders("bert"), device="cpu")
    assert np.load(tmp_path / "e.npz")["ids"].tolist() == ["good", "fine"]
    assert [(number, name) for number, name, _ in outcome.failed] == [(2, "long")]
    lines = (tmp_path / "failed.tsv").read_text().splitlines()
    assert lines[0] == "number\tid\treason"
    assert lines[1] == "2\tlong\tit takes 102 tokens, and the model has positions for 60 only"
    failures: list[tuple[int, str, str]] = []
    found = list(embed(str(tmp_path / "x.fasta"), folders("bert"), device="cpu", failures=failures))
    assert [embedding.id for embedding in found] == ["good", "fine"]
    assert failures == outcome.failed
    with pytest.raises(RunError, match="Number 2"):
        list(embed(str(tmp_path / "x.fasta"), folders("bert"), device="cpu"))


def test_a_record_that_is_left_out_as_asked_is_listed_too(
    folders: Folders, tmp_path: Path, small_shards: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.fasta").write_text(f">good\nMKT\n>bad one\nMK1T\n>pair\nMKT:M*\n>long\n{'M' * 100}\n>fine\nMKT\n")
    (tmp_path / "y.csv").write_text("id,sequence\nlast,MJ\n")
    sources = [str(tmp_path / "x.fasta"), str(tmp_path / "y.csv")]
    made = tmp_path / "made"
    for _ in range(2):  # the second time it is complete
        outcome = embed_to(made / "e.npz", sources, folders("bert"), on_invalid="skip", device="cpu")
        assert outcome.items == 6
        assert [tuple(row) for row in outcome.failed] == [
            (2, "bad", "residue 3: '1' is not a residue"),
            (3, "pair", "chain 2, residue 2: '*' is not a residue"),
            (4, "long", "it takes 102 tokens, and the model has positions for 60 only"),
            (6, "last", "residue 2: 'J' is not a residue"),
        ]
    assert "4 of 6 records failed" in capsys.readouterr().err
    assert "Embeddings of 2 proteins" in (made / "methods.txt").read_text()
    assert np.load(made / "e.npz")["ids"].tolist() == ["good", "fine"]
    assert len((made / "failed.tsv").read_text().splitlines()) == 5
    with pytest.raises(InputError, match=r"There are no records to work on in .*: all 1 records were left out"):
        embed_to(tmp_path / "none.npz", [sources[1]], folders("bert"), on_invalid="skip", device="cpu")


def test_where_nothing_can_be_read_there_is_no_output(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(f">long\n{'M' * 100}\n")
    with pytest.raises(
        InputError, match=r"None of the 1 records can be read, first number 1 \(long\): it takes 102 tokens"
    ):
        embed_to(tmp_path / "e.npz", [str(tmp_path / "x.fasta")], folders("bert"), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["x.fasta"]


def test_a_damaged_file_leaves_nothing_behind(masked: Path, tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(">a\nMKT\n>b\nMK1\n")
    with pytest.raises(InputError, match="record 2"):
        embed_to(tmp_path / "e.npz", [str(tmp_path / "x.fasta")], masked, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["x.fasta"]


def test_an_output_says_how_it_was_made_and_never_loses_the_record_of_another(
    masked: Path, fasta: Path, tmp_path: Path
) -> None:
    for name in ("one.npz", "two.npz"):
        embed_to(tmp_path / name, [str(fasta)], masked, device="cpu")
    for name, folder in (("one.npz", tmp_path), ("two.npz", tmp_path / "two.npz.record")):
        record = json.loads((folder / "run.json").read_text())
        assert record["command"] == "embed"
        assert record["results"]["output"] == str(tmp_path / name)
        assert record["inputs"][0]["name"] == str(fasta)
        assert record["weights"][0]["sha256"]
        assert "@inproceedings" in (folder / "cite.bibtex").read_text()
        assert "12 proteins" in (folder / "methods.txt").read_text()


OWN_FILES = ("run.json", "cite.bibtex", "methods.txt", "failed.tsv")


@pytest.mark.parametrize("own", OWN_FILES)
def test_files_that_were_there_before_stay_as_they_are(own: str, masked: Path, fasta: Path, tmp_path: Path) -> None:
    (tmp_path / own).write_text("mine")
    for restart in (False, False, True):
        embed_to(tmp_path / "e.npz", [str(fasta)], masked, device="cpu", restart=restart)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([own, "e.npz", "e.npz.record"])
    assert (tmp_path / own).read_text() == "mine"
    assert "12 proteins" in (tmp_path / "e.npz.record" / "methods.txt").read_text()
    (tmp_path / "two.npz.record").mkdir()
    (tmp_path / "two.npz.record" / "failed.tsv").write_text("mine")
    with pytest.raises(OutputError, match="holds what is no record of"):
        embed_to(tmp_path / "two.npz", [str(fasta)], masked, device="cpu")


class WithTable(Embedder):
    """`embed` that leaves a table beside its output, as other tools do."""

    known = True

    def write(self, results: Any, path: Path) -> None:
        super().write(results, path)
        path.with_suffix(".tsv").write_text("ours")

    def beside(self, path: Path) -> list[str]:
        return [path.with_suffix(".tsv").name] if self.known else []


@pytest.mark.parametrize("known", [True, False])
def test_a_file_beside_the_output_is_replaced_only_if_it_came_with_it(
    known: bool, model: LanguageModel, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(WithTable, "known", known)

    def run(name: str, **options: Any) -> Outcome:
        return jobs.run_tool(
            WithTable(model, [str(fasta)]), tmp_path / name, sources=[str(fasta)], settings={}, **options
        )

    table = tmp_path / "e.tsv"
    table.write_text("mine")
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"e\.tsv is there already, and was not made with"):
            run("e.h5", restart=restart)
        assert table.read_text() == "mine"
        assert not (tmp_path / "e.h5").exists()
    # Where it did not show before, the work is kept, and goes on when the file is out of the way.
    assert (tmp_path / ".e.h5.building").exists() == (not known)
    table.unlink()
    for restart in (False, False, True):
        run("e.h5", restart=restart)
    assert ("shards were done before" in capsys.readouterr().err) == (not known)
    assert json.loads((tmp_path / "run.json").read_text())["results"]["files"] == ["e.tsv"]
    with pytest.raises(OutputError, match=r"e\.tsv is there already"):
        run("e.hdf5")
    assert table.read_text() == "ours"


def test_an_output_is_never_one_of_the_inputs(masked: Path, tmp_path: Path) -> None:
    (tmp_path / "e.h5").write_text(">a\nMKT\n")
    with pytest.raises(InputError, match="is one of the inputs"):
        embed_to(tmp_path / "e.h5", [str(tmp_path / "e.h5")], masked, device="cpu", restart=True)
    assert (tmp_path / "e.h5").read_text() == ">a\nMKT\n"


def test_a_warning_beyond_the_trained_length(
    folders: Folders, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.fasta").write_text(f">long\n{'M' * 200}\n")
    embed_to(tmp_path / "e.npz", [str(tmp_path / "x.fasta")], folders("esm"), device="cpu")
    assert "trained on 128" in capsys.readouterr().err


def test_a_finetuned_model_knows_the_trained_length_of_its_card(
    masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(masked, tmp_path / "model")
    (tmp_path / "model" / "head.json").write_text('{"trained_length": 20}')
    (tmp_path / "x.fasta").write_text(f">long\n{'M' * 30}\n")
    embed_to(tmp_path / "e.npz", [str(tmp_path / "x.fasta")], tmp_path / "model", device="cpu")
    assert "Up to 32 tokens are read at a time, and the model was trained on 20" in capsys.readouterr().err


def test_what_a_model_or_format_cannot_do_is_refused(folders: Folders, fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="jointly"):
        embed(str(fasta), folders("esm"), chains="joint", device="cpu")
    for name in ("e.txt", "e.pt"):
        with pytest.raises(InputError, match="expected a name"):
            embed_to(tmp_path / name, [str(fasta)], folders("esm"), device="cpu")
    with pytest.raises(InputError, match="expected a name"):
        embed_to(tmp_path / "e", [str(fasta)], folders("esm"), file_format="npz", device="cpu")
    with pytest.raises(InputError, match="include"):
        embed(str(fasta), folders("esm"), include=["contacts"], device="cpu")  # pyright: ignore[reportArgumentType]


def test_vectors_that_float16_cannot_hold_are_not_made_infinite(masked: Path) -> None:
    model = LanguageModel.open(masked, device="cpu")
    model._model.performer.norm.weight.data.mul_(1e6)
    failures: list[tuple[int, str, str]] = []
    assert list(embed([Record("a", "", "MKT", 1)], model, include=["per_tok"], failures=failures)) == []
    assert "float16" in failures[0][2]


@pytest.mark.parametrize("ending", ["npz", pytest.param("h5", marks=pytest.mark.slow)])
def test_a_hundred_thousand_records_take_no_more_memory_than_ten_thousand(ending: str, tmp_path: Path) -> None:
    # As many features as the compiled backend asks for: it reads short proteins several times faster than the chunked one.
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"num_features": 32}))
    model.save_pretrained(tmp_path / "model")
    PerformerTokenizer().save_pretrained(tmp_path / "model")
    peaks = []
    for count in (10_000, 100_000):
        with (tmp_path / "x.fasta").open("w") as stream:
            stream.writelines(f">protein{i}\nMKTAYIAKQRQISFVKSHFSRQ\n" for i in range(count))
        forget_peak()
        outcome = embed_to(
            tmp_path / f"{count}.{ending}", [str(tmp_path / "x.fasta")], tmp_path / "model", device="cpu"
        )
        assert outcome.items == count
        peaks.append(peak_memory())
    assert peaks[1] <= 1.1 * peaks[0]


def test_memory_grows_no_faster_than_the_length_of_a_protein(masked: Path, tmp_path: Path, start: Start) -> None:
    peaks: list[int] = []
    for length in (40_000, 100_000, 200_000):
        process = start("embed_and_weigh", str(masked), length, str(tmp_path / "peak"))
        process.join()
        assert process.exitcode == 0
        peaks.append(int((tmp_path / "peak").read_text()))
    # Longer rows go through a layer in pieces, so the growth may be less; a matrix of length by length would make it the square.
    assert peaks[0] < peaks[1] < 1.2 * 2.5 * peaks[0], peaks
    assert peaks[1] < peaks[2] < 1.2 * 2 * peaks[1], peaks


@pytest.mark.parametrize("name", ["x.fasta.gz", "x.csv.gz", "x.a3m.gz"])
def test_a_gzip_file_that_ends_early_or_expands_without_end_leaves_nothing(
    name: str, masked: Path, tmp_path: Path
) -> None:
    header, record = ("id,sequence\n", "a,") if "csv" in name else ("", ">a\n")
    path = tmp_path / name
    path.write_bytes(gzip.compress(f"{header}{record}{'MKT' * 1000}\n".encode())[:-12])
    for _ in range(2):
        with pytest.raises(InputError, match=f"{name}.*(ends in the middle of its gzip data|cannot be read)"):
            embed_to(tmp_path / "e.npz", [str(path)], masked, device="cpu")
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write((header + record).encode())
        for _ in range(400):
            stream.write(b"A" * 1_000_000)
    forget_peak()
    before = resident_memory()
    with pytest.raises(InputError, match=f"{name}.*(more than 10,000,000|a line of more than)"):
        embed_to(tmp_path / "e.npz", [str(path)], masked, device="cpu")
    assert peak_memory() - before < 300e6
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_identifier_with_a_nul_byte_is_refused_before_the_work(masked: Path, tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_bytes(b">a\0b\nMKT\n")
    (tmp_path / "x.csv").write_bytes(b"id,sequence\na\0b,MKT\n")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": ["a\0b"], "sequence": ["MKT"]}), tmp_path / "x.parquet")
    for name in ("x.fasta", "x.csv", "x.parquet"):
        with pytest.raises(InputError, match=f"{name}.* holds a NUL byte; expected text"):
            embed_to(tmp_path / "e.h5", [str(tmp_path / name)], masked, device="cpu")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_table_holds_lists_that_are_longer_than_32_bits_count(masked: Path, fasta: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    embed_to(tmp_path / "e.parquet", [str(fasta)], masked, include=["mean", "per_tok"], device="cpu")
    schema = parquet.read_schema(tmp_path / "e.parquet")
    assert schema.field("per_tok").type == pyarrow.large_list(pyarrow.float16())
    assert schema.field("mean").type == pyarrow.list_(pyarrow.float32())


def test_an_outcome_is_fit_for_json(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path / "e.h5", 3, 10, [(1, "a", "b")])
    assert json.loads(json.dumps(outcome.to_dict()))["failed"] == 1
    assert {field.name for field in dataclasses.fields(outcome)} >= {"output", "items", "failed"}
