"""Prepare the protein sample that the package carries, from Swiss-Prot with Pfam labels and 50 % identity clusters.

    python scripts/prepare_sample.py SOURCE [-o src/performers/data/sample]

SOURCE is a folder with `swissprot-*.fasta.gz` (header = accession), `swissprot-pfam.tsv.gz` (accession, pfam, name) and
`swissprot-clusters50.tsv.gz` (representative, member). About 20,000 proteins come out, in four sets:

- train: whole 50 % clusters, at most four members of each;
- validation, test: one protein per cluster, from clusters that have no member in training;
- ood (out of distribution): proteins all of whose Pfam families were held out. No protein with a held-out family, and no
  cluster mate of one, is in any other set.

Identical sequences, proteins under 30 residues and proteins with more than 1 % unknown residues are dropped first. Held-out
proteins that still align with a training protein at 50 % identity or more over 80 % of their length are dropped as well:
linear-time clustering misses one in ten. That search needs MMseqs2 (`pip install 'performers[cluster]'`). Everything is ordered
by hashes, so the same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from performers.data import Record, read_fasta
from performers.data.splits import nearest_identities
from performers.randomness import derive_seed

NUM_TRAIN, NUM_VALIDATION, NUM_TEST, NUM_OOD = 17_000, 1_000, 1_000, 1_000
MEMBERS_PER_TRAIN_CLUSTER = 4
OOD_PER_FAMILY = 25
OOD_FAMILY_CLUSTERS = range(8, 121)
MAX_IDENTITY = 0.5

ATTRIBUTION = """\
# The bundled protein sample

The sequences are a selection of UniProtKB/Swiss-Prot, release 2014_01, (c) the UniProt Consortium, under the Creative Commons
Attribution 4.0 International licence (CC BY 4.0, https://creativecommons.org/licenses/by/4.0/). Changes: a selection was made,
identical sequences were removed and headers were cut to the accession.

> The UniProt Consortium. UniProt: the Universal Protein Knowledgebase in 2025. Nucleic Acids Research 53, D609-D617 (2025).

The family labels are domains of Pfam 35.0 (CC0 1.0) found with HMMER at the gathering thresholds. A protein without a label is
unannotated, not free of families.

> Mistry J. et al. Pfam: the protein families database in 2021. Nucleic Acids Research 49, D412-D419 (2021).

| file | proteins | residues | what |
|---|---|---|---|
{rows}
| `random.fasta.gz` | 946 | 365,844 | drawn at random from what the bundled models were trained on, and left out of it |
| `families.tsv.gz` | {labelled:,} | | accession, Pfam family, name; one row per protein and family |

Prepared by `scripts/prepare_sample.py`: identical sequences were removed first, clusters are those of MMseqs2 at 50 % identity,
and no protein of the validation, test and ood sets aligns with one of the sample's training set at 50 % identity or more over
80 % of its length.
`random.fasta.gz` comes from `scripts/prepare_pretraining.py`; its proteins have relatives in training, and are in no other set.
"""

DESCRIPTIONS = {
    "train": "whole clusters, at most four members of each",
    "validation": "one protein per cluster; none of these clusters is in training",
    "test": "one protein per cluster; none of these clusters is in training",
    "ood": "proteins of {families} held-out Pfam families; neither they nor their cluster mates are in training",
}


def read_table(path: Path) -> Iterator[list[str]]:
    with gzip.open(path, "rt", encoding="ascii") as lines:
        next(lines)
        for line in lines:
            yield line.rstrip("\n").split("\t")


def write_gzip(path: Path, text: str) -> None:
    # Neither a file name nor a time in the gzip header: the bytes depend on the content alone.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as packed:
        packed.write(text.encode("ascii"))


def shuffled(names: Iterable[str], purpose: str) -> list[str]:
    return sorted(names, key=lambda name: (derive_seed(0, purpose, name), name))


def read_proteins(source: Path) -> dict[str, str]:
    """Accession to sequence, without duplicates, very short and X-rich proteins."""
    proteins: dict[str, str] = {}
    seen: set[str] = set()
    records = sorted(read_fasta(sorted(source.glob("swissprot-*.fasta.gz"))), key=lambda record: record.id)
    for record in records:
        sequence = record.sequence
        if sequence in seen or len(sequence) < 30 or sequence.count("X") > 0.01 * len(sequence):
            continue
        seen.add(sequence)
        proteins[record.id] = sequence
    return proteins


def choose(
    proteins: dict[str, str], families: dict[str, set[str]], cluster: dict[str, str]
) -> tuple[dict[str, list[str]], list[str]]:
    """The accessions of each set, with spare proteins at the end of the held-out sets, and the held-out families."""
    clusters: dict[str, list[str]] = defaultdict(list)
    for accession in proteins:
        clusters[cluster[accession]].append(accession)
    clusters_of_family: dict[str, set[str]] = defaultdict(set)
    for accession, names in families.items():
        for family in names:
            clusters_of_family[family].add(cluster[accession])

    held_out: list[str] = []
    candidates: list[str] = []
    for family in shuffled(clusters_of_family, "held-out family"):
        if len(clusters_of_family[family]) not in OOD_FAMILY_CLUSTERS:
            continue
        held_out.append(family)
        candidates = out_of_distribution(set(held_out), clusters, families)
        if len(candidates) >= NUM_OOD * 1.1:
            break

    touched = {cluster[accession] for accession, names in families.items() if not names.isdisjoint(held_out)}
    free = [name for name in shuffled(clusters, "cluster") if name not in touched]
    spare = NUM_TEST // 5
    num_held_out = NUM_VALIDATION + NUM_TEST + 2 * spare
    ones = [shuffled(clusters[name], "member")[0] for name in free[:num_held_out]]
    train: list[str] = []
    for name in free[num_held_out:]:
        train += shuffled(clusters[name], "member")[:MEMBERS_PER_TRAIN_CLUSTER]
        if len(train) >= NUM_TRAIN:
            break
    sets = {
        "train": train[:NUM_TRAIN],
        "validation": ones[: NUM_VALIDATION + spare],
        "test": ones[NUM_VALIDATION + spare :],
        "ood": candidates,
    }
    return sets, held_out


def out_of_distribution(held_out: set[str], clusters: dict[str, list[str]], families: dict[str, set[str]]) -> list[str]:
    """One protein per cluster, only proteins all of whose families are held out, a bounded number of each family."""
    count: dict[str, int] = defaultdict(int)
    chosen: list[str] = []
    for name in shuffled(clusters, "held-out protein"):
        for accession in shuffled(clusters[name], "member"):
            names = families.get(accession, set())
            if names and names <= held_out and all(count[family] < OOD_PER_FAMILY for family in names):
                for family in names:
                    count[family] += 1
                chosen.append(accession)
                break
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("src/performers/data/sample"))
    arguments = parser.parse_args()
    source, output = arguments.source, arguments.output

    proteins = read_proteins(source)
    rows = [row for row in read_table(source / "swissprot-pfam.tsv.gz") if row[0] in proteins]
    families: dict[str, set[str]] = defaultdict(set)
    for accession, family, _ in rows:
        families[accession].add(family)
    cluster = {member: representative for representative, member in read_table(source / "swissprot-clusters50.tsv.gz")}
    sets, held_out = choose(proteins, families, cluster)

    training = [Record(accession, "", proteins[accession], 0) for accession in sets["train"]]
    for name, size in {"validation": NUM_VALIDATION, "test": NUM_TEST, "ood": NUM_OOD}.items():
        queries = [Record(accession, "", proteins[accession], 0) for accession in sets[name]]
        nearest = nearest_identities(queries, training)
        distinct = [hit.id for hit in nearest if hit.identity < MAX_IDENTITY]
        print(
            f"{name}: {len(queries) - len(distinct)} of {len(queries)} have a training protein at {MAX_IDENTITY:.0%} identity"
        )
        sets[name] = distinct[:size]

    output.mkdir(parents=True, exist_ok=True)
    table: list[str] = []
    for name, accessions in sets.items():
        accessions.sort()
        write_gzip(output / f"{name}.fasta.gz", "".join(f">{a}\n{proteins[a]}\n" for a in accessions))
        residues = sum(len(proteins[a]) for a in accessions)
        what = DESCRIPTIONS[name].format(families=len(held_out))
        table.append(f"| `{name}.fasta.gz` | {len(accessions):,} | {residues:,} | {what} |")
    chosen = {accession for accessions in sets.values() for accession in accessions}
    labels = sorted(tuple(row) for row in rows if row[0] in chosen)
    text = "accession\tfamily\tname\n" + "".join("\t".join(row) + "\n" for row in labels)
    write_gzip(output / "families.tsv.gz", text)
    labelled = len({row[0] for row in labels})
    (output / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(rows="\n".join(table), labelled=labelled))
    for path in sorted(output.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
