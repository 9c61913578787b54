"""`score`: how well a protein tolerates variants. Not for clinical use.

A wild type and its variants come in, as text, files or a ProteinGym folder; a score for each variant goes out, or a table of
them. What a score is, and what it takes, says `performers.tools.scorer`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from performers.data import MAX_LENGTH, RESIDUES, FastaReport, InputFile, Record
from performers.data.fasta import OnInvalid
from performers.errors import InputError
from performers.folders import sha256_of
from performers.tools.engine import EngineName, choose_engine, use_own_gpu
from performers.tools.jobs import run_tool
from performers.tools.language_model import LanguageModel
from performers.tools.proteins import read_proteins
from performers.tools.scorer import Score, Scorer, Sheet, Strategy, VariantSource
from performers.tools.tables import read_table
from performers.tools.tool import Outcome, all_results_of


def score(
    wild_type: str | Path,
    variants: str | Path | Sequence[str] | None = None,
    model: LanguageModel | str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    context: str | Path | None = None,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    **options: Any,
) -> Iterator[Score]:
    """Scores of variants, in order. Not for clinical use.

    ```text
    for variant in score("MKTAYIAKQR", ["K2R", "p.Thr3Pro"], "run/model"):
        print(variant.mutant, variant.score)
    ```

    Arguments:
        wild_type: a sequence, or a file of one or more; a table then says in its column `id` which one each row is about.
        variants: a table with a column `mutant` or `mutated_sequence`, or names of variants, or None for all single
            substitutions.
        model: a masked or causal language model: its folder, or opened; None for the bundled masked one.
        device, dtype, context: as in `LanguageModel.open`, for a folder.
        max_length, on_invalid: as in `read_proteins`.
        options: those of `Scorer` from `strategy` to `toks_per_batch`. Without a strategy, a table with insertions or
            deletions is scored by pseudo-ppl.

    Raises:
        InputError: an argument, a protein or a table is not valid. What is wrong with a single variant is its status.
        UnsupportedError: the model cannot do what the strategy needs.
    """
    if not isinstance(model, LanguageModel):
        model = LanguageModel.open(model, device=device, dtype=dtype, context=context)
    source: VariantSource = variants if variants is None or isinstance(variants, str | Path) else tuple(variants)
    tool = _scorer(model, wild_type, source, max_length=max_length, on_invalid=on_invalid, **options)
    results = all_results_of(tool, tool.items(FastaReport()))
    return (scored for _, _, scores in tool.scores(results) for scored in scores)


def score_to(
    output: str | Path,
    wild_type: str | None,
    model: str | Path | None = None,
    *,
    variants: str | None = None,
    proteingym: str | None = None,
    reference: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    context: str | Path | None = None,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    dry_run: bool = False,
    restart: bool = False,
    engine: EngineName = "auto",
    workers: int | None = None,
    **options: Any,
) -> Outcome:
    """`score` into a CSV file, resumed where it was interrupted; a ProteinGym folder into a folder.

    Arguments:
        output: the file, or the folder for `proteingym`.
        wild_type, variants, model, max_length, on_invalid: as in `score`.
        proteingym: a folder of assays, in place of `wild_type` and `variants`.
        reference: ProteinGym's reference file, with the columns DMS_id, DMS_filename and target_seq; the folder's own
            reference.csv unless given.
        device, dtype, context: as in `LanguageModel.open`.
        dry_run, restart: as in `run_tool`.
        engine, workers: where the work is done; as in `performers.tools.engine.choose_engine`.
        options: those of `Scorer`. Without a strategy, each table with insertions or deletions is scored by pseudo-ppl.

    Raises:
        InputError, RunError: as in `score` and `run_tool`.
    """
    is_folder = proteingym is not None
    suffix = Path(output).suffix.lower()
    if suffix if is_folder else suffix != ".csv":
        raise InputError(f"{output}: expected {'a folder' if is_folder else 'a file whose name ends in .csv'}.")
    if (wild_type is None) != is_folder:
        raise InputError("Expected either --wild-type or --proteingym.")
    chosen_engine = choose_engine(engine, workers)
    use_own_gpu()
    opened = LanguageModel.open(model, device=device, dtype=dtype, context=context)
    if proteingym is not None:
        file, assays = _read_reference(Path(proteingym), reference)
        tool = _assay_scorer(opened, file, assays, max_length=max_length, on_invalid=on_invalid, **options)
        sources = [str(file), *(str(path) for _, _, path in assays)]
    else:
        assert wild_type is not None
        tool = _scorer(opened, wild_type, variants, max_length=max_length, on_invalid=on_invalid, **options)
        sources = [*([] if is_sequence(wild_type) else [wild_type]), *([] if variants is None else [variants])]
    settings = {
        "wild_type": wild_type,
        "variants": variants,
        "proteingym": proteingym,
        "strategy": tool.strategy,
        "stripes": tool.stripes,
        "check_stripes": tool.check_stripes,
        "offset_idx": tool.offset_idx,
        "mutation_column": tool.mutation_column,
        "measurement_column": tool.measurement_column,
        "toks_per_batch": tool.toks_per_batch,
        "heat_map": tool.heat_map,
        "max_length": max_length,
        "on_invalid": on_invalid,
    }
    return run_tool(
        tool, output, sources=sources, settings=settings, dry_run=dry_run, restart=restart, engine=chosen_engine
    )


def is_sequence(text: str | Path) -> bool:
    """Whether a wild type is given as a sequence, rather than as a file."""
    letters = "".join(str(text).split()).upper()
    return bool(letters) and not set(letters) - set(RESIDUES) and not os.path.exists(text)


def _scorer(
    model: LanguageModel,
    wild_type: str | Path,
    variants: VariantSource,
    *,
    max_length: int,
    on_invalid: OnInvalid,
    strategy: Strategy | None = None,
    **options: Any,
) -> Scorer:
    """The tool for one table, for names, or for the saturation of any number of proteins."""

    def proteins(report: FastaReport) -> Iterator[tuple[str, str]]:
        text = str(wild_type)
        if not is_sequence(text) and text != "-" and not text.startswith("bundled:") and not os.path.exists(text):
            raise InputError(f"{text} is neither a file nor a sequence of residues.")
        given = [Record("", "", text, 1)] if is_sequence(text) else text
        return _single_chains(given, max_length, on_invalid, report)

    if variants is None:

        def saturations(report: FastaReport) -> Iterator[Sheet]:
            return (Sheet((protein,), None) for protein in proteins(report))

        return Scorer(model, saturations, strategy=strategy, **options)
    read = FastaReport()
    sheet = Sheet(tuple(proteins(read)), variants)
    if not sheet.wild_types:
        raise InputError(f"{wild_type} has no protein that can be read; expected a wild type.")
    if isinstance(variants, tuple):
        if len(sheet.wild_types) > 1:
            raise InputError(
                f"{wild_type} has {len(sheet.wild_types):,} proteins: names of variants are about a single one."
            )
        if not variants:
            raise InputError("There are no variants to score.")
    else:
        read.inputs.append(_checked_table(variants))
        strategy = strategy or _strategy_for(model, sheet)

    def sheets(report: FastaReport) -> Iterator[Sheet]:
        report.inputs += read.inputs
        report.left_out += read.left_out
        yield sheet

    return Scorer(model, sheets, strategy=strategy, sources=(variants,), **options)


def _assay_scorer(
    model: LanguageModel,
    reference: Path,
    assays: Sequence[tuple[str, str, Path]],
    *,
    max_length: int,
    on_invalid: OnInvalid,
    strategy: Strategy | None = None,
    **options: Any,
) -> Scorer:
    """The tool for ProteinGym's assays: (name, wild type, table)."""
    records = [Record(name, "", sequence, number) for number, (name, sequence, _) in enumerate(assays, start=1)]
    read = FastaReport()
    wild_types = dict(_single_chains(records, max_length, on_invalid, read))
    assays = [assay for assay in assays if assay[0] in wild_types]
    made = [Sheet(((name, wild_types[name]),), path) for name, _, path in assays]
    inputs = [_checked_table(path) for path in (reference, *(path for _, _, path in assays))]

    def sheets(report: FastaReport) -> Iterator[Sheet]:
        report.inputs += inputs
        report.left_out += read.left_out
        return iter(made)

    return Scorer(
        model,
        sheets,
        strategy=strategy or [_strategy_for(model, sheet) for sheet in made],
        sources=[path for _, _, path in assays],
        names=[name for name, _, _ in assays],
        **options,
    )


def _single_chains(
    proteins: Any, max_length: int, on_invalid: OnInvalid, report: FastaReport
) -> Iterator[tuple[str, str]]:
    for protein in read_proteins(proteins, max_length=max_length, on_invalid=on_invalid, report=report):
        chain, *others = protein.chains
        if others:
            raise InputError(
                f"Wild type {protein.number:,} ({protein.id}) has {len(protein.chains)} chains; expected one."
            )
        yield protein.id, chain


def _checked_table(path: str | Path) -> InputFile:
    """A description of a table that has rows.

    Raises:
        InputError: it has none.
    """
    if next(read_table(path).rows, None) is None:
        raise InputError(f"{path} has no rows; expected at least one variant.")
    return InputFile(str(path), Path(path).stat().st_size, sha256_of(Path(path)))


def _strategy_for(model: LanguageModel, sheet: Sheet) -> Strategy | None:
    """pseudo-ppl for a table with insertions or deletions and a masked model; else None, which is the model's usual one."""
    return "pseudo-ppl" if not model.is_causal and _has_indels(sheet) else None


def _has_indels(sheet: Sheet) -> bool:
    assert isinstance(sheet.source, str | Path)
    lengths = {identifier: len(sequence) for identifier, sequence in reversed(sheet.wild_types)}
    only = next(iter(lengths.values())) if len(sheet.wild_types) == 1 else None
    for _, values in read_table(sheet.source).rows:
        whole = "".join(values.get("mutated_sequence", "").split()).rstrip("*")
        if whole and len(whole) != (lengths.get(values.get("id", "")) if only is None else only):
            return True
    return False


def _read_reference(folder: Path, reference: str | None) -> tuple[Path, list[tuple[str, str, Path]]]:
    """ProteinGym's assays: name, wild type and table of each.

    Raises:
        InputError: the reference or an assay's table is missing, or a name cannot be that of a file.
    """
    file = Path(reference) if reference is not None else folder / "reference.csv"
    table = read_table(file)
    table.require("DMS_id", "DMS_filename", "target_seq")
    assays: list[tuple[str, str, Path]] = []
    for row, values in table.rows:
        name, path = values["DMS_id"], folder / values["DMS_filename"]
        if not name or Path(name).name != name or name in (".", ".."):
            raise InputError(f"{file}, row {row:,}: {name!r} cannot be the name of a file.")
        if Path(values["DMS_filename"]).name != values["DMS_filename"]:
            raise InputError(f"{file}, row {row:,}: {values['DMS_filename']!r} is not the name of a file in {folder}.")
        assays.append((name, values["target_seq"], path))
    if not assays or len({name for name, _, _ in assays}) < len(assays):
        raise InputError(f"{file}: expected one row for each of the assays, with names that differ.")
    return file, assays
