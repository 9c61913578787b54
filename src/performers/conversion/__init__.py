"""Pretrained Transformers made linear: our mechanisms inside Hugging Face's models, swapped in place, saved and loaded."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from performers.conversion.cache import state_cache
    from performers.conversion.calibration import Calibration, calibrate
    from performers.conversion.distillation import distil
    from performers.conversion.swap import convert, load

_HOME = {
    "Calibration": "performers.conversion.calibration",
    "calibrate": "performers.conversion.calibration",
    "convert": "performers.conversion.swap",
    "distil": "performers.conversion.distillation",
    "load": "performers.conversion.swap",
    "state_cache": "performers.conversion.cache",
}

__all__ = ["Calibration", "calibrate", "convert", "distil", "load", "state_cache"]


def __getattr__(name: str) -> Any:
    # `interface` is imported with transformers, and must not bring the rest with it.
    if name not in _HOME:
        raise AttributeError(f"module 'performers.conversion' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
