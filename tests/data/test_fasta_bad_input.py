"""Every malformed input gets one sentence: which file, which record, which residue, what was expected."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from performers.data import FastaReport, build_corpus, read_fasta
from performers.errors import FastaError, InputError

GOOD = b">a\nMKT\n>b\nGG\n"


def write(folder: Path, content: bytes | str, name: str = "bad.fasta") -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def refusal(path: Path | str, **options: object) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(FastaError) as caught:
        list(read_fasta(path, **options))  # type: ignore[arg-type]
    message = str(caught.value)
    assert Path(path).name in message
    assert "\n" not in message
    assert message.endswith(".")
    assert isinstance(caught.value, InputError)
    return message


def test_a_missing_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FastaError, match=r"missing\.fasta does not exist"):
        read_fasta([write(tmp_path, GOOD, "good"), tmp_path / "missing.fasta"])


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    path.chmod(0)
    assert "cannot be read: Permission denied" in refusal(path)


def test_an_unknown_bundled_set_is_refused() -> None:
    with pytest.raises(FastaError, match=r"expected bundled:train, .*, bundled:ood, bundled:random"):
        read_fasta("bundled:tests")


@pytest.mark.parametrize("options", [{"on_invalid": "ignore"}, {"max_length": 0}])
def test_unknown_options_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(FastaError, match="expected"):
        read_fasta(write(tmp_path, GOOD), **options)  # type: ignore[arg-type]


def test_an_empty_list_of_files_is_refused() -> None:
    with pytest.raises(FastaError, match="expected at least one"):
        read_fasta([])


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\r\n  \n", b"\xef\xbb\xbf", gzip.compress(b""), gzip.compress(b"\n")],
    ids=["no bytes", "blank lines", "a mark", "packed nothing", "packed blank line"],
)
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "is empty; expected FASTA records" in refusal(write(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"MKTAYIAK\nGGG\n", "has no header", id="no header"),
        pytest.param(b"MKT\n>a\nGG\n", "has no header", id="sequence before the first header"),
        pytest.param(b"id,sequence\na,MKT\n", "is not FASTA: found", id="CSV"),
        pytest.param(b"<html><body>404</body></html>", "is not FASTA: found", id="HTML"),
        pytest.param(b"; comment\n>a\nMKT\n", "is not FASTA: found", id="old comment"),
        pytest.param(b"@read\nMKT\n+\nIII\n", "looks like FASTQ", id="FASTQ"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not FASTA: found", id="PNG"),
        pytest.param(b"\x7fELF\x02\x01\x01" + bytes(100), "is not FASTA: found", id="binary"),
        pytest.param(">a\nMKT\n".encode("utf-16"), "is UTF-16 text", id="UTF-16"),
        pytest.param(bz2.compress(GOOD), "is compressed with bzip2", id="bzip2"),
        pytest.param(lzma.compress(GOOD), "is compressed with xz", id="xz"),
        pytest.param(b"PK\x03\x04" + bytes(40), "is compressed with zip", id="zip"),
        pytest.param(b"(\xb5/\xfd" + bytes(40), "is compressed with zstd", id="zstd"),
    ],
)
def test_what_is_no_fasta_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    message = refusal(write(tmp_path, content))
    assert says in message
    assert "expected" in message
    assert message.isprintable()


@pytest.mark.parametrize("end", ["\n", "", "\n\n\n"])
@pytest.mark.parametrize(
    ("content", "record"),
    [
        (">empty", "record 1 (empty)"),
        (">a\nMKT\n>empty x", "record 2 (empty)"),
        (">a\nMKT\n>empty\n \n", "record 2 (empty)"),
    ],
)
def test_a_last_record_without_sequence_is_refused(tmp_path: Path, content: str, record: str, end: str) -> None:
    message = refusal(write(tmp_path, content + end))
    assert f"bad.fasta, {record}: the record has no sequence; expected at least one residue." in message


@pytest.mark.parametrize("on_invalid", ["error", "x", "skip"])
def test_a_record_without_sequence_in_the_middle_is_refused_whatever_the_policy(
    tmp_path: Path, on_invalid: str
) -> None:
    assert "record 2 (b): the record has no sequence" in refusal(
        write(tmp_path, ">a\nMKT\n>b\n\n>c\nGG\n"), on_invalid=on_invalid
    )


@pytest.mark.parametrize(
    ("sequence", "position", "shown"),
    [
        pytest.param("MKT*", 4, "'*' (a stop)", id="stop"),
        pytest.param("M-KT", 2, "'-' (a gap)", id="gap"),
        pytest.param("M.KT", 2, "'.' (a gap)", id="dot"),
        pytest.param("MK1T", 3, "'1'", id="digit"),
        pytest.param("MK\0T", 3, "a NUL byte", id="NUL"),
        pytest.param("MKJT", 3, "'J' (leucine or isoleucine)", id="J"),
        pytest.param("mkjt", 3, "'J' (leucine or isoleucine)", id="lower-case J"),
        pytest.param("MéT", 2, "'é'", id="letter outside ASCII"),
        pytest.param("M蛋T", 2, "'蛋'", id="character of three bytes"),
        pytest.param("MK>T", 3, "'>'", id="header sign inside a line"),
        pytest.param("M K\nT *\n", 4, "'*' (a stop)", id="position without spaces"),
        pytest.param("MK\u00a0T", 3, r"'\xa0'", id="no-break space"),
    ],
)
def test_a_residue_that_is_none_is_named_with_record_and_position(
    tmp_path: Path, sequence: str, position: int, shown: str
) -> None:
    path = write(tmp_path, f">a\nMKT\n>sp|P1|X y\n{sequence}\n>c\nGG\n")
    message = refusal(path)
    assert (
        f"bad.fasta, record 2 (sp|P1|X), residue {position}: {shown} is not a residue; expected one of ACD" in message
    )
    assert "on-invalid 'x' replaces it by X" in message
    assert len(list(read_fasta(path, on_invalid="x"))) == 3
    assert [record.number for record in read_fasta(path, on_invalid="skip")] == [1, 3]


def test_a_byte_that_is_no_utf8_in_a_sequence_is_named(tmp_path: Path) -> None:
    assert "residue 2: '\ufffd' (a byte that is not UTF-8 text)" in refusal(write(tmp_path, b">a\nM\xffT\n"))


def test_the_good_records_before_a_bad_one_are_handed_out(tmp_path: Path) -> None:
    records = read_fasta(write(tmp_path, ">a\nMKT\n>b\nM*\n"))
    assert next(records).sequence == "MKT"
    with pytest.raises(FastaError, match="record 2"):
        next(records)


@pytest.mark.parametrize("on_invalid", ["error", "x", "skip"])
def test_a_record_over_the_limit_is_refused_and_never_truncated(tmp_path: Path, on_invalid: str) -> None:
    path = write(tmp_path, ">a\nMKT\n>long one\n" + "MKTAY\n" * 20 + ">c\nGG\n")
    message = refusal(path, max_length=99, on_invalid=on_invalid)
    assert "record 2 (long): the record has 100 residues; expected at most 99" in message
    assert "never truncated" in message
    assert [len(record.sequence) for record in read_fasta(path, max_length=100)] == [3, 100, 2]


def test_ten_million_residues_are_the_limit_unless_it_is_raised(tmp_path: Path) -> None:
    path = write(tmp_path, b">a\n" + b"M" * 10_000_001 + b"\n")
    assert "record 1 (a): the record has" in refusal(path)
    (record,) = read_fasta(path, max_length=10_000_001)
    assert len(record.sequence) == 10_000_001


def test_white_space_does_not_count_towards_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path, b">a\n" + b"M\n" * 40 + b" \n" * 3_000_000 + b"KT\n>b\nGG\n")
    assert [len(record.sequence) for record in read_fasta(path, max_length=42)] == [42, 2]


def test_a_control_sequence_in_an_identifier_does_not_reach_the_terminal(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, b">\x1b[31mred\x07\n*\n"))
    assert message.isprintable()
    assert "red" in message


# -- gzip


def many_records(count: int = 40_000) -> bytes:
    random = np.random.Generator(np.random.PCG64(0))
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)
    return b"".join(b">p%d\n%s\n" % (i, letters[random.integers(0, 20, 60)].tobytes()) for i in range(count))


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.999])
def test_truncated_gzip_is_refused_with_the_count_and_the_byte(tmp_path: Path, keep: float) -> None:
    content = gzip.compress(many_records())
    cut = content[: int(keep * len(content))]
    path = write(tmp_path, cut, "bad.fasta.gz")
    message = refusal(path)
    assert f"bad.fasta.gz ends in the middle of its gzip data, at byte {len(cut):,}, after " in message
    assert "complete records; expected a complete file." in message


def test_a_gzip_file_that_lost_only_its_checksum_is_refused(tmp_path: Path) -> None:
    assert "ends in the middle" in refusal(write(tmp_path, gzip.compress(GOOD)[:-3]))


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(many_records()))
    content[-6] ^= 1
    message = refusal(write(tmp_path, bytes(content)))
    assert "is not valid gzip data near byte" in message
    assert "incorrect data check" in message


def test_garbage_after_gzip_is_refused(tmp_path: Path) -> None:
    for garbage in (b"garbage", bytes(5) + b"garbage", GOOD):
        message = refusal(write(tmp_path, gzip.compress(GOOD) + garbage))
        assert "is not valid gzip data" in message
        assert "nothing after it" in message


def test_a_damaged_second_member_is_refused(tmp_path: Path) -> None:
    second = bytearray(gzip.compress(GOOD))
    second[12] ^= 0xFF
    assert "is not valid gzip data" in refusal(write(tmp_path, gzip.compress(GOOD) + bytes(second)))


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_gzip_never_passes_for_other_sequences(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    text = many_records(300)
    expected = [line.decode() for line in text.split(b"\n") if line and not line.startswith(b">")]
    content = bytearray(gzip.compress(text, mtime=0))
    content[position % len(content)] ^= 1 << bit
    path = write(tmp_path_factory.mktemp("flip"), bytes(content))
    try:
        found = [record.sequence for record in read_fasta(path)]
    except FastaError:
        return
    assert found == expected  # a bit of the header, such as the time, says nothing about the content


# The peak of /proc is that of the process alone; getrusage would count what was forked to start it.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to know the peak memory of a process")
@pytest.mark.parametrize(
    ("header", "unit", "megabytes", "says"),
    [
        pytest.param(b">b\n", b"M" * 61, 1000, "record 1 (b): the record has more than 10,000,000", id="sequence"),
        pytest.param(b">", b"h" * 61, 1000, "record 1: the header is longer than", id="header"),
        pytest.param(b">b\n", b"\n" * 61, 300, "record 1 (b): the record has no sequence", id="blank lines"),
        pytest.param(b"", b"\n" * 61, 300, "is empty", id="blank lines before any record"),
    ],
)
def test_a_gzip_bomb_is_refused_in_little_memory(
    tmp_path: Path, header: bytes, unit: bytes, megabytes: int, says: str
) -> None:
    path = tmp_path / "bomb.fasta.gz"
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with path.open("wb") as stream:
        stream.write(packer.compress(header))
        for _ in range(megabytes):
            stream.write(packer.compress(unit * (1_000_000 // len(unit) + 1)))
        stream.write(packer.flush())
    assert path.stat().st_size < 1_100_000
    code = """
import sys
from performers.data import FastaReport, read_fasta
try:
    list(read_fasta(sys.argv[1], report=FastaReport()))
except Exception as error:
    print(type(error).__name__, error)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    sentence, figures = done.stdout.splitlines()
    kibibytes, torch = figures.split()
    assert sentence.startswith("FastaError")
    assert says in sentence
    assert int(kibibytes) < 300_000, f"{int(kibibytes):,} KiB"
    assert torch == "False"


def test_a_bomb_leaves_no_corpus_behind(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(b">a\n" + b"M" * 11_000_000))
    with pytest.raises(FastaError, match="more than 10,000,000"):
        build_corpus(path, tmp_path / "corpus")
    assert os.listdir(tmp_path) == ["bad.fasta"]


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=200),
    prefix=st.sampled_from([b"", b">", b">a\nMKT\n", b"\x1f\x8b\x08", b"\xef\xbb\xbf>"]),
)
def test_any_bytes_give_records_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, prefix: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("fuzz"), prefix + content)
    report = FastaReport()
    try:
        records = list(read_fasta(path, on_invalid="x", report=report))
    except FastaError as error:
        message = str(error)
        assert message.isprintable()
        assert message.endswith(".")
    else:
        assert records
        assert all(record.sequence.isascii() and record.sequence.isupper() for record in records)
        assert report.records == len(records)


def test_a_nul_byte_in_a_header_is_refused(tmp_path: Path) -> None:
    assert "record 1" in refusal(write(tmp_path, b">a\0b\nMKT\n"))


def test_a_name_that_is_no_path_is_refused() -> None:
    with pytest.raises(FastaError, match="cannot be opened"):
        read_fasta("x" * 5000)
