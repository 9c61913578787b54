"""`contacts`: which residues of a protein, or of chains that belong together, are likely to touch.

Two methods, of one output. "attention" reads the model's attention maps once and turns them into probabilities with a logistic
regression that was fitted on 20 chains of known structure (`contact_regression`). "jacobian" asks how much what the model expects
at one residue depends on another (`categorical_jacobian`); it needs 20 passes per residue and no fit, and works for models whose
attention cannot be had. Either way pairs are scored block by block and the best are kept, so memory is linear in the length.
Several chains in one record (A:B) are read jointly, and pairs between them are marked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.data import FastaReport
from performers.errors import InputError, RunError, UnsupportedError
from performers.tools.contact_mapper import ContactMapper, Method
from performers.tools.contact_regression import FILE_NAME, Regression, fit_regression, regression_of
from performers.tools.engine import EngineName, choose_engine, use_own_gpu
from performers.tools.jobs import run_tool
from performers.tools.language_model import LanguageModel
from performers.tools.pairs import Geometry
from performers.tools.proteins import Proteins
from performers.tools.tool import Outcome, all_results_of

_ENDINGS_OF_FILES = (".tsv", ".csv", ".txt", ".json", ".png", ".h5", ".npz", ".parquet", ".html", ".fasta", ".pdb")


@dataclass(frozen=True)
class Contacts:
    """The best pairs of residues of one record.

    Attributes:
        id, description: as in the input.
        number: the position in the input, counted from 1.
        chains: its chains.
        i, j: (k,) residues, i < j, counted from 0 through all chains; best first.
        score: (k,) by attention the probability of a contact, by Jacobian the strength of the dependence, without a unit.
        between_chains: (k,) whether i and j lie in different chains.
    """

    id: str
    description: str
    number: int
    chains: tuple[str, ...]
    i: npt.NDArray[np.int64]
    j: npt.NDArray[np.int64]
    score: npt.NDArray[np.float32]
    between_chains: npt.NDArray[np.bool_]


def contacts(
    proteins: Proteins,
    model: LanguageModel | str | Path | None = None,
    *,
    method: Method = "attention",
    regression: Regression | str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    failures: list[tuple[int, str, str]] | None = None,
    **options: Any,
) -> Iterator[Contacts]:
    """The likely contacts of proteins, in order.

    ```text
    for found in contacts("proteins.fasta", "run/model"):
        print(found.id, found.i[:5], found.j[:5], found.score[:5])
    ```

    Arguments:
        proteins: a FASTA, A3M, CSV, parquet, PDB or mmCIF file, several of them, or records.
        model: a Performer, a converted model or a Hugging Face protein model: its folder, or opened; None for the bundled one.
        method: "attention", with a probability for each pair, or "jacobian".
        regression: of the model, or its file; None for the one beside the model's weights, and where there is none it is fitted.
        device, dtype: as in `LanguageModel.open`, for a folder.
        failures: gets number, identifier and reason of each record that fails and is left out; without it the first raises.
        options: the others of `ContactMapper`: `top`, `min_separation`, `toks_per_batch`, `max_length`, `on_invalid`.

    Raises:
        InputError: an argument or a protein is not valid.
        UnsupportedError: the model's attention cannot be had.
        RunError: a record failed and nobody takes the failures.
    """
    if not isinstance(model, LanguageModel):
        model = LanguageModel.open(model, device=device, dtype=dtype)
    if method == "attention" and not isinstance(regression, Regression):
        regression = regression_of(model, regression) or fit_regression(model)
    chosen = regression if isinstance(regression, Regression) and method == "attention" else None
    tool = ContactMapper(model, proteins, method=method, regression=chosen, **options)
    return _contacts(tool, failures)


def _contacts(tool: ContactMapper, failures: list[tuple[int, str, str]] | None) -> Iterator[Contacts]:
    for entry, description, _ in tool.records(all_results_of(tool, tool.items(FastaReport()))):
        if entry.pairs is None:
            if failures is None:
                raise RunError(f"Number {entry.number:,} ({entry.id}): {entry.reason}.")
            failures.append((entry.number, entry.id, entry.reason))
            continue
        geometry = Geometry.of(entry.chains, tool.min_separation)
        i, j, score = entry.pairs
        between = geometry.chain_of(i) != geometry.chain_of(j)
        yield Contacts(entry.id, description, entry.number, entry.chains, i, j, score, between)


def contacts_to(
    output: str | Path,
    sources: Sequence[str],
    model: str | Path | None = None,
    *,
    method: Method = "attention",
    regression: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    dry_run: bool = False,
    restart: bool = False,
    engine: EngineName = "auto",
    workers: int | None = None,
    **options: Any,
) -> Outcome:
    """`contacts` into a folder, resumed where it was interrupted.

    Arguments:
        output: the folder.
        sources: files, "-" or "bundled:NAME".
        model: a folder; None for the bundled model.
        method, regression: as in `contacts`; the regression that was used is in the output, as `contact-regression.json`.
        device, dtype: as in `LanguageModel.open`.
        dry_run, restart: as in `run_tool`.
        engine, workers: where the work is done; as in `performers.tools.engine.choose_engine`.
        options: those of `ContactMapper`.

    Raises:
        InputError, RunError: as in `contacts` and `run_tool`.
    """
    if Path(output).suffix.lower() in _ENDINGS_OF_FILES:
        raise InputError(f"{output}: contacts go into a folder, with a table for each record; expected its name.")
    chosen_engine = choose_engine(engine, workers)
    use_own_gpu()
    opened = LanguageModel.open(model, device=device, dtype=dtype)
    chosen: Regression | None = None
    if method == "attention":
        chosen = regression_of(opened, regression)
        if chosen is None:
            print(
                f"The model's folder has no regression of contacts ({FILE_NAME}): fitting one on the bundled structures.",
                file=sys.stderr,
            )
            chosen = fit_regression(opened)
    elif regression is not None:
        raise UnsupportedError("The Jacobian takes no regression: leave --regression out.")
    tool = ContactMapper(opened, sources, method=method, regression=chosen, **options)
    settings = {
        "method": tool.method,
        "regression": None if chosen is None else chosen.fingerprint(),
        "top": tool.top,
        "min_separation": tool.min_separation,
        "attention_maps": tool.with_patterns,
        "pictures": tool.pictures,
        "toks_per_batch": tool.toks_per_batch,
        "max_length": tool.max_length,
        "on_invalid": tool.on_invalid,
    }
    return run_tool(
        tool, output, sources=sources, settings=settings, dry_run=dry_run, restart=restart, engine=chosen_engine
    )


__all__ = ["ContactMapper", "Contacts", "contacts", "contacts_to"]
