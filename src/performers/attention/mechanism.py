"""What every attention mechanism of a model is: a module with one call, whatever it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Mechanism(nn.Module):
    """An attention function with its settings: `attend`, which a subclass gives, and what a model has to know of it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
        """The attention function with this mechanism's settings."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Any = None,
        return_state: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """As the mechanism's function: the outputs, and with `return_state` a pair of them and the state."""
        return self.attend(
            query,
            key,
            value,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def redraw_(self, generator: torch.Generator) -> None:
        """Draw anew what is random, in place; most mechanisms have nothing to draw."""

    @property
    def redraws_by_default(self) -> bool:
        """Whether training gains from drawing anew what is random."""
        return False

    @property
    def has_fixed_state(self) -> bool:
        """Whether any number of keys goes into a state of one size, and is read from it to the same answer."""
        return False

    @property
    def has_fixed_causal_state(self) -> bool:
        """Whether that holds of causal attention, which may forget what no later query sees."""
        return self.has_fixed_state

    @property
    def needs_one_sequence(self) -> bool:
        """Whether a query has a place among the keys, as patterns and hashes give it: both are then of one sequence."""
        return False

    @property
    def shares_query_and_key(self) -> bool:
        """Whether its queries are its keys, so that a model leaves the projection of keys out."""
        return False
