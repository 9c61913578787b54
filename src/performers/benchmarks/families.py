"""The families of `performers benchmark family`: which are held out, and how their proteins are read.

`prepare_families` divides proteins by cluster and writes what the training needs; `read_families` predicts hidden residues by a
model, `read_by_profile` by a profile HMM of the same relatives. Both see the same residues hidden, whatever the context.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performers.benchmarks.comparison import Proteins
from performers.data import STANDARD_RESIDUES, Record
from performers.errors import InputError
from performers.randomness import derive_seed

_VALIDATION_CLUSTERS = 100
# Made-up families: how many, of how many members, and the share of residues that differ from the protein they come from.
_MADE_UP, _COPIES, _CHANGED = 60, 6, 0.4


@dataclass(frozen=True)
class Families:
    """Held-out families, and what is trained on.

    Attributes:
        key: changes when any of it does.
        proteins: what is trained on, and validated on; None where nothing is trained.
        clusters: the table of clusters, a file.
        held_out: for each family its members' records.
    """

    key: str
    proteins: Proteins | None
    clusters: str
    held_out: list[list[Record]]

    def wrong(self, family: int) -> int:
        """The other family whose members' mean length is nearest."""
        lengths = [_mean_length(members) for members in self.held_out]
        others = (other for other in range(len(lengths)) if other != family)
        return min(others, key=lambda other: (abs(lengths[other] - lengths[family]), other))

    def unlike(self, records: Sequence[Record], count: int) -> list[Record]:
        """So many proteins of families that hold none of the records, the families of the nearest mean length first.

        Raises:
            InputError: they have fewer.
        """
        given, length = {record.sequence for record in records}, _mean_length(records)
        others = [members for members in self.held_out if not given & {record.sequence for record in members}]
        others.sort(key=lambda members: abs(_mean_length(members) - length))
        found = [record for members in others for record in members]
        if len(found) < count:
            raise InputError(
                f"The held-out families have {len(found):,} proteins that are not among the {count:,} relatives: expected as "
                "many, for a wrong family."
            )
        return found[:count]


def _mean_length(records: Sequence[Record]) -> float:
    return sum(len(record.sequence) for record in records) / len(records)


def prepare_families(
    folder: Path,
    sources: Sequence[str],
    clusters: str | None,
    *,
    held_out: Sequence[str],
    families: int,
    members: int,
    max_length: int,
    seed: int,
    training: bool = True,
) -> Families:
    """Divide proteins by cluster; the files of the training are kept in a folder that is found again.

    Arguments:
        folder: of the experiment.
        sources, clusters: FASTA files and the table; without them families are made up of bundled proteins.
        held_out: FASTA files: the clusters of their proteins are held out, and no others; by the seed if there are none.
        families, members: how many are held out, and of how many different sequences each.
        max_length: residues.
        seed: of what is drawn.
        training: whether to prepare what is not held out for training.

    Raises:
        InputError: a file is not in order, nothing is left to train on, or fewer than two families can be held out.
    """
    from performers.data import build_corpus, in_memory_corpus, read_fasta
    from performers.data.relatives import read_clusters
    from performers.folders import write_file
    from performers.training.runs import describe_file

    files = [
        describe_file(path) for path in (*sources, *held_out, *([clusters] if clusters else [])) if Path(path).is_file()
    ]
    made_of = {"files": files, "held_out": [*held_out], "families": families, "members": members}
    made_of |= {"max_length": max_length, "seed": seed}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    place = folder / "families" / key
    place.mkdir(parents=True, exist_ok=True)
    if clusters is None:
        records, table = _made_up(seed)
        clusters = str(place / "clusters.tsv")
        write_file(Path(clusters), table)
    else:
        records = [record for record in read_fasta([*sources]) if len(record.sequence) <= max_length]
    corpus = in_memory_corpus(records)
    numbers = read_clusters(clusters, corpus)
    groups: dict[int, dict[str, Record]] = defaultdict(dict)
    for record, number in zip(records, numbers.tolist(), strict=True):
        if not set(record.sequence) - set(STANDARD_RESIDUES):
            groups[number].setdefault(record.sequence, record)
    wanted = {record.id for record in read_fasta([*held_out])} if held_out else None
    touched = {n for record, n in zip(records, numbers.tolist(), strict=True) if wanted is None or record.id in wanted}

    def drawn(names: Iterable[int], what: str) -> list[int]:
        """In an order that does not depend on that of the input."""
        first = {number: min(record.id for record in groups[number].values()) for number in names}
        return sorted(first, key=lambda number: (derive_seed(seed, what, first[number]), number))

    large = (number for number in touched if len(groups.get(number, ())) >= members)
    chosen = drawn(large, "held-out family")[:families]
    if len(chosen) < 2:
        raise InputError(
            f"{len(chosen)} of the clusters have {members} different proteins of at most {max_length:,} residues and may be held "
            "out; expected at least two."
        )
    out = {*chosen} if wanted is None else touched
    families_of = [
        sorted(groups[number].values(), key=lambda record: derive_seed(seed, "member", record.sequence))[:members]
        for number in chosen
    ]
    if not training:
        return Families(key, None, clusters, families_of)
    rest = drawn((number for number in groups if number not in out), "validation family")
    validation = rest[: min(_VALIDATION_CLUSTERS, len(rest) // 5)]
    out |= set(validation)
    train, check = place / "train", place / "validation.fasta"
    if not (train / "corpus.json").is_file():
        kept = place / "train.fasta"
        of_validation = [next(iter(groups[number].values())) for number in validation]
        of_train = [record for record, number in zip(records, numbers.tolist(), strict=True) if number not in out]
        if not of_train or not of_validation:
            raise InputError("The clusters that are not held out are too few to train on.")
        for path, some in ((check, of_validation), (kept, of_train)):
            write_file(path, "".join(f">{record.id}\n{record.sequence}\n" for record in some))
        build_corpus([str(kept)], train)
        kept.unlink()
    return Families(key, Proteins(key, str(train), [str(check)], {}), clusters, families_of)


def _made_up(seed: int) -> tuple[list[Record], str]:
    """Families of bundled proteins with residues replaced, and their table of clusters."""
    import numpy as np

    from performers.data import read_fasta

    parents = [record for record in read_fasta("bundled:train") if 50 <= len(record.sequence) <= 120][:_MADE_UP]
    records: list[Record] = []
    lines: list[str] = []
    for parent in parents:
        for copy in range(_COPIES):
            draws = np.random.Generator(np.random.Philox(derive_seed(seed, "made-up member", parent.id, copy)))
            letters = np.array(list(parent.sequence))
            changed = draws.random(len(letters)) < _CHANGED
            letters[changed] = draws.choice(list(STANDARD_RESIDUES), size=int(changed.sum()))
            letters[~np.isin(letters, list(STANDARD_RESIDUES))] = "A"
            records.append(Record(f"{parent.id}.{copy}", "", "".join(letters), len(records) + 1))
            lines.append(f"{parent.id}.0\t{records[-1].id}\n")
    return records, "".join(lines)


def _hidden(record: Record, seed: int) -> tuple[Any, Any]:
    """Tokens of a protein with residues hidden, and the labels; a function of the protein and the seed."""
    import numpy as np

    from performers.data import BOS, EOS, encode, mask_tokens

    tokens = np.concatenate(([BOS], encode(record.sequence), [EOS])).astype(np.int64)[None]
    hidden, labels = mask_tokens(tokens, [0], seed=derive_seed(seed, "family", record.sequence), step=0, scheme="mask")
    return hidden[0], labels[0]


def read_families(
    folder: Path, families: Families, context: str, targets: int, seed: int, device: str
) -> dict[str, list[float]]:
    """Predict residues of every family's first members by a model, in the context of the others, of a wrong family, or alone.

    Arguments:
        folder: of a masked or causal Performer; of a masked one the hidden residues are scored, of a causal one all.
        families: to read.
        context: "none", "own" or "wrong".
        targets: members that are predicted.
        seed: of the hidden residues.
        device: by name.

    Returns:
        right, residues and loss (nats) of each family, sums over its targets.
    """
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    from performers.data import BOS, EOS, encode
    from performers.training.checkpoint import objective_of, open_model
    from performers.training.distributed import autocast, choose_device, choose_dtype

    place = choose_device(device)
    model: Any = open_model(folder).to(place)
    is_causal = objective_of(model) == "clm"

    def packed(rows: Sequence[Any]) -> dict[str, Any]:
        offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
        ids = torch.from_numpy(np.concatenate(rows))[None]
        return {"input_ids": ids.to(place), "cu_seqlens": torch.from_numpy(offsets).to(place)}

    found: dict[str, list[float]] = {"right": [], "residues": [], "loss": []}
    with torch.inference_mode(), autocast(place, choose_dtype("auto", place)):
        for number, members in enumerate(families.held_out):
            whole = [np.concatenate(([BOS], encode(r.sequence), [EOS])).astype(np.int64) for r in members]
            rows, labels = zip(*(_hidden(record, seed) for record in members[:targets]), strict=True)
            arguments: dict[str, Any] = {}
            if context != "none":
                relatives = members if context == "own" else families.held_out[families.wrong(number)]
                texts = [np.concatenate(([BOS], encode(r.sequence), [EOS])).astype(np.int64) for r in relatives]
                # A target leaves itself out, and out of a wrong family the member in its place: as many are read.
                weights = torch.ones(targets, len(texts)) - torch.eye(targets, len(texts))
                arguments["context"] = model.performer.read_context(**packed(texts)).mixed(weights)
            logits = model(**packed(whole[:targets] if is_causal else rows), **arguments).logits[0].float()
            if is_causal:
                # Every residue is predicted at the token before it; what the start and end tokens predict is not scored.
                expected = torch.from_numpy(np.concatenate([np.append(row[1:], -100) for row in whole[:targets]]))
                expected[expected == EOS] = -100
            else:
                expected = torch.from_numpy(np.concatenate(labels))
            expected = expected.to(place)
            scored = expected >= 0
            found["right"].append(float((logits.argmax(-1) == expected)[scored].sum()))
            found["residues"].append(float(scored.sum()))
            found["loss"].append(float(cross_entropy(logits[scored], expected[scored], reduction="sum")))
    return found


def read_by_composition(families: Families, context: str, targets: int, seed: int) -> dict[str, list[float]]:
    """Predict the same hidden residues by how often each letter occurs in the relatives, with a pseudocount each.

    Returns:
        As `read_families`.
    """
    import numpy as np

    def expected(shown: str, relatives: list[Record]) -> Any:
        text = "".join(record.sequence for record in relatives)
        chances = np.array([text.count(letter) + 1.0 for letter in STANDARD_RESIDUES])
        return np.tile(chances / chances.sum(), (len(shown), 1))

    return _read_by(expected, families, context, targets, seed)


def read_by_profile(families: Families, context: str, targets: int, seed: int) -> dict[str, list[float]]:
    """Predict the same hidden residues by a profile HMM (HMMER 3) of the same relatives, to which the target is aligned.

    Returns:
        As `read_families`.

    Raises:
        MissingExtraError: pyhmmer is not installed.
    """
    from performers.benchmarks.family_profiles import Profile

    return _read_by(lambda shown, relatives: Profile(relatives).expected(shown), families, context, targets, seed)


def _read_by(
    expected: Callable[[str, list[Record]], Any], families: Families, context: str, targets: int, seed: int
) -> dict[str, list[float]]:
    """Hidden residues by a function of the target, with X where one is hidden, and its relatives, that gives (L, 20) chances."""
    import numpy as np

    found: dict[str, list[float]] = {"right": [], "residues": [], "loss": []}
    for number, members in enumerate(families.held_out):
        relatives = members if context == "own" else families.held_out[families.wrong(number)]
        right = count = loss = 0.0
        for place, target in enumerate(members[:targets]):
            hidden = np.flatnonzero(_hidden(target, seed)[1][1:-1] >= 0)
            letters = list(target.sequence)
            own = np.array([STANDARD_RESIDUES.index(letters[at]) for at in hidden])
            for at in hidden:
                letters[at] = "X"
            others = [record for at, record in enumerate(relatives) if at != place]
            chances = expected("".join(letters), others)[hidden]
            right += float((chances.argmax(1) == own).sum())
            loss -= float(np.log(np.maximum(chances[np.arange(len(own)), own], 1e-12)).sum())
            count += len(own)
        found["right"].append(right)
        found["residues"].append(count)
        found["loss"].append(loss)
    return found
