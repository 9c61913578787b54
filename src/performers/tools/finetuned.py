"""What a finetuning says at its end: the model on proteins that it never saw, beside what it had to beat.

A finished run comes in; the model moves up into the output folder, and beside it come the figures, the predictions for the test
proteins, a picture, a README and the record of the run.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from performers import __version__
from performers.data import IGNORED
from performers.errors import RunError
from performers.folders import write_file
from performers.tools.assessment import HEADLINE, Predictions, assess, difference
from performers.tools.baselines import baselines
from performers.tools.conformal import label_sets
from performers.tools.finetuning import RUN, FinetuneConfig
from performers.tools.heads import CONVERSION, HeadedModel
from performers.tools.labelled import SETS, LabelledProteins, remark_on_split
from performers.tools.language_model import LanguageModel, Unread
from performers.tools.prediction import cells, columns
from performers.training.run_folder import RunResult
from performers.training.runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = "figures.json"
CONFIDENCE = 0.9
PROBING = """\
@inproceedings{kumar2022finetuning,
  title = {Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution},
  author = {Kumar, Ananya and Raghunathan, Aditi and Jones, Robbie and Ma, Tengyu and Liang, Percy},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}
"""


def finish(
    config: FinetuneConfig, proteins: LabelledProteins, origin: dict[str, Any], result: RunResult
) -> dict[str, Any]:
    """Measures the model of a finished run, and makes the output folder of it.

    Arguments:
        config: of the run.
        proteins: that it learned from, with their sets.
        origin: how they were split, and where they came from.
        result: of the run.

    Returns:
        What `figures.json` says; it is written last.

    Raises:
        RunError: a test protein cannot be read.
    """
    folder = config.folder
    record = RunRecord(
        folder,
        "finetune",
        arguments={**config.model_dump(), "output": str(folder)},
        seed=config.seed,
        device=config.device,
        inputs=origin["inputs"],
        references=PROBING if config.linear_probe else "",
        announce=False,
    )
    with record:
        model = HeadedModel.of(result.model, device=config.device, dtype=config.dtype)
        test = proteins.of("test")
        predicted = predictions_for_test(model, proteins, config.toks_per_batch)
        systems = {_named(config): predicted}
        if config.baselines:
            reader = LanguageModel.open(config.model, device=config.device, dtype=config.dtype)
            systems |= baselines(proteins, reader, toks_per_batch=config.toks_per_batch, seed=config.seed)
        figures: dict[str, Any] = {
            "task": config.task,
            "target": config.target,
            "labels": list(proteins.labels),
            "model": model.card.base,
            "sets": {name: len(proteins.of(name)) for name in SETS},
            "split": origin["split"],
            "steps": result.steps,
            "best_step": _best_step(config, result),
            "test": _rows(proteins, test, systems, config.seed),
            "coverage": _coverage(model, proteins, test, predicted),
        }
        _publish(result, folder)
        figures = json.loads(json.dumps(figures))  # as the next session of a finished run reads them
        write_file(folder / "test.csv", _table(model, proteins, test, predicted))
        _draw(proteins, test, predicted, folder / "test.png")
        write_file(folder / "README.md", _readme(model, figures))
        write_file(folder / "methods.txt", _methods(config, model, figures) + "\n")
        for file in model.card.weights:
            record.weights(folder / file)
        record.results(**figures)
    write_file(folder / FIGURES, json.dumps(figures, indent=1) + "\n")
    return figures


def rows_of(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of the test set: a header and a row for each system."""
    names = list(figures["test"][0]["figures"])
    header = ["system", *(f"{NAMES[name]} (95 % interval)" for name in names), "above the baseline by"]
    rows = [
        [
            row["system"],
            *(with_interval(row["figures"][name]) for name in names),
            with_interval(row["gain"], signed=True) if "gain" in row else "",
        ]
        for row in figures["test"]
    ]
    return header, rows


NAMES = {
    "spearman": "Spearman",
    "r2": "R2",
    "mae": "mean absolute error",
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "f1": "F1",
}


def with_interval(figure: dict[str, Any], *, signed: bool = False) -> str:
    """A figure and its interval, for people."""
    if figure["value"] is None:
        return "undefined"
    sign = "+" if signed else ""
    shown = f"{figure['value']:{sign}.3f}"
    if figure["interval"] is None:
        return shown
    low, high = figure["interval"]
    return f"{shown} ({low:{sign}.3f} to {high:{sign}.3f})"


def coverage_in_words(figures: dict[str, Any]) -> str:
    """What was found of the intervals or sets on the test proteins."""
    found = figures["coverage"]
    if found["size"] is None:
        return (
            f"{figures['sets']['validation']} validation proteins are too few for {found['confidence']:.0%} confidence: nothing "
            "can be ruled out."
        )
    what = "intervals" if figures["task"] == "regression" else "label sets"
    size = "wide" if figures["task"] == "regression" else "labels on average"
    return (
        f"{found['confidence']:.0%} {what}: the truth is in {found['share']:.1%} of them on the test proteins; they are "
        f"{found['size']:.3g} {size}."
    )


def weights_in_words(figures: dict[str, Any]) -> str:
    """Which weights the model has."""
    if figures["best_step"]:
        return f"The weights are those of step {figures['best_step']:,}."
    return (
        "No step made it better on the validation proteins: its body is as it was, with the head that suits that best."
    )


def _named(config: FinetuneConfig) -> str:
    how = "adapters (LoRA)" if config.lora else "head only" if config.frozen else "all weights"
    return f"finetuned, {how}"


def _best_step(config: FinetuneConfig, result: RunResult) -> int:
    """The step that the model is of."""
    from performers.training.run_folder import list_checkpoints, load_progress

    return load_progress(list_checkpoints(result.output)[-1]).best_step if config.patience else result.steps


def predictions_for_test(model: HeadedModel, proteins: LabelledProteins, toks_per_batch: int = 16_384) -> Predictions:
    """What a model says of the test proteins, in the form that `assess` takes.

    Raises:
        RunError: one cannot be read; names it.
    """
    test = proteins.of("test")
    rows = [model.row([proteins.sequences[index]]) for index in test]
    found: dict[int, Any] = {}
    for place, said in model.predict(rows, toks_per_batch=toks_per_batch):
        if isinstance(said, Unread):
            raise RunError(f"Test protein {proteins.ids[test[place]] or test[place] + 1}: {said.reason}.")
        found[place] = said.astype(np.float64)
    return [found[place] for place in range(len(test))]


def _rows(
    proteins: LabelledProteins, test: list[int], systems: dict[str, Predictions], seed: int
) -> list[dict[str, Any]]:
    """The figures of each system; for a baseline also by how much the model is above it in the headline figure."""
    truth = [proteins.targets[index] for index in test]
    own, *_ = systems.values()
    rows: list[dict[str, Any]] = []
    for name, predicted in systems.items():
        row: dict[str, Any] = {"system": name, "figures": assess(proteins.kind, predicted, truth, seed=seed)}
        if predicted is not own:
            row["gain"] = {"of": HEADLINE[proteins.kind], **difference(proteins.kind, own, predicted, truth, seed)}
        rows.append(row)
    return rows


def _coverage(
    model: HeadedModel, proteins: LabelledProteins, test: list[int], predicted: Predictions
) -> dict[str, Any]:
    """How often the truth is in the interval or the set, and how large that is; None where nothing can be ruled out."""
    threshold = model.card.calibration.threshold(CONFIDENCE)
    said, truth = np.concatenate(predicted), np.concatenate([proteins.targets[index] for index in test])
    found: dict[str, Any] = {"confidence": CONFIDENCE, "share": 1.0, "size": None}
    if np.isinf(threshold):
        return found
    if proteins.kind == "regression":
        return {**found, "share": float((np.abs(said[:, 0] - truth) <= threshold).mean()), "size": 2 * threshold}
    known = truth != IGNORED
    sets = label_sets(said[known], threshold)
    share = float(sets[np.arange(len(sets)), truth[known]].mean())
    return {**found, "share": share, "size": float(sets.sum(axis=1).mean())}


def _table(model: HeadedModel, proteins: LabelledProteins, test: list[int], predicted: Predictions) -> str:
    threshold = model.card.calibration.threshold(CONFIDENCE)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", proteins.target, *columns(model.card)])
    for index, said in zip(test, predicted, strict=True):
        writer.writerow([proteins.ids[index], proteins.text(index), *cells(model.card, said, threshold)])
    return text.getvalue()


def _draw(proteins: LabelledProteins, test: list[int], predicted: Predictions, path: Path) -> None:
    """Predicted against measured, or which label was taken for which."""
    from matplotlib.figure import Figure

    said, truth = np.concatenate(predicted), np.concatenate([proteins.targets[index] for index in test])
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    if proteins.kind == "regression":
        axes.scatter(truth, said[:, 0], s=9, alpha=0.5, color="#1f4e79", linewidths=0)
        ends = [min(truth.min(), said.min()), max(truth.max(), said.max())]
        axes.plot(ends, ends, color="black", linestyle=":", linewidth=1)
        axes.set(xlabel=f"{proteins.target}, measured", ylabel="predicted")
    else:
        _confusion(axes, proteins.labels, truth[truth != IGNORED], said[truth != IGNORED].argmax(axis=1))
    axes.set_title(f"{len(test):,} test proteins")
    figure.savefig(path, dpi=150)


def _confusion(axes: Axes, labels: tuple[str, ...], truth: Any, said: Any) -> None:
    size = len(labels)
    counts = np.bincount(truth * size + said, minlength=size * size).reshape(size, size)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(size), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(range(size), labels)
    axes.set(xlabel="predicted", ylabel="known")
    if size <= 12:
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black")


def _readme(model: HeadedModel, figures: dict[str, Any]) -> str:
    header, rows = rows_of(figures)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    kind = "PerformerFor" if model.family == "performer" else "the class in `config.json`, a ...For"
    ends = "TokenClassification" if figures["task"] == "residue" else "SequenceClassification"
    remark = remark_on_split(figures["split"])
    converted = f" ({CONVERSION} says more of its attention)" if CONVERSION in model.files else ""
    labels = f" The labels are {', '.join(figures['labels'])}." if figures["labels"] else ""
    sets = ", ".join(f"{count:,} {name}" for name, count in figures["sets"].items())
    return f"""\
# {figures["target"]}: {figures["task"]}

A protein language model, {figures["model"]}, finetuned with performers {__version__} on {sets} proteins (split by
{figures["split"]["by"]}). {weights_in_words(figures)}{labels}
{
        f'''
{remark}
'''
        if remark
        else ""
    }
On the test proteins, of which nothing was learned:

{chr(10).join(lines)}

{coverage_in_words(figures)}
`test.csv` has the predictions, `{RUN}/proteins.csv` the proteins with their sets, `{RUN}/log.jsonl` the training.

Predict with it:

```text
performers predict --model THIS_FOLDER -i proteins.fasta -o predictions.csv
```

In Python `performers.load("THIS_FOLDER")` opens it as {kind}{ends}{converted}; its outputs are {
        "in the units of the table" if figures["task"] == "regression" else "logits of the labels in the order above"
    }. `head.json` holds what intervals are made of.
"""


def _methods(config: FinetuneConfig, model: HeadedModel, figures: dict[str, Any]) -> str:
    what = "low-rank adapters (LoRA)" if config.lora else "a new head alone" if config.frozen else "all weights"
    sets = figures["sets"]
    by = {
        "identity": f"clusters of {config.identity:.0%} sequence identity (MMseqs2)",
        "random": "chance, relatives not held apart",
    }
    fit = "ridge" if figures["task"] == "regression" else "multinomial logistic"
    begun = f"; the head begun by {fit} regression on what the untouched model says" if config.linear_probe else ""
    end = "" if figures["best_step"] else ", for which no step was a gain"
    return (
        f"The protein language model {figures['model']} ({model.num_parameters:,} parameters) was finetuned with performers "
        f"{__version__} ({what}; AdamW{begun}) to predict {figures['target']} ({figures['task']}) from {sets['train']:,} "
        f"proteins, with early stopping on {sets['validation']:,} others{end}. "
        f"Proteins were split by {by.get(figures['split']['by'], figures['split']['by'])}, and figures are those of "
        f"{sets['test']:,} test proteins, with 95 % bootstrap intervals over proteins."
    )


def _publish(result: RunResult, folder: Path) -> None:
    """Moves the model of a finished run up into the output folder, its configuration last: where that is, all is."""
    if result.model.is_dir():
        for file in sorted(result.model.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
        shutil.rmtree(result.model)
