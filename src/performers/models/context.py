"""What proteins leave behind for others to read: a context, one attention state per layer.

A protein is read alone, and its keys and values, as each layer sees them, go into that layer's state. States of several
proteins are summed into one of the same size, so no order is among them and any number of them costs the same. Another protein
then attends, in every layer, to its own tokens and to the context as well:

    out_i = phi(q_i).(S_own + S_context) / phi(q_i).(z_own + z_context),    S = sum phi(k) v^T,    z = sum phi(k)

For exact attention the states are the keys and values themselves, one after the other: the same sums, at the usual price. Layers
whose attention cannot leave its sequence (a window, a pattern, hashes) have nothing to give, and see their own sequence alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from performers.errors import InputError


@dataclass(frozen=True)
class PerformerContext:
    """The states of B proteins, or of B sums of proteins.

    Attributes:
        states: of each layer, as its mechanism makes them; None where a layer shares nothing.
        num_rows: B.
    """

    states: tuple[Any, ...]
    num_rows: int

    def joined(self, *others: PerformerContext) -> PerformerContext:
        """The rows of this context and then those of the others."""
        contexts = [self, *others]
        layers = zip(*(context.states for context in contexts), strict=True)
        return PerformerContext(
            tuple(None if first is None else first.joined(rest) for first, *rest in layers),
            sum(context.num_rows for context in contexts),
        )

    def mixed(self, weights: Tensor) -> PerformerContext:
        """Sums of these rows: row r is that of the rows j, weights[r, j] times each. Differentiable.

        Arguments:
            weights: (R, B). A row of ones is a family, of zeros no context; -1 takes a row out of a sum that it is in.
        """
        if weights.ndim != 2 or weights.shape[1] != self.num_rows:
            raise InputError(
                f"weights have shape {tuple(weights.shape)}: expected (rows, {self.num_rows}), for as many proteins."
            )
        return PerformerContext(
            tuple(None if state is None else state.mixed(weights) for state in self.states), weights.shape[0]
        )

    def is_finite(self) -> bool:
        """Whether all of its numbers are."""
        return all(state.is_finite() for state in self.states if state is not None)

    def to(self, device: torch.device) -> PerformerContext:
        """The same on a device."""
        return PerformerContext(
            tuple(None if state is None else state.to(device) for state in self.states), self.num_rows
        )

    def summed(self) -> PerformerContext:
        """All rows as one."""
        return self.mixed(torch.ones(1, self.num_rows))

    def for_rows(self, count: int) -> PerformerContext:
        """A row for each of `count` sequences; a context of one row serves all of them.

        Raises:
            InputError: there are more rows than one, but not as many.
        """
        if self.num_rows == count:
            return self
        if self.num_rows != 1:
            raise InputError(
                f"The context has {self.num_rows} rows for {count} sequences: expected one, or one for each."
            )
        return self.mixed(torch.ones(count, 1))
