"""`benchmark design`: what designs are held against, and what is written down of partners."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from performers import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM, PerformerTokenizer
from performers.benchmarks.control_sequences import INDEPENDENT, beginnings, markov_chain, shuffled, walk
from performers.benchmarks.design import DesignSettings, measure_design, shuffled_partners, tables
from performers.data import STANDARD_RESIDUES, read_fasta
from performers.errors import InputError
from performers.tools.partners import EFFECT_FILE
from performers.tools.readings import BACKGROUND


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A causal and a masked Performer, tiny and random."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, kind in (("causal", PerformerForCausalLM), ("masked", PerformerForMaskedLM)):
            model = kind(PerformerConfig(**sizes, attention_kwargs={"num_features": 8}))
            model.save_pretrained(folder / name)
            PerformerTokenizer(add_eos=name == "masked").save_pretrained(folder / name)
    return str(folder / "causal"), str(folder / "masked")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A table of twelve pairs of short proteins, and their sequences."""
    folder = tmp_path_factory.mktemp("pairs")
    records = [record for record in read_fasta("bundled:validation") if len(record.sequence) <= 90][:24]
    (folder / "p.fasta").write_text("".join(f">{record.id}\n{record.sequence}\n" for record in records))
    rows = zip(records[::2], records[1::2], strict=True)
    (folder / "p.tsv").write_text("".join(f"{a.id}\t{b.id}\t1\n" for a, b in rows))
    return str(folder / "p.tsv"), str(folder / "p.fasta")


def test_the_report_holds_the_sets_the_partners_and_what_was_labelled(
    models: tuple[str, str], pairs: tuple[str, str], tmp_path: Path
) -> None:
    settings = DesignSettings.of_size(
        True,
        model=models[0],
        judge=models[1],
        families=0,
        pairs=pairs[0],
        partners=(pairs[1],),
        label=True,
        device="cpu",
    )
    report = measure_design(settings, tmp_path / "out", quick=True)
    titles = [title for title, _, _ in tables(report)]
    judged = {cell["set"]: cell for cell in report["cells"] if cell["part"] == "judged"}
    assert list(judged) == ["natural", "designs", "shuffled", "markov", "frequencies"]
    assert all(cell["low"] <= cell["perplexity"] <= cell["high"] for cell in judged.values())
    assert len(titles) == 3
    effect = json.loads((tmp_path / "out" / EFFECT_FILE).read_text())
    assert effect["pairs"] == 6
    assert effect["low"] <= effect["gain"] <= effect["high"]
    assert report["partner"] == effect == json.loads((Path(models[0]) / EFFECT_FILE).read_text())
    assert list(effect["weights"]) == ["model.safetensors"]
    again = measure_design(settings, tmp_path / "out", quick=True)
    assert again["cells"] == report["cells"]


def test_profiles_tell_members_from_shuffled_ones() -> None:
    pytest.importorskip("pyhmmer")
    from performers.benchmarks.family_profiles import Profile, families_of_equals

    ((name, members),) = families_of_equals(1, 20, 0).items()
    assert name.startswith("PF")
    left_out = members[0].sequence
    found = Profile(members[1:]).scores([left_out, shuffled(left_out, 0, 0)])
    assert found[0][1]
    assert not found[1][1]
    assert found[0][0] > found[1][0] + 20


def test_families_without_pyhmmer_are_left_out_and_said_to_be(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyhmmer", None)
    settings = DesignSettings.of_size(True, model=models[0], judge=models[1], device="cpu")
    report = measure_design(settings, tmp_path / "out", quick=True)
    assert [cell["status"] for cell in report["cells"] if cell["part"] == "families"] == ["unavailable"]
    assert any("performers[hmm]" in note for note in report["notes"])


def test_another_partner_is_of_like_length_and_unknown_to_the_binder() -> None:
    true = np.array([[0, 1], [2, 3], [0, 3], [4, 5]])
    chosen = np.concatenate((true, true[:, ::-1]))
    lengths = np.array([100, 50, 101, 52, 99, 51])
    others = shuffled_partners(chosen, true, lengths)
    known = {frozenset(pair) for pair in true.tolist()}
    for (partner, binder), other in zip(chosen.tolist(), others.tolist(), strict=True):
        assert other not in (partner, binder)
        assert frozenset((other, binder)) not in known
        assert abs(lengths[other] - lengths[partner]) <= 2
    with pytest.raises(InputError, match="too few"):
        shuffled_partners(true[:1], true[:1], lengths)


def test_controls_keep_what_they_should() -> None:
    natural = beginnings(["bundled:test"], 60, 5, 0)
    assert [len(sequence) for sequence in natural] == [60] * 5
    assert sorted(shuffled(natural[0], 0, 0)) == sorted(natural[0])
    assert shuffled(natural[0], 0, 0) != natural[0]
    chain = markov_chain()
    np.testing.assert_allclose(chain.sum(axis=1), 1)
    walked = walk(INDEPENDENT, 40_000, 0, "test")
    shares = np.array([walked.count(letter) for letter in STANDARD_RESIDUES]) / 40_000
    np.testing.assert_allclose(shares, BACKGROUND, atol=0.006)
    steps = np.array([list(map(STANDARD_RESIDUES.index, walk(chain, 40_000, 0, "chain")))])[0]
    seen = np.bincount(steps[1:][steps[:-1] == STANDARD_RESIDUES.index("L")], minlength=20)
    np.testing.assert_allclose(seen / seen.sum(), chain[STANDARD_RESIDUES.index("L")], atol=0.03)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pairs": "p.tsv"}, "belong together"),
        ({"label": True}, "expected --pairs"),
        ({"proteins": 1}, "at least two proteins"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        DesignSettings.of_size(False, **given)
