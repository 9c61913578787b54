"""Does drawing the random features anew during training help? The softmax Performer with and without it, several seeds of each.

2009.14794 (sections 4.2 and D.2) redraws now and then, so that a model does not come to depend on one draw. Every seed trains
twice: with features redrawn every so many steps, and with those it began with. The same masks, order and weights otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from performers.benchmarks.comparison import (
    CONFIRMED,
    OBJECTIVES,
    REFUTED,
    SETS,
    ComparisonSettings,
    Spread,
    is_above,
    recipe_and_rest,
    run_cell,
    train,
)
from performers.benchmarks.experiment import DIVERGED, DONE, Experiment, Figures
from performers.errors import InputError

SYSTEM = "performer-softmax"


@dataclass(frozen=True)
class RedrawSettings(ComparisonSettings):
    """What `measure_redraw` measures, beside what all comparisons have.

    Attributes:
        intervals: steps between redraws; 0 is never and has to be among them.
        objective: "mlm" or "clm".
        steps, learning_rate: of a run.
    """

    intervals: Sequence[int] = (0, 20, 100)
    objective: str = "mlm"
    steps: int = 1000
    learning_rate: float = 4e-3

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> RedrawSettings:
        """The full or the quick settings, with what was given in their place; `Recipe`'s keys go into the recipe.

        Raises:
            InputError: a number that is not in order.
        """
        defaults: dict[str, Any] = {}
        if quick:
            defaults = {"intervals": (0, 10), "steps": 40, "score_proteins": 20, "held_out": 20}
        settings = cls(**recipe_and_rest(quick, defaults, given))
        if 0 not in settings.intervals or len(set(settings.intervals)) < 2 or min(settings.intervals) < 0:
            raise InputError("--redraw-every: expected 0, for never, and at least one positive number of steps.")
        return settings


def measure_redraw(
    settings: RedrawSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Trains and scores whatever the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `redraw.json`, the picture, `run.json`, the proteins, the runs and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: train again what the folder holds.

    Returns:
        The report: a cell for every run; "scores", mean and spread over the seeds; and "verdicts".

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    with Experiment("redraw", asdict(settings), output, quick=quick, restart=restart) as experiment:
        proteins = settings.proteins(experiment.log.folder)
        cells = [
            run_cell(
                settings.recipe,
                proteins,
                SYSTEM,
                settings.objective,
                steps=settings.steps,
                learning_rate=settings.learning_rate,
                seed=seed,
                redraw_every=interval,
                score_on=tuple(proteins.tests),
                score_proteins=settings.score_proteins,
            )
            for seed in settings.seeds
            for interval in settings.intervals
        ]
        results = experiment.measure(
            cells,
            lambda cell, before: train(cell, experiment.log, proteins),
            name=lambda cell: f"{named(cell['redraw_every'])}, seed {cell['seed']}",
            result=lambda figures: f"perplexity {figures['scores']['validation']['perplexity']:.3f}",
        )
        scores = collect(results)
        return experiment.report(draw, scores=scores, verdicts=verdicts(scores))


def named(interval: int) -> str:
    """An interval, for people."""
    return f"redrawn every {interval:,} steps" if interval else "never redrawn"


def collect(results: list[Figures]) -> list[Figures]:
    """Mean and spread over the seeds.

    Returns:
        A row for every interval and set: interval, set, baseline, diverged (how many of the runs did), and accuracy and
        perplexity, a `Spread` as a dictionary each.
    """
    rows: list[Figures] = []
    for interval in dict.fromkeys(cell["redraw_every"] for cell in results):
        runs = [cell for cell in results if cell["redraw_every"] == interval]
        done = [cell for cell in runs if cell["status"] == DONE]
        for name in done[0]["scores"] if done else ():
            rows.append(
                {
                    "interval": interval,
                    "set": name,
                    "baseline": done[0]["scores"][name]["baseline_accuracy"],
                    "diverged": sum(cell["status"] == DIVERGED for cell in runs),
                    **{
                        figure: asdict(Spread.of(cell["scores"][name][figure] for cell in done))
                        for figure in ("accuracy", "perplexity")
                    },
                }
            )
    return rows


def verdicts(scores: list[Figures]) -> list[Figures]:
    """Whether redrawing helps, for every interval and set: interval, set, verdict on "redrawing lowers perplexity", and text."""
    found: list[Figures] = []
    never = {row["set"]: row for row in scores if row["interval"] == 0}
    for row in scores:
        if row["interval"] and row["set"] in never:
            verdict = is_above(Spread(**never[row["set"]]["perplexity"]), Spread(**row["perplexity"]))
            outcome = {CONFIRMED: "helps", REFUTED: "hurts"}.get(verdict, "makes no difference that can be told")
            text = f"{SETS[row['set']]}: features {named(row['interval'])}: redrawing {outcome} (perplexity)."
            found.append({"interval": row["interval"], "set": row["set"], "verdict": verdict, "text": text})
    return found


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    settings, scores = report["settings"], report["scores"]
    found: list[tuple[str, list[str], list[list[str]]]] = []
    for figure in ("perplexity", "accuracy"):
        rows = [
            [
                SETS[row["set"]],
                named(row["interval"]) + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
                f"{row[figure]['mean']:.4f} ± {row[figure]['deviation']:.4f}",
            ]
            for row in sorted(scores, key=lambda row: list(SETS).index(row["set"]))
        ]
        title = (
            f"{figure.capitalize()}, {OBJECTIVES[settings['objective']]}, {settings['steps']:,} steps: mean and deviation of "
            f"{len(settings['seeds'])} seeds"
        )
        found.append((title, ["set", "features", figure], rows))
    found.append(("Does redrawing help?", ["verdict"], [[row["text"]] for row in report["verdicts"]]))
    return found


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the validation perplexity during training, a thin line for each seed, and their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    colours = ("#d1495b", "#0b3c5d", "#5fa8d3", "#2e7d4f", "#7a5195")
    for place, interval in enumerate(report["settings"]["intervals"]):
        cells = [cell for cell in report["cells"] if cell["redraw_every"] == interval and cell["status"] == DONE]
        colour = colours[place % len(colours)]
        for cell in cells:
            points = [(point["step"], point["perplexity"]) for point in cell["curve"]]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.6, alpha=0.5)
        if cells:
            steps = [point["step"] for point in cells[0]["curve"]]
            columns = zip(*([point["perplexity"] for point in cell["curve"]] for cell in cells), strict=True)
            means = [sum(column) / len(column) for column in columns]
            axes.plot(steps, means, "o-", color=colour, markersize=3, label=named(interval))
    quick = " (quick settings)" if report["quick"] else ""
    axes.set(xlabel="optimizer step", ylabel="validation perplexity", title=f"Redrawing softmax features{quick}")
    axes.legend(frameon=False, fontsize="small")
    path = folder / "redraw.png"
    figure.savefig(path)
    return [path]
