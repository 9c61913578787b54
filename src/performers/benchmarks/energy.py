"""The energy that work takes: read from counters where the machine has them, else estimated by codecarbon, and it says which.

Counters are Intel's and AMD's RAPL (whole processor packages, so other work on the machine counts too) and, on cuda, NVIDIA's of
the GPU alone. Carbon is energy times the carbon intensity of the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from performers.errors import MissingExtraError
from performers.training.runs import energy_tracker

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


def energy_of(work: Callable[[], None], device: str) -> dict[str, Any]:
    """Does the work and says what energy it took.

    Arguments:
        work: returns when all of it is done.
        device: "cpu", "cuda"...

    Returns:
        joules, and source: "measured: ..." or "estimated: ...".

    Raises:
        MissingExtraError: there are no counters that may be read, and codecarbon is not installed.
    """
    if device.startswith("cuda") and find_spec("pynvml"):
        return _by_nvml(work, device)
    domains = rapl_domains()
    if domains and not device.startswith("cuda"):
        before = [_counter(domain) for domain in domains]
        work()
        after = [_counter(domain) for domain in domains]
        # A counter starts at 0 again after its range.
        micro = sum(
            b - a if b >= a else b - a + int((domain / "max_energy_range_uj").read_text())
            for domain, a, b in zip(domains, before, after, strict=True)
        )
        return {"joules": micro / 1e6, "source": f"measured: RAPL counters of {len(domains)} processor packages"}
    return _by_codecarbon(work)


def rapl_domains() -> list[Path]:
    """The counters of the processor packages, as far as this process may read them (Linux gives them to root alone)."""
    found: list[Path] = []
    for domain in sorted(POWERCAP.glob("intel-rapl:*")):
        try:
            if (domain / "name").read_text().startswith("package"):
                _counter(domain)
                found.append(domain)
        except OSError:
            continue
    return found


def _counter(domain: Path) -> int:
    return int((domain / "energy_uj").read_text())


def _by_nvml(work: Callable[[], None], device: str) -> dict[str, Any]:
    import pynvml  # pyright: ignore[reportMissingImports]
    import torch

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        work()
        millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before
    finally:
        pynvml.nvmlShutdown()
    return {"joules": millijoules / 1e3, "source": "measured: the GPU's counter (NVML), without the processor"}


def _by_codecarbon(work: Callable[[], None]) -> dict[str, Any]:
    tracker = energy_tracker(measure_power_secs=1)
    if tracker is None:
        raise MissingExtraError("codecarbon", "carbon", "energy where counters cannot be read")
    work()
    tracker.stop()
    joules = tracker.final_emissions_data.energy_consumed * JOULES_PER_KWH
    return {"joules": joules, "source": "estimated: codecarbon, from the processor's rated power and its load"}
