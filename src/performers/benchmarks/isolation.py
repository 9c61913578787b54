"""Runs one measurement in a fresh Python process and brings its figures back."""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import subprocess
import sys
from typing import Any

from performers.errors import InputError, PerformersError, RunError

_MARK = "figures: "


def run_alone(function: str, **arguments: Any) -> dict[str, Any]:
    """The result of a function in a Python process of its own.

    Arguments:
        function: "package.module:name"; it takes `arguments` and returns a dictionary that JSON can hold.
        arguments: anything JSON can hold.

    Returns:
        The function's dictionary, and `peak_bytes`, the largest resident memory of the process, unless it holds that already.

    Raises:
        InputError: the function refused its arguments.
        RunError: the process failed, for instance for want of memory.
    """
    process = subprocess.run(
        [sys.executable, "-m", "performers.benchmarks.isolation", function, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    last = process.stdout.strip().rpartition("\n")[2]
    if process.returncode == 2:
        raise InputError(process.stderr.strip().rpartition("\n")[2])
    if process.returncode or not last.startswith(_MARK):
        reason = process.stderr.strip().rpartition("\n")[2] or "nothing on stderr"
        raise RunError(f"{function} ended with status {process.returncode}: {reason}")
    return json.loads(last.removeprefix(_MARK))


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/status") as status:
        # getrusage would count the process that started this one, too, up to the moment that Python took its place.
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
