"""Linear-time Transformers for proteins.

Importing this package costs next to nothing: the public names load on first use, and neither torch nor transformers is
imported before one of them needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from performers import huggingface as _huggingface

__version__ = "0.1.0"

if TYPE_CHECKING:
    from performers.attention import (
        ExactState,
        FavorFeatures,
        FavorState,
        exact_attention,
        favor_attention,
        reformer_attention,
        sparse_attention,
        sparse_pattern,
    )
    from performers.conversion import calibrate, convert, load
    from performers.data import Corpus, build_corpus, read_fasta
    from performers.models import (
        PerformerConfig,
        PerformerForCausalLM,
        PerformerForMaskedLM,
        PerformerForSequenceClassification,
        PerformerForTokenClassification,
        PerformerModel,
        PerformerTokenizer,
    )
    from performers.training import evaluate, pretrain

_HOME = {
    "FavorFeatures": "performers.attention",
    "FavorState": "performers.attention",
    "favor_attention": "performers.attention",
    "ExactState": "performers.attention",
    "exact_attention": "performers.attention",
    "reformer_attention": "performers.attention",
    "sparse_attention": "performers.attention",
    "sparse_pattern": "performers.attention",
    "calibrate": "performers.conversion",
    "convert": "performers.conversion",
    "load": "performers.conversion",
    "Corpus": "performers.data",
    "build_corpus": "performers.data",
    "read_fasta": "performers.data",
    "PerformerConfig": "performers.models",
    "PerformerModel": "performers.models",
    "PerformerForMaskedLM": "performers.models",
    "PerformerForCausalLM": "performers.models",
    "PerformerForSequenceClassification": "performers.models",
    "PerformerForTokenClassification": "performers.models",
    "PerformerTokenizer": "performers.models",
    "evaluate": "performers.training",
    "pretrain": "performers.training",
}

__all__ = [
    "Corpus",
    "ExactState",
    "FavorFeatures",
    "FavorState",
    "PerformerConfig",
    "PerformerForCausalLM",
    "PerformerForMaskedLM",
    "PerformerForSequenceClassification",
    "PerformerForTokenClassification",
    "PerformerModel",
    "PerformerTokenizer",
    "__version__",
    "build_corpus",
    "calibrate",
    "convert",
    "evaluate",
    "exact_attention",
    "favor_attention",
    "load",
    "pretrain",
    "read_fasta",
    "reformer_attention",
    "sparse_attention",
    "sparse_pattern",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'performers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_huggingface.install_hooks()
