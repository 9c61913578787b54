"""What a model of interactions has to beat, learned from the same pairs and measured on the same ones.

    composition    the shares of the 20 residues of either protein
    k-mer          the shares of runs of three residues, of seven classes (conjoint triads, Shen et al. 2007)
    mean embedding the mean of the language model's residue vectors, alone
    additive       g(a) + g(b) on the mean embeddings: which proteins have many partners, and nothing of the pair
    homology       pairs of training proteins that resemble the two, and whether those interact

The first three see both proteins through symmetric features (sum, product and distance) and a small network. Sequences, means
and pairs in, scores out; nothing here knows of states, contexts or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.data import STANDARD_RESIDUES
from performers.randomness import derive_seed
from performers.tools.interactions.figures import Curve

NAMES = ("composition", "k-mer", "mean embedding", "additive", "homology")

_TRIADS = ("AGV", "ILFP", "YMTS", "HNQW", "RK", "DE", "C")  # classes of dipole and side chain volume
_EPOCHS, _BATCH, _NEIGHBOURS = 12, 1024, 10
_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairSet:
    """Pairs of some proteins.

    Attributes:
        sequences: of P proteins.
        means: (P, d) their mean embeddings.
        pairs: (K, 2) indices of proteins.
        labels: (K,) zeros and ones.
    """

    sequences: list[str]
    means: _Floats
    pairs: _Ints
    labels: _Ints


def baseline_scores(
    training: PairSet, selection: PairSet | None, tests: Mapping[str, PairSet], *, seed: int
) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """The scores of each baseline on each set of test pairs.

    Arguments:
        training: what is learned from.
        selection: what chooses the epoch to stop at; the last one if None.
        tests: what is scored, by name.
        seed: of the weights and of the order.

    Returns:
        By baseline and test the scores (K,).
    """
    found: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    features: dict[str, Callable[[PairSet], _Floats]] = {
        "composition": lambda pairs: composition(pairs.sequences),
        "k-mer": lambda pairs: triads(pairs.sequences),
        "mean embedding": lambda pairs: pairs.means,
        "additive": lambda pairs: pairs.means,
    }
    for name, of in features.items():
        table = of(training)
        centre, spread = table.mean(0), table.std(0)
        spread = np.where(spread > 1e-8, spread, 1.0)

        def scaled(pairs: PairSet, of: Any = of, centre: Any = centre, spread: Any = spread) -> Tensor:
            return torch.from_numpy(((of(pairs) - centre) / spread).astype(np.float32))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "baseline", name))
            model: nn.Module = (_Additive if name == "additive" else _Symmetric)(table.shape[1])
        _fit(model, scaled, training, selection, derive_seed(seed, "baseline order", name))
        found[name] = {test: _scores(model, scaled(pairs), pairs.pairs) for test, pairs in tests.items()}
    found["homology"] = {test: homology(training, pairs) for test, pairs in tests.items()}
    return found


def composition(sequences: list[str]) -> _Floats:
    """The share of each standard residue, (P, 20)."""
    return np.array(
        [[sequence.count(letter) / len(sequence) for letter in STANDARD_RESIDUES] for sequence in sequences],
        dtype=np.float32,
    )


def triads(sequences: list[str]) -> _Floats:
    """The share of each run of three residues by class, (P, 343); runs with a letter that is not standard are left out."""
    return _runs(sequences, _TRIADS)


def _runs(sequences: list[str], classes: tuple[str, ...]) -> _Floats:
    codes = np.full(128, -1, dtype=np.int64)
    for number, letters in enumerate(classes):
        codes[[ord(letter) for letter in letters]] = number
    n = len(classes)
    table = np.zeros((len(sequences), n**3), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        code = codes[np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)]
        whole = (code[:-2] >= 0) & (code[1:-1] >= 0) & (code[2:] >= 0)
        numbers = (code[:-2] * n * n + code[1:-1] * n + code[2:])[whole]
        table[row] = np.bincount(numbers, minlength=n**3) / max(1, len(numbers))
    return table


def homology(training: PairSet, test: PairSet) -> npt.NDArray[np.float64]:
    """Interactions carried over from training pairs of relatives.

    The relatives of a protein are the training proteins nearest to it by the cosine of the square roots of their 3-mer shares.
    The score is the sum over the labelled pairs of relatives of the product of the two cosines, cubed so that near ones count,
    with the sign of the label: the vote of the nearest pairs, and 0 where no pair of relatives is labelled.
    """
    used = np.unique(training.pairs)
    known = _runs([training.sequences[i] for i in used], tuple(STANDARD_RESIDUES))
    asked = np.unique(test.pairs)
    labels = {
        key: 2 * int(label) - 1
        for (i, j), label in zip(training.pairs.tolist(), training.labels.tolist(), strict=True)
        for key in ((i, j), (j, i))
    }
    known = _unit(known)
    relatives: dict[int, list[tuple[int, float]]] = {}
    for start in range(0, len(asked), 256):
        some = asked[start : start + 256]
        cosines = _unit(_runs([test.sequences[i] for i in some], tuple(STANDARD_RESIDUES))) @ known.T
        count = min(_NEIGHBOURS, len(used))
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        for row, protein in enumerate(some.tolist()):
            relatives[protein] = [(int(used[j]), float(cosines[row, j]) ** 3) for j in nearest[row]]
    return np.array(
        [
            sum(x * y * labels.get((i, j), 0) for i, x in relatives[a] for j, y in relatives[b])
            for a, b in test.pairs.tolist()
        ],
        dtype=np.float64,
    )


def _unit(shares: _Floats) -> _Floats:
    roots = np.sqrt(shares)
    return roots / np.maximum(np.linalg.norm(roots, axis=1, keepdims=True), 1e-12)


class _Additive(nn.Module):
    """g(a) + g(b), with as many hidden units as the joint model's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Logits (K,)."""
        return (self.one(a) + self.one(b))[:, 0]


class _Symmetric(nn.Module):
    """A network over the sum, the product and the distance of two proteins' features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(3 * width, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Logits (K,)."""
        return self.pair(torch.cat((a + b, a * b, (a - b).abs()), dim=1))[:, 0]


def _fit(
    model: nn.Module, scaled: Callable[[PairSet], Tensor], training: PairSet, selection: PairSet | None, seed: int
) -> None:
    """Trains for a dozen epochs, and keeps the weights of the epoch that did best on the selection."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    features, labels = scaled(training), torch.from_numpy(training.labels).float()
    chosen_features = None if selection is None else scaled(selection)
    best: tuple[float, dict[str, Tensor]] | None = None
    for epoch in range(_EPOCHS):
        order = np.random.Generator(np.random.Philox(derive_seed(seed, epoch))).permutation(len(training.pairs))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            a, b = (features[training.pairs[rows, side]] for side in (0, 1))
            F.binary_cross_entropy_with_logits(model(a, b), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if selection is not None and chosen_features is not None:
            area = Curve(_scores(model, chosen_features, selection.pairs), selection.labels).areas()[0]
            if best is None or area > best[0]:
                best = area, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if best is not None:
        model.load_state_dict(best[1])


@torch.inference_mode()
def _scores(model: nn.Module, features: Tensor, pairs: _Ints) -> npt.NDArray[np.float64]:
    parts = [
        model(features[pairs[start : start + 8192, 0]], features[pairs[start : start + 8192, 1]])
        for start in range(0, len(pairs), 8192)
    ]
    return torch.cat(parts).double().numpy()
