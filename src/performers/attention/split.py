"""Two mechanisms in one layer: the first heads attend by one, the other heads by another.

The usual pair is local and global: a window sees near tokens exactly, FAVOR sees all of them by an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from performers.attention.arguments import check_attention_arguments, repeat_heads
from performers.attention.mechanism import Mechanism
from performers.errors import InputError

if TYPE_CHECKING:
    from performers.attention.parallel import SequenceShard


@dataclass(frozen=True)
class SplitState:
    """The states of both halves.

    Attributes:
        first, second: of the first heads and of the others, as their mechanisms make them; None for nothing.
    """

    first: Any
    second: Any

    def reorder(self, index: Tensor) -> SplitState:
        """The state of batch rows `index`, (B',) integers: what beam search asks for."""
        first, second = (None if half is None else half.reorder(index) for half in (self.first, self.second))
        return SplitState(first, second)

    def is_finite(self) -> bool:
        """Whether both halves are."""
        return all(half.is_finite() for half in (self.first, self.second) if half is not None)

    def to(self, device: torch.device) -> SplitState:
        """The same on a device."""
        return SplitState(*(None if half is None else half.to(device) for half in (self.first, self.second)))

    def rows(self) -> list[SplitState]:
        """The states of each row of the batch, as a batch of one."""
        halves = [None if half is None else half.rows() for half in (self.first, self.second)]
        count = next(len(rows) for rows in halves if rows is not None)
        first, second = ([None] * count if rows is None else rows for rows in halves)
        return [SplitState(*row) for row in zip(first, second, strict=True)]

    def joined(self, others: Sequence[SplitState]) -> SplitState:
        """The rows of this state and then those of the others."""
        first = None if self.first is None else self.first.joined([other.first for other in others])
        second = None if self.second is None else self.second.joined([other.second for other in others])
        return SplitState(first, second)

    def mixed(self, weights: Tensor) -> SplitState:
        """Sums of the states of both halves; see `FavorState.mixed`."""
        first, second = (None if half is None else half.mixed(weights) for half in (self.first, self.second))
        return SplitState(first, second)

    @property
    def nbytes(self) -> int:
        """The memory that the states take."""
        return sum(half.nbytes for half in (self.first, self.second) if half is not None)


class SplitAttention(Mechanism):
    """A mechanism for the first heads, and another one for the rest.

    The laws are those that both halves obey: with "reformer" in a half, causality and streaming are as inexact as there. Such a
    half shares queries and keys if the other half does too, and takes the keys as they are otherwise.

    Arguments:
        head_dim: D of queries and keys.
        seed: of what is random in either half.
        heads: how many heads are the first mechanism's; half of them, rounded down, when None.
        first, second: names in `MECHANISMS`; a half may itself be "split".
        first_kwargs, second_kwargs: the arguments of each.

    Raises:
        InputError: an unknown name, or a number of heads below one.
    """

    def __init__(
        self,
        head_dim: int,
        seed: int = 0,
        *,
        heads: int | None = None,
        first: str = "local",
        second: str = "favor",
        first_kwargs: dict[str, Any] | None = None,
        second_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"heads={heads!r} must be a positive integer.")
        self.heads = heads
        self.first = _made("first", first, head_dim, first_kwargs)
        self.second = _made("second", second, head_dim, second_kwargs)
        with torch.device("cpu"):
            self.redraw_(torch.Generator().manual_seed(seed))

    def first_heads(self, heads: int) -> int:
        """How many of `heads` are the first mechanism's.

        Raises:
            InputError: none would be left for the second.
        """
        first = heads // 2 if self.heads is None else self.heads
        if not 0 < first < heads:
            raise InputError(f"heads={self.heads} of {heads}: a split leaves at least one head to each mechanism.")
        return first

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: SplitState | None = None,
        return_state: bool = False,
        enable_gqa: bool = False,
        **arguments: Any,
    ) -> Tensor | tuple[Tensor, SplitState]:
        """As any mechanism's function; the state is a `SplitState`.

        Raises:
            InputError: as the mechanisms, and fewer heads than the split needs.
        """
        streaming = state is not None or return_state
        mask, offsets = arguments.get("key_padding_mask"), arguments.get("cu_seqlens")
        check_attention_arguments(query, key, value, mask, offsets, enable_gqa, streaming)
        at = self.first_heads(query.shape[1])
        is_query = key is query
        key, value = repeat_heads(query, key, value)

        def half(mechanism: Mechanism, heads: slice, before: Any) -> Any:
            q = query[:, heads]
            k = q if is_query else key[:, heads]
            return mechanism(q, k, value[:, heads], state=before, return_state=return_state, **arguments)

        first = half(self.first, slice(None, at), None if state is None else state.first)
        second = half(self.second, slice(at, None), None if state is None else state.second)
        if not return_state:
            return torch.cat([first, second], 1)
        return torch.cat([first[0], second[0]], 1), SplitState(first[1], second[1])

    def attend_sharded(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequence: SequenceShard,
        *,
        enable_gqa: bool = False,
        **arguments: Any,
    ) -> Tensor:
        """Each half of its heads."""
        at = self.first_heads(query.shape[1])
        check_attention_arguments(query, key, value, arguments.get("key_padding_mask"), None, enable_gqa, False)
        key, value = repeat_heads(query, key, value)
        halves = ((self.first, slice(None, at)), (self.second, slice(at, None)))
        return torch.cat(
            [
                half.attend_sharded(query[:, heads], key[:, heads], value[:, heads], sequence, **arguments)
                for half, heads in halves
            ],
            1,
        )

    @property
    def shards_sequences(self) -> bool:
        """Whether both halves do."""
        return self.first.shards_sequences and self.second.shards_sequences

    def redraw_(self, generator: torch.Generator) -> None:
        """Draw anew what is random in either half."""
        self.first.redraw_(generator)
        self.second.redraw_(generator)

    def shareable(self, state: SplitState) -> SplitState | None:
        """What the halves share."""
        first, second = self.first.shareable(state.first), self.second.shareable(state.second)
        return None if first is None and second is None else SplitState(first, second)

    @property
    def shared_kinds(self) -> tuple[type, ...]:
        """Those of both halves."""
        return (*self.first.shared_kinds, *self.second.shared_kinds)

    @property
    def redraws_by_default(self) -> bool:
        """Whether training gains from drawing anew in either half."""
        return self.first.redraws_by_default or self.second.redraws_by_default

    @property
    def has_fixed_state(self) -> bool:
        """Whether both halves' states are of one size, and absorb and answer."""
        return self.first.has_fixed_state and self.second.has_fixed_state

    @property
    def has_fixed_causal_state(self) -> bool:
        """Whether that holds of causal attention, in both halves."""
        return self.first.has_fixed_causal_state and self.second.has_fixed_causal_state

    @property
    def needs_one_sequence(self) -> bool:
        """Whether either half does."""
        return self.first.needs_one_sequence or self.second.needs_one_sequence

    @property
    def shares_query_and_key(self) -> bool:
        """Whether both halves do."""
        return self.first.shares_query_and_key and self.second.shares_query_and_key


def _made(which: str, name: str, head_dim: int, kwargs: dict[str, Any] | None) -> Mechanism:
    from performers.attention import MECHANISMS  # which has this module's own

    if name not in MECHANISMS:
        raise InputError(f"{which}={name!r}: expected one of {', '.join(MECHANISMS)}.")
    return MECHANISMS[name](head_dim=head_dim, **(kwargs or {}))
