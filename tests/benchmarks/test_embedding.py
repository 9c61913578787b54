"""The benchmark of embeddings: the probe and the ranking are what they are called, and find what was planted and nothing else."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM, EsmForSequenceClassification, EsmTokenizer

from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
from performers.benchmarks import embedding_quality, embedding_speed, experiment
from performers.benchmarks.domains import Domain, few_of_each, read_domains, split_by_superfamily
from performers.benchmarks.embedding import EmbeddingSettings, measure_embedding, tables
from performers.benchmarks.embedding_quality import (
    cosines,
    kmer_counts,
    mean_reciprocal,
    one_hot,
    probed,
    queries,
    retrieved,
    standardised,
    untrained,
)
from performers.benchmarks.embedding_speed import OURS, PADDED, UNPADDED, Rival, in_turns, measure_speed, rival_folder
from performers.cli import main
from performers.data import STANDARD_RESIDUES, Record
from performers.errors import InputError
from performers.tools import LanguageModel, embed

SHORT = ("MKTAYIAKQR", "GSHMLEDPVAGW", "MKV", "ACDEFGHIKLMN")


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


@pytest.fixture(scope="module")
def performer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-performer"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"num_features": 8})).save_pretrained(path)
    PerformerTokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-esm"
    path.mkdir()
    words = ["<cls>", "<pad>", "<eos>", "<unk>", *STANDARD_RESIDUES, "X", "<mask>"]
    (path / "vocab.txt").write_text("\n".join(words))
    config = EsmConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        position_embedding_type="rotary",
        token_dropout=True,
        pad_token_id=1,
        mask_token_id=words.index("<mask>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        EsmForMaskedLM(config).save_pretrained(path)
    EsmTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty superfamilies, every second with two families; helices where A, E or L is, strands where V, I or T is."""
    path = tmp_path_factory.mktemp("domains") / "domains.tsv.gz"
    generator = np.random.default_rng(0)
    with gzip.open(path, "wt") as stream:
        for superfamily, family, member in itertools.product(range(30), (1, 2), range(3)):
            length = int(generator.integers(12, 30))
            sequence = "".join(generator.choice(list(STANDARD_RESIDUES), length))
            states = "".join("H" if a in "AEL" else "E" if a in "VIT" else "TSLG"[member] for a in sequence)
            family = f"a.{superfamily}.1.{family if superfamily % 2 else 1}"
            stream.write(f"d{superfamily}-{family}-{member}\t{family}\t{sequence}\t{states}\n")
    return path


def _domains(states_of: Any, number: int = 60, length: int = 40, seed: int = 0) -> dict[str, list[Domain]]:
    """Sets of random sequences with the states that a function gives them."""
    generator = np.random.default_rng(seed)
    made: list[Domain] = []
    for index in range(number):
        sequence = "".join(generator.choice(list(STANDARD_RESIDUES), length))
        made.append(Domain(str(index), f"a.{index}.1.1", sequence, states_of(sequence, generator)))
    return {
        "train": made[: number // 2],
        "validation": made[number // 2 : 2 * number // 3],
        "test": made[2 * number // 3 :],
    }


def test_states_become_three_and_what_has_none_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "domains.tsv"
    path.write_text("one\tb.1.2.3\tACDEFGHIKLM\tHGIEBTSL?XP\n")
    (domain,) = read_domains(path)
    assert domain.states == "HHHEECCC??C"
    assert (domain.family, domain.superfamily) == ("b.1.2.3", "b.1.2")
    sets = {"train": [domain], "validation": [domain], "test": [domain]}
    assert probed(sets, None) == {"right": [4], "residues": [9]}  # C is the commonest


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("one\ta.1.1.1\tMKT", r"row 2 has 3 of 4 columns: expected an identifier, a SCOP family, .* no header"),
        ("one\ta.1\tMKT\tHHH", r"row 2: 'a.1' is no SCOP family; expected four parts such as b.1.1.1"),
        ("one\ta.1.1.1\tMJT\tHHH", r"row 2 \(one\): expected a sequence of the residues A"),
        ("one\ta.1.1.1\tMKT\tHH", r"row 2 \(one\): 2 states for 3 residues"),
        ("one\ta.1.1.1\tMKT\tHHQ", r"row 2 \(one\): 'Q' is no state of DSSP"),
    ],
)
def test_a_row_that_is_no_domain_is_named(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "domains.tsv"
    path.write_text(f"zero\ta.1.1.1\tMKT\tHHH\n{row}\n")
    with pytest.raises(InputError, match=f"domains.tsv, {said}"):
        read_domains(path)
    path.write_text("\n")
    with pytest.raises(InputError, match=r"domains.tsv holds no domain"):
        read_domains(path)


def test_which_domains_are_taken_does_not_depend_on_the_order_of_the_rows(table: Path) -> None:
    domains = read_domains(table)
    twins = [Domain(f"twin-{domain.id}", "g.1.1.1", domain.sequence, domain.states) for domain in domains[:20]]
    taken = few_of_each([*domains, *twins], per_family=2)
    assert taken == few_of_each([*twins, *domains[::-1]], per_family=2)
    assert len({domain.sequence for domain in taken}) == len(taken)
    assert max(Counter(domain.family for domain in taken).values()) == 2
    assert len({domain.superfamily for domain in few_of_each(domains, 2, superfamilies=7)}) == 7


def test_no_superfamily_is_in_two_sets(table: Path) -> None:
    sets = split_by_superfamily(few_of_each(read_domains(table), 3), train=60, test=20)
    assert [len(sets["train"]), len(sets["test"])] == [60, 20]
    named = [{domain.superfamily for domain in domains} for domains in sets.values()]
    assert len(named) == 3
    assert not any(one & other for one, other in itertools.combinations(named, 2))
    with pytest.raises(InputError, match="of 2 superfamilies; expected at least three"):
        split_by_superfamily([Domain("", f"a.{n}.1.1", "MK", "HH") for n in (1, 2)], 10, 10)


def test_a_probe_on_the_residue_alone_says_what_is_commonest_for_each_residue() -> None:
    habits = dict(zip(STANDARD_RESIDUES, itertools.cycle("HEC"), strict=False))

    def states(sequence: str, generator: np.random.Generator) -> str:
        odd = generator.random(len(sequence)) < 0.2
        return "".join("HEC"[("HEC".index(habits[a]) + o) % 3] for a, o in zip(sequence, odd, strict=True))

    sets = _domains(states)
    seen = {letter: Counter[str]() for letter in STANDARD_RESIDUES}
    for domain in sets["train"]:
        for letter, state in zip(domain.sequence, domain.states, strict=True):
            seen[letter][state] += 1
    commonest = {letter: counts.most_common(1)[0][0] for letter, counts in seen.items()}
    by_hand = [
        sum(commonest[letter] == state for letter, state in zip(domain.sequence, domain.states, strict=True))
        for domain in sets["test"]
    ]
    found = probed(sets, lambda domains: one_hot(domains, 1))
    assert found["converged"]
    assert found["right"] == by_hand
    assert found["residues"] == [40] * len(by_hand)


def test_a_window_finds_what_is_planted_in_it_and_nothing_when_it_is_shuffled() -> None:
    def planted(sequence: str, generator: np.random.Generator) -> str:
        before = "A" * 3 + sequence
        return "".join("HEC"[STANDARD_RESIDUES.index(before[place]) % 3] for place in range(len(sequence)))

    def shuffled(sequence: str, generator: np.random.Generator) -> str:
        return "".join(generator.permutation(list(planted(sequence, generator))))

    def accuracy(states: Any, window: int) -> float:
        found = probed(_domains(states, number=120), lambda domains: one_hot(domains, window))
        return sum(found["right"]) / sum(found["residues"])

    assert accuracy(planted, 15) > 0.9
    assert accuracy(planted, 1) < 0.5
    assert accuracy(shuffled, 15) < 0.5


def test_the_own_family_is_no_candidate_and_a_planted_superfamily_is_found() -> None:
    generator = np.random.default_rng(0)
    domains = [
        Domain(f"{s}-{f}-{m}", f"a.{s}.1.{f}", "MK", "HH") for s, f, m in itertools.product(range(12), (1, 2), (1, 2))
    ]
    domains.append(Domain("alone", "b.1.1.1", "MK", "HH"))
    assert queries(domains) == list(range(48))
    names = sorted({domain.family for domain in domains})
    of_family = dict(zip(names, generator.normal(size=(len(names), 512)), strict=True))
    of_superfamily = {domain.superfamily: generator.normal(size=512) for domain in domains}
    # The own family is by far the nearest.
    vectors = np.stack([5 * of_family[d.family] + 4 * of_superfamily[d.superfamily] for d in domains])
    found = retrieved(domains, cosines(vectors))
    assert {name: entry[0] for name, entry in found.items()} == {f"a.{s}.1": 4 for s in range(12)}
    assert sum(entry[1] for entry in found.values()) > 40
    lost = retrieved(domains, cosines(vectors[generator.permutation(len(vectors))]))
    assert sum(entry[1] for entry in lost.values()) < 12
    # By chance: two of the 47 others that are of another family.
    chance = retrieved(domains, None)
    assert sum(entry[1] for entry in chance.values()) == pytest.approx(48 * 2 / 47)
    with pytest.raises(InputError, match="nothing to retrieve"):
        retrieved(domains[:2], None)


def test_equal_scores_stand_in_all_orders_at_once() -> None:
    places = [
        1 / (3 + min(order.index(0), order.index(1)))  # two of five are good, and two others are above
        for order in itertools.permutations(range(5))
    ]
    assert mean_reciprocal(2, 5, 2) == pytest.approx(np.mean(places))
    assert mean_reciprocal(0, 1, 1) == 1


def test_words_are_counted_and_dimensions_standardised() -> None:
    domains = [Domain("", "", sequence, "") for sequence in ("MKMKM", "MKM", "KMK", "MXK", "M")]
    counts = kmer_counts(domains)
    assert np.asarray(counts.sum(axis=1)).ravel().tolist() == [3, 1, 1, 0, 0]
    rows = cosines(counts)(np.array([0]))
    assert rows[0] == pytest.approx([1, 2 / 5**0.5, 1 / 5**0.5, 0, 0])
    vectors = standardised(np.array([[1.0, 7.0, 5.0], [3.0, 9.0, 5.0], [5.0, 2.0, 5.0]]))
    assert vectors.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert vectors.std(axis=0) == pytest.approx([1, 1, 0])


def test_untrained_weights_are_new_ones_of_the_same_architecture(performer: Path, esm: Path) -> None:
    for folder in (performer, esm):
        trained, random = (LanguageModel.open(folder, device="cpu") for _ in range(2))
        untrained(random, 1)
        pairs = zip(trained.network.parameters(), random.network.parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs)
        again = untrained(LanguageModel.open(folder, device="cpu"), 1)
        weights = random.network.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in again.network.state_dict().items())


@pytest.mark.parametrize("padded", [False, True])
def test_the_rival_does_the_same_work(esm: Path, padded: bool) -> None:
    rival = Rival(esm, "cpu", "float32")
    batches = rival.batches(SHORT, 30, padded=padded)
    assert [[len(row) for row in batch] for batch in batches] == (
        [[14, 14], [12, 5]] if padded else [[14, 14], [12], [5]]
    )
    by_length = sorted(SHORT, key=len, reverse=True)
    records = [Record("", "", sequence, number) for number, sequence in enumerate(by_length, start=1)]
    expected = [embedding.mean for embedding in embed(records, esm, device="cpu", dtype="float32")]
    assert np.stack(rival.means(batches)) == pytest.approx(np.stack(expected), abs=1e-5)
    assert rival.attention == "sdpa"


def test_a_downloaded_rival_is_saved_without_its_pickle(
    esm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    shutil.copytree(esm, package)
    (package / "model.safetensors").unlink()
    config = EsmConfig.from_pretrained(esm, architectures=["EsmForSequenceClassification"])
    config.save_pretrained(package)
    model = EsmForSequenceClassification(config)
    torch.save(model.state_dict(), package / "pytorch_model.bin")
    monkeypatch.setattr(embedding_speed, "fetch", lambda *arguments: package)
    for _ in range(2):
        folder = rival_folder("esm2", tmp_path)
        assert folder == tmp_path / "esm2"
        rival = Rival(folder, "cpu", "float32")
        assert rival.reader.name == "esm2"
        kept = rival.body.state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in model.esm.state_dict().items())
        monkeypatch.setattr(embedding_speed, "fetch", None)  # once is enough
    assert rival_folder("another", tmp_path) == Path("another")


def test_systems_take_turns_and_what_would_take_too_long_is_left_out(performer: Path, esm: Path) -> None:
    said: list[str] = []
    systems = {"a": lambda: said.append("a"), "b": lambda: said.append("b")}
    in_turns(systems, 3, 1e9, torch.device("cpu"))
    assert "".join(said) == "abbaab"
    assert [len(seconds) for seconds in in_turns(systems, 3, 0.0, torch.device("cpu")).values()] == [1, 1]
    model, rival = LanguageModel.open(performer, device="cpu"), Rival(esm, "cpu", "float32")
    cell = {"length": 400, "proteins": 1, "repeats": 2, "toks_per_batch": 1000, "max_minutes": 4.1, "seed": 0}
    taken = {OURS: [1e-6], UNPADDED: [60.0, 90.0]}
    shorter = {"part": "speed", "mean_length": 100.0, "proteins_timed": 2, "seconds": taken}
    found = measure_speed(cell, [shorter], model, rival)
    assert [len(seconds) for seconds in found["seconds"].values()] == [2, 2]
    found = measure_speed({**cell, "max_minutes": 3.9}, [shorter], model, rival)
    assert found["left_out"] == {UNPADDED: "would take about 4 minutes (--max-minutes 3.9)"}  # 30 s x (400 / 100)^1.5
    assert list(found["seconds"]) == [OURS]


def test_long_proteins_are_real_ones_end_to_end() -> None:
    ordinary = embedding_speed.ordinary_proteins(10**9, 0)
    long = embedding_speed.long_protein(3000, 0)
    assert len(long) == 3000
    assert long.startswith(ordinary[0] + ordinary[1][:1])
    assert max(map(len, ordinary)) <= 1022


def test_the_command_reports_every_system_goes_on_and_says_json(
    table: Path,
    performer: Path,
    esm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*more: str) -> tuple[int, str, str]:
        options = [
            "--quick",
            "--domains",
            str(table),
            "--model",
            str(performer),
            "--against",
            str(esm),
            "--length",
            "64,128",
        ]
        options += ["--proteins", "3", "--device", "cpu", "--threads", "1", "-o", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["performers", "benchmark", "embedding", *options, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    status, out, err = command()
    assert status == 0, err
    for words in ("Secondary structure in three states", "untrained", "standardised", "64 residues", "Quick settings"):
        assert words in out
    report = json.loads((tmp_path / "out" / "embedding.json").read_text())
    assert [row["system"] for row in report["structure"]] == [
        "tiny-performer",
        "tiny-performer, untrained",
        "one-hot of 15 residues",
        "one-hot of the residue",
        "the most common state",
    ]
    by_name = {row["system"]: row for row in report["structure"]}
    assert by_name["one-hot of the residue"]["Q3"]["value"] > by_name["the most common state"]["Q3"]["value"]
    model, window = by_name["tiny-performer"], by_name["one-hot of 15 residues"]
    gain = model["Q3 above one-hot of 15 residues"]
    assert gain["value"] == pytest.approx(model["Q3"]["value"] - window["Q3"]["value"])
    low, high = model["Q3"]["interval"]
    assert low <= model["Q3"]["value"] <= high
    ranked = {(row["system"], row["vectors"]): row for row in report["retrieval"]}
    assert len(ranked) == 8
    assert {row["groups"] for row in ranked.values()} == {15}
    assert 0 < ranked["chance", ""]["top-1"]["value"] < ranked["chance", ""]["MRR"]["value"] < 0.5
    speed = [(row["length"], row["system"]) for row in report["speed"]]
    assert speed == [(0, OURS), (0, UNPADDED), (0, PADDED), (64, OURS), (64, UNPADDED), (128, OURS), (128, UNPADDED)]
    for row in report["speed"]:
        assert row["rate"] > 0
        assert ("ratio" in row) == (row["system"] != OURS)
    for picture in ("embedding-quality.png", "embedding-speed.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(embedding_quality, "embed", None)  # nothing is embedded again
    status, out, err = command("--json")
    assert status == 0, err
    assert json.loads(out)["cells"] == report["cells"]
    assert "were measured before" in err


def test_settings_that_make_no_sense_are_refused(table: Path, performer: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to measure: expected --domains"):
        EmbeddingSettings.of_size(True)
    with pytest.raises(InputError, match=r"--domains nowhere.tsv: there is no such file"):
        EmbeddingSettings.of_size(True, domains="nowhere.tsv")
    with pytest.raises(InputError, match="--length 0: expected at least 1"):
        EmbeddingSettings.of_size(True, domains=str(table), lengths=(0,))
    lonely = tmp_path / "lonely.tsv"
    lonely.write_text("".join(f"d{n}\ta.{n}.1.1\tMK{a}\tHHH\n" for n, a in enumerate(STANDARD_RESIDUES)))
    settings = EmbeddingSettings.of_size(True, domains=str(lonely), models=(str(performer),), device="cpu")
    with pytest.raises(InputError, match=r"lonely.tsv: of 20 domains none has a superfamily with a second family"):
        measure_embedding(settings, tmp_path / "out", quick=True)


def test_a_report_of_one_part_has_its_table_alone(table: Path, performer: Path, tmp_path: Path) -> None:
    settings = EmbeddingSettings.of_size(
        True, domains=str(table), models=(str(performer),), untrained=False, device="cpu", dtype="float32", threads=1
    )
    report = measure_embedding(settings, tmp_path, quick=True)
    assert report["pictures"] == ["embedding-quality.png"]
    assert [title.partition(":")[0].partition(",")[0] for title, _, _ in tables(report)] == [
        "Secondary structure in three states",
        "The superfamily without the own family",
    ]
    for _, header, rows in tables(report):
        assert all(len(row) == len(header) for row in rows)
