"""What a model is asked to predict, as pure functions of tokens and seeds.

`mask_tokens` hides residues for masked language modelling, `next_token_labels` shifts nothing but marks what a causal model is
scored on. Rows of tokens come in (see `performers.data.contexts`), rows of the same shape go out. Which residues of a row are
hidden depends on (seed, step, row id) alone, never on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from performers.data.alphabet import FIRST_RESIDUE, MASK, PAD, STANDARD_RESIDUES
from performers.errors import InputError
from performers.randomness import derive_seed

IGNORED = -100  # the label of a position that is not scored, as in torch and Hugging Face

Scheme: TypeAlias = Literal["bert", "published", "mask"]

# Of the residues that are chosen: the share that becomes the mask token, and the share that becomes a random residue.
_SHARES: dict[Scheme, tuple[float, float]] = {"bert": (0.8, 0.1), "published": (0.1, 0.8), "mask": (1.0, 0.0)}


def mask_tokens(
    input_ids: npt.NDArray[np.int64],
    row_ids: Iterable[int],
    *,
    seed: int,
    step: int,
    scheme: Scheme = "bert",
    proportion: float = 0.15,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Choose residues to predict, and hide most of them.

    Each residue is chosen with probability `proportion`, on its own; a row that has residues has at least one chosen. Special
    tokens never are. Of the chosen ones,

    - "bert" (1810.04805, section 3.1; the text of 2009.14794) masks 80 %, replaces 10 % by a random residue and keeps 10 %;
    - "published" (the code published with 2009.14794) masks 10 %, replaces 80 % and keeps 10 %;
    - "mask" masks all of them: the only scheme whose accuracy is not inflated by kept residues, hence the one to evaluate by.

    Random residues are uniform over the 20 standard ones, the original included.

    Arguments:
        input_ids: (R, L) tokens; not changed.
        row_ids: R integers, such as the number of each context. Equal (seed, step, row id) give equal draws, position by
            position, however long the row is.
        seed: of the run.
        step: of the training, or any other integer that tells repeated draws apart.
        scheme: see above.
        proportion: in (0, 1].

    Returns:
        (inputs, labels), both (R, L) int64; labels are `IGNORED` where nothing was chosen.

    Raises:
        InputError: an unknown scheme, a proportion outside (0, 1], or as many row ids as there are not rows.
    """
    if scheme not in get_args(Scheme):
        raise InputError(f"The masking scheme is {scheme!r}; expected 'bert', 'published' or 'mask'.")
    if not 0 < proportion <= 1:
        raise InputError(f"The proportion of masked residues is {proportion}; expected more than 0 and at most 1.")
    rows = list(row_ids)
    if len(rows) != len(input_ids):
        raise InputError(f"There are {len(rows)} row ids for {len(input_ids)} rows; expected one for each.")
    masked_share, random_share = _SHARES[scheme]
    inputs = input_ids.copy()
    labels = np.full_like(input_ids, IGNORED)
    for tokens, row, row_labels, row_id in zip(input_ids, inputs, labels, rows, strict=True):
        choice, fate, residue = _uniform(derive_seed(seed, "mask", step, int(row_id)), len(row))
        maskable = row >= FIRST_RESIDUE
        chosen = maskable & (choice < proportion)
        if not chosen.any() and maskable.any():
            chosen[np.argmin(np.where(maskable, choice, 2.0))] = True
        row_labels[chosen] = tokens[chosen]
        row[chosen & (fate < masked_share)] = MASK
        replaced = chosen & (fate >= masked_share) & (fate < masked_share + random_share)
        row[replaced] = FIRST_RESIDUE + (residue[replaced] * len(STANDARD_RESIDUES)).astype(np.int64)
    return inputs, labels


def next_token_labels(
    input_ids: npt.NDArray[np.int64], segments: npt.NDArray[np.integer] | None = None
) -> npt.NDArray[np.int64]:
    """Labels for causal language modelling in Hugging Face's convention: label i is token i, and the model shifts.

    Padding is not scored, and neither is the first token of a segment (or of a row without segments), for what stands before it
    belongs to another one.

    Arguments:
        input_ids: (R, L) tokens.
        segments: their boundaries in the R * L flattened tokens, as in `ContextBatch.segments`, or None.

    Returns:
        (R, L) int64.
    """
    labels = np.where(input_ids == PAD, IGNORED, input_ids)
    labels[:, 0] = IGNORED
    if segments is not None:
        starts = np.asarray(segments)[:-1]
        labels.reshape(-1)[starts[starts < labels.size]] = IGNORED
    return labels


def _uniform(key: int, length: int) -> npt.NDArray[np.float64]:
    """Three numbers in [0, 1) for each position, shape (3, length); those of a position do not depend on the length."""
    # From raw bits, which are the same in every version of numpy.
    bits = np.random.Philox(key=key).random_raw(3 * length).reshape(length, 3).T
    return np.ldexp((bits >> np.uint64(11)).astype(np.float64), -53)
