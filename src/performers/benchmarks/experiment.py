"""A benchmark as a grid of cells: each is measured once, kept as soon as it is done, and shown with the others at the end.

A cell is a dictionary of settings, and measuring one gives a dictionary of figures; JSON can hold both. What is measured, and
what the tables and pictures look like, is the benchmark's own business.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from performers import __version__
from performers.errors import OutputError, RunError
from performers.folders import fsync, room_for, write_file, writing

Cell = dict[str, Any]
Figures = dict[str, Any]

# What a cell can come to. A measurement, and finding out that there is no room for one or that a run diverges, are kept; the
# rest is tried again.
DONE, NO_ROOM, DIVERGED = "done", "does not fit", "diverged"
SKIPPED, UNAVAILABLE, FAILED = "skipped", "unavailable", "failed"
_KEPT = (DONE, NO_ROOM, DIVERGED)


class CellLog:
    """The figures of one benchmark's cells in a folder, a line of `cells.jsonl` each, so that an interrupted command goes on.

    A cell is found again only if its settings, the code and the machine are the same.

    Arguments:
        folder: new, empty, or of the same command.
        command: the verb, as in `performers VERB`.
        restart: measure again what the folder holds.

    Attributes:
        folder, code, machine: where the figures are kept, and what they hold for.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, command: str, *, restart: bool = False) -> None:
        self.folder = folder
        self._path = folder / "cells.jsonl"
        self.code, self.machine = source_version(), describe_machine()
        self._where = {"command": command, "code": self.code, "machine": self.machine}
        self._kept: dict[str, Figures] = {}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not self._path.is_file() and any(folder.iterdir()):
                raise OutputError(
                    f"{folder} is already in use; expected a new or empty folder or one of `performers {command}`."
                )
            text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
            self._path.touch()
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):  # the last may have been cut off
                entry = json.loads(line)
                if entry["where"]["command"] != command:
                    raise OutputError(f"{folder} is already in use by `performers {entry['where']['command']}`.")
                if not restart:
                    self._kept[_key(entry["where"], entry["cell"])] = entry["figures"]
        if restart and (folder / "runs").is_dir():
            shutil.rmtree(folder / "runs")

    def folder_of(self, cell: Cell) -> Path:
        """A folder for what measuring a cell leaves behind, such as a model; its name holds for this code and machine alone."""
        return self.folder / "runs" / hashlib.sha256(_key(self._where, cell).encode()).hexdigest()[:16]

    def find(self, cell: Cell) -> Figures | None:
        """The figures of a cell that was measured before."""
        return self._kept.get(_key(self._where, cell))

    def add(self, cell: Cell, figures: Figures) -> None:
        """Keeps the figures of a cell; they are on the disk when this returns.

        Raises:
            DiskFullError, OutputError: as in `performers.folders.room_for`.
        """
        self._kept[_key(self._where, cell)] = figures
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # without what was cut off
        entry = json.dumps({"where": self._where, "cell": cell, "figures": figures})
        with room_for(self._path), self._path.open("r+b") as stream:
            stream.seek(len(whole))
            stream.truncate()
            stream.write(entry.encode() + b"\n")
        fsync(self._path)


def measure_cells(
    cells: Sequence[Cell],
    measure: Callable[[Cell, list[Figures]], Figures],
    log: CellLog,
    *,
    name: Callable[[Cell], str],
    result: Callable[[Figures], str],
    weight: Callable[[Cell], float] = lambda cell: 1.0,
) -> list[Figures]:
    """Measures the cells that the log does not hold, in order, with a line of progress on stderr for each.

    Arguments:
        cells: the grid; a cell that is in it twice is measured once.
        measure: the figures of a cell, given all results before it; "status" among them is one of this module's constants.
        log: where figures are kept.
        name: of a cell, for people.
        result: of a cell, for people.
        weight: how long a cell takes, in any unit, to tell the time left.

    Returns:
        For every cell its settings and figures in one dictionary. Numbers that are not finite are None.
    """
    unique = list({json.dumps(cell, sort_keys=True): cell for cell in cells}.values())
    remaining = sum(weight(cell) for cell in unique if log.find(cell) is None)
    known = sum(log.find(cell) is not None for cell in unique)
    if known:
        print(f"{known} of {len(unique)} cells were measured before (--restart measures them again).", file=sys.stderr)
    results: list[Figures] = []
    measured, seconds = 0.0, 0.0
    for number, cell in enumerate(unique, start=1):
        figures = log.find(cell)
        if figures is None:
            started = time.monotonic()
            try:
                figures = _finite(measure(cell, results))
            except (KeyboardInterrupt, SystemExit):
                print(f"What was measured is kept in {log.folder}; the same command goes on.", file=sys.stderr)
                raise
            remaining -= weight(cell)
            if figures["status"] in _KEPT:
                log.add(cell, figures)
                measured, seconds = measured + weight(cell), seconds + time.monotonic() - started
            left = f"  about {_duration(seconds / measured * remaining)} left" if measured else ""
            print(f"[{number}/{len(unique)}] {name(cell)}: {result(figures)}{left}", file=sys.stderr, flush=True)
        results.append({**cell, **figures})
    return results


QUICK_NOTE = "Quick settings: they show that the command works; the figures mean nothing beyond that."


class Experiment:
    """One command at work on its cells: what was measured before, the record of the run, and the report at the end.

    Arguments:
        name: the command is `performers benchmark NAME`, the report NAME.json.
        settings: whatever the command was asked for; JSON can hold it, and "seed" and "device" are in it.
        output: the folder, as of `CellLog`.
        quick: whether the settings are too small to mean anything; the report says so.
        restart: as of `CellLog`.

    Attributes:
        log: the cells, and where they are kept.
        results: what `measure` returned so far, all calls together.
        notes: lines for the report.
    """

    def __init__(
        self, name: str, settings: dict[str, Any], output: str | Path, *, quick: bool, restart: bool = False
    ) -> None:
        from performers.training.runs import RunRecord

        self.name, self.settings, self.quick = name, settings, quick
        self.log = CellLog(Path(output), f"benchmark {name}", restart=restart)
        self.results: list[Figures] = []
        self.notes = [QUICK_NOTE] if quick else []
        self._left_out: dict[tuple[str, str], list[str]] = {}
        self._record = RunRecord(
            self.log.folder,
            f"benchmark {name}",
            arguments={"quick": quick, **settings},
            seed=settings["seed"],
            device=settings["device"],
        )

    def __enter__(self) -> Self:
        self._record.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._record.__exit__(kind, error, traceback)

    def measure(
        self,
        cells: Sequence[Cell],
        measure: Callable[[Cell, list[Figures]], Figures],
        *,
        name: Callable[[Cell], str],
        result: Callable[[Figures], str],
        weight: Callable[[Cell], float] = lambda cell: 1.0,
    ) -> list[Figures]:
        """`measure_cells` with this experiment's log."""
        found = measure_cells(
            cells,
            measure,
            self.log,
            name=name,
            result=lambda figures: result(figures) if figures["status"] == DONE else _why(figures),
            weight=weight,
        )
        self.results += found
        for cell in found:
            if cell["status"] != DONE:
                self._left_out.setdefault((cell["status"], cell["reason"]), []).append(name(cell))
        return found

    def report(self, draw: Callable[[dict[str, Any], Path], list[Path]], **figures: Any) -> dict[str, Any]:
        """Writes NAME.json and the pictures.

        Arguments:
            draw: makes the pictures of a report in a folder and returns their paths.
            figures: what the report says besides the cells.

        Returns:
            The report; its notes have a line for every reason why a cell has no figures.

        Raises:
            RunError: nothing could be measured.
        """
        without = [result for result in self.results if result["status"] != DONE]
        if len(without) == len(self.results):
            raise RunError(f"Nothing could be measured: {_why(without[0]) if without else 'no cell was asked for.'}")
        left_out = [
            f"{status}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
            for (status, reason), names in self._left_out.items()
        ]
        report = {
            "benchmark": self.name,
            "quick": self.quick,
            "code": self.log.code,
            "machine": self.log.machine,
            "settings": self.settings,
            "cells": self.results,
            **_finite(figures),
            "notes": [*self.notes, *left_out],
            "failed": sum(result["status"] == FAILED for result in self.results),
        }
        report["pictures"] = [path.name for path in draw(report, self.log.folder)]
        write_file(self.log.folder / f"{self.name}.json", json.dumps(report, indent=1) + "\n")
        self._record.results(cells=len(self.results), pictures=report["pictures"])
        return report


def _why(figures: Figures) -> str:
    return f"{figures['status']}: {figures['reason']}"


def extrapolated(points: Sequence[tuple[float, float]], x: float, *, unknown: float) -> float:
    """The y at a greater x, on the power law through the last two points, no flatter than a line and no steeper than a square.

    Arguments:
        points: (x, y) by rising x, at least one.
        x: greater than theirs.
        unknown: the exponent where there is one point alone.
    """
    last_x, last_y = points[-1]
    power = unknown
    if len(points) > 1:
        before_x, before_y = points[-2]
        power = min(max(math.log(last_y / before_y) / math.log(last_x / before_x), 1.0), 2.0)
    return last_y * (x / last_x) ** power


def logarithmic_axes(axes: Any, ticks: Sequence[float], labels: Sequence[str]) -> None:
    """Makes both axes of a finished plot logarithmic, with ticks at these places of x and readable ones of y."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, labels)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def short_length(length: int) -> str:
    """A length for the tick of an axis: 64k, 1M."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if length % size == 0:
            return f"{length // size}{letter}"
    return str(length)


def describe_machine() -> dict[str, Any]:
    """What a measurement depends on besides the code: processor, cores, memory, and the versions of the libraries."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def source_version() -> str:
    """The version of the package; in a git checkout the commit too, and what was changed since as a hash."""
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not merely somewhere inside another project's checkout
        commit, changes = git("rev-parse", "--short", "HEAD").strip(), git("diff", "HEAD", "--", str(folder))
    except (OSError, subprocess.CalledProcessError):
        return __version__
    changed = f" changed {hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else ""
    return f"{__version__} {commit}{changed}"


def _processor() -> str:
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text(encoding="utf-8", errors="replace").splitlines() if processors.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _key(where: dict[str, Any], cell: Cell) -> str:
    return json.dumps([where, cell], sort_keys=True)


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
