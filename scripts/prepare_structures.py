"""Prepare the protein structures that the package carries, to fit and to judge predictions of contacts.

    python scripts/prepare_structures.py SOURCE [-o src/performers/data/structures]

SOURCE is a folder with `structures/pdb1000.npz`: 1,000 chains of the PDB, with `seq` (ASCII), `cb` (C-beta coordinates, int16,
0.01 angstrom, C-alpha for glycine), `ids` and `offsets`. Out come `chains.npz` with the same arrays for a few of them and
`is_training`, and ATTRIBUTION.md:

- 20 chains to fit a regression on, of 64 to 200 residues;
- as many chains to judge it on, of up to 288 residues, as fit into the file.

No two chains share a cluster at 25 % identity, and no chain of one set has a hit of MMseqs2 among those of the other, at any
identity. That needs MMseqs2 (`pip install 'performers[cluster]'`). Everything is ordered by hashes: the same source gives the
same bytes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
from prepare_sample import shuffled

from performers.data import Record, in_memory_corpus
from performers.data.splits import cluster_sequences, similar_pairs

NUM_TRAINING, LONGEST_TRAINING = 20, 200
NUM_TEST, LONGEST_TEST = 120, 288
IDENTITY = 0.25

ATTRIBUTION = """\
# The bundled protein structures

`chains.npz` holds {training} chains to fit predictions of contacts on and {test} chains to judge them on, {residues:,} residues:
the sequence and the place of each residue's C-beta atom (C-alpha for glycine).

The coordinates are of the Protein Data Bank, whose entries are in the public domain (CC0 1.0,
https://creativecommons.org/publicdomain/zero/1.0/). The selection of chains that they were taken from is "pdb1000", under the
Apache License 2.0. Changes: fewer chains, and C-beta atoms alone.

> wwPDB consortium. Protein Data Bank: the single global archive for 3D macromolecular structure data. Nucleic Acids Research 47,
> D520-D528 (2019).

Prepared by `scripts/prepare_structures.py`: no two chains share a cluster of MMseqs2 at {identity:.0%} identity, and no chain to
judge on is similar, at any identity, to one to fit on. The identifiers are those of the source: PDB entry, chain, number.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("src/performers/data/structures"))
    arguments = parser.parse_args()

    with np.load(arguments.source / "structures" / "pdb1000.npz", allow_pickle=False) as source:
        ids, offsets, letters, places = source["ids"], source["offsets"], source["seq"], source["cb"]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(offsets)]
    records = [
        Record(str(name), "", letters[span].tobytes().decode("ascii"), number)
        for number, (name, span) in enumerate(zip(ids, spans, strict=True), start=1)
    ]
    clusters = cluster_sequences(in_memory_corpus(records), identity=IDENTITY)
    order = [records[int(name)] for name in shuffled(map(str, range(len(records))), "structures")]
    taken: set[int] = set()

    def choose(candidates: list[Record], number: int, longest: int) -> list[Record]:
        chosen: list[Record] = []
        for record in candidates:
            cluster = int(clusters[record.number - 1])
            if len(chosen) < number and len(record.sequence) <= longest and cluster not in taken:
                taken.add(cluster)
                chosen.append(record)
        return chosen

    training = choose(order, NUM_TRAINING, LONGEST_TRAINING)
    similar = {first for first, _, _ in similar_pairs(order, training)}
    similar |= {second for _, second, _ in similar_pairs(training, order, hits=len(order))}
    test = choose([record for place, record in enumerate(order) if place not in similar], NUM_TEST, LONGEST_TEST)

    chosen = [*training, *test]
    arrays = {
        "seq": np.concatenate([letters[spans[record.number - 1]] for record in chosen]),
        "cb": np.concatenate([places[spans[record.number - 1]] for record in chosen]),
        "ids": np.array([record.id for record in chosen]),
        "offsets": np.cumsum([0, *(len(record.sequence) for record in chosen)]),
        "is_training": np.arange(len(chosen)) < len(training),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_npz(arguments.output / "chains.npz", arrays)
    text = ATTRIBUTION.format(
        training=len(training), test=len(test), residues=int(arrays["offsets"][-1]), identity=IDENTITY
    )
    (arguments.output / "ATTRIBUTION.md").write_text(text, encoding="utf-8")
    size = (arguments.output / "chains.npz").stat().st_size
    print(f"{len(training)} chains to fit on, {len(test)} to judge on, {size:,} bytes")


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # No time in the archive: the bytes depend on the content alone.
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.save(stream, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), stream.getvalue(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
