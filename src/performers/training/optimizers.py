"""The optimizers of training, and which moments each keeps of a parameter.

AdamW is the papers'. Muon turns the update of a matrix into the nearest orthogonal one and learns proteins in fewer steps; it is
meant for the matrices inside a network, so embeddings, output layers, biases and norms stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from performers.training.configuration import TrainConfig

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)

_MUON_MOMENTUM = 0.95


def new_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names, of the parameters that are trained; vectors, that is biases and norms, do not decay."""
    if config.optimizer == "muon":
        return MuonWithAdamW(config, model)
    return _adamw(config, [parameter for parameter in model.parameters() if parameter.requires_grad])


def moments_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> tuple[str, ...]:
    """The names of the tensors, of the shape of `parameter`, that `optimizer` keeps of it from its first step on."""
    return MUON_MOMENTS if isinstance(optimizer, MuonWithAdamW) and optimizer.turns(parameter) else ADAMW_MOMENTS


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of hidden layers and AdamW (1711.05101) for all other parameters.

    An update by Muon is scaled to the size of one by AdamW (2502.16982), so one learning rate serves both.
    """

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hidden = _hidden_matrices(model)
        self._muon = torch.optim.Muon(
            [parameter for parameter in trained if parameter in hidden],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=_MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = _adamw(config, [parameter for parameter in trained if parameter not in hidden])
        self._hidden = hidden
        super().__init__([{"params": trained}], {})
        # The groups are the very dictionaries of the two, so that a schedule that sets a rate here sets it there.
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    def turns(self, parameter: torch.Tensor) -> bool:
        """Whether Muon updates `parameter`."""
        return parameter in self._hidden

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both, on gradients that are there already."""
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure.")
        for part in (self._muon, self._adamw):
            part.state = self.state
            part.step()


def _adamw(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def _hidden_matrices(model: nn.Module) -> set[torch.Tensor]:
    """Weights of linear layers between the embeddings and the output layer; a tied output layer is the embeddings."""
    outer = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        outer.add(output.weight)
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return {weight for weight in linear - outer if weight.requires_grad}
