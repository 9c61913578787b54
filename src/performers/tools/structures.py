"""The chains of known structure that come with the package: which residues touch, to fit predictions of contacts and judge them.

Two residues are in contact if their C-beta atoms (C-alpha for glycine) are less than 8 angstrom apart. How the chains were
chosen says `structures/ATTRIBUTION.md`. It knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from performers import data
from performers.folders import sha256_of

CONTACT = 8.0  # angstrom
_FILE = Path(data.__file__).parent / "structures" / "chains.npz"


@dataclass(frozen=True)
class Chain:
    """A chain of L residues.

    Attributes:
        id: PDB entry, chain and number.
        sequence: its residues.
        contacts: (L, L) bool, symmetric.
    """

    id: str
    sequence: str
    contacts: npt.NDArray[np.bool_]


def bundled_chains(*, training: bool) -> list[Chain]:
    """The chains to fit on, or those to judge on; the two share no cluster at 25 % identity."""
    with np.load(_FILE, allow_pickle=False) as file:
        seq, cb, ids, offsets, is_training = (file[key] for key in ("seq", "cb", "ids", "offsets", "is_training"))
    chains: list[Chain] = []
    for name, start, stop, chosen in zip(ids, offsets[:-1], offsets[1:], is_training, strict=True):
        if bool(chosen) == training:
            places = cb[start:stop].astype(np.float64) / 100
            squares = np.square(places[:, None] - places[None]).sum(-1)
            chains.append(Chain(str(name), seq[start:stop].tobytes().decode("ascii"), squares < CONTACT**2))
    return chains


def bundled_chains_hash() -> str:
    """The SHA-256 of the file."""
    return sha256_of(_FILE)
