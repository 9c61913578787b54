"""How close FAVOR comes to softmax attention: the error by kernel, projection and number of features (2009.14794, figure 4).

Queries, keys and values are drawn once; each draw of the random features estimates the same attention. Three things are compared
with the exact ones: the kernel exp(q.k / sqrt(D)), whose estimate is unbiased for most kernels here; the attention matrix, which
is the kernel divided by its sums over the keys; and the output, the matrix times the values. M counts the rows of the projection:
"softmax-hyperbolic" and "softmax-trig" make two features of each.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.benchmarks.experiment import (
    DONE,
    Cell,
    CellLog,
    Figures,
    logarithmic_axes,
    measure_cells,
)
from performers.errors import InputError
from performers.folders import write_file

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "benchmark approximation"
# All that estimate the softmax kernel, and all random projections; those that this version lacks are left out.
KERNELS = ("softmax-trig", "softmax", "softmax-hyperbolic", "softmax-reg", "softmax-optimal", "softmax-sharp")
PROJECTIONS = ("iid", "orthogonal", "hadamard", "givens")
# Their parameters are set from queries and keys.
_CALIBRATED = ("softmax-optimal", "softmax-sharp")
OF = {"kernel": "kernel", "matrix": "attention matrix", "output": "attention output"}
ERRORS = {"mse": "mean squared error", "relative": "relative error"}
_ROWS = 512


@dataclass(frozen=True)
class ApproximationSettings:
    """What `measure_approximation` measures.

    Attributes:
        length: L, in tokens.
        head_dim: D.
        num_features: numbers M of rows of the projection.
        draws: of the projection, for each cell.
        kernels: as in `FavorFeatures`.
        projections: as in `FavorFeatures`.
        deviations: standard deviations of the normal queries and keys; values have 1.
        device: as in `choose_device`, "auto" resolved.
        dtype: "float32" or "float64".
        threads: CPU threads, or None for as many as there are cores.
        seed: of everything random.
    """

    length: int = 4096
    head_dim: int = 16
    num_features: Sequence[int] = (16, 32, 64, 128, 256, 512)
    draws: int = 15
    kernels: Sequence[str] = KERNELS
    projections: Sequence[str] = PROJECTIONS
    deviations: Sequence[float] = (1.0, 0.5, 0.25)
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> tuple[ApproximationSettings, list[str]]:
        """The full or the quick settings, with what was given in their place, and a line for every name that is left out.

        Raises:
            InputError: a name or a number that was given is not in order.
        """
        from performers.attention import FavorFeatures

        defaults: dict[str, Any] = {}
        if quick:
            defaults = {"length": 512, "num_features": (16, 32, 64, 128), "draws": 3, "deviations": (1.0, 0.5)}
        given = {key: value for key, value in given.items() if value is not None}
        settings = cls(**defaults | given)
        if any(number < 1 for number in settings.num_features):
            raise InputError(f"--num-features {min(settings.num_features)}: expected positive numbers.")
        if not all(0 < deviation < 1e3 for deviation in settings.deviations):
            raise InputError("--deviation: expected numbers between 0 and 1000.")
        notes: list[str] = []
        known: dict[str, tuple[str, ...]] = {}
        for argument, field in (("kernel", "kernels"), ("projection", "projections")):
            usable: list[str] = []
            for name in getattr(settings, field):
                try:
                    FavorFeatures(settings.head_dim, 1, **{argument: name})
                    usable.append(name)
                except InputError:
                    if field in given:
                        raise
                    notes.append(f"{argument} {name} is left out: this version does not have it.")
            known[field] = tuple(usable)
        return cls(**{**vars(settings), **known}), notes


def measure_approximation(
    settings: ApproximationSettings, output: str | Path, *, notes: Sequence[str] = (), restart: bool = False
) -> dict[str, Any]:
    """Measures the errors of every cell that the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `approximation.json`, the pictures, `run.json` and `cells.jsonl`, which remembers the cells.
        notes: lines to add to the report.
        restart: measure again what the folder holds.

    Returns:
        The report. A cell holds "errors", of "kernel", "matrix" and "output", each with "mse" and "relative" (the Frobenius norm
        of the difference over that of the exact one): a number for each draw, their mean, median and standard
        deviation.

    Raises:
        InputError: the folder is in use for something else.
    """
    from performers.training.distributed import use_threads
    from performers.training.runs import RunRecord

    log = CellLog(Path(output), COMMAND, restart=restart)
    for note in notes:
        print(note, file=sys.stderr)
    arguments = dict(vars(settings))
    shared = {key: arguments[key] for key in ("length", "head_dim", "draws", "device", "dtype", "seed")}
    cells: list[Cell] = [
        {**shared, "deviation": deviation, "kernel": kernel, "projection": projection, "num_features": num_features}
        for deviation in settings.deviations
        for kernel in settings.kernels
        for projection in settings.projections
        for num_features in sorted(set(settings.num_features))
    ]
    with (
        RunRecord(log.folder, COMMAND, arguments=arguments, seed=settings.seed, device=settings.device) as record,
        use_threads(settings.threads),
    ):
        results = measure_cells(
            cells,
            lambda cell, before: {"status": DONE, "errors": errors(cell)},
            log,
            name=lambda cell: (
                f"deviation {cell['deviation']:g} {cell['kernel']} {cell['projection']} {cell['num_features']} features"
            ),
            result=lambda figures: f"relative error of the output {_shown(figures['errors']['output']['relative'])}",
            weight=lambda cell: 200.0 + cell["num_features"],
        )
        report = {
            "benchmark": "approximation",
            "code": log.code,
            "machine": log.machine,
            "settings": arguments,
            "cells": results,
            "notes": list(notes),
            "failed": 0,
        }
        report["pictures"] = [path.name for path in draw(report, log.folder)]
        write_file(log.folder / "approximation.json", json.dumps(report, indent=1) + "\n")
        record.results(cells=len(results), pictures=report["pictures"])
    return report


def errors(cell: Cell) -> dict[str, dict[str, Any]]:
    """The errors of one kernel, projection and number of features, for every draw, as in `measure_approximation`."""
    import torch

    from performers.attention import FavorFeatures
    from performers.randomness import derive_seed

    q, k, v, kernel = _exact(*(cell[key] for key in ("length", "head_dim", "deviation", "device", "dtype", "seed")))
    found: dict[str, dict[str, list[float]]] = {name: {"mse": [], "relative": []} for name in OF}
    with torch.no_grad():
        for draw_number in range(cell["draws"]):
            features = FavorFeatures(
                cell["head_dim"],
                cell["num_features"],
                cell["kernel"],
                cell["projection"],
                seed=derive_seed(cell["seed"], "draw", draw_number),
            ).to(q.device)
            if cell["kernel"] in _CALIBRATED:
                features.calibrate_(q, k)
            phi_q, phi_k = features(q, side="query")[0, 0], features(k, side="key")[0, 0]
            # Sums of squares of the differences, and of what is exact.
            sums = {name: torch.zeros(2, dtype=torch.float64, device=q.device) for name in OF}
            numbers = dict.fromkeys(OF, 0)
            for start in range(0, cell["length"], _ROWS):
                rows = slice(start, start + _ROWS)
                estimate, exact = phi_q[rows] @ phi_k.T, kernel[rows]
                pairs = {
                    "kernel": (estimate, exact),
                    "matrix": (estimate := _normalised(estimate), exact := _normalised(exact)),
                    "output": (estimate @ v[0, 0], exact @ v[0, 0]),
                }
                for name, (a, b) in pairs.items():
                    sums[name] += torch.stack([(a - b).double().square().sum(), b.double().square().sum()])
                    numbers[name] += b.numel()
            for name, (difference, norm) in sums.items():
                found[name]["mse"].append(float(difference / numbers[name]))
                found[name]["relative"].append(float((difference / norm).sqrt()))
    return {name: {error: _summary(values) for error, values in both.items()} for name, both in found.items()}


@functools.lru_cache(maxsize=1)
def _exact(
    length: int, head_dim: int, deviation: float, device: str, dtype: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, (1, 1, L, D), and the exact kernel, (L, L)."""
    import torch

    from performers.randomness import derive_seed

    generator = torch.Generator().manual_seed(derive_seed(seed, "queries, keys and values"))
    q, k, v = (
        torch.randn(1, 1, length, head_dim, generator=generator, dtype=torch.float64).to(device, getattr(torch, dtype))
        for _ in range(3)
    )
    q, k = q * deviation, k * deviation
    return q, k, v, torch.exp(q[0, 0] @ k[0, 0].T * head_dim**-0.5)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "draws": values,
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def tables(report: dict[str, Any], error: str = "relative") -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables, one for each thing compared, with a column for every M: a title, a header and rows."""
    features = sorted({cell["num_features"] for cell in report["cells"]})
    lines: dict[tuple[float, str, str], dict[int, Figures]] = {}
    for cell in report["cells"]:
        lines.setdefault((cell["deviation"], cell["kernel"], cell["projection"]), {})[cell["num_features"]] = cell
    found: list[tuple[str, list[str], list[list[str]]]] = []
    for of, name in OF.items():
        rows = [
            [f"{deviation:g}", kernel, projection, *(_shown(line[m]["errors"][of][error]) for m in features)]
            for (deviation, kernel, projection), line in lines.items()
        ]
        draws = report["settings"]["draws"]
        title = f"{ERRORS[error].capitalize()} of the {name}: mean and standard deviation of {draws} draws"
        found.append((title, ["q, k deviation", "kernel", "projection", *(f"M {m}" for m in features)], rows))
    return found


def _shown(summary: dict[str, Any]) -> str:
    if summary["mean"] is None or summary["deviation"] is None:
        return "not finite"
    return f"{summary['mean']:.3g} ± {summary['deviation']:.1g}"


_COLOURS = ("#7a5195", "#1b6ca8", "#2e7d4f", "#edae49", "#d1495b", "#0b0b0b")
_STYLES = {"iid": "x--", "orthogonal": "o-", "hadamard": "s:", "givens": "^-."}


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the errors of attention matrix and output against M, a column for each size of queries and keys.

    Returns:
        Two files: mean squared errors, as in the paper, and relative errors.
    """
    from matplotlib.figure import Figure

    settings = report["settings"]
    deviations, rows = list(settings["deviations"]), [of for of in OF if of != "kernel"]
    features = sorted(set(settings["num_features"]))
    lines: dict[tuple[float, str, str], list[Figures]] = {}
    for cell in report["cells"]:
        lines.setdefault((cell["deviation"], cell["kernel"], cell["projection"]), []).append(cell)
    colours: dict[str, str] = dict(zip(KERNELS, _COLOURS, strict=True))
    paths: list[Path] = []
    for error, words in ERRORS.items():
        figure = Figure(figsize=(2.2 + 2.6 * len(deviations), 5.6), dpi=90, layout="constrained")
        grid = figure.subplots(len(rows), len(deviations), squeeze=False, sharex=True)
        for (deviation, kernel, projection), cells in lines.items():
            for of, axes in zip(rows, grid[:, deviations.index(deviation)], strict=True):
                points = [(cell["num_features"], cell["errors"][of][error]) for cell in cells]
                points = [(m, summary) for m, summary in points if summary["mean"] is not None]
                axes.errorbar(
                    [m for m, _ in points],
                    [summary["mean"] for _, summary in points],
                    [summary["deviation"] for _, summary in points],
                    fmt=_STYLES.get(projection, "o-"),
                    color=colours.get(kernel, "#888888"),
                    label=f"{kernel}, {projection}",
                    markersize=3,
                    linewidth=1,
                    elinewidth=0.6,
                )
        for index, deviation in enumerate(deviations):
            grid[0, index].set_title(f"q, k of deviation {deviation:g}", fontsize=8)
            grid[-1, index].set_xlabel("M")
        for of, axes in zip(rows, grid[:, 0], strict=True):
            axes.set_ylabel(f"{OF[of]}: {words}", fontsize=8)
        for axes in grid.flat:
            logarithmic_axes(axes, features, [str(m) for m in features])
        figure.suptitle(
            f"FAVOR against softmax attention: {settings['length']:,} tokens, one head of {settings['head_dim']}, "
            f"{settings['draws']} draws",
            fontsize=9,
        )
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=7)
        path = folder / f"approximation-{error}.png"
        figure.savefig(path)
        paths.append(path)
    return paths
