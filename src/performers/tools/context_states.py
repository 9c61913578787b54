"""A family, or the partners of a protein, read once: sequences in, a file of fixed size out, to be read by other proteins.

Every protein is read alone, positions from the start, and the FAVOR states it leaves behind are summed, layer by layer and head
by head (see `performers.models.context`). The sum does not depend on the order, takes as many bytes for ten sequences as for a
hundred thousand, and adds and subtracts: the state of two families is the sum of theirs. A file holds it with the hash of the
model that it belongs to; another model's is refused. What a context is worth is another question: see `performers benchmark
family`.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from performers import __version__
from performers.attention import FavorState, SplitState
from performers.data import MAX_LENGTH, FastaReport
from performers.data.fasta import OnInvalid
from performers.errors import InputError, OutputError, RunError, UnsupportedError
from performers.folders import fsync, room_for, temporary_name
from performers.models.context import PerformerContext
from performers.tools.proteins import Protein, Proteins, read_proteins

if TYPE_CHECKING:
    from performers.tools.language_model import LanguageModel

FORMAT = "performers-context"
VERSION = "1"
_ABOUT = "about"  # one entry, as safetensors writes several in any order, and equal states shall be equal files
PROTEINS_AT_ONCE = 32  # each has a state of its own until they are summed
_FAVOR = ("numerator", "denominator", "log_scale")
_PARTS = ("first", "second")
_ROUNDING = 0.01  # of a head's largest denominator: bfloat16 has two to three digits

Chain: TypeAlias = tuple[int, str, str]


@dataclass(frozen=True)
class ContextState:
    """What some proteins left behind, summed.

    Attributes:
        context: of one row, in float32 on the CPU.
        model: the hash of the model that read them.
        model_name: its name, for people.
        proteins, residues: how many were read, chains counting as proteins.
        longest: residues of the longest; after a subtraction at most so many.
    """

    context: PerformerContext
    model: str
    model_name: str
    proteins: int
    residues: int
    longest: int

    def __add__(self, other: ContextState) -> ContextState:
        """The state after the proteins of both."""
        self._check_model(other)
        return replace(
            self,
            context=self.context.joined(other.context).summed(),
            proteins=self.proteins + other.proteins,
            residues=self.residues + other.residues,
            longest=max(self.longest, other.longest),
        )

    def __sub__(self, other: ContextState) -> ContextState:
        """The state without the proteins of another, which have to be in it.

        A state does not know its proteins, so not every one that is no part of it can be told.

        Raises:
            InputError: the other is no part of this one: it has as many proteins or residues or more, so that nothing would be
                left, a longer protein, or left more behind.
        """
        self._check_model(other)
        no_room = other.proteins >= self.proteins or other.residues >= self.residues or other.longest > self.longest
        if no_room or _is_more(other.context, self.context):
            one, whole = (
                f"(proteins: {state.proteins:,}, residues: {state.residues:,}, in the longest: {state.longest:,})"
                for state in (other, self)
            )
            raise InputError(f"The state to take out {one} is no part of the other one {whole}, or all of it.")
        return replace(
            self,
            context=self.context.joined(other.context).mixed(torch.tensor([[1.0, -1.0]])),
            proteins=self.proteins - other.proteins,
            residues=self.residues - other.residues,
        )

    def for_model(self, model: LanguageModel) -> PerformerContext:
        """The context, for the model that it belongs to, on its device.

        Raises:
            InputError: it is another model's.
        """
        if model_hash(model) != self.model:
            raise InputError(
                f"The state was read by {self.model_name} (hash {self.model[:12]}), and the model is {model.name} (hash "
                f"{model_hash(model)[:12]}): a state belongs to the weights that made it. Read the proteins again."
            )
        return self.context.to(model.device)

    def remarks(self, model: LanguageModel) -> list[str]:
        """What a user should be told."""
        limit = model.trained_length
        if limit is None or self.longest + 2 <= limit:
            return []
        return [
            f"The longest protein of the context has {self.longest:,} residues; {model.name} was trained on {limit:,} tokens "
            "at a time."
        ]

    def write(self, path: str | Path, *, overwrite: bool = False, notes: dict[str, Any] | None = None) -> None:
        """Write a safetensors file, all of it or nothing; equal states make equal files.

        Arguments:
            path: where.
            overwrite: replace a file that is there.
            notes: what `read_with_notes` is to give back; anything JSON can hold.

        Raises:
            OutputError: there is a file already, or it cannot be written; DiskFullError: for want of room.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise OutputError(f"{path} is already there; --restart replaces it.")
        tensors = self._tensors()
        about = {
            "format": FORMAT,
            "version": VERSION,
            "performers": __version__,
            "model": self.model,
            "model_name": self.model_name,
            "layers": len(self.context.states),
            "proteins": self.proteins,
            "residues": self.residues,
            "longest": self.longest,
            "sha256": _digest(tensors),
            "notes": notes or {},
        }
        temporary = temporary_name(path)
        try:
            with room_for(path, sum(tensor.nbytes for tensor in tensors.values())):
                temporary.touch()
                mode = temporary.stat().st_mode
                save_file(tensors, temporary, {_ABOUT: json.dumps(about)})
                temporary.chmod(mode)  # safetensors writes files that nobody else may read
                fsync(temporary)
                temporary.replace(path)
                fsync(path.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> ContextState:
        """Read a file that `write` made.

        Raises:
            InputError: it is not there, no such file, of another version, or damaged.
        """
        return cls.read_with_notes(path)[0]

    @classmethod
    def read_with_notes(cls, path: str | Path) -> tuple[ContextState, dict[str, Any]]:
        """Read a file that `write` made, and the notes that it was given.

        Raises:
            InputError: as in `read`.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} is not there; expected a state that `performers read` wrote.")
        try:
            with safe_open(path, "pt") as file:
                about = _about(file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        except SafetensorError as error:
            raise InputError(f"{path} is no state of `performers read`, or a damaged one ({error}).") from None
        if about.get("format") != FORMAT:
            raise InputError(f"{path} is no state of `performers read`.")
        if about.get("version") != VERSION:
            raise InputError(f"{path} is of version {about.get('version')}; this release reads version {VERSION}.")
        if about.get("sha256") != _digest(tensors):
            raise InputError(f"{path} is damaged: its numbers do not have the SHA-256 that it was written with.")
        states = tuple(_state(tensors, f"layers.{number}") for number in range(about["layers"]))
        counts = {key: about[key] for key in ("proteins", "residues", "longest")}
        return cls(PerformerContext(states, 1), about["model"], about["model_name"], **counts), about["notes"]

    @property
    def digest(self) -> str:
        """The SHA-256 of its numbers."""
        return _digest(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for number, state in enumerate(self.context.states)
            for name, tensor in _named(state, f"layers.{number}").items()
        }

    def to_dict(self) -> dict[str, Any]:
        """All but the numbers, fit for JSON."""
        counts = {"proteins": self.proteins, "residues": self.residues, "longest": self.longest}
        return {"model": self.model_name, "model_hash": self.model, **counts}

    def _check_model(self, other: ContextState) -> None:
        if self.model != other.model:
            raise InputError(
                f"States of different models do not add: {self.model_name} (hash {self.model[:12]}) and {other.model_name} "
                f"(hash {other.model[:12]})."
            )


def model_hash(model: LanguageModel) -> str:
    """One hash of the files that decide a model's numbers, whatever context it has been given."""
    return hashlib.sha256(json.dumps(model.weights_fingerprint(), sort_keys=True).encode()).hexdigest()


def read_context(
    model: LanguageModel,
    proteins: Proteins,
    *,
    toks_per_batch: int = 16_384,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    report: FastaReport | None = None,
    failures: list[tuple[int, str, str]] | None = None,
) -> ContextState:
    """Read proteins, each alone, and sum what they leave behind; in memory that does not grow with their number.

    Arguments:
        model: a Performer in which some layer has favor attention.
        proteins: as `read_proteins` takes them; of several chains each is read alone.
        toks_per_batch: tokens in one forward pass; a longer chain has one to itself.
        max_length, on_invalid, report: as in `read_proteins`.
        failures: gets number, identifier and reason of each protein that could not be read and is left out; without it the first
            raises.

    Raises:
        UnsupportedError: the model's states cannot be summed into one of fixed size.
        InputError: there are no proteins; FastaError: one is not valid.
        RunError: a protein failed and nobody takes the failures, or all of them failed.
    """
    chains = chains_of(read_proteins(proteins, max_length=max_length, on_invalid=on_invalid, report=report))
    [(_, total)] = deque(running_sums(model, chains, toks_per_batch=toks_per_batch, failures=failures), maxlen=1)
    return total


def chains_of(proteins: Iterable[Protein]) -> Iterator[Chain]:
    """Each chain by itself: number and identifier of its protein, and its residues."""
    return ((protein.number, protein.id, chain) for protein in proteins for chain in protein.chains)


def running_sums(
    model: LanguageModel,
    chains: Iterable[Chain],
    *,
    toks_per_batch: int = 16_384,
    failures: list[tuple[int, str, str]] | None = None,
    before: ContextState | None = None,
) -> Iterator[tuple[int, ContextState]]:
    """Read chains, each alone, a batch at a time, and sum what they leave behind.

    Whoever starts again after the chains of a sum, with that sum as `before`, comes by the same sums, to the bit.

    Arguments:
        model, toks_per_batch, failures: as in `read_context`.
        chains: as `chains_of` gives them.
        before: the sum to go on from.

    Yields:
        After each batch, how many of the chains have been read, and the sum; nothing while all of them have failed.

    Raises:
        As `read_context`, at the end where nothing could be summed.
    """
    _check_fixed_size(model)
    identity = model_hash(model)  # of files, so once
    read, total = 0, before
    for batch in _batches(chains, toks_per_batch):
        for found in _states_of(model, identity, batch, failures):
            total = found if total is None else total + found
        read += len(batch)
        if total is not None:
            yield read, total
    if total is None and read:
        raise RunError("None of the proteins could be read.")
    if total is None:
        raise InputError("There are no proteins to read; expected at least one.")


def _batches(chains: Iterable[Chain], toks_per_batch: int) -> Iterator[list[Chain]]:
    batch: list[Chain] = []
    used = 0
    for chain in chains:
        tokens = len(chain[2]) + 2
        if batch and (len(batch) == PROTEINS_AT_ONCE or used + tokens > toks_per_batch):
            yield batch
            batch, used = [], 0
        batch.append(chain)
        used += tokens
    if batch:
        yield batch


def _states_of(
    model: LanguageModel,
    identity: str,
    chains: Sequence[Chain],
    failures: list[tuple[int, str, str]] | None,
) -> list[ContextState]:
    """The summed states of some chains; where they fail together, those of each that can be read alone."""
    from performers.tools.language_model import Unread

    texts = [chain for _, _, chain in chains]
    found = model.left_behind([model.row([text]) for text in texts])
    if not isinstance(found, Unread):
        lengths = [len(text) for text in texts]
        context = found.to(torch.device("cpu"))
        return [ContextState(context, identity, model.name, len(texts), sum(lengths), max(lengths))]
    if len(chains) > 1:
        return [state for chain in chains for state in _states_of(model, identity, [chain], failures)]
    number, identifier, _ = chains[0]
    if failures is None:
        raise RunError(f"Number {number:,} ({identifier}): {found.reason}.")
    failures.append((number, identifier, found.reason))
    return []


def _check_fixed_size(model: LanguageModel) -> None:
    if not model.is_performer:
        raise UnsupportedError(f"{model.folder}: only a Performer leaves states behind that others can read.")
    kinds = model.shareable_states()
    if not kinds or any(kind is not FavorState for kind in kinds):
        raise UnsupportedError(
            f"{model.folder}: a state of fixed size needs favor attention in some layer, and none that keeps every key, such "
            "as exact."
        )


def _is_more(part: PerformerContext, whole: PerformerContext) -> bool:
    """Whether some denominator of a part is larger than the whole's, beyond rounding, so that it is no part.

    Denominators are sums of features of keys. Where a kernel's features have both signs, as some denominator then shows, they say
    nothing.
    """
    sum_and_rest = whole.joined(part).mixed(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    for state in sum_and_rest.states:
        for name, (total, rest) in _named(state, "").items():
            if not name.endswith(_FAVOR[1]):
                continue
            rounding = _ROUNDING * total.abs().amax(-1, keepdim=True)
            has_signs = ((total - rest.abs()) / 2 < -rounding).any()  # the smaller of the two
            if not has_signs and (rest < -rounding).any():
                return True
    return False


def _named(state: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of a layer's state, by name."""
    if state is None:
        return {}
    if isinstance(state, SplitState):
        return {**_named(state.first, f"{prefix}.first"), **_named(state.second, f"{prefix}.second")}
    return {f"{prefix}.{part}": getattr(state, part).float().contiguous() for part in _FAVOR}


def _state(tensors: dict[str, Tensor], prefix: str) -> Any:
    """The inverse of `_named`."""
    if f"{prefix}.{_FAVOR[0]}" in tensors:
        return FavorState(*(tensors[f"{prefix}.{part}"] for part in _FAVOR))
    halves = [_state(tensors, f"{prefix}.{part}") if _has(tensors, f"{prefix}.{part}") else None for part in _PARTS]
    return None if halves == [None, None] else SplitState(*halves)


def _has(tensors: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(f"{prefix}.") for name in tensors)


def _about(metadata: dict[str, str] | None) -> dict[str, Any]:
    """What a file says of itself; nothing, where it is no such file."""
    try:
        return dict(json.loads((metadata or {})[_ABOUT]))
    except (KeyError, TypeError, ValueError):
        return {}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
