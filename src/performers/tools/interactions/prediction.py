"""`interact predict`: proteins in, and the probability that they interact for pairs, for all pairs, or for groups.

Every protein is read once, in shards that are kept and resumed; then pairs are scored as they stream from their file, so that
memory holds proteins and not pairs (of pairs with labels, 33 bytes each, which are measured in the end). A group is one context:
its proteins are read in the presence of all others, and one reading gives the matrix of all its pairs. Rows that name proteins
that are not there are listed, and the others scored.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from performers.data import FastaReport
from performers.errors import InputError
from performers.folders import sha256_of
from performers.tools.interactions.model import HEAD, SETTINGS, InteractionModel
from performers.tools.interactions.outputs import Asked, Outputs
from performers.tools.interactions.pairs import LeftOut, Unknown, read_groups, read_pairs, require_table
from performers.tools.interactions.scorer import Scorer
from performers.tools.interactions.summaries import Summariser
from performers.tools.interactions.training import by_identifier
from performers.tools.jobs import run_tool
from performers.tools.language_model import Unread
from performers.tools.proteins import Protein
from performers.tools.tool import Outcome, Result, Written

_CHUNK = 8192
_COLUMNS = ("p0", "p1", "prob")


class Predictor(Summariser):
    """`interact predict` as a `Tool`: its items are proteins, and `write` scores the pairs.

    Arguments:
        model: what scores.
        sources: files of proteins.
        pairs, groups: the file of pairs, or of groups; neither for all pairs.
        thresh: pairs of at least this probability are also written on their own.
        as_table: whether the output is one .tsv file, with the others beside it; else a folder.
        options: those of `Embedder`: toks_per_batch, max_length, on_invalid.
    """

    command: ClassVar[str] = "interact predict"
    noun: ClassVar[str] = "pairs"

    def __init__(
        self,
        model: InteractionModel,
        sources: Sequence[str],
        *,
        pairs: str | None = None,
        groups: str | None = None,
        thresh: float = 0.5,
        as_table: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model.body, sources, num_features=model.settings.shape.num_features, **options)
        self._interactions, self._pairs, self._groups, self._thresh = model, pairs, groups, thresh
        self.makes_folder = not as_table
        self._longest_context = 0

    def items(self, report: FastaReport) -> Iterator[Protein]:
        """The proteins that are named, each once.

        Raises:
            InputError: as `read_pairs`, or none of the proteins is named.
        """
        known = by_identifier(super().items(report))
        costs = {name: self.tokens(protein) for name, protein in known.items()}
        named: dict[str, None] = {}
        longest = 0
        for names in self._contexts(known):
            named.update(dict.fromkeys(names))
            longest = max(longest, sum(costs.get(name, 0) for name in set(names)))
        if self._groups is not None and not named:
            raise InputError(f"{self._groups}: all of its groups are empty; expected an identifier after each group.")
        if self._pairs is None and self._groups is None:
            if len(known) < 2:
                raise InputError(f"There is {len(known):,} protein; expected two or more, of which pairs can be made.")
            named, longest = dict.fromkeys(known), sum(sorted(costs.values())[-2:])
        if known.keys().isdisjoint(named):
            raise InputError(
                f"{self._pairs or self._groups} names none of the {len(known):,} proteins; its first identifier is "
                f"{next(iter(named))}."
            )
        if self._interactions.settings.together == "body":
            self._longest_context = longest
        yield from (protein for name, protein in known.items() if name in named)

    def _contexts(self, known: Collection[str]) -> Iterator[tuple[str, ...]]:
        """The identifiers that each pair or group of the file brings together."""
        if self._pairs is not None:
            yield from ((pair.a, pair.b) for pair in read_pairs(self._pairs, known))
        elif self._groups is not None:
            yield from (group.members for group in read_groups(self._groups, known))

    def longest(self, item: Protein) -> int:
        """The tokens of its longest chain, or of the longest context where contexts are read whole."""
        return max(self._longest_context, super().longest(item))

    def refusal(self, item: Protein) -> str | None:
        """Why the model has no positions for it alone, if so; contexts that cannot be read are listed when they are scored."""
        return self.model.refusal(super().longest(item))

    def about(self, report: FastaReport) -> str:
        """How many there are in the files."""
        return f"{report.records:,} proteins, {report.residues:,} residues"

    def beside(self, path: Path) -> Sequence[str]:
        """The table of positives; whether there are labels, and figures, is not known before."""
        return () if self.makes_folder else (Outputs.positives_of(path).name,)

    def write(self, results: Iterable[tuple[Protein, Result]], path: Path) -> Written:
        """Predictions, those above the threshold, and with labels the figures and the calibration curve."""
        if self.makes_folder:
            path.mkdir()
        header = _COLUMNS if self._groups is None else (*_COLUMNS, "group")
        outputs = Outputs(path, header, is_folder=self.makes_folder, thresh=self._thresh)
        scorer = Scorer(self._interactions, self.toks_per_batch)
        failed: list[tuple[int, str, str]] = []
        for protein, result in results:
            if isinstance(result, Unread):
                failed.append((protein.number, protein.id, result.reason))
            else:
                scorer.add(protein, result)
        unread = {name for _, name, _ in failed}
        places = {protein.id: place for place, protein in enumerate(scorer.proteins)}
        known = unread | places.keys()
        with outputs:
            score = self._score_pairs if self._groups is None else self._score_groups
            asked, left_out = score(scorer, places, known, outputs)
        figures, contradictory = outputs.figures(self._interactions.settings.verdict, list(places))
        failed += [entry for entry in sorted([*left_out, *contradictory]) if entry.name not in unread]
        scored = outputs.count if self._groups is None else outputs.groups
        return Written(asked, failed, {"asked": asked, "scored": scored, **figures})

    def tally(self, outcome: Outcome) -> str:
        """Pairs or groups without a score, beside the problems, of which one can cost many pairs or none."""
        asked, scored = outcome.figures["asked"], outcome.figures["scored"]
        problems = "1 problem" if len(outcome.failed) == 1 else f"{len(outcome.failed):,} problems"
        what = "pairs" if self._groups is None else "groups"
        return f"{problems}, and {asked - scored:,} of {asked:,} {what} without a score"

    def _score_pairs(
        self, scorer: Scorer, places: dict[str, int], known: Collection[str], outputs: Outputs
    ) -> tuple[int, list[LeftOut]]:
        """How many pairs there are, and those without a score."""
        unknown = Unknown(places, "pair")
        left_out: list[LeftOut] = []
        chunk: list[Asked] = []
        asked = 0

        def score() -> None:
            table = np.array([[places[pair.a], places[pair.b]] for pair in chunk], dtype=np.int64)
            logits = scorer.pairs(table)
            read = ~np.isnan(logits)
            for place in np.flatnonzero(~read).tolist():
                pair, reason = chunk[place], scorer.unread[tuple(sorted(table[place].tolist()))]
                left_out.append(LeftOut(pair.number, f"{pair.a} {pair.b}", reason))
            outputs.add(list(itertools.compress(chunk, read)), table[read], logits[read])
            chunk.clear()

        for pair in self._asked(places, known):
            asked += 1
            if unknown.refuses(pair.number, pair.a, pair.b):
                continue
            if pair.a == pair.b:
                left_out.append(LeftOut(pair.number, f"{pair.a} {pair.b}", "it is a pair of a protein with itself"))
                continue
            chunk.append(pair)
            if len(chunk) == _CHUNK:
                score()
        if chunk:
            score()
        return asked, [*left_out, *unknown.left_out()]

    def _asked(self, places: dict[str, int], known: Collection[str]) -> Iterator[Asked]:
        if self._pairs is not None:
            for pair in read_pairs(self._pairs, known):
                yield Asked(pair.number, pair.a, pair.b, -1 if pair.label is None else pair.label)
            return
        names = list(places)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                yield Asked(0, a, b, -1)

    def _score_groups(
        self, scorer: Scorer, places: dict[str, int], known: Collection[str], outputs: Outputs
    ) -> tuple[int, list[LeftOut]]:
        """How many groups there are, those without a score, and members that are named again."""
        assert self._groups is not None
        unknown = Unknown(places, "group")
        left_out: list[LeftOut] = []
        asked = 0
        for group in read_groups(self._groups, known):
            asked += 1
            for name in group.members:
                unknown.refuses(group.number, name)
            for number, name in group.repeated:
                left_out.append(LeftOut(number, name, f"it is in {group.name} already, and was taken once"))
            members = [name for name in group.members if name in places]
            if len(members) < 2:
                reason = f"it has {('no known proteins', '1 known protein')[len(members)]}, and a group needs two"
                left_out.append(LeftOut(group.number, group.name, reason))
                continue
            context = [places[name] for name in members]
            matrix = scorer.group(context)
            reason = scorer.unread.get(tuple(sorted(context)))
            if reason is not None:
                left_out.append(LeftOut(group.number, group.name, reason))
                continue
            outputs.add_group(group, members, matrix)
        return asked, [*left_out, *unknown.left_out()]

    def methods(self, outcome: Outcome) -> str:
        """A few sentences."""
        settings = self._interactions.settings
        how = (
            "each read once, and their attention states were added up to the context of a pair or group"
            if settings.together == "states"
            else "read together, pair by pair or group by group"
        )
        return (
            f"Interactions were predicted with performers from sequences alone; proteins were {how}. The model, on the language "
            f"model {self.model.name}, is {settings.verdict}."
        )


def predict_to(
    output: str | Path,
    sources: Sequence[str],
    model: str | Path | None,
    *,
    pairs: str | None = None,
    groups: str | None = None,
    thresh: float = 0.5,
    device: str = "auto",
    dtype: str = "auto",
    dry_run: bool = False,
    restart: bool = False,
    **options: Any,
) -> Outcome:
    """Predicts interactions into a folder or a .tsv file.

    Arguments:
        output: a folder for `predictions.tsv`, `positives.tsv`, with labels the figures, and with groups a matrix of each; or a
            .tsv file, with all but the matrices beside it.
        sources: files of proteins, "-" or "bundled:NAME".
        model: a folder that `performers interact train` made.
        pairs: TSV of pairs; with labels in a third column they are measured.
        groups: TSV of groups and members, instead; without either, all pairs are scored.
        thresh: of the positives.
        device, dtype: as in `LanguageModel.open`.
        dry_run, restart: as in `run_tool`.
        options: toks_per_batch, max_length, on_invalid, as in `Embedder`.

    Raises:
        InputError, RunError: as in `run_tool`, `read_pairs` and `InteractionModel.open`.
    """
    if pairs is not None and groups is not None:
        raise InputError("pairs and groups exclude each other: give one of them.")
    if not 0 <= thresh <= 1:
        raise InputError(f"thresh is {thresh}: expected a probability.")
    path = Path(output)
    if path.suffix == ".gz":
        raise InputError(f"{output}: expected a .tsv file or a folder.")
    opened = InteractionModel.open(model, device=device, dtype=dtype)
    print(f"{opened.folder} is {opened.settings.verdict}.", file=sys.stderr, flush=True)
    asked = pairs or groups
    if asked is not None:
        require_table(asked)
    if groups is not None and path.suffix == ".tsv":
        print(f"{output} will hold the pairs of all groups; only a folder holds their matrices, too.", file=sys.stderr)
    tool = Predictor(
        opened, sources, pairs=pairs, groups=groups, thresh=thresh, as_table=path.suffix == ".tsv", **options
    )
    settings = {
        "pairs": pairs,
        "groups": groups,
        "asked": None if asked is None else sha256_of(Path(asked)),
        "thresh": thresh,
        "head": sha256_of(opened.folder / HEAD),
        "settings": sha256_of(opened.folder / SETTINGS),
        "toks_per_batch": tool.toks_per_batch,
        "max_length": tool.max_length,
        "on_invalid": tool.on_invalid,
    }
    return run_tool(tool, output, sources=sources, settings=settings, dry_run=dry_run, restart=restart)
