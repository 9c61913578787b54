"""Sequences that designs are held against: natural proteins, and what looks like them to ever less knowing eyes.

The first residues of natural proteins, the same shuffled, walks of a Markov chain and draws from residue frequencies come out, as
functions of a seed. Nothing here reads a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from performers.data import STANDARD_RESIDUES, read_fasta
from performers.errors import InputError
from performers.randomness import derive_seed
from performers.tools.readings import BACKGROUND

TRAINING = "bundled:train"
INDEPENDENT = np.tile(BACKGROUND, (len(STANDARD_RESIDUES), 1))
"""(20, 20): a chain that forgets, whose residues have the frequencies of Swiss-Prot."""

_Floats = npt.NDArray[np.float64]


def beginnings(sources: Sequence[str], length: int, count: int, seed: int) -> list[str]:
    """The first residues of natural proteins that are long enough and have no other letters there."""
    found = [
        record.sequence[:length]
        for record in read_fasta(list(sources))
        if len(record.sequence) >= length and set(record.sequence[:length]) <= set(STANDARD_RESIDUES)
    ]
    if len(found) < 2:
        raise InputError(f"{', '.join(sources)}: expected at least two proteins of {length:,} standard residues.")
    order = np.argsort(bits(len(found), seed, "natural proteins"), kind="stable")
    return [found[index] for index in order[:count]]


def shuffled(sequence: str, seed: int, number: int) -> str:
    """The residues of a sequence in another order."""
    order = np.argsort(bits(len(sequence), seed, "shuffled", number), kind="stable")
    return "".join(sequence[index] for index in order)


def markov_chain() -> _Floats:
    """(20, 20), the probability of each residue after each, in the bundled training set."""
    counts = np.ones((len(STANDARD_RESIDUES), len(STANDARD_RESIDUES)))
    index = np.full(128, -1)
    index[[ord(letter) for letter in STANDARD_RESIDUES]] = np.arange(len(STANDARD_RESIDUES))
    for record in read_fasta(TRAINING):
        places = index[np.frombuffer(record.sequence.encode("ascii"), dtype=np.uint8)]
        known = (places[:-1] >= 0) & (places[1:] >= 0)
        np.add.at(counts, (places[:-1][known], places[1:][known]), 1)
    return counts / counts.sum(axis=1, keepdims=True)


def walk(chain: _Floats, length: int, seed: int, *path: str | int) -> str:
    """A sequence whose first residue has the frequencies of Swiss-Prot, and each further one those of its row of a chain."""
    uniform = np.ldexp((bits(length, seed, *path) >> np.uint64(11)).astype(np.float64), -53)
    place = int(np.searchsorted(BACKGROUND.cumsum(), uniform[0]))
    found = [min(place, len(STANDARD_RESIDUES) - 1)]
    for value in uniform[1:]:
        found.append(min(int(np.searchsorted(chain[found[-1]].cumsum(), value)), len(STANDARD_RESIDUES) - 1))
    return "".join(STANDARD_RESIDUES[index] for index in found)


def bits(count: int, seed: int, *path: str | int) -> npt.NDArray[np.uint64]:
    """Random numbers for a purpose."""
    return np.random.Philox(key=derive_seed(seed, "benchmark design", *path)).random_raw(count)
