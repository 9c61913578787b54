"""`report`: proteins in, one self-contained page out.

For every protein the mean embedding and the log-likelihood, for one of them the score of every substitution and its contacts, and
beside them what `interact` and `generate` made, if given. Each part is the work of a tool that exists: a report plans their items
as its own, so that it is estimated, saved and resumed like them. How the page looks, knows `performers.tools.report_page`.
"""

from __future__ import annotations

import csv
import itertools
import math
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from performers import __version__
from performers.data import MAX_LENGTH, STANDARD_RESIDUES, FastaReport
from performers.data.fasta import OnInvalid
from performers.errors import InputError, UnsupportedError
from performers.tools.contact_files import draw_contacts
from performers.tools.contact_prediction import ContactMapper
from performers.tools.contact_regression import Regression, fit_regression, regression_of
from performers.tools.embedding import Embedder
from performers.tools.jobs import run_tool
from performers.tools.language_model import LanguageModel, Unread
from performers.tools.pairs import Geometry
from performers.tools.proteins import Protein, Proteins
from performers.tools.readings import BACKGROUND, Block, Readings
from performers.tools.report_page import MOST_POINTS, MOST_ROWS, Page, Point, Row, render
from performers.tools.scorer import Scorer, Sheet
from performers.tools.tables import read_table
from performers.tools.tool import Outcome, Result, Tool, Written
from performers.training.runs import CITATION, describe_file

LIKELIHOOD_STRIPES = 7
"""Passes over a protein for its likelihood, each with every seventh residue masked: about as many as in training."""

MOST_COMPARED = 2000
MOST_SENSITIVE = 10
_EMBEDDING, _LIKELIHOOD, _SATURATION, _CONTACTS = "embedding", "likelihood", "saturation", "contacts"
_Floats = npt.NDArray[np.float64]


class Part(NamedTuple):
    """An item of one of the tools that a report is made of: which tool, the number of the protein, and the item."""

    tool: str
    protein: int
    item: Any


class Reporter(Tool[Part]):
    """`report` as a `Tool`.

    Arguments:
        model: what reads; a masked or causal language model.
        proteins: as `read_proteins` takes them.
        chosen: the identifier of the protein that is looked at closely; None for the first one.
        interactions: a table with the columns p0, p1 and prob, as `performers interact predict` writes it.
        designs: a table of designs, as `performers generate` writes it.
        regression: of contacts on the model's attention maps; None for a page without contacts.
        notes: sentences to stand under the heading.
        toks_per_batch: tokens in one forward pass.
        max_length, on_invalid: as in `read_proteins`.

    Raises:
        InputError: an argument or a table is not valid.
    """

    command: ClassVar[str] = "report"
    noun: ClassVar[str] = "parts"

    def __init__(
        self,
        model: LanguageModel,
        proteins: Proteins,
        *,
        chosen: str | None = None,
        interactions: str | Path | None = None,
        designs: str | Path | None = None,
        regression: Regression | None = None,
        notes: Sequence[str] = (),
        toks_per_batch: int = 16_384,
        max_length: int = MAX_LENGTH,
        on_invalid: OnInvalid = "error",
    ) -> None:
        self.model, self.chosen, self._regression, self._notes = model, chosen, regression, notes
        self._interactions = None if interactions is None else _read_interactions(interactions)
        self._designs = None if designs is None else _read_designs(designs)
        self._embedder = Embedder(
            model, proteins, toks_per_batch=toks_per_batch, max_length=max_length, on_invalid=on_invalid
        )
        marginals = "likelihood" if model.is_causal else "masked-marginals"
        self._tools: dict[str, Tool[Any]] = {
            _EMBEDDING: self._embedder,
            _LIKELIHOOD: self._scorer("likelihood" if model.is_causal else "pseudo-ppl", LIKELIHOOD_STRIPES),
            _SATURATION: self._scorer(marginals, None),
        }
        if regression is not None:
            self._tools[_CONTACTS] = self._mapper([])
        self._proteins = 0

    def _scorer(self, strategy: Any, stripes: int | None, *sheets: Sheet) -> Scorer:
        return Scorer(
            self.model,
            lambda _: sheets,
            strategy=strategy,
            stripes=None if self.model.is_causal else stripes,
            toks_per_batch=self._embedder.toks_per_batch,
        )

    def _mapper(self, proteins: Sequence[Protein]) -> ContactMapper:
        return ContactMapper(self.model, proteins, regression=self._regression)

    def items(self, report: FastaReport) -> Iterator[Part]:
        """For each protein its embedding and the blocks of its likelihood; then what the chosen one takes.

        Raises:
            InputError: there is no protein of the chosen identifier.
        """
        self._proteins = 0
        chosen: Protein | None = None
        for protein in self._embedder.items(report):
            self._proteins += 1
            if chosen is None and self.chosen in (None, protein.id):
                chosen = protein
            yield Part(_EMBEDDING, protein.number, protein)
            for place, chain in enumerate(protein.chains):
                sheet = Sheet(((protein.id, chain),), ())
                strategy = "likelihood" if self.model.is_causal else "pseudo-ppl"
                for block in self._scorer(strategy, LIKELIHOOD_STRIPES, sheet).items(FastaReport()):
                    yield Part(_LIKELIHOOD, protein.number, block._replace(wild_type=place))
        if chosen is None and self._proteins:
            raise InputError(f"There is no protein {self.chosen!r} in the input; expected one to look at closely.")
        if chosen is not None and not self.model.is_causal:
            sheet = Sheet(((chosen.id, chosen.chains[0]),), None)
            for block in self._scorer("masked-marginals", None, sheet).items(FastaReport()):
                yield Part(_SATURATION, chosen.number, block)
        if chosen is not None and _CONTACTS in self._tools:
            for piece in self._mapper([chosen]).items(FastaReport()):
                yield Part(_CONTACTS, chosen.number, piece)

    def about(self, report: FastaReport) -> str:
        """Proteins and residues."""
        return f"{self._proteins:,} proteins, {report.residues:,} residues"

    def to_json(self, item: Part) -> Any:
        """The names and the item's own JSON."""
        return [item.tool, item.protein, self._tools[item.tool].to_json(item.item)]

    def from_json(self, content: Any) -> Part:
        """A part from a list."""
        tool, protein, item = content
        return Part(tool, protein, self._tools[tool].from_json(item))

    def label(self, item: Part) -> tuple[int, str]:
        """Number and identifier of the protein."""
        return item.protein, item.item.id

    def tokens(self, item: Part) -> int:
        """As the tool says."""
        return self._tools[item.tool].tokens(item.item)

    def longest(self, item: Part) -> int:
        """As the tool says."""
        return self._tools[item.tool].longest(item.item)

    def refusal(self, item: Part) -> str | None:
        """As the tool says."""
        return self._tools[item.tool].refusal(item.item)

    def num_bytes(self, item: Part) -> int:
        """As the tool says, and what the page takes."""
        return self._tools[item.tool].num_bytes(item.item) + 200

    def compute(self, items: Sequence[Part]) -> Sequence[Result]:
        """The results of each tool for its own items."""
        results: dict[int, Result] = {}
        for name, tool in self._tools.items():
            mine = [place for place, item in enumerate(items) if item.tool == name]
            if mine:
                results |= dict(zip(mine, tool.compute([items[place].item for place in mine]), strict=True))
        return [results[place] for place in range(len(items))]

    def write(self, results: Iterable[tuple[Part, Result]], path: Path) -> Written:
        """The page, and beside it a table of all proteins."""
        found = _Findings(results)
        axes = _principal_axes(results, self.model.hidden_size)
        table = path.with_suffix(".tsv")
        rows, points = _write_table(table, results, found, axes)
        chosen = found.chosen()
        pictures: list[tuple[str, str, bytes]] = []
        sensitive: list[tuple[str, float]] = []
        if chosen is not None:
            readings, identifier, sequence = chosen
            pictures.append(_saturation(readings, sequence, identifier, self.model.name))
            sensitive = _least_tolerant(readings, sequence)
        if (contacts := self._contacts(results)) is not None:
            pictures.append(contacts)
        failed = [(number, found.ids[number], reason) for number, reason in sorted(found.failed.items())]
        gains = found.gains()
        known = gains[np.isfinite(gains)]
        page = Page(
            tiles=[
                ("proteins", f"{len(found.ids):,}"),
                ("residues", f"{int(found.lengths.sum()):,}"),
                ("median length", f"{np.median(found.lengths):,.0f}"),
                ("median nats per residue above frequencies", f"{np.median(known):.2f}" if known.size else "none"),
                ("model", self.model.name),
            ],
            rows=rows,
            count=len(found.ids),
            table=table.name,
            lengths=found.lengths,
            gains=gains,
            points=points,
            explained=axes.explained,
            chosen=found.chosen_id or "the first protein",
            pictures=pictures,
            sensitive=sensitive,
            interactions=self._interactions,
            designs=self._designs,
            failed=failed,
            notes=[*([] if (remark := self.model.remark()) is None else [remark]), *self._notes],
            methods=self._methods(len(found.ids) - len(failed)),
            citations=CITATION,
        )
        path.write_text(render(page), encoding="utf-8")
        figures = {"proteins": len(found.ids), "table": table.name, "chosen": page.chosen}
        return Written(len(found.ids), failed, figures)

    def _contacts(self, results: Iterable[tuple[Part, Result]]) -> tuple[str, str, bytes] | None:
        """The picture of the chosen protein's contacts; None if it was not read or not asked for."""
        mine = [(part.item, result) for part, result in results if part.tool == _CONTACTS]
        if not mine:
            return None
        tool = self._mapper([])
        [(entry, _, _)] = tool.records(mine)
        if entry.pairs is None:
            return None
        with tempfile.TemporaryDirectory(prefix="performers-") as folder:
            picture = Path(folder) / "contacts.png"
            draw_contacts(picture, entry, Geometry.of(entry.chains, tool.min_separation), tool.score_name)
            content = picture.read_bytes()
        return "Contacts", "The pairs of residues that the model's attention makes most likely to touch.", content

    def methods(self, outcome: Outcome) -> str:
        """Two sentences."""
        return self._methods(outcome.items - len(outcome.failed))

    def _methods(self, proteins: int) -> str:
        how = (
            "the sum of log P(residue | those before it)"
            if self.model.is_causal
            else f"log P(residue | the others), with every {LIKELIHOOD_STRIPES}th residue masked at a time"
        )
        return (
            f"Mean embeddings and log-likelihoods ({how}) of {proteins:,} proteins were computed with performers {__version__} "
            f"and the protein language model {self.model.name} ({self.model.num_parameters:,} parameters). "
            "Embeddings are shown on their first two principal components, and likelihoods against the frequencies of residues "
            "in Swiss-Prot; substitutions were scored by masked-marginals (Meier et al., 2021). Not for clinical use."
        )


class _Findings:
    """What there is to say of each protein, by its number; and the readings of the chosen one."""

    def __init__(self, results: Iterable[tuple[Part, Result]]) -> None:
        self.ids: dict[int, str] = {}
        self.failed: dict[int, str] = {}
        lengths = array("q")
        background = array("d")
        self._sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._chosen: list[tuple[Block, Result]] = []
        self.chosen_id = ""
        for part, result in results:
            if isinstance(result, Unread):
                self.failed.setdefault(part.protein, result.reason)
            if part.tool == _EMBEDDING:
                self.ids[part.protein] = part.item.id
                lengths.append(part.item.length)
                background.append(_background(part.item.chains))
            elif part.tool in (_SATURATION, _CONTACTS):
                self.chosen_id = part.item.id
                if part.tool == _SATURATION:
                    self._chosen.append((part.item, result))
            elif not isinstance(result, Unread):
                total, count = result["sum"]
                self._sums[part.protein][0] += float(total)
                self._sums[part.protein][1] += float(count)
        self.lengths = np.array(lengths, dtype=np.int64)
        self._background = np.array(background)

    def log_likelihood(self, number: int) -> float | None:
        """Nats per residue."""
        total, count = self._sums.get(number, (0.0, 0.0))
        return None if not count or number in self.failed else total / count

    def gains(self) -> _Floats:
        """(n,) nats per residue beyond the frequencies of residues, in the order of the input; NaN where nothing was read."""
        values = [self.log_likelihood(number) for number in self.ids]
        return np.array([np.nan if value is None else value for value in values]) - self._background

    def chosen(self) -> tuple[Readings, str, str] | None:
        """The readings, the identifier and the sequence of the chosen protein; None if it was not read."""
        if not self._chosen or any(isinstance(result, Unread) for _, result in self._chosen):
            return None
        block = self._chosen[0][0]
        return Readings.gather(self._chosen, by_table=True), block.id, block.sequence


class _Axes(NamedTuple):
    """The first two principal components of the embeddings: their mean (d,), directions (2, d) and shares of the variance."""

    mean: _Floats
    directions: _Floats
    explained: tuple[float, float]


def _background(chains: Sequence[str]) -> float:
    """The mean log-frequency of a protein's residues in proteins at large."""
    logs = dict(zip(STANDARD_RESIDUES, np.log(BACKGROUND), strict=True))
    known = [logs[letter] for chain in chains for letter in chain if letter in logs]
    return float(np.mean(known)) if known else 0.0


def _means(results: Iterable[tuple[Part, Result]]) -> Iterator[tuple[Protein, npt.NDArray[np.float32] | None]]:
    for part, result in results:
        if part.tool == _EMBEDDING:
            yield part.item, None if isinstance(result, Unread) else result["mean"][0]


def _principal_axes(results: Iterable[tuple[Part, Result]], size: int) -> _Axes:
    """From sums over all proteins, so that memory does not grow with their number."""
    total, squares, count = np.zeros(size), np.zeros((size, size)), 0
    for _, vector in _means(results):
        if vector is not None:
            wide = vector.astype(np.float64)
            total += wide
            squares += np.outer(wide, wide)
            count += 1
    mean = total / max(count, 1)
    values, vectors = np.linalg.eigh(squares / max(count, 1) - np.outer(mean, mean))
    directions = vectors[:, [-1, -2]].T
    # The sign of a direction means nothing; this makes it the same everywhere.
    directions *= np.sign(directions[np.arange(2), np.abs(directions).argmax(axis=1)])[:, None]
    variance = max(float(values.clip(min=0).sum()), 1e-30)
    return _Axes(mean, directions, (max(float(values[-1]), 0) / variance, max(float(values[-2]), 0) / variance))


def _write_table(
    path: Path, results: Iterable[tuple[Part, Result]], found: _Findings, axes: _Axes
) -> tuple[list[Row], list[Point]]:
    """Write the row of every protein; the first rows and points of the map are given back."""
    gains = found.gains()
    nearest = _nearest(results) if len(found.ids) <= MOST_COMPARED else {}
    step = max(1, math.ceil(len(found.ids) / MOST_POINTS))
    rows: list[Row] = []
    points: list[Point] = []
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(["number", "id", "residues", "log_likelihood", "gain", "x", "y", "nearest", "cosine"])
        for place, (protein, vector) in enumerate(_means(results)):
            likelihood = found.log_likelihood(protein.number)
            gain = None if likelihood is None else float(gains[place])
            other, similarity = nearest.get(protein.number, ("", None))
            row = Row(protein.number, protein.id, protein.length, likelihood, gain, other, similarity)
            where = None if vector is None else axes.directions @ (vector.astype(np.float64) - axes.mean)
            cells = [likelihood, gain, *((None, None) if where is None else where)]
            shown = ["" if cell is None else f"{cell:.6f}" for cell in cells]
            cosine = "" if similarity is None else f"{similarity:.6f}"
            writer.writerow([row.number, row.id, row.length, *shown, other, cosine])
            if len(rows) < MOST_ROWS:
                rows.append(row)
            if where is not None and place % step == 0:
                points.append(Point(float(where[0]), float(where[1]), gain, protein.id or f"number {protein.number}"))
    return rows, points


def _nearest(results: Iterable[tuple[Part, Result]]) -> dict[int, tuple[str, float]]:
    """For each protein the identifier of the one with the most similar mean embedding, and the cosine, about the centre."""
    known = [(protein, vector) for protein, vector in _means(results) if vector is not None]
    if len(known) < 2:
        return {}
    vectors = np.stack([vector for _, vector in known]).astype(np.float64)
    vectors -= vectors.mean(axis=0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    best = cosines.argmax(axis=1)
    return {
        protein.number: (known[other][0].id or f"number {known[other][0].number}", float(cosines[place, other]))
        for place, ((protein, _), other) in enumerate(zip(known, best.tolist(), strict=True))
    }


def _saturation(readings: Readings, sequence: str, identifier: str, model: str) -> tuple[str, str, bytes]:
    from performers.tools.heat_map import ORDER, plot_saturation

    log_odds = readings.log_odds(0)[:, [STANDARD_RESIDUES.index(letter) for letter in ORDER]]
    with tempfile.TemporaryDirectory(prefix="performers-") as folder:
        picture = Path(folder) / "saturation.png"
        plot_saturation(log_odds, sequence, picture, title=f"{identifier or 'protein'}: {model}", first=1)
        content = picture.read_bytes()
    caption = "Log-odds of every substitution; white is as good as the wild type, red is worse, dots are the wild type."
    return "Every substitution", caption, content


def _least_tolerant(readings: Readings, sequence: str) -> list[tuple[str, float]]:
    log_odds = readings.log_odds(0).astype(np.float64)
    others = np.array([[letter != own for letter in STANDARD_RESIDUES] for own in sequence])
    means = np.where(others, log_odds, 0).sum(axis=1) / others.sum(axis=1)
    order = np.argsort(means, kind="stable")[:MOST_SENSITIVE]
    return [(f"{sequence[place]}{place + 1}", float(means[place])) for place in order]


def _read_interactions(path: str | Path) -> tuple[list[str], _Floats]:
    """Identifiers and their symmetric matrix of probabilities, NaN where there is none.

    Raises:
        InputError: the table lacks a column, or a probability is none.
    """
    table = read_table(path)
    table.require("p0", "p1", "prob")
    found: dict[tuple[str, str], float] = {}
    for row, values in table.rows:
        try:
            probability = float(values["prob"])
        except ValueError:
            probability = math.nan
        if not 0 <= probability <= 1:
            raise InputError(f"{path}, row {row:,}: prob is {values['prob']!r}; expected a number from 0 to 1.")
        found[values["p0"], values["p1"]] = probability
    names = list(dict.fromkeys(name for pair in found for name in pair))
    if len(names) > MOST_COMPARED:
        raise InputError(
            f"{path} has {len(names):,} proteins; a report shows the interactions of at most {MOST_COMPARED:,}."
        )
    places = {name: place for place, name in enumerate(names)}
    matrix = np.full((len(names), len(names)), np.nan)
    for (first, second), probability in found.items():
        matrix[places[first], places[second]] = matrix[places[second], places[first]] = probability
    return names, matrix


def _read_designs(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """Header and the first rows of a table.

    Raises:
        InputError: it has no rows.
    """
    table = read_table(path)
    first = itertools.islice(table.rows, MOST_ROWS)
    rows = [[values.get(name, "") for name in table.columns] for _, values in first]
    if not rows:
        raise InputError(f"{path} has no rows; expected designs.")
    return list(table.columns), rows


def report(
    output: str | Path,
    sources: Sequence[str],
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    dry_run: bool = False,
    restart: bool = False,
    **options: Any,
) -> Outcome:
    """A page about proteins, in one HTML file that needs no network; resumed where it was interrupted.

    Arguments:
        output: the .html file; a .tsv of the same name goes beside it.
        sources: files, "-" or "bundled:NAME".
        model: a folder or a bundled model's name; None for the bundled masked one.
        device, dtype: as in `LanguageModel.open`.
        dry_run, restart: as in `run_tool`.
        options: those of `Reporter` from `chosen` on.

    Raises:
        InputError, RunError: as in `run_tool` and `Reporter`.
    """
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: expected a file whose name ends in .html.")
    opened = LanguageModel.open(model, device=device, dtype=dtype)
    regression, notes = None, []
    try:
        regression = regression_of(opened, None) or fit_regression(opened)
    except UnsupportedError as error:
        notes = [f"Without contacts: {error}"]
    tool = Reporter(opened, sources, regression=regression, notes=notes, **options)
    settings: dict[str, Any] = {name: str(value) for name, value in sorted(options.items())}
    extra = [str(options[name]) for name in ("interactions", "designs") if options.get(name) is not None]
    settings["regression"] = None if regression is None else regression.fingerprint()
    settings["tables"] = [describe_file(file)["sha256"] for file in extra]
    return run_tool(tool, output, sources=sources, settings=settings, dry_run=dry_run, restart=restart)
