"""What every attention mechanism of a model is: a module with one call, whatever it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from performers.errors import UnsupportedError

if TYPE_CHECKING:
    from performers.attention.parallel import SequenceShard


class Mechanism(nn.Module):
    """An attention function with its settings: `attend`, which a subclass gives, and what a model has to know of it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
        """The attention function with this mechanism's settings."""
        raise NotImplementedError

    def attend_sharded(
        self, query: Tensor, key: Tensor, value: Tensor, sequence: SequenceShard, **arguments: Any
    ) -> Tensor:
        """The same of this process's tokens of sequences that lie on several; where `shards_sequences`."""
        raise UnsupportedError(f"{type(self).__name__} cannot attend to tokens that other processes hold.")

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
        sequence: SequenceShard | None = None,
    ) -> Any:
        """As the mechanism's function: the outputs, and with `return_state` a pair of them and the state.

        Given `sequence`, the tokens are this process's of sequences that lie on several, and `cu_seqlens` those of the whole.
        """
        if sequence is not None:
            if state is not None or return_state:
                raise UnsupportedError("A sequence that lies on several processes has no state to go on from.")
            return self.attend_sharded(
                query,
                key,
                value,
                sequence,
                is_causal=is_causal,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
                scale=scale,
                enable_gqa=enable_gqa,
            )
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

    def shareable(self, state: Any) -> Any:
        """The part of a state that queries of another sequence can read, to be summed with others by its `mixed`.

        None where there is none: the window of local attention, a pattern and hashed chunks belong to one sequence.
        """
        return None

    @property
    def shared_kinds(self) -> tuple[type, ...]:
        """The kinds of states that `shareable` leaves."""
        return ()

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
    def shards_sequences(self) -> bool:
        """Whether the tokens of a sequence may lie on several processes: `attend_sharded` then gives what one would."""
        return False

    @property
    def shares_query_and_key(self) -> bool:
        """Whether its queries are its keys, so that a model leaves the projection of keys out."""
        return False
