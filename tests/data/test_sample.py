"""The proteins that the package carries."""

from __future__ import annotations

import gzip
from collections import defaultdict
from pathlib import Path

import performers.data
from performers.data import BUNDLED, in_memory_corpus, read_fasta

FOLDER = Path(performers.data.__file__).parent / "sample"


def families() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    with gzip.open(FOLDER / "families.tsv.gz", "rt") as lines:
        assert next(lines) == "accession\tfamily\tname\n"
        for line in lines:
            accession, family, _ = line.split("\t")
            found[accession].add(family)
    return found


def test_there_are_twenty_thousand_proteins_in_six_megabytes() -> None:
    counts = {name: sum(1 for _ in read_fasta(f"bundled:{name}")) for name in BUNDLED}
    assert counts == {"train": 17_000, "validation": 1_000, "test": 1_000, "ood": 1_000, "random": 946}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000


def test_no_identifier_and_no_sequence_occurs_twice() -> None:
    records = list(read_fasta([f"bundled:{name}" for name in BUNDLED]))
    assert len({record.id for record in records}) == len(records)
    assert len(in_memory_corpus(records).deduplicate()) == len(records)


def test_every_protein_out_of_distribution_has_only_families_that_training_lacks() -> None:
    labels = families()
    sets = {name: [record.id for record in read_fasta(f"bundled:{name}")] for name in BUNDLED}
    inside = {
        family for name in ("train", "validation", "test") for accession in sets[name] for family in labels[accession]
    }
    outside = [labels[accession] for accession in sets["ood"]]
    assert all(outside)
    assert not inside & set().union(*outside)
    assert len(set().union(*outside)) >= 30


def test_the_sample_is_attributed() -> None:
    text = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for needed in ("UniProt Consortium", "CC BY 4.0", "2014_01", "Pfam 35.0", "CC0"):
        assert needed in text
