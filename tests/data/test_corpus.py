from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from performers.data import (
    RESIDUES,
    Contexts,
    Corpus,
    FastaReport,
    Record,
    build_corpus,
    encode,
    in_memory_corpus,
    read_fasta,
)
from performers.errors import CorpusError, DiskFullError, FastaError, InputError, OutputError

FILES = ["corpus.json", "header_offsets.npy", "headers.bin", "offsets.npy", "tokens.bin"]


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Three files of real proteins."""
    records = list(read_fasta("bundled:test"))
    paths: list[Path] = []
    for part in range(3):
        text = "".join(f">{r.id} protein {r.number}\n{r.sequence}\n" for r in records[part::3])
        paths.append(write(tmp_path, f"part-{part}.fasta", text))
    return paths


def test_a_corpus_holds_what_the_fasta_held(tmp_path: Path, inputs: list[Path]) -> None:
    records = list(read_fasta(inputs))
    corpus = build_corpus(inputs, tmp_path / "corpus")
    assert sorted(os.listdir(tmp_path / "corpus")) == FILES
    assert len(corpus) == len(records) == 1000
    assert corpus.num_residues == sum(len(record.sequence) for record in records)
    assert corpus.lengths.tolist() == [len(record.sequence) for record in records]
    for index in (0, 1, 499, 999, -1):
        assert corpus[index].tolist() == encode(records[index].sequence).tolist()
        assert corpus.name(index) == records[index].id
    assert [(r.id, r.description, r.sequence) for r in corpus.records()] == [
        (r.id, r.description, r.sequence) for r in records
    ]


def test_a_corpus_is_mapped_and_cannot_be_written_to(tmp_path: Path, inputs: list[Path]) -> None:
    corpus = build_corpus(inputs, tmp_path / "corpus")
    assert isinstance(corpus.tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        corpus[0][0] = 4


def test_the_folder_tells_where_it_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, "x.fasta", ">a\nmkt\n>a\nM*\n>b\nGG\n")
    corpus = build_corpus(path, tmp_path / "corpus", on_invalid="skip")
    metadata = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert metadata == corpus.metadata
    assert (metadata["format"], metadata["proteins"], metadata["residues"]) == (1, 2, 5)
    assert metadata["settings"] == {"max_length": 10_000_000, "on_invalid": "skip"}
    assert metadata["report"]["skipped"] == 1
    (source,) = metadata["report"]["inputs"]
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_plain_and_packed_input_give_the_same_arrays(tmp_path: Path, inputs: list[Path]) -> None:
    packed = tmp_path / "packed.fasta.gz"
    packed.write_bytes(gzip.compress(b"".join(path.read_bytes() for path in inputs)))
    first = digest(build_corpus(inputs, tmp_path / "1") and tmp_path / "1")
    second = digest(build_corpus(packed, tmp_path / "2") and tmp_path / "2")
    assert {name: first[name] for name in FILES[1:]} == {name: second[name] for name in FILES[1:]}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(blacklist_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=10),
            st.text(alphabet=RESIDUES, min_size=1, max_size=30),
        ),
        min_size=1,
        max_size=10,
    )
)
def test_disk_and_memory_hold_the_same(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("same")
    path = write(folder, "x.fasta", "".join(f">{name}\n{sequence}\n" for name, sequence in pairs))
    built, held = build_corpus(path, folder / "corpus"), in_memory_corpus(pairs)
    assert len(built) == len(held) == len(pairs)
    assert [(record.id, record.sequence) for record in built.records()] == pairs
    assert list(built.records()) == list(held.records())
    assert built.num_residues == held.num_residues


def test_progress_is_told_in_megabytes(tmp_path: Path) -> None:
    path = write(tmp_path, "x.fasta", "".join(f">p{i}\n{'MKTAYIAKQR' * 1000}\n" for i in range(1000)))
    seen: list[int] = []
    build_corpus(path, tmp_path / "corpus", progress=lambda report: seen.append(report.residues))
    assert len(seen) == 2
    assert seen == sorted(seen)
    assert seen[0] >= 4_000_000


def test_a_subset_is_a_view(inputs: list[Path]) -> None:
    corpus = in_memory_corpus(read_fasta(inputs))
    subset = corpus.subset([5, 2, 2])
    assert len(subset) == 3
    assert [subset.name(i) for i in range(3)] == [corpus.name(5), corpus.name(2), corpus.name(2)]
    assert subset[1].tolist() == corpus[2].tolist()
    assert np.shares_memory(subset[0], corpus.tokens)
    assert subset.num_residues == len(corpus[5]) + 2 * len(corpus[2])
    assert subset.subset([2, 0])[1].tolist() == corpus[5].tolist()


def test_the_first_of_each_identical_sequence_is_kept() -> None:
    corpus = in_memory_corpus([("a", "MKT"), ("b", "GG"), ("c", "MKT"), ("d", "GGG"), ("e", "GG"), ("f", "mkt")])
    assert corpus.first_identical().tolist() == [0, 1, 0, 3, 1, 0]
    assert corpus.deduplicate().tolist() == [0, 1, 3]
    assert corpus.subset([5, 2, 1]).deduplicate().tolist() == [0, 2]


def test_datasets_go_out_and_come_back(tmp_path: Path, inputs: list[Path]) -> None:
    pytest.importorskip("datasets")
    corpus = build_corpus(inputs[0], tmp_path / "corpus")
    dataset = corpus.to_datasets()
    assert dataset.column_names == ["id", "description", "sequence"]
    again = Corpus.from_datasets(dataset, tmp_path / "again")
    assert list(again.records()) == list(corpus.records())
    assert sorted(os.listdir(tmp_path / "again")) == FILES


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "is empty"),
        ([{"text": "MKT"}], "Row 1 has no column 'sequence'; expected it among text"),
        ([{"sequence": "MKT"}, {"sequence": "M*"}], r"Row 2: '\*' at position 2"),
        ([{"sequence": ""}], "Row 1 has no residues"),
    ],
)
def test_datasets_that_hold_no_proteins_are_refused(tmp_path: Path, rows: list[dict[str, str]], says: str) -> None:
    with pytest.raises(CorpusError, match=says):
        Corpus.from_datasets(rows, tmp_path / "corpus")
    assert os.listdir(tmp_path) == []


def test_records_in_memory_are_checked_too() -> None:
    with pytest.raises(InputError, match="expected at least one"):
        in_memory_corpus([])
    with pytest.raises(InputError, match="'b' is empty"):
        in_memory_corpus([("a", "M"), ("b", "")])
    with pytest.raises(InputError, match="position 2"):
        in_memory_corpus([Record("a", "", "M1", 1)])


# -- the output folder


def test_building_twice_is_building_once(tmp_path: Path, inputs: list[Path]) -> None:
    build_corpus(inputs, tmp_path / "corpus")
    before = (tmp_path / "corpus" / "tokens.bin").stat().st_mtime_ns
    assert len(build_corpus(inputs, tmp_path / "corpus")) == 1000
    assert (tmp_path / "corpus" / "tokens.bin").stat().st_mtime_ns == before


def test_the_corpus_of_other_inputs_is_not_overwritten(tmp_path: Path, inputs: list[Path]) -> None:
    build_corpus(inputs[:2], tmp_path / "corpus")
    before = digest(tmp_path / "corpus")
    for others, options in ((inputs, {}), (inputs[:1], {}), (inputs[:2], {"max_length": 50_000})):
        with pytest.raises(OutputError, match="already in use"):
            build_corpus(others, tmp_path / "corpus", **options)
    inputs[0].write_text(">a\nMKT\n")
    with pytest.raises(OutputError, match="already in use"):
        build_corpus(inputs[:2], tmp_path / "corpus")
    assert digest(tmp_path / "corpus") == before


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path, inputs: list[Path]) -> None:
    (tmp_path / "used").mkdir()
    write(tmp_path / "used", "thesis.txt", "mine")
    with pytest.raises(OutputError, match="used is already in use"):
        build_corpus(inputs, tmp_path / "used")
    with pytest.raises(OutputError, match="already in use"):
        build_corpus(inputs, tmp_path / "used" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    assert len(build_corpus(inputs, tmp_path / "empty")) == 1000


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, inputs: list[Path]) -> None:
    write(tmp_path, "file", "")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        build_corpus(inputs, tmp_path / "file" / "corpus")


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path, "x.fasta", ">a\nMKT\n>b\nM*\n")
    with pytest.raises(FastaError, match="record 2"):
        build_corpus(path, tmp_path / "corpus")
    assert os.listdir(tmp_path) == ["x.fasta"]


def test_two_builds_of_one_folder_do_not_mix(tmp_path: Path, inputs: list[Path]) -> None:
    with pytest.raises(OutputError, match="is being built by another process"):
        build_corpus(
            write(tmp_path, "x.fasta", ">a\n" + "M" * 5_000_000 + "\n"),
            tmp_path / "corpus",
            progress=lambda _: build_corpus(inputs, tmp_path / "corpus") and None,
        )


# -- interrupted builds


def test_a_build_continues_after_the_last_finished_input(tmp_path: Path, inputs: list[Path]) -> None:
    build_corpus(inputs, tmp_path / "whole")
    good = inputs[1].read_text()
    inputs[1].write_text(good + ">bad\nM*\n")
    with pytest.raises(FastaError, match="part-1"):
        build_corpus(inputs, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    inputs[1].write_text(good)
    first = tmp_path / "first.fasta"
    inputs[0].rename(first)  # the name of an input does not matter, its content does
    build_corpus([first, *inputs[1:]], tmp_path / "corpus")
    whole, corpus = digest(tmp_path / "whole"), digest(tmp_path / "corpus")
    assert {name: whole[name] for name in FILES[1:]} == {name: corpus[name] for name in FILES[1:]}
    assert not (tmp_path / ".corpus.building").exists()


def test_duplicates_are_counted_across_an_interruption(tmp_path: Path) -> None:
    first = write(tmp_path, "1.fasta", ">a x\nMKT\n>b\nGG\n")
    second = write(tmp_path, "2.fasta", ">a\nMKT\n>c\nM*\n")
    with pytest.raises(FastaError, match="record 2"):
        build_corpus([first, second], tmp_path / "corpus")
    write(tmp_path, "2.fasta", ">a\nMKT\n>c\nM\n")
    corpus = build_corpus([first, second], tmp_path / "corpus")
    report = FastaReport.from_dict(corpus.metadata["report"])
    assert (report.records, report.duplicates, report.duplicate_ids) == (4, 1, ["a"])


@pytest.mark.parametrize("change", ["content", "settings", "size", "progress"])
def test_a_build_starts_again_when_its_beginning_is_no_longer_right(
    tmp_path: Path, inputs: list[Path], change: str
) -> None:
    options = {"max_length": 50_000} if change == "settings" else {}
    good = inputs[2].read_text()
    inputs[2].write_text(good + ">bad\n1\n")
    with pytest.raises(FastaError):
        build_corpus(inputs, tmp_path / "corpus")
    inputs[2].write_text(good)
    building = tmp_path / ".corpus.building"
    if change == "content":
        text = inputs[0].read_text()
        inputs[0].write_text(text.replace("L", "I"))
    elif change == "size":
        os.truncate(building / "tokens.bin", 10)
    elif change == "progress":
        (building / "progress.json").write_text('{"report"')
    expected = list(read_fasta(inputs))
    corpus = build_corpus(inputs, tmp_path / "corpus", **options)
    assert [record.sequence for record in corpus.records()] == [record.sequence for record in expected]


BUILD = """
import sys
from performers.data import build_corpus
build_corpus(sys.argv[2:], sys.argv[1])
"""


def test_a_build_that_is_killed_anywhere_is_completed_by_the_next(tmp_path: Path) -> None:
    inputs: list[str] = []
    for part in range(8):
        text = "".join(f">p{part}-{i} x\n{'MKTAYIAKQRQISFVKSHFSRQ' * 20}\n" for i in range(4000 + part))
        inputs.append(str(write(tmp_path, f"{part}.fasta", text)))
    build_corpus(inputs, tmp_path / "whole")
    expected = digest(tmp_path / "whole")
    random = np.random.Generator(np.random.PCG64(0))
    kills = continued = 0
    folder = tmp_path / "corpus"
    for delay in random.uniform(0.15, 0.6, size=10):
        child = subprocess.Popen([sys.executable, "-c", BUILD, str(folder), *inputs], stderr=subprocess.DEVNULL)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        continued += (tmp_path / ".corpus.building" / "progress.json").exists()
        if folder.exists():
            assert digest(folder) == expected
            shutil.rmtree(folder)
    build_corpus(inputs, folder)
    assert digest(folder) == expected
    assert kills


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_each_moment_of_a_build_leaves_something_to_complete(tmp_path: Path, inputs: list[Path], stride: int) -> None:
    """The process ends at its n-th operation on a file, for every n."""
    build_corpus(inputs, tmp_path / "whole")
    expected = digest(tmp_path / "whole")
    hook = """
import os, sys
from pathlib import Path
left = int(sys.argv.pop(1))
def count(event, arguments):
    global left
    if event in ("os.rename", "os.remove", "os.truncate") or (event == "open" and ".building" in str(arguments[0])):
        left -= 1
        if left < 0:
            os._exit(9)
sys.addaudithook(count)
"""
    moment = 0
    for moment in range(0, 1000, stride):
        folder = tmp_path / f"corpus-{moment}"
        arguments = [str(moment), str(folder), *map(str, inputs)]
        status = subprocess.run([sys.executable, "-c", hook + BUILD, *arguments], check=False).returncode
        assert status in (0, 9)
        assert (digest(folder) == expected) if folder.exists() else status == 9
        build_corpus(inputs, folder)
        assert digest(folder) == expected
        if status == 0:
            break
    assert moment > 20


def test_a_full_disk_is_named_with_its_path_and_bytes(tmp_path: Path, inputs: list[Path]) -> None:
    big = write(tmp_path, "big.fasta", "".join(f">p{i}\n{'MKTAYIAKQR' * 1000}\n" for i in range(300)))
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, {resource.RLIM_INFINITY}))
import sys
from performers.data import build_corpus
from performers.errors import DiskFullError
try:
    build_corpus(sys.argv[2:], sys.argv[1])
except DiskFullError as error:
    print(error)
"""
    arguments = [str(tmp_path / "corpus"), str(inputs[0]), str(big)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("There is no room to write ")
    assert "bytes to " + str(tmp_path / ".corpus.building" / "tokens.bin") in done.stdout
    assert "bytes are free" in done.stdout
    assert not (tmp_path / "corpus").exists()
    # With room again, the same command goes on from the input that was finished.
    assert json.loads((tmp_path / ".corpus.building" / "progress.json").read_text())["report"]["records"] == 334
    assert len(build_corpus([inputs[0], big], tmp_path / "corpus")) == 634


def test_a_device_without_room_is_a_full_disk(tmp_path: Path) -> None:
    from performers.folders import writing

    says = "no room to write 5 bytes to /dev/full: No space left on device"
    with (
        pytest.raises(DiskFullError, match=says),
        writing(Path("/dev/full"), 5),
        open("/dev/full", "wb", buffering=0) as stream,
    ):
        stream.write(b"12345")


# -- damaged folders


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer"])
def test_a_damaged_corpus_is_refused_by_name(tmp_path: Path, inputs: list[Path], name: str, damage: str) -> None:
    build_corpus(inputs, tmp_path / "corpus")
    path = tmp_path / "corpus" / name
    if damage == "missing":
        path.unlink()
    elif damage == "longer" and not name.endswith(".npy"):
        path.write_bytes(path.read_bytes() + b"??")
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size // 2)
    with pytest.raises(CorpusError, match=name.replace(".", r"\.")):
        Corpus.open(tmp_path / "corpus")


def test_a_corpus_of_another_format_is_refused(tmp_path: Path, inputs: list[Path]) -> None:
    build_corpus(inputs, tmp_path / "corpus")
    path = tmp_path / "corpus" / "corpus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(CorpusError, match="is a corpus of format 2; expected 1"):
        Corpus.open(tmp_path / "corpus")


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is not a folder"):
        Corpus.open(tmp_path / "missing")
    with pytest.raises(CorpusError, match=r"holds no corpus\.json"):
        Corpus.open(tmp_path)
    write(tmp_path, "corpus.json", "[1]")
    with pytest.raises(CorpusError, match="is damaged"):
        Corpus.open(tmp_path)


def test_a_pickle_among_the_offsets_is_never_executed(tmp_path: Path, inputs: list[Path]) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    build_corpus(inputs, tmp_path / "corpus")
    np.save(tmp_path / "corpus" / "offsets.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    with pytest.raises(CorpusError, match=r"offsets\.npy is missing or damaged"):
        Corpus.open(tmp_path / "corpus")
    assert not (tmp_path / "executed").exists()


def test_a_corpus_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.fasta"
    path.write_text(">a\nMK*\n>b\nACJ\n")
    with pytest.raises(FastaError, match="all 2 records were left out"):
        build_corpus(path, tmp_path / "corpus", on_invalid="skip")
    assert not (tmp_path / "corpus").exists()
    for mode in ("packed", "concatenated"):
        with pytest.raises(InputError, match="The corpus is empty"):
            Contexts(in_memory_corpus([("a", "MK")]).subset([]), 16, mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(("row", "says"), [({"sequence": None}, "has None"), ({"sequence": 3}, "has 3")])
def test_a_row_of_a_dataset_without_text_is_refused(tmp_path: Path, row: dict[str, object], says: str) -> None:
    with pytest.raises(CorpusError, match=says):
        Corpus.from_datasets([row], tmp_path / "corpus")


def test_a_dataset_may_number_its_rows(tmp_path: Path) -> None:
    corpus = Corpus.from_datasets([{"sequence": "MK", "id": 5}, {"sequence": "AC", "id": 0}], tmp_path / "corpus")
    assert [corpus.name(0), corpus.name(1)] == ["5", "0"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"report": 3}', '{"report": {"inputs": [1]}}'])
def test_a_damaged_note_of_progress_starts_the_build_again(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMK\n")
    building = tmp_path / ".corpus.building"
    building.mkdir()
    (building / "progress.json").write_text(content)
    assert len(build_corpus(path, tmp_path / "corpus")) == 1


def test_offsets_that_do_not_rise_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMK\n>b\nMKT\n>c\nM\n")
    build_corpus(path, tmp_path / "corpus")
    offsets = np.load(tmp_path / "corpus" / "offsets.npy")
    offsets[1] = 10**9
    np.save(tmp_path / "corpus" / "offsets.npy", offsets)
    with pytest.raises(CorpusError, match="offsets do not rise"):
        Corpus.open(tmp_path / "corpus")
