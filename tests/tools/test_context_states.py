"""`performers read`: a family into a file of fixed size, and what is done with it."""

from __future__ import annotations

import csv
import io
import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
from performers.cli import app
from performers.data import STANDARD_RESIDUES, Record
from performers.errors import InputError, OutputError, RunError, UnsupportedError
from performers.folders import sha256_of
from performers.tools import embed, reading, score
from performers.tools.context_states import ContextState, model_hash, read_context
from performers.tools.language_model import LanguageModel, Unread
from performers.tools.reading import read_to

Folders = Callable[[str], Path]
Start = Callable[..., BaseProcess]
TIGHT = {"rtol": 1e-4, "atol": 1e-5}


def random_records(count: int, seed: int = 0, longest: int = 60) -> list[Record]:
    draw = random.Random(seed)
    return [
        Record(f"p{number}", "", "".join(draw.choices(STANDARD_RESIDUES, k=draw.randint(5, longest))), number)
        for number in range(1, count + 1)
    ]


def fasta(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(f">{record.id}\n{record.sequence}\n" for record in records))
    return path


@pytest.fixture(scope="module")
def model(folders: Folders) -> LanguageModel:
    return LanguageModel.open(folders("masked"), device="cpu", dtype="float32")


def assert_same(first: ContextState, second: ContextState, **tolerance: float) -> None:
    assert (first.model, first.proteins, first.residues) == (second.model, second.proteins, second.residues)
    for one, other in zip(first.context.states, second.context.states, strict=True):
        torch.testing.assert_close(one.numerator, other.numerator, **tolerance)
        torch.testing.assert_close(one.denominator, other.denominator, **tolerance)


def test_the_order_of_a_family_is_nothing(model: LanguageModel) -> None:
    family = random_records(40)
    shuffled = random.Random(1).sample(family, len(family))
    assert_same(read_context(model, family), read_context(model, shuffled, toks_per_batch=200), **TIGHT)


def test_two_states_added_are_the_two_families_read_together(model: LanguageModel) -> None:
    family = random_records(12)
    first, second = (read_context(model, part) for part in (family[:5], family[5:]))
    assert_same(first + second, read_context(model, family), **TIGHT)


def test_what_was_added_can_be_subtracted(model: LanguageModel) -> None:
    family = random_records(12)
    first, second = (read_context(model, part) for part in (family[:5], family[5:]))
    assert_same(first + second - second, first, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="is no part of"):
        first - (first + second)


def test_what_is_no_part_of_a_sum_is_not_taken_out_of_it(model: LanguageModel) -> None:
    family = random_records(12, longest=47)
    whole, part = read_context(model, family), read_context(model, family[3:5])
    longer = Record("long", "", "".join(random.Random(3).choices(STANDARD_RESIDUES, k=150)), 1)
    with pytest.raises(InputError, match=r"in the longest: 150\) is no part of"):
        whole - read_context(model, [longer])
    # Of one length, letter after letter: what it leaves of a few features is more than what the family leaves.
    alike = Record("tryptophans", "", "W" * part.longest, 1)
    several = read_context(model, [alike] * 6)
    with pytest.raises(InputError, match=r"proteins: 6, .* is no part of the other one \(proteins: 99"):
        replace(whole, proteins=99, residues=9999) - several
    half = LanguageModel.open(model.folder, device="cpu", dtype="bfloat16")
    assert (read_context(half, family) - part).proteins == 10


@pytest.mark.parametrize("kernel", ["softmax", "gelu", "cos"])
def test_a_part_is_taken_out_whatever_the_kernel(kernel: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"kernel": kernel})).save_pretrained(tmp_path)
    PerformerTokenizer().save_pretrained(tmp_path)
    reader = LanguageModel.open(tmp_path, dtype="float32")
    family = random_records(8)
    first, second = (read_context(reader, part) for part in (family[:5], family[5:]))
    for one, other in zip((first + second - second).context.states, first.context.states, strict=True):
        found, expected = (state.denominator * state.log_scale.exp() for state in (one, other))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_a_file_has_one_size_for_any_family_and_comes_back_as_it_was(model: LanguageModel, tmp_path: Path) -> None:
    sizes = set()
    for count in (1, 9, 70):
        state = read_context(model, random_records(count))
        # Digits of the counts make the header a few bytes longer; safetensors pads it.
        state.write(tmp_path / "x.state", overwrite=True)
        sizes.add((tmp_path / "x.state").stat().st_size // 64)
        again = ContextState.read(tmp_path / "x.state")
        assert_same(state, again, rtol=0, atol=0)
        assert again.to_dict() == state.to_dict()
    assert len(sizes) == 1
    with pytest.raises(OutputError, match="already there"):
        state.write(tmp_path / "x.state")
    (tmp_path / "any").touch()
    assert (tmp_path / "x.state").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_what_a_reader_is_given_has_one_shape_and_size_whatever_the_family(model: LanguageModel) -> None:
    small, large = (read_context(model, random_records(count)).for_model(model) for count in (1, 60))
    for one, other in zip(small.states, large.states, strict=True):
        assert one.numerator.shape == other.numerator.shape
        assert one.nbytes == other.nbytes


def test_a_protein_is_read_with_the_context_alike_in_any_batch(model: LanguageModel, folders: Folders) -> None:
    family, proteins = random_records(6), random_records(5, seed=9)
    reader = LanguageModel.open(folders("masked"), device="cpu", dtype="float32")
    reader.use_context(read_context(model, family))
    with_context, alone = ([e.mean for e in embed(proteins, which)] for which in (reader, model))
    one_by_one = [next(embed([protein], reader)).mean for protein in proteins]
    for together, single, without in zip(with_context, one_by_one, alone, strict=True):
        np.testing.assert_allclose(together, single, rtol=1e-4, atol=1e-5)
        assert np.abs(together - without).max() > 1e-3


def test_scores_change_with_a_context_and_say_so(folders: Folders, tmp_path: Path) -> None:
    proteins = fasta(tmp_path / "family.fasta", random_records(8))
    state, out = tmp_path / "family.state", tmp_path / "scores.csv"
    run = CliRunner().invoke
    model = ["--model", str(folders("masked"))]
    done = run(app, ["read", str(proteins), "-o", str(state), *model], catch_exceptions=False)
    assert done.exit_code == 0
    assert "8 proteins" in done.stdout
    wild_type = "MKTAYIAKQRQISFVKSHFSRQ"
    command = ["score", "--wild-type", wild_type, "--saturate", "--no-heat-map", *model, "-o"]
    run(app, [*command, str(out), "--context", str(state)], catch_exceptions=False)
    run(app, [*command, str(tmp_path / "alone.csv")], catch_exceptions=False)
    assert out.read_text() != (tmp_path / "alone.csv").read_text()
    assert "summed states of 8 other proteins" in (tmp_path / "scores.csv.record" / "methods.txt").read_text()
    direct = [found.score for found in score(wild_type, None, folders("masked"), context=state)]
    with out.open() as lines:
        written = [float(row["score"]) for row in csv.DictReader(lines)]
    np.testing.assert_allclose(written, direct, atol=1e-4)


def test_states_add_and_subtract_on_the_command_line(folders: Folders, tmp_path: Path) -> None:
    records = random_records(10)
    model = ["--model", str(folders("masked")), "--dtype", "float32"]

    def read(name: str, *arguments: str) -> ContextState:
        done = CliRunner().invoke(app, ["read", *arguments, "-o", str(tmp_path / name), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["bytes"] == (tmp_path / name).stat().st_size
        return ContextState.read(tmp_path / name)

    whole = read("ab.state", str(fasta(tmp_path / "ab.fasta", records)), *model)
    first = read("a.state", "-i", str(fasta(tmp_path / "a.fasta", records[:6])), *model)
    second = read("b.state", str(fasta(tmp_path / "b.fasta", records[6:])), *model)
    a, b, ab = (str(tmp_path / name) for name in ("a.state", "b.state", "ab.state"))
    assert_same(read("sum.state", "--add", a, "--add", b), whole, **TIGHT)
    assert_same(read("rest.state", "--add", ab, "--subtract", b), first, rtol=1e-3, atol=1e-3)
    assert_same(read("more.state", str(tmp_path / "b.fasta"), "--add", a, *model), first + second, **TIGHT)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = CliRunner().invoke(app, ["read", "--add", a, "--subtract", ab, "-o", str(tmp_path / "zero.state")])
    assert isinstance(done.exception, InputError)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_state_of_another_model_is_refused_by_its_hash(
    model: LanguageModel, folders: Folders, tmp_path: Path
) -> None:
    read_context(model, random_records(2)).write(tmp_path / "family.state")
    causal = folders("causal")
    with pytest.raises(InputError, match="belongs to the weights that made it"):
        LanguageModel.open(causal, context=tmp_path / "family.state")
    done = CliRunner().invoke(
        app, ["embed", "-i", str(fasta(tmp_path / "x.fasta", random_records(1))), "-o", str(tmp_path / "x.npz"),
              "--model", str(causal), "--context", str(tmp_path / "family.state")]
    )  # fmt: skip
    assert done.exit_code != 0
    assert not (tmp_path / "x.npz").exists()
    other = read_context(LanguageModel.open(causal), random_records(2))
    with pytest.raises(InputError, match="different models do not add"):
        other + ContextState.read(tmp_path / "family.state")


def test_damage_is_found(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "family.state"
    read_context(model, random_records(2)).write(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for content, message in (
        (bytes(flipped), "SHA-256"),
        (whole[:-50], "damaged"),
        (b"MKTAYIAKQR", "no state of"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            ContextState.read(path)
    with pytest.raises(InputError, match="not there"):
        ContextState.read(tmp_path / "other.state")


def test_an_interruption_leaves_nothing(
    model: LanguageModel, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    state = read_context(model, random_records(2))
    monkeypatch.setattr("performers.tools.context_states.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.write(tmp_path / "family.state")
    assert list(tmp_path.iterdir()) == []


def test_equal_states_are_equal_files(model: LanguageModel, tmp_path: Path) -> None:
    state = read_context(model, random_records(3))
    for number in range(5):
        state.write(tmp_path / f"{number}.state")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_reading_killed_at_every_moment_ends_with_the_bytes_of_a_whole_one(
    folders: Folders, tmp_path: Path, start: Start
) -> None:
    records = random_records(12)
    records.append(Record("two", "", ":".join(record.sequence for record in records[:2]), 13))
    arguments = {"sources": [str(fasta(tmp_path / "x.fasta", records))], "model": str(folders("masked"))}
    arguments |= {"device": "cpu", "dtype": "float32", "toks_per_batch": 90}
    whole = read_to(tmp_path / "x.state", **arguments)
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = 0
    # Every run gets a little further than the one before: it dies where a sum, the output or its record is written.
    for event in range(0, 100, 2):
        process = start("run_and_die", "read", {"output": str(folder / "x.state"), **arguments}, event, 100)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= 4
    assert (folder / "x.state").read_bytes() == whole.output.read_bytes()
    assert (folder / "methods.txt").read_text() == (tmp_path / "methods.txt").read_text()
    names = ["cite.bibtex", "methods.txt", "run.json", "x.state"]
    assert sorted(path.name for path in folder.iterdir()) == names


def interrupted_reading(monkeypatch: pytest.MonkeyPatch, after: int, output: Path, **arguments: Any) -> None:
    """Reads until a SIGTERM comes in a forward pass, as the command line hears it."""
    left_behind, passes = LanguageModel.left_behind, 0

    def left(self: LanguageModel, rows: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > after:
            raise SystemExit(143)
        return left_behind(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "left_behind", left)
        with pytest.raises(SystemExit):
            read_to(output, **arguments)


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each forward pass from now on, how many chains it reads."""
    left_behind, passes = LanguageModel.left_behind, list[int]()

    def left(self: LanguageModel, rows: Any) -> Any:
        passes.append(len(rows))
        return left_behind(self, rows)

    monkeypatch.setattr(LanguageModel, "left_behind", left)
    return passes


def test_what_was_read_is_not_read_again_unless_something_is_different(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proteins = fasta(tmp_path / "x.fasta", random_records(70))
    arguments: dict[str, Any] = {"sources": [str(proteins)], "model": str(folders("masked")), "device": "cpu"}
    output, other = tmp_path / "x.state", tmp_path / "y.state"
    for path in (output, other):
        interrupted_reading(monkeypatch, 2, path, **arguments)
        assert f"is kept in {tmp_path / f'.{path.name}.building'}; the same command goes on" in capsys.readouterr().err
    passes = count_passes(monkeypatch)
    outcome = read_to(output, **arguments)
    assert passes == [6]
    assert "64 proteins" in capsys.readouterr().err
    assert (outcome.state.proteins, outcome.inputs[0]["name"]) == (70, str(proteins))
    assert not (tmp_path / ".x.state.building").exists()

    read_to(other, **arguments, max_length=500)
    assert passes == [6, 32, 32, 6]
    assert "is not used: it was read with another max_length" in capsys.readouterr().err
    again = read_to(output, **arguments)
    assert len(passes) == 4
    assert again.state.to_dict() == outcome.state.to_dict()
    assert f"{output} is complete" in capsys.readouterr().err
    with pytest.raises(OutputError, match="already there, of other settings"):
        read_to(output, **arguments, toks_per_batch=500)
    read_to(output, **arguments, restart=True)
    assert len(passes) == 7
    assert output.read_bytes() == other.read_bytes()


def test_other_input_is_read_from_its_start(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proteins = fasta(tmp_path / "x.fasta", random_records(40))
    arguments: dict[str, Any] = {"sources": [str(proteins)], "model": str(folders("masked")), "device": "cpu"}
    interrupted_reading(monkeypatch, 1, tmp_path / "x.state", **arguments)
    fasta(proteins, random_records(40, seed=1))
    found = read_to(tmp_path / "x.state", **arguments)
    assert "another input" in capsys.readouterr().err
    assert found.output.read_bytes() == read_to(tmp_path / "y.state", **arguments).output.read_bytes()
    kept = tmp_path / ".z.state.building" / "sum.safetensors"
    interrupted_reading(monkeypatch, 1, tmp_path / "z.state", **arguments)
    kept.write_bytes(kept.read_bytes()[:-50])
    assert read_to(tmp_path / "z.state", **arguments).output.read_bytes() == found.output.read_bytes()
    assert "is not used" in capsys.readouterr().err


def test_proteins_that_failed_before_a_kill_are_listed_once(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind = LanguageModel.left_behind

    def left_unless_long(self: LanguageModel, rows: Any) -> Any:
        return Unread("it is too long") if max(map(len, rows)) > 200 else left_behind(self, rows)

    monkeypatch.setattr(LanguageModel, "left_behind", left_unless_long)
    records = random_records(70)
    records[39] = Record("long", "", "MK" * 150, 40)
    arguments: dict[str, Any] = {"sources": [str(fasta(tmp_path / "x.fasta", records))], "model": folders("masked")}
    interrupted_reading(monkeypatch, 15, tmp_path / "x.state", **arguments)
    outcome = read_to(tmp_path / "x.state", **arguments)
    assert outcome.failed == [(40, "long", "it is too long")]
    assert outcome.state.proteins == 69


def test_an_interrupted_pipe_leaves_nothing_and_says_so(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = fasta(tmp_path / "x.fasta", random_records(40)).read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    arguments: dict[str, Any] = {"sources": ["-"], "model": str(folders("masked"))}
    interrupted_reading(monkeypatch, 1, tmp_path / "x.state", **arguments)
    assert "cannot be read again" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.fasta"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert read_to(tmp_path / "x.state", **arguments).state.proteins == 40


def test_a_long_reading_says_how_far_it_is(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "TELL_EVERY", 0)
    read_to(tmp_path / "x.state", [str(fasta(tmp_path / "x.fasta", random_records(40)))], folders("masked"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["32", "proteins"], ["40", "proteins"]]
    assert all(line.endswith(" residues/s") for line in lines)


def test_a_state_says_how_it_was_made_and_never_loses_the_record_of_another(folders: Folders, tmp_path: Path) -> None:
    proteins = fasta(tmp_path / "x.fasta", random_records(5))
    first = read_to(tmp_path / "x.state", [str(proteins)], folders("masked"), device="cpu")
    read_to(tmp_path / "sum.state", [], add=[first.output, first.output], subtract=[])
    for name, folder, count in (("x.state", tmp_path, 5), ("sum.state", tmp_path / "sum.state.record", 10)):
        record = json.loads((folder / "run.json").read_text())
        assert record["command"] == "read"
        assert record["results"]["output"] == str(tmp_path / name)
        assert record["results"]["proteins"] == count
        assert record["sessions"][-1]["status"] == "finished"
        assert "@inproceedings" in (folder / "cite.bibtex").read_text()
        assert f"a context of {count} proteins" in (folder / "methods.txt").read_text()
    made = json.loads((tmp_path / "run.json").read_text())
    assert made["inputs"][0]["name"] == str(proteins)
    assert made["weights"][0]["sha256"]
    added = json.loads((tmp_path / "sum.state.record" / "run.json").read_text())["arguments"]["add"]
    assert [file["sha256"] for file in added] == [sha256_of(first.output)] * 2


def test_a_protein_that_cannot_be_read_is_listed_and_the_others_are_summed(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = random_records(5)
    left_behind = LanguageModel.left_behind

    def left_unless_long(self: LanguageModel, rows: Any) -> Any:
        return Unread("it is too long") if max(map(len, rows)) > 200 else left_behind(self, rows)

    monkeypatch.setattr(LanguageModel, "left_behind", left_unless_long)
    long = Record("long", "", "MK" * 150, 6)
    path = fasta(tmp_path / "x.fasta", [*records[:2], long, *records[2:]])
    model = LanguageModel.open(folders("masked"), dtype="float32")
    done = CliRunner().invoke(
        app, ["read", str(path), "-o", str(tmp_path / "x.state"), "--model", str(folders("masked"))]
    )
    assert done.exit_code == 3
    assert "1 of 6 proteins failed" in done.stderr
    assert (tmp_path / "failed.tsv").read_text().splitlines()[1:] == ["3\tlong\tit is too long"]
    assert_same(ContextState.read(tmp_path / "x.state"), read_context(model, records), rtol=1e-2, atol=1e-2)
    with pytest.raises(RunError, match="too long"):
        read_context(model, [long])


def test_a_partner_longer_than_trained_is_remarked_upon(model: LanguageModel) -> None:
    state = read_context(model, random_records(3))
    model.trained_length = 20
    try:
        assert "was trained on 20 tokens" in state.remarks(model)[0]
    finally:
        model.trained_length = None
    assert state.remarks(model) == []


def test_models_without_states_of_fixed_size_are_refused(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="only a Performer"):
        read_context(LanguageModel.open(folders("esm")), random_records(1))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    PerformerForMaskedLM(PerformerConfig(**sizes, attention=["favor", "exact"])).save_pretrained(tmp_path)
    PerformerTokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="none that keeps every key"):
        read_context(LanguageModel.open(tmp_path), random_records(1))


def test_a_split_layer_keeps_what_its_favor_half_leaves(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    PerformerForMaskedLM(PerformerConfig(**sizes, attention="split")).save_pretrained(tmp_path)
    PerformerTokenizer().save_pretrained(tmp_path)
    model = LanguageModel.open(tmp_path, dtype="float32")
    state = read_context(model, random_records(3))
    state.write(tmp_path / "x.state")
    assert set(load_file(tmp_path / "x.state")) == {
        f"layers.{layer}.second.{part}" for layer in range(2) for part in ("numerator", "denominator", "log_scale")
    }
    assert model_hash(model) == ContextState.read(tmp_path / "x.state").model
    reader = LanguageModel.open(tmp_path, dtype="float32", context=tmp_path / "x.state")
    target = random_records(1, seed=5)
    assert np.abs(next(embed(target, reader)).mean - next(embed(target, model)).mean).max() > 0


def test_nothing_to_read_is_said(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no proteins"):
        read_context(model, iter(()))
    done = CliRunner().invoke(app, ["read", "-o", str(tmp_path / "x.state")])
    assert isinstance(done.exception, InputError)
    done = CliRunner().invoke(app, ["read", "bundled:test", "-o", str(tmp_path / "nowhere" / "x.state")])
    assert isinstance(done.exception, OutputError)
