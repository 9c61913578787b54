"""What a step of training costs: time, peak memory and energy against the length, for every system in the same model.

Time and memory are of a forward and a backward pass, of one layer and of the whole masked (or causal) model, at the sizes of
2009.14794 (figure 3): (8, 6, 2048, 512) and (1, 6, 64, 64) heads, layers, d_ff and d. "identity" returns the values as they are:
what the model costs without attention. Every figure is of a process of its own. Memory is the largest that the whole process
takes, weights, libraries and all, as a limit on a process would count it; from it follows the longest power of two that fits 4, 8
and 16 GiB. Where this machine has not that much memory, or a pass would take too long, the last two lengths are continued, and
the figure is called extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from performers.benchmarks.comparison import OBJECTIVES, check_choices
from performers.benchmarks.cost_report import GIB, PARTS, SIZES, draw, shape
from performers.benchmarks.experiment import (
    DONE,
    FAILED,
    NO_ROOM,
    SKIPPED,
    UNAVAILABLE,
    Cell,
    Experiment,
    Figures,
    extrapolated,
)
from performers.benchmarks.isolation import RETURN_FREED_MEMORY, available_memory, run_alone, was_killed
from performers.benchmarks.systems import SYSTEMS
from performers.errors import InputError, RunError
from performers.training.runs import WORLD_AVERAGE

RECOMPUTATIONS = ("none", "layers", "reversible", "default")
_QUICK_SYSTEMS = ("transformer", "transformer-materialised", "performer-relu", "reformer", "identity")
_MATERIALISED = "transformer-materialised"
_QUADRATIC = ("transformer", _MATERIALISED)
_KEY = ("measure", "part", "size_name", "system", "recomputation")


@dataclass(frozen=True)
class CostSettings:
    """What `measure_cost` measures.

    Attributes:
        systems: names in `SYSTEMS`.
        sizes: names in `SIZES`.
        parts: "layer", "model".
        lengths: at which time and memory are shown.
        longest: the memory of a model is weighed at every power of two from the smallest of `lengths` to this, to find the
            longest that fits.
        caps: in GiB.
        recomputations: names in `RECOMPUTATIONS`, as in `performers.benchmarks.cost_cell`.
        energy_length: tokens of the context whose training energy is measured, with batches of one; None measures none.
        grams_per_kwh: carbon intensity, in grams of CO2 equivalent.
        objective, dtype, device, threads, seed, seconds: as in `performers.benchmarks.cost_cell`.
        max_minutes: a pass that would take longer is flagged, not run.
    """

    systems: Sequence[str] = tuple(name for name in SYSTEMS if name != "local")
    sizes: Sequence[str] = ("regular", "small")
    parts: Sequence[str] = ("layer", "model")
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16_384, 32_768)
    longest: int = 2**21
    caps: Sequence[float] = (4.0, 8.0, 16.0)
    recomputations: Sequence[str] = ("none",)
    energy_length: int | None = 1024
    grams_per_kwh: float = WORLD_AVERAGE
    objective: str = "mlm"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    seconds: float = 2.0
    max_minutes: float = 10.0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> CostSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: a name or a number that is not in order.
        """
        defaults: dict[str, Any] = {}
        if quick:
            defaults = {"sizes": ("small",), "lengths": (256, 1024), "longest": 2048, "energy_length": 256}
            defaults |= {"systems": _QUICK_SYSTEMS, "seconds": 0.05, "max_minutes": 1.0}
        settings = cls(**defaults | {key: value for key, value in given.items() if value is not None})
        for option, values, known in (
            ("--system", settings.systems, tuple(SYSTEMS)),
            ("--size", settings.sizes, tuple(SIZES)),
            ("--part", settings.parts, tuple(PARTS)),
            ("--recompute", settings.recomputations, RECOMPUTATIONS),
            ("--objective", (settings.objective,), tuple(OBJECTIVES)),
        ):
            check_choices(option, values, known)
        if not settings.lengths or min(settings.lengths) < 64:
            raise InputError(f"--length {min(settings.lengths, default='')}: expected at least 64 tokens.")
        if any(not 0 < cap < 1e6 for cap in settings.caps):
            raise InputError("--cap: expected positive numbers of GiB.")
        return settings


def measure_cost(
    settings: CostSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Measures every cell that the output folder does not hold yet, each in a process of its own, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `cost.json`, pictures, `run.json` and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report: a cell for every time, memory and energy, and "longest", the rows of `longest_lengths`.

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    with Experiment("cost", asdict(settings), output, quick=quick, restart=restart) as experiment:
        results = experiment.measure(
            grid(settings),
            lambda cell, before: _measure(cell, before, settings),
            name=name_of,
            result=_result,
            weight=lambda cell: 20_000.0 + cell["length"],  # to start the processes takes as long as so many tokens
        )
        return experiment.report(draw, longest=longest_lengths(results, settings.caps))


def grid(settings: CostSettings) -> list[Cell]:
    """All cells, shorter lengths first; systems that are compared next to one another."""
    common: Cell = {key: getattr(settings, key) for key in ("objective", "dtype", "device", "threads", "seed")}
    cells: list[Cell] = []

    def add(measure: str, part: str, size: str, recomputation: str, lengths: Sequence[int]) -> None:
        for length in sorted(set(lengths)):
            for system in settings.systems:
                if part == "layer" and SYSTEMS[system].is_hybrid:
                    continue  # its layers are those of two other systems
                cells.append(
                    {
                        "measure": measure,
                        "part": part,
                        "system": system,
                        "size_name": size,
                        "size": SIZES[size],
                        "recomputation": recomputation,
                        "optimizer": measure == "energy",
                        "length": length,
                        "batch_size": 1,
                        "seconds": 0.0 if measure == "memory" else settings.seconds,
                        **common,
                    }
                )

    for size in settings.sizes:
        for part in settings.parts:
            for recomputation in settings.recomputations:
                beyond = _doubled(min(settings.lengths), settings.longest) if part == "model" and settings.caps else []
                add("memory", part, size, recomputation, [*settings.lengths, *beyond])
                add("time", part, size, recomputation, settings.lengths)
        if settings.energy_length:
            add("energy", "model", size, settings.recomputations[0], [settings.energy_length])
    return cells


def _doubled(shortest: int, longest: int) -> list[int]:
    """The powers of two from one length to another."""
    return [2**power for power in range((shortest - 1).bit_length(), longest.bit_length())]


def run_step(measurement: str, cell: Cell, minutes: float) -> Figures:
    """A measurement of `performers.benchmarks.cost_cell` in a process of its own, whatever it comes to.

    Arguments:
        measurement: "memory", "time" or "energy".
        cell: what `cost_cell` wants.
        minutes: after which it is given up.
    """
    environment = RETURN_FREED_MEMORY if measurement == "memory" else None
    try:
        return run_alone(
            f"performers.benchmarks.cost_cell:step_{measurement}", environment=environment, timeout=60 * minutes, **cell
        )
    except InputError as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    except TimeoutError:
        return {"status": SKIPPED, "reason": f"not done in {minutes:g} minutes"}
    except RunError as error:
        if was_killed(error):
            return {"status": NO_ROOM, "reason": "the system ended its process"}
        return {"status": FAILED, "reason": str(error)}


def _measure(cell: Cell, before: list[Figures], settings: CostSettings) -> Figures:
    shorter = [result for result in before if all(result[key] == cell[key] for key in _KEY)]
    available = available_memory() if cell["device"] == "cpu" else None
    cap = max(settings.caps, default=0.0) * GIB if cell["measure"] == "memory" else None
    reason = why_not(cell, shorter, settings.max_minutes, available, cap)
    if reason is not None:
        return {"status": SKIPPED, "reason": reason}
    return run_step(cell["measure"], cell, settings.max_minutes)


def why_not(
    cell: Cell, shorter: list[Figures], max_minutes: float, available: int | None, cap: float | None
) -> str | None:
    """Why a length is not worth measuring, given the results of the same system at shorter ones; None if it is.

    Arguments:
        cell: with its length.
        shorter: results, shortest first.
        max_minutes: that a pass may take.
        available: bytes that the process may take, or None if that is not known.
        cap: bytes beyond which memory is of no interest, or None.
    """
    if not shorter:
        return None
    if shorter[-1]["status"] != DONE:
        return shorter[-1]["reason"]
    if cap and shorter[-1]["length"] > 32_768 and shorter[-1]["peak_bytes"] > cap:
        return "shorter lengths take more than the largest cap"
    power = 2.0 if cell["system"] in _QUADRATIC else 1.0
    minutes = extrapolated([(s["length"], s["seconds"]) for s in shorter], cell["length"], unknown=power) / 60
    if minutes > max_minutes:
        return f"a pass would take about {minutes:,.0f} minutes (--max-minutes {max_minutes:g})"
    if cell["measure"] == "memory":
        needed = _memory_at(shorter, cell["length"], power)
        if available is not None and needed > 0.9 * available:
            return f"would need about {needed / GIB:,.1f} GiB of memory, {available / GIB:,.1f} GiB are available"
    return None


def _memory_at(done: list[Figures], length: int, power: float) -> float:
    """The peak of a greater length: what a pass adds to the process grows, the rest does not."""
    added = [(cell["length"], max(cell["peak_bytes"] - cell["base_bytes"], 1)) for cell in done]
    return done[-1]["base_bytes"] + extrapolated(added, length, unknown=power)


def longest_lengths(cells: list[Figures], caps: Sequence[float]) -> list[Figures]:
    """What fits into each of the caps.

    Arguments:
        cells: of all measurements; lengths that are no powers of two are left out.
        caps: in GiB.

    Returns:
        A row for each size, recomputation, system and cap_gib, with longest and how, as `longest_that_fits` says; and
        times_materialised, how many times as long that is as what fits of the materialised Transformer at the same size,
        recomputation and cap, or None where that is not known, with times_how: "extrapolated" where either length is.
    """
    weighed = [
        cell
        for cell in cells
        if (cell["measure"], cell["part"]) == ("memory", "model") and cell["length"].bit_count() == 1
    ]
    rows: list[Figures] = []
    for group in _by_system(weighed):
        found = group.pop("cells")
        rows += [{**group, "cap_gib": cap, **longest_that_fits(found, cap * GIB)} for cap in caps]
    materialised = {
        (row["size"], row["recomputation"], row["cap_gib"]): row for row in rows if row["system"] == _MATERIALISED
    }
    for row in rows:
        row |= {"times_materialised": None, "times_how": "not measured"}
        base = materialised.get((row["size"], row["recomputation"], row["cap_gib"]))
        if base is not None and base["longest"] is not None and row["longest"] is not None:
            row["times_materialised"] = row["longest"] / base["longest"]
            row["times_how"] = "extrapolated" if "extrapolated" in (row["how"], base["how"]) else "measured"
    return rows


def longest_that_fits(cells: list[Figures], cap: float) -> Figures:
    """The longest of the doubled lengths whose peak is within a cap.

    Arguments:
        cells: of one system, rising in length.
        cap: bytes.

    Returns:
        longest, or None if not even the shortest length fits; and how, "measured" if the next length was seen not to fit, else
        "extrapolated".
    """
    done = [cell for cell in cells if cell["status"] == DONE]
    if not done:
        return {"longest": None, "how": "not measured"}
    fitting = [cell["length"] for cell in done if cell["peak_bytes"] <= cap]
    if len(fitting) < len(done):
        return {"longest": max(fitting, default=None), "how": "measured"}
    length = done[-1]["length"]
    power = 2.0 if done[-1]["system"] in _QUADRATIC else 1.0
    while _memory_at(done, length * 2, power) <= cap:
        length *= 2
    return {"longest": length, "how": "extrapolated"}


def _by_system(cells: list[Figures]) -> list[Figures]:
    """A row for each system, size and recomputation, with its cells by rising length."""
    groups: dict[tuple[str, str, str], list[Figures]] = {}
    for cell in cells:
        groups.setdefault((cell["size_name"], cell["recomputation"], cell["system"]), []).append(cell)
    return [
        {
            "size": size,
            "recomputation": recomputation,
            "system": system,
            "cells": sorted(found, key=lambda cell: cell["length"]),
        }
        for (size, recomputation, system), found in groups.items()
    ]


def name_of(cell: Cell) -> str:
    """A cell, for people."""
    what = f"{cell['measure']} of {SYSTEMS[cell['system']].title}, {PARTS[cell['part']]} {shape(cell['size'])}"
    return f"{what}, L {cell['length']:,}"


def _result(figures: Figures) -> str:
    if "peak_bytes" in figures and "base_bytes" in figures:
        return f"{figures['peak_bytes'] / GIB:.2f} GiB"
    if "joules_per_million_tokens" in figures:
        return f"{figures['joules_per_million_tokens'] / 1e3:,.1f} kJ per million tokens ({figures['source']})"
    return f"{figures['seconds']:.4g} s"
