"""How FAVOR attention is computed: the oracle, the backends, and the operators that choose between them."""

from __future__ import annotations

from performers.attention.kernels.operator import BACKENDS, attend, check_backend
from performers.attention.kernels.state import StateTensors

__all__ = ["BACKENDS", "StateTensors", "attend", "check_backend"]
