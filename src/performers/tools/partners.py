"""The proteins that a design is made for or against, and what is known of whether a model heeds them.

A FASTA file and, if some partners are unwanted, a table say who they are; `Partners` holds their chains. Whether a model's
designs depend on a partner at all is measured by `performers benchmark design`, and the result travels with the model as
`partner-effect.json` in its folder. Nothing here reads a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from performers.data import MAX_LENGTH, FastaReport
from performers.data.fasta import OnInvalid
from performers.errors import CheckpointError, InputError
from performers.folders import write_file
from performers.tools.proteins import Protein, read_proteins
from performers.tools.tables import read_table

EFFECT_FILE = "partner-effect.json"
WANTED, UNWANTED = "wanted", "unwanted"


@dataclass(frozen=True)
class Partners:
    """Who a design is to bind, and who not.

    Attributes:
        wanted, unwanted: proteins, in the order of the file.
    """

    wanted: tuple[Protein, ...] = ()
    unwanted: tuple[Protein, ...] = ()

    @property
    def wanted_chains(self) -> list[str]:
        """The chains that are read before a design."""
        return [chain for protein in self.wanted for chain in protein.chains]

    @property
    def unwanted_chains(self) -> list[str]:
        """The chains that a design is held against."""
        return [chain for protein in self.unwanted for chain in protein.chains]

    def __bool__(self) -> bool:
        return bool(self.wanted or self.unwanted)


def read_partners(
    source: str,
    spec: str | None,
    *,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    report: FastaReport | None = None,
) -> Partners:
    """The partners in a file, told apart by a table.

    Arguments:
        source: as `read_proteins` takes it.
        spec: a table of two columns, an identifier and "wanted" or "unwanted"; a line of headings may come first. Without it all
            are wanted.
        max_length, on_invalid, report: as in `read_proteins`.

    Raises:
        InputError: the table names a protein that is not in the file, or twice, or leaves one out, or says something else.
    """
    proteins = list(read_proteins(source, max_length=max_length, on_invalid=on_invalid, report=report))
    if spec is None:
        return Partners(tuple(proteins))
    ids = [protein.id for protein in proteins]
    roles = _read_spec(spec, ids)
    unknown = [name for name in roles if name not in ids]
    if unknown:
        raise InputError(f"{spec} names {', '.join(unknown)}: expected identifiers of {source}.")
    left_out = [name for name in dict.fromkeys(ids) if name not in roles]
    if left_out:
        raise InputError(f"{spec} does not say whether {', '.join(left_out)} of {source} is wanted or unwanted.")
    by_role = {role: tuple(one for one in proteins if roles[one.id] == role) for role in (WANTED, UNWANTED)}
    return Partners(by_role[WANTED], by_role[UNWANTED])


def _read_spec(spec: str, ids: Sequence[str]) -> dict[str, str]:
    table = read_table(spec)
    if len(table.columns) != 2:
        raise InputError(
            f"{spec} has {len(table.columns)} columns: expected two, an identifier and {WANTED} or {UNWANTED}."
        )
    rows = [(f"row {number:,}", *values.values()) for number, values in table.rows]
    if table.columns[1].lower() in (WANTED, UNWANTED) or table.columns[0] in ids:  # there are no headings
        rows.insert(0, ("line 1", *table.columns))
    roles: dict[str, str] = {}
    for where, name, said in rows:
        if said.lower() not in (WANTED, UNWANTED):
            raise InputError(f"{spec}, {where}: {said!r} is neither {WANTED} nor {UNWANTED}.")
        if name in roles:
            raise InputError(f"{spec}, {where}: {name} is there twice.")
        roles[name] = said.lower()
    return roles


@dataclass(frozen=True)
class PartnerEffect:
    """How much likelier held-out binders are after their true partner than after another one.

    Attributes:
        gain: the mean over pairs of (log P(binder | true partner) - log P(binder | shuffled partner)) / residues of the binder,
            in nats per residue.
        low, high: its 95 % interval, proteins being resampled.
        pairs: how many there were.
        weights: the SHA-256 of each of the model's weights files.
    """

    gain: float
    low: float
    high: float
    pairs: int
    weights: dict[str, str]

    @property
    def is_there(self) -> bool:
        """Whether the interval lies above zero."""
        return self.low > 0

    def save(self, folder: Path) -> None:
        """Write it into a model's folder, or any other."""
        write_file(folder / EFFECT_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def find(cls, folder: Path, fingerprint: dict[str, str]) -> PartnerEffect | None:
        """What was measured of the model in a folder; None where nothing was, or of other weights.

        Arguments:
            folder: of the model.
            fingerprint: the SHA-256 of its files.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / EFFECT_FILE
        if not path.is_file():
            return None
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            effect = cls(
                gain=float(content["gain"]),
                low=float(content["low"]),
                high=float(content["high"]),
                pairs=int(content["pairs"]),
                weights=dict(content["weights"]),
            )
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} is damaged: remove it, or measure anew.") from None
        return effect if all(fingerprint.get(name) == digest for name, digest in effect.weights.items()) else None


def said_of(effect: PartnerEffect | None) -> str:
    """A sentence for people on what a partner does to this model's designs."""
    if effect is None:
        return "Whether this model heeds a partner was not measured: `performers benchmark design` does that."
    figures = (
        f"log P(binder | true partner) - log P(binder | shuffled partner) = {effect.gain:+.4f} nats per residue "
        f"[{effect.low:+.4f}, {effect.high:+.4f}], {effect.pairs:,} held-out pairs"
    )
    if effect.is_there:
        return f"The partner has a measured effect on this model: {figures}."
    return f"The partner has no measured effect on this model: {figures}."
