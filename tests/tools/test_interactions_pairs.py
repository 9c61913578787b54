"""Files of pairs and groups: what is a header, what is a row, and what is refused or listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from performers.errors import InputError
from performers.tools.interactions.pairs import labelled_pairs, read_groups, read_pairs


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_pairs_are_read_with_and_without_a_header_and_labels(tmp_path: Path) -> None:
    plain = list(read_pairs(write(tmp_path / "a.tsv", "P1\tP2\t1\n\nP3\tP3\t0.0\n")))
    assert [tuple(pair) for pair in plain] == [(1, "P1", "P2", 1), (2, "P3", "P3", 0)]
    headed = list(read_pairs(write(tmp_path / "b.csv", "protein1,protein2\nP1,P2\n")))
    assert [tuple(pair) for pair in headed] == [(1, "P1", "P2", None)]
    letters = list(read_pairs(write(tmp_path / "d.tsv", "a\tb\t1\n")))
    assert [tuple(pair) for pair in letters] == [(1, "a", "b", 1)]
    assert next(read_pairs(write(tmp_path / "e.tsv", "a\tb\tlabel\nP1\tP2\t1\n"))).a == "P1"
    groups = list(read_groups(write(tmp_path / "c.tsv", "group\tid\nx\tP1\ny\tP2\nx\tP3\nx\tP1\n")))
    assert [tuple(group) for group in groups] == [(1, "x", ("P1", "P3"), ((4, "P1"),)), (2, "y", ("P2",), ())]


@pytest.mark.parametrize(
    ("text", "known", "first"),
    [
        ("p0\tp1\nP1\tP2\n", {"P1", "P2"}, "P1"),
        ("a\tb\nP1\tP2\n", {"P1", "P2"}, "P1"),
        ("Protein A,Protein B\nP1,P2\n", {"P1", "P2"}, "P1"),
        ("p0\tp1\nP1\tP2\n", {"p1"}, "p0"),
        ("p0\tp2\nP1\tP2\n", set[str](), "p0"),
        ("complex\tp0\nP1\tP2\n", set[str](), "complex"),
        ("p0\tp1\tlabel\np0\tp1\t1\n", {"p0", "p1"}, "p0"),
        ("uniprot_a\tuniprot_b\tlabel\nP1\tP2\t1\n", {"P1", "P2"}, "P1"),
    ],
)
def test_a_first_line_of_pairs_is_a_header_only_if_it_is_a_usual_one_and_names_no_protein(
    text: str, known: set[str], first: str, tmp_path: Path
) -> None:
    pairs = list(read_pairs(write(tmp_path / "p.tsv", text), known))
    assert (pairs[0].number, pairs[0].a) == (1, first)
    assert len(pairs) == (1 if "label" in text or first == "P1" else 2)


def test_a_first_line_of_groups_is_a_header_only_if_its_identifier_is_no_protein(tmp_path: Path) -> None:
    path = write(tmp_path / "g.tsv", "complex\tprotein\ncomplex\tp1\n")
    assert [group.members for group in read_groups(path)] == [("p1",)]
    assert [group.members for group in read_groups(path, {"protein"})] == [("protein", "p1")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no pairs"),
        ("P1\n", "row 1: 1 values"),
        ("P1\tP2\t2\n", "the label is '2'"),
        ("P1\tP2\t1\nP1\t\t1\n", "row 2"),
        ("P1\tP2\t1\nP1\tP2\n", "row 2"),
        ("P1\tP2\n", "row 1: 2 values"),
        ("P1\t\0\t1\n", "no text table"),
        ("A\tQ\tclass\nP1\tP2\t1\n", "row 1: the label is 'class'"),
    ],
)
def test_a_file_that_is_no_table_of_pairs_is_refused_by_row(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        list(read_pairs(write(tmp_path / "pairs.tsv", text), {"A"}, labelled=True))


def test_contradictory_self_and_unknown_pairs_are_listed_and_duplicates_counted(tmp_path: Path) -> None:
    index = {name: i for i, name in enumerate("ABCD")}
    text = "A\tB\t1\nB\tA\t0\nA\tC\t1\nC\tA\t1\nD\tD\t1\nA\tX\t1\nX\tB\t0\nA\tB\t1\n"
    found = labelled_pairs(write(tmp_path / "p.tsv", text), index)
    assert found.pairs.tolist() == [[0, 2]]
    assert found.labels.tolist() == [1]
    assert found.duplicates == 3
    assert [(entry.number, entry.name) for entry in found.left_out] == [(2, "B A"), (5, "D D"), (6, "X")]
    with pytest.raises(InputError, match="none of its pairs can be used"):
        labelled_pairs(write(tmp_path / "q.tsv", "A\tA\t1\n"), index)
