"""From FASTA to a protein language model in minutes: what `make demo` runs.

Pretrains two small Performers on the bundled Swiss-Prot sample, one on masked and one on next residues, evaluates both on
proteins unlike those they were trained on, beside the best prediction that ignores the context, and asks the masked one for
hidden residues of a real protein. Everything is left in ./demo; run again, it goes on where it stopped.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from performers import read_fasta
from performers.training import Evaluation, evaluate, open_model

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")

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
    console.print("Pretraining two Performers, one on masked and one on next residues:")
    runs = [start(name, settings) for name, settings in RUNS.items()]
    for run in runs:
        if run.wait():
            sys.exit(run.returncode)
    console.print("\nEvaluating both on proteins that they have not seen ...")
    figures: dict[str, Evaluation] = {}
    for name in RUNS:
        model = open_model(FOLDER / name)
        for proteins in ("test", "ood"):
            figures[f"{name} {proteins}"] = evaluate(model, f"bundled:{proteins}")

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

    fill_masked_residues(console, FOLDER / "masked" / "model")
    seconds = time.monotonic() - started
    content = {name: result.to_dict() for name, result in figures.items()}
    (FOLDER / "figures.json").write_text(json.dumps({"seconds": round(seconds), **content}, indent=1) + "\n")
    console.print(f"""
Done in {seconds:.0f} s. In {FOLDER}/ you find
  masked/model, causal/model   Hugging Face folders: AutoModelForMaskedLM.from_pretrained after `import performers`
  masked/loss.png              the loss curve
  figures.json                 the figures above, with all intervals

The models are tiny and have seen a few million residues. On your own proteins, for hours instead of minutes:
  performers pretrain -i proteins.fasta.gz -o run --preset small --context 8192 --contexts concatenated
  performers evaluate --model run/model -i held-out.fasta""")
    for name in RUNS:
        if not figures[f"{name} test"].accuracy_gain_interval[0] > 0:
            sys.exit(f"The {name} model does not beat the unigram baseline.")


def start(name: str, settings: dict[str, object]) -> subprocess.Popen[str]:
    """Starts `performers pretrain` with a YAML file of these settings; what it reports appears behind the name of the run."""
    FOLDER.mkdir(parents=True, exist_ok=True)
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


def fill_masked_residues(console: Console, folder: Path) -> None:
    """Hides residues of one protein of the test set, one at a time, and shows what the model puts there."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    protein = next(record for record in read_fasta("bundled:test") if len(record.sequence) <= 300)
    fill = pipeline("fill-mask", model=str(folder), top_k=3)
    positions = range(len(protein.sequence) // 10, len(protein.sequence), len(protein.sequence) // 6)
    console.print(
        f"\nHidden residues of the Swiss-Prot entry {protein.id} ({len(protein.sequence)} residues), one at a time:\n"
    )
    table = Table("position", "residue", "the model's guesses", box=None)
    for position in positions:
        guesses = fill(protein.sequence[:position] + "<mask>" + protein.sequence[position + 1 :])
        table.add_row(
            str(position + 1),
            protein.sequence[position],
            "  ".join(f"{guess['token_str']} {guess['score']:.0%}" for guess in guesses),
        )
    console.print(table)


if __name__ == "__main__":
    main()
