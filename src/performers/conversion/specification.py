"""What a converted model's configuration says of its attention: enough to draw the same mechanisms again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import nn

from performers.attention import MECHANISMS
from performers.errors import ConfigError
from performers.randomness import derive_seed


@dataclass(frozen=True)
class Specification:
    """The attention of a converted model.

    Attributes:
        attention: "favor", "reformer" or "sparse".
        arguments: of the mechanism, as in {"kernel": "softmax-sharp", "num_features": 256}.
        layers: the numbers of the attention modules that use it; None for all. The others stay exact.
        modules: the classes of the attention modules, which are numbered in the order of `model.modules()`.
        seed: of everything random; the projection of a layer is a pure function of the seed, the layer and the head size.
    """

    attention: str
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None
    modules: list[str] = field(default_factory=list)
    seed: int = 0

    @classmethod
    def of(cls, config: Any, attention: str) -> Self:
        """What the configuration says, or the defaults if it says nothing of this mechanism.

        Raises:
            ConfigError: `config.performers` is not one of ours.
        """
        stored = getattr(config, "performers", None)
        if stored is None:
            return cls(attention)
        if not isinstance(stored, dict) or stored.get("attention") not in MECHANISMS:
            raise ConfigError(f"config.performers={stored!r} is not what performers.convert writes.")
        return cls(**stored) if stored["attention"] == attention else cls(attention)

    def numbered(self, model: nn.Module, module: nn.Module) -> dict[int, nn.Module]:
        """The attention modules of a model by number; `module` is one of them."""
        names = self.modules or [type(module).__name__]
        return dict(enumerate(m for m in model.modules() if type(m).__name__ in names))

    def converts(self, layer: int) -> bool:
        """Whether the attention module of this number uses the mechanism."""
        return self.layers is None or layer in self.layers

    def mechanism(self, head_dim: int, layer: int) -> nn.Module:
        """The mechanism of one layer, on the CPU."""
        seed = derive_seed(self.seed, "projection", layer, head_dim)
        return MECHANISMS[self.attention](head_dim=head_dim, seed=seed, **self.arguments)

    def to_json(self) -> dict[str, Any]:
        """For `config.performers`."""
        return asdict(self)
