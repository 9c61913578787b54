"""Fitting a converted model to a handful of sequences, and saying what the conversion costs and what it gains.

The sequences are halved: features are fitted to the queries and keys of one half (FAVOR#, FAVOR++, prototypes), and everything
is judged on the other, against the model's own attention. Kernel and number of features are chosen layer by layer, by the error
of the attention outputs, so that the model has so many features per layer on average; layers are chosen by the error of the
model's last hidden states. Nothing is trained.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from performers.attention.features import KERNELS, FavorFeatures
from performers.conversion.interface import Call
from performers.conversion.measurement import (
    Inputs,
    Outcome,
    Sequence_,
    batch_of,
    call_error,
    halves,
    longest_input,
    outcome,
    random_ids,
    relative_error,
    token_ids,
)
from performers.conversion.saving import LayerTensors
from performers.conversion.specification import Specification
from performers.conversion.wiring import apply, attention_modules, layer_numbers, open_model, restore
from performers.errors import InputError
from performers.memory import forget_peak, peak_memory, resident_memory

# Estimates of the softmax kernel whose features are positive.
SOFTMAX_KERNELS = tuple(name for name, kernel in KERNELS.items() if kernel.exponential and name.startswith("softmax"))
_REPEATS = 3

Note = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """A converted model, and what was measured.

    Attributes:
        model: the model, converted in place.
        report: fit for JSON. "layers" has one entry for each attention layer: its module, whether it is converted, the chosen
            kernel and num_features, the relative errors of its outputs ("error_alone", given the exact queries, keys and
            values; "error_within", inside the converted model) and of every candidate. "hidden" are the errors of the
            hidden states by depth, the embeddings first. "up_to" says how far the last hidden states and the logits are off
            if the first k layers are converted. "lengths" are seconds and peak bytes of a forward pass before and after,
            "pays_from" the length at which both take the same time, None if that was not seen.
    """

    model: PreTrainedModel
    report: dict[str, Any]


def calibrate(
    model: PreTrainedModel | str | Path,
    sequences: Iterable[Sequence_],
    *,
    kernels: Sequence[str] | None = None,
    num_features: int = 256,
    choices: Sequence[int] | None = None,
    layers: list[int] | str | None = None,
    lengths: Sequence[int] = (),
    seed: int = 0,
    tokenizer: Any = None,
    architecture: str | None = None,
    note: Note = lambda text: None,
    **arguments: Any,
) -> Calibration:
    """Convert a Hugging Face model to FAVOR attention that fits a handful of sequences, and measure what comes of it.

    Arguments:
        model: a model, or the folder of one.
        sequences: strings, or lists of token ids with the special tokens that the model expects. All queries and keys of half
            of them are held in memory at once.
        kernels: to choose from; None for all positive estimates of softmax.
        num_features: features per layer, on average over the layers: the budget of time and memory.
        choices: the numbers of features to choose from; None for a quarter of the budget to four times it.
        layers: as in `convert`: numbers, "auto:0.05", or None for all.
        lengths: in tokens, at which to measure time and memory of a forward pass before and after, on random tokens.
        seed: of the random projections.
        tokenizer: for strings; None takes the one in the model's folder.
        architecture: the class of a model that is opened from a folder, where config.json names none that is known.
        note: is told what is being done.
        arguments: of the mechanism, for all layers, as in projection="orthogonal".

    Returns:
        The model and the report.

    Raises:
        InputError: sequences or arguments that are not valid; sequences longer than the model has positions for.
        UnsupportedError: the model's attention cannot be replaced.
    """
    names = _known_kernels(kernels)
    sizes = _choices(num_features, choices)
    if "kernel" in arguments:
        raise InputError("kernel: calibrate chooses among several, so give kernels, a list.")
    _with(Specification("favor", arguments), 0, names[0], 2).mechanism(16, 0)  # refuses arguments that are not known
    bound = error_bound(layers)
    if not isinstance(model, PreTrainedModel):
        model = open_model(model, architecture)
    if Specification.stored_in(model.config) is not None:
        restore(model)  # what is measured is the difference from the original
    modules = attention_modules(model)
    numbers = None if isinstance(layers, str) else layer_numbers(layers, len(modules))
    limit = longest_input(model)
    for length in lengths:
        if length < 1 or (limit is not None and length > limit):
            raise InputError(
                f"length {length:,}: expected 1 to {limit:,} tokens, for which {type(model).__name__} has learned positions."
                if limit is not None
                else f"length {length}: expected a positive number of tokens."
            )
    ids = token_ids(model, sequences, tokenizer, at_most=limit)
    fit_to, judge_on = halves(ids)
    note(f"{len(ids)} sequences of {sum(map(len, ids)):,} tokens; {len(modules)} attention layers")
    before = [forward_cost(model, length, seed, lambda text: note(f"{text} before")) for length in lengths]

    classes = sorted({type(module).__name__ for module in modules})
    specification = Specification("favor", arguments, numbers, classes, seed)
    exact = replace(specification, layers=[])
    apply(model, modules, exact)
    note("fitting features to queries and keys")
    to_fit = outcome(model, batch_of(model, fit_to), keep_calls=True).calls
    batch = batch_of(model, judge_on)
    reference = outcome(model, batch, keep_calls=True)
    note(f"trying {len(names)} kernels with {', '.join(map(str, sizes))} features in every layer")
    errors: dict[int, dict[str, dict[int, float]]] = {}
    fitted: dict[int, dict[tuple[str, int], dict[str, Tensor]]] = {}
    for layer, calls in reference.calls.items():
        errors[layer], fitted[layer] = _candidates(specification, layer, to_fit[layer], calls, names, sizes)
    chosen = allocate({layer: _best(errors[layer]) for layer in errors}, num_features)
    by_layer: dict[str, dict[str, Any]] = {}
    tensors: LayerTensors = {}
    for layer, size in chosen.items():
        kernel = min(names, key=lambda name: errors[layer][name][size])
        by_layer[str(layer)] = {"kernel": kernel, "num_features": _rows(kernel, size)}
        tensors[layer] = fitted[layer][kernel, size]
    specification = replace(specification, by_layer=by_layer)
    if bound is not None:
        note("measuring the sensitivity of every layer")
        specification = choose_layers(model, modules, specification, tensors, batch, bound, reference)

    note("measuring errors by depth")
    depth = _by_depth(model, modules, specification, tensors, batch, reference)
    apply(model, modules, specification, tensors)
    converted = outcome(model, batch, keep_calls=True)
    after = [forward_cost(model, length, seed, lambda text: note(f"{text} after")) for length in lengths]
    names_of = {module: name for name, module in model.named_modules()}
    entries = [
        {
            "layer": layer,
            "module": names_of[modules[layer]],
            "converted": specification.converts(layer),
            **by_layer[str(layer)],
            "size": chosen[layer],
            "error_alone": min(errors[layer][name][chosen[layer]] for name in names),
            "error_within": call_error([call.out for call in converted.calls[layer]], reference.calls[layer]),
            "candidates": {name: {str(size): error for size, error in errors[layer][name].items()} for name in names},
        }
        for layer in sorted(reference.calls)
    ]
    costs = [
        {"length": length, "before": old, "after": new, "speedup": old["seconds"] / new["seconds"]}
        for length, old, new in zip(lengths, before, after, strict=True)
    ]
    report = {
        "model": type(model).__name__,
        "opened_from": model.name_or_path,
        "num_features": num_features,
        "kernels": list(names),
        "choices": list(sizes),
        "seed": seed,
        "sequences": len(ids),
        "tokens": sum(map(len, ids)),
        "judged_on": {
            "sequences": len(judge_on),
            "tokens": sum(map(len, judge_on)),
            "held_out": judge_on is not fit_to,
        },
        "converted": [layer for layer in range(len(modules)) if specification.converts(layer)],
        "layers": entries,
        "hidden": _hidden_errors(converted, reference),
        "logits": _logits_error(converted, reference),
        "up_to": depth,
        "measured": specification.measured,
        "lengths": costs,
        "pays_from": pays_from(costs),
    }
    return Calibration(model, report)


def error_bound(layers: list[int] | str | None) -> float | None:
    """The bound in layers="auto:0.05"; None where layers are given by number.

    Raises:
        InputError: another string, or a bound that is not positive.
    """
    if not isinstance(layers, str):
        return None
    name, _, number = layers.partition(":")
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if name != "auto" or not 0 < bound < math.inf:
        raise InputError(f"layers={layers!r}: expected numbers of layers, or 'auto:' and an error, as in 'auto:0.05'.")
    return bound


def fit_tensors(
    model: PreTrainedModel, modules: list[nn.Module], specification: Specification, batch: Inputs
) -> LayerTensors:
    """What the features of a specification need to know of queries and keys, from one batch; empty where they need nothing.

    The model is left with its exact attention, through our path.
    """
    apply(model, modules, replace(specification, layers=[]))
    calls = outcome(model, batch, keep_calls=True).calls
    found = {layer: _fit(specification, layer, of_layer) for layer, of_layer in calls.items()}
    return {layer: tensors for layer, tensors in found.items() if tensors and specification.converts(layer)}


def choose_layers(
    model: PreTrainedModel,
    modules: list[nn.Module],
    specification: Specification,
    tensors: LayerTensors,
    batch: Inputs,
    bound: float,
    reference: Outcome | None = None,
) -> Specification:
    """As many layers as keep the error of the last hidden states under a bound.

    Every layer is converted alone first. Then layers join in the order of these errors, until the joint error exceeds the
    bound.

    Arguments:
        model, modules, specification, tensors: as in `apply`; the specification's own choice of layers is not looked at.
        batch: what to measure on.
        bound: the largest relative error.
        reference: what the exact model makes of the batch, if that is known.

    Returns:
        The specification with these layers, and with the figures as `measured`.
    """
    if reference is None:
        apply(model, modules, replace(specification, layers=[]))
        reference = outcome(model, batch)

    def error(layers: list[int]) -> float:
        apply(model, modules, replace(specification, layers=layers), tensors)
        return relative_error(outcome(model, batch).hidden[-1], reference.hidden[-1], reference.real)

    alone = [error([layer]) for layer in range(len(modules))]
    chosen: list[int] = []
    joint = 0.0
    for layer in sorted(range(len(modules)), key=alone.__getitem__):
        more = sorted([*chosen, layer])
        with_it = error(more)
        if not with_it <= bound:
            break
        chosen, joint = more, with_it
    measured = {"bound": bound, "alone": alone, "error": joint, "sequences": len(batch["input_ids"])}
    return replace(specification, layers=chosen, measured=measured)


def allocate(errors: dict[int, dict[int, float]], mean_size: int) -> dict[int, int]:
    """How many features every layer gets, so that the sum of squared errors is small and the mean number is at most this.

    All layers begin with the fewest; then always that layer gets more whose squared error falls most per feature.

    Arguments:
        errors: for every layer the error by number of features; the same numbers in each.
        mean_size: features per layer.
    """
    sizes = {layer: min(by_size) for layer, by_size in errors.items()}
    left = mean_size * len(errors) - sum(sizes.values())
    while True:
        steps = [
            ((by_size[sizes[layer]] ** 2 - error**2) / (size - sizes[layer]), layer, size)
            for layer, by_size in errors.items()
            for size, error in by_size.items()
            if 0 < size - sizes[layer] <= left and error < by_size[sizes[layer]]
        ]
        if not steps:
            return sizes
        _, layer, size = max(steps)
        left -= size - sizes[layer]
        sizes[layer] = size


@torch.no_grad()
def forward_cost(model: PreTrainedModel, length: int, seed: int, note: Note = lambda text: None) -> dict[str, Any]:
    """What a forward pass over one sequence of random tokens costs.

    Returns:
        "seconds", the median of three, and "peak_bytes", the memory it took on top of what was there.
    """
    batch = batch_of(model, [random_ids(model, length, seed)])
    on_cuda = model.device.type == "cuda"

    def once() -> float:
        started = time.perf_counter()
        model(**batch)
        if on_cuda:
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - started

    was_training = model.training
    model.eval()
    try:
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device)
        else:
            forget_peak()
            before = resident_memory()
        once()  # the first makes what later ones find ready
        peak = torch.cuda.max_memory_allocated(model.device) if on_cuda else peak_memory()
        seconds = statistics.median(once() for _ in range(_REPEATS))
    finally:
        model.train(was_training)
    note(f"{length:,} tokens: {seconds:.3g} s")
    return {"seconds": seconds, "peak_bytes": max(0, peak - before)}


def pays_from(costs: Sequence[dict[str, Any]]) -> int | None:
    """The length from which the converted model is faster: between measured ones by a straight line in logarithms.

    None if it never was; the shortest length if it always was.
    """
    points = sorted((cost["length"], math.log(cost["speedup"])) for cost in costs)
    if not points or points[-1][1] < 0:
        return None
    slower = [index for index, (_, gain) in enumerate(points) if gain < 0]
    if not slower:
        return points[0][0]
    (short, loss), (long, gain) = points[slower[-1]], points[slower[-1] + 1]
    share = -loss / (gain - loss)
    return round(math.exp(math.log(short) + share * (math.log(long) - math.log(short))))


def _known_kernels(kernels: Sequence[str] | None) -> tuple[str, ...]:
    names = SOFTMAX_KERNELS if kernels is None else tuple(dict.fromkeys(kernels))
    if not names:
        raise InputError("kernels is empty: expected at least one.")
    for name in names:
        FavorFeatures(1, 1, name)  # refuses a kernel that it does not know
    return names


def _choices(num_features: int, choices: Sequence[int] | None) -> list[int]:
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 2:
        raise InputError(f"num_features={num_features!r} must be an integer of at least 2.")
    sizes = choices or [num_features // 4, num_features // 2, num_features, 2 * num_features, 4 * num_features]
    found = sorted({int(size) // 2 * 2 for size in sizes if size >= 2})  # even: some kernels make two features of a row
    if not found or found[0] > num_features:
        raise InputError(
            f"choices={list(sizes)}: expected numbers of at least 2, one of them within num_features={num_features}."
        )
    return found


def _rows(kernel: str, size: int) -> int:
    """How many rows of the projection make so many features."""
    of_two = FavorFeatures(1, 1, kernel).size
    return max(1, size // of_two)


def _with(specification: Specification, layer: int, kernel: str, size: int) -> Specification:
    return replace(specification, by_layer={str(layer): {"kernel": kernel, "num_features": _rows(kernel, size)}})


def _fit(specification: Specification, layer: int, calls: Sequence[Call]) -> dict[str, Tensor]:
    """The parameters that a layer's features take from the queries and keys of its calls."""
    first = calls[0]
    head_dim = first.query.shape[-1]
    mechanism = specification.mechanism(head_dim, layer)
    features = getattr(mechanism, "features", None)
    if not isinstance(features, FavorFeatures) or features.is_calibrated:
        return {}
    mask = first.arguments.get("key_padding_mask")
    features.calibrate_(
        torch.cat([call.query for call in calls]),
        torch.cat([call.key for call in calls]),
        None if mask is None else mask.repeat(len(calls), 1),
        scale=first.arguments["scale"],
    )
    return specification.not_drawn(mechanism, head_dim, layer)


@torch.no_grad()
def _candidates(
    specification: Specification,
    layer: int,
    fit_to: Sequence[Call],
    judge_on: Sequence[Call],
    kernels: Sequence[str],
    sizes: Sequence[int],
) -> tuple[dict[str, dict[int, float]], dict[tuple[str, int], dict[str, Tensor]]]:
    """The errors of a layer's outputs by kernel and number of features, given its exact inputs, and what was fitted for each."""
    head_dim, device = judge_on[0].query.shape[-1], judge_on[0].query.device
    errors: dict[str, dict[int, float]] = {}
    fitted: dict[tuple[str, int], dict[str, Tensor]] = {}
    for kernel in kernels:
        for size in sizes:
            candidate = _with(specification, layer, kernel, size)
            fitted[kernel, size] = _fit(candidate, layer, fit_to)
            mechanism = candidate.mechanism(head_dim, layer, fitted[kernel, size]).to(device)
            outputs = [mechanism(call.query, call.key, call.value, **call.arguments) for call in judge_on]
            errors.setdefault(kernel, {})[size] = call_error(outputs, judge_on)
    return errors, fitted


def _best(errors: dict[str, dict[int, float]]) -> dict[int, float]:
    sizes = next(iter(errors.values()))
    return {size: min(by_size[size] for by_size in errors.values()) for size in sizes}


def _hidden_errors(converted: Outcome, exact: Outcome) -> list[float]:
    return [relative_error(a, b, exact.real) for a, b in zip(converted.hidden, exact.hidden, strict=True)]


def _logits_error(converted: Outcome, exact: Outcome) -> float | None:
    if converted.logits is None or exact.logits is None:
        return None
    return relative_error(converted.logits, exact.logits, exact.real)


def _by_depth(
    model: PreTrainedModel,
    modules: list[nn.Module],
    specification: Specification,
    tensors: LayerTensors,
    batch: Inputs,
    reference: Outcome,
) -> list[dict[str, Any]]:
    """The error at the end of the model if its first k converted layers are, for every k."""
    converted = [layer for layer in range(len(modules)) if specification.converts(layer)]
    found: list[dict[str, Any]] = []
    for count in range(1, len(converted) + 1):
        apply(model, modules, replace(specification, layers=converted[:count]), tensors)
        result = outcome(model, batch)
        error = relative_error(result.hidden[-1], reference.hidden[-1], reference.real)
        found.append({"converted": count, "hidden": error, "logits": _logits_error(result, reference)})
    return found


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A report as tables: a title, a header and rows each."""
    found = [
        (
            "Relative error of attention outputs, layer by layer",
            ["layer", "converted", "kernel", "features", "given exact inputs", "inside the converted model"],
            [
                [
                    str(entry["layer"]),
                    "yes" if entry["converted"] else "no",
                    entry["kernel"] if entry["converted"] else "",
                    str(entry["size"]) if entry["converted"] else "",
                    f"{entry['error_alone']:.3f}" if entry["converted"] else "",
                    f"{entry['error_within']:.3f}",
                ]
                for entry in report["layers"]
            ],
        ),
        (
            "Relative error at the end, with the first layers converted",
            ["layers converted", "last hidden states", "logits"],
            [
                [str(row["converted"]), f"{row['hidden']:.3f}", "" if row["logits"] is None else f"{row['logits']:.3f}"]
                for row in report["up_to"]
            ],
        ),
        (
            "Relative error of the hidden states by depth, all of them converted",
            ["after layer", "error"],
            [["embeddings" if i == 0 else str(i - 1), f"{error:.3f}"] for i, error in enumerate(report["hidden"])],
        ),
    ]
    if report["lengths"]:
        rows = [
            [
                f"{cost['length']:,}",
                f"{cost['before']['seconds']:.3g}",
                f"{cost['after']['seconds']:.3g}",
                f"{cost['speedup']:.2f}",
                f"{cost['before']['peak_bytes'] / 2**20:,.0f} MiB",
                f"{cost['after']['peak_bytes'] / 2**20:,.0f} MiB",
            ]
            for cost in report["lengths"]
        ]
        header = ["tokens", "seconds before", "after", "times faster", "memory before", "after"]
        found.append(("A forward pass over one sequence", header, rows))
    return found


def summary(report: dict[str, Any]) -> list[str]:
    """What a report comes to, in sentences."""
    judged = report["judged_on"]
    held_out = (
        "that nothing was fitted to" if judged["held_out"] else "which is also what was fitted to: give more than one"
    )
    sentences = [
        f"{len(report['converted'])} of {len(report['layers'])} attention layers are converted; judged on {judged['sequences']} "
        f"sequences ({judged['tokens']:,} tokens) {held_out}."
    ]
    if report["measured"] is not None:
        sentences.append(
            f"The bound on the error of the last hidden states was {report['measured']['bound']:g}; it is "
            f"{report['measured']['error']:.3g}."
        )
    if report["lengths"]:
        sizes = [cost["length"] for cost in report["lengths"]]
        if report["pays_from"] is None:
            sentences.append(f"The converted model was not faster at any length up to {max(sizes):,} tokens.")
        elif report["pays_from"] == min(sizes):
            sentences.append(f"The converted model is faster from the shortest length on, {min(sizes):,} tokens.")
        else:
            sentences.append(f"The converted model is faster from about {report['pays_from']:,} tokens on.")
    return sentences


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws how errors grow with depth (as 2009.14794 does), and where lengths were measured, time against length."""
    from matplotlib.figure import Figure

    panels = 3 if report["lengths"] else 2
    figure = Figure(figsize=(4.2 * panels, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels)
    numbers = [entry["layer"] for entry in report["layers"]]
    chosen = [entry for entry in report["layers"] if entry["converted"]]
    axes[0].plot(
        [e["layer"] for e in chosen], [e["error_alone"] for e in chosen], "o-", label="attention, exact inputs"
    )
    axes[0].plot(numbers, [e["error_within"] for e in report["layers"]], "s-", label="attention, in the model")
    if len(report["hidden"]) == len(numbers) + 1:
        axes[0].plot(numbers, report["hidden"][1:], "^-", label="hidden states")
    axes[0].set(xlabel="layer", ylabel="relative error", title="Error by depth")
    counts = [row["converted"] for row in report["up_to"]]
    axes[1].plot(counts, [row["hidden"] for row in report["up_to"]], "^-", label="last hidden states")
    if report["logits"] is not None:
        axes[1].plot(counts, [row["logits"] for row in report["up_to"]], "d-", label="logits")
    axes[1].set(xlabel="layers converted, from the first", ylabel="relative error", title="Error at the end")
    if report["lengths"]:
        for when, marker in (("before", "o--"), ("after", "s-")):
            points = [(cost["length"], cost[when]["seconds"]) for cost in report["lengths"]]
            axes[2].plot(*zip(*points, strict=True), marker, label=when)
        axes[2].set(xlabel="tokens", ylabel="seconds", title="Forward pass", xscale="log", yscale="log")
    for axis in axes:
        axis.set_ylim(bottom=0) if axis.get_yscale() == "linear" else None
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path)
