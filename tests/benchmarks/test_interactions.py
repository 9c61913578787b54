"""The benchmark of interactions on a few proteins: what is in the report, and what it is made of."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
from performers.benchmarks.interaction_groups import draw_groups
from performers.benchmarks.interactions import InteractionBenchmark, measure_interactions, tables
from performers.data import read_fasta
from performers.errors import InputError


def write_table(folder: Path, source: str, number: int) -> tuple[str, str]:
    """Proteins of a bundled set and the labels of all their pairs, which charge decides."""
    records = sorted((r for r in read_fasta(source) if len(r.sequence) <= 90), key=lambda r: r.id)[:number]
    name = source.partition(":")[2]
    (folder / f"{name}.fasta").write_text("".join(f">{r.id}\n{r.sequence}\n" for r in records))
    charge = [sum(map(r.sequence.count, "KR")) - sum(map(r.sequence.count, "DE")) for r in records]
    pairs = itertools.combinations(range(len(records)), 2)
    text = (f"{records[i].id}\t{records[j].id}\t{int(charge[i] * charge[j] < 0)}\n" for i, j in pairs)
    (folder / f"{name}.tsv").write_text("".join(text))
    return str(folder / f"{name}.fasta"), str(folder / f"{name}.tsv")


def test_the_report_has_every_system_with_intervals_groups_and_a_verdict(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"num_features": 8})).save_pretrained(tmp_path / "m")
    PerformerTokenizer().save_pretrained(tmp_path / "m")
    fasta, pairs = write_table(tmp_path, "bundled:train", 40)
    test = "held-out=" + ",".join(write_table(tmp_path, "bundled:validation", 20))
    settings = InteractionBenchmark.of_size(
        True, proteins=[fasta], pairs=pairs, tests=[test], model=str(tmp_path / "m"), steps=4, batch_size=8, threads=1
    )
    report = measure_interactions(settings, tmp_path / "out", quick=True)
    cell, groups = report["cells"]
    assert list(cell["systems"]) == ["joint", "composition", "k-mer", "mean embedding", "additive", "homology"]
    for system in cell["systems"].values():
        for key in ("auroc", "aupr", "accuracy"):
            assert system[f"{key}_interval"][0] <= system[key] <= system[f"{key}_interval"][1]
    assert groups["groups_measured"] == 10
    assert set(groups["auroc"]) == {"group", "pairs", "additive", "decoys"}
    assert -1 <= groups["rank_kept"] <= 1
    assert any("baselines on held-out" in note for note in report["notes"])
    assert (tmp_path / "out" / "interactions.png").is_file()
    assert json.loads((tmp_path / "out" / "interactions.json").read_text())["training"]["verdict"]
    printed = tables(report)
    assert [len(rows) for _, _, rows in printed] == [6, 1]
    assert f"calibration gap of the joint model {cell['calibration']['error']:.3f}" in printed[0][0]
    (_, header, (row,)) = printed[1]
    assert len(header) == len(row)
    assert row[header.index("one context minus additive")].count("to") == 1
    assert (cell["proteins"], cell["pairs"], cell["learned_from"]) == (20, 190, [fasta, pairs])


def test_groups_are_connected_and_drawn_by_the_seed() -> None:
    edges = {frozenset(pair) for pair in [(0, 1), (1, 2), (2, 3), (3, 4), (10, 11)]}
    drawn = draw_groups(edges, 4, 20, 0)
    assert drawn == draw_groups(edges, 4, 20, 0)
    assert {tuple(sorted(group)) for group in drawn} == {(0, 1, 2, 3), (1, 2, 3, 4)}
    assert draw_groups(edges, 6, 20, 0) == []


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InputError, match="at least one --test"):
        InteractionBenchmark.of_size(True, proteins=["x.fasta"], pairs="p.tsv")
    with pytest.raises(InputError, match=r"NAME=FASTA,TSV"):
        InteractionBenchmark.of_size(True, proteins=["x.fasta"], pairs="p.tsv", tests=["x.fasta"])
