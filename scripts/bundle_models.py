"""Put a finished training run into the package as a bundled model, with a card made from what was recorded of it.

    python scripts/bundle_models.py RUN NAME [--before RUN] [--evaluation FILE]
        [--exact FILE [--exact-run RUN] [--exact-but TEXT]] [--hardware TEXT]

RUN is a folder of `performers pretrain`, NAME the last part of the model's name (protein-masked). A run that began with the
weights of another (init_from) needs that one too: `--before`, the earliest first. `src/performers/weights/NAME` gets

- model.safetensors: every weight rounded to bfloat16, random projections in float32, since rounded ones are not orthogonal;
- config.json and the tokenizer: the model opens in float32, with the numbers that the file holds;
- config.yaml (config-part-1.yaml, ... of runs before), curve.png: the run's settings and its log;
- evaluation.json: the figures of the *rounded* weights on the held-out sets that the package carries;
- with `--also FILE` what `performers contacts` and `performers benchmark design` measured of these weights;
- README.md: the model card; manifest.json: the SHA-256 of everything.

Figures are measured here (some minutes on a CPU), unless the folder has those of the very same weights already, or FILE holds
what `performers evaluate --model performers/NAME --json` printed elsewhere. `--exact` takes what the same command printed for a
Transformer of the same size with exact attention, trained alike. `--exact-run` are the runs that made it, the earliest first:
their settings have to be those of this model's, and the card states the time of both. What else differs, `--exact-but` says.
Figures of other weights, masks or proteins are refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from model_card import Part, Records, model_card

from performers import PerformerTokenizer
from performers.errors import PerformersError
from performers.folders import sealed_folder, sha256_of
from performers.models.bundled import CARD, EVALUATION, SETTINGS, WEIGHTS
from performers.training.checkpoint import find_model, open_model, without_bars
from performers.training.configuration import read_config
from performers.training.evaluation import evaluate_folder, held_out_sets
from performers.training.plots import plot_loss
from performers.training.run_folder import GENERATOR, read_log

MAX_BYTES = 80_000_000  # of all bundled weights together
PATHS = ("input", "validation", "ood")
ALIKE = (
    *("objective", "scheme", "mask_proportion", "context", "steps", "batch_size", "optimizer", "learning_rate"),
    *("final_learning_rate", "warmup_steps", "weight_decay", "clip", "dtype", "seed"),
)
"""The settings that the exact Transformer's training has to share."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument(
        "--before", type=Path, action="append", default=[], help="a run whose weights the next began with"
    )
    parser.add_argument("--evaluation", type=Path, help="figures that were measured elsewhere")
    parser.add_argument("--exact", type=Path, help="figures of the same model with exact attention, trained alike")
    parser.add_argument("--exact-run", type=Path, action="append", default=[], help="a run of its training")
    parser.add_argument("--exact-but", help="how else its training differs, in sentences")
    parser.add_argument("--hardware", help="what they were trained on, for people; by default the device of the record")
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        help="a file that was measured of these weights and belongs beside them: contact-regression.json, partner-effect.json",
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    try:
        bundle(arguments.run, arguments.output / arguments.name, arguments)
    except PerformersError as error:
        sys.exit(f"bundle_models.py: {error}")


def bundle(run: Path, target: Path, arguments: argparse.Namespace) -> None:
    """Writes the folder, whole or not at all."""
    parts = read_parts([*arguments.before, run])
    with sealed_folder(target, replace=True) as folder:
        write_model(run, folder)
        num_bytes = (folder / "model.safetensors").stat().st_size
        others = [path for path in target.parent.rglob("*.safetensors") if not {target, folder} & {*path.parents}]
        total = num_bytes + sum(path.stat().st_size for path in others)
        if total > MAX_BYTES:
            sys.exit(f"The bundled weights would take {total:,} bytes: expected at most {MAX_BYTES:,}.")
        evaluation = read_evaluation(folder, target, arguments.evaluation)
        evaluation |= {"model": f"performers/{target.name}"}
        if arguments.exact is not None:
            exact = read_exact(arguments.exact, evaluation)
            seconds = training_time(exact, arguments.exact_run, parts) if arguments.exact_run else None
            kept = {key: exact[key] for key in ("sets", "parameters", "attention", "device", "dtype", "version")}
            evaluation["exact"] = {**kept, "seconds": seconds, "but": arguments.exact_but}
        write_json(folder / EVALUATION, evaluation)
        for number, part in enumerate(parts, start=1):
            name = SETTINGS if number == len(parts) else f"config-part-{number}.yaml"
            (folder / name).write_text(yaml.safe_dump(part.settings, sort_keys=False), encoding="utf-8")
        records = Records(
            name=f"performers/{target.name}",
            parts=parts,
            architecture=json.loads((folder / "config.json").read_text(encoding="utf-8")),
            evaluation=evaluation,
            corpus=read_corpus(run),
            num_bytes=num_bytes,
            hardware=arguments.hardware,
        )
        draw_curve(records.log, folder / "curve.png", f"{records.name}: training")
        (folder / CARD).write_text(model_card(records), encoding="utf-8")
        for file in arguments.also:
            shutil.copyfile(file, folder / file.name)
        for file in folder.iterdir():
            file.chmod(0o644)  # Hugging Face keeps weights to their owner
    print(f"{target}: {num_bytes:,} bytes of weights; all bundled weights {total:,} of {MAX_BYTES:,} bytes.")
    for name, figures in evaluation["sets"].items():
        print(f"  {name}: accuracy {figures['accuracy']:.4f} (unigram {figures['baseline_accuracy']:.4f})")


def write_model(run: Path, folder: Path) -> None:
    """The run's model with rounded weights, and its tokenizer."""
    model = open_model(run)
    rounded: dict[int, torch.Tensor] = {}  # by address, so that what is tied stays tied
    state = {
        name: tensor if ".mechanism." in name else rounded.setdefault(tensor.data_ptr(), tensor.bfloat16())
        for name, tensor in model.state_dict().items()
    }
    with without_bars():
        model.save_pretrained(folder, state_dict=state)
        PerformerTokenizer(add_eos=not model.is_causal).save_pretrained(folder)


def read_parts(runs: list[Path]) -> list[Part]:
    """The runs of a training, each as far as its weights went into the model."""
    models = [find_model(run) for run in runs]
    began = [read_config(run / "config.yaml")["init_from"] for run in runs]
    if began[0] is not None:
        sys.exit(f"{runs[0]} began with the weights of another run, {began[0]}: give that one with --before.")
    for number, (run, start) in enumerate(zip(runs[1:], began[1:], strict=True)):
        before = runs[number] / "checkpoints" / Path(start or "").name
        models[number] = before if start and before.is_dir() else models[number]
        inputs = json.loads((run / "run.json").read_text(encoding="utf-8"))["inputs"]
        if sha256_of(models[number] / "model.safetensors") not in [file["sha256"] for file in inputs]:
            sys.exit(f"{run} did not begin with the weights in {models[number]}.")
    return [read_part(run, model) for run, model in zip(runs, models, strict=True)]


def read_part(run: Path, model: Path) -> Part:
    """What a run recorded until it had the weights in `model`."""
    log = read_log(run)
    if (model / GENERATOR).is_file():  # a checkpoint; otherwise the model at the end
        last = json.loads((model / GENERATOR).read_text(encoding="utf-8"))["step"]
        log = [line for line in log if line["step"] <= last]
    steps = [line for line in log if "learning_rate" in line]
    if not steps:
        sys.exit(f"{run / 'log.jsonl'}: expected the steps of the run.")
    settings = read_config(run / "config.yaml")
    short = {key: [in_short(path) for path in settings[key]] for key in PATHS}
    start = settings["init_from"] and in_short(settings["init_from"])
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    settings = {**settings, **short, "output": run.name, "init_from": start}
    return Part(settings, record, steps[-1]["step"], steps[-1]["tokens"], log)


def read_evaluation(folder: Path, target: Path, given: Path | None) -> dict[str, Any]:
    """The figures of the weights in `folder`: those given, those there are already, or measured now."""
    digest = sha256_of(folder / "model.safetensors")
    if given is not None:
        evaluation = json.loads(given.read_text(encoding="utf-8"))
        if [file["sha256"] for file in evaluation["weights"]] != [digest]:
            sys.exit(f"{given} holds the figures of other weights: run `performers evaluate` on the bundled model.")
    else:
        known = target / EVALUATION
        evaluation = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else None
        if evaluation is None or evaluation["weights"][0]["sha256"] != digest:
            print("Measuring accuracy on the held-out sets ...", file=sys.stderr)
            evaluation = evaluate_folder(folder, held_out_sets())
    sets = evaluation.get("sets", {})
    if sets.keys() != {"random", "test", "ood"}:
        sys.exit(f"Figures of {', '.join(sets) or 'no set'}: expected those of random, test and ood.")
    if any(figures["scheme"] not in (None, "mask") for figures in sets.values()):
        sys.exit("Figures of another masking scheme: expected those of --scheme mask.")
    weights = [{**file, "name": Path(file["name"]).name} for file in evaluation["weights"]]
    return {**evaluation, "weights": weights}


def read_exact(file: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures of the exact Transformer, which have to be of the same residues and a model of the same size."""
    exact = json.loads(file.read_text(encoding="utf-8"))
    if exact["attention"] != ["exact"]:
        sys.exit(f"{file}: a model with {', '.join(exact['attention'])} attention; expected exact attention.")
    if abs(exact["parameters"] / evaluation["parameters"] - 1) > 0.05:
        sys.exit(f"{file}: {exact['parameters']:,} parameters; expected about {evaluation['parameters']:,}.")
    for name, figures in evaluation["sets"].items():
        other = exact["sets"][name]
        if any(other[key] != figures[key] for key in ("tokens", "baseline_perplexity", "objective", "scheme", "seed")):
            sys.exit(f"{file}: its {name} figures are of other residues.")
    return exact


def training_time(exact: dict[str, Any], runs: list[Path], parts: list[Part]) -> float:
    """The seconds that these runs took, which have to have made the exact Transformer with the settings of `parts`."""
    digest = sha256_of(find_model(runs[-1]) / "model.safetensors")
    if [file["sha256"] for file in exact["weights"]] != [digest]:
        sys.exit(f"{runs[-1]} did not make the exact Transformer that was evaluated.")
    others = read_parts(runs)
    for key in ALIKE:
        values, expected = ([part.settings[key] for part in found] for found in (others, parts))
        if values != expected:
            sys.exit(f"The exact Transformer was trained with {key} {values}; expected {expected}.")
    if (read := sum(part.tokens for part in others)) != (expected := sum(part.tokens for part in parts)):
        sys.exit(f"The exact Transformer read {read:,} tokens; expected {expected:,}.")
    return round(sum(part.seconds for part in others), 3)


def draw_curve(log: list[dict[str, Any]], picture: Path, title: str) -> None:
    """The loss against the step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "log.jsonl"
        file.write_text("".join(f"{json.dumps(entry)}\n" for entry in log), encoding="utf-8")
        plot_loss(file, picture, title)


def read_corpus(run: Path) -> dict[str, Any]:
    """What the training corpus says of itself."""
    for folder in (run / "corpus", Path(read_config(run / "config.yaml")["input"][0])):
        if (folder / "corpus.json").is_file():
            return json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    sys.exit(f"{run / 'corpus' / 'corpus.json'} is missing: expected the corpus of the run.")


def in_short(path: str) -> str:
    """A file's name without the folders of the machine that it was on."""
    return path if path.startswith("bundled:") else Path(path).name


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
