"""Whether two proteins interact, from what each is alone and what it is in the presence of the others.

`PairHead` is the mathematics: summaries of proteins in (see `summaries`), a logit for each pair out. `InteractionModel` is a head
with the language model that it was trained on, as it lies in a folder. Nothing here knows of files of pairs or of training.

With x the mean of a protein's residue vectors, standardised, and S the summed state of its context G,

    c(i, G) = f(x_i) S_G / f(x_i) z_G          what i reads in G: linear attention with learned queries f > 0
    e(i, G) = A x_i + B [c(i, G) - c(i, i)] + C [mean in G - mean alone]
    logit(i, j) = g(x_i) + g(x_j) + l . (e_i * e_j) + MLP(e_i * e_j, e_i + e_j, |e_i - e_j|)

Every term is the same for (i, j) and (j, i). l and the last layer of the MLP begin at zero, so that training begins with the
additive model g(x_i) + g(x_j), which is a special case: whatever the others add has to be learned against it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from performers.errors import CheckpointError, InputError, UnsupportedError
from performers.folders import MANIFEST, sha256_of, verify_folder
from performers.models.bundled import HEAD_SETTINGS, INTERACTIONS, WEIGHTS, name_of
from performers.tools.interactions.figures import ahead, with_interval
from performers.tools.language_model import LanguageModel
from performers.training.checkpoint import weights_files
from performers.training.run_folder import GENERATOR, OPTIMIZER

SETTINGS, HEAD, BODY, CARD = HEAD_SETTINGS, "head.safetensors", "body", "README.md"
BUNDLED = WEIGHTS / "protein-interactions"
"""What predicts where no other model is asked for, in installations that bring it; `scripts/bundle_interactions.py` makes it."""

BUNDLED_NAME = INTERACTIONS

NO_MODEL = (
    "No --model was given, and this release brings no model of interactions with it: give the folder of one, which "
    "`performers interact train` makes."
)
_NOT_OF_A_MODEL = (MANIFEST, CARD, OPTIMIZER, GENERATOR)  # of its folder, which may be a checkpoint
_FORMAT = {"format": "performers-interactions", "version": 1}


@dataclass(frozen=True)
class HeadShape:
    """The sizes of a head: d, M, and the number of queries, of dimensions of a pair, and of hidden units."""

    width: int
    num_features: int
    queries: int = 4
    rank: int = 32
    hidden: int = 64


class Encoded(NamedTuple):
    """What the head needs of each of P proteins, computed once.

    Attributes:
        additive: (P,) g(x).
        embedding: (P, r) A x.
        queries: (P, H, M) f(x).
        values: (P, M, r) the state of its values.
        weights: (P, M) the state of its denominators.
    """

    additive: Tensor
    embedding: Tensor
    queries: Tensor
    values: Tensor
    weights: Tensor

    def take(self, index: Any) -> Encoded:
        """Some of the proteins."""
        return Encoded(*(tensor[index] for tensor in self))


class PairHead(nn.Module):
    """The head of the module's docstring.

    Arguments:
        shape: its sizes.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        d, r, hidden = shape.width, shape.rank, shape.hidden
        self.register_buffer("centre", torch.zeros(d))
        self.register_buffer("spread", torch.ones(d))
        self.additive = nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.embedding = nn.Linear(d, r)
        self.query = nn.Linear(d, shape.queries * shape.num_features)
        self.value = nn.Linear(d, r, bias=False)
        self.read = nn.Linear(shape.queries * r, r, bias=False)
        self.change = nn.Linear(d, r, bias=False)
        self.bilinear = nn.Parameter(torch.zeros(r))
        self.pair = nn.Sequential(nn.Linear(3 * r, hidden), nn.GELU(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.pair[2].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.pair[2].bias)  # pyright: ignore[reportArgumentType]

    def standardise_(self, means: Tensor) -> None:
        """Take centre and spread of each dimension from proteins' means (P, d)."""
        self.centre.copy_(means.mean(0))
        spread = means.std(0, correction=0)
        self.spread.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))

    def encode(self, means: Tensor, states: Tensor) -> Encoded:
        """Of proteins' means (P, d) and states (P, M, d + 1)."""
        x = (means - self.centre) / self.spread
        return Encoded(
            additive=self.additive(x)[:, 0],
            embedding=self.embedding(x),
            queries=F.softplus(self.query(x)).unflatten(1, (self.shape.queries, -1)),
            values=self.values_of(states),
            weights=states[..., -1],
        )

    def values_of(self, states: Tensor) -> Tensor:
        """The state (P, M, r) of the values, given that of the residue vectors."""
        sums, weights = states[..., :-1], states[..., -1:]
        return self.value((sums - weights * self.centre) / self.spread)

    def together(self, ones: Encoded, values: Tensor, weights: Tensor, change: Tensor | None = None) -> Tensor:
        """e(i, G), of shape (..., r).

        Arguments:
            ones: the proteins, with leading dimensions (...).
            values, weights: (..., M, r) and (..., M), the summed state of each one's context.
            change: (..., d) its mean in the context minus its mean alone, where its residues were read again there.
        """
        difference = _attend(ones.queries, values, weights) - _attend(ones.queries, ones.values, ones.weights)
        found = ones.embedding + self.read(difference.flatten(-2))
        return found if change is None else found + self.change(change / self.spread)

    def logits(self, additive: tuple[Tensor, Tensor], e: tuple[Tensor, Tensor]) -> Tensor:
        """Of pairs, given g (K,) and e (K, r) of both sides; the sides may be exchanged."""
        product = e[0] * e[1]
        features = torch.cat((product, e[0] + e[1], (e[0] - e[1]).abs()), dim=-1)
        return (additive[0] + additive[1]) + product @ self.bilinear + self.pair(features)[..., 0]


def _attend(queries: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Linear attention of queries (..., H, M) to a state: (..., H, r)."""
    return (queries @ values) / (queries @ weights[..., None])


def new_head(shape: HeadShape, seed: int) -> PairHead:
    """A head whose weights are a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PairHead(shape)


@dataclass(frozen=True)
class InteractionSettings:
    """What a folder says of its model.

    Attributes:
        shape: of the head.
        together: "states" if proteins are read alone and their states added, "body" if the Performer reads contexts whole.
        verdict: how it did against its baselines, in words.
        figures: of `figures.measure` on held-out proteins, or None.
        training: what it was trained on, for people.
        body: where the language model is: in the folder, or a bundled model's name.
        fingerprint: the SHA-256 of each file of the language model that decides its numbers.
    """

    shape: HeadShape
    together: str
    verdict: str
    figures: dict[str, Any] | None
    training: dict[str, Any]
    body: str
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class InteractionModel:
    """A head and the language model it was trained on.

    Attributes:
        folder: where they lie.
        settings: what the folder says.
        head: in evaluation mode.
        body: the language model.
    """

    folder: Path
    settings: InteractionSettings
    head: PairHead
    body: LanguageModel

    @classmethod
    def open(cls, folder: str | Path | None, *, device: str = "auto", dtype: str = "auto") -> InteractionModel:
        """Open a folder that `performers interact train` made: the run's, or the model folder in it; None for the bundled model.

        Raises:
            InputError: no folder was given, and this installation has no bundled model.
            CheckpointError: it holds no model of interactions, or a damaged one.
        """
        if folder is None or (str(folder) == BUNDLED_NAME and not Path(folder).is_dir()):
            if not BUNDLED.is_dir():
                raise InputError(NO_MODEL)
            folder = BUNDLED
        path = next((path for path in (Path(folder), Path(folder) / "model") if (path / SETTINGS).is_file()), None)
        if path is None:
            raise CheckpointError(
                f"{folder}: expected the folder of a model of interactions, which `performers interact train` makes."
            )
        if (path / MANIFEST).exists():
            verify_folder(path)
        try:
            content = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
            if any(content.pop(key) != value for key, value in _FORMAT.items()):
                raise CheckpointError(f"{path / SETTINGS} is of another version: this release reads {_FORMAT}.")
            settings = InteractionSettings(**{**content, "shape": HeadShape(**content["shape"])})
            head = PairHead(settings.shape)
            head.load_state_dict(load_file(path / HEAD))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} cannot be opened: {' '.join(str(error).split())}.") from None
        where = path / BODY if settings.body == BODY else settings.body
        body = LanguageModel.open(where, device=device, dtype=dtype)
        if body.fingerprint() != settings.fingerprint:
            raise CheckpointError(f"{where} is not the language model that {path} was trained on.")
        check_together(body, settings.together)
        return cls(path, settings, head.eval().to(body.device), body)


def check_together(body: LanguageModel, together: str) -> None:
    """Refuses a model that cannot read several proteins in one context, where it is to.

    Raises:
        UnsupportedError: it is no Performer, or a causal one, which would see only what stands before.
    """
    if together == "body" and (not body.is_performer or body.is_causal):
        raise UnsupportedError(
            f"{body.folder}: only a masked Performer can read proteins together in any order; use together='states', which "
            "takes any model."
        )


def save_interactions(
    folder: Path, settings: dict[str, Any], head: PairHead, body: LanguageModel, tuned: Any | None
) -> None:
    """Writes the folder of a model: its settings, head, language model and card.

    Arguments:
        folder: exists.
        settings: those of `InteractionSettings` that are not told by the other arguments.
        head: what was trained.
        body: the language model; a copy of its files is kept, or the name of a bundled one.
        tuned: the Performer itself, where its weights were trained too.
    """
    name = name_of(body.folder) if tuned is None else None
    target = folder / BODY
    if name is None:
        target.mkdir()
        if tuned is not None:
            tuned.save_pretrained(target)
        for file in sorted(body.folder.iterdir()):
            is_replaced = tuned is not None and (".safetensors" in file.name or (target / file.name).exists())
            if file.is_file() and file.name not in _NOT_OF_A_MODEL and not is_replaced:
                shutil.copy2(file, target / file.name)
    files = [target / "config.json", *weights_files(target)]
    fingerprint = {file.name: sha256_of(file) for file in files} if name is None else body.fingerprint()
    whole = InteractionSettings(**settings, shape=head.shape, body=name or BODY, fingerprint=fingerprint)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in head.state_dict().items()}
    save_file(tensors, folder / HEAD)
    (folder / SETTINGS).write_text(json.dumps({**_FORMAT, **asdict(whole)}, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(whole), encoding="utf-8")


def card(settings: InteractionSettings) -> str:
    """The model card, in Markdown: what the model is for, what it learned from, and how it did."""
    lines = [
        "# A model of protein interactions",
        "",
        f"**{settings.verdict[0].upper()}{settings.verdict[1:]}.**",
        "",
        "It gives the probability that two proteins interact, from their sequences. `performers interact predict --model THIS` "
        "uses it. Trained on: " + ", ".join(f"{name} {value}" for name, value in settings.training.items()) + ".",
        "",
    ]
    return "\n".join(lines) + ("" if settings.figures is None else "\n" + figures_table(settings.figures))


def figures_table(figures: dict[str, Any]) -> str:
    """What `figures.measure` found, as a paragraph and a table of a card, in Markdown."""
    lines = [
        f"On {figures['pairs']:,} pairs of {figures['proteins']:,} proteins that were held out, "
        f"{figures['base_rate']:.1%} of which interact (95 % intervals, resampling proteins):",
        "",
        "| system | AUROC | AUPR | AUROC of the joint model minus this one's |",
        "|---|---|---|---|",
    ]
    for name, system in figures["systems"].items():
        cells = [name, with_interval(system, "auroc"), with_interval(system, "aupr"), ahead(system)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
