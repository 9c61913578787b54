"""`performers read`: a family into a file of fixed size, and what is done with it."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
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
from performers.tools import embed, score
from performers.tools.context_states import ContextState, model_hash, read_context
from performers.tools.language_model import LanguageModel, Unread

Folders = Callable[[str], Path]
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
    with pytest.raises(InputError, match="cannot be taken out"):
        first - (first + second)


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


def test_memory_and_time_of_a_reader_do_not_depend_on_the_family(model: LanguageModel) -> None:
    """What goes into the forward pass has the same shape whatever was read."""
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
    assert "summed states of 8 other proteins" in (tmp_path / "methods.txt").read_text()
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
    assert "Number 3 (long) was left out: it is too long." in done.stderr
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
