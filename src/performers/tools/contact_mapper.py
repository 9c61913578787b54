"""`contacts` as a tool: which parts the map of a record is made in, and the tables and pictures made of them.

By attention a part is a range of rows of the upper triangle, scored block by block, of which the best pairs are kept; by Jacobian
it is rows of the response, which are put together when all are there. What a score is, and how the tool is called, says
`performers.tools.contact_prediction`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from performers import __version__
from performers.data import MAX_LENGTH, STANDARD_RESIDUES, FastaReport
from performers.data.fasta import OnInvalid
from performers.errors import InputError
from performers.tools.attention_maps import AttentionMaps, attention_maps
from performers.tools.attention_patterns import GRID, PatternMeans, PatternSums, similarity
from performers.tools.categorical_jacobian import corrected_blocks, pieces, response_rows
from performers.tools.contact_files import (
    SUMMARY,
    Entry,
    Summary,
    draw_contacts,
    draw_heads,
    draw_patterns,
    draw_similarity,
    write_patterns,
    write_similarity,
    write_table,
)
from performers.tools.contact_regression import FILE_NAME, MIN_SEPARATION, Regression
from performers.tools.language_model import LanguageModel, Unread
from performers.tools.pairs import BestPairs, Geometry, Pairs
from performers.tools.proteins import Protein, Proteins, read_proteins
from performers.tools.tool import Outcome, Result, Tool, Written

Method: TypeAlias = Literal["attention", "jacobian"]

PIECE_ROWS = 4096  # rows of a map in one part, where what comes before the first row is quick
MOST_PICTURES = 100


class Part(NamedTuple):
    """Some rows of the map of one record: the unit of work.

    Attributes:
        number, id, description, chains: of the record.
        start, stop: residues, counted through all chains.
    """

    number: int
    id: str
    description: str
    chains: tuple[str, ...]
    start: int
    stop: int


class ContactMapper(Tool[Part]):
    """`contacts` as a `Tool`.

    Arguments:
        model: what reads.
        proteins: as `read_proteins` takes them.
        method: "attention" or "jacobian".
        regression: of the model, for "attention".
        top: how many pairs are kept, times the number of residues.
        min_separation: |i - j| of pairs in one chain, at least.
        with_patterns: whether to describe the heads as well ("attention" only).
        pictures: how many records are drawn.
        toks_per_batch: tokens in one forward pass ("jacobian" only; attention is read a record at a time).
        max_length, on_invalid: as in `read_proteins`.

    Raises:
        InputError: an argument is out of range.
        UnsupportedError: the model predicts no residues, for "jacobian".
    """

    command: ClassVar[str] = "contacts"
    makes_folder = True

    def __init__(
        self,
        model: LanguageModel,
        proteins: Proteins,
        *,
        method: Method = "attention",
        regression: Regression | None = None,
        top: float = 2.0,
        min_separation: int = MIN_SEPARATION,
        with_patterns: bool = False,
        pictures: int = MOST_PICTURES,
        toks_per_batch: int = 16_384,
        max_length: int = MAX_LENGTH,
        on_invalid: OnInvalid = "error",
    ) -> None:
        if method not in get_args(Method):
            raise InputError(f"method is {method!r}: expected 'attention' or 'jacobian'.")
        if not 0 < top <= 1e6 or min_separation < 1 or toks_per_batch < 1 or pictures < 0:
            raise InputError(
                "top, min-separation and toks-per-batch: expected positive numbers; pictures: one that is not negative."
            )
        if method == "jacobian":
            model.check_language_model()
            if with_patterns:
                raise InputError("Attention maps are described with --method attention only.")
        elif regression is None:
            raise InputError("The contacts of attention maps need a regression: see `fit_regression`.")
        self.model, self.proteins, self.method = model, proteins, method
        self.regression, self.top, self.min_separation = regression, top, min_separation
        self.with_patterns, self.pictures, self.toks_per_batch = with_patterns, pictures, toks_per_batch
        self.max_length = max_length
        self.on_invalid: OnInvalid = on_invalid
        self._linear: bool | None = None

    @property
    def score_name(self) -> str:
        """What the last column of a table is."""
        return "probability" if self.method == "attention" else "score"

    def items(self, report: FastaReport) -> Iterator[Part]:
        """The parts of every record."""
        for protein in read_proteins(
            self.proteins, max_length=self.max_length, on_invalid=self.on_invalid, report=report
        ):
            for start, stop in self._pieces(protein):
                yield Part(protein.number, protein.id, protein.description, protein.chains, start, stop)

    def _pieces(self, protein: Protein) -> Iterator[tuple[int, int]]:
        length = protein.length
        if self.method == "jacobian":
            return pieces(length, length + 2 * len(protein.chains))
        # The whole of a map has to be swept for the sums first, where they are not linear: once, then.
        step = PIECE_ROWS if length > PIECE_ROWS and self._has_linear_sums else length
        return ((start, min(start + step, length)) for start in range(0, length, step))

    @property
    def _has_linear_sums(self) -> bool:
        if self._linear is None:
            maps = attention_maps(self.model, self.model.row([STANDARD_RESIDUES]))
            self._linear = isinstance(maps, AttentionMaps) and maps.has_linear_sums
        return self._linear

    def to_json(self, item: Part) -> Any:
        """A list."""
        return item

    def from_json(self, content: Any) -> Part:
        """A part from a list."""
        number, identifier, description, chains, start, stop = content
        return Part(number, identifier, description, tuple(chains), start, stop)

    def label(self, item: Part) -> tuple[int, str]:
        """Number and identifier of the record."""
        return item.number, item.id

    def tokens(self, item: Part) -> int:
        """The tokens of its passes."""
        passes = 1 if self.method == "attention" else len(STANDARD_RESIDUES) * (item.stop - item.start)
        return passes * self.longest(item)

    def longest(self, item: Part) -> int:
        """The tokens of one pass."""
        return sum(map(len, item.chains)) + 2 * len(item.chains)

    def refusal(self, item: Part) -> str | None:
        """Why the model cannot read it, if that shows."""
        if len(item.chains) > 1 and not self.model.is_performer:
            return f"it has {len(item.chains)} chains, and only a Performer can read several chains jointly"
        return self.model.refusal(self.longest(item))

    def about(self, report: FastaReport) -> str:
        """Records and residues."""
        return f"{report.records:,} records, {report.residues:,} residues by {self.method}"

    def num_bytes(self, item: Part) -> int:
        """Of what is kept of it, and of its share of the table and the picture."""
        length, rows = sum(map(len, item.chains)), item.stop - item.start
        kept = 4 * rows * length if self.method == "jacobian" else 20 * self._limit(item)
        if self.with_patterns:
            heads = 64 if self.regression is None else sum(map(len, self.regression.weights))
            kept += heads * 4 * (24 + min(GRID, length) ** 2 * (item.number <= self.pictures))
        share = rows / max(length, 1)
        return kept + round(share * (36 * self._limit(item) + 60_000 * (item.number <= self.pictures)))

    def _limit(self, item: Part) -> int:
        return max(1, round(self.top * sum(map(len, item.chains))))

    def compute(self, items: Sequence[Part]) -> Sequence[Result]:
        """By attention the best pairs of each part, `i`, `j` and log-odds `score`; by Jacobian `rows` of the response."""
        results: dict[int, Result] = {}
        readable: list[int] = []
        for index, item in enumerate(items):
            refusal = self.refusal(item)
            if refusal is None:
                readable.append(index)
            else:
                results[index] = Unread(refusal)
        if self.method == "jacobian":
            requests = [(items[index].chains, items[index].start, items[index].stop) for index in readable]
            found = response_rows(self.model, requests, toks_per_batch=self.toks_per_batch)
            for index, rows in zip(readable, found, strict=True):
                results[index] = rows if isinstance(rows, Unread) else {"rows": rows}
        else:
            for index in readable:
                results[index] = self._read_attention(items[index])
        return [results[index] for index in range(len(items))]

    @torch.inference_mode()
    def _read_attention(self, item: Part) -> Result:
        assert self.regression is not None
        maps = attention_maps(self.model, self.model.row(item.chains))
        if isinstance(maps, Unread):
            return maps
        geometry = Geometry.of(item.chains, self.min_separation)
        best = BestPairs(self._limit(item))
        patterns = None
        if self.with_patterns:
            chain = torch.from_numpy(geometry.chain_of(np.arange(maps.length))).to(maps.device)
            patterns = PatternSums(maps, chain, with_picture=item.number <= self.pictures)
        for rows, columns in maps.blocks(item.start, item.stop):
            best.add_block(self.regression.log_odds(maps, rows, columns), rows, columns, geometry)
            if patterns is not None:
                patterns.add(rows, columns)
        pairs = best.best()
        arrays: dict[str, npt.NDArray[Any]] = {"i": pairs.i, "j": pairs.j, "score": pairs.score}
        if patterns is not None:
            arrays |= patterns.arrays("".join(item.chains), first_part=item.start == 0)
        if not np.isfinite(pairs.score).all():
            return Unread("the model's numbers for it are not finite")
        return arrays

    def records(
        self, results: Iterable[tuple[Part, Result]]
    ) -> Iterator[tuple[Entry, str, dict[str, npt.NDArray[np.float32]]]]:
        """Each record with its best pairs, its description, and the sums of its maps where they are asked for."""
        for _, group in itertools.groupby(results, key=lambda pair: pair[0].number):
            yield self._record(group)

    def _record(self, group: Iterator[tuple[Part, Result]]) -> tuple[Entry, str, dict[str, npt.NDArray[np.float32]]]:
        first, result = next(group)
        group = itertools.chain([(first, result)], group)
        geometry = Geometry.of(first.chains, self.min_separation)
        best = BestPairs(self._limit(first))
        sums: dict[str, npt.NDArray[np.float32]] = {}
        reasons: list[str] = []

        def rows() -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
            for part, result in group:
                if isinstance(result, Unread):
                    reasons.append(result.reason)
                else:
                    yield part.start, result["rows"]

        if self.method == "jacobian":
            for here, there, scores in corrected_blocks(int(geometry.starts[-1]), rows()):
                if not reasons:
                    best.add_block(scores, here, there, geometry)
        else:
            for _, result in group:
                if isinstance(result, Unread):
                    reasons.append(result.reason)
                    continue
                best.add(Pairs(result["i"], result["j"], result["score"]))
                for name in result.keys() - {"i", "j", "score"}:
                    sums[name] = sums[name] + result[name] if name in sums else result[name]
        about = (first.number, first.id, first.chains)
        if reasons:
            return Entry(*about, None, reasons[0]), first.description, {}
        pairs = best.best()
        if self.method == "attention":
            odds = np.exp(-np.abs(pairs.score))  # of either sign, without overflow
            pairs = pairs._replace(score=np.where(pairs.score >= 0, 1 / (1 + odds), odds / (1 + odds)))
        return Entry(*about, pairs), first.description, sums

    def write(self, results: Iterable[tuple[Part, Result]], path: Path) -> Written:
        """A folder with a table and a picture for each record, a summary, and what there is to say of the heads."""
        path.mkdir()
        summary = Summary(path / SUMMARY, probabilities=self.method == "attention")
        failed: list[tuple[int, str, str]] = []
        means = PatternMeans()
        count = 0
        for entry, _, sums in self.records(results):
            count += 1
            geometry = Geometry.of(entry.chains, self.min_separation)
            table = picture = ""
            if entry.pairs is None:
                failed.append((entry.number, entry.id, entry.reason))
            else:
                table = f"{entry.number:06d}.tsv"
                write_table(path / table, entry, geometry, self.score_name)
                if entry.number <= self.pictures:
                    picture = f"{entry.number:06d}.png"
                    draw_contacts(path / picture, entry, geometry, self.score_name)
            if sums and entry.number <= self.pictures:
                draw_heads(path / f"{entry.number:06d}-heads.png", sums["picture"], self._heads, entry)
            if sums:
                means.add(sums, sum(map(len, entry.chains)))
            summary.add(entry, geometry, table, picture)
        summary.close()
        figures: dict[str, Any] = {"method": self.method, **summary.figures}
        if self.regression is not None:
            self.regression.save(path / FILE_NAME)
        patterns = means.patterns()
        if patterns is not None:
            write_patterns(path / "heads.tsv", patterns, self._heads)
            draw_patterns(path / "heads.png", patterns, self._heads)
            alike = similarity(patterns.shares)
            write_similarity(path / "amino-acids.tsv", alike)
            draw_similarity(path / "amino-acids.png", alike)
            kinds = [patterns.kind(head) for head in range(sum(self._heads))]
            figures["heads"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
            figures["blosum62"] = {"spearman": alike.spearman, "interval": alike.interval}
        return Written(count, failed, figures)

    @property
    def _heads(self) -> list[int]:
        assert self.regression is not None
        return [len(layer) for layer in self.regression.weights]

    def methods(self, outcome: Outcome) -> str:
        """Two sentences."""
        what = f"Contacts of {outcome.items - len(outcome.failed):,} proteins were predicted with performers {__version__} and "
        what += f"the protein language model {self.model.name} ({self.model.num_parameters:,} parameters) "
        if self.regression is None:
            return (
                f"{what}by its categorical Jacobian (Zhang et al., 2024). The Frobenius norm of the centred change in logits was "
                "made symmetric and corrected by the average product (Dunn et al., 2008)."
            )
        return (
            f"{what}by a logistic regression on its attention maps (Rao et al., 2021). The maps were made symmetric and "
            "corrected by the average product (Dunn et al., 2008), and the regression was fitted on "
            f"{len(self.regression.chains)} protein chains of known structure."
        )
