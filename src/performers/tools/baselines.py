"""What a finetuned model has to beat: ridge regression on a model's embeddings, and on the residues themselves.

Proteins with targets come in, predictions for the test set go out. Labels are learned as numbers, 1 for the right one and 0 for
the others, so that one closed form serves every task; the strength of the penalty is chosen on the validation set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from performers.data import IGNORED, RESIDUES, Record
from performers.randomness import derive_seed
from performers.tools.assessment import Predictions
from performers.tools.embedding import embed
from performers.tools.labelled import LabelledProteins
from performers.tools.language_model import LanguageModel
from performers.training.order import shuffled

PENALTIES = tuple(10.0**power for power in range(-2, 6))
MOST_RESIDUES = 50_000  # of the training proteins, for tasks about residues
WINDOW = 8  # residues on either side that the one-hot baseline sees


def baselines(
    proteins: LabelledProteins, model: LanguageModel, *, toks_per_batch: int = 16_384, seed: int = 0
) -> dict[str, Predictions]:
    """The predictions of each baseline for the test proteins, in the form that `assess` takes.

    Arguments:
        proteins: with sets.
        model: whose embeddings are regressed on: the one that is finetuned, as it was before.
        toks_per_batch: tokens in one forward pass.
        seed: which training proteins are taken where they have more than `MOST_RESIDUES` residues.
    """
    chosen = {name: proteins.of(name) for name in ("train", "validation", "test")}
    if proteins.kind == "residue":
        chosen["train"] = _few(proteins, chosen["train"], seed)
    features = {
        "ridge on embeddings": {
            name: _embeddings(proteins, rows, model, toks_per_batch) for name, rows in chosen.items()
        },
        _one_hot_name(proteins): _one_hot(proteins, chosen),
    }
    return {name: _ridge(proteins, chosen, by_set) for name, by_set in features.items()}


def _few(proteins: LabelledProteins, rows: list[int], seed: int) -> list[int]:
    found: list[int] = []
    residues = 0
    for place in shuffled(len(rows), derive_seed(seed, "baselines")).tolist():
        found.append(rows[place])
        residues += len(proteins.sequences[rows[place]])
        if residues >= MOST_RESIDUES:
            break
    return found


def _embeddings(
    proteins: LabelledProteins, rows: list[int], model: LanguageModel, toks_per_batch: int
) -> npt.NDArray[np.float32]:
    """(targets, d): the mean over the residues, or the vector of each residue."""
    per_residue = proteins.kind == "residue"
    records = [Record("", "", proteins.sequences[row], number) for number, row in enumerate(rows, start=1)]
    found = embed(records, model, include=["per_tok" if per_residue else "mean"], toks_per_batch=toks_per_batch)
    vectors: list[npt.NDArray[Any]] = []
    for embedding in found:
        vector = embedding.per_tok if per_residue else embedding.mean
        assert vector is not None
        vectors.append(np.atleast_2d(vector).astype(np.float32))
    return np.concatenate(vectors)


def _one_hot_name(proteins: LabelledProteins) -> str:
    if proteins.kind == "residue":
        return f"ridge on one-hot residues, {WINDOW} on either side"
    return "ridge on one-hot residues" if _is_aligned(proteins) else "ridge on the composition"


def _is_aligned(proteins: LabelledProteins) -> bool:
    """Whether all proteins are of one length, as variants are: then positions mean the same in all of them."""
    return len({len(sequence) for sequence in proteins.sequences}) == 1


def _one_hot(proteins: LabelledProteins, chosen: dict[str, list[int]]) -> dict[str, Any]:
    """Of each set a sparse matrix (targets, features): residues by position, by place in a window, or their shares."""
    from scipy import sparse

    letters = np.full(128, len(RESIDUES))
    letters[[ord(letter) for letter in RESIDUES]] = np.arange(len(RESIDUES))
    width = len(RESIDUES) + 1  # the last is beyond an end

    def codes(row: int) -> npt.NDArray[np.int64]:
        return letters[np.frombuffer(proteins.sequences[row].encode("ascii"), dtype=np.uint8)]

    def features(row: int) -> npt.NDArray[np.int64]:
        if proteins.kind != "residue":
            return codes(row)[None]
        padded = np.pad(codes(row), WINDOW, constant_values=width - 1)
        return np.lib.stride_tricks.sliding_window_view(padded, 2 * WINDOW + 1)

    found: dict[str, Any] = {}
    for name, rows in chosen.items():
        if proteins.kind != "residue" and not _is_aligned(proteins):
            shares = [np.bincount(codes(row), minlength=width) / len(codes(row)) for row in rows]
            found[name] = sparse.csr_matrix(np.stack(shares))
            continue
        places = np.concatenate([features(row) for row in rows])
        columns = places + width * np.arange(places.shape[1])
        ones = (np.ones(columns.size), columns.ravel(), np.arange(0, columns.size + 1, columns.shape[1]))
        found[name] = sparse.csr_matrix(ones, shape=(len(columns), width * columns.shape[1]))
    return found


def _ridge(proteins: LabelledProteins, chosen: dict[str, list[int]], features: dict[str, Any]) -> Predictions:
    """Ridge regression of the targets on dense features, standardised, or on sparse ones as they are."""
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    goal = {name: _goal(proteins, rows) for name, rows in chosen.items()}
    known = {name: np.isfinite(values[:, 0]) for name, values in goal.items()}
    if isinstance(features["train"], np.ndarray):
        scaler = StandardScaler().fit(features["train"])
        features = {name: np.asarray(scaler.transform(values), dtype=np.float64) for name, values in features.items()}
    best: tuple[float, Any] | None = None
    for penalty in PENALTIES:
        ridge: Any = Ridge(alpha=penalty).fit(features["train"][known["train"]], goal["train"][known["train"]])
        off = _two_dimensional(ridge.predict(features["validation"][known["validation"]]))
        error = float(np.square(off - goal["validation"][known["validation"]]).mean())
        if best is None or error < best[0]:
            best = error, ridge
    assert best is not None
    predicted = _two_dimensional(best[1].predict(features["test"]))
    ends = np.cumsum([len(proteins.targets[row]) for row in chosen["test"]])
    return np.split(predicted, ends[:-1])


def _two_dimensional(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).reshape(len(values), -1)


def _goal(proteins: LabelledProteins, rows: list[int]) -> npt.NDArray[np.float64]:
    """(targets, 1) numbers, or (targets, C) ones and zeros; NaN where there is no label."""
    truth = np.concatenate([proteins.targets[row] for row in rows])
    if proteins.kind == "regression":
        return truth[:, None]
    ones = (truth[:, None] == np.arange(len(proteins.labels))).astype(np.float64)
    ones[truth == IGNORED] = np.nan
    return ones
