"""What published models are fitted to, distilled on and judged on: antibodies, English text, proteins.

Each kind comes as two lists, training and judged, that have nothing in common. Nothing of models or tokens is known here.

- Antibody variable domains, from a file that the user gives: no cluster of 80 % identity is on both sides, and of those that are
  judged one domain each.
- English: paragraphs of Python's reference manual, which comes with every Python, or the lines of a file that the user gives.
- Proteins: the bundled training proteins, and the bundled chains of known structure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from performers.conversion.sequences import read_lines, read_sequences
from performers.data import in_memory_corpus, read_fasta
from performers.data.splits import cluster_sequences
from performers.errors import InputError
from performers.randomness import derive_seed
from performers.tools.structures import Chain, bundled_chains

_IDENTITY = 0.8
# The last cysteine within reach of the J segment's motif: residues between them are CDR3 (IMGT positions 105 to 117).
_CDR3 = re.compile(r"C([^C]{3,30}?)[WF]G.G")
_FRAMEWORK_BEFORE = 70  # residues before CDR3, at least
_MOST_TEXTS = 100_000
# Sentences, as against code, tables and lists.
_PROSE = re.compile(r"[A-Z].*[a-z]\.")
_NEARLY_PROSE = re.compile(r"[A-Z].*[.:]")


class Domain(NamedTuple):
    """An antibody variable domain.

    Attributes:
        id: as written.
        sequence: residues.
        cdr3: where its third complementarity-determining region is, from after the conserved cysteine to before the
            tryptophan or phenylalanine of the J segment's W/F-G-X-G.
    """

    id: str
    sequence: str
    cdr3: slice


def antibody_domains(path: Path, fit_to: int, judge_on: int, seed: int) -> tuple[list[Domain], list[Domain]]:
    """Antibody variable domains to train on, and others to judge on, that share no cluster of 80 % identity.

    Arguments:
        path: FASTA, or a table (.tsv, .gz too) of SCOPe domains: identifier, class, sequence; of the table the antibody chains
            of class b.1.1.1 are taken.
        fit_to: clusters to train on, at least.
        judge_on: clusters to judge on, one domain of each.
        seed: of the draw of clusters.

    Returns:
        All domains of the clusters to train on, one of each cluster before any second one; and those to judge on.

    Raises:
        InputError: there are too few in the file.
        MissingExtraError: MMseqs2 is not installed.
    """
    domains: list[Domain] = []
    for name, sequence in {sequence: (name, sequence) for name, sequence in _antibody_records(path)}.values():
        found = list(_CDR3.finditer(sequence, _FRAMEWORK_BEFORE))
        if found:
            domains.append(Domain(name, sequence, slice(*found[0].span(1))))
    if not domains:
        raise InputError(f"{path}: there is no antibody variable domain in it.")
    clusters = cluster_sequences(in_memory_corpus((d.id, d.sequence) for d in domains), identity=_IDENTITY).tolist()
    order = sorted(set(clusters), key=lambda cluster: derive_seed(seed, "antibody cluster", cluster))
    if len(order) < fit_to + judge_on:
        raise InputError(
            f"{path}: {len(domains)} antibody domains are in {len(order)} clusters of {_IDENTITY:.0%} identity; expected at "
            f"least {fit_to + judge_on}."
        )
    members = {cluster: [d for d, own in zip(domains, clusters, strict=True) if own == cluster] for cluster in order}
    judged = [members[cluster][0] for cluster in order[:judge_on]]
    rest = [members[cluster] for cluster in order[judge_on:]]
    return [of_cluster[0] for of_cluster in rest] + [d for of_cluster in rest for d in of_cluster[1:]], judged


def _antibody_records(path: Path) -> list[tuple[str, str]]:
    if not path.name.removesuffix(".gz").endswith(".tsv"):
        return [(record.id, record.sequence) for record in read_fasta(str(path))]
    rows = [line.split("\t") for line in read_lines(path)]
    # SCOPe calls a domain after its chain, and the structures call antibody chains H and L; T-cell receptors, CD4 and CD8 are of
    # the same class.
    return [(row[0], row[2].upper()) for row in rows if len(row) > 2 and row[1] == "b.1.1.1" and row[0][-2] in "hl"]


def english(path: Path | None, fit_to: int, judge_on: int, seed: int) -> tuple[list[str], list[str]]:
    """Paragraphs of English to train on, and others to judge on.

    Arguments:
        path: a text file (.gz too) with a text of at least two words in every line, others are left out; None for Python's
            reference manual, of which the judged ones are prose of 150 to 500 characters.
        fit_to: paragraphs to train on, at least.
        judge_on: paragraphs to judge on.
        seed: of the draw.

    Raises:
        InputError: there are too few in the file, or it cannot be read.
    """
    if path is None:
        from pydoc_data.topics import topics

        found = [" ".join(text.split()) for topic in sorted(topics) for text in topics[topic].split("\n\n")]
        texts = [text for text in found if 60 <= len(text) <= 1000 and _NEARLY_PROSE.fullmatch(text)]
        candidates = [text for text in texts if 150 <= len(text) <= 500 and _PROSE.fullmatch(text)]
    else:
        texts = candidates = [text for text in read_sequences([str(path)], _MOST_TEXTS)[0] if len(text.split()) > 1]
    drawn = sorted(dict.fromkeys(candidates), key=lambda text: derive_seed(seed, "sentence", text))[:judge_on]
    rest = set(texts) - set(drawn)
    if len(drawn) < judge_on or len(rest) < fit_to:
        raise InputError(
            f"{path}: there are {len(set(texts))} different texts in it; expected at least {fit_to + judge_on}."
        )
    return sorted(rest, key=lambda text: derive_seed(seed, "sentence", text)), drawn


def proteins(judge_on: int) -> tuple[list[str], list[Chain]]:
    """The bundled training proteins, and the first of the bundled test chains, all of 50 to 500 residues."""
    training = [record.sequence for record in read_fasta("bundled:train")]
    chains = [chain for chain in bundled_chains(training=False) if 50 <= len(chain.sequence) <= 500]
    return [sequence for sequence in training if 50 <= len(sequence) <= 500], chains[:judge_on]


def halves_of(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The first and the second half of the words of each text."""
    words = [text.split() for text in texts]
    return [" ".join(w[: -(-len(w) // 2)]) for w in words], [" ".join(w[-(-len(w) // 2) :]) for w in words]
