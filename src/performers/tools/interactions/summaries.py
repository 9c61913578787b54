"""What is kept of a protein so that others can read it: the mean of its residues' vectors, and its FAVOR state.

Residue vectors h of a language model go in. Their keys are their layer norms, the features phi of a key are those of FAVOR with
the ReLU kernel, and the state is the sum over residues of phi(key) with [h, 1]: M x (d + 1) numbers, whatever the length. States
of several proteins add up to the state of all their residues in one context, in any order; that is what linear attention is,
and why a protein has to be read once only, however many others it meets. The order of proteins is nowhere in it, and positions
count from the start of each.

`Summariser` reads proteins one by one; `read_together` lets a Performer read all proteins of a context through all its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention import FavorFeatures
from performers.tools.embedding import Embedder
from performers.tools.language_model import LanguageModel, Row, Unread
from performers.tools.proteins import Protein
from performers.tools.tool import Outcome, Result, Written

MEANS, STATES, NAMES = "means.npy", "states.npy", "ids.txt"


def key_features(width: int, number: int, device: torch.device | str = "cpu") -> FavorFeatures:
    """The features of keys: a pure function of the width d of the residue vectors and of M, how many there are."""
    return FavorFeatures(head_dim=width, num_features=number, kernel="relu", seed=0).to(device)


def summarise(hidden: Tensor, features: FavorFeatures) -> tuple[Tensor, Tensor]:
    """The mean (d,) and the state (M, d + 1) of residue vectors (L, d)."""
    keys = features(F.layer_norm(hidden, hidden.shape[-1:])[None, None], side="key")[0, 0]
    return hidden.mean(0), torch.cat((keys.T @ hidden, keys.sum(0)[:, None]), dim=1)


class Summariser(Embedder):
    """Proteins in, a folder with their means and states out: `means.npy` (P, d), `states.npy` (P, M, d + 1) and `ids.txt`.

    Arguments:
        model: what reads.
        proteins: as `read_proteins` takes them.
        num_features: M.
        options: those of `Embedder`: toks_per_batch, max_length, on_invalid.
    """

    command: ClassVar[str] = "interact"
    noun: ClassVar[str] = "proteins"

    def __init__(self, model: LanguageModel, proteins: Any, *, num_features: int, **options: Any) -> None:
        super().__init__(model, proteins, **options)
        self.makes_folder = True
        self.num_features = num_features
        self._features = key_features(model.hidden_size, num_features, model.device)

    def num_bytes(self, item: Protein) -> int:
        """A mean and a state."""
        return 4 * (self.model.hidden_size + self.num_features * (self.model.hidden_size + 1))

    def compute(self, items: Sequence[Protein]) -> Sequence[Result]:
        """For each protein its `mean` and `state`; of several chains, each read alone, those of all residues."""
        owners = [number for number, protein in enumerate(items) for _ in protein.chains]
        rows = [self.model.row([chain]) for protein in items for chain in protein.chains]
        parts: list[dict[int, Tensor | Unread]] = [{} for _ in items]
        layer = self.model.num_layers
        for index, reading in self.model.read(rows, layers=(layer,), toks_per_batch=self.toks_per_batch):
            parts[owners[index]][index] = (
                reading if isinstance(reading, Unread) else _residues(reading.hidden[layer], rows[index])
            )
        return [self._summary([found[index] for index in sorted(found)]) for found in parts]

    def _summary(self, parts: Sequence[Tensor | Unread]) -> Result:
        read: list[Tensor] = []
        for part in parts:
            if isinstance(part, Unread):
                return part
            read.append(part)
        with torch.inference_mode():
            mean, state = summarise(torch.cat(read), self._features)
        return {"mean": mean.cpu().numpy(), "state": state.cpu().numpy()}

    def write(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, results: Iterable[tuple[Protein, Result]], path: Path
    ) -> Written | None:
        """The folder."""
        path.mkdir()
        Summaries.write(results, path)
        return None

    def methods(self, outcome: Outcome) -> str:
        """Two sentences."""
        return (
            f"{outcome.items - len(outcome.failed):,} proteins were read with the protein language model {self.model.name} "
            f"({self.model.num_parameters:,} parameters), each whole, alone, and once. The mean of its residues' vectors and "
            f"its FAVOR state ({self.num_features} ReLU features) were kept."
        )


def _residues(hidden: Tensor, row: Row) -> Tensor:
    return hidden[torch.from_numpy(row.residues).to(hidden.device)]


@dataclass(frozen=True)
class Summaries:
    """Means and states of P proteins on the disk, so that their number is not bounded by memory.

    Attributes:
        ids: identifiers.
        means: (P, d) float32.
        states: (P, M, d + 1) float32.
    """

    ids: tuple[str, ...]
    means: npt.NDArray[np.float32]
    states: npt.NDArray[np.float32]

    @classmethod
    def open(cls, folder: Path) -> Summaries:
        """Those that `write` left."""
        ids = (folder / NAMES).read_text(encoding="utf-8").splitlines()
        return cls(tuple(ids), np.load(folder / MEANS), np.load(folder / STATES, mmap_mode="r"))

    @classmethod
    def write(cls, results: Iterable[tuple[Protein, Result]], folder: Path) -> list[tuple[int, str, str]]:
        """Writes the summaries of the proteins that have one; returns number, identifier and reason of the others."""
        failed = [(item.number, item.id, result.reason) for item, result in results if isinstance(result, Unread)]
        ids: list[str] = []
        means = states = None
        count = sum(1 for _, result in results if not isinstance(result, Unread))
        for item, result in results:
            if isinstance(result, Unread):
                continue
            if means is None or states is None:
                shapes = [(count, *result[name].shape) for name in ("mean", "state")]
                means, states = (
                    np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float32, shape=shape)
                    for name, shape in zip((MEANS, STATES), shapes, strict=True)
                )
            means[len(ids)], states[len(ids)] = result["mean"], result["state"]
            ids.append(item.id)
        for array in (means, states):
            if array is not None:
                array.flush()
        (folder / NAMES).write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
        return failed


def read_together(
    model: LanguageModel, contexts: Sequence[Sequence[Protein]], features: FavorFeatures, toks_per_batch: int
) -> list[list[tuple[Tensor, Tensor]] | Unread]:
    """The summaries of every protein in the presence of the others of its context.

    A context is one row for the model, positions restart with every chain, and every layer sees all of it. Its proteins are
    read in the order of their sequences, so the order in which they are given changes not one bit.

    Returns:
        For each context the mean (d,) and state (M, d + 1) of each member, or why it was not read.
    """
    orders = [sorted(range(len(context)), key=lambda i: context[i].chains) for context in contexts]
    rows = [
        model.row([chain for i in order for chain in context[i].chains])
        for context, order in zip(contexts, orders, strict=True)
    ]
    layer = model.num_layers
    found: list[list[tuple[Tensor, Tensor]] | Unread] = [Unread("it was not read") for _ in contexts]
    for index, reading in model.read(rows, layers=(layer,), toks_per_batch=toks_per_batch):
        if isinstance(reading, Unread):
            found[index] = reading
            continue
        lengths = [contexts[index][i].length for i in orders[index]]
        with torch.inference_mode():
            pieces = _residues(reading.hidden[layer], rows[index]).split(lengths)
            parts = [summarise(piece, features) for piece in pieces]
        found[index] = [parts[place] for place in np.argsort(orders[index])]
    return found


def read_with_gradients(performer: Any, rows: Sequence[Row], device: torch.device) -> Iterator[Tensor]:
    """The residue vectors (L, d) of rows packed end to end, as `LanguageModel.read` makes them, with a graph.

    Arguments:
        performer: a `PerformerModel`.
        rows: contexts, which do not see each other.
        device: of the model.
    """
    ends = np.cumsum([len(row) for row in rows])
    ids, positions = (np.concatenate([getattr(row, name) for row in rows]) for name in ("ids", "positions"))
    hidden = performer(
        input_ids=torch.from_numpy(ids)[None].to(device),
        position_ids=torch.from_numpy(positions)[None].to(device),
        cu_seqlens=torch.from_numpy(np.concatenate(([0], ends))).to(device),
        return_dict=True,
    ).last_hidden_state[0]
    for row, end in zip(rows, ends.tolist(), strict=True):
        yield _residues(hidden[end - len(row) : end], row)
