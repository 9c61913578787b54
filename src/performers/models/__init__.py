"""The Performer as Hugging Face models: a configuration, a tokenizer and the model classes.

Tokens go in, hidden states, logits and losses come out; files, corpora and training belong to other packages. Each module
registers its classes with Hugging Face's Auto classes when it is imported. The names below load on first use, so that reading
a configuration does not import the models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from performers.models.configuration_performer import PRESETS, PerformerConfig
    from performers.models.context import PerformerContext
    from performers.models.modeling_performer import (
        PerformerCache,
        PerformerForCausalLM,
        PerformerForMaskedLM,
        PerformerForSequenceClassification,
        PerformerForTokenClassification,
        PerformerModel,
        PerformerPreTrainedModel,
    )
    from performers.models.tokenization_performer import PerformerTokenizer

_HOME = {
    "PRESETS": "configuration_performer",
    "PerformerCache": "modeling_performer",
    "PerformerConfig": "configuration_performer",
    "PerformerContext": "context",
    "PerformerForCausalLM": "modeling_performer",
    "PerformerForMaskedLM": "modeling_performer",
    "PerformerForSequenceClassification": "modeling_performer",
    "PerformerForTokenClassification": "modeling_performer",
    "PerformerModel": "modeling_performer",
    "PerformerPreTrainedModel": "modeling_performer",
    "PerformerTokenizer": "tokenization_performer",
}

__all__ = [
    "PRESETS",
    "PerformerCache",
    "PerformerConfig",
    "PerformerContext",
    "PerformerForCausalLM",
    "PerformerForMaskedLM",
    "PerformerForSequenceClassification",
    "PerformerForTokenClassification",
    "PerformerModel",
    "PerformerPreTrainedModel",
    "PerformerTokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'performers.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"performers.models.{_HOME[name]}"), name)
