"""Pretraining that survives being killed, checkpoints that show damage, and evaluation beside a baseline.

`pretrain` turns a `PretrainConfig` into a run folder; `evaluate` measures a model on proteins. Any other training is a `Task`
(`performers.training.task`) for the same loop. The names load on first use: the command line reads the configuration without
importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from performers.training.configuration import PretrainConfig

if TYPE_CHECKING:
    from performers.training.checkpoint import open_model
    from performers.training.evaluation import Evaluation, evaluate
    from performers.training.pretraining import PretrainResult, pretrain

_HOME = {
    "Evaluation": "performers.training.evaluation",
    "PretrainResult": "performers.training.pretraining",
    "evaluate": "performers.training.evaluation",
    "open_model": "performers.training.checkpoint",
    "pretrain": "performers.training.pretraining",
}

__all__ = ["Evaluation", "PretrainConfig", "PretrainResult", "evaluate", "open_model", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
