"""Proteins that are ready to meet: each is read once, and then any pairs and groups of them are scored.

Summaries of proteins go in, one at a time, and what the head needs of them is kept: about ten kilobytes a protein, whatever its
length. Pairs and groups of their numbers come out as logits in float64, the same in whatever order they are asked for. Files are
the business of `prediction`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from performers.tools.interactions.model import Encoded, InteractionModel
from performers.tools.interactions.summaries import key_features, read_together
from performers.tools.language_model import Unread
from performers.tools.proteins import Protein
from performers.tools.tool import Arrays

_ENCODED_AT_ONCE = 256
_PAIRS_AT_ONCE = 2048
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


class Scorer:
    """Proteins of a model of interactions.

    Arguments:
        model: what scores them.
        toks_per_batch: tokens in one forward pass, where contexts are read whole.

    Attributes:
        proteins: those that were added; their places are what pairs and groups are asked by.
        unread: contexts that could not be read together, as places in rising order, and why; their logits are NaN. Only where
            the model reads contexts whole.
    """

    def __init__(self, model: InteractionModel, toks_per_batch: int = 16_384) -> None:
        self._model, self._toks_per_batch = model, toks_per_batch
        self.proteins: list[Protein] = []
        self.unread: dict[tuple[int, ...], str] = {}
        self._head = copy.deepcopy(model.head).cpu().double()
        self._waiting: list[Arrays] = []
        self._parts: list[Encoded] = []
        self._means: list[npt.NDArray[np.float32]] = []
        self._encoded: Encoded | None = None
        self._reads_again = model.settings.together == "body"
        shape = model.settings.shape
        self._features = key_features(shape.width, shape.num_features, model.body.device)

    def add(self, protein: Protein, summary: Arrays) -> None:
        """One more protein, with its `mean` and `state`."""
        self.proteins.append(protein)
        self._waiting.append(summary)
        if self._reads_again:
            self._means.append(summary["mean"])
        if len(self._waiting) == _ENCODED_AT_ONCE:
            self._encode()

    def _encode(self) -> None:
        means, states = (torch.from_numpy(np.stack([one[name] for one in self._waiting])) for name in ("mean", "state"))
        with torch.inference_mode():
            encoded = self._head.encode(means.double(), states.double())
        self._parts.append(Encoded(*(tensor.float() for tensor in encoded)))
        self._waiting = []

    def _take(self, places: _Ints) -> Encoded:
        """Some of the proteins, in float64."""
        if self._waiting:
            self._encode()
        if self._parts:
            earlier = [] if self._encoded is None else [self._encoded]
            self._encoded = Encoded(*(torch.cat(columns) for columns in zip(*earlier, *self._parts, strict=True)))
            self._parts = []
        assert self._encoded is not None
        return Encoded(*(tensor.double() for tensor in self._encoded.take(torch.from_numpy(places))))

    def pairs(self, pairs: _Ints) -> _Floats:
        """The logits (K,) of pairs (K, 2) of places, the two of each alone in their context."""
        ordered = np.sort(pairs, axis=1)  # so that a pair is computed alike from either side
        parts = [self._pairs(ordered[start : start + _PAIRS_AT_ONCE]) for start in range(0, len(pairs), _PAIRS_AT_ONCE)]
        return np.concatenate(parts) if parts else np.zeros(0)

    @torch.inference_mode()
    def _pairs(self, pairs: _Ints) -> _Floats:
        a, b = self._take(pairs[:, 0]), self._take(pairs[:, 1])
        if self._reads_again:
            totals, changes = self._read(pairs.tolist())
            values, weights = self._head.values_of(totals), totals[..., -1]
            change: tuple[Any, Any] = (changes[:, 0], changes[:, 1])
        else:
            values, weights, change = a.values + b.values, a.weights + b.weights, (None, None)
        e = self._head.together(a, values, weights, change[0]), self._head.together(b, values, weights, change[1])
        return self._head.logits((a.additive, b.additive), e).numpy()

    @torch.inference_mode()
    def group(self, places: Sequence[int]) -> _Floats:
        """The logits (n, n) of all pairs of a group, from one reading of it; the diagonal means nothing and is NaN."""
        # Summed in an order of the proteins' own, so that the order of the group changes nothing.
        order = sorted(range(len(places)), key=lambda i: (self.proteins[places[i]].chains, places[i]))
        sorted_places = np.array([places[i] for i in order], dtype=np.int64)
        members = self._take(sorted_places)
        n = len(places)
        change = None
        if self._reads_again:
            totals, changes = self._read([sorted_places.tolist()])
            values, weights, change = self._head.values_of(totals)[0], totals[0, :, -1], changes[0]
        else:
            values, weights = members.values.sum(0), members.weights.sum(0)
        e = self._head.together(members, values.expand(n, -1, -1), weights.expand(n, -1), change)
        found = np.full((n, n), np.nan)
        rows, columns = np.triu_indices(n, 1)
        for start in range(0, len(rows), 32 * _PAIRS_AT_ONCE):
            i, j = (side[start : start + 32 * _PAIRS_AT_ONCE] for side in (rows, columns))
            logits = self._head.logits((members.additive[i], members.additive[j]), (e[i], e[j])).numpy()
            found[i, j] = found[j, i] = logits
        back = np.argsort(order)
        return found[np.ix_(back, back)]

    def _read(self, contexts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The summed states (K, M, d + 1) of contexts of n proteins that are read whole, and the changes (K, n, d) of means."""
        proteins = [[self.proteins[place] for place in context] for context in contexts]
        totals: list[Tensor] = []
        changes: list[Tensor] = []
        found = read_together(self._model.body, proteins, self._features, self._toks_per_batch)
        for context, parts in zip(contexts, found, strict=True):
            if isinstance(parts, Unread):
                self.unread[tuple(sorted(context))] = parts.reason
                shape = self._model.settings.shape
                totals.append(torch.full((shape.num_features, shape.width + 1), torch.nan, dtype=torch.float64))
                changes.append(torch.zeros(len(context), shape.width, dtype=torch.float64))
                continue
            totals.append(torch.stack([state for _, state in parts]).double().cpu().sum(0))
            alone = torch.from_numpy(np.stack([self._means[place] for place in context]))
            changes.append((torch.stack([mean for mean, _ in parts]).cpu() - alone).double())
        return torch.stack(totals), torch.stack(changes)
