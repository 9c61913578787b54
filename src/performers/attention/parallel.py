"""One sequence over several processes: each holds a stretch of the tokens, and FAVOR's states are all that they exchange.

Bidirectional, every process sums up its keys, the sums are added over the processes (one collective for the scales, one for the
sums), and every query reads the total. Causal, a process needs the sums of those before it: a prefix scan of as many messages as
the number of processes has binary digits. A message is the state of the heads, (M, Dv + 1) numbers each, whatever the length; the
backward pass sends the same the other way. (Ring attention would send all keys and values around, which grows with the length:
`ring_attention_bytes`.) Packed sequences that lie across processes are exchanged likewise, the others stay where they are.

All processes call these functions with the same arguments but their own tokens, and differentiate all of what they return, or
none of it: collectives wait for everyone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from performers.attention.arguments import segments
from performers.attention.favor import FavorState, favor_attention
from performers.attention.features import FavorFeatures
from performers.attention.kernels.state import StateTensors, finite
from performers.errors import InputError, RunError, UnsupportedError


class SequenceGroup:
    """The processes that hold a sequence between them, in the order of their ranks.

    Arguments:
        group: a process group of torch.distributed; None for all processes. Without torch.distributed, one process.

    Attributes:
        rank: the number of this process in it, from 0.
        size: how many there are.
        bytes_sent: the tensors that this process has sent in it so far, counting an all-reduce as its ring algorithm does.
    """

    def __init__(self, group: Any = None) -> None:
        joined = dist.is_initialized()
        self._group = group if group is not None or not joined else dist.group.WORLD
        self.rank = dist.get_rank(self._group) if joined else 0
        self.size = dist.get_world_size(self._group) if joined else 1
        self.bytes_sent = 0

    def shard(self, length: int) -> SequenceShard:
        """This process's part of sequences of `length` tokens that are divided evenly, without asking the others.

        Raises:
            InputError: there are fewer tokens than processes.
        """
        if length < self.size:
            raise InputError(f"{length} tokens over {self.size} processes: expected at least one token for each.")
        borders = [length * rank // self.size for rank in range(self.size + 1)]
        return SequenceShard(self, tuple(pairwise(borders)))

    def stretches(self, length: int) -> list[tuple[int, int]]:
        """Where each process's tokens begin and end, given how many this one has."""
        lengths: list[Any] = [length]
        if self.size > 1:
            lengths = [None] * self.size
            dist.all_gather_object(lengths, length, group=self._group)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def check_agreement(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare tensors over the processes: features that were drawn differently would give nonsense without a word.

        Raises:
            RunError: one is not the same everywhere; the sentence names the first. All processes raise it.
        """
        if self.size == 1:
            return
        theirs: list[Any] = [None] * self.size
        dist.all_gather_object(theirs, {name: _digest(x) for name, x in tensors.items()}, group=self._group)
        names = list(dict.fromkeys(name for digests in theirs for name in digests))
        for name in names:
            if any(digests.get(name) != theirs[0].get(name) for digests in theirs):
                raise RunError(
                    f"{name} differs between the processes: expected the same seed and the same weights everywhere."
                )

    def maximum_(self, x: Tensor) -> Tensor:
        """Replace x by its maximum over the processes."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def sum_(self, x: Tensor) -> Tensor:
        """Replace x by its sum over the processes."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x, operation, group=self._group)
            self.bytes_sent += 2 * x.nbytes * (self.size - 1) // self.size
        return x

    def shift(self, x: Tensor, distance: int) -> Tensor | None:
        """What the process `distance` before this one has for x; None if there is none. Negative distances look ahead."""
        source, target = self.rank - distance, self.rank + distance
        work: list[Any] = []
        received = None
        if 0 <= target < self.size:
            work.append(dist.P2POp(dist.isend, x.contiguous(), group=self._group, group_peer=target))
            self.bytes_sent += x.nbytes
        if 0 <= source < self.size:
            received = torch.empty_like(x, memory_format=torch.contiguous_format)
            work.append(dist.P2POp(dist.irecv, received, group=self._group, group_peer=source))
        for request in dist.batch_isend_irecv(work) if work else ():
            request.wait()
        return received


def _digest(tensor: Tensor) -> str:
    bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class SequenceShard:
    """This process's tokens of a batch whose sequences lie on several processes, each a stretch of all of them.

    Attributes:
        group: the processes.
        stretches: where each one's tokens begin and end.
    """

    group: SequenceGroup
    stretches: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        """The place of this process's first token."""
        return self.stretches[self.group.rank][0]

    @property
    def stop(self) -> int:
        """The place after its last one."""
        return self.stretches[self.group.rank][1]

    @property
    def length(self) -> int:
        """The tokens of the whole."""
        return self.stretches[-1][1]

    def summed_before(self, x: Tensor) -> Tensor:
        """The sum of x over the processes before this one."""
        everyone = x.new_zeros(self.group.size, *x.shape)
        everyone[self.group.rank] = x
        return self.group.sum_(everyone)[: self.group.rank].sum(0)

    def one_ahead(self, labels: Tensor, end: int) -> Tensor:
        """What stands one token later than each of these, (B, L_r); `end` after the last of the whole."""
        following = self.group.shift(labels[:, :1], -1)
        if following is None:
            following = torch.full_like(labels[:, :1], end)
        return torch.cat([labels[:, 1:], following], 1)


def sharded_favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FavorFeatures,
    group: SequenceGroup,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
    stretches: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """`favor_attention` of a sequence whose tokens lie on several processes, this process's part of the output.

    Arguments:
        query, key, value: (B, H, L_r, .): this process's tokens, as many of each; L_r may differ between processes and be 0.
        features: the same on every process.
        group: the processes.
        is_causal: a query sees no later key, on whichever process.
        key_padding_mask: (B, L_r) bool, True for a real token.
        cu_seqlens: (N + 1,) offsets of packed sequences in the *whole* sequence, the same on every process (B = 1).
        scale, enable_gqa, backend: as in `favor_attention`.
        stretches: where each process's tokens begin and end, as in a `SequenceShard`; None and packed, they ask each other.

    Returns:
        (B, H, L_r, Dv), equal to that stretch of `favor_attention` of the whole.

    Raises:
        InputError: as `favor_attention`; stretches that do not fit the tokens or the offsets.
        UnsupportedError: the features have no state of fixed size.
    """
    if features.compatibility is not None or not features.is_calibrated:
        raise UnsupportedError(
            f"kernel={features.kernel!r}: features of the published formula, or fitted to each sequence as a whole, cannot be "
            "computed on several processes; calibrate them first."
        )
    if query.shape[2] != key.shape[2]:
        raise InputError(f"query has {query.shape[2]} tokens and key {key.shape[2]}: expected the same tokens of both.")
    if stretches is not None and stretches[group.rank][1] - stretches[group.rank][0] != query.shape[2]:
        raise InputError(
            f"query has {query.shape[2]} tokens: expected those from {stretches[group.rank][0]} to {stretches[group.rank][1]}."
        )
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "backend": backend}

    def absorb(at: slice) -> StateTensors:
        """The sums over these keys."""
        mask = None if key_padding_mask is None else key_padding_mask[:, at]
        nobody = query[:, :, :0]
        _, state = favor_attention(
            nobody, key[:, :, at], value[:, :, at], features, key_padding_mask=mask, return_state=True, **options
        )
        return state.tensors()

    def read(at: slice, state: StateTensors) -> Tensor:
        """The outputs of these queries, which all see these sums and nothing else."""
        return favor_attention(
            query[:, :, at], key[:, :, :0], value[:, :, :0], features, state=FavorState(*state), **options
        )

    def attend(at: slice, **more: Any) -> Tensor:
        """The outputs of these tokens among themselves, and after a state."""
        q, k, v = (x[:, :, at] for x in (query, key, value))
        return favor_attention(q, k, v, features, is_causal=is_causal, **more, **options)

    size, length = group.size, query.shape[2]
    if cu_seqlens is None:
        whole = slice(0, length)
        if not is_causal:
            return read(whole, StateTensors(*_Total.apply(*absorb(whole), group)))
        before = _Neighbours.apply(*absorb(whole), *absorb(slice(0, 0)), [False] * size, group)[:3]
        return attend(whole, key_padding_mask=key_padding_mask, state=FavorState(*before))

    stretches = group.stretches(length) if stretches is None else stretches
    pieces = [_pieces(segments(cu_seqlens, stretches[-1][1]), *stretch) for stretch in stretches]
    mine = pieces[group.rank]
    nothing = absorb(slice(0, 0))  # of no keys, but a function of them: the backward pass goes through it everywhere
    to_the_right = absorb(mine[-1].at) if mine and mine[-1].goes_on else nothing
    to_the_left = nothing
    if mine and mine[0].continues and not is_causal:
        to_the_left = to_the_right if len(mine) == 1 and mine[0].goes_on else absorb(mine[0].at)
    # Nothing passes through a process but one that lies within a single sequence.
    closed = [len(found) > 1 or not all(piece.continues and piece.goes_on for piece in found) for found in pieces]
    exchanged = _Neighbours.apply(*to_the_right, *to_the_left, closed, group)
    before, after = StateTensors(*exchanged[:3]), StateTensors(*exchanged[3:])
    parts: list[Tensor] = []
    for piece, alone in _joined(mine, is_causal):
        if alone is not None:
            parts.append(attend(piece.at, cu_seqlens=torch.tensor(alone, device=query.device)))
        elif is_causal:
            parts.append(attend(piece.at, state=FavorState(*before)))
        else:
            own = to_the_left if piece.continues else to_the_right
            parts.append(read(piece.at, reduce(_added, [own, *[before] * piece.continues, *[after] * piece.goes_on])))
    out = torch.cat(parts, 2) if parts else query.new_zeros(*query.shape[:3], value.shape[-1])
    return _Attach.apply(out, *exchanged)


class _Piece(NamedTuple):
    """The tokens of one packed sequence that a process has."""

    at: slice  # among the process's tokens
    continues: bool  # from the process before
    goes_on: bool  # on the next process


def _pieces(sequences: list[slice], start: int, stop: int) -> list[_Piece]:
    return [
        _Piece(slice(max(start, x.start) - start, min(stop, x.stop) - start), x.start < start, x.stop > stop)
        for x in sequences
        if x.start < stop and x.stop > start
    ]


def _joined(pieces: list[_Piece], is_causal: bool) -> list[tuple[_Piece, list[int] | None]]:
    """The pieces in order, those that need no other process joined into one with the offsets of its sequences."""
    found: list[tuple[_Piece, list[int] | None]] = []
    for piece in pieces:
        before, offsets = found[-1] if found else (piece, None)
        if piece.continues or (piece.goes_on and not is_causal):
            found.append((piece, None))
        elif offsets is not None:
            joined = before._replace(at=slice(before.at.start, piece.at.stop))
            found[-1] = (joined, [*offsets, piece.at.stop - before.at.start])
        else:
            found.append((piece, [0, piece.at.stop - piece.at.start]))
    return found


def _added(a: StateTensors, b: StateTensors) -> StateTensors:
    """The sums over the keys of both."""
    scale = torch.maximum(a.log_scale, b.log_scale)
    shares = [(x.log_scale - finite(scale)).exp() for x in (a, b)]
    return StateTensors(
        sum(x.numerator * share.unsqueeze(-1) for x, share in zip((a, b), shares, strict=True)),  # pyright: ignore[reportArgumentType]
        sum(x.denominator * share for x, share in zip((a, b), shares, strict=True)),  # pyright: ignore[reportArgumentType]
        scale,
    )


def _message(state: StateTensors) -> Tensor:
    """(B, H, M, Dv + 2): a state in one tensor."""
    return torch.cat([state.numerator, state.denominator.unsqueeze(-1), state.log_scale.unsqueeze(-1)], -1)


def _state(message: Tensor) -> StateTensors:
    return StateTensors(message[..., :-2], message[..., -2], message[..., -1])


def _scan(state: StateTensors, closed: list[bool], group: SequenceGroup, direction: int) -> StateTensors:
    """The sum of the states of the processes before this one (after it, for direction -1), back to and with the first closed one.

    Every process doubles the stretch that it has summed up in each round (Hillis and Steele 1986).
    """
    total, closed, distance = state, list(closed), direction
    while abs(distance) < group.size:
        received = group.shift(_message(total), distance)
        if received is not None and not closed[group.rank]:
            total = _added(_state(received), total)
        at = range(group.size)
        closed = [closed[i] or (0 <= i - distance < group.size and closed[i - distance]) for i in at]
        distance *= 2
    received = group.shift(_message(total), direction)
    if received is not None:
        return _state(received)
    return StateTensors(torch.zeros_like(state[0]), torch.zeros_like(state[1]), torch.full_like(state[2], -torch.inf))


def _gradient_scale(log_scale: Tensor) -> Tensor:
    """Gradients of sums that were divided by exp(log_scale), as a state: multiplied by exp(-log_scale)."""
    return torch.where(log_scale == -torch.inf, -torch.inf, -log_scale)


class _Neighbours(torch.autograd.Function):
    """What comes from the processes before this one and what from those after it; both directions in one node, because the
    backward pass must reach the same collectives in the same order everywhere.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        """(state for the right, state for the left, closed, group) to (before, after), three tensors each."""
        right, left, (closed, group) = StateTensors(*arguments[:3]), StateTensors(*arguments[3:6]), arguments[6:]
        before, after = _scan(right, closed, group, 1), _scan(left, closed, group, -1)
        ctx.closed, ctx.group = closed, group
        ctx.save_for_backward(right.log_scale, left.log_scale, before.log_scale, after.log_scale)
        ctx.mark_non_differentiable(before.log_scale, after.log_scale)
        return *(x.contiguous() for x in before), *(x.contiguous() for x in after)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The same scans the other way."""
        right, left, before, after = ctx.saved_tensors
        results: list[Any] = []
        for d_num, d_den, reached, scale, direction in (
            (*gradients[:2], before, right, -1),
            (*gradients[3:5], after, left, 1),
        ):
            owed = _scan(StateTensors(d_num, d_den, _gradient_scale(reached)), ctx.closed, ctx.group, direction)
            share = (scale + owed.log_scale).exp()
            results += [owed.numerator * share.unsqueeze(-1), owed.denominator * share, None]
        return *results, None, None


class _Total(torch.autograd.Function):
    """The sums over the keys of all processes."""

    @staticmethod
    def forward(ctx: Any, numerator: Tensor, denominator: Tensor, log_scale: Tensor, group: SequenceGroup) -> Any:
        """Two collectives: the maximum of the scales, then the sums."""
        peak = group.maximum_(log_scale.clone())
        share = (log_scale - finite(peak)).exp().unsqueeze(-1)
        total = group.sum_(torch.cat([numerator, denominator.unsqueeze(-1)], -1) * share)
        ctx.group = group
        ctx.save_for_backward(share)
        ctx.mark_non_differentiable(peak)
        return total[..., :-1].contiguous(), total[..., -1].contiguous(), peak

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """One collective: what all processes owe to the total, they owe to each part of it."""
        (share,) = ctx.saved_tensors
        owed = ctx.group.sum_(torch.cat([gradients[0], gradients[1].unsqueeze(-1)], -1)) * share
        return owed[..., :-1], owed[..., -1], None, None


class _Attach(torch.autograd.Function):
    """The first tensor; the others take part in the backward pass though this process may not have used them."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *others: Tensor) -> Tensor:
        """`out` itself."""
        ctx.save_for_backward(*others)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Its gradient, and zeros."""
        return gradients[0], *(torch.zeros_like(x) for x in ctx.saved_tensors)


def ring_attention_bytes(length: int, heads: int, head_dim: int, size: int, bytes_per_number: int) -> int:
    """What one process of `size` sends for a layer's forward and backward pass by ring attention (2310.01889): keys and values
    go around once, and once more with their gradients, for one sequence of `length` tokens.
    """
    stretch = 2 * -(-length // size) * heads * head_dim * bytes_per_number
    return (size - 1) * stretch * 3
