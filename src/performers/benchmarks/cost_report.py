"""The report of `performers benchmark cost` for people: the sizes of its models as papers write them, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from performers.benchmarks.energy import JOULES_PER_KWH
from performers.benchmarks.experiment import DONE, Figures, logarithmic_axes, short_length
from performers.benchmarks.systems import SYSTEMS
from performers.errors import InputError

SIZES: dict[str, dict[str, int]] = {
    "regular": {"heads": 8, "layers": 6, "d_ff": 2048, "d": 512},
    "small": {"heads": 1, "layers": 6, "d_ff": 64, "d": 64},
}
PARTS = {"layer": "one layer", "model": "whole model"}
GIB = 2**30


def shape(size: dict[str, int]) -> str:
    """A size as the papers write it."""
    return f"({size['heads']}, {size['layers']}, {size['d_ff']}, {size['d']})"


def size_of(numbers: Sequence[int]) -> dict[str, int]:
    """A size from what `shape` writes: heads, layers, d_ff and d.

    Raises:
        InputError: there are not four positive numbers, or the heads cannot share d.
    """
    given = f"--size {','.join(str(number) for number in numbers)}".strip()
    if len(numbers) != 4 or min(numbers) < 1:
        raise InputError(f"{given}: expected four positive numbers, with commas: heads, layers, d_ff, d.")
    heads, layers, d_ff, d = numbers
    if d % (2 * heads):
        raise InputError(
            f"{given}: expected d to be a multiple of twice the heads, so that every head has an even size."
        )
    return {"heads": heads, "layers": layers, "d_ff": d_ff, "d": d}


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    settings = report["settings"]
    found: list[tuple[str, list[str], list[list[str]]]] = []
    lengths = sorted(set(settings["lengths"]))
    grids = {"time": "Seconds", "memory": "Peak GiB of the whole process"}
    for measure, words in grids.items():
        for size in settings["sizes"]:
            for part in settings["parts"]:
                for recomputation in settings["recomputations"]:
                    key = (measure, size, part, recomputation)
                    cells = {
                        (cell["system"], cell["length"]): cell
                        for cell in report["cells"]
                        if (cell["measure"], cell["size_name"], cell["part"], cell["recomputation"]) == key
                    }
                    rows = [
                        [SYSTEMS[system].title, *(_entry(cells.get((system, length))) for length in lengths)]
                        for system in settings["systems"]
                        if any(name == system for name, _ in cells)
                    ]
                    title = f"{words}, forward and backward, {PARTS[part]} {shape(SIZES[size])}, recomputation: {recomputation}"
                    found.append((title, ["system", *(f"L {length:,}" for length in lengths)], rows))
    if report["longest"]:
        caps = settings["caps"]
        compared = any(row["times_materialised"] is not None for row in report["longest"])
        rows: list[list[str]] = []
        for _, group in groupby(report["longest"], key=lambda row: (row["size"], row["recomputation"], row["system"])):
            line = list(group)
            first = line[0]
            fits = [_fits(row) for row in line]
            times = [", ".join(_times(row) for row in line)] if compared else []
            title = SYSTEMS[first["system"]].title
            rows.append([title, shape(SIZES[first["size"]]), first["recomputation"], *fits, *times])
        header = ["system", "size", "recomputation", *(f"{cap:g} GiB" for cap in caps)]
        if compared:
            header.append(f"times the materialised Transformer, at {', '.join(f'{cap:g}' for cap in caps)} GiB")
        found.append(("The longest power of two that fits, batch 1 (~ extrapolated)", header, rows))
    energy = [cell for cell in report["cells"] if cell["measure"] == "energy" and cell["status"] == DONE]
    if energy:
        grams = settings["grams_per_kwh"]
        rows = [
            [
                SYSTEMS[cell["system"]].title,
                shape(cell["size"]),
                f"{cell['joules_per_million_tokens'] / 1e3:,.1f}",
                f"{cell['joules_per_million_tokens'] / JOULES_PER_KWH * grams:,.2f}",
                cell["source"],
            ]
            for cell in energy
        ]
        title = (
            f"Training a million tokens at L {settings['energy_length']:,}, at {grams:g} g of CO2 equivalent per kWh"
        )
        found.append((title, ["system", "size", "kJ", "g CO2e", "energy is"], rows))
    return found


def _entry(cell: Figures | None) -> str:
    if cell is None:
        return ""
    if cell["status"] != DONE:
        return cell["status"]
    return f"{cell['peak_bytes'] / GIB:.2f}" if cell["measure"] == "memory" else f"{cell['seconds']:.3g}"


def _fits(row: Figures) -> str:
    if row["longest"] is None:
        return "none" if row["how"] == "measured" else row["how"]
    return f"{'~' if row['how'] == 'extrapolated' else ''}{row['longest']:,}"


def _times(row: Figures) -> str:
    if row["times_materialised"] is None:
        return "not known"
    return f"{'~' if row['times_how'] == 'extrapolated' else ''}{row['times_materialised']:g}"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws time and memory against the length, both logarithmic: a PNG for each size, part and recomputation."""
    from matplotlib.figure import Figure

    settings, paths = report["settings"], []
    shown = sorted(set(settings["lengths"]))
    for size in settings["sizes"]:
        for part in settings["parts"]:
            for recomputation in settings["recomputations"]:
                figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
                for axes, measure in zip(figure.subplots(1, 2), ("time", "memory"), strict=True):
                    for system in settings["systems"]:
                        points = [
                            (cell["length"], cell["seconds"] if measure == "time" else cell["peak_bytes"] / GIB)
                            for cell in report["cells"]
                            if (cell["measure"], cell["size_name"], cell["part"]) == (measure, size, part)
                            and (cell["system"], cell["recomputation"]) == (system, recomputation)
                            and cell["status"] == DONE
                            and cell["length"] <= shown[-1]
                        ]
                        if points:
                            style = "o--" if system == "identity" else "o-"
                            kind = {"color": SYSTEMS[system].colour, "markersize": 3, "linewidth": 1.2}
                            label = SYSTEMS[system].title if measure == "time" else None
                            axes.plot(*zip(*points, strict=True), style, label=label, **kind)
                    logarithmic_axes(axes, shown, [short_length(length) for length in shown])
                    axes.set(
                        xlabel="sequence length (tokens)",
                        ylabel="seconds" if measure == "time" else "peak memory of the process (GiB)",
                    )
                quick = " (quick settings)" if report["quick"] else ""
                figure.suptitle(
                    f"Forward and backward, {PARTS[part]} {shape(SIZES[size])}, batch 1, {settings['dtype']}, "
                    f"recomputation: {recomputation}{quick}",
                    fontsize=8,
                )
                figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
                path = folder / f"cost-{size}-{part}-{recomputation}.png"
                figure.savefig(path)
                paths.append(path)
    return paths
