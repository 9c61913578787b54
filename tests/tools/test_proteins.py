"""One door for every format: the same proteins come out, and what is wrong is said in one sentence."""

from __future__ import annotations

import gzip
import random
import re
import subprocess
import sys
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


MMCIF = """\
data_1ABC
loop_
_entity.id
_entity.type
1 polymer
2 water
loop_
_entity_poly.entity_id
_entity_poly.type
_entity_poly.pdbx_strand_id
1 'polypeptide(L)' A,B
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
1 1 MET
1 2 MSE
1 3 THR
1 4 GLY
loop_
_struct_asym.id
_struct_asym.entity_id
A 1
B 1
C 2
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.pdbx_PDB_ins_code
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.pdbx_PDB_model_num
ATOM 1 C CA . MET A 1 1 ? 11.6 6.0 -5.1 1.0 0.0 1 A 1
ATOM 2 C CA . MSE A 1 2 ? 13.6 6.0 -3.1 1.0 0.0 2 A 1
ATOM 3 C CA . THR A 1 3 ? 16.6 6.0 -1.1 1.0 0.0 3 A 1
ATOM 4 C CA . MET B 1 1 ? 21.6 6.0 -5.1 1.0 0.0 1 B 1
ATOM 5 C CA . MSE B 1 2 ? 23.6 6.0 -3.1 1.0 0.0 2 B 1
HETATM 6 O O . HOH C 2 . ? 30.0 30.0 30.0 1.0 0.0 101 A 1
"""


@pytest.mark.parametrize("name", ["1abc.cif", "1abc.mmcif", "1ABC.cif.gz"])
def test_the_chains_of_an_mmcif_file_are_proteins_as_deposited(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gemmi")
    found = list(read_proteins(written(tmp_path, name, MMCIF)))
    stem = name[:4]
    # Selenomethionine is read as methionine; the last residue was not observed, and is there all the same.
    assert [(protein.id, protein.chains) for protein in found] == [(f"{stem}_A", ("MMTG",)), (f"{stem}_B", ("MMTG",))]
    with pytest.raises(FastaError, match="no protein chain"):
        list(read_proteins(written(tmp_path, "water.cif", re.sub("(?m)^ATOM .*\n", "", MMCIF))))
    with pytest.raises(FastaError, match=r"damaged\.cif cannot be read as a structure"):
        list(read_proteins(written(tmp_path, "damaged.cif", MMCIF[: MMCIF.index("ATOM 3") + 20])))


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


def test_a_header_of_any_length_is_a_sentence_away_from_a_table(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom performers.tools import read_proteins\nfrom performers.errors import InputError\n"
        "try:\n    list(read_proteins(sys.argv[1]))\nexcept InputError as error:\n    print(error)\n"
    )
    # In a process of its own: the limit of the csv module is the process's.
    path = written(tmp_path, "x.csv", "A" * 200_000 + "\n")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert "has no column 'id'" in done.stdout, done.stderr
    with pytest.raises(InputError, match="holds a NUL byte"):
        list(read_proteins(written(tmp_path, "y.csv", "id,seq\0uence\na,MKT\n")))


def test_a_damaged_page_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    sequences = ["".join(random.Random(i).choices("ACDEFGHIKLMNPQRSTVWY", k=300)) for i in range(200)]
    table = pyarrow.table({"id": [str(i) for i in range(200)], "sequence": sequences})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet cannot be read after 0 rows: "):
        list(read_proteins(path))


def test_what_to_do_with_other_letters_is_an_option_in_every_format(tmp_path: Path) -> None:
    for name, text in (("x.fasta", ">a\nM*T\n>b\nMK\n"), ("x.csv", "id,sequence\na,M*T\nb,MK\n")):
        path = written(tmp_path, name, text)
        report = FastaReport()
        assert [protein.chains[0] for protein in read_proteins(path, on_invalid="x", report=report)] == ["MXT", "MK"]
        assert report.replaced == 1
        report = FastaReport()
        found = list(read_proteins(path, on_invalid="skip", report=report))
        assert [(protein.id, protein.number) for protein in found] == [("b", 2)]
        assert report.skipped == 1
        assert report.left_out == [(1, "a", "residue 2: '*' is not a residue")]


def test_a_protein_that_is_too_long_is_refused_and_never_cut(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", "id,sequence\na,MKTMKT\n")
    with pytest.raises(FastaError, match="6 residues; expected at most 5"):
        list(read_proteins(path, max_length=5))


def test_a_missing_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FastaError, match="does not exist"):
        read_proteins(tmp_path / "none.csv")
