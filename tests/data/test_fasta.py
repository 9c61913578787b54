"""What the FASTA door accepts, and what it makes of it."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from performers.data import BUNDLED, RESIDUES, FastaReport, Record, fasta, read_fasta

HEADERS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n\0"), max_size=40)
SEQUENCES = st.text(alphabet=RESIDUES, min_size=1, max_size=60)


def write(folder: Path, content: bytes | str, name: str = "proteins.fasta") -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def sequences(path: Path) -> list[str]:
    return [record.sequence for record in read_fasta(path)]


def test_a_record_has_an_identifier_a_description_and_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, ">sp|P1|X_HUMAN First protein OS=Homo sapiens\nMKT\nAYI\n>second\nGG\n")
    assert list(read_fasta(path)) == [
        Record("sp|P1|X_HUMAN", "First protein OS=Homo sapiens", "MKTAYI", 1),
        Record("second", "", "GG", 2),
    ]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(">a\nMKT\nAY\n>b\nGG\n", id="plain"),
        pytest.param(">a\nMKT\nAY\n>b\nGG", id="no newline at the end"),
        pytest.param(">a\r\nMKT\r\nAY\r\n>b\r\nGG\r\n", id="CRLF"),
        pytest.param(">a\rMKT\rAY\r>b\rGG\r", id="CR"),
        pytest.param("\ufeff>a\nMKT\nAY\n>b\nGG\n", id="byte order mark"),
        pytest.param("\n\n>a\n\nMKT\n\n\nAY\n\n>b\n\nGG\n\n\n\n", id="blank lines"),
        pytest.param(">a\nmkt\naY\n>b\nGg\n", id="lower case"),
        pytest.param(">a\n MK T\t\nAY \n>b\n  G G\n", id="spaces and tabs inside lines"),
    ],
)
def test_harmless_variants_of_the_format_are_read_alike(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    assert [(record.id, record.sequence) for record in read_fasta(path)] == [("a", "MKTAY"), ("b", "GG")]
    packed = write(tmp_path, gzip.compress(content.encode("utf-8")), "packed")
    assert sequences(packed) == ["MKTAY", "GG"]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64])
def test_nothing_depends_on_where_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    text = "\ufeff\r\n>é first\r\nMK\r\n\r\nT\r\n>b\nGG\n>c\nacdef ghik\n".encode()
    plain = write(tmp_path, text)
    packed = write(tmp_path, gzip.compress(text[:20]) + gzip.compress(text[20:]) + bytes(12), "packed")
    expected = list(read_fasta(plain))
    assert [record.sequence for record in expected] == ["MKT", "GG", "ACDEFGHIK"]
    monkeypatch.setattr(fasta, "_BLOCK_BYTES", block_bytes)
    assert list(read_fasta(plain)) == expected
    assert list(read_fasta(packed)) == expected
    assert list(read_fasta(plain, max_length=9)) == expected


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.tuples(HEADERS, SEQUENCES), min_size=1, max_size=8),
    width=st.integers(1, 30),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    packed=st.booleans(),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str]], width: int, end: str, packed: bool
) -> None:
    lines: list[str] = []
    for header, sequence in records:
        lines += [f">{header}", *(sequence[start : start + width] for start in range(0, len(sequence), width))]
    content = (end.join(lines) + end).encode("utf-8")
    path = write(tmp_path_factory.mktemp("round"), gzip.compress(content) if packed else content)
    found = list(read_fasta(path))
    assert [record.sequence for record in found] == [sequence for _, sequence in records]
    assert [record.id for record in found] == [(header.split(maxsplit=1) or [""])[0] for header, _ in records]
    assert [record.description for record in found] == [
        (header.split(maxsplit=1)[1:] or [""])[0] for header, _ in records
    ]
    assert [record.number for record in found] == list(range(1, len(records) + 1))


@pytest.mark.parametrize(
    "name", ["a/b", "../../etc/passwd", "a:b|c", "x" * 300, "", "Aa", "#1", "-rf", "\x1b[31m", "\u2028"]
)
def test_identifiers_are_left_as_they_are(tmp_path: Path, name: str) -> None:
    (record,) = read_fasta(write(tmp_path, f">{name}\nMKT\n"))
    assert record.id == (name.split() or [""])[0]
    assert os.listdir(tmp_path) == ["proteins.fasta"]


def test_a_header_that_is_not_utf8_is_no_obstacle(tmp_path: Path) -> None:
    (record,) = read_fasta(write(tmp_path, b">prot\xe9ine x\nMKT\n"))
    assert record == Record("prot\ufffdine", "x", "MKT", 1)


def test_compression_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    assert sequences(write(tmp_path, gzip.compress(b">a\nMKT\n"), "packed.fasta")) == ["MKT"]
    assert sequences(write(tmp_path, b">a\nMKT\n", "plain.fasta.gz")) == ["MKT"]


def test_gzip_may_have_many_members_and_zeros_at_its_end(tmp_path: Path) -> None:
    content = gzip.compress(b">a\nMK") + gzip.compress(b"") + gzip.compress(b"T\n>b\nGG\n") + bytes(512)
    assert sequences(write(tmp_path, content)) == ["MKT", "GG"]


@pytest.mark.parametrize("packed", [False, True])
def test_standard_input_is_read_like_a_file(packed: bool) -> None:
    content = b">a\nMKT\n>b\nGG\n"
    code = "from performers.data import read_fasta; print([r.sequence for r in read_fasta('-')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=gzip.compress(content) if packed else content,
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().strip() == "['MKT', 'GG']"


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(b">a\nMKT\n"))
    writer.start()
    assert sequences(path) == ["MKT"]
    writer.join()


def test_several_sources_follow_one_another(tmp_path: Path) -> None:
    first, second = write(tmp_path, ">a\nMKT\n", "1"), write(tmp_path, ">b\nGG\n>c\nAA\n", "2")
    found = [(record.id, record.number) for record in read_fasta([first, str(second), first])]
    assert found == [("a", 1), ("b", 1), ("c", 2), ("a", 1)]


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_sets_are_read_by_name(name: str) -> None:
    first = next(read_fasta(f"bundled:{name}"))
    assert len(first.sequence) >= 30


def test_duplicate_identifiers_are_kept_and_reported(tmp_path: Path) -> None:
    first = write(tmp_path, ">a\nMKT\n>b\nGG\n>a\nAA\n>a\nMKT\n", "1")
    second = write(tmp_path, ">c\nMKT\n>b\nGG\n", "2")
    report = FastaReport()
    found = [record.id for record in read_fasta([first, second], report=report)]
    assert found == ["a", "b", "a", "a", "c", "b"]
    assert (report.records, report.residues, report.duplicates, report.duplicate_ids) == (6, 15, 3, ["a", "a", "b"])
    (remark,) = report.remarks()
    assert "3 of 6 records have the identifier of an earlier record (a, a, b); all of them were kept" in remark


def test_duplicates_are_found_across_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "_BLOCK_BYTES", 100)
    names = [f"p{i % 700}" for i in range(1000)]
    report = FastaReport()
    path = write(tmp_path, "".join(f">{name}\nMKT\n" for name in names))
    assert [record.id for record in read_fasta(path, report=report)] == names
    assert report.duplicates == 300
    assert report.duplicate_ids == names[:10]


def test_the_report_knows_the_inputs_byte_for_byte(tmp_path: Path) -> None:
    content = gzip.compress(b">a\nmkt\n")
    path = write(tmp_path, content)
    report = FastaReport()
    list(read_fasta(path, report=report))
    (file,) = report.inputs
    assert (file.name, file.num_bytes, file.sha256) == (str(path), len(content), hashlib.sha256(content).hexdigest())
    assert report.lower_case == 1
    assert FastaReport.from_dict(report.to_dict()) == report


def test_characters_that_are_no_residues_become_x_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, ">a\nM*K-T.1\0Jé\n>b\nGG\n")
    report = FastaReport()
    assert [record.sequence for record in read_fasta(path, on_invalid="x", report=report)] == ["MXKXTXXXXX", "GG"]
    assert (report.replaced, report.skipped, report.records) == (7, 0, 2)
    assert "7 characters that are not residues were replaced by X." in report.remarks()


def test_records_with_invalid_residues_are_left_out_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, ">a\nM*\n>b\nGG\n>c\nJ\n>d\nAA\n")
    report = FastaReport()
    found = [(record.id, record.number) for record in read_fasta(path, on_invalid="skip", report=report)]
    assert found == [("b", 2), ("d", 4)]
    assert (report.skipped, report.records) == (2, 2)
    assert "2 records with characters that are not residues were left out." in report.remarks()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to know the memory of a process")
@pytest.mark.parametrize(("report", "bytes_per_record"), [("None", 0), ("FastaReport()", 20)])
def test_records_stream_without_limit_in_flat_memory(report: str, bytes_per_record: int) -> None:
    # 150 MB of records go through a pipe. A report keeps eight bytes of each identifier to tell duplicates, and twice that
    # while it merges them; nothing else may grow.
    code = f"""
from performers.data import FastaReport, read_fasta
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
for count, record in enumerate(read_fasta("-", report={report}), start=1):
    if count == 50_000:
        early = peak()
print(count, early, peak())
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    body = "MKTAYIAKQR" * 30
    for start in range(0, 500_000, 10_000):
        child.stdin.write("".join(f">protein-{number}\n{body}\n" for number in range(start, start + 10_000)).encode())
    child.stdin.close()
    count, early, late = map(int, child.stdout.read().split())
    assert child.wait() == 0
    assert count == 500_000
    assert (late - early) * 1024 < 0.1 * early * 1024 + bytes_per_record * count, f"from {early:,} to {late:,} KiB"


def test_a_text_stream_given_as_standard_input_is_read_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b">a\nMKT\n")))
    assert [record.sequence for record in read_fasta("-")] == ["MKT"]
