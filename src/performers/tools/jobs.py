"""A tool's work on any number of items: planned, done in shards, resumed after a kill, and put together at the end.

`run_tool` runs a `Tool` so that it leaves a file or folder:

1. the items are written to a hidden folder beside the output, `.NAME.building`, while they are counted and cut into shards of
   about `Tool.shard_tokens` tokens, in input order;
2. records, residues, predicted time and size are said, and a disk that is too small is refused, as is a file beside the output
   that would be replaced without having come with it;
3. each shard is computed and saved whole, durable and renamed; one that is there already is not computed again;
4. one pass over the shards writes the output, which then gets its name, with `run.json`, `cite.bibtex`, `methods.txt` and, if
   some items failed or some records were left out, `failed.tsv` beside it.

Batches never reach over the end of a shard, so what a shard holds is a function of its items alone, and a run that was killed
ends with the bytes of one that was not. Memory holds one shard at a time. `performers.tools.engine` says where shards are
computed, `performers.tools.work` how they are kept. Nothing here knows what the results mean.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performers import __version__
from performers.errors import InputError, OutputError, RunError
from performers.folders import fsync, room_for
from performers.tools.beside import (
    check_beside,
    files_beside,
    note_beside,
    noted_beside,
    read_failed,
    record_folder,
    results_before,
    say,
    write_beside,
)
from performers.tools.engine import LOCAL, Engine
from performers.tools.tool import Item, Outcome, Result, Tool, Written
from performers.tools.work import Plan
from performers.tools.work import Work as _Work
from performers.training.runs import RunRecord


def run_tool(
    tool: Tool[Item],
    output: str | Path,
    *,
    sources: Sequence[str],
    settings: dict[str, Any],
    dry_run: bool = False,
    restart: bool = False,
    engine: Engine = LOCAL,
) -> Outcome:
    """Run a tool so that it leaves an output, going on with what an earlier run of the same command left.

    Arguments:
        tool: what to run.
        output: the file or folder to write.
        sources: the files that the items come from; "-" is standard input.
        settings: all that decides the output besides the sources and the model.
        dry_run: say what the work would take, refuse what would be refused, and do none of it.
        restart: forget what an earlier run left, and replace an output that is there.
        engine: what computes the shards. One of several ranks comes back without an output, `Outcome.done` being False, where
            others have not finished their shards: the last of them writes it.

    Raises:
        InputError: the sources are at fault, hold nothing, or no item can be read; the output is one of them; several ranks were
            to start anew.
        OutputError: the output or a file beside it is in use, or its unfinished work is of other settings or inputs, or another
            process is at it.
        DiskFullError: there is no room for the output.
        RunError: every item failed.
    """
    output = Path(output)
    settings = {**settings, "version": __version__, "model": tool.model.fingerprint()}
    settings |= {"device": str(tool.model.device), "dtype": str(tool.model.dtype).removeprefix("torch.")}
    settings = json.loads(json.dumps(settings, default=str))
    work = _Work(output, settings, sources)
    if restart and engine.is_shared:
        raise InputError(f"--restart with several processes: each would start anew; remove {output} and {work.folder}.")
    if output.exists() and any(Path(source).exists() and output.samefile(source) for source in sources):
        raise InputError(f"{output} is one of the inputs; expected another output.")
    if output.is_dir() and _is_in_use(output) and not _is_of(tool, output) and output.name not in noted_beside(output):
        raise OutputError(
            f"{output} is already in use; expected a new or empty folder or one of `performers {tool.command}`."
        )
    with work.claimed(wait=engine.is_shared):
        if _is_in_use(output) and not restart and not work.exists:
            return _finished_before(tool, output, settings, sources, work)
        plan, estimate = _begin(tool, output, work, engine, dry_run=dry_run, restart=restart)
        if dry_run:
            return Outcome(output, plan.items, plan.tokens, estimate=estimate, done=False)
        record = RunRecord(
            record_folder(output, makes_folder=tool.makes_folder),
            tool.command,
            arguments={**settings, "input": list(sources), "output": str(output)},
            seed=None,
            device=str(tool.model.device),
            references=tool.references,
            announce=False,  # the folder may hold the record of an earlier run until this one is done
        )
        record.inputs(plan.inputs)
        for file in tool.model.weights:
            record.weights(file)
        if not engine.is_shared:
            with record, _kept(work.folder):
                _compute_shards(tool, plan, work, engine)
                outcome = _finish(tool, plan, work, estimate, record, settings)
            work.forget()
            return outcome
    with _kept(work.folder):
        _compute_shards(tool, plan, work, engine)
    with work.claimed(wait=True):
        if not work.exists:
            # Another process found all shards done, this one's too.
            if not _is_in_use(output):
                work.forget()
                raise RunError(f"Another process ended the work on {output}, without an output; it says why.")
            return _finished_before(tool, output, settings, sources, work)
        left = sum(not work.is_done(index) for index in range(len(plan.shards)))
        if left:
            say(f"{left} of {len(plan.shards)} shards are left to the other processes; the last one writes {output}.")
            return Outcome(output, plan.items, plan.tokens, estimate=estimate, done=False)
        with record, _kept(work.folder):
            outcome = _finish(tool, plan, work, estimate, record, settings)
        work.forget()
        return outcome


def _is_in_use(output: Path) -> bool:
    return any(output.iterdir()) if output.is_dir() else output.exists()


def _begin(
    tool: Tool[Any], output: Path, work: _Work, engine: Engine, *, dry_run: bool, restart: bool
) -> tuple[Plan, dict[str, Any]]:
    """The plan, new or that of an earlier run, and the estimate, which one process alone makes and says."""
    if restart and not dry_run:
        work.clear()
    begun_before, begun = work.exists, False
    try:
        check_beside(output, tool.beside(output))
        plan = work.plan(tool)
        if engine.rank and not dry_run:
            begun = True
            return plan, {}
        estimate = _estimate(tool, plan, work)
        _announce(tool, plan, estimate, output)
        with room_for(output, estimate["bytes_to_write"]):
            begun = not dry_run
        return plan, estimate
    finally:
        if not begun_before and not begun:
            work.forget()


def _finish(
    tool: Tool[Any], plan: Plan, work: _Work, estimate: dict[str, Any], record: RunRecord, settings: dict[str, Any]
) -> Outcome:
    """Assemble the output, and write what goes beside it."""
    outcome = _assemble(tool, plan, work, estimate)
    record.results(fingerprint=settings, files=files_beside(outcome.output), **outcome.to_dict())
    folder = record_folder(outcome.output, makes_folder=tool.makes_folder)
    write_beside(folder, tool.methods(outcome), outcome.failed, tool.tally(outcome))
    return outcome


def _compute_shards(tool: Tool[Any], plan: Plan, work: _Work, engine: Engine) -> None:
    own = [index for index in range(len(plan.shards)) if engine.takes(index)]
    missing = [index for index in own if not work.is_done(index)]
    if len(missing) < len(own):
        say(f"{len(own) - len(missing)} of {len(own)} shards were done before.")
    total = sum(plan.shards[index][2] for index in missing)
    with _progress(total) as advance:
        for index, results in engine.compute(tool, _Missing(plan, work, missing)):
            work.save(index, results)
            advance(plan.shards[index][2])


@dataclass(frozen=True)
class _Missing:
    """The shards that are to be computed, as engines take them."""

    plan: Plan
    work: _Work
    indices: list[int]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def contents(self, index: int) -> list[Any]:
        return self.work.contents(self.plan.shards[index])


@dataclass(frozen=True)
class _Results:
    """All items with their results, in order, read from the shards as often as is asked."""

    tool: Tool[Any]
    plan: Plan
    work: _Work

    def __iter__(self) -> Iterator[tuple[Any, Result]]:
        for index, shard in enumerate(self.plan.shards):
            items = self.work.items(self.tool, shard)
            yield from zip(items, self.work.results(index, len(items)), strict=True)

    def failed(self) -> Iterator[tuple[int, str, str]]:
        """Number, identifier and reason of the items without a result."""
        for index, shard in enumerate(self.plan.shards):
            unread = self.work.unread(index)
            items = self.work.items(self.tool, shard) if unread else []
            yield from ((*self.tool.label(items[place]), reason) for place, reason in sorted(unread.items()))


def _assemble(tool: Tool[Any], plan: Plan, work: _Work, estimate: dict[str, Any]) -> Outcome:
    """Write the output from the shards and give it its name.

    Raises:
        RunError: there is not one result to write.
        OutputError: a file that is to stand beside the output is there already, and did not come with it.
    """
    results = _Results(tool, plan, work)
    failed = list(results.failed())
    if len(failed) == plan.items:
        number, identifier, reason = failed[0]
        work.forget()
        raise RunError(f"All {plan.items:,} {tool.noun} failed, first number {number:,} ({identifier}): {reason}.")
    path = work.folder / "output" / work.output.name
    with room_for(work.output):
        if path.parent.exists():
            shutil.rmtree(path.parent)
        path.parent.mkdir()
        with _hdf5_errors():
            written = tool.write(results, path) or Written(plan.items, failed)
        names = [file.name for file in path.parent.iterdir() if file != path]
        check_beside(work.output, names)
        note_beside(work.output, [*names, work.output.name])
        if work.output.is_dir():
            shutil.rmtree(work.output)
        # The output last: where it is, all is.
        for file in sorted(path.parent.iterdir(), key=lambda file: file == path):
            if file.is_file():
                fsync(file)
            os.replace(file, work.output.with_name(file.name))
        fsync(work.output.absolute().parent)
    # A record that was left out as asked is one without a result, too.
    items, failed = written.items + len(plan.left_out), sorted([*plan.left_out, *written.failed])
    return Outcome(work.output, items, plan.tokens, failed, written.figures, estimate)


@contextmanager
def _hdf5_errors() -> Iterator[None]:
    """HDF5 gives the system's number in the text of its errors alone."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = re.search(r"errno = (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _is_of(tool: Tool[Any], folder: Path) -> bool:
    """Whether a folder is an output of this tool, which may be replaced."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["command"] == tool.command
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _finished_before(
    tool: Tool[Any], output: Path, settings: dict[str, Any], sources: Sequence[str], work: _Work
) -> Outcome:
    """The outcome of an earlier run of the same command, which left nothing to do.

    Raises:
        OutputError: the output was not made by it.
    """
    work.forget()
    folder = record_folder(output, makes_folder=tool.makes_folder)
    results = results_before(output, folder, settings, sources)
    return Outcome(output, results["items"], results["tokens"], read_failed(folder), results["figures"])


def _estimate(tool: Tool[Any], plan: Plan, work: _Work) -> dict[str, Any]:
    """Seconds and bytes, from reading a few of the items."""
    items = sorted((tool.probe(tool.from_json(sample)) for sample in plan.samples), key=tool.tokens)
    budget = max(2048, plan.tokens // 50)
    sample = [items[0]]
    for item in items[1:]:
        if sum(map(tool.tokens, sample)) + tool.tokens(item) <= budget:
            sample.append(item)
    tool.compute(items[:1])  # what is slow for the first time only
    started = time.monotonic()
    tool.compute(sample)
    pace = (time.monotonic() - started) / sum(map(tool.tokens, sample))
    missing = [shard[2] for index, shard in enumerate(plan.shards) if not work.is_done(index)]
    share = sum(missing) / plan.tokens
    return {
        "seconds": round(pace * sum(missing), 3),
        "bytes": plan.num_bytes,
        "bytes_to_write": round(plan.num_bytes * (1 + share)),
    }


def _announce(tool: Tool[Any], plan: Plan, estimate: dict[str, Any], output: Path) -> None:
    for remark in (*plan.remarks, *([] if (said := tool.model.remark()) is None else [said])):
        say(remark)
    trained = tool.model.trained_length
    if trained is not None and plan.longest > trained:
        say(
            f"Up to {plan.longest:,} tokens are read at a time, and the model was trained on {trained:,}: "
            "what it makes of longer ones is extrapolation."
        )
    say(
        f"{plan.about}, {plan.tokens:,} tokens to read: about {duration(estimate['seconds'])} on "
        f"{tool.model.device}, {_size(estimate['bytes'])} in {output}."
    )


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        say(f"What was done is kept in {folder}; the same command goes on.")
        raise


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, a line now and then elsewhere; on stderr. What it yields is told how many tokens are done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

        with Progress(BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda tokens: bar.advance(task, tokens)
        return
    started = last = time.monotonic()
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done, last
        done += tokens
        now = time.monotonic()
        if now - last >= 10:
            last = now
            left = (now - started) / done * (total - done)
            say(f"{done / total:4.0%}  {done / (now - started):,.0f} tokens/s  about {duration(left)} left")

    yield advance


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _size(num_bytes: float) -> str:
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            break
        num_bytes, unit = num_bytes / 1000, larger
    return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
