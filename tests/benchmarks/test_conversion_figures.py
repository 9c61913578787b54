"""What the benchmark of conversion counts: sequences apart, floors that copy, and shares with intervals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from performers.benchmarks.conversion_figures import kept, recovered, shown, summary
from performers.benchmarks.conversion_floors import aligned, copied_from_neighbours
from performers.benchmarks.conversion_sequences import Domain, antibody_domains, english, halves_of
from performers.benchmarks.conversion_subjects import ROUNDS, by_region, masked_in
from performers.errors import InputError

# Two heavy chains of different germlines, by their CDR3 and the rest.
HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAKDRLSITI"
    "RPRYYGLDVWGQGTTVTVSS"
)
OTHER = (
    "QVQLQQSGAELARPGASVKMSCKASGYTFTRYTMHWVKQRPGQGLEWIGYINPSRGYTNYNQKFKDKATLTTDKSSSTAYMQLSSLTSEDSAVYYCARYYDDHYC"
    "LDYWGQGTTLTVSS"
)


def table(number: int) -> str:
    rows = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        draw = "".join("ADEFGHIKLMNPQRSTVWY"[j] for j in torch.randint(19, (90,), generator=generator))
        rows += [f"d{i}h1\tb.1.1.1\t{draw}CARDY{end}DYWGQGTLVTVSS\tLL\n" for end in "ST"]
    return "".join([*rows, "d1cd4a1\tb.1.1.1\tMKT\tLL\n", "d1xyzh1\ta.1.1.1\tMKT\tLL\n"])


def test_antibodies_are_found_by_chain_and_motif_and_the_two_sets_share_no_cluster(tmp_path: Path) -> None:
    path = tmp_path / "scope.tsv"
    path.write_text(table(8))
    training, judged = antibody_domains(path, 3, 5, seed=0)
    assert (len(training), len(judged)) == (2 * 3, 5)  # of the judged clusters one domain each
    assert not {d.sequence[:90] for d in training} & {d.sequence[:90] for d in judged}
    assert len({d.sequence[:90] for d in training[:3]}) == 3  # one of each cluster first
    for domain in (*training, *judged):
        assert domain.sequence[domain.cdr3].startswith("ARDY")
        assert domain.sequence[domain.cdr3].endswith("DY")
    with pytest.raises(InputError, match="8 clusters of 80% identity; expected at least 9"):
        antibody_domains(path, 4, 5, seed=0)


def test_english_is_the_reference_manual_or_the_lines_of_a_file(tmp_path: Path) -> None:
    training, judged = english(None, 100, 20, seed=0)
    assert not set(training) & set(judged)
    assert len(judged) == 20
    assert all(150 <= len(text) <= 500 and text.endswith(".") for text in judged)
    assert len(training) > 300
    (tmp_path / "texts.txt").write_text("".join(f"text number {i}\n" for i in range(10)) + "text number 1\n")
    training, judged = english(tmp_path / "texts.txt", 2, 4, seed=0)
    assert len(training) == len(set(training)) == 6
    assert len({*training, *judged}) == 10


def test_the_halves_of_a_text_are_all_of_its_words() -> None:
    first, second = halves_of(["one two three", "one"])
    assert (first, second) == (["one two", "one"], ["three", ""])


def test_an_alignment_says_what_stands_opposite_each_residue() -> None:
    assert aligned("ACDEFGHIKL", "ACDEFGHIKL") == "ACDEFGHIKL"
    assert aligned("ACDXFGHIKL", "ACDEFGHIKL") == "ACDEFGHIKL"  # a hidden residue takes its place
    assert aligned("WWCCHHWWWWWFFFF", "WWCCWWWWWFFFF") == "WWCC--WWWWWFFFF"
    assert len(aligned(HEAVY, OTHER)) == len(HEAVY)


def test_copying_finds_what_the_neighbour_has_and_nothing_without_one() -> None:
    cdr3 = slice(HEAVY.index("AKDRL"), HEAVY.index("WGQG"))
    judged = [Domain("same", HEAVY, cdr3)]
    rounds = masked_in(judged, 0)
    changed = "".join("A" if i in (5, 40) else residue for i, residue in enumerate(HEAVY))
    columns, (identity,) = copied_from_neighbours([Domain("near", changed, cdr3)], judged, rounds, threads=1)
    assert columns["residues"] == [len(HEAVY)]
    assert columns["right"] == [len(HEAVY) - 2]
    assert columns["cdr3_right"] == columns["cdr3_residues"] == [cdr3.stop - cdr3.start]
    assert identity == pytest.approx(1 - 2 / len(HEAVY), abs=0.01)
    far = Domain("far", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV", slice(0, 1))
    columns, (identity,) = copied_from_neighbours([far], judged, rounds, threads=1)
    assert (columns["right"], identity) == ([0.0], 0.0)


def test_every_residue_is_masked_in_one_pass_and_counted_in_one_region() -> None:
    domains = [Domain("a", HEAVY, slice(97, 112)), Domain("b", OTHER, slice(96, 106))]
    for domain, rounds in zip(domains, masked_in(domains, 0), strict=True):
        sizes = torch.bincount(rounds, minlength=ROUNDS)
        assert int(sizes.sum()) == len(domain.sequence)
        assert int(sizes.max() - sizes.min()) <= 1
    columns = by_region(domains, [torch.ones(len(d.sequence), dtype=torch.bool) for d in domains])
    assert columns["right"] == columns["residues"] == [float(len(HEAVY)), float(len(OTHER))]
    assert columns["cdr3_right"] == [15.0, 10.0]
    assert columns["framework_residues"] == [len(HEAVY) - 15.0, len(OTHER) - 10.0]


def test_shares_are_of_sums_and_their_intervals_hold_them() -> None:
    ours = {"right": [8.0, 45.0, 20.0], "residues": [10.0, 50.0, 40.0]}
    theirs = {"right": [9.0, 50.0, 30.0], "residues": [10.0, 50.0, 40.0]}
    floor = {"right": [5.0, 30.0, 10.0], "residues": [10.0, 50.0, 40.0]}
    accuracy = summary("antiberty", ours, 0)["accuracy"]
    assert accuracy["value"] == pytest.approx(73 / 100)
    assert set(summary("antiberty", ours, 0)) == {"accuracy"}  # the others were not counted
    assert kept("antiberty", ours, theirs, 0)["accuracy"]["value"] == pytest.approx(73 / 89)
    share = recovered("antiberty", ours, theirs, floor, 0)["accuracy"]
    assert share["value"] == pytest.approx((73 - 45) / (89 - 45))
    low, high = share["interval"]
    assert low <= share["value"] <= high
    assert recovered("antiberty", theirs, theirs, floor, 0)["accuracy"]["interval"] == (1.0, 1.0)
    assert recovered("antiberty", ours, floor, theirs, 0)["accuracy"]["value"] is None
    assert shown(share, percent=True).startswith("63.6%")
    assert shown({"value": None, "interval": None}) == ""
