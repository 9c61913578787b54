"""`report`: proteins in, one self-contained page out.

For every protein the mean embedding and the log-likelihood, for one of them the score of every substitution and its contacts, and
beside them what `interact` and `generate` made, if given. Each part is the work of a tool that exists: a report plans their items
as its own, so that it is estimated, saved and resumed like them. How the page looks, knows `performers.tools.report_page`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from performers import __version__
from performers.data import MAX_LENGTH, FastaReport
from performers.data.fasta import OnInvalid
from performers.errors import InputError, MissingExtraError, UnsupportedError
from performers.folders import building_folder
from performers.tools.beside import say
from performers.tools.contact_files import draw_contacts
from performers.tools.contact_prediction import ContactMapper
from performers.tools.contact_regression import Regression, fit_regression, regression_of
from performers.tools.embedding import Embedder
from performers.tools.jobs import run_tool
from performers.tools.language_model import LanguageModel
from performers.tools.pairs import Geometry
from performers.tools.proteins import Protein, Proteins
from performers.tools.report_findings import (
    CONTACTS,
    EMBEDDING,
    LIKELIHOOD,
    SATURATION,
    Findings,
    Part,
    draw_saturation,
    least_tolerant,
    principal_axes,
    write_table,
)
from performers.tools.report_page import Page, render
from performers.tools.report_tables import read_designs, read_interactions
from performers.tools.scorer import Scorer, Sheet, Strategy
from performers.tools.tool import Outcome, Result, Tool, Written
from performers.training.runs import CITATION, describe_file

LIKELIHOOD_STRIPES = 7
"""Passes over a protein for its likelihood, each with every seventh residue masked: about as many as in training."""


class Reporter(Tool[Part]):
    """`report` as a `Tool`.

    Arguments:
        model: what reads; without likelihoods where it predicts no residues, and without substitutions where it is causal.
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
        self._interactions = None if interactions is None else read_interactions(interactions)
        self._designs = None if designs is None else read_designs(designs)
        self._embedder = Embedder(
            model, proteins, toks_per_batch=toks_per_batch, max_length=max_length, on_invalid=on_invalid
        )
        self._tools: dict[str, Tool[Any]] = {EMBEDDING: self._embedder}
        if _predicts_residues(model):
            self._tools[LIKELIHOOD] = self._scorer(self._likelihood, LIKELIHOOD_STRIPES)
            if not model.is_causal:
                self._tools[SATURATION] = self._scorer("masked-marginals", None)
        if regression is not None:
            self._tools[CONTACTS] = self._mapper([])
        self._proteins = 0

    @property
    def _likelihood(self) -> Strategy:
        return "likelihood" if self.model.is_causal else "pseudo-ppl"

    def _scorer(self, strategy: Strategy, stripes: int | None, *sheets: Sheet) -> Scorer:
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
            yield Part(EMBEDDING, protein.number, protein)
            if LIKELIHOOD in self._tools:
                sheet = Sheet(tuple((protein.id, chain) for chain in protein.chains), ())
                for block in self._scorer(self._likelihood, LIKELIHOOD_STRIPES, sheet).items(FastaReport()):
                    yield Part(LIKELIHOOD, protein.number, block)
        if chosen is None and self._proteins:
            raise InputError(f"There is no protein {self.chosen!r} in the input; expected one to look at closely.")
        if chosen is not None and SATURATION in self._tools:
            sheet = Sheet(tuple((chosen.id, chain) for chain in chosen.chains), None)
            for block in self._scorer("masked-marginals", None, sheet).items(FastaReport()):
                yield Part(SATURATION, chosen.number, block)
        if chosen is not None and CONTACTS in self._tools:
            for piece in self._mapper([chosen]).items(FastaReport()):
                yield Part(CONTACTS, chosen.number, piece)

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

    def beside(self, path: Path) -> Sequence[str]:
        """The table of all proteins."""
        return (path.with_suffix(".tsv").name,)

    def write(self, results: Iterable[tuple[Part, Result]], path: Path) -> Written:
        """The page, and beside it a table of all proteins."""
        found = Findings(results)
        axes = principal_axes(results, self.model.hidden_size)
        table = path.with_suffix(".tsv")
        rows, points = write_table(table, results, found, axes)
        readings = found.chosen()
        pictures: list[tuple[str, str, bytes]] = []
        sensitive: list[tuple[str, float]] = []
        if readings is not None:
            pictures += [draw_saturation(readings, place, self.model.name) for place in range(len(readings.sequences))]
            sensitive = least_tolerant(readings)
        if (contacts := self._contacts(results)) is not None:
            pictures.append(contacts)
        figures = {
            "proteins": len(found.ids),
            "table": table.name,
            "chosen": found.chosen_id or "the first protein",
            "substitutions": readings is not None,
            "stripes": found.stripes(),
            "contacts": contacts is not None,
        }
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
            chosen=figures["chosen"],
            pictures=pictures,
            sensitive=sensitive,
            interactions=self._interactions,
            designs=self._designs,
            failed=failed,
            notes=[*([] if (remark := self.model.remark()) is None else [remark]), *self._notes],
            methods=self._methods(len(found.ids) - len(failed), figures),
            citations=CITATION,
        )
        path.write_text(render(page), encoding="utf-8")
        return Written(len(found.ids), failed, figures)

    def _contacts(self, results: Iterable[tuple[Part, Result]]) -> tuple[str, str, bytes] | None:
        """The picture of the chosen protein's contacts; None if it was not read or not asked for."""
        mine = [(part.item, result) for part, result in results if part.tool == CONTACTS]
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
        return self._methods(outcome.items - len(outcome.failed), outcome.figures)

    def _methods(self, proteins: int, figures: dict[str, Any]) -> str:
        """Of what was done: the figures say which parts there are."""
        how = (
            "the sum of log P(residue | those before it)"
            if self.model.is_causal
            else f"log P(residue | the others), with every {LIKELIHOOD_STRIPES}th residue masked at a time"
        )
        what, shown = "Mean embeddings", "Embeddings are shown on their first two principal components"
        if LIKELIHOOD in self._tools:
            what += f" and log-likelihoods ({how})"
            shown += ", and likelihoods against the frequencies of residues in Swiss-Prot"
        close: list[str] = []
        if figures["substitutions"]:
            stripes = f"in {figures['stripes']} stripes, " if figures["stripes"] else ""
            close.append(
                f"substitutions were scored by masked-marginals (Meier et al., 2021; {stripes}not for clinical use)"
            )
        if figures["contacts"]:
            close.append(
                "contacts were predicted by a logistic regression on attention maps (Rao et al., 2021), corrected by the average "
                "product (Dunn et al., 2008)"
            )
        closer = f"; of {figures['chosen']}, {' and '.join(close)}" if close else ""
        return (
            f"{what} of {proteins:,} proteins were computed with performers {__version__} and the protein language model "
            f"{self.model.name} ({self.model.num_parameters:,} parameters). {shown}{closer}."
        )


def _predicts_residues(model: LanguageModel) -> bool:
    try:
        model.check_language_model()
    except UnsupportedError:
        return False
    return True


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
    # Work that was begun is of a regression already, without which it would look like another report's.
    regression, remark = _regression_for(opened, fit=not dry_run or building_folder(Path(output)).exists())
    notes = [remark] if remark else []
    if not _predicts_residues(opened):
        notes.append("Without likelihoods and substitutions: the model predicts no residues.")
    for note in notes:
        say(note)
    tool = Reporter(opened, sources, regression=regression, notes=notes, **options)
    settings: dict[str, Any] = {name: str(value) for name, value in sorted(options.items())}
    extra = [str(options[name]) for name in ("interactions", "designs") if options.get(name) is not None]
    settings["regression"] = None if regression is None else regression.fingerprint()
    settings["tables"] = [describe_file(file)["sha256"] for file in extra]
    return run_tool(tool, output, sources=sources, settings=settings, dry_run=dry_run, restart=restart)


def _regression_for(model: LanguageModel, *, fit: bool) -> tuple[Regression | None, str]:
    """The regression of contacts that belongs to a model; or None, and why a page is without contacts."""
    found = regression_of(model)
    if found is not None:
        return found, ""
    if not fit:
        return (
            None,
            "The model's folder has no regression of contacts: it would be fitted first, and is not in the estimate.",
        )
    try:
        return fit_regression(model), ""
    except (UnsupportedError, MissingExtraError) as error:
        return None, f"Without contacts: {error}"
