"""One door for every format: the same proteins come out, and what is wrong is said in one sentence."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from performers.data import FastaReport
from performers.errors import FastaError, InputError
from performers.tools import read_proteins

PDB = """\
ATOM      1  N   MET A   1      11.104   6.134  -6.504  1.00  0.00           N
ATOM      2  CA  MET A   1      11.639   6.071  -5.147  1.00  0.00           C
ATOM      3  C   MET A   1      12.639   6.071  -5.147  1.00  0.00           C
ATOM      4  N   LYS A   2      12.104   6.134  -4.504  1.00  0.00           N
ATOM      5  CA  LYS A   2      13.639   6.071  -3.147  1.00  0.00           C
ATOM      6  C   LYS A   2      14.639   6.071  -3.147  1.00  0.00           C
ATOM      7  N   THR A   3      15.104   6.134  -2.504  1.00  0.00           N
ATOM      8  CA  THR A   3      16.639   6.071  -1.147  1.00  0.00           C
TER       9      THR A   3
ATOM     10  N   GLY B   1      21.104   6.134  -6.504  1.00  0.00           N
ATOM     11  CA  GLY B   1      21.639   6.071  -5.147  1.00  0.00           C
ATOM     12  C   GLY B   1      22.639   6.071  -5.147  1.00  0.00           C
ATOM     13  N   TRP B   2      22.104   6.134  -4.504  1.00  0.00           N
ATOM     14  CA  TRP B   2      23.639   6.071  -3.147  1.00  0.00           C
TER      15      TRP B   2
HETATM   16  O   HOH B 101      30.000  30.000  30.000  1.00  0.00           O
END
"""


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.fasta", ">a\nMKT\n>b\nM kw\n"),
        ("x.fa.gz", ">a\nMKT\n>b\nMKW\n"),
        ("x.csv", "id,sequence\na,MKT\nb,MKW\n"),
        ("x.csv.gz", "\ufeffSequence,other,ID\r\nMKT,1,a\r\nMKW,,b\r\n"),
        ("x.tsv", "id\tsequence\na\tMKT\nb\tmkw\n"),
        ("x.a3m", "#3\t1\n>a\nMKT\n>b\nM-.aaK.gW\n"),
    ],
)
def test_every_format_gives_the_same_proteins(tmp_path: Path, name: str, text: str) -> None:
    report = FastaReport()
    found = list(read_proteins(written(tmp_path, name, text), report=report))
    assert [(protein.id, protein.chains, protein.number) for protein in found] == [
        ("a", ("MKT",), 1),
        ("b", ("MKW",), 2),
    ]
    assert (report.records, report.residues, len(report.inputs)) == (2, 6, 1)


def test_parquet_gives_the_same_proteins(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"id": ["a", "b"], "sequence": ["MKT", "MKW"]}), path)
    assert [protein.chains for protein in read_proteins(path)] == [("MKT",), ("MKW",)]


def test_the_chains_of_a_structure_are_proteins(tmp_path: Path) -> None:
    pytest.importorskip("gemmi")
    found = list(read_proteins(written(tmp_path, "1abc.pdb", PDB)))
    assert [(protein.id, protein.chains) for protein in found] == [("1abc_A", ("MKT",)), ("1abc_B", ("GW",))]
    with pytest.raises(FastaError, match="no protein chain"):
        list(read_proteins(written(tmp_path, "water.pdb", PDB[PDB.index("HETATM") :])))


def test_a_colon_separates_chains_and_sources_are_numbered_through(tmp_path: Path) -> None:
    first = written(tmp_path, "x.fasta", ">pair\nMKT:MK W\n")
    second = written(tmp_path, "y.csv", "id,sequence\nthree,M:K:T\n")
    found = list(read_proteins([first, second]))
    assert [(protein.id, protein.chains, protein.number) for protein in found] == [
        ("pair", ("MKT", "MKW"), 1),
        ("three", ("M", "K", "T"), 2),
    ]
    assert found[0].length == 6


def test_repeated_identifiers_are_kept_and_counted(tmp_path: Path) -> None:
    report = FastaReport()
    path = written(tmp_path, "x.csv", "id,sequence\na,MK\na,MT\n")
    assert [protein.chains[0] for protein in read_proteins(path, report=report)] == ["MK", "MT"]
    assert report.duplicates == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.fasta", ">a\nMKT\n>b\nMK1\n", ["x.fasta, record 2 (b), residue 3", "'1' is not a residue"]),
        ("x.fasta", ">a\nMKT:MK*\n", ["record 1 (a), chain 2, residue 3", "'*'"]),
        ("x.fasta", ">a\nMKT:\n", ["chain 2", "empty"]),
        ("x.fasta", ">a\n\n>b\nMK\n", ["record 1 (a)", "no sequence"]),
        ("x.fasta", "", ["is empty"]),
        ("x.fasta", "MKT\n", ["no header"]),
        ("x.csv", "name,sequence\na,MK\n", ["no column 'id'", "name, sequence"]),
        ("x.csv", "id,sequence\na,MK,1\n", ["row 1", "3 values; expected 2"]),
        ("x.csv", "id,sequence\n", ["no rows"]),
        ("x.csv", "id,sequence\na,MJ\n", ["record 1 (a), residue 2", "'J'"]),
        ("x.csv", "", ["is empty"]),
        ("x.a3m", ">a\n---\n", ["record 1 (a)", "no sequence"]),
        ("x.pdb", "nonsense\n", ["x.pdb"]),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        list(read_proteins(written(tmp_path, name, text)))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"id,sequence\n" + b"a,MKT\n" * 1000)
    (tmp_path / "x.csv.gz").write_bytes(whole[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        list(read_proteins(tmp_path / "x.csv.gz"))


def test_what_to_do_with_other_letters_is_an_option_in_every_format(tmp_path: Path) -> None:
    for name, text in (("x.fasta", ">a\nM*T\n>b\nMK\n"), ("x.csv", "id,sequence\na,M*T\nb,MK\n")):
        path = written(tmp_path, name, text)
        report = FastaReport()
        assert [protein.chains[0] for protein in read_proteins(path, on_invalid="x", report=report)] == ["MXT", "MK"]
        assert report.replaced == 1
        report = FastaReport()
        assert [protein.id for protein in read_proteins(path, on_invalid="skip", report=report)] == ["b"]
        assert report.skipped == 1


def test_a_protein_that_is_too_long_is_refused_and_never_cut(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", "id,sequence\na,MKTMKT\n")
    with pytest.raises(FastaError, match="6 residues; expected at most 5"):
        list(read_proteins(path, max_length=5))


def test_a_missing_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FastaError, match="does not exist"):
        read_proteins(tmp_path / "none.csv")
