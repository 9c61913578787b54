"""A cache of constant size for converted decoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from performers.conversion.interface import CACHE
from performers.errors import UnsupportedError


class StateCacheLayer(CacheLayerMixin):
    """One layer's state of linear attention in place of its keys and values.

    `update` hands back only the new keys, and itself on them: the attention function finds the state there and moves it on.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.num_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to set up before the first token."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        self.is_initialized = True
        self.num_tokens += key_states.shape[-2]
        setattr(key_states, CACHE, self)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is of the new tokens."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """How many tokens have been seen."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """-1: any number of tokens fits."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.num_tokens = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows of the batch, as beam search asks."""
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows of the batch."""
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: what a state has summed up cannot be taken out again."""
        raise UnsupportedError("A linear attention's state cannot be rolled back: assisted generation is not possible.")


def state_cache(num_layers: int) -> Cache:
    """A cache of constant size, for `past_key_values`."""
    return Cache(layers=[StateCacheLayer() for _ in range(num_layers)])
