"""Profiles of the families of the bundled training set, as judges of designs (HMMER, by pyhmmer).

Families whose members are about equally long come out, and a profile scores sequences in bits. Members are whole proteins with
one Pfam domain, so a profile is of the family's usual protein, not of the domain alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.benchmarks.control_sequences import TRAINING
from performers.data import STANDARD_RESIDUES, Record, read_fasta
from performers.data.fasta import locate
from performers.errors import MissingExtraError
from performers.randomness import derive_seed
from performers.tools.tables import read_table

E_VALUE = 1e-3
_AS_ONE_OF = 1000
_FEWEST, _MOST, _LONGEST = 10, 40, 300  # members, and residues


def families_of_equals(count: int, prompt: int, seed: int) -> dict[str, list[Record]]:
    """Families of the bundled training set whose members are about equally long, the one that is left out first."""
    sample = locate(TRAINING)
    assert sample is not None
    by_accession: dict[str, set[str]] = defaultdict(set)
    for _, row in read_table(sample.with_name("families.tsv.gz")).rows:
        by_accession[row["accession"]].add(row["family"])
    members: dict[str, list[Record]] = defaultdict(list)
    for record in read_fasta(TRAINING):
        if len(names := by_accession.get(record.id, ())) == 1 and set(record.sequence) <= set(STANDARD_RESIDUES):
            members[next(iter(names))].append(record)
    found: dict[str, list[Record]] = {}
    for name in sorted(members, key=lambda name: derive_seed(seed, "family", name)):
        median = float(np.median([len(record.sequence) for record in members[name]]))
        alike = [record for record in members[name] if abs(len(record.sequence) - median) <= 0.2 * median]
        if len(alike) >= _FEWEST and 2 * prompt <= median <= _LONGEST and len(found) < count:
            alike.sort(key=lambda record: derive_seed(seed, "member", record.id))
            found[name] = alike[:_MOST]
    return found


class Profile:
    """A hidden Markov model of a family: its members aligned to the profile of the first one, and a profile made of that.

    Raises:
        MissingExtraError: pyhmmer is not installed.
    """

    def __init__(self, members: Sequence[Record]) -> None:
        try:
            import pyhmmer  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingExtraError("pyhmmer", "hmm", "profiles of families") from None

        self._hmmer: Any = pyhmmer
        self._alphabet = pyhmmer.easel.Alphabet.amino()
        sequences = self._block([record.sequence for record in members])
        background = pyhmmer.plan7.Background(self._alphabet)
        builder = pyhmmer.plan7.Builder(self._alphabet, seed=1)
        single, _, _ = builder.build(sequences[0], background)
        aligned: Any = pyhmmer.hmmer.hmmalign(single, sequences, digitize=True, trim=True)
        aligned.name = self._name("family")
        model: Any = builder.build_msa(aligned, background)[0]
        self._model = model

    def scores(self, sequences: Sequence[str]) -> list[tuple[float, bool]]:
        """Bits, 0 where nothing aligns, and whether it is a hit, of each sequence searched as one of a thousand."""
        found = [(0.0, False)] * len(sequences)
        options: dict[str, Any] = {"cpus": 1, "Z": _AS_ONE_OF, "E": 1e9, "T": None, "bias_filter": True}
        options |= {"F1": 1.0, "F2": 1.0, "F3": 1.0}
        (hits,) = self._hmmer.hmmer.hmmsearch([self._model], self._block(sequences), **options)
        for hit in hits:
            name = hit.name.decode() if isinstance(hit.name, bytes) else hit.name
            found[int(name)] = (float(hit.score), bool(hit.evalue <= E_VALUE))
        return found

    def expected(self, sequence: str) -> npt.NDArray[np.float64]:
        """How probable each letter of `STANDARD_RESIDUES` is at every residue of an aligned sequence, (L, 20).

        By the emissions of the match state that a residue is aligned to, or HMMER's background where it is inserted. What stands
        there does not matter where it is X.
        """
        aligned = self._hmmer.hmmer.hmmalign(self._model, self._block([sequence]), all_consensus_cols=True)
        order = [self._alphabet.symbols.index(letter) for letter in STANDARD_RESIDUES]
        emissions = np.asarray(self._model.match_emissions, dtype=np.float64)[1:, order]
        inserted = np.asarray(self._hmmer.plan7.Background(self._alphabet).residue_frequencies, dtype=np.float64)[order]
        rows: list[npt.NDArray[np.float64]] = []
        state = 0
        for symbol in aligned.alignment[
            0
        ]:  # upper case at match states, "-" where one is left out, lower case between them
            if symbol.isalpha():
                rows.append(emissions[state] if symbol.isupper() else inserted)
            state += symbol.isupper() or symbol == "-"
        found = np.stack(rows)
        return found / found.sum(1, keepdims=True)

    def _block(self, sequences: Sequence[str]) -> Any:
        easel = self._hmmer.easel
        texts = [
            easel.TextSequence(name=self._name(str(number)), sequence=sequence)
            for number, sequence in enumerate(sequences)
        ]
        return easel.DigitalSequenceBlock(self._alphabet, [text.digitize(self._alphabet) for text in texts])

    def _name(self, text: str) -> Any:
        """pyhmmer before 0.12 took bytes."""
        major, minor = (int(part) for part in self._hmmer.__version__.split(".")[:2])
        return text if (major, minor) >= (0, 12) else text.encode()
