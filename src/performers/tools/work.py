"""The hidden folder beside an output, in which the output comes to be: its plan, its items and the results of its shards.

Everything in it is written whole and durable, so that a kill at any moment leaves something to go on with. One process at a time
plans and assembles (`Work.claimed`); any number may compute shards, for a shard's results are a function of its items. Nothing
here knows what the results mean.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from performers.data import FastaReport
from performers.data.fasta import locate
from performers.errors import InputError, OutputError
from performers.folders import building_folder, fsync, room_for, temporary_name, write_file
from performers.randomness import derive_seed
from performers.tools.language_model import Unread
from performers.tools.tool import Item, Result, Tool
from performers.training.runs import describe_file

SAMPLES = 8
BESIDE = "beside.json"
"""What has been put beside the output; `performers.tools.beside` reads and writes it."""


@dataclass(frozen=True)
class Plan:
    """What there is to do, as it is written down.

    A shard is the place of its first item in `items.jsonl`, and the number of its items and tokens. Left out are number,
    identifier and reason of each record that gave no item, where that was asked for.
    """

    items: int
    tokens: int
    num_bytes: int
    longest: int
    about: str
    shards: list[tuple[int, int, int]]
    samples: list[Any]
    inputs: list[dict[str, Any]]
    remarks: list[str]
    left_out: list[tuple[int, str, str]]
    settings: dict[str, Any]


class Work:
    """The hidden folder in which an output comes to be."""

    def __init__(self, output: Path, settings: dict[str, Any], sources: Sequence[str]) -> None:
        self.output, self.folder = output, building_folder(output)
        self._settings, self._sources = settings, sources
        self._items = self.folder / "items.jsonl"
        self._plan = self.folder / "plan.json"
        self._lock = self.folder / "lock"

    @property
    def exists(self) -> bool:
        """Whether an earlier run got as far as its plan."""
        return self._plan.is_file()

    def forget(self) -> None:
        """Remove everything, the plan first: without it the rest is nothing."""
        self._plan.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def clear(self) -> None:
        """Remove everything but the claim on the folder, and the note of what stands beside the output."""
        self._plan.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (self._lock.name, BESIDE):
                path.unlink()

    @contextmanager
    def claimed(self, *, wait: bool) -> Iterator[None]:
        """Keeps other processes out of the folder for the length of a block; makes the folder if there is none.

        Arguments:
            wait: until another process leaves it, rather than refuse.

        Raises:
            OutputError: another process is there.
        """
        while True:
            with room_for(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                # Opened for writing, as network file systems ask of a lock that excludes others.
                descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise OutputError(
                    f"{self.output} is being made by another process; wait for it, or choose another output."
                ) from None
            # Whoever had it before may have finished and removed the folder.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self._lock)):
                    break
            os.close(descriptor)
        try:
            yield
        finally:
            os.close(descriptor)

    def plan(self, tool: Tool[Any]) -> Plan:
        """The plan of an earlier run, or a new one."""
        if not self.exists:
            return self._make_plan(tool)
        content = json.loads(self._plan.read_text(encoding="utf-8"))
        lists = {name: [tuple(entry) for entry in content[name]] for name in ("shards", "left_out")}
        plan = Plan(**{**content, **lists})
        different = [key for key, value in self._settings.items() if plan.settings.get(key) != value]
        advice = "finish that, or start anew with --restart"
        if different:
            raise OutputError(
                f"{self.folder} holds unfinished work for {self.output} with another {', '.join(different)}: {advice}."
            )
        if describe_sources(self._sources) != plan.inputs:
            raise OutputError(f"{self.folder} holds unfinished work for {self.output} on other input: {advice}.")
        return plan

    def _make_plan(self, tool: Tool[Any]) -> Plan:
        self.clear()
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
            why = f": all {report.skipped:,} records were left out" if report.skipped else ""
            raise InputError(f"There are no {tool.entries or tool.noun} to work on in {', '.join(self._sources)}{why}.")
        if refused == count:
            raise InputError(f"None of the {count:,} {tool.noun} can be read, first {refusal}.")
        inputs = [{"name": file.name, "num_bytes": file.num_bytes, "sha256": file.sha256} for file in report.inputs]
        plan = Plan(
            items=count,
            tokens=tokens,
            num_bytes=num_bytes,
            longest=longest,
            about=tool.about(report),
            shards=shards,
            samples=samples,
            inputs=inputs,
            remarks=report.remarks(),
            left_out=report.left_out,
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

    def contents(self, shard: tuple[int, int, int]) -> list[Any]:
        """The items of a shard, as JSON holds them."""
        start, count, _ = shard
        with self._items.open("rb") as stream:
            stream.seek(start)
            return [json.loads(stream.readline()) for _ in range(count)]

    def items(self, tool: Tool[Item], shard: tuple[int, int, int]) -> list[Item]:
        """The items of a shard."""
        return [tool.from_json(content) for content in self.contents(shard)]

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


def describe_sources(sources: Sequence[str]) -> list[dict[str, Any]]:
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
