"""The systems that are compared: a line for each, from its name to what the layers of the same model attend with.

Another system is another line of `SYSTEMS`: every experiment takes systems by name and knows nothing else of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from performers.errors import InputError


@dataclass(frozen=True)
class System:
    """A way to attend.

    Attributes:
        title: what tables and pictures call it.
        layers: the mechanisms of the layers of a model, by name, from the first layer on and then over again.
        kwargs: arguments of those mechanisms, by mechanism; what is not given is the model's default.
        colour: of its lines in pictures.
    """

    title: str
    layers: tuple[str, ...]
    colour: str
    kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_hybrid(self) -> bool:
        """Whether layers differ."""
        return len(set(self.layers)) > 1


WINDOW = 128  # of local attention, in tokens
_RELU: dict[str, dict[str, Any]] = {"favor": {"kernel": "relu"}}

SYSTEMS: dict[str, System] = {
    "transformer": System("Transformer", ("exact",), "#d1495b"),
    # The baseline of the paper, which keeps the L x L matrix of every layer and head.
    "transformer-materialised": System("Transformer, materialised", ("exact-materialised",), "#edae49"),
    "performer-relu": System("Performer-relu", ("favor",), "#0b3c5d", _RELU),
    "performer-softmax": System("Performer-softmax", ("favor",), "#5fa8d3", {"favor": {"kernel": "softmax"}}),
    "reformer": System("Reformer", ("reformer",), "#7a5195"),
    "sparse": System("Sparse Transformer", ("sparse",), "#2e7d4f"),
    "local": System("local window", ("local",), "#8d6e63", {"local": {"window": WINDOW}}),
    "performer-relu+sparse": System("Performer-relu and Sparse, layers in turn", ("favor", "sparse"), "#66a182", _RELU),
    "performer-relu|local": System(
        "half of the heads Performer-relu, half local",
        ("split",),
        "#1b6ca8",
        {"split": {"first_kwargs": {"window": WINDOW}, "second_kwargs": _RELU["favor"]}},
    ),
    # What the bundled models attend with.
    "performer-relu|local16": System(
        "one head local (16 tokens), the others Performer-relu",
        ("split",),
        "#0f9d9d",
        {"split": {"heads": 1, "first_kwargs": {"window": 16}, "second_kwargs": _RELU["favor"]}},
    ),
    # No attention at all: each token gets its own value. What the rest of a model costs.
    "identity": System("identity", ("identity",), "#888888"),
}

# Those that learn; the materialised Transformer computes what the Transformer does, and "identity" nothing.
LEARNERS = tuple(name for name in SYSTEMS if name not in ("transformer-materialised", "local", "identity"))


def check_systems(names: Iterable[str], known: Sequence[str] = tuple(SYSTEMS)) -> None:
    """Refuses a name that is not in the table.

    Raises:
        InputError: names it, and those that are known.
    """
    for name in names:
        if name not in known:
            raise InputError(f"--system {name}: expected some of {', '.join(known)}, with commas.")


def architecture(name: str, layers: int) -> dict[str, Any]:
    """The keys of `PerformerConfig` by which a model of so many layers is this system."""
    system = SYSTEMS[name]
    attention = [system.layers[layer % len(system.layers)] for layer in range(layers)]
    used = {mechanism: dict(system.kwargs[mechanism]) for mechanism in set(attention) if mechanism in system.kwargs}
    kwargs: dict[str, Any] = used if len(set(attention)) > 1 else used.get(attention[0], {})
    return {"attention": attention, "attention_kwargs": kwargs}
