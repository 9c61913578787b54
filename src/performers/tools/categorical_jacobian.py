"""The categorical Jacobian: how much what a model expects at one residue depends on what stands at another (Zhang et al., 2024).

It asks nothing of a model but log-probabilities, so it is the same for every architecture. Each of the 20 standard residues is
put at position i, nothing is masked, and the logits z of the 20 standard residues at every j are read:

    J_ij(a, b) = z_j(b | a at i), less its means over a and over b
    F_ij = sqrt(sum over a and b of J_ij(a, b)^2),  F_ii = 0
    score_ij = S_ij - S_i S_j / S,  S = (F + F^T) / 2

The means take out what does not depend on a, the unchanged protein with it, and the normaliser of the probabilities. A protein
takes 20 L passes. They come in pieces, each some rows of F; `corrected_blocks` puts them together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from performers.data import RESIDUES, STANDARD_RESIDUES
from performers.tools.language_model import LanguageModel, Row, Unread

PIECE_TOKENS = 16_384  # read for a piece
BLOCK = 512
_IN_MEMORY = 2048  # residues up to which F is no more than 16 MB
_STANDARD = [RESIDUES.index(letter) for letter in STANDARD_RESIDUES]
_Floats = npt.NDArray[np.float32]


def pieces(length: int, tokens: int) -> Iterator[tuple[int, int]]:
    """First and last but one position of each piece.

    Arguments:
        length: L, in residues.
        tokens: of one pass.
    """
    step = max(1, PIECE_TOKENS // (len(STANDARD_RESIDUES) * tokens))
    return ((start, min(start + step, length)) for start in range(0, length, step))


def response_rows(
    model: LanguageModel, requests: Sequence[tuple[Sequence[str], int, int]], *, toks_per_batch: int
) -> list[_Floats | Unread]:
    """Rows of F.

    Arguments:
        model: a masked or causal language model.
        requests: chains, and the rows `start` to `stop`, residues counted through all chains.
        toks_per_batch: as in `LanguageModel.read`.

    Returns:
        For each request an array (stop - start, L), or why it could not be read.
    """
    owners: list[int] = []
    rows: list[Row] = []
    for owner, (chains, start, stop) in enumerate(requests):
        for position in range(start, stop):
            for letter in STANDARD_RESIDUES:
                owners.append(owner)
                rows.append(model.row(_with(chains, position, letter)))
    passes: dict[int, _Floats] = {}
    waiting: dict[tuple[int, int], int] = {}
    results: list[_Floats | Unread] = [
        np.zeros((stop - start, sum(map(len, chains))), np.float32) for chains, start, stop in requests
    ]
    firsts = np.searchsorted(owners, range(len(requests)))
    for index, reading in model.read(rows, log_probabilities=True, toks_per_batch=toks_per_batch):
        owner = owners[index]
        if isinstance(reading, Unread):
            results[owner] = reading
            continue
        assert reading.log_probabilities is not None
        passes[index] = reading.log_probabilities[:, _STANDARD]
        place = (index - int(firsts[owner])) // len(STANDARD_RESIDUES)
        waiting[owner, place] = waiting.get((owner, place), 0) + 1
        if waiting[owner, place] == len(STANDARD_RESIDUES):  # all that stand at this position
            first = int(firsts[owner]) + place * len(STANDARD_RESIDUES)
            logits = np.stack([passes.pop(number) for number in range(first, first + len(STANDARD_RESIDUES))])
            target = results[owner]
            if not isinstance(target, Unread):
                target[place] = _norms(logits)
                target[place, requests[owner][1] + place] = 0
    return results


def _with(chains: Sequence[str], position: int, letter: str) -> list[str]:
    """The chains with another residue at a position, counted through all of them."""
    changed: list[str] = []
    for chain in chains:
        if 0 <= position < len(chain):
            chain = chain[:position] + letter + chain[position + 1 :]
        changed.append(chain)
        position -= len(chain)
    return changed


def _norms(logits: _Floats) -> _Floats:
    """(L,): the Frobenius norm over both letters of the centred (a, L, b)."""
    centred = logits - logits.mean(0, keepdims=True)
    centred -= centred.mean(2, keepdims=True)
    return np.sqrt(np.square(centred).sum((0, 2)))


def corrected_blocks(length: int, rows: Iterable[tuple[int, _Floats]]) -> Iterator[tuple[slice, slice, _Floats]]:
    """The scores of the upper triangle, block by block.

    Arguments:
        length: L.
        rows: the first row of each piece, and its rows of F, (b, L). All but short proteins' are kept in a temporary file while
            they are put together, so that memory stays flat.

    Yields:
        Rows, columns, and the scores there.
    """
    with tempfile.TemporaryFile(prefix="performers-") as file:
        shape = (length, length)
        responses = (
            np.zeros(shape, np.float32) if length <= _IN_MEMORY else np.memmap(file, np.float32, "w+", shape=shape)
        )
        given, got = np.zeros(length), np.zeros(length)
        for start, piece in rows:
            responses[start : start + len(piece)] = piece
            given[start : start + len(piece)] = piece.sum(1, dtype=np.float64)
            got += piece.sum(0, dtype=np.float64)
        sums = (given + got) / 2
        total = sums.sum()
        for first in range(0, length, BLOCK):
            here = slice(first, min(first + BLOCK, length))
            for second in range(first, length, BLOCK):
                there = slice(second, min(second + BLOCK, length))
                both = (responses[here, there] + responses[there, here].T) / 2
                expected = sums[here, None] * sums[None, there] / total if total else 0.0
                yield here, there, (both - expected).astype(np.float32)
