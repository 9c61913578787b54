"""The report of `performers benchmark embedding` for people: what its systems are called, its tables and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from performers.benchmarks.experiment import logarithmic_axes, short_length

WINDOWED, ALONE, COMMONEST = "one-hot of 15 residues", "one-hot of the residue", "the most common state"
COMPOSITION, KMERS, CHANCE = "composition", "3-mers", "chance"
UNTRAINED = ", untrained"
BASELINES = {"structure": (WINDOWED, ALONE, COMMONEST), "retrieval": (COMPOSITION, KMERS, CHANCE)}
COMPARED_WITH = {"structure": WINDOWED, "retrieval": KMERS}  # that the others are compared with
_COLOURS = ("#1f4e79", "#5fa8d3", "#c2410c", "#15803d", "#6b21a8", "#a16207")


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report for people: a table for each part that was measured."""

    def cell(row: dict[str, Any], key: str) -> str:
        from performers.tools.finetuned import with_interval

        return with_interval(row[key], signed=" above " in key) if key in row else ""

    found: list[tuple[str, list[str], list[list[str]]]] = []
    rows = report["structure"]
    if rows:
        keys = ["Q3", f"Q3 above {WINDOWED}"]
        body = [[row["system"], *(cell(row, key) for key in keys), f"{row['number']:,}"] for row in rows]
        title = f"Secondary structure in three states: {rows[0]['groups']:,} test domains, 95 % intervals over them"
        found.append((title, ["probe on", *keys, "residues"], body))
    rows = report["retrieval"]
    if rows:
        keys = ["top-1", f"top-1 above {KMERS}", "MRR", f"MRR above {KMERS}"]
        body = [[row["system"], row["vectors"], *(cell(row, key) for key in keys)] for row in rows]
        title = (
            f"The superfamily without the own family, {rows[0]['number']:,} queries, 95 % intervals over "
            f"{rows[0]['groups']:,} superfamilies"
        )
        found.append((title, ["vectors", "which are", *keys], body))
    rows = report["speed"]
    if rows:
        body = [
            [
                length_name(row["length"]),
                f"{row['proteins']:,} x {row['mean_length']:,.0f}",
                row["system"],
                f"{row['rate']:,.0f}",
                "" if "ratio" not in row else "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]),
                str(row["turns"]),
            ]
            for row in rows
        ]
        header = ["length", "proteins", "system", "residues/s", "performers is times as fast", "turns"]
        found.append(("Speed: medians, and lowest and highest of the turns", header, body))
    return found


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Makes a picture of the quality and one of the speed, as far as they were measured."""
    paths: list[Path] = []
    if report["structure"]:
        paths.append(_draw_quality(report, folder / "embedding-quality.png"))
    if report["speed"]:
        paths.append(_draw_speed(report, folder / "embedding-speed.png"))
    return paths


def _draw_quality(report: dict[str, Any], path: Path) -> Path:
    """Bars with intervals: the accuracy of the probe, and the share of domains whose nearest is of their superfamily."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (part, measure) in zip(figure.subplots(1, 2), (("structure", "Q3"), ("retrieval", "top-1")), strict=True):
        rows = report[part][::-1]
        names = [", ".join(filter(None, (row["system"], row["vectors"]))) for row in rows]
        values = [row[measure]["value"] for row in rows]
        ends = [row[measure]["interval"] or (value, value) for row, value in zip(rows, values, strict=True)]
        errors = [[abs(end[side] - value) for end, value in zip(ends, values, strict=True)] for side in (0, 1)]
        baselines = BASELINES[part]
        colours = ["lightgrey" if row["system"] in baselines else _COLOURS[UNTRAINED in row["system"]] for row in rows]
        axes.barh(range(len(rows)), values, xerr=errors, color=colours, capsize=2)
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.set_xlabel(
            "accuracy of three states (Q3)" if part == "structure" else "nearest is of the superfamily (top-1)",
            fontsize=8,
        )
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _draw_speed(report: dict[str, Any], path: Path) -> Path:
    """Residues a second against the length; ordinary proteins stand at their mean length."""
    from matplotlib.figure import Figure

    rows = report["speed"]
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
        own = [row for row in rows if row["system"] == system]
        x, y = [row["mean_length"] for row in own], [row["rate"] for row in own]
        name = system if system == "performers" else f"{report['settings']['against']}, {system}"
        axes.plot(x, y, "o-", markersize=4, linewidth=1.2, color=_COLOURS[2 * number], label=name)
    places = {row["mean_length"]: row["length"] for row in rows}
    labels = [short_length(length) if length else f"ordinary\n({mean:,.0f})" for mean, length in places.items()]
    logarithmic_axes(axes, list(places), labels)
    axes.set(xlabel="residues of a protein", ylabel="residues per second")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def length_name(length: int) -> str:
    """A length of a cell of speed, for people; 0 are ordinary proteins."""
    return f"{length:,} residues" if length else "ordinary proteins"
