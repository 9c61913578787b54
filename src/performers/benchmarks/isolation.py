"""Runs one measurement in a fresh Python process and brings its figures back."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from performers.benchmarks.experiment import NO_ROOM
from performers.errors import InputError, PerformersError, RunError
from performers.memory import peak_memory, status

_MARK = "figures: "
# For measurements of memory: glibc keeps freed memory for itself otherwise, and the peak would count it.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run_alone(
    function: str, *, environment: dict[str, str] | None = None, timeout: float | None = None, **arguments: Any
) -> dict[str, Any]:
    """The result of a function in a Python process of its own.

    Arguments:
        function: "package.module:name"; it takes `arguments` and returns a dictionary that JSON can hold.
        environment: variables to set in the process besides those of this one.
        timeout: seconds after which the process is killed.
        arguments: anything JSON can hold.

    Returns:
        The function's dictionary, and `peak_bytes`, the largest resident memory of the process, unless it holds that already.

    Raises:
        InputError: the function refused its arguments.
        RunError: the process failed, for instance for want of memory.
        TimeoutError: it was not done in time.
    """
    try:
        process = subprocess.run(
            [sys.executable, "-m", "performers.benchmarks.isolation", function, json.dumps(arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(environment or {})},
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{function} was not done in {timeout:,.0f} seconds") from None
    last = process.stdout.strip().rpartition("\n")[2]
    if process.returncode == 2:
        raise InputError(process.stderr.strip().rpartition("\n")[2])
    if process.returncode or not last.startswith(_MARK):
        reason = process.stderr.strip().rpartition("\n")[2] or "nothing on stderr"
        raise RunError(f"{function} ended with status {process.returncode}: {reason}")
    return json.loads(last.removeprefix(_MARK))


def or_no_room(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A measurement of a cell, given as keywords, for which running out of memory is a result."""

    @functools.wraps(measure)
    def measured(**cell: Any) -> dict[str, Any]:
        try:
            return measure(cell)
        except (RuntimeError, MemoryError) as error:
            if not _says_no_room(error):
                raise
            return {"status": NO_ROOM, "reason": "memory ran out"}

    return measured


def was_killed(error: RunError) -> bool:
    """Whether the system ended the process of `run_alone`, as Linux does when memory runs out."""
    return "status -9:" in str(error)


def available_memory() -> int | None:
    """The bytes that this process can still take without swapping or being killed; None where the system does not tell."""
    available: list[int] = []
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as lines:
        available.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" is none
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        available.append(limit - used)
    return min(available, default=None)


def refuse_beyond_available_memory() -> None:
    """Makes an allocation that the machine has no room for fail in this process, before the system kills one of its choice."""
    available, used = available_memory(), status("VmData")
    if available is not None and used is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = used + int(0.9 * available)
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _says_no_room(error: BaseException) -> bool:
    import torch

    words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _main(function: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    try:
        figures = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    except PerformersError as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    print(_MARK + json.dumps({"peak_bytes": peak_memory(), **figures}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
