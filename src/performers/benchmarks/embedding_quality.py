"""What embeddings know of structure and descent, judged by two simple readers; and what the letters alone know.

- Secondary structure: a linear softmax probe says for each residue which of three states it is in, from the residue's vector.
  Superfamilies of the test domains are in no other set.
- Retrieval: for a domain, all domains of other families are ranked by the cosine of their vectors with its own; the question is
  where the first of its superfamily stands.

Domains and a model, or no model, come in; counts for each domain or superfamily go out, from which `embedding` makes figures.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from performers.benchmarks.domains import STATES, Domain
from performers.data import RESIDUES, STANDARD_RESIDUES, Record
from performers.errors import InputError, MissingExtraError, UnsupportedError
from performers.tools.embedding import Include, embed
from performers.tools.language_model import LanguageModel

WINDOW = 15
KMER = 3
# Of the probe: the weight of half the squared norm beside the mean loss of a residue. The stronger wins where two are as good.
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)
_ITERATIONS = 300
_BLOCK = 256  # queries at a time
_STANDARD = len(STANDARD_RESIDUES)

_Floats = npt.NDArray[np.floating[Any]]
_Ints = npt.NDArray[np.int64]

_CODES = np.full(128, len(RESIDUES), dtype=np.int64)
_CODES[[ord(letter) for letter in RESIDUES]] = np.arange(len(RESIDUES))
_NO_STATE = len(STATES)
_STATE_CODES = np.full(128, _NO_STATE, dtype=np.int64)
_STATE_CODES[[ord(state) for state in STATES]] = np.arange(len(STATES))


class Vectors(NamedTuple):
    """Of one set of domains.

    Attributes:
        features: (R, F), dense or sparse, a row for each residue that has a state.
        states: (R,) 0 to 2.
    """

    features: Any
    states: _Ints


def embedded(domains: Sequence[Domain], model: LanguageModel, what: Include) -> list[npt.NDArray[Any]]:
    """What `performers embed` makes of each domain: its "mean" (d,), or "per_tok" (L, d).

    Raises:
        RunError: the model could not read a domain.
    """
    records = [Record(domain.id, "", domain.sequence, number) for number, domain in enumerate(domains, start=1)]
    return [getattr(embedding, what) for embedding in embed(records, model, include=[what])]


def letters(text: str, codes: _Ints = _CODES) -> _Ints:
    """A text as numbers, (L,)."""
    return codes[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]


def one_hot(domains: Sequence[Domain], window: int) -> Any:
    """A sparse (residues, window x 26): which residue stands at each place of a window around each; the 26th is beyond an end."""
    from scipy import sparse

    width, reach = len(RESIDUES) + 1, window // 2
    padded = [np.pad(letters(domain.sequence), reach, constant_values=width - 1) for domain in domains]
    places = np.concatenate([np.lib.stride_tricks.sliding_window_view(codes, window) for codes in padded])
    columns = places + width * np.arange(window)
    rows = np.arange(0, columns.size + 1, window)
    return sparse.csr_matrix((np.ones(columns.size, np.float32), columns.ravel(), rows), (len(columns), width * window))


def probed(sets: dict[str, list[Domain]], features: Callable[[list[Domain]], Any] | None) -> dict[str, Any]:
    """Fits the probe on some domains, chooses its penalty on others, and judges it on the test domains.

    Arguments:
        sets: domains by "train", "validation" and "test".
        features: (residues, F) of domains; None for what is most common in training, whatever the residue.

    Returns:
        "right" and "residues" of each test domain, those without a state left out; "penalty", and whether the fit "converged".

    Raises:
        InputError: a set has no residue with a state.
        MissingExtraError: scikit-learn is not installed.
    """
    states = {name: [letters(domain.states, _STATE_CODES) for domain in domains] for name, domains in sets.items()}
    for name, found in states.items():
        if not any((domain != _NO_STATE).any() for domain in found):
            raise InputError(f"No residue of the {name} domains has a state.")
    joined = {name: np.concatenate(found) for name, found in states.items()}
    known = {name: found != _NO_STATE for name, found in joined.items()}
    figures: dict[str, Any] = {}
    if features is None:
        said = np.full(len(joined["test"]), np.bincount(joined["train"][known["train"]]).argmax())
    else:
        vectors = {
            name: Vectors(features(domains)[np.flatnonzero(known[name])], joined[name][known[name]])
            for name, domains in sets.items()
        }
        said = np.full(len(joined["test"]), _NO_STATE)
        said[known["test"]], figures = _softmax(**vectors)
    ends = np.cumsum([len(domain) for domain in states["test"]])[:-1]
    right = np.split((said == joined["test"]) & known["test"], ends)
    return {
        "right": [int(domain.sum()) for domain in right],
        "residues": [int(domain.sum()) for domain in np.split(known["test"], ends)],
        **figures,
    }


def _softmax(train: Vectors, validation: Vectors, test: Vectors) -> tuple[_Ints, dict[str, Any]]:
    """The states of test residues by multinomial logistic regression, and what is known of the fit."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise MissingExtraError("scikit-learn", "tools", "the probe of secondary structure") from None
    sets = (train, validation, test)
    if isinstance(train.features, np.ndarray):
        scaler: Any = StandardScaler(copy=False).fit(train.features)
        sets = tuple(Vectors(scaler.transform(found.features), found.states) for found in sets)
    fitted, judged, asked = sets
    best: tuple[float, float, Any] | None = None
    for penalty in PENALTIES:
        probe: Any = LogisticRegression(C=1 / (penalty * len(fitted.states)), max_iter=_ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the figures
            probe.fit(fitted.features, fitted.states)
        accuracy = float(probe.score(judged.features, judged.states))
        if best is None or accuracy > best[0]:
            best = accuracy, penalty, probe
    assert best is not None
    _, penalty, probe = best
    converged = bool((probe.n_iter_ < _ITERATIONS).all())
    return probe.predict(asked.features), {"penalty": penalty, "converged": converged}


def composition(domains: Sequence[Domain]) -> _Floats:
    """(N, 20): the shares of the standard residues."""
    counts = [np.bincount(letters(domain.sequence), minlength=len(RESIDUES))[:_STANDARD] for domain in domains]
    return np.stack([count / max(count.sum(), 1) for count in counts])


def kmer_counts(domains: Sequence[Domain], k: int = KMER) -> Any:
    """A sparse (N, 20^k): how often each word of k standard residues occurs."""
    from scipy import sparse

    columns: list[_Ints] = []
    for domain in domains:
        codes = letters(domain.sequence)
        words = np.lib.stride_tricks.sliding_window_view(codes, k) if len(codes) >= k else np.zeros((0, k), np.int64)
        words = words[(words < _STANDARD).all(axis=1)]
        columns.append(words @ _STANDARD ** np.arange(k))
    rows = np.cumsum([0, *map(len, columns)])
    flat = np.concatenate(columns)
    counts = sparse.csr_matrix((np.ones(len(flat)), flat, rows), (len(domains), _STANDARD**k))
    counts.sum_duplicates()
    return counts


def standardised(vectors: _Floats) -> _Floats:
    """The same with mean 0 and deviation 1 in every dimension over all rows; a dimension without deviation becomes 0."""
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    return centred / np.where(deviation > 0, deviation, np.inf)


def cosines(vectors: Any) -> Callable[[_Ints], _Floats]:
    """A function of some rows, (n,), that gives their cosines with all rows, (n, N). Vectors may be sparse; zero ones give 0."""
    from scipy import sparse

    if sparse.issparse(vectors):
        norms = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel())
        unit = sparse.diags_array(1 / np.where(norms > 0, norms, np.inf)) @ vectors
        unit = sparse.csr_array(unit)
        return lambda rows: (unit[rows] @ unit.T).toarray()
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = vectors / np.where(norms > 0, norms, np.inf)
    return lambda rows: directions[rows] @ directions.T


def queries(domains: Sequence[Domain]) -> list[int]:
    """The domains whose superfamily has members of another family."""
    families: dict[str, set[str]] = {}
    for domain in domains:
        families.setdefault(domain.superfamily, set()).add(domain.family)
    return [number for number, domain in enumerate(domains) if len(families[domain.superfamily]) > 1]


def retrieved(domains: Sequence[Domain], scores: Callable[[_Ints], _Floats] | None) -> dict[str, list[float]]:
    """Where the first domain of the own superfamily stands, when all domains of other families are ranked by score.

    Of domains with equal scores all orders are averaged over.

    Arguments:
        domains: queries and candidates.
        scores: of some domains with all domains, as `cosines` makes it; None for equal scores everywhere, which is chance.

    Returns:
        For each superfamily its number of queries, how many of them find it in the first place, and the sum of 1 / place.

    Raises:
        InputError: there is no query.
    """
    asked = queries(domains)
    if not asked:
        raise InputError("No superfamily has domains of two families: there is nothing to retrieve.")
    families = np.unique([domain.family for domain in domains], return_inverse=True)[1]
    superfamilies = np.unique([domain.superfamily for domain in domains], return_inverse=True)[1]
    found: dict[str, list[float]] = {}
    for start in range(0, len(asked), _BLOCK):
        block = np.array(asked[start : start + _BLOCK])
        rows = np.zeros((len(block), len(domains))) if scores is None else scores(block)
        for query, row in zip(block.tolist(), rows, strict=True):
            candidates = families != families[query]
            related = row[candidates & (superfamilies == superfamilies[query])]
            best = related.max()
            others = row[candidates]
            above, tied, good = int((others > best).sum()), int((others == best).sum()), int((related == best).sum())
            entry = found.setdefault(domains[query].superfamily, [0, 0.0, 0.0])
            entry[0] += 1
            entry[1] += 0.0 if above else good / tied
            entry[2] += mean_reciprocal(above, tied, good)
    return found


@functools.cache
def mean_reciprocal(above: int, tied: int, good: int) -> float:
    """The mean of 1 / place of the first good one, over all orders of `tied` ones, `good` among them, after `above` others."""
    total, none_before = 0.0, 1.0
    for place in range(tied - good + 1):
        here = none_before * good / (tied - place)
        total += here / (above + place + 1)
        none_before -= here
    return total


def untrained(model: LanguageModel, seed: int) -> LanguageModel:
    """The same architecture with new random weights, in the place of the model's own.

    Raises:
        UnsupportedError: its architecture does not say all of what its weights are.
    """
    import torch

    network = model.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(network)(network.config).state_dict()
    missing = [name for name, _ in network.named_parameters() if name not in fresh]
    if missing:
        raise UnsupportedError(
            f"{model.folder}: its class gives no new {missing[0]}, so there is no untrained one of it."
        )
    network.load_state_dict(fresh, strict=False)
    return model
