"""A tool's work on any number of items: planned, done in shards, resumed after a kill, and put together at the end.

`run_tool` runs a `Tool` so that it leaves a file or folder:

1. the items are written to a hidden folder beside the output, `.NAME.building`, while they are counted and cut into shards of
   about `Tool.shard_tokens` tokens, in input order;
2. records, residues, predicted time and size are said, and a disk that is too small is refused;
3. each shard is computed and saved whole, durable and renamed; one that is there already is not computed again;
4. one pass over the shards writes the output, which then gets its name, with `run.json`, `cite.bibtex`, `methods.txt` and, if
   some items failed, `failed.tsv` beside it.

Batches never reach over the end of a shard, so what a shard holds is a function of its items alone, and a run that was killed
ends with the bytes of one that was not. Memory holds one shard at a time. Nothing here knows what the results mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from performers import __version__
from performers.data import FastaReport
from performers.data.fasta import locate
from performers.errors import InputError, OutputError, RunError
from performers.folders import building_folder, fsync, room_for, temporary_name, write_file, writing
from performers.randomness import derive_seed
from performers.tools.language_model import Unread
from performers.tools.tool import Item, Outcome, Result, Tool, Written
from performers.training.runs import RunRecord, describe_file

SAMPLES = 8


def run_tool(
    tool: Tool[Item],
    output: str | Path,
    *,
    sources: Sequence[str],
    settings: dict[str, Any],
    dry_run: bool = False,
    restart: bool = False,
) -> Outcome:
    """Run a tool so that it leaves an output, going on with what an earlier run of the same command left.

    Arguments:
        tool: what to run.
        output: the file or folder to write.
        sources: the files that the items come from; "-" is standard input.
        settings: all that decides the output besides the sources and the model.
        dry_run: say what the work would take, and do none of it.
        restart: forget what an earlier run left, and replace an output that is there.

    Raises:
        InputError: the sources are at fault, hold nothing, or no item can be read.
        OutputError: the output is in use, or its unfinished work is of other settings or inputs.
        DiskFullError: there is no room for the output.
        RunError: every item failed.
    """
    output = Path(output)
    settings = {**settings, "version": __version__, "model": tool.model.fingerprint()}
    settings |= {"device": str(tool.model.device), "dtype": str(tool.model.dtype).removeprefix("torch.")}
    settings = json.loads(json.dumps(settings, default=str))
    work = _Work(output, settings, sources)
    in_use = any(output.iterdir()) if output.is_dir() else output.exists()
    if in_use and output.is_dir() and not _is_of(tool, output):
        raise OutputError(
            f"{output} is already in use; expected a new or empty folder or one of `performers {tool.command}`."
        )
    if restart and not dry_run:
        work.forget()
    elif in_use and not restart and not work.exists:
        outcome = _finished_before(tool, output, settings, sources)
        work.forget()
        return outcome
    begun_before, begun = work.exists, False
    try:
        plan = work.plan(tool)
        estimate = _estimate(tool, plan, work)
        _announce(tool, plan, estimate, output)
        if dry_run:
            return Outcome(output, plan.items, plan.tokens, estimate=estimate, done=False)
        with room_for(output, estimate["bytes_to_write"]):
            begun = True
    finally:
        if not begun_before and not begun:
            work.forget()
    record = RunRecord(
        _record_folder(tool, output),
        tool.command,
        arguments={**settings, "input": list(sources), "output": str(output)},
        seed=None,
        device=str(tool.model.device),
        announce=False,  # the folder may hold the record of an earlier run until this one is done
    )
    with record, _kept(work.folder):
        _compute_shards(tool, plan, work)
        outcome = _assemble(tool, plan, work, estimate)
        record.inputs(plan.inputs)
        for file in tool.model.weights:
            record.weights(file)
        record.results(fingerprint=settings, **outcome.to_dict())
        _write_beside(tool, outcome)
    work.forget()
    return outcome


@dataclass(frozen=True)
class _Plan:
    """What there is to do. A shard is the place of its first item in `items.jsonl`, and the number of its items and tokens."""

    items: int
    tokens: int
    num_bytes: int
    longest: int
    about: str
    shards: list[tuple[int, int, int]]
    samples: list[Any]
    inputs: list[dict[str, Any]]
    remarks: list[str]
    settings: dict[str, Any]


class _Work:
    """The hidden folder in which an output comes to be."""

    def __init__(self, output: Path, settings: dict[str, Any], sources: Sequence[str]) -> None:
        self.output, self.folder = output, building_folder(output)
        self._settings, self._sources = settings, sources
        self._items = self.folder / "items.jsonl"
        self._plan = self.folder / "plan.json"

    @property
    def exists(self) -> bool:
        """Whether an earlier run got as far as its plan."""
        return self._plan.is_file()

    def forget(self) -> None:
        """Remove everything, the plan first: without it the rest is nothing."""
        self._plan.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def plan(self, tool: Tool[Any]) -> _Plan:
        """The plan of an earlier run, or a new one."""
        if not self.exists:
            return self._make_plan(tool)
        content = json.loads(self._plan.read_text(encoding="utf-8"))
        plan = _Plan(**{**content, "shards": [tuple(shard) for shard in content["shards"]]})
        different = [key for key, value in self._settings.items() if plan.settings.get(key) != value]
        advice = "finish that, or start anew with --restart"
        if different:
            raise OutputError(
                f"{self.folder} holds unfinished work for {self.output} with another {', '.join(different)}: {advice}."
            )
        if _describe_sources(self._sources) != plan.inputs:
            raise OutputError(f"{self.folder} holds unfinished work for {self.output} on other input: {advice}.")
        return plan

    def _make_plan(self, tool: Tool[Any]) -> _Plan:
        self.forget()
        with room_for(self.folder):
            self.folder.mkdir(parents=True)
        report = FastaReport()
        generator = random.Random(derive_seed(0, "estimate"))
        samples: list[Any] = []
        shards: list[tuple[int, int, int]] = []
        count = refused = tokens = num_bytes = longest = start = in_shard = shard_tokens = 0
        refusal = ""
        with room_for(self._items), self._items.open("wb") as stream:
            for item in tool.items(report):
                content = tool.to_json(item)
                stream.write(json.dumps(content, separators=(",", ":")).encode() + b"\n")
                count += 1
                cost = tool.tokens(item)
                tokens, longest = tokens + cost, max(longest, tool.longest(item))
                if (reason := tool.refusal(item)) is not None:
                    refused += 1
                    refusal = refusal or f"number {count:,} ({tool.label(item)[1]}): {reason}"
                num_bytes += tool.num_bytes(item)
                if len(samples) < SAMPLES:
                    samples.append(content)
                elif (place := generator.randrange(count)) < SAMPLES:
                    samples[place] = content
                in_shard, shard_tokens = in_shard + 1, shard_tokens + cost
                if shard_tokens >= tool.shard_tokens:
                    shards.append((start, in_shard, shard_tokens))
                    start, in_shard, shard_tokens = stream.tell(), 0, 0
            if in_shard:
                shards.append((start, in_shard, shard_tokens))
        if not count:
            raise InputError(f"There are no {tool.noun} to work on in {', '.join(self._sources)}.")
        if refused == count:
            raise InputError(f"None of the {count:,} {tool.noun} can be read, first {refusal}.")
        inputs = [{"name": file.name, "num_bytes": file.num_bytes, "sha256": file.sha256} for file in report.inputs]
        plan = _Plan(
            items=count,
            tokens=tokens,
            num_bytes=num_bytes,
            longest=longest,
            about=tool.about(report),
            shards=shards,
            samples=samples,
            inputs=inputs,
            remarks=report.remarks(),
            settings=self._settings,
        )
        write_file(self._plan, json.dumps(vars(plan)))
        return plan

    def shard(self, index: int) -> Path:
        """Where a shard's results are, when they are."""
        return self.folder / f"{index:06d}.safetensors"

    def is_done(self, index: int) -> bool:
        """Whether a shard's results are there."""
        path = self.shard(index)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="numpy"):
                return True
        except (SafetensorError, OSError):
            return False

    def items(self, tool: Tool[Item], shard: tuple[int, int, int]) -> list[Item]:
        """The items of a shard."""
        start, count, _ = shard
        with self._items.open("rb") as stream:
            stream.seek(start)
            return [tool.from_json(json.loads(stream.readline())) for _ in range(count)]

    def save(self, index: int, results: Sequence[Result]) -> None:
        """Keep the results of a shard, whole and durable."""
        arrays = {
            f"{place}/{name}": np.ascontiguousarray(array)
            for place, result in enumerate(results)
            if not isinstance(result, Unread)
            for name, array in result.items()
        }
        unread = {str(place): result.reason for place, result in enumerate(results) if isinstance(result, Unread)}
        path = self.shard(index)
        temporary = temporary_name(path)
        with room_for(path, sum(array.nbytes for array in arrays.values())):
            save_file(arrays, temporary, metadata={"unread": json.dumps(unread)})
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)

    def unread(self, index: int) -> dict[int, str]:
        """Which items of a shard have no result, and why."""
        with safe_open(self.shard(index), framework="numpy") as file:
            return {int(place): reason for place, reason in json.loads(file.metadata()["unread"]).items()}

    def results(self, index: int, count: int) -> Iterator[Result]:
        """The results of a shard's items, in order."""
        unread = self.unread(index)
        found: list[dict[str, npt.NDArray[Any]]] = [{} for _ in range(count)]
        for key, array in load_file(self.shard(index)).items():
            place, _, name = key.partition("/")
            found[int(place)][name] = array
        for place, arrays in enumerate(found):
            yield Unread(unread[place]) if place in unread else arrays


def _describe_sources(sources: Sequence[str]) -> list[dict[str, Any]]:
    """What the plan says of its inputs, for the files as they are now."""
    report: list[dict[str, Any]] = []
    for source in sources:
        path = locate(source)
        if path is None:
            digest, size = hashlib.sha256(), 0
            while block := sys.stdin.buffer.read(1 << 20):
                digest.update(block)
                size += len(block)
            report.append({"name": "standard input", "num_bytes": size, "sha256": digest.hexdigest()})
        else:
            report.append({**describe_file(path), "name": str(source)})
    return report


def _compute_shards(tool: Tool[Any], plan: _Plan, work: _Work) -> None:
    missing = [index for index in range(len(plan.shards)) if not work.is_done(index)]
    if len(missing) < len(plan.shards):
        _say(f"{len(plan.shards) - len(missing)} of {len(plan.shards)} shards were done before.")
    total = sum(plan.shards[index][2] for index in missing)
    with _progress(total) as advance:
        for index in missing:
            shard = plan.shards[index]
            work.save(index, tool.compute(work.items(tool, shard)))
            advance(shard[2])


@dataclass(frozen=True)
class _Results:
    """All items with their results, in order, read from the shards as often as is asked."""

    tool: Tool[Any]
    plan: _Plan
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


def _assemble(tool: Tool[Any], plan: _Plan, work: _Work, estimate: dict[str, Any]) -> Outcome:
    """Write the output from the shards and give it its name.

    Raises:
        RunError: there is not one result to write.
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
        if work.output.is_dir():
            shutil.rmtree(work.output)
        # The output last: where it is, all is.
        for file in sorted(path.parent.iterdir(), key=lambda file: file == path):
            if file.is_file():
                fsync(file)
            os.replace(file, work.output.with_name(file.name))
        fsync(work.output.absolute().parent)
    return Outcome(work.output, written.items, plan.tokens, written.failed, written.figures, estimate)


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


def _record_folder(tool: Tool[Any], output: Path) -> Path:
    """Where the record of an output goes: into it or beside it, but never over the record of something else."""
    if tool.makes_folder:
        return output
    beside = output.absolute().parent
    try:
        content = json.loads((beside / "run.json").read_text(encoding="utf-8"))
        mine = Path(content["results"]["output"]).name == output.name
    except FileNotFoundError:
        mine = True
    except (OSError, ValueError, KeyError, TypeError):
        mine = False
    if not mine:
        beside = beside / f"{output.name}.record"
    with writing(beside):
        beside.mkdir(parents=True, exist_ok=True)
    return beside


def _write_beside(tool: Tool[Any], outcome: Outcome) -> None:
    folder = _record_folder(tool, outcome.output)
    write_file(folder / "methods.txt", tool.methods(outcome) + "\n")
    failed = folder / "failed.tsv"
    if outcome.failed:
        rows = [f"{number}\t{_in_a_cell(name)}\t{_in_a_cell(reason)}\n" for number, name, reason in outcome.failed]
        write_file(failed, "number\tid\treason\n" + "".join(rows))
        _say(f"{len(outcome.failed):,} of {outcome.items:,} {tool.noun} failed; {failed} says why.")
    else:
        failed.unlink(missing_ok=True)


def _read_failed(folder: Path) -> list[tuple[int, str, str]]:
    path = folder / "failed.tsv"
    if not path.is_file():
        return []
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [(int(number), name, reason) for number, name, reason in rows]


def _in_a_cell(text: str) -> str:
    return " ".join(text.split())


def _is_of(tool: Tool[Any], folder: Path) -> bool:
    """Whether a folder is an output of this tool, which may be replaced."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["command"] == tool.command
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _finished_before(tool: Tool[Any], output: Path, settings: dict[str, Any], sources: Sequence[str]) -> Outcome:
    """The outcome of an earlier run of the same command.

    Raises:
        OutputError: the output was not made by it.
    """
    try:
        content = json.loads((_record_folder(tool, output) / "run.json").read_text(encoding="utf-8"))
        results = content["results"]
        same = results["fingerprint"] == settings and content["inputs"] == _describe_sources(sources)
        outcome = Outcome(
            output, results["items"], results["tokens"], _read_failed(_record_folder(tool, output)), results["figures"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        same, outcome = False, None
    if not same or outcome is None:
        raise OutputError(f"{output} is already there, of other settings or inputs; --restart replaces it.")
    _say(f"{output} is complete; --restart makes it again.")
    return outcome


def _estimate(tool: Tool[Any], plan: _Plan, work: _Work) -> dict[str, Any]:
    """Seconds and bytes, from reading a few of the items."""
    items = sorted((tool.from_json(sample) for sample in plan.samples), key=tool.tokens)
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


def _announce(tool: Tool[Any], plan: _Plan, estimate: dict[str, Any], output: Path) -> None:
    for remark in (*plan.remarks, *([] if (said := tool.model.remark()) is None else [said])):
        _say(remark)
    trained = tool.model.trained_length
    if trained is not None and plan.longest > trained:
        _say(
            f"Up to {plan.longest:,} tokens are read at a time, and the model was trained on {trained:,}: "
            "what it makes of longer ones is extrapolation."
        )
    _say(
        f"{plan.about}, {plan.tokens:,} tokens to read: about {duration(estimate['seconds'])} on "
        f"{tool.model.device}, {_size(estimate['bytes'])} in {output}."
    )


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _say(f"What was done is kept in {folder}; the same command goes on.")
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
            _say(f"{done / total:4.0%}  {done / (now - started):,.0f} tokens/s  about {duration(left)} left")

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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
