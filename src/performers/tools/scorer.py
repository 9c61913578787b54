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
"""

from __future__ import annotations

import csv
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from performers import __version__
from performers.data import STANDARD_RESIDUES, FastaReport
from performers.errors import InputError, UnsupportedError
from performers.tools.agreement import agreement
from performers.tools.blosum import blosum62
from performers.tools.heat_map import ORDER, plot_saturation
from performers.tools.language_model import LanguageModel, Row, Unread
from performers.tools.readings import INDEX, Block, Readings
from performers.tools.tables import Table, read_table
from performers.tools.tool import Outcome, Result, Tool, Written
from performers.tools.variants import HARMLESS, Status, Variant, parse_variant, saturation

Strategy: TypeAlias = Literal["masked-marginals", "wt-marginals", "pseudo-ppl", "likelihood"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_MARGINAL = ("masked-marginals", "wt-marginals")

LONGEST_WITHOUT_STRIPES, STRIPES = 2000, 16
_BLOSUM62 = blosum62()
BLOCK_TOKENS = 16_384
MOST_PICTURES = 20
OUR_COLUMNS = ("status", "score", "percentile", "low_confidence", "reason")


@dataclass(frozen=True)
class Score:
    """What became of one variant.

    Attributes:
        id: of the wild type.
        row: the number of the variant in its table, counted from 1.
        mutant: its name, as given.
        status: "ok" and "synonymous" have a score.
        score: nats; higher is better tolerated. None where there is none.
        percentile: the share of the protein's single substitutions that score lower, in per cent; None where they are not known.
        low_confidence: whether the model is near the frequencies of residues at large; None without a score.
        reason: what is wrong, or "".
        values: the other columns of the table.
        mutations: how many residues differ; None where residues came or went.
        blosum62: the sum of that matrix over the substitutions; None without a score, or for residues that it has not.
    """

    id: str
    row: int
    mutant: str
    status: Status
    score: float | None = None
    percentile: float | None = None
    low_confidence: bool | None = None
    reason: str = ""
    values: dict[str, str] = field(default_factory=dict[str, str])
    mutations: int | None = None
    blosum62: float | None = None


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
        strategy: one of `STRATEGIES`; None for masked-marginals, or for pseudo-ppl if a table has insertions or deletions, or
            for likelihood if the model is causal.
        stripes: passes over a sequence with every so many-th residue masked; 0 for as many as it has residues; None for that up
            to `LONGEST_WITHOUT_STRIPES` residues and `STRIPES` above.
        check_stripes: positions that are masked alone as well, to say how well stripes agree.
        offset_idx: the number that the first residue has in names.
        mutation_column, measurement_column: of the tables; a measurement column of None is DMS_score where there is one.
        toks_per_batch: tokens in one forward pass.
        heat_map: whether `write` draws the single substitutions of each protein, up to `MOST_PICTURES`.
        sources: where the variants of each sheet come from; the last holds for all that follow.
        names: of the sheets' tables in an output folder; ("",) for a single table.

    Raises:
        InputError: an argument is out of range.
        UnsupportedError: the model cannot do what the strategy needs.
    """

    command: ClassVar[str] = "score"
    noun: ClassVar[str] = "blocks of passes"

    def __init__(
        self,
        model: LanguageModel,
        sheets: Callable[[FastaReport], Iterable[Sheet]],
        *,
        strategy: Strategy | None = None,
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
        if strategy not in (None, *STRATEGIES):
            raise InputError(f"scoring-strategy is {strategy!r}: expected one of {', '.join(STRATEGIES)}.")
        if (stripes or 0) < 0 or check_stripes < 0 or toks_per_batch < 1:
            raise InputError("stripes, check-stripes and toks-per-batch: expected numbers that are not negative.")
        self.strategy: Strategy = strategy or ("likelihood" if model.is_causal else "masked-marginals")
        if model.is_causal and self.strategy != "likelihood":
            raise UnsupportedError(
                f"{model.folder} is a causal model, which cannot do {self.strategy}: expected --scoring-strategy likelihood."
            )
        if self.strategy in ("masked-marginals", "pseudo-ppl") and not model.can_mask:
            raise UnsupportedError(f"{model.folder} has no mask token, which {self.strategy} needs.")
        self.model, self._sheets, self.sources, self.names = model, sheets, sources, names
        self.stripes, self.check_stripes, self.offset_idx = stripes, check_stripes, offset_idx
        self.mutation_column, self.measurement_column = mutation_column, measurement_column
        self.toks_per_batch, self.heat_map = toks_per_batch, heat_map
        self.makes_folder = tuple(names) != ("",)
        self._variants = self._proteins = 0

    @property
    def _by_table(self) -> bool:
        """Whether scores are differences of a table, rather than of whole sequences."""
        return self.strategy in _MARGINAL

    def passes(self, length: int) -> int:
        """How many passes a sequence of so many residues takes, each with residues masked; 0 for one with none masked."""
        if self.strategy in ("wt-marginals", "likelihood"):
            return 0
        stripes = self.stripes
        if stripes is None:
            stripes = STRIPES if length > LONGEST_WITHOUT_STRIPES else 0
        return min(stripes, length) or length

    def items(self, report: FastaReport) -> Iterator[Block]:
        """The blocks of each sheet: its wild types, then what else has to be read."""
        self._variants = self._proteins = 0
        for number, sheet in enumerate(self._sheets(report)):
            self._proteins += len(sheet.wild_types)
            for place, (identifier, sequence) in enumerate(sheet.wild_types):
                where = (number, place, 0, identifier, sequence)
                yield from self._blocks(*where, "table" if self._by_table else "sum")
                if self._by_table and self.check_stripes and self.passes(len(sequence)) < len(sequence):
                    count = min(self.check_stripes, len(sequence))
                    yield Block(*where, "check", count, 0, count)
            for row, place, _, values, variant in self._variants_of(sheet):
                self._variants += 1
                if (column := self._measurement_in(list(values))) is not None:
                    measurement(values, column, row)
                if not self._by_table and variant.status in ("ok", "indel") and not self._is_unreadable(variant):
                    identifier, sequence = sheet.wild_types[place]
                    yield from self._blocks(number, place, row, identifier, variant.apply(sequence), "sum")

    def _is_unreadable(self, variant: Variant) -> bool:
        """Whether a variant's sequence is not known, or cannot be scored by the strategy."""
        return variant.status == "indel" and (variant.sequence is None or self._by_table)

    def _blocks(self, sheet: int, place: int, row: int, identifier: str, sequence: str, what: str) -> Iterator[Block]:
        passes = self.passes(len(sequence))
        step = max(1, BLOCK_TOKENS // (len(sequence) + 2))
        total = max(passes, 1)
        for start in range(0, total, step):
            yield Block(sheet, place, row, identifier, sequence, what, passes, start, min(start + step, total))

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
        """Of its part of the table, and of the rows made of it."""
        return 40 * 40 if item.what == "sum" else 160 * (item.stop - item.start) * self._masked_at_once(item)

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
            readings = Readings.gather(group, by_table=self._by_table)
            yield number, readings, self._scores_of(number, readings)

    def _scores_of(self, number: int, readings: Readings) -> Iterator[Score]:
        sheet = Sheet(tuple(zip(readings.ids, readings.sequences, strict=True)), self._source(number))
        if sheet.source is None and not self._by_table and readings.failed(0, 0) is None:
            readings.rank_among_rows(0)
        for row, place, mutant, values, variant in self._variants_of(sheet):
            identifier = readings.ids[place] if place >= 0 else values.get("id", "")
            score = Score(identifier, row, mutant, variant.status, reason=variant.reason, values=values)
            is_scored = variant.status in ("ok", "indel", "synonymous")
            yield self._scored(score, place, variant, readings) if is_scored else score

    def _scored(self, score: Score, place: int, variant: Variant, readings: Readings) -> Score:
        about = (score.id, score.row, score.mutant)
        if self._is_unreadable(variant):
            reason = variant.reason if variant.sequence is None else f"{self.strategy} scores substitutions only"
            return Score(*about, "indel", reason=reason, values=score.values)
        reason = readings.failed(place, score.row)
        if reason is not None:
            return Score(*about, "unread", reason=reason, values=score.values)
        if variant.status == "synonymous":
            return Score(*about, "synonymous", 0.0, readings.percentile(place, 0.0), False, "", score.values, 0)
        if self._by_table:
            value, is_low = readings.by_table(place, variant)
        else:
            value, is_low = readings.by_sequence(place, score.row)
        mutations = len(variant.substitutions) if variant.sequence is None else None
        percentile = readings.percentile(place, value)
        return Score(*about, "ok", value, percentile, is_low, "", score.values, mutations, _in_blosum62(variant))

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
                measured = _Measurements()
                for score in scores:
                    own = {"id": score.id, "mutant": score.mutant}
                    theirs = [score.values.get(name, own.get(name, "")) for name in columns]
                    writer.writerow([*theirs, *_cells(score)])
                    counts[score.status] += 1
                    measured.add(score, self._measurement_in(columns))
                    if score.status not in HARMLESS:
                        failed.append((score.row, score.mutant, f"{score.status}: {score.reason}"))
                if len(measured.scores):
                    agreements[stem.name] = measured.agreement()
                checks += [] if (found := readings.agreement_of_stripes()) is None else [found]
                if self.heat_map and self._by_table:
                    self._draw(readings, stem)
        figures: dict[str, Any] = {
            "notice": "not for clinical use",
            "strategy": self.strategy,
            "statuses": dict(sorted(counts.items())),
        }
        if agreements:
            figures["agreement"] = agreements
        if checks:
            figures["stripes_agreement"] = {"spearman": float(np.mean(checks)), "proteins": len(checks)}
        if self.makes_folder and agreements:
            _write_summary(path / "agreement.csv", agreements)
        return Written(counts.total(), failed, figures)

    def _columns(self, number: int) -> list[str]:
        source = self._source(number)
        return list(read_table(source).columns) if isinstance(source, str | Path) else ["id", "mutant"]

    def _measurement_in(self, columns: Sequence[str]) -> str | None:
        """The column with measurements, if there is one."""
        return self.measurement_column or ("DMS_score" if "DMS_score" in columns else None)

    def _draw(self, readings: Readings, stem: Path) -> None:
        for place, (identifier, sequence) in enumerate(zip(readings.ids, readings.sequences, strict=True)):
            number = place + 1 if self.makes_folder else readings.sheet + place + 1
            if number > MOST_PICTURES or readings.failed(place, 0) is not None:
                continue
            picture = stem.with_name(f"{stem.name}.png" if number == 1 else f"{stem.name}-{number}.png")
            log_odds = readings.log_odds(place)[:, [STANDARD_RESIDUES.index(letter) for letter in ORDER]]
            title = f"{identifier or 'protein'}: {self.strategy}, {self.model.name}"
            plot_saturation(log_odds, sequence, picture, title=title, first=self.offset_idx)

    def methods(self, outcome: Outcome) -> str:
        """Two sentences and the notice."""
        figures = outcome.figures
        scored = figures["statuses"].get("ok", 0) + figures["statuses"].get("synonymous", 0)
        how = {
            "masked-marginals": "log-odds of the new against the old residue, summed over the mutated positions, each masked in "
            "the wild type",
            "wt-marginals": "log-odds of the new against the old residue, summed over the mutated positions, given the wild type",
            "pseudo-ppl": "difference between the pseudo-log-likelihoods of the mutated sequence and the wild type",
            "likelihood": "difference between the log-likelihoods of the mutated sequence and the wild type",
        }[self.strategy]
        return (
            f"{scored:,} protein variants were scored with performers {__version__} and the protein language model "
            f"{self.model.name} ({self.model.num_parameters:,} parameters) by {self.strategy}: {how} (Meier et al., 2021). "
            f"Every sequence was read {self.model.company()}. "
            f"Proteins above {LONGEST_WITHOUT_STRIPES:,} residues were masked in {STRIPES} stripes unless stated otherwise, and "
            "scores were put on the scale of all single substitutions of the same protein. Not for clinical use."
        )


class _Measurements:
    """The variants of a sheet that have both a score and a measurement."""

    def __init__(self) -> None:
        self.scores, self._measured, self._bins, self._mutations = array("d"), array("d"), array("d"), array("q")
        self._baseline = array("d")

    def add(self, score: Score, column: str | None) -> None:
        """Note a variant.

        Raises:
            InputError: its measurement is not a number.
        """
        measured = None if column is None else measurement(score.values, column, score.row)
        if measured is None or score.score is None or score.mutations == 0:
            return
        self.scores.append(score.score)
        self._measured.append(measured)
        self._baseline.append(np.nan if score.blosum62 is None else score.blosum62)
        binned = score.values.get("DMS_score_bin", "")
        self._bins.append(float(binned) if binned in ("0", "1", "0.0", "1.0") else np.nan)
        # Insertions and deletions have no number of mutations: they count among the many.
        self._mutations.append(10**6 if score.mutations is None else score.mutations)

    def agreement(self) -> list[dict[str, Any]]:
        """The figures; measurements above the median are positive where the table does not say which are."""
        measured, bins = np.array(self._measured), np.array(self._bins)
        is_positive = bins == 1 if np.isfinite(bins).all() else measured > np.median(measured)
        others = np.array(self._baseline)
        return agreement(np.array(self.scores), measured, is_positive, np.array(self._mutations), others)


def _in_blosum62(variant: Variant) -> float | None:
    if variant.sequence is not None:
        return None
    pairs = [STANDARD_RESIDUES.find(letter) for _, *letters in variant.substitutions for letter in letters]
    return None if min(pairs) < 0 else float(_BLOSUM62[pairs[::2], pairs[1::2]].sum())


def measurement(values: dict[str, str], column: str, row: int) -> float | None:
    """The measurement in a row of a table; None where the cell is empty.

    Raises:
        InputError: the cell holds something else than a number.
    """
    text = values.get(column, "")
    if text.lower() in ("", "na", "nan", "none", "null"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"Row {row:,}: {column} is {text!r}; expected a number or nothing.")
    return value


def _cells(score: Score) -> list[str]:
    return [
        score.status,
        "" if score.score is None else f"{score.score:.6f}",
        "" if score.percentile is None else f"{score.percentile:.2f}",
        "" if score.low_confidence is None else str(score.low_confidence).lower(),
        score.reason,
    ]


def _write_summary(path: Path, agreements: dict[str, list[dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["assay", "mutations", "variants", "spearman", "low", "high", "blosum62", "auc", "ndcg"])
        for name, rows in agreements.items():
            for row in rows:
                low, high = row["interval"] or (None, None)
                found = (row["spearman"], low, high, row["baseline"], row["auc"], row["ndcg"])
                figures = ["" if value is None else f"{value:.6f}" for value in found]
                writer.writerow([name, row["mutations"], row["variants"], *figures])
