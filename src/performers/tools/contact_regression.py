"""From attention to the probability of a contact: a logistic regression on the maps of all layers and heads (Rao et al., 2021).

The features of a pair are the corrected maps of `performers.tools.attention_maps` at that pair, one for each layer and head. The
regression is fitted on the 20 bundled chains of known structure, so nearly all that it knows is the language model's. It belongs
to one model: its file names the SHA-256 of that model's weights, and is refused beside another's.

    log-odds(i, j) = bias + sum over layers and heads of weight x map(i, j)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from performers.errors import InputError, MissingExtraError, RunError
from performers.folders import write_file
from performers.tools.attention_maps import AttentionMaps, attention_maps
from performers.tools.language_model import LanguageModel, Unread
from performers.tools.structures import Chain, bundled_chains, bundled_chains_hash

FILE_NAME = "contact-regression.json"
MIN_SEPARATION = 6  # closer residues touch whatever the fold
STRENGTH = 0.15  # inverse strength of the penalty, as of Rao et al. (2021), on features of unit variance
_FORMAT = {"format": "performers contact regression", "version": 1}


@dataclass(frozen=True)
class Regression:
    """The weights of all layers and heads.

    Attributes:
        weights: for each layer those of its heads.
        bias: the log-odds of a pair whose maps are all zero.
        model: the SHA-256 of each file that decides the model's numbers.
        chains: the identifiers of the chains that it was fitted on.
        structures: the SHA-256 of the file that they came from.
    """

    weights: list[list[float]]
    bias: float
    model: dict[str, str]
    chains: list[str]
    structures: str

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_file(path, json.dumps({**_FORMAT, **asdict(self)}, indent=1) + "\n")

    def fingerprint(self) -> str:
        """The SHA-256 of all that it says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path, model: LanguageModel) -> Regression:
        """Read the regression of a model.

        Raises:
            InputError: the file is missing or damaged, or of another model.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            header = {key: content.pop(key) for key in _FORMAT}
            found = cls(**content)
            shape = [len(layer) for layer in found.weights]
            numbers = [found.bias, *(weight for layer in found.weights for weight in layer)]
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; expected the regression of a model's contacts.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is not a regression of contacts, as `performers contacts` writes it.") from None
        if header != _FORMAT:
            raise InputError(f"{path} is of format {header}: this release reads {_FORMAT}.")
        if found.model != model.weights_fingerprint():
            raise InputError(
                f"{path} was fitted to another model than {model.folder}: the SHA-256 of the weights differ."
            )
        if not shape or not all(isinstance(number, float) and np.isfinite(number) for number in numbers):
            raise InputError(f"{path} is damaged: expected finite weights for every layer and head.")
        return found

    def log_odds(self, maps: AttentionMaps, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
        """(r, c): of a block of pairs.

        Raises:
            InputError: the maps have other layers and heads than it was fitted on.
        """
        if maps.heads != [len(layer) for layer in self.weights]:
            raise InputError(
                f"The regression is for layers of {[len(x) for x in self.weights]} heads, not {maps.heads}."
            )
        total: Tensor | None = None
        for layer, weights in enumerate(self.weights):
            factors = torch.tensor(weights, dtype=torch.float64)
            if not factors.any():
                continue
            block = maps.corrected(layer, rows, columns)
            part = torch.einsum("h,hij->ij", factors.to(block), block)
            total = part if total is None else total + part
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        odds = np.zeros(shape) if total is None else total.cpu().numpy()
        return (odds + self.bias).astype(np.float32)


def fit_regression(model: LanguageModel, chains: list[Chain] | None = None) -> Regression:
    """Fit the regression of a model.

    Arguments:
        model: whose attention is read.
        chains: to fit on; the 20 bundled ones unless given.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UnsupportedError: the model's attention maps cannot be had.
        RunError: the model could not read a chain.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtraError("scikit-learn", "tools", "fitting the regression of contacts") from None
    chains = bundled_chains(training=True) if chains is None else chains
    features, labels = [], []
    heads: list[int] = []
    for chain in chains:
        maps = attention_maps(model, model.row([chain.sequence]))
        if isinstance(maps, Unread):
            raise RunError(f"The model could not read {chain.id}, a chain to fit the regression on: {maps.reason}.")
        i, j = np.triu_indices(maps.length, MIN_SEPARATION)
        features.append(pair_features(maps)[:, i, j].T)
        labels.append(chain.contacts[i, j])
        heads = maps.heads
    x, y = np.concatenate(features), np.concatenate(labels)
    scale = x.std(axis=0, dtype=np.float64)
    scale[scale == 0] = np.inf  # a map without any difference says nothing
    fitted = LogisticRegression(C=STRENGTH, solver="newton-cholesky").fit(x / scale.astype(np.float32), y)
    weights = fitted.coef_[0] / scale
    return Regression(
        weights=[part.tolist() for part in np.split(weights, np.cumsum(heads)[:-1])],
        bias=float(fitted.intercept_[0]),
        model=model.weights_fingerprint(),
        chains=[chain.id for chain in chains],
        structures=bundled_chains_hash(),
    )


def pair_features(maps: AttentionMaps) -> npt.NDArray[np.float32]:
    """(layers x heads, L, L): the corrected maps of a short protein, whole."""
    everything = slice(0, maps.length)
    layers = [maps.corrected(layer, everything, everything) for layer in range(len(maps.heads))]
    return torch.cat(layers).float().cpu().numpy()


def regression_of(model: LanguageModel, path: str | Path | None = None) -> Regression | None:
    """The regression in a file, or the one beside the model's weights; None if there is neither.

    Raises:
        InputError: the file is missing, damaged, or of another model.
    """
    if path is not None:
        return Regression.load(Path(path), model)
    beside = model.folder / FILE_NAME
    return Regression.load(beside, model) if beside.is_file() else None
