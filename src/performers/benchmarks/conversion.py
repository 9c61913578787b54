"""What conversion does to pretrained models, and what distillation wins back: `performers benchmark conversion`.

The models are published ones from packages (`conversion_models`), each with sequences that it is fitted to, distilled on and
judged on (`conversion_subjects`). Four parts are measured, a cell each time something differs:

- quality: errors and quality straight after conversion, by kernel and number of features, beside the exact model;
- layers: how many layers layers="auto:0.05" converts, and the share of the original's quality that is kept without training;
- speed: forward passes of ESM-2, whose rotary positions go on for ever, and of its attention alone, against PyTorch's exact one;
- distillation: quality against steps and minutes; of AntiBERTy beside two floors: a student distilled alike without global
  attention, and copying the nearest training neighbour.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.benchmarks.conversion_models import PACKAGES, cache_folder, fetch
from performers.benchmarks.conversion_report import FLOOR, draw, progress
from performers.benchmarks.conversion_settings import ConversionSettings
from performers.benchmarks.experiment import DONE, UNAVAILABLE, Cell, Experiment, Figures
from performers.errors import RunError
from performers.folders import sha256_of

if TYPE_CHECKING:
    from performers.benchmarks.conversion_subjects import Subject


def measure_conversion(
    settings: ConversionSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Measures what the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `conversion.json`, pictures, `run.json`, `cells.jsonl` and the distilled models.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report. Every cell has its "what". Cells of "quality" and "layers" hold "figures", by name {"value", "interval"}, and
        "columns", what they were made of, a number of each judged sequence; those of a conversion also the relative error
        "attention" of attention outputs, given exact inputs, the mean over layers. One of "speed" holds seconds and peak bytes
        of a forward pass and seconds of the attention of one layer, before and after; one of "distillation" its "points", by
        step; one of "floor" what "quality" holds.

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    from performers.training.distributed import use_threads

    with (
        Experiment("conversion", asdict(settings), output, quick=quick, restart=restart) as experiment,
        use_threads(settings.threads),
    ):
        if "antiberty" in settings.models and settings.antibodies is None:
            experiment.notes.append(
                "antiberty is left out: it is judged on antibodies, for which --antibodies gives a file."
            )
        opened: dict[str, Subject] = {}

        def measure(cell: Cell, before: list[Figures]) -> Figures:
            try:
                folder = fetch(PACKAGES[cell["model"]], cache_folder(settings.cache))
            except RunError as error:
                return {"status": UNAVAILABLE, "reason": str(error)}
            if cell["model"] not in opened:
                opened.clear()  # one at a time is in memory
                opened[cell["model"]] = _open(cell["model"], folder, settings)
            return {"status": DONE, **_measured(cell, opened[cell["model"]], experiment)}

        experiment.measure(list(_cells(settings)), measure, name=_name, result=progress, weight=_weight)
        return experiment.report(draw)


def _cells(settings: ConversionSettings) -> Iterator[Cell]:
    """What is to be measured, the models one after the other and what takes long at the end of each."""
    common = {key: getattr(settings, key) for key in ("fit_to", "judge_on", "device", "threads", "seed")}
    kernel = settings.kernels[-1]
    for model in settings.models:
        about: dict[str, Any] = {"model": model, **common}
        if model == "antiberty":
            if settings.antibodies is None:
                continue
            about["antibodies"] = sha256_of(Path(settings.antibodies))
        if model == "minilm" and settings.texts is not None:
            about["texts"] = sha256_of(Path(settings.texts))
        sizes = sorted(set(settings.num_features))
        if set(settings.parts) - {"speed"}:
            yield {"what": "quality", **about, "kernel": "exact", "num_features": None}
        if "quality" in settings.parts:
            for name in settings.kernels:
                yield from ({"what": "quality", **about, "kernel": name, "num_features": size} for size in sizes)
        if "layers" in settings.parts:
            bound = settings.bound
            yield from ({"what": "layers", **about, "kernel": kernel, "num_features": m, "bound": bound} for m in sizes)
        chosen = {"kernel": kernel, "num_features": settings.chosen_features}
        if "speed" in settings.parts and model == "esm2":
            yield from ({"what": "speed", **about, **chosen, "length": length} for length in settings.lengths)
        if "distillation" in settings.parts:
            yield from _distillations(settings, about, chosen)


def _distillations(settings: ConversionSettings, about: Cell, chosen: Cell) -> Iterator[Cell]:
    from performers.benchmarks.conversion_distillation import CONVERTED

    keys = ("steps", "batch_size", "evaluate_every", "learning_rate", "layers_learning_rate", "dtype")
    training = {key: getattr(settings, key) for key in keys}
    if about["model"] == "antiberty":
        yield {"what": "floor", **about, "system": "nearest neighbour"}
    yield {"what": "distillation", **about, "system": CONVERTED, **chosen, **training}
    if about["model"] == "antiberty":
        yield {"what": "distillation", **about, "system": FLOOR, "window": settings.floor_window, **training}


def _open(name: str, folder: Path, settings: ConversionSettings) -> Subject:
    from performers.benchmarks.conversion_subjects import SUBJECTS

    return SUBJECTS[name](folder, PACKAGES[name], settings)


def _measured(cell: Cell, subject: Any, experiment: Experiment) -> Figures:
    if cell["what"] == "distillation":
        from performers.benchmarks.conversion_distillation import measure_distillation

        return measure_distillation(cell, subject, experiment.log.folder_of(cell))
    if cell["what"] == "floor":
        from performers.benchmarks.conversion_floors import copied_from_neighbours

        columns, identities = copied_from_neighbours(
            subject.known, subject.domains, subject.rounds, threads=cell["threads"]
        )
        return {**_with_figures(cell, columns), "identity": statistics.fmean(identities)}
    return {"quality": _quality, "layers": _layers, "speed": _speed}[cell["what"]](cell, subject)


def _with_figures(cell: Cell, columns: dict[str, list[float]]) -> Figures:
    from performers.benchmarks.conversion_figures import summary

    return {"columns": columns, "figures": summary(cell["model"], columns, cell["seed"])}


def _quality(cell: Cell, subject: Subject) -> Figures:
    import torch

    from performers.benchmarks.conversion_distillation import specification_of
    from performers.conversion.measurement import call_error

    if cell["kernel"] == "exact":
        subject.apply(subject.exactly())
        return _with_figures(cell, subject.judge(subject.model))
    specification = specification_of(cell, subject.classes)
    tensors = subject.fitted(specification)
    subject.apply(specification, tensors)
    by_layer: list[float] = []
    with torch.no_grad():
        for layer, calls in subject.exact.calls.items():
            mechanism = specification.mechanism(calls[0].query.shape[-1], layer, tensors.get(layer)).to(cell["device"])
            outputs = [mechanism(call.query, call.key, call.value, **call.arguments) for call in calls]
            by_layer.append(call_error(outputs, calls))
    errors = {"attention_by_layer": by_layer, "attention": statistics.fmean(by_layer)}
    return {**errors, **_with_figures(cell, subject.judge(subject.model))}


def _layers(cell: Cell, subject: Subject) -> Figures:
    """As convert(layers="auto:BOUND"): features are fitted to half of the sequences, layers chosen on the rest."""
    from performers.benchmarks.conversion_distillation import specification_of
    from performers.conversion.calibration import choose_layers
    from performers.conversion.measurement import batch_of, halves

    fit_to, choose_on = halves(subject.fit_to)
    specification = specification_of(cell, subject.classes)
    tensors = subject.fitted(specification, list(fit_to))
    batch = batch_of(subject.model, choose_on)
    specification = choose_layers(subject.model, subject.modules, specification, tensors, batch, cell["bound"])
    subject.apply(specification, tensors)
    return {
        "converted": specification.layers,
        "of": len(subject.modules),
        "measured": specification.measured,
        **_with_figures(cell, subject.judge(subject.model)),
    }


def _speed(cell: Cell, subject: Subject) -> Figures:
    import torch

    from performers.attention import exact_attention
    from performers.benchmarks.conversion_distillation import specification_of
    from performers.conversion.calibration import forward_cost
    from performers.conversion.measurement import batch_of, outcome, random_ids
    from performers.conversion.wiring import restore

    model, length = subject.model, cell["length"]
    specification = specification_of(cell, subject.classes)
    tensors = subject.fitted(specification)
    restore(model)
    before = forward_cost(model, length, cell["seed"])
    subject.apply(replace(specification, layers=[]))
    call = outcome(model, batch_of(model, [random_ids(model, length, cell["seed"])]), keep_calls=True).calls[0][0]
    mechanism = specification.mechanism(call.query.shape[-1], 0, tensors.get(0)).to(cell["device"])
    seconds: dict[str, float] = {}
    with torch.no_grad():
        for name, attend in (("before", exact_attention), ("after", mechanism)):
            seconds[name] = _median_seconds(
                lambda attend=attend: attend(call.query, call.key, call.value, **call.arguments), cell["device"]
            )
    subject.apply(specification, tensors)
    after = forward_cost(model, length, cell["seed"])
    return {
        "before": {**before, "attention_seconds": seconds["before"]},
        "after": {**after, "attention_seconds": seconds["after"]},
        "speedup": before["seconds"] / after["seconds"],
        "attention_speedup": seconds["before"] / seconds["after"],
    }


def _median_seconds(work: Callable[[], Any], device: str) -> float:
    import torch

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(3))


def _name(cell: Cell) -> str:
    if cell["what"] == "speed":
        return f"{cell['model']} {cell['length']:,} tokens"
    if "system" in cell:
        return f"{cell['model']} {cell['system']}" + (f", {cell['steps']:,} steps" if "steps" in cell else "")
    size = "" if cell["num_features"] is None else f" M {cell['num_features']}"
    bound = f", layers auto:{cell['bound']:g}" if cell["what"] == "layers" else ""
    return f"{cell['model']} {cell['kernel']}{size}{bound}"


def _weight(cell: Cell) -> float:
    """How long a cell takes, roughly in minutes."""
    if cell["what"] == "distillation":
        return cell["steps"] * cell["batch_size"] / 200
    return cell.get("length", 1000) / 1000
