"""Protein variants as people write them: text in, substitutions of a wild type out, or what is wrong with them.

Understood are `A1P` and several such joined by ":" (or ";", "," and "+"), HGVS (`p.Ala1Pro`, `p.(Ala1Pro)`, `p.[Ala1Pro;Asp2Asn]`
and `p.Ala1=`, `p.Trp26Ter`; with or without a reference before "p."), and the whole mutated sequence, which is how insertions and
deletions come. Nothing is raised: a variant that cannot be used has a status that says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

from performers.data import RESIDUES, STANDARD_RESIDUES

Status: TypeAlias = Literal[
    "ok", "synonymous", "stop", "indel", "wrong wild type", "out of range", "malformed", "unread"
]
# What a variant cannot help being; the other statuses but "ok" are failures.
HARMLESS: tuple[Status, ...] = ("ok", "synonymous", "stop")

_THREE = {
    "ala": "A", "arg": "R", "asn": "N", "asp": "D", "asx": "B", "cys": "C", "gln": "Q", "glu": "E", "glx": "Z", "gly": "G",
    "his": "H", "ile": "I", "leu": "L", "lys": "K", "met": "M", "phe": "F", "pro": "P", "pyl": "O", "sec": "U", "ser": "S",
    "ter": "*", "thr": "T", "trp": "W", "tyr": "Y", "val": "V", "xaa": "X",
}  # fmt: skip
_LETTER = rf"[{RESIDUES}*]"
_NAME = "|".join(_THREE)
_SHORT = re.compile(rf"({_LETTER})(-?\d+)({_LETTER}|=)", re.IGNORECASE)
_LONG = re.compile(rf"({_NAME})(-?\d+)({_NAME}|\*|=)", re.IGNORECASE)
_INDEL = re.compile(rf"(?:{_NAME}|{_LETTER})\d+.*(?:del|ins|dup|fs|ext)", re.IGNORECASE)
_SEPARATORS = re.compile(r"[:;,+\s]+")
_WILD_TYPE = ("wt", "_wt", "wild-type", "wildtype", "=", "p.=")
_MAX_DIGITS = 9


class Substitution(NamedTuple):
    """One residue for another, at a position counted from 0."""

    position: int
    old: str
    new: str


class Variant(NamedTuple):
    """A variant of a wild type.

    Attributes:
        status: "ok" where it is another protein that can be scored.
        substitutions: where it differs, in order; none where residues came or went.
        sequence: the whole mutated sequence, where residues came or went ("indel").
        reason: what is wrong, for people.
    """

    status: Status
    substitutions: tuple[Substitution, ...] = ()
    sequence: str | None = None
    reason: str = ""

    def apply(self, wild_type: str) -> str:
        """The mutated sequence."""
        if self.sequence is not None:
            return self.sequence
        letters = list(wild_type)
        for position, _, new in self.substitutions:
            letters[position] = new
        return "".join(letters)


def parse_variant(wild_type: str, mutant: str = "", mutated_sequence: str = "", *, offset_idx: int = 1) -> Variant:
    """A variant from its name, or its whole sequence, or both.

    Arguments:
        wild_type: what it is a variant of.
        mutant: its name; may be empty or anything at all where `mutated_sequence` is given.
        mutated_sequence: all of it, or "".
        offset_idx: the number that the first residue has in `mutant`.
    """
    name, whole = mutant.strip(), "".join(mutated_sequence.split()).upper()
    by_name = _by_name(wild_type, name, offset_idx) if name else None
    if not whole:
        return by_name or Variant("malformed", reason="neither a mutant nor a mutated sequence")
    by_sequence = _by_sequence(wild_type, whole)
    if by_name is None or by_name.status in ("malformed", "indel") or by_sequence.status in ("malformed", "stop"):
        return by_sequence
    if by_name.status in ("ok", "synonymous") and by_name.apply(wild_type) != whole:
        return Variant("malformed", reason=f"the mutated sequence is not what {name} makes of the wild type")
    return by_name


def saturation(wild_type: str, offset_idx: int = 1) -> Iterator[tuple[str, Variant]]:
    """Every substitution by one of the 20 standard residues, by position and then by letter, with its name."""
    for position, old in enumerate(wild_type):
        for new in STANDARD_RESIDUES:
            if new != old:
                yield f"{old}{position + offset_idx}{new}", Variant("ok", (Substitution(position, old, new),))


def _by_name(wild_type: str, name: str, offset_idx: int) -> Variant:
    if name.lower() in _WILD_TYPE:
        return Variant("synonymous")
    text = re.sub(r"^\S*?\bp\.", "", name).strip("[]()")
    parts = [part.removeprefix("p.").strip("[]()") for part in _SEPARATORS.split(text) if part]
    if not parts:
        return Variant("malformed", reason=f"{_shown(name)} names no substitution")
    found: list[Substitution] = []
    is_stop = False
    for part in parts:
        match = _LONG.fullmatch(part) or _SHORT.fullmatch(part)
        if match is None or len(match[2]) > _MAX_DIGITS:
            if _INDEL.match(part):
                return Variant("indel", reason="residues come or go: give the whole as mutated_sequence")
            return Variant("malformed", reason=f"{_shown(part)} is not a substitution like A1P or p.Ala1Pro")
        old, new = (_THREE.get(text.lower(), text.upper()) for text in (match[1], match[3]))
        position = int(match[2]) - offset_idx
        if not 0 <= position < len(wild_type):
            last = offset_idx + len(wild_type) - 1
            return Variant("out of range", reason=f"{part}: the wild type has residues {offset_idx} to {last}")
        if wild_type[position] != old:
            return Variant(
                "wrong wild type", reason=f"{part}: residue {match[2]} of the wild type is {wild_type[position]}"
            )
        is_stop |= new == "*"
        found.append(Substitution(position, old, old if new == "=" else new))
    if len({substitution.position for substitution in found}) < len(found):
        return Variant("malformed", reason=f"{_shown(name)} names a position twice")
    if is_stop:
        return Variant("stop", reason="a stop is not a residue: there is no protein to score")
    changes = tuple(sorted(substitution for substitution in found if substitution.new != substitution.old))
    return Variant("ok", changes) if changes else Variant("synonymous")


def _by_sequence(wild_type: str, whole: str) -> Variant:
    if "*" in whole.rstrip("*"):
        return Variant("stop", reason="a stop is not a residue: there is no protein to score")
    whole = whole.rstrip("*")
    wrong = next((letter for letter in whole if letter not in RESIDUES), None)
    if wrong is not None or not whole:
        what = "is empty" if wrong is None else f"holds {wrong!r}, which is not a residue"
        return Variant("malformed", reason=f"the mutated sequence {what}")
    if whole == wild_type:
        return Variant("synonymous")
    if len(whole) != len(wild_type):
        return Variant("indel", sequence=whole, reason="residues came or went")
    pairs = enumerate(zip(wild_type, whole, strict=True))
    return Variant("ok", tuple(Substitution(position, old, new) for position, (old, new) in pairs if old != new))


def _shown(text: str) -> str:
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 40 else shown[:37] + "..."
