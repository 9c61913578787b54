"""A protein language model at work, and then in the making: what `make demo` runs.

The model that comes with the package says, in seconds, which positions of a protein it would not touch, and looks for
relatives among proteins of families that it has never seen, beside what composition alone finds. Then two small Performers
are trained on the bundled Swiss-Prot sample, one on masked and one on next residues, and compared with the best prediction
that ignores the context, on proteins unlike those they were trained on. Everything is left in ./demo; run again, it goes on
where it stopped.
"""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from statistics import mean

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from performers import read_fasta
from performers.data import STANDARD_RESIDUES, Record
from performers.tools import LanguageModel, embed, score
from performers.training import Evaluation, evaluate, open_model

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"

# Chosen by measurement so that two cores need a few minutes: a tiny model and small steps learn the most in that time, and
# two runs of one thread each are quicker than one run after the other.
COMMON = {
    "input": "bundled:train",
    "validation": "bundled:validation",
    "ood": "bundled:ood",
    "preset": "tiny",
    "architecture": {"num_hidden_layers": 2},
    "kernel": "relu",
    "num_features": 64,
    "context": 512,
    "batch_size": 2,
    "weight_decay": 0.01,
    "clip": 1.0,
    "evaluate_every": 500,
    "evaluate_proteins": 100,
    "checkpoint_every": 500,
    "threads": 1,
}
RUNS = {
    "masked": {"objective": "mlm", "mask_proportion": 0.3, "learning_rate": 2e-3, "steps": 2500},
    "causal": {"objective": "clm", "learning_rate": 3e-3, "steps": 1500},
}


def main() -> None:
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    started = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = LanguageModel.open()
    console.print(f"1. The model that comes with the package: {model.name}, {model.num_parameters:,} parameters\n")
    show_tolerance(console, model)
    neighbours = show_neighbours(console, model)
    console.print(
        f"""
That took {time.monotonic() - started:.0f} s. The same on proteins of your own:
  performers score --wild-type protein.fasta --saturate -o scores.csv     every substitution, and a heat map
  performers embed -i proteins.fasta -o embeddings.npz                    a vector for each protein

2. Training: two tiny Performers from nothing, one on masked and one on next residues
"""
    )
    runs = [start(name, settings) for name, settings in RUNS.items()]
    for run in runs:
        if run.wait():
            sys.exit(run.returncode)
    console.print("\nReading proteins that they have not seen ...")
    figures: dict[str, Evaluation] = {}
    for name in RUNS:
        trained = open_model(FOLDER / name)
        for proteins in ("test", "ood"):
            figures[f"{name} {proteins}"] = evaluate(trained, f"bundled:{proteins}")

    table = Table("model", "proteins", "accuracy", "unigram", "gain (95 % interval)", "perplexity", "unigram", box=None)
    for name, result in figures.items():
        low, high = result.accuracy_gain_interval
        table.add_row(
            *name.split(),
            f"{result.accuracy:.2%}",
            f"{result.baseline_accuracy:.2%}",
            f"{result.accuracy_gain:+.2%} ({low:+.2%} to {high:+.2%})",
            f"{result.perplexity:.2f}",
            f"{result.baseline_perplexity:.2f}",
        )
    console.print("\nTest proteins share no cluster (50 % identity), ood proteins no family with the training set:\n")
    console.print(table)

    seconds = time.monotonic() - started
    content = {name: result.to_dict() for name, result in figures.items()}
    (FOLDER / "figures.json").write_text(
        json.dumps({"seconds": round(seconds), "neighbours": neighbours, **content}, indent=1) + "\n"
    )
    console.print(f"""
Done in {seconds:.0f} s. In {FOLDER}/ you find
  masked/model, causal/model   Hugging Face folders: AutoModelForMaskedLM.from_pretrained after `import performers`
  masked/loss.png              the loss curve
  figures.json                 the figures above, with all intervals

These two are tiny and have seen a few million residues; the bundled model is bigger and has seen more:
  performers models list                                                  what comes with the package, and how good it is
  performers evaluate                                                     the same figures of the bundled model
  performers pretrain -i proteins.fasta.gz -o run --preset small          on your own proteins, for hours instead of minutes""")
    for name in RUNS:
        if not figures[f"{name} test"].accuracy_gain_interval[0] > 0:
            sys.exit(f"The {name} model does not beat the unigram baseline.")


def start(name: str, settings: dict[str, object]) -> subprocess.Popen[str]:
    """Starts `performers pretrain` with a YAML file of these settings; what it reports appears behind the name of the run."""
    config = FOLDER / f"{name}.yaml"
    config.write_text(yaml.safe_dump({**COMMON, **settings, "output": str(FOLDER / name)}, sort_keys=False))
    run = subprocess.Popen(
        [sys.executable, "-m", "performers", "pretrain", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def forward() -> None:
        assert run.stderr is not None
        for line in run.stderr:
            print(f"  {name}: {line}", end="", flush=True)

    threading.Thread(target=forward, daemon=True).start()
    return run


def show_tolerance(console: Console, model: LanguageModel) -> None:
    """Hides every residue of ubiquitin in turn, and shows where the model finds a substitution least and most likely."""
    by_position: dict[int, dict[str, float]] = defaultdict(dict)
    unsure: set[int] = set()
    for variant in score(UBIQUITIN, model=model):
        if variant.status == "ok" and variant.score is not None:
            position = int(variant.mutant[1:-1])
            by_position[position][variant.mutant[-1]] = variant.score
            if variant.low_confidence:
                unsure.add(position)
    ranked = sorted(by_position, key=lambda position: mean(by_position[position].values()))
    console.print(
        "Human ubiquitin (76 residues), each residue hidden in turn. A score is how much more (or less) likely than the\n"
        "natural residue the model finds another one there, in nats; the mean is over all 19 substitutions.\n"
    )
    table = Table("position", "mean score", "best substitution", "", box=None)
    for position in (*ranked[:5], *ranked[-5:]):
        scores = by_position[position]
        best = max(scores, key=scores.__getitem__)
        table.add_row(
            f"{UBIQUITIN[position - 1]}{position}",
            f"{mean(scores.values()):+.2f}",
            f"{best} {scores[best]:+.2f}",
            {ranked[0]: "least tolerant", ranked[-5]: "most tolerant"}.get(position, ""),
        )
    console.print(table)
    if unsure:
        console.print(
            f"\nAt {len(unsure)} of {len(by_position)} positions the model says little more than the frequencies of residues "
            "at large."
        )


def show_neighbours(console: Console, model: LanguageModel) -> dict[str, float]:
    """Looks for the nearest neighbour of proteins of families that the model has not seen, by its vectors and by composition."""
    families = held_out_families()
    proteins = [record for records in families.values() for record in records]
    family = [name for name, records in families.items() for _ in records]
    vectors = np.stack([np.asarray(embedding.mean) for embedding in embed(proteins, model)])
    counts = [[record.sequence.count(letter) for letter in STANDARD_RESIDUES] for record in proteins]
    composition = np.array(counts) / np.array([[len(record.sequence)] for record in proteins])
    by_vector, by_composition = ([family[i] for i in nearest(rows)] for rows in (vectors, composition))
    console.print(
        f"\n{len(proteins)} proteins of {len(families)} Pfam families that were held out of training, from different clusters\n"
        "(50 % identity). Of how many is the nearest neighbour of the same family?\n"
    )
    table = Table("family", "proteins", "by the model's vectors", "by amino acid composition", box=None)
    found = {"vectors": 0, "composition": 0}
    for name, records in families.items():
        mine = [i for i, other in enumerate(family) if other == name]
        right = [sum(names[i] == name for i in mine) for names in (by_vector, by_composition)]
        found["vectors"] += right[0]
        found["composition"] += right[1]
        table.add_row(name, str(len(records)), *map(str, right))
    table.add_row("all", str(len(proteins)), *map(str, found.values()))
    console.print(table)
    return {name: count / len(proteins) for name, count in found.items()}


def held_out_families() -> dict[str, list[Record]]:
    """Six of the held-out Pfam families, five short proteins of each."""
    label: dict[str, str] = {}
    with (
        files("performers.data").joinpath("sample/families.tsv.gz").open("rb") as packed,
        gzip.open(packed, "rt") as lines,
    ):
        next(lines)
        for line in lines:
            accession, _, name = line.rstrip("\n").split("\t")
            label[accession] = name
    families: dict[str, list[Record]] = defaultdict(list)
    for record in read_fasta("bundled:ood"):
        if len(record.sequence) <= 300:
            families[label[record.id]].append(record)
    largest = sorted(families, key=lambda name: (-len(families[name]), name))[:6]
    return {name: families[name][:5] for name in largest}


def nearest(rows: np.ndarray) -> np.ndarray:
    """For each row the row that is most like it: by the cosine, after the mean of all has been taken away."""
    centred = rows - rows.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    similarity = centred @ centred.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(axis=1)


if __name__ == "__main__":
    main()
