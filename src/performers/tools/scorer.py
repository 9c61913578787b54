"""`score` as a tool: which passes over which sequences a set of variants takes, and the tables made of them.

A score is a sum of log-odds in nats, higher is better tolerated, 0 is the wild type. Strategies (Meier et al., 2021, section 3):

- masked-marginals: each mutated position is masked in the wild type, and log p(new) - log p(old) is added up over positions. Of
  a long protein every k-th position is masked at once ("stripes"), k passes in all, so the cost is linear in its length.
- wt-marginals: the same from one pass over the wild type with nothing masked.
- pseudo-ppl: the pseudo-log-likelihood of the mutated sequence (each residue masked in turn, or in stripes), minus that of the
  wild type. Also for insertions and deletions; one run of passes per variant.
- likelihood: the same from one pass with nothing masked; for a causal model the sum of log p(residue | those before).

The two last compare means per residue, times the length of the wild type, so that a longer sequence is not worse for its length
alone. Beside a score stand its percentile among all single substitutions of the same protein, and whether confidence is low:
whether the model expects there little else than the frequencies of residues in proteins at large.

Other than the last two, strategies give every substitution of a protein at once; the last two know the percentile only where all
of them were asked for. Their confidence is that in the wild type as a whole.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from performers.data import STANDARD_RESIDUES, FastaReport
from performers.errors import InputError, UnsupportedError
from performers.tools.heat_map import picture_bytes, plot_saturation
from performers.tools.language_model import LanguageModel, Row, Unread
from performers.tools.measurements import Measurements, measurement, write_agreements
from performers.tools.readings import INDEX, Block, Readings
from performers.tools.scores import MARGINAL, OUR_COLUMNS, STRATEGIES, Score, Strategy, cells, is_unreadable, scored
from performers.tools.scoring_methods import methods, references
from performers.tools.tables import Table, read_table
from performers.tools.tool import Outcome, Result, Tool, Written
from performers.tools.variants import HARMLESS, Variant, parse_variant, saturation

LONGEST_WITHOUT_STRIPES, STRIPES = 2000, 16
BLOCK_TOKENS = 16_384
MOST_PICTURES = 20
_OUR_BYTES = 30  # of them in a row that has a score


# A table of variants, their names, or None for all single substitutions.
VariantSource: TypeAlias = str | Path | tuple[str, ...] | None


@dataclass(frozen=True)
class Sheet:
    """Variants that are read together.

    Attributes:
        wild_types: identifier and sequence of each.
        source: where the variants come from.
    """

    wild_types: tuple[tuple[str, str], ...]
    source: VariantSource


class Scorer(Tool[Block]):
    """`score` as a `Tool`.

    Arguments:
        model: what reads; a masked or causal language model.
        sheets: what to score; a function, so that a million proteins need not be in memory.
        strategy: one of `STRATEGIES`; None for masked-marginals, or for likelihood if the model is causal. Several are those of
            the sheets; the last holds for all that follow.
        stripes: passes over a sequence with every so many-th residue masked; 0 for as many as it has residues; None for that up
            to `LONGEST_WITHOUT_STRIPES` residues and `STRIPES` above.
        check_stripes: positions that are masked alone as well, to say how well stripes agree ("masked-marginals" only).
        offset_idx: the number that the first residue has in names.
        mutation_column, measurement_column: of the tables; a measurement column of None is DMS_score where there is one.
        toks_per_batch: tokens in one forward pass.
        heat_map: whether `write` draws the single substitutions of each protein, up to `MOST_PICTURES`, where all are known.
        sources: where the variants of each sheet come from; the last holds for all that follow.
        names: of the sheets' tables in an output folder; ("",) for a single table.

    Raises:
        InputError: an argument is out of range.
        UnsupportedError: the model cannot do what the strategy needs.
    """

    command: ClassVar[str] = "score"
    noun: ClassVar[str] = "blocks of passes"
    entries: ClassVar[str] = "variants"

    def __init__(
        self,
        model: LanguageModel,
        sheets: Callable[[FastaReport], Iterable[Sheet]],
        *,
        strategy: Strategy | list[Strategy | None] | None = None,
        stripes: int | None = None,
        check_stripes: int = 0,
        offset_idx: int = 1,
        mutation_column: str = "mutant",
        measurement_column: str | None = None,
        toks_per_batch: int = 16_384,
        heat_map: bool = True,
        sources: Sequence[VariantSource] = (None,),
        names: Sequence[str] = ("",),
    ) -> None:
        model.check_language_model()
        if (stripes or 0) < 0 or check_stripes < 0 or toks_per_batch < 1:
            raise InputError("stripes, check-stripes and toks-per-batch: expected numbers that are not negative.")
        given: list[Strategy | None] = strategy if isinstance(strategy, list) else [strategy]
        self._strategies: tuple[Strategy, ...] = tuple(_strategy_for(model, name) for name in given)
        if check_stripes and "masked-marginals" not in self._strategies:
            raise InputError(
                f"check-stripes is {check_stripes}: it compares stripes with single masks by masked-marginals, and the "
                f"strategy is {self.strategy}."
            )
        self.model, self._sheets, self.sources, self.names = model, sheets, sources, names
        self.stripes, self.check_stripes, self.offset_idx = stripes, check_stripes, offset_idx
        self.mutation_column, self.measurement_column = mutation_column, measurement_column
        self.toks_per_batch, self.heat_map = toks_per_batch, heat_map
        self.makes_folder = tuple(names) != ("",)
        self._variants = self._proteins = 0

    @property
    def strategy(self) -> str:
        """The strategy, or those of the sheets, each once."""
        return ", ".join(self._used)

    @property
    def _used(self) -> list[Strategy]:
        return list(dict.fromkeys(self._strategies))

    @property
    def references(self) -> str:
        """The BibTeX of the papers that the methods text names."""
        return references(self._used)

    def _strategy_of(self, sheet: int) -> Strategy:
        return self._strategies[min(sheet, len(self._strategies) - 1)]

    def _passes(self, length: int, strategy: Strategy) -> int:
        """How many passes a sequence of so many residues takes, each with residues masked; 0 for one with none masked."""
        if strategy in ("wt-marginals", "likelihood"):
            return 0
        stripes = self.stripes
        if stripes is None:
            stripes = STRIPES if length > LONGEST_WITHOUT_STRIPES else 0
        return min(stripes, length) or length

    def items(self, report: FastaReport) -> Iterator[Block]:
        """The blocks of each sheet: its wild types, then what else has to be read."""
        self._variants = self._proteins = 0
        for number, sheet in enumerate(self._sheets(report)):
            strategy = self._strategy_of(number)
            by_table = strategy in MARGINAL
            self._proteins += len(sheet.wild_types)
            output = self._count(number, sheet, strategy)
            for place, (identifier, sequence) in enumerate(sheet.wild_types):
                where = (number, place, 0, identifier, sequence)
                passes = self._passes(len(sequence), strategy)
                for block in _blocks(where, "table" if by_table else "sum", passes):
                    yield block._replace(output=output)
                    output = 0
                if strategy == "masked-marginals" and self.check_stripes and passes < len(sequence):
                    count = min(self.check_stripes, len(sequence))
                    yield Block(*where, "check", count, 0, count)
            if by_table:
                continue
            for row, place, _, _, variant in self._variants_of(sheet):
                if variant.status in ("ok", "indel") and not is_unreadable(variant, by_table):
                    identifier, sequence = sheet.wild_types[place]
                    whole = variant.apply(sequence)
                    yield from _blocks(
                        (number, place, row, identifier, whole), "sum", self._passes(len(whole), strategy)
                    )

    def _count(self, number: int, sheet: Sheet, strategy: Strategy) -> int:
        """Count the variants of a sheet, and say about how many bytes its output will take.

        Raises:
            InputError: a measurement is not a number; names table and row.
        """
        total = 0
        if self.heat_map and self._knows_singles(sheet.source, strategy):
            drawn = MOST_PICTURES - (0 if self.makes_folder else number)
            total += sum(picture_bytes(len(sequence)) for _, sequence in sheet.wild_types[: max(drawn, 0)])
        if sheet.source is None:
            for identifier, sequence in sheet.wild_types:
                rows = sum(len(STANDARD_RESIDUES) - (letter in STANDARD_RESIDUES) for letter in sequence)
                self._variants += rows
                total += rows * (len(identifier) + len(str(len(sequence) + self.offset_idx)) + 4 + _OUR_BYTES)
            return total
        for row, _, mutant, values, variant in self._variants_of(sheet):
            self._variants += 1
            if (column := self._measurement_in(list(values))) is not None:
                measurement(values, column, f"{sheet.source}, row {row:,}")
            theirs = values.values() if values else ("", mutant)
            total += sum(len(value) + 1 for value in theirs) + _OUR_BYTES + len(variant.reason)
        return total

    @staticmethod
    def _knows_singles(source: VariantSource, strategy: Strategy) -> bool:
        """Whether the strategy finds the score of every single substitution."""
        return strategy in MARGINAL or source is None

    def about(self, report: FastaReport) -> str:
        """Variants and proteins."""
        return f"{self._variants:,} variants of {self._proteins:,} proteins by {self.strategy}"

    def to_json(self, item: Block) -> Any:
        """A list."""
        return item

    def from_json(self, content: Any) -> Block:
        """A block from a list."""
        return Block(*content)

    def label(self, item: Block) -> tuple[int, str]:
        """The row of the variant, and what it is a variant of."""
        return item.row, item.id

    def tokens(self, item: Block) -> int:
        """The tokens of its passes."""
        return (item.stop - item.start) * self.longest(item)

    def longest(self, item: Block) -> int:
        """The tokens of one pass."""
        return len(item.sequence) + 2

    def refusal(self, item: Block) -> str | None:
        """Why the model has no positions for it, if so."""
        return self.model.refusal(self.longest(item))

    def num_bytes(self, item: Block) -> int:
        """Of the output that goes on its account, or of its table until then, whichever is more."""
        table = 0 if item.what == "sum" else 110 * (item.stop - item.start) * self._masked_at_once(item)
        return max(item.output, table)

    def _masked_at_once(self, item: Block) -> int:
        return 1 if item.what == "check" else -(-len(item.sequence) // max(item.passes, 1))

    def compute(self, items: Sequence[Block]) -> Sequence[Result]:
        """For "table" and "check" the positions (n,) and the log-probabilities (n, 25) there; for "sum" a sum and a count."""
        owners: list[int] = []
        places: list[npt.NDArray[np.int64]] = []
        rows: list[Row] = []
        for owner, item in enumerate(items):
            for number in range(item.start, item.stop):
                masked = self._masked(item, number)
                positions = np.arange(len(item.sequence)) if masked is None else masked
                owners.append(owner)
                places.append(positions)
                rows.append(self.model.row([item.sequence], masked=() if masked is None else masked, wanted=positions))
        tables: list[dict[int, npt.NDArray[np.float32]]] = [{} for _ in items]
        failed: dict[int, Unread] = {}
        for index, reading in self.model.read(rows, log_probabilities=True, toks_per_batch=self.toks_per_batch):
            if isinstance(reading, Unread):
                failed[owners[index]] = reading
            else:
                assert reading.log_probabilities is not None
                tables[owners[index]][index] = reading.log_probabilities
        results: list[Result] = []
        for owner, item in enumerate(items):
            if owner in failed:
                results.append(failed[owner])
                continue
            order = sorted(tables[owner])
            positions = np.concatenate([places[index] for index in order])
            table = np.concatenate([tables[owner][index] for index in order])
            if item.what == "sum":
                own = table[np.arange(len(positions)), [INDEX[item.sequence[position]] for position in positions]]
                results.append({"sum": np.array([own.sum(dtype=np.float64), len(own)])})
            else:
                results.append({"positions": positions, "table": table})
        return results

    def _masked(self, item: Block, number: int) -> npt.NDArray[np.int64] | None:
        if item.what == "check":
            return np.linspace(0, len(item.sequence) - 1, item.passes).astype(np.int64)[number : number + 1]
        return np.arange(number, len(item.sequence), item.passes) if item.passes else None

    def scores(self, results: Iterable[tuple[Block, Result]]) -> Iterator[tuple[int, Readings, Iterator[Score]]]:
        """For each sheet its number, what was read for it, and its variants with their scores, in order."""
        for number, group in itertools.groupby(results, key=lambda pair: pair[0].sheet):
            by_table = self._strategy_of(number) in MARGINAL
            readings = Readings.gather(group, by_table=by_table)
            if not by_table and self._source(number) is None and readings.failed(0, 0) is None:
                readings.take_rows_as_singles(0)
            yield number, readings, self._scores_of(number, readings)

    def _scores_of(self, number: int, readings: Readings) -> Iterator[Score]:
        sheet = Sheet(tuple(zip(readings.ids, readings.sequences, strict=True)), self._source(number))
        for row, place, mutant, values, variant in self._variants_of(sheet):
            identifier = readings.ids[place] if place >= 0 else values.get("id", "")
            score = Score(identifier, row, mutant, variant.status, reason=variant.reason, values=values)
            is_scored = variant.status in ("ok", "indel", "synonymous")
            yield scored(score, place, variant, readings, self._strategy_of(number)) if is_scored else score

    def _source(self, number: int) -> VariantSource:
        return self.sources[min(number, len(self.sources) - 1)]

    def _variants_of(self, sheet: Sheet) -> Iterator[tuple[int, int, str, dict[str, str], Variant]]:
        """Row, wild type, name, other columns and variant, for each variant of a sheet."""
        if sheet.source is None:
            row = 0
            for place, (_, sequence) in enumerate(sheet.wild_types):
                for mutant, variant in saturation(sequence, self.offset_idx):
                    row += 1
                    yield row, place, mutant, {}, variant
            return
        if isinstance(sheet.source, tuple):
            for row, mutant in enumerate(sheet.source, start=1):
                yield row, 0, mutant, {}, parse_variant(sheet.wild_types[0][1], mutant, offset_idx=self.offset_idx)
            return
        table = read_table(sheet.source)
        self.check_columns(table, len(sheet.wild_types))
        places = {identifier: place for place, (identifier, _) in reversed(list(enumerate(sheet.wild_types)))}
        for row, values in table.rows:
            mutant = values.get(self.mutation_column, "")
            place = 0 if len(sheet.wild_types) == 1 else places.get(values["id"], -1)
            if place < 0:
                variant = Variant("malformed", reason=f"there is no wild type {values['id']!r}")
            else:
                sequence = sheet.wild_types[place][1]
                variant = parse_variant(
                    sequence, mutant, values.get("mutated_sequence", ""), offset_idx=self.offset_idx
                )
            yield row, place, mutant, values, variant

    def check_columns(self, table: Table, wild_types: int) -> None:
        """Refuse a table that does not say which variants it is about.

        Raises:
            InputError: a column is missing.
        """
        if self.mutation_column not in table.columns and "mutated_sequence" not in table.columns:
            raise InputError(
                f"{table.name} has neither a column {self.mutation_column!r} nor 'mutated_sequence'; its columns are "
                f"{', '.join(table.columns)}."
            )
        if wild_types > 1:
            table.require("id")
        if self.measurement_column is not None:
            table.require(self.measurement_column)

    def write(self, results: Iterable[tuple[Block, Result]], path: Path) -> Written:
        """A CSV file, or with named sheets a folder of them; beside or in it a heat map of each protein."""
        if self.makes_folder:
            path.mkdir()
        counts: Counter[str] = Counter()
        failed: list[tuple[int, str, str]] = []
        agreements: dict[str, list[dict[str, Any]]] = {}
        checks: list[float] = []
        passes: list[tuple[int, int]] = []
        knows_singles = True
        with ExitStack() as stack:
            writer: Any = None
            for number, readings, scores in self.scores(results):
                stem = path / self.names[number] if self.makes_folder else path.with_suffix("")
                columns = self._columns(number)
                if self.makes_folder or writer is None:
                    file = stem.with_name(f"{stem.name}.csv") if self.makes_folder else path
                    stream = stack.enter_context(file.open("w", encoding="utf-8", newline=""))
                    writer = csv.writer(stream, lineterminator="\n")
                    theirs = [f"input_{name}" if name in OUR_COLUMNS else name for name in columns]
                    writer.writerow([*theirs, *OUR_COLUMNS])
                measured = Measurements()
                column = self._measurement_in(columns)
                for score in scores:
                    own = {"id": score.id, "mutant": score.mutant}
                    theirs = [score.values.get(name, own.get(name, "")) for name in columns]
                    writer.writerow([*theirs, *cells(score)])
                    counts[score.status] += 1
                    _note(measured, score, column, f"{self._source(number)}, row {score.row:,}")
                    if score.status not in HARMLESS:
                        failed.append((score.row, score.mutant, f"{score.status}: {score.reason}"))
                if len(measured):
                    agreements[stem.name] = measured.agreement()
                checks += [] if (found := readings.agreement_of_stripes()) is None else [found]
                strategy = self._strategy_of(number)
                passes += [(self._passes(len(sequence), strategy), len(sequence)) for sequence in readings.sequences]
                knows_singles &= self._knows_singles(self._source(number), strategy)
                if self.heat_map:
                    self._draw(readings, stem, strategy)
        figures: dict[str, Any] = {
            "notice": "not for clinical use",
            "strategy": self.strategy,
            "statuses": dict(sorted(counts.items())),
            "proteins": len(passes),
            "masked": sum(number > 0 for number, _ in passes),
            "striped": sum(0 < number < length for number, length in passes),
            "percentiles": knows_singles,
        }
        if agreements:
            figures["agreement"] = agreements
        if checks:
            figures["stripes_agreement"] = {"spearman": float(np.mean(checks)), "proteins": len(checks)}
        if self.makes_folder and agreements:
            strategies = {name: self._strategy_of(number) for number, name in enumerate(self.names)}
            write_agreements(path / "agreement.csv", agreements, strategies)
        return Written(counts.total(), failed, figures)

    def _columns(self, number: int) -> list[str]:
        source = self._source(number)
        return list(read_table(source).columns) if isinstance(source, str | Path) else ["id", "mutant"]

    def _measurement_in(self, columns: Sequence[str]) -> str | None:
        """The column with measurements, if there is one."""
        return self.measurement_column or ("DMS_score" if "DMS_score" in columns else None)

    def _draw(self, readings: Readings, stem: Path, strategy: Strategy) -> None:
        for place, (identifier, sequence) in enumerate(zip(readings.ids, readings.sequences, strict=True)):
            number = place + 1 if self.makes_folder else readings.sheet + place + 1
            if number > MOST_PICTURES or readings.failed(place, 0) is not None or not readings.knows_singles(place):
                continue
            picture = stem.with_name(f"{stem.name}.png" if number == 1 else f"{stem.name}-{number}.png")
            title = f"{identifier or 'protein'}: {strategy}, {self.model.name}"
            plot_saturation(readings.log_odds(place), sequence, picture, title=title, first=self.offset_idx)

    def beside(self, path: Path) -> Sequence[str]:
        """The picture of the first protein; how many there are is not known before."""
        if self.makes_folder or not self.heat_map:
            return []
        return [f"{path.stem}.png"] if self._knows_singles(self._source(0), self._strategy_of(0)) else []

    def methods(self, outcome: Outcome) -> str:
        """Two sentences."""
        return methods(self.model, self._used, self.stripes or STRIPES, outcome.figures)


def _strategy_for(model: LanguageModel, name: Strategy | None) -> Strategy:
    """The strategy of that name, or the usual one for a model.

    Raises:
        InputError: there is none of that name.
        UnsupportedError: the model cannot do it.
    """
    if name not in (None, *STRATEGIES):
        raise InputError(f"scoring-strategy is {name!r}: expected one of {', '.join(STRATEGIES)}.")
    strategy: Strategy = name or ("likelihood" if model.is_causal else "masked-marginals")
    if model.is_causal and strategy != "likelihood":
        raise UnsupportedError(
            f"{model.folder} is a causal model, which cannot do {strategy}: expected --scoring-strategy likelihood."
        )
    if strategy in ("masked-marginals", "pseudo-ppl") and not model.can_mask:
        raise UnsupportedError(f"{model.folder} has no mask token, which {strategy} needs.")
    return strategy


def _blocks(where: tuple[int, int, int, str, str], what: str, passes: int) -> Iterator[Block]:
    """The blocks of a sequence: sheet, wild type, row, identifier and the sequence itself."""
    step = max(1, BLOCK_TOKENS // (len(where[-1]) + 2))
    total = max(passes, 1)
    for start in range(0, total, step):
        yield Block(*where, what, passes, start, min(start + step, total))


def _note(measured: Measurements, score: Score, column: str | None, where: str) -> None:
    """Set a score against its measurement, where it has one and the protein is another."""
    value = None if column is None else measurement(score.values, column, where)
    if value is None or score.score is None or score.mutations == 0:
        return
    binned = score.values.get("DMS_score_bin", "")
    measured.add(score.score, value, binned, score.mutations, (score.blosum62, score.blosum62_change))
