"""The residue alphabet: which letter is which token, fixed for ever.

A protein comes in as text and goes out as `uint8` ids, one per residue. The ids are part of every corpus and checkpoint on
disk, so they never change: four special tokens, the 20 standard residues in alphabetical order, then the five other letters
of the IUPAC-IUB code that occur in protein databases. J (leucine or isoleucine), stops, gaps and digits are not residues
here. This module knows nothing of files, contexts or models, and adds no special tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from performers.errors import InputError

PAD, BOS, EOS, MASK = 0, 1, 2, 3
STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
OTHER_RESIDUES = "BOUXZ"  # D or N, pyrrolysine, selenocysteine, unknown, E or Q
RESIDUES = STANDARD_RESIDUES + OTHER_RESIDUES
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")
FIRST_RESIDUE = len(SPECIAL_TOKENS)
UNKNOWN = FIRST_RESIDUE + RESIDUES.index("X")
VOCABULARY = (*SPECIAL_TOKENS, *RESIDUES)
VOCAB_SIZE = len(VOCABULARY)

INVALID = 255


def _encoding_table() -> bytes:
    table = bytearray([INVALID]) * 256
    for token, letter in enumerate(RESIDUES, start=FIRST_RESIDUE):
        table[ord(letter)] = table[ord(letter.lower())] = token
    return bytes(table)


# One byte of ASCII text to one token, both cases alike, and INVALID for everything that is not a residue; for `bytes.translate`.
ENCODING_TABLE = _encoding_table()
_LETTERS = np.frombuffer("".join("?" if len(t) > 1 else t for t in VOCABULARY).encode("ascii"), dtype=np.uint8)


def encode(sequence: str | bytes) -> npt.NDArray[np.uint8]:
    """The ids of the residues of one protein.

    Arguments:
        sequence: letters of `RESIDUES` in either case, without spaces and special tokens.

    Returns:
        A new array of shape (len(sequence),).

    Raises:
        InputError: a character is not a residue; names it and its position, counted from 1.
    """
    if isinstance(sequence, bytes):
        sequence = sequence.decode("latin-1")
    ids = sequence.encode("ascii", "replace").translate(ENCODING_TABLE)
    position = ids.find(INVALID)
    if position >= 0:
        raise InputError(
            f"{sequence[position]!r} at position {position + 1} is not a residue; expected {expected_residues()}."
        )
    return np.frombuffer(bytearray(ids), dtype=np.uint8)


def decode(ids: npt.ArrayLike) -> str:
    """The letters of residue ids, whatever their integer type.

    Raises:
        InputError: an id is a special token or outside the vocabulary.
    """
    tokens = np.asarray(ids)
    outside = np.flatnonzero((tokens < FIRST_RESIDUE) | (tokens >= VOCAB_SIZE))
    if outside.size:
        first = int(outside[0])
        raise InputError(
            f"Token {int(tokens[first])} at position {first + 1} is not a residue; "
            f"expected ids from {FIRST_RESIDUE} to {VOCAB_SIZE - 1}."
        )
    return _LETTERS[tokens.astype(np.intp)].tobytes().decode("ascii")


def expected_residues() -> str:
    """What an error message says a residue is."""
    return f"one of {STANDARD_RESIDUES} or {', '.join(OTHER_RESIDUES[:-1])} and {OTHER_RESIDUES[-1]}"
