"""Prepare the proteins that the bundled models are trained on, from Swiss-Prot with Pfam labels and 50 % identity clusters.

    python scripts/prepare_pretraining.py SOURCE -o FOLDER

SOURCE is the folder that `prepare_sample.py` takes. FOLDER gets `train.fasta.gz` and `random.fasta.gz`. Nothing in them may
help with the held-out sets that the package carries, so what goes is:

- identical sequences, proteins under 30 residues, and those with more than 1 % unknown residues, as in the sample;
- every 50 % cluster that has a member in the bundled validation, test or ood set;
- every protein with a family of the ood set, and the cluster mates of those;
- every protein that aligns with a bundled held-out protein at 50 % identity or more over 80 % of the latter.

`random.fasta.gz` is drawn from what is left: training does not see these proteins, but their relatives. That is the easy row of a
table, to be read beside the other two. Those that the sample trains on are not in it. Everything is ordered by hashes: the same
source gives the same bytes.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path

from prepare_sample import MAX_IDENTITY, read_proteins, read_table, shuffled, write_gzip

from performers.data import Record, read_fasta
from performers.data.splits import similar_pairs

NUM_RANDOM = 1_000
MAX_HITS = 4_000
HELD_OUT = ("bundled:validation", "bundled:test", "bundled:ood")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    source, output = arguments.source, arguments.output

    proteins = read_proteins(source)
    removed: Counter[str] = Counter()
    held_out = {record.id: record for record in read_fasta(list(HELD_OUT))}
    families: dict[str, set[str]] = defaultdict(set)
    for accession, family, _ in read_table(source / "swissprot-pfam.tsv.gz"):
        families[accession].add(family)
    held_out_families = {family for record in read_fasta("bundled:ood") for family in families[record.id]}
    cluster = {member: representative for representative, member in read_table(source / "swissprot-clusters50.tsv.gz")}
    touched = {cluster[accession] for accession in held_out}
    touched |= {cluster[accession] for accession in proteins if families[accession] & held_out_families}
    kept = [accession for accession in proteins if cluster[accession] not in touched]
    removed["in the cluster of a held-out protein or family"] = len(proteins) - len(kept)

    records = [Record(accession, "", proteins[accession], 0) for accession in kept]
    pairs = similar_pairs(list(held_out.values()), records, hits=MAX_HITS)
    similar = {kept[number] for _, number, identity in pairs if identity >= MAX_IDENTITY}
    removed[f"at {MAX_IDENTITY:.0%} identity or more to a held-out protein"] = len(similar)
    kept = [accession for accession in kept if accession not in similar]
    chosen = set(shuffled(kept, "random held-out protein")[:NUM_RANDOM])
    sample = {record.id for record in read_fasta("bundled:train")}

    output.mkdir(parents=True, exist_ok=True)
    for name, accessions in {"train": [a for a in kept if a not in chosen], "random": sorted(chosen - sample)}.items():
        write_gzip(output / f"{name}.fasta.gz", "".join(f">{a}\n{proteins[a]}\n" for a in accessions))
        print(f"{name}: {len(accessions):,} proteins, {sum(len(proteins[a]) for a in accessions):,} residues")
    for reason, count in removed.items():
        print(f"left out: {count:,} {reason}")


if __name__ == "__main__":
    main()
