"""How much memory this process takes, as the operating system counts it. Knows nothing of what the memory is for."""

from __future__ import annotations

import contextlib
import resource
import sys


def peak_memory() -> int:
    """The largest resident memory of this process so far, or since `forget_peak`, in bytes."""
    # getrusage would count the process that started this one, too, up to the moment that Python took its place.
    peak = status("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """The resident memory of this process, in bytes; where the system does not tell, the largest so far."""
    resident = status("VmRSS")
    return peak_memory() if resident is None else resident


def forget_peak() -> None:
    """Starts `peak_memory` anew from what is resident now, where the system can (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def status(field: str) -> int | None:
    """A line of this process's memory account on Linux, in bytes; None elsewhere."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
    return None
