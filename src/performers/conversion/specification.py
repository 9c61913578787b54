"""What a converted model's configuration says of its attention: enough to make the same mechanisms again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from performers.attention import MECHANISMS
from performers.errors import ConfigError, InputError
from performers.randomness import derive_seed


@dataclass(frozen=True)
class Specification:
    """The attention of a converted model.

    Attributes:
        attention: "favor", "reformer", "sparse", "local" or "split".
        arguments: of the mechanism, as in {"kernel": "softmax-sharp", "num_features": 256}.
        layers: the numbers of the attention modules that use it; None for all. The others stay exact.
        modules: the classes of the attention modules, which are numbered in the order of `model.modules()`.
        seed: of everything random; the projection of a layer is a pure function of the seed, the layer and the head size.
        by_layer: arguments of single layers, in place of those of the same name; keys are numbers, written as JSON writes them.
        tensors: the SHA-256 of the file with what cannot be drawn again, calibrations for instance; None without one.
        measured: the figures by which layers were chosen, where they were.
    """

    attention: str
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None
    modules: list[str] = field(default_factory=list)
    seed: int = 0
    by_layer: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: str | None = None
    measured: dict[str, Any] | None = None

    @classmethod
    def stored_in(cls, config: Any) -> Self | None:
        """What a configuration says; None if it is not one of a converted model.

        Raises:
            ConfigError: `config.performers` is not what we write.
        """
        stored = getattr(config, "performers", None)
        if stored is None:
            return None
        try:
            specification = cls(**stored)
            if specification.attention in MECHANISMS:
                return specification
        except TypeError:
            pass
        raise ConfigError(f"config.performers={stored!r} is not what this version of performers.convert writes.")

    @classmethod
    def of(cls, config: Any, attention: str) -> Self:
        """What the configuration says, or the defaults if it says nothing of this mechanism.

        Raises:
            ConfigError: as in `stored_in`.
        """
        stored = cls.stored_in(config)
        return stored if stored is not None and stored.attention == attention else cls(attention)

    def numbered(self, model: nn.Module, module: nn.Module | None = None) -> dict[int, nn.Module]:
        """The attention modules of a model by number; `module` is one of them, needed where `modules` says nothing."""
        names = self.modules or [type(module).__name__]
        return dict(enumerate(m for m in model.modules() if type(m).__name__ in names))

    def converts(self, layer: int) -> bool:
        """Whether the attention module of this number uses the mechanism."""
        return self.layers is None or layer in self.layers

    def mechanism(self, head_dim: int, layer: int, tensors: dict[str, Tensor] | None = None) -> nn.Module:
        """The mechanism of one layer, on the CPU.

        Arguments:
            head_dim: D.
            layer: its number.
            tensors: entries of its state_dict that are not as they are drawn.
        """
        seed = derive_seed(self.seed, "projection", layer, head_dim)
        arguments = {**self.arguments, **self.by_layer.get(str(layer), {})}
        mechanism = MECHANISMS[self.attention](head_dim=head_dim, seed=seed, **arguments)
        if tensors:
            mechanism.load_state_dict({**mechanism.state_dict(), **tensors})
        return mechanism

    def not_drawn(self, mechanism: nn.Module, head_dim: int, layer: int) -> dict[str, Tensor]:
        """The entries of a mechanism's state_dict that `mechanism` cannot make of nothing: what was calibrated or learned."""
        drawn = self.mechanism(head_dim, layer).state_dict()
        state = {name: tensor.detach().cpu() for name, tensor in mechanism.state_dict().items()}
        return {name: x for name, x in state.items() if name not in drawn or not torch.equal(x, drawn[name])}

    def to_json(self) -> dict[str, Any]:
        """For `config.performers`.

        Raises:
            InputError: an argument that a file cannot hold.
        """
        content = asdict(self)
        try:
            return json.loads(json.dumps(content))
        except TypeError:
            raise InputError(
                f"{self.arguments}: a converted model's configuration holds names and numbers only, so a kernel has to be "
                f"given by its name."
            ) from None
