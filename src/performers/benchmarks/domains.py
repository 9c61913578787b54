"""Protein domains of known structure, as SCOPe sorts them: which of them are taken, and in which sets they are.

A table without a header comes in: on every line an identifier, a family (b.1.1.1: class, fold, superfamily and family), the
residues, and a state of DSSP for each residue, separated by tabs. What goes out does not depend on the order of the lines. No
model is known here.

States become three, as is usual: H from H, G and I (helices), E from E and B (strands), C from T, S, L, C, P and - (all else).
X and ? stand for no state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from performers.conversion.sequences import read_lines
from performers.data import RESIDUES
from performers.errors import InputError
from performers.randomness import derive_seed

STATES = "HEC"
UNKNOWN_STATE = "?"
_THREE_STATES = str.maketrans("HGIEBTSLCP-X?", "HHHEECCCCCC??")
_COLUMNS = "an identifier, a SCOP family, a sequence and a state of DSSP for each residue"
_HELD_OUT = {"test": 0.2, "validation": 0.1}  # of the superfamilies; the others are for training


class Domain(NamedTuple):
    """A domain.

    Attributes:
        id: as written.
        family: such as b.1.1.1.
        sequence: upper-case residues.
        states: for each residue H, E, C, or ? where there is none.
    """

    id: str
    family: str
    sequence: str
    states: str

    @property
    def superfamily(self) -> str:
        """Such as b.1.1."""
        return self.family.rpartition(".")[0]


def read_domains(path: str | Path) -> list[Domain]:
    """The domains of a table (.gz too).

    Raises:
        InputError: the file cannot be read or holds nothing, or a row is not as above; names file and row.
    """
    found: list[Domain] = []
    for number, line in enumerate(read_lines(Path(path)), start=1):
        where = f"{path}, row {number:,}"
        values = [value.strip() for value in line.split("\t")]
        if len(values) != 4:
            raise InputError(f"{where} has {len(values)} of 4 columns: expected {_COLUMNS}, with tabs and no header.")
        identifier, family, sequence, states = values
        parts = family.split(".")
        if len(parts) != 4 or not all(parts):
            raise InputError(f"{where}: {family!r} is no SCOP family; expected four parts such as b.1.1.1.")
        if not sequence or set(sequence) - set(RESIDUES):
            raise InputError(f"{where} ({identifier}): expected a sequence of the residues {RESIDUES}.")
        if len(states) != len(sequence):
            raise InputError(f"{where} ({identifier}): {len(states):,} states for {len(sequence):,} residues.")
        three = states.translate(_THREE_STATES)
        if unknown := set(three) - {*STATES, UNKNOWN_STATE}:
            raise InputError(
                f"{where} ({identifier}): {min(unknown)!r} is no state of DSSP; expected H, G, I, E, B, T, S, L."
            )
        found.append(Domain(identifier, family, sequence, three))
    if not found:
        raise InputError(f"{path} holds no domain; expected on every line {_COLUMNS}, with tabs.")
    return found


def few_of_each(domains: Sequence[Domain], per_family: int, superfamilies: int = 0, *, seed: int = 0) -> list[Domain]:
    """Domains that differ in sequence, at most so many of a family, so that no large family decides.

    Arguments:
        domains: to draw from.
        per_family: at most.
        superfamilies: of so many superfamilies; 0 for all.
        seed: of the draw.

    Returns:
        The domains in the order in which they were drawn.
    """
    names = sorted({domain.superfamily for domain in domains}, key=lambda name: derive_seed(seed, "superfamily", name))
    chosen = set(names[: superfamilies or None])
    drawn = sorted(domains, key=lambda domain: (derive_seed(seed, "domain", domain.id, domain.sequence), domain))
    taken = Counter[str]()
    sequences = set[str]()
    found: list[Domain] = []
    for domain in drawn:
        if domain.superfamily not in chosen or domain.sequence in sequences or taken[domain.family] == per_family:
            continue
        sequences.add(domain.sequence)
        taken[domain.family] += 1
        found.append(domain)
    return found


def split_by_superfamily(domains: Sequence[Domain], train: int, test: int, *, seed: int = 0) -> dict[str, list[Domain]]:
    """Sets that share no superfamily: "train", "validation" (a tenth of the superfamilies) and "test" (a fifth).

    Arguments:
        domains: in the order in which they are to be taken.
        train, test: domains at most; validation has a fifth of `train`.
        seed: of the draw of superfamilies.

    Raises:
        InputError: there are fewer than three superfamilies.
    """
    names = sorted({domain.superfamily for domain in domains}, key=lambda name: derive_seed(seed, "set", name))
    if len(names) < 3:
        raise InputError(f"The domains are of {len(names)} superfamilies; expected at least three, to hold some out.")
    sets: dict[str, set[str]] = {}
    for name, share in _HELD_OUT.items():
        count = max(1, round(share * len(names)))
        sets[name], names = set(names[:count]), names[count:]
    sets["train"] = set(names)
    limits = {"train": train, "validation": max(1, train // 5), "test": test}
    return {
        name: [domain for domain in domains if domain.superfamily in sets[name]][:limit]
        for name, limit in limits.items()
    }
