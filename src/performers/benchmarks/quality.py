"""Which system predicts residues best: the same model, the same proteins, the same tuning, at equal steps and at equal wall time.

Every system gets the same learning rates to try and as many seeds as the others. Then it is scored on proteins that were held out
at random (their relatives are in training), by sequence cluster and by family, on [MASK] only, beside the unigram baseline of the
very residues scored. Equal wall time is the time that the Transformer takes for its steps, or without a Transformer the first
system asked for that could be timed; the others get the steps that they take in it, with a schedule of that length. The order in
2009.14794 (section 4.3: Performer-relu no worse than the Transformer, which is better than Reformer, in distribution) is
confirmed, refuted or undecided by the intervals over seeds, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from performers.benchmarks.comparison import (
    MEANINGFUL_GAIN,
    OBJECTIVES,
    SETS,
    ComparisonSettings,
    Proteins,
    Spread,
    Verdict,
    all_of,
    check_choices,
    is_above,
    measure_speed,
    recipe_and_rest,
    run_cell,
    speed_cell,
    train,
)
from performers.benchmarks.experiment import DIVERGED, DONE, Cell, Experiment, Figures
from performers.benchmarks.systems import LEARNERS, SYSTEMS
from performers.errors import InputError

BUDGETS = {"steps": "equal steps", "time": "equal wall time"}
# 2009.14794, section 4.3 and table 2: of each pair the first is claimed to be no worse, or better, in distribution.
CLAIM = (("performer-relu", "transformer"), ("transformer", "reformer"))
CLAIM_TEXT = "Performer-relu >= Transformer > Reformer"
_REFERENCE = "transformer"


@dataclass(frozen=True)
class QualitySettings(ComparisonSettings):
    """What `measure_quality` measures, beside what all comparisons have.

    Attributes:
        systems: names in `SYSTEMS`.
        objectives: "mlm", "clm".
        budgets: "steps", "time".
        steps: of a run, at equal steps.
        learning_rates: that each system tries.
        trial_steps: of a trial.

    Trials have a seed of their own, made of `seed`.
    """

    systems: Sequence[str] = LEARNERS
    objectives: Sequence[str] = ("mlm", "clm")
    budgets: Sequence[str] = ("steps", "time")
    steps: int = 1000
    learning_rates: Sequence[float] = (2e-3, 4e-3, 8e-3)
    trial_steps: int = 200

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> QualitySettings:
        """The full or the quick settings, with what was given in their place; `Recipe`'s keys go into the recipe.

        Raises:
            InputError: a name or a number that is not in order.
        """
        defaults: dict[str, Any] = {}
        if quick:
            defaults = {"systems": ("transformer", "performer-relu", "reformer"), "objectives": ("mlm",), "steps": 40}
            defaults |= {"learning_rates": (1e-3, 3e-3), "trial_steps": 10, "score_proteins": 20, "held_out": 20}
        settings = cls(**recipe_and_rest(quick, defaults, given))
        for option, values, known in (
            ("--system", settings.systems, LEARNERS),
            ("--objective", settings.objectives, tuple(OBJECTIVES)),
            ("--budget", settings.budgets, tuple(BUDGETS)),
        ):
            check_choices(option, values, known)
        if not settings.learning_rates:
            raise InputError("--learning-rate: expected at least one.")
        return settings


def measure_quality(
    settings: QualitySettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Trains and scores whatever the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `quality.json`, pictures, `run.json`, the proteins, the runs and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: train again what the folder holds.

    Returns:
        The report: a cell for every timing, trial and run; "chosen", the learning rate and steps of every system; "scores", mean
        and spread over the seeds; and "verdicts" on the paper's order.

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    arguments = asdict(settings)
    with Experiment("quality", arguments, output, quick=quick, restart=restart) as experiment:
        proteins = settings.proteins(experiment.log.folder)
        chosen = _choose(settings, proteins, experiment)
        runs = [
            _run(settings, proteins, choice["system"], choice["objective"], steps, choice["learning_rate"], seed)
            for choice in chosen
            for steps in dict.fromkeys(choice["budgets"].values())
            for seed in settings.seeds
        ]
        experiment.measure(
            runs,
            lambda cell, before: train(cell, experiment.log, proteins),
            name=name_of_run,
            result=lambda figures: _shown(figures["scores"]),
            weight=lambda cell: cell["steps"],
        )
        scores = collect(chosen, experiment.results, tuple(proteins.tests))
        return experiment.report(draw, chosen=chosen, scores=scores, verdicts=verdicts(scores))


def _run(
    settings: QualitySettings, proteins: Proteins, system: str, objective: str, steps: int, rate: float, seed: int
) -> Cell:
    return run_cell(
        settings.recipe,
        proteins,
        system,
        objective,
        steps=steps,
        learning_rate=rate,
        seed=seed,
        score_on=tuple(proteins.tests),
        score_proteins=settings.score_proteins,
    )


def _choose(settings: QualitySettings, proteins: Proteins, experiment: Experiment) -> list[Figures]:
    """For each system and objective the steps of each budget, and the learning rate with the lowest validation perplexity."""
    pairs = [(system, objective) for objective in settings.objectives for system in settings.systems]
    speeds = experiment.measure(
        [speed_cell(settings.recipe, proteins, *pair) for pair in pairs],
        lambda cell, before: measure_speed(cell, proteins),
        name=lambda cell: f"speed of {SYSTEMS[cell['system']].title}, {OBJECTIVES[cell['objective']]}",
        result=lambda figures: f"{figures['seconds_per_step']:.3f} s a step",
    )
    per_step = {
        (cell["system"], cell["objective"]): float(cell["seconds_per_step"])
        for cell in speeds
        if cell["status"] == DONE
    }
    trials = experiment.measure(
        [
            run_cell(
                settings.recipe,
                proteins,
                *pair,
                steps=settings.trial_steps,
                learning_rate=rate,
                seed=settings.seed,
                score_on=(),
                score_proteins=settings.score_proteins,
                points=1,
            )
            | {"part": "trial"}
            for pair in pairs
            if pair in per_step
            for rate in settings.learning_rates
        ],
        lambda cell, before: train(cell, experiment.log, proteins),
        name=lambda cell: f"trial of {name_of_run(cell)}",
        result=lambda figures: _shown(figures["scores"]),
    )
    references = {objective: _reference(settings, per_step, objective) for _, objective in per_step}
    for objective, reference in references.items() if "time" in settings.budgets else ():
        if reference != _REFERENCE:
            experiment.notes.append(
                f"{OBJECTIVES[objective]}: the Transformer was not timed; {BUDGETS['time']} is the time that "
                f"{SYSTEMS[reference].title} takes for its steps."
            )
    chosen: list[Figures] = []
    for system, objective in pairs:
        mine = [cell for cell in trials if (cell["system"], cell["objective"]) == (system, objective)]
        done = [cell for cell in mine if cell["status"] == DONE]
        if not done:
            continue
        best = min(done, key=lambda cell: cell["scores"]["validation"]["perplexity"])
        ratio = per_step[references[objective], objective] / per_step[system, objective]
        steps = {"steps": settings.steps, "time": max(1, round(settings.steps * ratio))}
        chosen.append(
            {
                "system": system,
                "objective": objective,
                "learning_rate": best["learning_rate"],
                "seconds_per_step": per_step[system, objective],
                "budgets": {budget: steps[budget] for budget in settings.budgets},
            }
        )
    return chosen


def _reference(settings: QualitySettings, per_step: dict[tuple[str, str], float], objective: str) -> str:
    """Whose steps say how long equal wall time is: the Transformer's, or those of the first system that could be timed."""
    return next(system for system in (_REFERENCE, *settings.systems) if (system, objective) in per_step)


def name_of_run(cell: Cell) -> str:
    """A run, for people."""
    return (
        f"{SYSTEMS[cell['system']].title}, {OBJECTIVES[cell['objective']]}, {cell['steps']:,} steps, "
        f"rate {cell['learning_rate']:g}, seed {cell['seed']}"
    )


def _shown(scores: dict[str, Figures]) -> str:
    return ", ".join(f"{name} {figures['accuracy']:.4f}" for name, figures in scores.items())


def collect(chosen: list[Figures], cells: list[Figures], sets: Sequence[str]) -> list[Figures]:
    """The mean and spread over the seeds of every system, objective, budget and set.

    Returns:
        A row for each: system, objective, budget, set, steps, baseline (the accuracy of the commonest residue), diverged (how
        many of the runs did), and accuracy, gain (over the baseline) and perplexity, a `Spread` as a dictionary each.
    """
    rows: list[Figures] = []
    for choice in chosen:
        for budget, steps in choice["budgets"].items():
            runs = [
                cell
                for cell in cells
                if cell["part"] == "run"
                and (cell["system"], cell["objective"], cell["steps"]) == (choice["system"], choice["objective"], steps)
            ]
            done = [cell for cell in runs if cell["status"] == DONE]
            for name in sets if done else ():
                scores = [cell["scores"][name] for cell in done]
                rows.append(
                    {
                        "system": choice["system"],
                        "objective": choice["objective"],
                        "budget": budget,
                        "set": name,
                        "steps": steps,
                        "baseline": scores[0]["baseline_accuracy"],
                        "diverged": sum(cell["status"] == DIVERGED for cell in runs),
                        **{
                            figure: asdict(Spread.of(score[key] for score in scores))
                            for figure, key in (
                                ("accuracy", "accuracy"),
                                ("gain", "accuracy_gain"),
                                ("perplexity", "perplexity"),
                            )
                        },
                    }
                )
    return rows


def verdicts(scores: list[Figures]) -> list[Figures]:
    """What the accuracies say of the paper's order, for every objective, budget and set that has the systems of the claim.

    Returns:
        A row for each: objective, budget, set, links (the verdict on each pair of `CLAIM`), verdict (on all of it), learned
        (whether any system is two points above the unigram baseline), and text, a plain sentence.
    """
    found: list[Figures] = []
    for objective, budget, name in dict.fromkeys((row["objective"], row["budget"], row["set"]) for row in scores):
        rows = {
            row["system"]: row
            for row in scores
            if (row["objective"], row["budget"], row["set"]) == (objective, budget, name)
        }
        if not all(system in rows for pair in CLAIM for system in pair):
            continue
        accuracy = {system: Spread(**row["accuracy"]) for system, row in rows.items()}
        links: dict[str, Verdict] = {
            f"{better} above {worse}": is_above(accuracy[better], accuracy[worse]) for better, worse in CLAIM
        }
        verdict = all_of(links.values())
        learned = any(row["gain"]["mean"] >= MEANINGFUL_GAIN for row in rows.values())
        text = f"{OBJECTIVES[objective]}, {BUDGETS[budget]}, {SETS[name]}: {CLAIM_TEXT} is {verdict}"
        text += " (" + "; ".join(f"{pair}: {link}" for pair, link in links.items()) + ")."
        if not learned:
            text += " No system is two points above the unigram baseline here, so no order means much."
        found.append(
            {
                "objective": objective,
                "budget": budget,
                "set": name,
                "links": links,
                "verdict": verdict,
                "learned": learned,
                "text": text,
            }
        )
    return found


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    found: list[tuple[str, list[str], list[list[str]]]] = [
        (
            "Chosen for each system on the validation set, from as many trials",
            ["objective", "system", "learning rate", "seconds a step", *(f"steps at {BUDGETS[b]}" for b in BUDGETS)],
            [
                [
                    OBJECTIVES[row["objective"]],
                    SYSTEMS[row["system"]].title,
                    f"{row['learning_rate']:g}",
                    f"{row['seconds_per_step']:.3f}",
                    *(f"{row['budgets'][budget]:,}" if budget in row["budgets"] else "" for budget in BUDGETS),
                ]
                for row in report["chosen"]
            ],
        )
    ]
    scores = report["scores"]
    sets = list(dict.fromkeys(row["set"] for row in scores))
    for objective, budget in dict.fromkeys((row["objective"], row["budget"]) for row in scores):
        rows: list[list[str]] = []
        here = [row for row in scores if (row["objective"], row["budget"]) == (objective, budget)]
        baselines = {row["set"]: row["baseline"] for row in here}
        for system in dict.fromkeys(row["system"] for row in here):
            mine = {row["set"]: row for row in here if row["system"] == system}
            cells = [_mean(mine[name]["accuracy"]) for name in sets]
            diverged = mine[sets[0]]["diverged"]
            title = SYSTEMS[system].title + (f" ({diverged} diverged)" if diverged else "")
            rows.append([title, f"{mine[sets[0]]['steps']:,}", *cells])
        rows.append(["unigram", "", *(f"{baselines[name]:.4f}" for name in sets)])
        seeds = len(report["settings"]["seeds"])
        scored = "on [MASK] only" if objective == "mlm" else "of the next residue"
        title = f"Accuracy {scored}, {OBJECTIVES[objective]}, {BUDGETS[budget]}: mean and deviation of {seeds} seeds"
        found.append((title, ["system", "steps", *(SETS[name] for name in sets)], rows))
    if report["verdicts"]:
        found.append((f"{CLAIM_TEXT}?", ["verdict"], [[row["text"]] for row in report["verdicts"]]))
    return found


def _mean(spread: dict[str, Any]) -> str:
    return f"{spread['mean']:.4f} ± {spread['deviation']:.4f}"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws every system's accuracy with its interval, a PNG for each objective and budget."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    scores, paths = report["scores"], []
    for objective, budget in dict.fromkeys((row["objective"], row["budget"]) for row in scores):
        here = [row for row in scores if (row["objective"], row["budget"]) == (objective, budget)]
        sets = list(dict.fromkeys(row["set"] for row in here))
        systems = list(dict.fromkeys(row["system"] for row in here))
        figure = Figure(figsize=(3.2 * len(sets) + 1.5, 0.42 * len(systems) + 1.4), dpi=100, layout="constrained")
        for axes, name in zip(figure.subplots(1, len(sets), squeeze=False, sharey=True)[0], sets, strict=True):
            for place, system in enumerate(reversed(systems)):
                row = next(row for row in here if (row["set"], row["system"]) == (name, system))
                spread = row["accuracy"]
                colour = SYSTEMS[system].colour
                axes.plot(spread["values"], [place] * len(spread["values"]), ".", color=colour, markersize=4)
                if spread["low"] is not None and spread["high"] is not None:
                    width = [[spread["mean"] - spread["low"]], [spread["high"] - spread["mean"]]]
                    axes.errorbar([spread["mean"]], [place], xerr=width, fmt="|", color=colour, capsize=3)
            axes.axvline(next(row["baseline"] for row in here if row["set"] == name), color="black", linestyle=":")
            axes.set_title(SETS[name], fontsize=8)
            axes.set_yticks(range(len(systems)), [SYSTEMS[system].title for system in reversed(systems)])
            axes.set_xlabel("accuracy", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        quick = " (quick settings)" if report["quick"] else ""
        figure.suptitle(
            f"{OBJECTIVES[objective]}, {BUDGETS[budget]}; bars: 95 % intervals over seeds; dotted: unigram{quick}",
            fontsize=8,
        )
        path = folder / f"quality-{objective}-{budget}.png"
        figure.savefig(path)
        paths.append(path)
    return paths
