"""What a step of `interact train` computes, what is measured, and what is kept.

`Lessons` holds the proteins and pairs of a run and makes batches of them as functions of (seed, step). A batch is a table of
contexts: the two proteins of a pair, and the decoys that join them in about half of the contexts, so that the head learns to read
groups as well as pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from performers.errors import CheckpointError, InputError, RunError
from performers.randomness import derive_seed
from performers.tools.interactions.baselines import PairSet, baseline_scores
from performers.tools.interactions.figures import Curve, calibration, draw_calibration, measure, verdict
from performers.tools.interactions.model import (
    HeadShape,
    PairHead,
    new_head,
    save_interactions,
)
from performers.tools.interactions.pairs import SETS
from performers.tools.interactions.summaries import (
    Summaries,
    key_features,
    read_together,
    read_with_gradients,
    summarise,
)
from performers.tools.interactions.training import SUMMARIES, InteractConfig, read_split
from performers.tools.language_model import LanguageModel, Row, Unread
from performers.training.checkpoint import open_model
from performers.training.distributed import World, autocast
from performers.training.loop import accumulate_gradients
from performers.training.task import Figures

JOINT = "joint"
_TRAINED, _BEST, _CHOSEN = "trained.safetensors", "best.safetensors", "best.json"
_CHUNK = 1024  # pairs measured at a time

_Ints = npt.NDArray[np.int64]


class Learner(nn.Module):
    """A head, and the language model where that is trained too."""

    def __init__(self, head: PairHead, body: nn.Module | None) -> None:
        super().__init__()
        self.head, self.body = head, body


class Lessons:
    """The proteins and pairs of a run.

    Arguments:
        config: of the run, whose folder holds them.
        body: the language model.

    Attributes:
        counts: pairs in each set.
    """

    def __init__(self, config: InteractConfig, body: LanguageModel) -> None:
        self._config, self._body = config, body
        run = Path(config.output)
        known, sets = read_split(run)
        self._proteins = list(known.values())
        numbers = {name: number for number, name in enumerate(known)}
        readable = np.ones(len(known), dtype=np.bool_)
        if config.train_body:
            self._frozen = None
        else:
            summaries = Summaries.open(run / SUMMARIES)
            rows = {name: row for row, name in enumerate(summaries.ids)}
            self._row_of = np.array([rows.get(name, -1) for name in known], dtype=np.int64)
            readable = self._row_of >= 0
            self._frozen = summaries
        self._pairs: dict[str, _Ints] = {}
        self._labels: dict[str, _Ints] = {}
        for name in SETS:
            table = np.array([[numbers[a], numbers[b], label] for a, b, label in sets[name]], np.int64).reshape(-1, 3)
            table = table[readable[table[:, :2]].all(axis=1)]  # proteins that failed are listed beside the summaries
            self._pairs[name], self._labels[name] = table[:, :2], table[:, 2]
        self.counts = {name: len(pairs) for name, pairs in self._pairs.items()}
        if not self.counts["train"]:
            raise InputError(f"{config.pairs}: no pair is left to learn from.")
        self._partners = np.unique(self._pairs["train"])
        self._features = key_features(body.hidden_size, config.num_features, body.device)
        self._epoch: tuple[int, _Ints] = (-1, np.zeros(0, np.int64))
        self._best: tuple[float, dict[str, Tensor]] | None = None

    def model(self, checkpoint: Path | None) -> Learner:
        """As the run begins with it, or as a checkpoint has it."""
        config = self._config
        shape = HeadShape(self._body.hidden_size, config.num_features, rank=config.rank)
        learner = Learner(
            new_head(shape, derive_seed(config.seed, "interaction head")),
            open_model(self._body.folder) if config.train_body else None,
        )
        if checkpoint is None:
            with torch.no_grad():
                learner.head.standardise_(self._means(learner.to(self._body.device), self._partners).float())
            return learner.train()
        _put(learner, load_file(checkpoint / _TRAINED), checkpoint)
        if (checkpoint / _CHOSEN).is_file():
            area = json.loads((checkpoint / _CHOSEN).read_text(encoding="utf-8"))["auroc"]
            self._best = area, load_file(checkpoint / _BEST)
        return learner.train()

    # A step.

    def rows(self, step: int) -> list[int]:
        """The training pairs of a step over all processes: every epoch has an order of its own, drawn from (seed, epoch)."""
        found: list[int] = []
        for place in range(step * self._config.batch_size, (step + 1) * self._config.batch_size):
            epoch, index = divmod(place, self.counts["train"])
            if self._epoch[0] != epoch:
                generator = np.random.Generator(np.random.Philox(derive_seed(self._config.seed, "order", epoch)))
                self._epoch = epoch, generator.permutation(self.counts["train"])
            found.append(int(self._epoch[1][index]))
        return found

    def tokens(self, step: int) -> int:
        """The residues of the pairs of a step."""
        return sum(self._proteins[i].length for row in self.rows(step) for i in self._pairs["train"][row].tolist())

    def accumulate(self, learner: Learner, step: int, world: World, dtype: torch.dtype) -> Tensor:
        """Adds this process's share of the gradients of a step, and returns its part of the loss."""
        rows = self.rows(step)
        mine = range(world.rank, len(rows), world.size)
        at_once = self._config.micro_batch_size or len(mine)
        examples: list[dict[str, Tensor]] = []
        for start in range(0, len(mine), at_once):
            places = mine[start : start + at_once]
            contexts = [self._context(rows[place], step, place) for place in places]
            labels = self._labels["train"][[rows[place] for place in places]]
            examples.append({"contexts": _table(contexts), "labels": torch.from_numpy(labels)})

        def forward(contexts: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> SimpleNamespace:
            logits = self._logits(learner, contexts.cpu())
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
            return SimpleNamespace(loss=loss / num_items_in_batch)

        return accumulate_gradients(forward, examples, world, dtype)

    def _context(self, row: int, step: int, place: int) -> list[int]:
        """A pair, and its decoys."""
        pair = self._pairs["train"][row].tolist()
        most = self._config.decoys
        if not most:
            return pair
        generator = np.random.Generator(np.random.Philox(derive_seed(self._config.seed, "decoys", step, place)))
        number = max(0, int(generator.integers(-most, most + 1)))
        drawn = self._partners[generator.integers(len(self._partners), size=number)].tolist()
        return list(dict.fromkeys([*pair, *drawn]))

    def _logits(self, learner: Learner, contexts: Tensor) -> Tensor:
        """The logits (K,) of pairs, given contexts (K, W): the indices of the pair, then those of decoys, -1 after the last."""
        head, body = learner.head, learner.body
        is_there = contexts >= 0
        unique, inverse = torch.unique(contexts[is_there], return_inverse=True)
        place = torch.zeros_like(contexts).masked_scatter_(is_there, inverse)
        means, states = self._alone(body, unique.numpy())
        encoded = head.encode(means, states)
        device = means.device
        place, kept = place.to(device), is_there.to(device, means.dtype)
        change: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._config.together == "states":
            values = torch.einsum("kwmr,kw->kmr", encoded.values[place], kept)
            weights = torch.einsum("kwm,kw->km", encoded.weights[place], kept)
        else:
            rows = [context[there].tolist() for context, there in zip(contexts, is_there, strict=True)]
            joint_means, totals = self._joint(body, rows)
            change = joint_means[:, 0] - means[place[:, 0]], joint_means[:, 1] - means[place[:, 1]]
            values, weights = head.values_of(totals), totals[..., -1]
        sides = [encoded.take(place[:, side]) for side in (0, 1)]
        found = [head.together(side, values, weights, moved) for side, moved in zip(sides, change, strict=True)]
        return head.logits((sides[0].additive, sides[1].additive), (found[0], found[1]))

    def _alone(self, body: Any, indices: _Ints) -> tuple[Tensor, Tensor]:
        """Means (P, d) and states (P, M, d + 1) of proteins that are read alone."""
        device = self._body.device
        if self._frozen is not None:
            rows = self._row_of[indices]
            means, states = self._frozen.means[rows], self._frozen.states[rows]
            return torch.from_numpy(means).to(device), torch.from_numpy(np.asarray(states)).to(device)
        rows, owners = [], []
        for number, index in enumerate(indices.tolist()):
            for chain in self._proteins[index].chains:
                rows.append(self._body.row([chain]))
                owners.append(number)
        pieces: list[list[Tensor]] = [[] for _ in range(len(indices))]
        for owner, hidden in zip(owners, self._read(body, rows), strict=True):
            pieces[owner].append(hidden)
        found = [summarise(torch.cat(parts).float(), self._features) for parts in pieces]
        return torch.stack([mean for mean, _ in found]), torch.stack([state for _, state in found])

    def _joint(self, body: Any, contexts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The means (K, 2, d) of the first two of each context in the presence of all, and the summed states (K, M, d + 1)."""
        proteins = [[self._proteins[index] for index in context] for context in contexts]
        if body is None:
            found = read_together(self._body, proteins, self._features, self._config.toks_per_batch)
            means, totals = [], []
            for context, parts in zip(proteins, found, strict=True):
                if isinstance(parts, Unread):
                    raise RunError(f"{context[0].id} and {context[1].id} cannot be read together: {parts.reason}.")
                means.append(torch.stack([mean for mean, _ in parts[:2]]))
                totals.append(torch.stack([state for _, state in parts]).sum(0))
            return torch.stack(means).clone(), torch.stack(totals).clone()
        rows = [self._body.row([chain for protein in context for chain in protein.chains]) for context in proteins]
        means, totals = [], []
        for context, hidden in zip(proteins, self._read(body, rows), strict=True):
            lengths = [context[0].length, context[1].length]
            first, second = hidden[: sum(lengths)].float().split(lengths)
            means.append(torch.stack((first.mean(0), second.mean(0))))
            totals.append(summarise(hidden.float(), self._features)[1])
        return torch.stack(means), torch.stack(totals)

    def _read(self, body: Any, rows: Sequence[Row]) -> Iterator[Tensor]:
        """Residue vectors of rows, in batches of at most `toks_per_batch` tokens; with a graph where gradients are on."""
        batch: list[Row] = []
        for row in rows:
            if batch and sum(map(len, batch)) + len(row) > self._config.toks_per_batch:
                yield from read_with_gradients(body.performer, batch, self._body.device)
                batch = []
            batch.append(row)
        if batch:
            yield from read_with_gradients(body.performer, batch, self._body.device)

    # Figures.

    def evaluate(self, learner: Learner, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        """How well the pairs to choose with are told apart; the weights that do it best are remembered."""
        labels = self._labels["selection"]
        if len(np.unique(labels)) < 2:
            return
        with autocast(world.device, dtype):
            logits = self._measured(learner, self._pairs["selection"])
        auroc, aupr = Curve(logits, labels).areas()
        loss = float(np.mean(np.logaddexp(0, np.where(labels > 0, -logits, logits))))
        if self._best is None or auroc > self._best[0]:
            self._best = auroc, {name: tensor.detach().cpu().clone() for name, tensor in _trained(learner).items()}
        figures = {"loss": loss, "auroc": auroc, "aupr": aupr}
        yield Figures(
            "validation",
            {**figures, "pairs": len(labels)},
            figures,
            f"AUROC {auroc:.4f}, AUPR {aupr:.4f} on {len(labels):,} pairs of held-out proteins",
        )

    def _measured(self, learner: Learner, pairs: _Ints) -> npt.NDArray[np.float64]:
        """The logits (K,) of pairs, each alone in its context."""
        parts: list[Tensor] = []
        was_training = learner.training
        learner.eval()
        with torch.no_grad():
            for start in range(0, len(pairs), _CHUNK):
                parts.append(self._logits(learner, torch.from_numpy(pairs[start : start + _CHUNK])).float().cpu())
        learner.train(was_training)
        return torch.cat(parts).double().numpy()

    # What stays.

    def save_checkpoint(self, learner: Learner, folder: Path) -> None:
        """What is trained, and the best weights so far."""
        save_file({name: tensor.detach().contiguous() for name, tensor in _trained(learner).items()}, folder / _TRAINED)
        if self._best is not None:
            save_file(self._best[1], folder / _BEST)
            (folder / _CHOSEN).write_text(json.dumps({"auroc": self._best[0]}) + "\n", encoding="utf-8")

    def save_model(self, learner: Learner, folder: Path) -> None:
        """The weights that did best, measured once beside the baselines on proteins that chose nothing."""
        config = self._config
        if self._best is not None:
            _put(learner, self._best[1], folder)
        figures = self._test(learner, folder)
        training = {
            "pairs": f"{self.counts['train']:,}",
            "language model": self._body.name,
            "split": config.split,
            "proteins are read": "alone, and their states added" if config.together == "states" else "together",
        }
        settings = {
            "together": config.together,
            "verdict": verdict(figures, JOINT),
            "figures": figures,
            "training": {**training, "seed": config.seed},
        }
        save_interactions(folder, settings, learner.head, self._body, learner.body)

    def _test(self, learner: Learner, folder: Path) -> dict[str, Any] | None:
        """The figures of the model and its baselines, and the calibration curve; None without pairs of both labels."""
        labels = self._labels["test"]
        if len(np.unique(labels)) < 2:
            return None
        sequences = ["".join(protein.chains) for protein in self._proteins]
        used = np.unique(np.concatenate([self._pairs[name] for name in SETS]))
        means = np.zeros((len(sequences), self._body.hidden_size), np.float32)
        with torch.no_grad():
            means[used] = self._means(learner, used).float().cpu().numpy()
        training, selection, test = (PairSet(sequences, means, self._pairs[name], self._labels[name]) for name in SETS)
        scores = {JOINT: self._measured(learner, test.pairs)}
        scores |= {
            name: found["test"]
            for name, found in baseline_scores(training, selection, {"test": test}, seed=self._config.seed).items()
        }
        figures = measure(scores, labels, test.pairs, seed=self._config.seed, first=JOINT)
        curve = calibration(1 / (1 + np.exp(-scores[JOINT])), labels)
        draw_calibration({JOINT: curve}, folder / "calibration.png")
        return {**figures, "calibration": curve}

    def _means(self, learner: Learner, indices: _Ints) -> Tensor:
        """The means of proteins that are read alone, a few at a time."""
        if self._frozen is not None:
            return torch.from_numpy(self._frozen.means[self._row_of[indices]]).to(self._body.device)
        parts = [self._alone(learner.body, indices[start : start + 64])[0] for start in range(0, len(indices), 64)]
        return torch.cat(parts)


def _table(contexts: Sequence[Sequence[int]]) -> Tensor:
    """Lists of indices as a table, -1 after the last of each."""
    width = max(map(len, contexts))
    return torch.tensor([[*context, *[-1] * (width - len(context))] for context in contexts])


def _trained(learner: Learner) -> dict[str, Tensor]:
    """What training decides: parameters, and the head's centre and spread."""
    return dict(learner.named_parameters()) | {f"head.{name}": x for name, x in learner.head.named_buffers()}


def _put(learner: Learner, tensors: dict[str, Tensor], where: Path) -> None:
    trained = _trained(learner)
    if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in trained.items()}:
        raise CheckpointError(f"{where} does not belong to this run: names or shapes differ.")
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(tensors[name])
