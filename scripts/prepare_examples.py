"""Prepare the measurements and interactions that the notebooks in examples/ read, from published sets.

    python scripts/prepare_examples.py SOURCE [-o examples/data]

SOURCE holds `variants/` (a deep mutational scan of TEM-1 beta-lactamase from ProteinGym, one of green fluorescent protein, and
the sequences on which their numbering holds) and `interactions/` (D-SCRIPT's yeast pairs). Small selections come out, ordered by
hashes, so the same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

from prepare_sample import read_table, shuffled, write_gzip

from performers.data import read_fasta

NUM_SINGLES, NUM_FLUORESCENT, NUM_PAIRS, LONGEST = 600, 200, 60, 400

ATTRIBUTION = """\
# Data of the notebooks

- `beta-lactamase.fasta`: TEM-1 beta-lactamase, P62593 (UniProt, (c) the UniProt Consortium, CC BY 4.0).
- `beta-lactamase.csv`: {singles} single substitutions and their fitness under ampicillin (Stiffler et al., 2015; as distributed
  by ProteinGym, MIT).
- `fluorescence.csv`: {fluorescent} variants of green fluorescent protein with up to three mutations, and log10 of brightness
  (Sarkisyan et al., 2016; from a collection under MIT).
- `yeast.fasta.gz` and `yeast-pairs.tsv`: {proteins} yeast proteins, {pairs} pairs that interact, as many that are not known to
  (Sledzieski et al., 2021, D-SCRIPT, MIT; from STRING, CC BY 4.0).

Prepared by `scripts/prepare_examples.py`. The pairs that do not interact were drawn at random from the same proteins: a model
that knows how often a protein interacts does well on them without knowing with whom.
"""


def substituted(wild_type: str, variant: str, first: int) -> str:
    """The sequence with the mutations of "A1P,D2N", positions counted from `first`."""
    letters = list(wild_type)
    for mutation in variant.split(","):
        place = int(mutation[1:-1]) - first
        if letters[place] != mutation[0]:
            raise ValueError(f"{mutation}: the wild type has {letters[place]} there")
        letters[place] = mutation[-1]
    return "".join(letters)


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", encoding="ascii", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("examples/data"))
    arguments = parser.parse_args()
    source, output = arguments.source, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    wild_types = {record.id: record.sequence for record in read_fasta(source / "variants" / "wild-types.fasta")}

    lactamase = wild_types["BLAT_ECOLX_Stiffler_2015"]
    (output / "beta-lactamase.fasta").write_text(f">P62593 TEM-1 beta-lactamase\n{lactamase}\n")
    with (source / "variants" / "BLAT_ECOLX_Stiffler_2015.csv").open(encoding="ascii") as stream:
        measured = {row["mutant"]: row["DMS_score"] for row in csv.DictReader(stream)}
    singles = sorted(shuffled(measured, "single")[:NUM_SINGLES], key=lambda name: (int(name[1:-1]), name))
    write_csv(output / "beta-lactamase.csv", ["mutant", "fitness"], [[name, measured[name]] for name in singles])

    brightness = {
        variant: (count, score)
        for variant, count, score, _ in read_table(source / "variants" / "avgfp.tsv.gz")
        if int(count) <= 3 and "*" not in variant
    }
    chosen = sorted(shuffled(brightness, "fluorescent")[:NUM_FLUORESCENT])
    rows: list[list[object]] = [
        [
            name.replace(",", ":"),
            substituted(wild_types["avgfp"], name, 0),
            brightness[name][0],
            f"{float(brightness[name][1]):.4f}",
        ]
        for name in chosen
    ]
    write_csv(output / "fluorescence.csv", ["id", "sequence", "mutations", "brightness"], rows)

    yeast = {
        record.id: record.sequence for record in read_fasta(source / "interactions" / "dscript_yeast_test.fasta.gz")
    }
    with gzip.open(source / "interactions" / "dscript_yeast_test.pairs.tsv.gz", "rt", encoding="ascii") as lines:
        pairs = [tuple(line.split()) for line in lines]
    short = [pair for pair in pairs if max(len(yeast.get(name, "X" * LONGEST)) for name in pair[:2]) < LONGEST]
    names = {f"{a} {b}": (a, b, label) for a, b, label in short}
    positive = [names[key] for key in shuffled(names, "pair") if names[key][2] == "1"][:NUM_PAIRS]
    known = {name for a, b, _ in positive for name in (a, b)}
    negative = [names[key] for key in shuffled(names, "pair") if names[key][2] == "0" and {*names[key][:2]} & known][
        :NUM_PAIRS
    ]
    kept = sorted(positive + negative)
    (output / "yeast-pairs.tsv").write_text("a\tb\tlabel\n" + "".join("\t".join(pair) + "\n" for pair in kept))
    proteins = sorted({name for a, b, _ in kept for name in (a, b)})
    write_gzip(output / "yeast.fasta.gz", "".join(f">{name}\n{yeast[name]}\n" for name in proteins))

    counts = {"singles": len(singles), "fluorescent": len(chosen), "proteins": len(proteins), "pairs": len(positive)}
    (output / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(**counts))
    for path in sorted(output.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
