"""What attention alone costs: forward and backward passes of FAVOR and its rivals against the arithmetic that they need.

The limit of FAVOR attention is the time of its twelve matrix products, four forward and eight backward with one recomputation, in
all 24 B H L M D floating-point operations, at the best rate at which this machine multiplies two big matrices in the same type.
That rate is taken in the very process that is timed, right before and right after, so that other work on the machine slows both
down alike.

Time and memory of a cell come from two processes. The one for memory makes a single pass; its memory allocator returns to the
system at once what is freed, which shows the true peak but costs time.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from performers.benchmarks.experiment import (
    DONE,
    FAILED,
    NO_ROOM,
    SKIPPED,
    UNAVAILABLE,
    Cell,
    CellLog,
    Figures,
    logarithmic_axes,
    measure_cells,
    short_length,
)
from performers.benchmarks.isolation import RETURN_FREED_MEMORY, available_memory, run_alone, was_killed
from performers.errors import InputError, MissingExtraError, RunError
from performers.folders import write_file

COMMAND = "benchmark attention"
# The rivals by name, each with the module it needs and what pip calls it.
RIVALS: dict[str, tuple[str, str] | None] = {
    "sdpa": None,  # PyTorch's fused exact attention
    "performer-pytorch": ("performer_pytorch", "performer-pytorch"),
    "textbook": None,  # FAVOR in plain PyTorch, which stores the L x M features
    "materialised": None,  # exact attention with its L x L matrix in memory
    "flash-linear-attention": ("fla", "flash-linear-attention"),  # its causal kernel and the time of the features
    "flash-linear-attention-given": ("fla", "flash-linear-attention"),  # the same without the time of the features
}
_EXACT = ("sdpa", "materialised")
_CAUSAL_ONLY = ("flash-linear-attention", "flash-linear-attention-given")
# What the rivals of the FAVOR kind compute.
_RIVAL_KERNELS = ("softmax", "relu")
_GROWTH_FROM = 8192


@dataclass(frozen=True)
class AttentionSettings:
    """What `measure_attention` measures.

    Attributes:
        lengths: L, in tokens.
        kernels: of FAVOR, as in `FavorFeatures`.
        directions: "bidirectional", "causal".
        dtypes: "float32", "bfloat16"; in bfloat16 FAVOR is measured in both of its precisions.
        backends: of FAVOR, as in `favor_attention`.
        against: names in `RIVALS`.
        batch_size, heads, head_dim, num_features: B, H, D and M.
        positions: after how many tokens the time of decoding one more is measured; none measures no decoding.
        device: as in `choose_device`, "auto" resolved.
        threads: CPU threads, or None for as many as there are cores.
        seed: of inputs and projections.
        seconds: how long a cell is repeated; twice at least.
        product: the size of the square matrices whose product gives the dense rate.
        max_minutes: a cell that would take longer is skipped.
    """

    lengths: Sequence[int] = (1024, 4096, 8192, 16_384, 65_536, 262_144, 1_048_576)
    kernels: Sequence[str] = ("softmax", "relu")
    directions: Sequence[str] = ("bidirectional", "causal")
    dtypes: Sequence[str] = ("float32", "bfloat16")
    backends: Sequence[str] = ("auto", "native", "chunked")
    against: Sequence[str] = ("sdpa", "performer-pytorch", "textbook", "materialised")
    batch_size: int = 1
    heads: int = 8
    head_dim: int = 64
    num_features: int = 256
    positions: Sequence[int] = (1000, 1_000_000)
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    seconds: float = 3.0
    product: int = 2048
    max_minutes: float = 10.0

    @classmethod
    def of_size(cls, quick: bool, device: str, **given: Any) -> AttentionSettings:
        """The full or the quick settings for a device, with what was given in their place.

        Raises:
            InputError: a name or a number that is not in order.
        """
        cuda = device.startswith("cuda")
        defaults: dict[str, Any] = {"device": device}
        if cuda:
            # Smaller products do not fill a GPU.
            defaults |= {"backends": ("auto", "chunked"), "product": 8192, "against": tuple(RIVALS)}
        if quick:
            defaults |= {"lengths": (256, 1024), "dtypes": ("float32",), "positions": (100, 10_000)}
            defaults |= {"seconds": 0.05, "product": 512, "max_minutes": 1.0}
        settings = cls(**defaults | {key: value for key, value in given.items() if value is not None})
        for option, values, known in (
            ("--direction", settings.directions, ("bidirectional", "causal")),
            ("--dtype", settings.dtypes, ("float32", "bfloat16")),
            ("--against", settings.against, tuple(RIVALS)),
        ):
            for value in values:
                if value not in known:
                    raise InputError(f"{option} {value}: expected some of {', '.join(known)}, with commas.")
        for option, values in (("--length", settings.lengths), ("--position", settings.positions)):
            if any(value < 1 for value in values):
                raise InputError(f"{option} {min(values)}: expected positive numbers of tokens.")
        from performers.attention import FavorFeatures
        from performers.attention.kernels import check_backend

        for backend in settings.backends:
            check_backend(backend)
        for kernel in settings.kernels:
            FavorFeatures(settings.head_dim, settings.num_features, kernel)
        return settings


def measure_attention(settings: AttentionSettings, output: str | Path, *, restart: bool = False) -> dict[str, Any]:
    """Measures every cell that the output folder does not hold yet, each in processes of its own, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `attention.json`, pictures, `run.json` and `cells.jsonl`, which remembers the cells.
        restart: measure again what the folder holds.

    Returns:
        The report: the machine, the settings, a figure for every cell, growth exponents, decoding, and what was left out.

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    from performers.training.runs import RunRecord

    log = CellLog(Path(output), COMMAND, restart=restart)
    cells, notes = grid(settings)
    for note in notes:
        print(note, file=sys.stderr)
    arguments = dict(vars(settings))
    with RunRecord(log.folder, COMMAND, arguments=arguments, seed=settings.seed, device=settings.device) as record:
        results = measure_cells(
            cells,
            lambda cell, before: _measure(cell, before, settings.max_minutes),
            log,
            name=_name_of_cell,
            result=_result,
            weight=lambda cell: 20_000.0 + cell["length"],  # to start the processes takes as long as so many tokens
        )
        notes += _left_out(results)
        if not any(result["status"] == DONE for result in results):
            raise RunError(f"Nothing could be measured: {notes[-1] if notes else 'no cell was asked for.'}")
        report = {
            "benchmark": "attention",
            "code": log.code,
            "machine": log.machine,
            "settings": arguments,
            "cells": compare([result for result in results if result["part"] == "layer"]),
            "growth": growth(results),
            "decoding": [result for result in results if result["part"] == "decoding"],
            "notes": notes,
            "failed": sum(result["status"] == FAILED for result in results),
        }
        report["pictures"] = [path.name for path in draw(report, log.folder)]
        write_file(log.folder / "attention.json", json.dumps(report, indent=1) + "\n")
        record.results(cells=len(results), pictures=report["pictures"])
    return report


def grid(settings: AttentionSettings) -> tuple[list[Cell], list[str]]:
    """All cells, those to be compared next to one another, and a line for every rival that has to be left out."""
    notes: list[str] = []
    rivals: list[str] = []
    for rival in settings.against:
        needed = RIVALS[rival]
        if needed and find_spec(needed[0]) is None:
            notes.append(str(MissingExtraError(needed[1], "bench", "the comparison with it")))
        elif rival in _CAUSAL_ONLY and not settings.device.startswith("cuda"):
            notes.append(f"{rival} is left out: it needs a CUDA device.")
        else:
            rivals.append(rival)
    common: Cell = {
        key: getattr(settings, key)
        for key in ("batch_size", "heads", "head_dim", "num_features", "device", "threads", "seed", "seconds")
    }
    common["device_name"] = _device_name(settings.device)
    cells: list[Cell] = []
    for dtype in settings.dtypes:
        for kernel in settings.kernels:
            for direction in settings.directions:
                favor = [
                    {"system": "performers", "kernel": kernel, "backend": backend, "precision": precision}
                    for backend in settings.backends
                    for precision in (("accurate", "fast") if dtype == "bfloat16" else ("accurate",))
                ]
                others = [
                    {"system": rival, "kernel": None if rival in _EXACT else kernel, "backend": None, "precision": None}
                    for rival in rivals
                    if rival in _EXACT or kernel in _RIVAL_KERNELS
                    if direction == "causal" or rival not in _CAUSAL_ONLY
                ]
                what = {"part": "layer", "dtype": dtype, "direction": direction, "product": settings.product, **common}
                cells += [
                    {**what, "length": length, **system}
                    for length in sorted(set(settings.lengths))
                    for system in (*favor, *others)
                ]
    positions = sorted(set(settings.positions))
    cells += [
        {
            "part": "decoding",
            "dtype": dtype,
            "direction": "causal",
            "positions": positions,
            "length": positions[-1],
            "system": "performers",
            "kernel": kernel,
            "backend": backend,
            "precision": "accurate",
            **common,
        }
        for dtype in settings.dtypes
        for kernel in settings.kernels
        for backend in settings.backends
        if positions
    ]
    return cells, notes


def _device_name(device: str) -> str | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_name(device)


def system_name(cell: Cell) -> str:
    """What tables and pictures call a system, e.g. "performers chunked" or "performers auto fast"."""
    if cell["system"] != "performers":
        return cell["system"]
    return " ".join(["performers", cell["backend"], *(["fast"] if cell["precision"] == "fast" else [])])


def _name_of_cell(cell: Cell) -> str:
    if cell["part"] == "decoding":
        return f"decoding {cell['dtype']} {cell['kernel']} {system_name(cell)}"
    kernel = f" {cell['kernel']}" if cell["kernel"] else ""
    return f"L {cell['length']:,} {cell['dtype']}{kernel} {cell['direction']} {system_name(cell)}"


def _left_out(results: list[Figures]) -> list[str]:
    """A line for every reason why a system has no figures."""
    cells: dict[tuple[str, str], list[Figures]] = {}
    for result in results:
        if result["status"] != DONE:
            cells.setdefault((system_name(result), result["reason"]), []).append(result)
    lines: list[str] = []
    for (system, reason), found in cells.items():
        first = _name_of_cell(found[0]).removesuffix(f" {system}")
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        lines.append(f"{system}: {found[0]['status']} ({first}{more}): {reason}")
    return lines


def _result(figures: Figures) -> str:
    if figures["status"] != DONE:
        return f"{figures['status']}: {figures['reason']}"
    if "seconds_per_token" in figures:
        return " and ".join(f"{seconds * 1e3:.3f} ms" for seconds in figures["seconds_per_token"]) + " a token"
    return f"{figures['seconds']:.4g} s, {figures['extra_bytes'] / 1e6:,.0f} MB beside inputs and outputs"


def _measure(cell: Cell, before: list[Figures], max_minutes: float) -> Figures:
    """Starts the processes that measure a cell, unless shorter lengths say that it is not worth trying."""
    shorter = [result for result in before if _without_length(result) == _without_length(cell)]
    reason = why_not(cell["length"], shorter, max_minutes, available_memory() if cell["device"] == "cpu" else None)
    if reason is not None:
        return {"status": SKIPPED if shorter[-1]["status"] == DONE else shorter[-1]["status"], "reason": reason}
    module = "performers.benchmarks.attention_cell"
    timeout = max_minutes * 60
    try:
        if cell["part"] == "decoding":
            figures = run_alone(f"{module}:decoding_time", timeout=timeout, **cell)
        else:
            figures = run_alone(f"{module}:layer_memory", environment=RETURN_FREED_MEMORY, timeout=timeout, **cell)
            if figures["status"] == DONE:
                figures |= run_alone(f"{module}:layer_time", timeout=timeout, **cell)
    except InputError as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    except TimeoutError:
        return {"status": SKIPPED, "reason": f"not done in {max_minutes:g} minutes"}
    except RunError as error:
        if was_killed(error):
            return {"status": NO_ROOM, "reason": "the system ended its process"}
        return {"status": FAILED, "reason": str(error)}
    figures.pop("peak_bytes", None)
    return figures


def _without_length(cell: Cell) -> list[Any]:
    keys = ("part", "system", "backend", "precision", "kernel", "direction", "dtype", "device", "threads")
    return [cell[key] for key in keys]


def why_not(length: int, shorter: list[Figures], max_minutes: float, available: int | None) -> str | None:
    """Why a length is not worth trying, given the results of shorter ones; None if it is.

    Arguments:
        length: L.
        shorter: results of the same system at other lengths, shortest first.
        max_minutes: that the cell may take.
        available: bytes, or None if that is not known.
    """
    if shorter and shorter[-1]["status"] != DONE:
        return shorter[-1]["reason"]
    known = [result for result in shorter if "seconds" in result]
    if not known:
        return None
    # A pass for memory, one to warm up, and two that are timed.
    minutes = 4 * _extrapolated(known, "seconds", length) / 60
    if minutes > max_minutes:
        return f"would take about {minutes:,.0f} minutes (--max-minutes {max_minutes:g})"
    needed = _extrapolated(known, "total_bytes", length)
    if available is not None and needed > 0.9 * available:
        return f"would need about {needed / 1e9:,.1f} GB of memory, {available / 1e9:,.1f} GB are available"
    return None


def _extrapolated(known: list[Figures], figure: str, length: int) -> float:
    """A figure at a greater length, growing as it did between the last two, but not less than linearly."""
    last = known[-1]
    exponent = 2.0 if last["system"] in _EXACT else 1.0
    if len(known) > 1:
        grown = math.log(last[figure] / known[-2][figure]) / math.log(last["length"] / known[-2]["length"])
        exponent = min(max(grown, 1.0), 2.0)
    return last[figure] * (length / last["length"]) ** exponent


def limit_flops(cell: Cell, features: int) -> float:
    """The floating-point operations of FAVOR's twelve matrix products: 24 B H L M D."""
    return 24.0 * cell["batch_size"] * cell["heads"] * cell["length"] * features * cell["head_dim"]


def compare(results: list[Figures]) -> list[Figures]:
    """The results with three more figures for each that was measured.

    Returns:
        The results with limit_seconds, at the process's own dense rate; ratio, of the time to it; and speedup, how many times
        faster it is than each rival in the same setting.
    """
    compared: list[Figures] = []
    for result in results:
        if result["status"] != DONE:
            compared.append(result)
            continue
        limit = limit_flops(result, result["features"]) / result["dense_rate"]
        speedup = {
            other["system"]: other["seconds"] / result["seconds"]
            for other in results
            if other["status"] == DONE and other["system"] not in ("performers", result["system"])
            if all(other[key] == result[key] for key in ("dtype", "direction", "length"))
            if other["kernel"] in (None, result["kernel"])
        }
        compared.append({**result, "limit_seconds": limit, "ratio": result["seconds"] / limit, "speedup": speedup})
    return compared


def growth(results: list[Figures]) -> list[Figures]:
    """How time and memory grow with the length from 8,192 tokens up: exponents, by least squares of their logarithms."""
    groups: dict[str, list[Figures]] = {}
    for result in results:
        if result["part"] == "layer" and result["status"] == DONE and result["length"] >= _GROWTH_FROM:
            groups.setdefault(str(_without_length(result)), []).append(result)
    return [
        {
            **{key: group[0][key] for key in ("dtype", "kernel", "direction", "system", "backend", "precision")},
            "from": group[0]["length"],
            "to": group[-1]["length"],
            "time": exponent([(result["length"], result["seconds"]) for result in group]),
            "memory": exponent([(result["length"], result["total_bytes"]) for result in group]),
        }
        for group in groups.values()
        if len(group) > 1
    ]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The p of the power law y = c x^p that fits the points best, in logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    done = [cell for cell in report["cells"] if cell["status"] == DONE]
    rivals = [rival for rival in RIVALS if any(rival in cell["speedup"] for cell in done)]
    header = [
        "L",
        "dtype",
        "kernel",
        "direction",
        "system",
        "time",
        "of the limit",
        *(f"vs {rival}" for rival in rivals),
    ]
    rows = [
        [
            f"{cell['length']:,}",
            cell["dtype"],
            cell["kernel"] or "exact",
            cell["direction"],
            system_name(cell),
            f"{cell['seconds'] * 1e3:,.4g} ms",
            f"{cell['ratio']:.2f} x ({1 / cell['ratio']:.0%})",
            *(f"{cell['speedup'][rival]:.2f} x" if rival in cell["speedup"] else "" for rival in rivals),
            f"{cell['extra_bytes'] / 1e6:,.1f} MB",
            "" if cell["error"] is None else f"{cell['error']:.1e}",
        ]
        for cell in done
    ]
    found = [("Forward and backward", [*header, "extra memory", "error"], rows)]
    rates: dict[str, tuple[float, str]] = {}
    for cell in done:
        rates[cell["dtype"]] = max(rates.get(cell["dtype"], (0.0, "")), (cell["dense_rate"], cell["dense_product"]))
    found.append(
        (
            "Best dense rates seen; the limit of a cell is taken at the rate of its own process",
            ["dtype", "rate", "product"],
            [[dtype, f"{rate / 1e9:,.0f} GFLOP/s", product] for dtype, (rate, product) in rates.items()],
        )
    )
    if report["growth"]:
        header = ["dtype", "kernel", "direction", "system", "lengths", "time", "memory"]
        rows = [
            [
                *(entry["dtype"], entry["kernel"] or "exact", entry["direction"], system_name(entry)),
                *(f"{entry['from']:,} to {entry['to']:,}", f"L^{entry['time']:.3f}", f"L^{entry['memory']:.3f}"),
            ]
            for entry in report["growth"]
        ]
        found.append(("Growth with the length", header, rows))
    decoding = [cell for cell in report["decoding"] if cell["status"] == DONE]
    if decoding:
        header = ["dtype", "kernel", "system", *(f"at {position:,}" for position in decoding[0]["positions"]), "ratio"]
        rows = [
            [
                *(cell["dtype"], cell["kernel"], system_name(cell)),
                *(f"{seconds * 1e3:.4f} ms" for seconds in cell["seconds_per_token"]),
                f"{cell['ratio']:.3f}",
            ]
            for cell in decoding
        ]
        found.append(("Decoding one token", header, rows))
    return found


_COLOURS = {
    "sdpa": "#d1495b",
    "materialised": "#edae49",
    "performer-pytorch": "#7a5195",
    "textbook": "#8d6e63",
    "flash-linear-attention": "#2e7d4f",
    "flash-linear-attention-given": "#66a182",
}
_BLUES = {"auto": "#0b3c5d", "native": "#1b6ca8", "triton": "#1b6ca8", "chunked": "#5fa8d3", "reference": "#9aa5b1"}


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws time and memory against the length, both logarithmic: a PNG for each kernel, direction and type.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    settings = report["settings"]
    done = [cell for cell in report["cells"] if cell["status"] == DONE]
    paths: list[Path] = []
    for kernel in settings["kernels"]:
        for direction in settings["directions"]:
            for dtype in settings["dtypes"]:
                cells = [
                    cell
                    for cell in done
                    if cell["kernel"] in (kernel, None) and (cell["direction"], cell["dtype"]) == (direction, dtype)
                ]
                ours = sorted(
                    (cell for cell in cells if cell["system"] == "performers"), key=lambda cell: cell["length"]
                )
                if not ours:
                    continue
                figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
                time_axes, memory_axes = figure.subplots(1, 2)
                for system, group in groupby(sorted(cells, key=system_name), key=system_name):
                    line = sorted(group, key=lambda cell: cell["length"])
                    colour = _COLOURS.get(line[0]["system"]) or _BLUES[line[0]["backend"]]
                    style = "o:" if line[0]["precision"] == "fast" else "o-"
                    lengths = [cell["length"] for cell in line]
                    kind = {"color": colour, "markersize": 3, "linewidth": 1.2}
                    time_axes.plot(lengths, [cell["seconds"] for cell in line], style, label=system, **kind)
                    memory_axes.plot(lengths, [cell["total_bytes"] / 1e6 for cell in line], style, **kind)
                rate = max(cell["dense_rate"] for cell in cells)
                floor = {cell["length"]: cell for cell in ours}
                limit = [limit_flops(cell, cell["features"]) / rate for cell in floor.values()]
                needed = [cell["needed_bytes"] / 1e6 for cell in floor.values()]
                time_axes.plot(
                    list(floor), limit, "k--", linewidth=1, label="limit (time), inputs and outputs (memory)"
                )
                memory_axes.plot(list(floor), needed, "k--", linewidth=1)
                for axes, label in ((time_axes, "seconds"), (memory_axes, "peak memory (MB)")):
                    logarithmic_axes(axes, list(floor), [short_length(length) for length in floor])
                    axes.set(xlabel="sequence length (tokens)", ylabel=label)
                threads = ours[0]["threads_used"]
                where = ours[0]["device_name"] or f"{threads} CPU thread{'s' if threads > 1 else ''}"
                figure.suptitle(
                    f"{kernel}, {direction}, {dtype}: forward and backward of attention alone, batch {settings['batch_size']}, "
                    f"{settings['heads']} heads of {settings['head_dim']}, {settings['num_features']} features, {where}",
                    fontsize=8,
                )
                figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=7)
                path = folder / f"attention-{kernel}-{direction}-{dtype}.png"
                figure.savefig(path)
                paths.append(path)
    return paths
