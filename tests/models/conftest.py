"""Small models and real proteins for the tests of the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from performers import PerformerConfig, PerformerTokenizer

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
INSULIN_A = "GIVEQCCTSICSLYQLENYCN"
INSULIN_B = "FVNQHLCGSHLVEALYLVCGERGFFYTPKT"
PROTEINS = [UBIQUITIN, INSULIN_A, INSULIN_B]

MIXTURES: dict[str, dict[str, Any]] = {
    "favor": {"attention": "favor"},
    "favor-softmax": {"attention": "favor", "attention_kwargs": {"kernel": "softmax"}},
    "exact": {"attention": "exact"},
    "sparse": {"attention": "sparse", "attention_kwargs": {"stride": 4}},
    "hybrid": {"attention": ["favor", "exact"]},
    "local": {"attention": ["local", "favor"], "attention_kwargs": {"local": {"window": 5}}},
    "split": {"attention": "split", "attention_kwargs": {"first_kwargs": {"window": 5}}},
    "reversible": {"attention": ["exact", "favor"], "reversible": True},
}


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MIXTURES[request.param]


@pytest.fixture(scope="session")
def tokenizer() -> PerformerTokenizer:
    return PerformerTokenizer()


@pytest.fixture
def make() -> Callable[..., Any]:
    """A model of two small layers whose weights are large enough that a mistake anywhere shows."""

    def make_model(model_class: type, **overrides: Any) -> Any:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = PerformerConfig(**{**sizes, "initializer_range": 0.3, **overrides})
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():  # biases and norms start at 0 and 1, which would hide mistakes
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make_model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def residues(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 24, shape, generator=torch.Generator().manual_seed(seed))


def recompute_activations(model: Any) -> None:
    """Switch gradient checkpointing on, by the name it has in the transformers that is installed."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
