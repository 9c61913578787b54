"""The report of `performers benchmark conversion` for people: tables, curves, and a line for each cell while it runs.

A report as `performers.benchmarks.conversion` writes it comes in; nothing is measured here, but shares of the original's quality
are taken, with their intervals, from what was counted in each sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from performers.benchmarks.conversion_figures import FIGURES, MAIN, kept, labels, recovered, shown
from performers.benchmarks.conversion_models import PACKAGES
from performers.benchmarks.experiment import DONE, Cell, Figures, logarithmic_axes

Table = tuple[str, list[str], list[list[str]]]
FLOOR = "no global attention"


def progress(figures: Figures) -> str:
    """What a cell came to, in a line."""
    if "speedup" in figures:
        return f"{figures['speedup']:.2f} times as fast, its attention {figures['attention_speedup']:.2f} times"
    if "points" in figures:
        last = figures["points"][-1]
        return f"{_first(last['figures'])} after {last['minutes']:.1f} minutes of training"
    if "converted" in figures:
        return f"{len(figures['converted'])} of {figures['of']} layers, {_first(figures['figures'])}"
    attention = f"error of attention outputs {figures['attention']:.3f}, " if "attention" in figures else ""
    return f"{attention}{_first(figures['figures'])}"


def _first(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shown(figure)}" for name, figure in list(figures.items())[:2])


def tables(report: dict[str, Any]) -> list[Table]:
    """The report as tables, those of one model after the other: a title, a header and rows."""
    done = [cell for cell in report["cells"] if cell["status"] == DONE]
    found: list[Table] = []
    for model in FIGURES:
        own = [cell for cell in done if cell["model"] == model]
        cells = {what: [cell for cell in own if cell["what"] == what] for what in ("quality", "layers", "speed")}
        if len(cells["quality"]) > 1:
            found.append(_quality(model, cells["quality"]))
        if cells["layers"]:
            found.append(_layers(model, cells["layers"], _original(own)))
        if cells["speed"]:
            found.append(_speed(model, cells["speed"]))
        curves = [cell for cell in own if cell["what"] == "distillation"]
        if curves:
            found.append(_curves(model, curves, own))
        if any(cell["what"] == "floor" for cell in own):
            found.append(_floors(model, own))
    return found


def _title(model: str) -> str:
    return f"{model} ({PACKAGES[model].name} {PACKAGES[model].version})"


def _quality(model: str, cells: list[Cell]) -> Table:
    names = labels(model)
    header = ["kernel", "M", "attention error", *names.values()]
    rows = [
        [
            cell["kernel"],
            "" if cell["num_features"] is None else str(cell["num_features"]),
            f"{cell['attention']:.3f}" if "attention" in cell else "",
            *(shown(cell["figures"][name]) for name in names),
        ]
        for cell in cells
    ]
    return f"{_title(model)}: all layers converted, without training", header, rows


def _layers(model: str, cells: list[Cell], original: Cell) -> Table:
    rows: list[list[str]] = []
    names = {name: figure.label for name, figure in FIGURES[model].items() if figure.is_quality}
    others = {name: label for name, label in labels(model).items() if name not in names}
    for cell in cells:
        share = kept(model, cell["columns"], original["columns"], cell["seed"])
        rows.append(
            [
                cell["kernel"],
                str(cell["num_features"]),
                f"{len(cell['converted'])} of {cell['of']}",
                f"{cell['measured']['error']:.3f}",
                *(shown(cell["figures"][name]) for name in others),
                *(shown(share[name], percent=True) for name in names),
            ]
        )
    header = ["kernel", "M", "layers converted", "error when chosen", *others.values()]
    header += [f"{label} kept" for label in names.values()]
    return f'{_title(model)}: layers="auto:{cells[0]["bound"]:g}", without training', header, rows


def _speed(model: str, cells: list[Cell]) -> Table:
    rows = [
        [
            f"{cell['length']:,}",
            f"{cell['before']['seconds']:.3g}",
            f"{cell['after']['seconds']:.3g}",
            f"{cell['speedup']:.2f}",
            f"{cell['before']['attention_seconds']:.3g}",
            f"{cell['after']['attention_seconds']:.3g}",
            f"{cell['attention_speedup']:.2f}",
            f"{cell['before']['peak_bytes'] / 2**20:,.0f} MiB",
            f"{cell['after']['peak_bytes'] / 2**20:,.0f} MiB",
        ]
        for cell in cells
    ]
    header = ["tokens", "seconds before", "after", "times faster", "one layer's attention before", "after"]
    header += ["times faster", "memory before", "after"]
    kernel, size = cells[0]["kernel"], cells[0]["num_features"]
    return f"{_title(model)}: a forward pass over one sequence ({kernel}, M {size})", header, rows


def _curves(model: str, cells: list[Cell], own: list[Cell]) -> Table:
    names = labels(model)
    floor = next((cell for cell in cells if cell["system"] == FLOOR), None)
    header = ["system", "step", "minutes", *names.values()]
    if floor is not None:
        header.append("recovered above the floor")
    rows: list[list[str]] = []
    for cell in cells:
        for point in cell["points"]:
            row = [cell["system"], f"{point['step']:,}", f"{point['minutes']:.1f}"]
            row += [shown(point["figures"][name]) for name in names]
            if floor is not None:
                share = None if cell is floor else recovered_at(point, cell, floor, _original(own))
                row.append("" if share is None else shown(share[MAIN[model]], percent=True))
            rows.append(row)
    first = cells[0]
    trained = f"{first['kernel']}, M {first['num_features']}; {first['batch_size']} sequences a step"
    return f"{_title(model)}: distilled, all layers converted ({trained})", header, rows


def recovered_at(point: Figures, cell: Cell, floor: Cell, original: Cell) -> dict[str, Any]:
    """The share of the original's quality above the floor that is recovered at a point, the floor as it is at the end."""
    columns = point["columns"], original["columns"], floor["points"][-1]["columns"]
    return recovered(cell["model"], *columns, cell["seed"])


def _floors(model: str, own: list[Cell]) -> Table:
    names = {name: figure.label for name, figure in FIGURES[model].items()}
    systems: list[tuple[str, dict[str, Any]]] = [("original", _original(own)["figures"])]
    for cell in own:
        if cell["what"] == "distillation":
            last = cell["points"][-1]
            systems.append((f"{cell['system']}, after {last['step']:,} steps", last["figures"]))
        if cell["what"] == "floor":
            systems.append((f"{cell['system']} (identity {cell['identity']:.2f})", cell["figures"]))
    rows = [[system, *(shown(figures[name]) for name in names)] for system, figures in systems]
    curves = {cell["system"]: cell for cell in own if cell["what"] == "distillation"}
    if FLOOR in curves:
        for system, cell in curves.items():
            if system != FLOOR:
                share = recovered_at(cell["points"][-1], cell, curves[FLOOR], _original(own))
                rows.append(
                    [f"{system}: recovered above {FLOOR}", *(shown(share[name], percent=True) for name in names)]
                )
    title = f"{_title(model)}: beside the floors, share of masked residues found (95 % bootstrap interval over domains)"
    return title, ["system", *names.values()], rows


def _original(own: list[Cell]) -> Cell:
    return next(cell for cell in own if cell["what"] == "quality" and cell["kernel"] == "exact")


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws errors against M, and quality against steps of distillation, a column for each model."""
    done = [cell for cell in report["cells"] if cell["status"] == DONE]
    quality = [cell for cell in done if cell["what"] == "quality" and cell["num_features"] is not None]
    curves = [cell for cell in done if cell["what"] == "distillation"]
    drawn: list[Path] = []
    if quality:
        drawn.append(_draw_errors(quality, folder / "conversion.png"))
    if curves:
        drawn.append(_draw_curves(curves, done, folder / "distillation.png"))
    return drawn


def _draw_errors(cells: list[Cell], path: Path) -> Path:
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(cell["model"] for cell in cells))
    sizes = sorted({cell["num_features"] for cell in cells})
    figure = Figure(figsize=(1.6 + 2.8 * len(models), 5.2), dpi=90, layout="constrained")
    grid = figure.subplots(2, len(models), squeeze=False, sharex=True)
    for column, model in enumerate(models):
        own = [cell for cell in cells if cell["model"] == model]
        for kernel in dict.fromkeys(cell["kernel"] for cell in own):
            line = [cell for cell in own if cell["kernel"] == kernel]
            x = [cell["num_features"] for cell in line]
            style: dict[str, Any] = {"markersize": 3, "linewidth": 1, "label": kernel}
            grid[0, column].plot(x, [cell["attention"] for cell in line], "o-", **style)
            hidden = [cell["figures"]["hidden"] for cell in line]
            grid[1, column].errorbar(x, [f["value"] for f in hidden], yerr=_bars(hidden), fmt="o-", **style)
        for row in (0, 1):
            logarithmic_axes(grid[row, column], sizes, [str(size) for size in sizes])
        grid[0, column].set_title(model, fontsize=9)
        grid[1, column].set_xlabel("M")
    grid[0, 0].set_ylabel("attention outputs", fontsize=8)
    grid[1, 0].set_ylabel("last hidden states", fontsize=8)
    figure.suptitle("Relative error after conversion, without training", fontsize=9)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)
    figure.savefig(path)
    return path


def _draw_curves(curves: list[Cell], done: list[Cell], path: Path) -> Path:
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(cell["model"] for cell in curves))
    figure = Figure(figsize=(3.6 * len(models) + 0.6, 3.6), dpi=110, layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        name = MAIN[model]
        own = [cell for cell in done if cell["model"] == model]
        for cell in (cell for cell in curves if cell["model"] == model):
            values = [point["figures"][name] for point in cell["points"]]
            steps = [point["step"] for point in cell["points"]]
            axes.errorbar(
                steps, [v["value"] for v in values], yerr=_bars(values), fmt="o-", markersize=3, label=cell["system"]
            )
        lines = [("original", _original(own)["figures"][name]["value"], "--")]
        lines += [(cell["system"], cell["figures"][name]["value"], ":") for cell in own if cell["what"] == "floor"]
        for label, value, style in lines:
            axes.axhline(value, color="black", linestyle=style, linewidth=1, label=label)
        axes.set_title(model, fontsize=9)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.set_ylabel(labels(model)[name], fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.suptitle("After distillation (95 % intervals over sequences)", fontsize=9)
    figure.savefig(path)
    return path


def _bars(figures: list[dict[str, Any]]) -> list[list[float]]:
    """The lengths of error bars below and above."""
    ends = [figure["interval"] or (figure["value"], figure["value"]) for figure in figures]
    below = [abs(figure["value"] - low) for figure, (low, _) in zip(figures, ends, strict=True)]
    return [below, [abs(high - figure["value"]) for figure, (_, high) in zip(figures, ends, strict=True)]]
