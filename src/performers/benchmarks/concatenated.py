"""Proteins joined to contexts of 8,192 tokens: what fits into memory, and who predicts better in the same memory and time.

The experiment of 2009.14794, section 4.4, in two parts. The first weighs a step of training of the regular model, (8, 6, 2048,
512) heads, layers, d_ff and d: the Transformer that keeps its attention matrices, at batch 1, and Performer, at batch 16, against
16 GiB. Recomputing layers and computing in bfloat16 save memory in any model, so both systems are weighed with and without
either; today's fused Transformer is weighed beside them. The second part trains Performer against the largest Transformer that
fits the same memory at the same batch (the paper shrank it to (8, {1, 2, 3}, 256, 256)) for equal wall time: accuracy over time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from performers.benchmarks.comparison import (
    MAX_STEP_MINUTES,
    ComparisonSettings,
    Proteins,
    check_choices,
    measure_speed,
    recipe_and_rest,
    run_cell,
    speed_cell,
    train,
)
from performers.benchmarks.cost import RECOMPUTATIONS, run_step
from performers.benchmarks.cost_report import GIB, SIZES, shape, size_of
from performers.benchmarks.experiment import DONE, SKIPPED, Cell, Experiment, Figures, extrapolated
from performers.benchmarks.isolation import available_memory
from performers.benchmarks.systems import SYSTEMS, check_systems

# What is weighed, with its batch: the paper's pair, and what a Transformer is today.
WEIGHED = (("transformer-materialised", 1), ("performer-relu", 16), ("transformer", 16))
DTYPES = ("float32", "bfloat16")
PERFORMER = "performer-relu"
RIVAL = "transformer-materialised"
# From the largest: the regular model, and the sizes that the paper shrank the Transformer to.
_SHRUNK = tuple({"heads": 8, "layers": layers, "d_ff": 256, "d": 256} for layers in (3, 2, 1))


@dataclass(frozen=True)
class ConcatenatedSettings(ComparisonSettings):
    """What `measure_concatenated` measures, beside what all comparisons have; the recipe is Performer's.

    Attributes:
        size: heads, layers, d_ff and d of the regular model.
        shrunk: sizes that the rival may shrink to, the largest first.
        context: tokens.
        weighed: pairs of a system and a batch size.
        recomputations: as in `performers.benchmarks.cost_cell`.
        cap: the memory, in GiB.
        minutes: of training, for each; 0 trains nothing.
        batch_size: of the training.
        others: systems that are trained beside Performer and its rival, at the regular size.
        learning_rate: of the training.
    """

    size: dict[str, int] = field(default_factory=lambda: dict(SIZES["regular"]))
    shrunk: Sequence[dict[str, int]] = _SHRUNK
    context: int = 8192
    weighed: Sequence[tuple[str, int]] = WEIGHED
    recomputations: Sequence[str] = ("none", "layers")
    cap: float = 16.0
    minutes: float = 60.0
    batch_size: int = 1
    others: Sequence[str] = ("transformer",)
    learning_rate: float = 1e-3
    seeds: Sequence[int] = (1,)
    score_proteins: int = 200

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> ConcatenatedSettings:
        """The full or the quick settings, with what was given in their place; `size` as four numbers, as papers write it.

        Raises:
            InputError: a name or a number that is not in order.
        """
        defaults: dict[str, Any] = {}
        if given.get("size") is not None:
            given["size"] = size_of(given["size"])
        if quick:
            defaults = {
                "size": {"heads": 2, "layers": 2, "d_ff": 128, "d": 64},
                "shrunk": ({"heads": 2, "layers": 1, "d_ff": 64, "d": 32},),
                "context": 512,
                "weighed": tuple((system, min(batch, 2)) for system, batch in WEIGHED),
                "minutes": 0.25,
                "cap": 0.5,
                "held_out": 20,
                "score_proteins": 20,
            }
        chosen = {**defaults, **{key: value for key, value in given.items() if value is not None}}
        size = {**SIZES["regular"], **chosen.get("size", {})}
        training = {
            **size,
            "context": chosen.get("context", cls.context),
            "batch_size": chosen.get("batch_size", cls.batch_size),
            "contexts": "concatenated",
        }
        kept = {key: chosen[key] for key in ("context", "batch_size") if key in chosen}
        settings = cls(**{**recipe_and_rest(False, {}, {**chosen, **training}), **kept})
        check_systems((*settings.others, *(system for system, _ in settings.weighed)))
        check_choices("--recompute", settings.recomputations, RECOMPUTATIONS)
        return settings


def measure_concatenated(
    settings: ConcatenatedSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Weighs and trains whatever the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `concatenated.json`, the picture, `run.json`, the proteins, the runs and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report: a cell for every weighing, timing and run; "memory", what was weighed, or continued from smaller batches or
        contexts; "contestants", what was trained, at which size and for how many steps.

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    with Experiment("concatenated", asdict(settings), output, quick=quick, restart=restart) as experiment:
        memory = [
            {
                "system": system,
                "batch_size": batch_size,
                "recomputation": recomputation,
                "dtype": dtype,
                **_weigh(settings, experiment, system, batch_size, recomputation, dtype, settings.size),
            }
            for system, batch_size in settings.weighed
            for recomputation in settings.recomputations
            for dtype in DTYPES
        ]
        contestants: list[Figures] = []
        if settings.minutes:
            proteins = settings.proteins(experiment.log.folder)
            contestants = _train(settings, experiment, proteins)
        return experiment.report(draw, memory=memory, contestants=contestants)


def _weigh(
    settings: ConcatenatedSettings,
    experiment: Experiment,
    system: str,
    batch_size: int,
    recomputation: str,
    dtype: str,
    size: dict[str, int],
) -> Figures:
    """The peak of a step with AdamW: measured, or continued where the machine has not so much memory or a step takes too long.

    Batches are approached from smaller ones and a batch of one from shorter contexts, so that there are two points to continue
    from. No step is begun that the smaller ones say has no room, or takes over ten minutes.

    Returns:
        peak_bytes, and how: "measured" or "extrapolated"; None and the reason if nothing could be weighed.
    """

    def cell(batch: int, length: int) -> Cell:
        return {
            "measure": "memory",
            "part": "model",
            "system": system,
            "size": size,
            "objective": "mlm",
            "recomputation": recomputation,
            "optimizer": True,
            "dtype": dtype,
            "length": length,
            "batch_size": batch,
            "device": settings.device,
            "threads": settings.threads,
            "seed": settings.seed,
            "seconds": 0.0,
        }

    if batch_size == 1:
        lengths = [length for length in (settings.context // 4, settings.context // 2) if length >= 64]
        ladder = [cell(1, length) for length in (*lengths, settings.context)]
    else:
        ladder = [cell(batch, settings.context) for batch in (1, 4, 16, 64, 256) if batch < batch_size]
        ladder.append(cell(batch_size, settings.context))
    results = experiment.measure(
        ladder,
        lambda cell, before: _step(cell, before, settings),
        name=lambda cell: (
            f"memory of {SYSTEMS[system].title} {shape(size)}, batch {cell['batch_size']}, L {cell['length']:,}, "
            f"recomputation {recomputation}, {dtype}"
        ),
        result=lambda figures: f"{figures['peak_bytes'] / GIB:.2f} GiB",
    )
    done = [result for result in results if result["status"] == DONE]
    if len(done) == len(results):
        return {"peak_bytes": done[-1]["peak_bytes"], "how": "measured"}
    if not done:
        return {"peak_bytes": None, "how": results[0]["reason"]}
    return {"peak_bytes": continued(done, ladder[-1]), "how": "extrapolated"}


def continued(done: list[Figures], cell: Cell) -> float:
    """The peak of a greater cell, from those that were weighed.

    What a step adds to the process is fitted as a + b x through the last two points, where x is the number of tokens for a
    system whose memory is linear, and the number of pairs for one that keeps the matrices; activations that are linear in the
    length are a little overstated then.
    """

    def extent(cell: Cell) -> float:
        length = cell["length"]
        pairs = SYSTEMS[cell["system"]].layers == ("exact-materialised",)
        return cell["batch_size"] * float(length * length if pairs else length)

    last = done[-1]
    if len(done) == 1:
        added = last["peak_bytes"] - last["base_bytes"]
        return last["base_bytes"] + added * extent(cell) / extent(last)
    before = done[-2]
    slope = (last["peak_bytes"] - before["peak_bytes"]) / (extent(last) - extent(before))
    return last["peak_bytes"] + max(slope, 0.0) * (extent(cell) - extent(last))


def _step(cell: Cell, before: list[Figures], settings: ConcatenatedSettings) -> Figures:
    done = [result for result in before if result["status"] == DONE]
    if len(done) < len(before):
        return {"status": before[-1]["status"], "reason": before[-1]["reason"]}
    if done:
        by = "batch_size" if cell["batch_size"] > done[-1]["batch_size"] else "length"
        points = [(result[by], result["seconds"]) for result in done]
        minutes = extrapolated(points, cell[by], unknown=1.0 if by == "batch_size" else 2.0) / 60
        if minutes > MAX_STEP_MINUTES:
            return {"status": SKIPPED, "reason": f"a step would take about {minutes:,.0f} minutes"}
    available = available_memory() if settings.device == "cpu" else None
    if done and available is not None:
        needed = continued(done, cell)
        if needed > 0.9 * available:
            reason = f"would need about {needed / GIB:,.1f} GiB of memory, {available / GIB:,.1f} GiB are available"
            return {"status": SKIPPED, "reason": reason}
    return run_step("memory", cell, MAX_STEP_MINUTES)


def _train(settings: ConcatenatedSettings, experiment: Experiment, proteins: Proteins) -> list[Figures]:
    """Trains Performer, the largest rival that fits and the others, each for as many steps as the time allows."""
    sizes: list[tuple[str, dict[str, int]]] = [(PERFORMER, settings.size)]
    for size in (settings.size, *settings.shrunk):
        weight = _weigh(settings, experiment, RIVAL, settings.batch_size, "none", "float32", size)
        if weight["peak_bytes"] is not None and weight["peak_bytes"] <= settings.cap * GIB:
            if weight["how"] == "extrapolated":
                continue  # it would fit, but not this machine
            sizes.append((RIVAL, size))
            break
    else:
        experiment.notes.append(
            f"No {SYSTEMS[RIVAL].title} fits {settings.cap:g} GiB on this machine, so none was trained."
        )
    sizes += [(system, settings.size) for system in settings.others]
    contestants: list[Figures] = []
    for system, size in sizes:
        recipe = replace(settings.recipe, **size)
        speed = experiment.measure(
            [speed_cell(recipe, proteins, system, "mlm")],
            lambda cell, before: measure_speed(cell, proteins),
            name=lambda cell: f"speed of {SYSTEMS[cell['system']].title}",
            result=lambda figures: f"{figures['seconds_per_step']:.3f} s a step",
        )[0]
        if speed["status"] != DONE:
            continue
        per_step = speed["seconds_per_step"]
        steps = max(1, round(60 * settings.minutes / per_step))
        runs = experiment.measure(
            [
                run_cell(
                    recipe,
                    proteins,
                    system,
                    "mlm",
                    steps=steps,
                    learning_rate=settings.learning_rate,
                    seed=seed,
                    score_on=tuple(proteins.tests),
                    score_proteins=settings.score_proteins,
                )
                for seed in settings.seeds
            ],
            lambda cell, before: train(cell, experiment.log, proteins),
            name=lambda cell: f"{SYSTEMS[cell['system']].title} for {settings.minutes:g} minutes, seed {cell['seed']}",
            result=lambda figures: f"accuracy {figures['scores']['validation']['accuracy']:.4f}",
        )
        curves = [
            [{**point, "minutes": point["step"] * per_step / 60} for point in run["curve"]]
            for run in runs
            if run["status"] == DONE
        ]
        scores = [run["scores"] for run in runs if run["status"] == DONE]
        contestants.append(
            {
                "system": system,
                "size": size,
                "steps": steps,
                "seconds_per_step": per_step,
                "parameters": speed["parameters"],
                "curves": curves,
                "scores": scores,
            }
        )
    return contestants


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    settings = report["settings"]
    cap = settings["cap"] * GIB
    header = ["system", "batch", "recomputation", *DTYPES]
    rows: list[list[str]] = []
    for system, batch_size in settings["weighed"]:
        for recomputation in settings["recomputations"]:
            line = {
                row["dtype"]: row
                for row in report["memory"]
                if (row["system"], row["batch_size"], row["recomputation"]) == (system, batch_size, recomputation)
            }
            rows.append(
                [
                    SYSTEMS[system].title,
                    str(batch_size),
                    recomputation,
                    *(_weight(line[dtype], cap) for dtype in DTYPES),
                ]
            )
    title = (
        f"Peak GiB of a training step at {settings['context']:,} tokens, {shape(settings['size'])}, against "
        f"{settings['cap']:g} GiB (~ extrapolated)"
    )
    found = [(title, header, rows)]
    if report["contestants"]:
        rows = [
            [
                SYSTEMS[row["system"]].title,
                shape(row["size"]),
                f"{row['parameters']:,}",
                f"{row['steps']:,}",
                f"{row['seconds_per_step']:.3f}",
                *(_final(row, name) for name in ("accuracy", "perplexity")),
                f"{row['scores'][0]['validation']['baseline_accuracy']:.4f}" if row["scores"] else "",
                ", ".join(_gain(scores["validation"]) for scores in row["scores"]),
            ]
            for row in report["contestants"]
        ]
        header = [
            "system",
            "size",
            "parameters",
            "steps",
            "seconds a step",
            "accuracy",
            "perplexity",
            "unigram accuracy",
            "above unigram (95 %)",
        ]
        title = (
            f"{settings['minutes']:g} minutes of training at batch {settings['batch_size']}: validation proteins, each read "
            "alone, on [MASK] only"
        )
        found.append((title, header, rows))
    return found


def _final(row: Figures, name: str) -> str:
    values = [scores["validation"][name] for scores in row["scores"]]
    return ", ".join(f"{value:.4f}" for value in values) or "diverged"


def _gain(scores: Figures) -> str:
    """What accuracy is above the unigram baseline's on the same residues, with its interval over proteins."""
    low, high = scores["accuracy_gain_interval"]
    return f"{scores['accuracy_gain']:+.4f} ({low:+.4f} to {high:+.4f})"


def _weight(row: Figures, cap: float) -> str:
    if row["peak_bytes"] is None:
        return row["how"]
    mark = "~" if row["how"] == "extrapolated" else ""
    return f"{mark}{row['peak_bytes'] / GIB:.2f} ({'fits' if row['peak_bytes'] <= cap else 'does not fit'})"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws validation accuracy over the minutes of training, a line for each run."""
    if not any(row["curves"] for row in report["contestants"]):
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for row in report["contestants"]:
        for number, curve in enumerate(row["curves"]):
            label = f"{SYSTEMS[row['system']].title} {shape(row['size'])}" if number == 0 else None
            points = [(point["minutes"], point["accuracy"]) for point in curve]
            axes.plot(*zip(*points, strict=True), "o-", color=SYSTEMS[row["system"]].colour, markersize=3, label=label)
    curve = next(row["curves"][0] for row in report["contestants"] if row["curves"])
    axes.axhline(curve[-1]["baseline_accuracy"], color="black", linestyle=":", linewidth=1, label="unigram")
    quick = " (quick settings)" if report["quick"] else ""
    axes.set(
        xlabel="minutes of training",
        ylabel="accuracy on [MASK]",
        title=f"Contexts of {report['settings']['context']:,} joined tokens{quick}",
    )
    axes.legend(frameon=False, fontsize="small")
    path = folder / "concatenated.png"
    figure.savefig(path)
    return [path]
