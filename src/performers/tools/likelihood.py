"""How likely a language model finds whole proteins: sequences in, log-likelihoods in nats out.

A causal model's is the sum of log P(residue | those before it), if need be after partners that were read first. A masked
model's is the pseudo-log-likelihood: the sum of log P(residue | all others), residues being masked in stripes, as `performers
score` does.
Probabilities are normalised over all of a model's tokens. Nothing here knows what the proteins are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from performers.data import RESIDUES
from performers.errors import UnsupportedError
from performers.models import PerformerCache
from performers.tools.language_model import LanguageModel, Row, Unread
from performers.training.distributed import autocast

STRIPES = 16
_TOKENS_AT_ONCE = 1024  # of a row, where a state can be carried on
_INDEX = {letter: place for place, letter in enumerate(RESIDUES)}

_Floats = npt.NDArray[np.float64]


class Past:
    """What a causal Performer has read before a protein begins: a state for each layer, of a batch of one.

    The protein's positions start at 0 all the same, as those of every chain do.

    Arguments:
        states: the layers' states, such as those of a `PerformerContext`.
    """

    def __init__(self, states: Sequence[Any]) -> None:
        self._states = list(states)

    @classmethod
    def of(cls, model: LanguageModel, chains: Sequence[str]) -> Past:
        """The states after these chains, each of which sees those before it.

        Raises:
            UnsupportedError: the model is no causal Performer.
        """
        if not (model.is_performer and model.is_causal):
            raise UnsupportedError(f"{model.folder}: only a causal Performer can read partners before a design.")
        cache = PerformerCache(model.num_layers)
        with torch.inference_mode(), autocast(model.device, model.dtype):
            for chain in chains:
                cache.num_tokens = 0  # positions start again
                ids = torch.from_numpy(model.row([chain]).ids)[None].to(model.device)
                for piece in ids.split(_TOKENS_AT_ONCE, dim=1):
                    model.network.performer(input_ids=piece, past_key_values=cache)
        return cls(cache.states)

    def cache(self, rows: int) -> PerformerCache:
        """A cache for so many rows to go on from; it counts no tokens yet."""
        cache = PerformerCache(len(self._states))
        cache.states = list(self._states)
        cache.reorder_cache(torch.zeros(rows, dtype=torch.int64))
        return cache


@torch.inference_mode()
def log_likelihoods(model: LanguageModel, sequences: Sequence[str], past: Past | None = None) -> _Floats:
    """The log-likelihood of each sequence (N,), under a causal model, read side by side.

    Arguments:
        model: a causal language model.
        sequences: of residues.
        past: what was read before each of them.
    """
    rows = [model.row([sequence]) for sequence in sequences]
    ends = torch.tensor([int(row.residues[-1]) for row in rows], device=model.device)
    first = int(rows[0].residues[0])
    width = int(ends.max()) + 1
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : int(row.residues[-1]) + 1] = row.ids[: int(row.residues[-1]) + 1]
    tokens = torch.from_numpy(ids).to(model.device)
    cache = None
    if model.is_performer:
        cache = PerformerCache(model.num_layers) if past is None else past.cache(len(rows))
    total = torch.zeros(len(rows), dtype=torch.float64, device=model.device)
    step = _TOKENS_AT_ONCE if cache is not None else width
    for start in range(0, width - 1, step):
        stop = min(start + step, width - 1)
        with autocast(model.device, model.dtype):
            arguments = {} if cache is None else {"past_key_values": cache}
            logits = model.network(input_ids=tokens[:, start:stop], **arguments).logits
        found = torch.log_softmax(logits.float(), dim=-1).gather(2, tokens[:, start + 1 : stop + 1, None])[:, :, 0]
        places = torch.arange(start + 1, stop + 1, device=model.device)
        counts = (places >= first) & (places <= ends[:, None])
        total += torch.where(counts, found.double(), 0.0).sum(1)
    return total.cpu().numpy()


def pseudo_log_likelihoods(
    model: LanguageModel, proteins: Sequence[Sequence[str]], *, toks_per_batch: int = 16_384
) -> list[float | Unread]:
    """The pseudo-log-likelihood of each protein, a tuple of chains read jointly, under a masked model.

    Pass j of min(L, 16) masks the residues j, j + 16, j + 32, ...

    Raises:
        UnsupportedError: residues cannot be hidden from the model.
    """
    if not model.can_mask:
        raise UnsupportedError(f"{model.folder}: pseudo-log-likelihoods need a masked language model.")
    rows: list[Row] = []
    owners: list[tuple[int, npt.NDArray[np.int64]]] = []
    for number, chains in enumerate(proteins):
        letters = np.array([_INDEX[letter] for letter in "".join(chains)])
        passes = min(len(letters), STRIPES)
        for start in range(passes):
            hidden = np.arange(start, len(letters), passes)
            rows.append(model.row(chains, masked=hidden, wanted=hidden))
            owners.append((number, letters[hidden]))
    found: list[float | Unread] = [0.0] * len(proteins)
    for index, reading in model.read(rows, log_probabilities=True, toks_per_batch=toks_per_batch):
        number, letters = owners[index]
        so_far = found[number]
        if isinstance(reading, Unread):
            found[number] = reading
        elif not isinstance(so_far, Unread):
            assert reading.log_probabilities is not None
            own = reading.log_probabilities[np.arange(len(letters)), letters]
            found[number] = so_far + float(own.astype(np.float64).sum())
    return found
