"""How FAVOR attention is computed: the oracle, the chunked form, and the one place that chooses between them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from performers.attention.kernels.chunked import chunked
from performers.attention.kernels.reference import reference
from performers.attention.kernels.state import StateTensors
from performers.errors import InputError

Backend = Callable[..., tuple[Tensor, StateTensors]]

_BACKENDS: dict[str, Backend] = {"reference": reference, "chunked": chunked}


def choose_backend(name: str) -> Backend:
    """The function that computes FAVOR attention.

    Arguments:
        name: "reference" (quadratic, in float64), "chunked" (linear, any device) or "auto" (the fastest that applies).

    Raises:
        InputError: an unknown name.
    """
    if name == "auto":
        return chunked
    if name not in _BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *_BACKENDS))
        raise InputError(f"backend={name!r} is not known: expected one of {known}.")
    return _BACKENDS[name]


__all__ = ["Backend", "StateTensors", "choose_backend", "chunked", "reference"]
