"""`generate`: new proteins from a causal model, or parts of given ones written anew by a masked model.

What is asked for decides which: proteins with open positions are redesigned (`performers.tools.redesign`), otherwise new ones are
drawn (`performers.tools.sampler`). Here options are told apart, files are read, and the tool is run. What comes out says how
likely the model finds it, and never that it folds, binds or is safe.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from performers.data import FastaReport, InputFile, read_fasta
from performers.errors import InputError
from performers.folders import sha256_of
from performers.models.bundled import CAUSAL, MASKED
from performers.tools.designs import BUNDLED_REFERENCE, Design, check_output
from performers.tools.jobs import run_tool
from performers.tools.language_model import LanguageModel
from performers.tools.partners import Partners, read_partners
from performers.tools.redesign import Redesigner
from performers.tools.sampler import Sampler
from performers.tools.sampling import Drawing
from performers.tools.tool import Outcome, results_of

MAX_LENGTH = 500
_DRAWING = ("temperature", "top_k", "top_p", "repetition_penalty", "repetition_window", "max_run")
_OF_SAMPLING = ("prompt", "length", "min_length", "max_length", "partner", "spec", "candidates", "at_once")
_OF_REDESIGN = ("mask", "steps", "order", "toks_per_batch")


class _Job(NamedTuple):
    """A tool ready to run, and all that decides its results besides the model.

    Attributes:
        tool: which.
        sources: the files behind it, in the order in which it reports them.
        settings: the rest.
        remark: what a user should be told first, or None.
    """

    tool: Sampler | Redesigner
    sources: list[str]
    settings: dict[str, Any]
    remark: str | None


def generate(
    model: LanguageModel | str | Path | None = None,
    sources: Sequence[str] | str = (),
    *,
    device: str = "auto",
    dtype: str = "auto",
    context: str | Path | None = None,
    failures: list[tuple[int, str, str]] | None = None,
    **options: Any,
) -> Iterator[Design]:
    """New proteins, or redesigned ones, in order.

    ```text
    for design in generate("run/model", count=10, length=200, seed=1):
        print(design.id, design.log_likelihood, design.sequence)
    for design in generate("run/model", "enzyme.fasta", mask="10-40", count=5):
        print(design.id, design.sequence)
    ```

    Arguments:
        model: its folder, its name, or opened; None for the bundled causal model, or with `sources` the masked one.
        sources: FASTA files with open positions.
        device, dtype, context: as in `LanguageModel.open`, for a folder.
        failures: gets number, name and reason of each design that fails and is left out; without it the first one raises.
        options: count and seed; those of `Drawing`; for new proteins prompt, length, or min_length and max_length, partner, spec,
            candidates and at_once, for redesign mask, steps, order and toks_per_batch, as `performers generate --help` says.

    Raises:
        InputError: an option or a file is not in order, or the model is not of the kind that it needs.
        UnsupportedError: the model cannot read partners.
        RunError: a design failed and nobody takes the failures.
    """
    given = [sources] if isinstance(sources, str) else list(sources)
    if not isinstance(model, LanguageModel):
        default = MASKED if given else CAUSAL
        model = LanguageModel.open(model, device=device, dtype=dtype, default=default, context=context)
    tool = _job(model, given, reference=(), **options).tool
    if isinstance(tool, Redesigner):
        return tool.designs(results_of(tool, tool.items(FastaReport()), failures))
    return tool.designs(results_of(tool, tool.items(FastaReport()), failures))


def generate_to(
    output: str | Path,
    sources: Sequence[str] = (),
    model: str | Path | None = None,
    *,
    reference: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    context: str | Path | None = None,
    dry_run: bool = False,
    restart: bool = False,
    **options: Any,
) -> Outcome:
    """`generate` into a FASTA file and a TSV beside it, resumed where it was interrupted.

    Arguments:
        output: the FASTA file.
        sources, model, device, dtype, context, options: as in `generate`.
        reference: FASTA sources to look for each design's nearest protein in; None for the bundled sample, empty for none.
        dry_run, restart: as in `run_tool`.

    Raises:
        InputError, UnsupportedError, RunError: as in `generate` and `run_tool`.
    """
    check_output(output)
    default = MASKED if sources else CAUSAL
    opened = LanguageModel.open(model, device=device, dtype=dtype, default=default, context=context)
    where = BUNDLED_REFERENCE if reference is None else tuple(reference)
    job = _job(opened, list(sources), reference=where, **options)
    if reference is None:
        print("Identities are to the bundled sample of Swiss-Prot; --reference gives other proteins.", file=sys.stderr)
    if job.remark is not None:
        print(job.remark, file=sys.stderr)
    tool: Any = job.tool
    return run_tool(tool, output, sources=job.sources, settings=job.settings, dry_run=dry_run, restart=restart)


def _job(model: LanguageModel, sources: list[str], *, reference: Sequence[str], **options: Any) -> _Job:
    """The tool for what was asked.

    Raises:
        InputError: an option belongs to the other kind of job, or there is no such option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    foreign = [name for name in given if name in (_OF_SAMPLING if sources else _OF_REDESIGN)]
    if foreign:
        option = f"--{foreign[0].replace('_', '-')}"
        raise InputError(
            f"{option} belongs to new proteins, and --input to redesign: expected one of them."
            if sources
            else f"{option} belongs to redesign: expected --input, the proteins to redesign."
        )
    drawing = Drawing(**{name: given.pop(name) for name in _DRAWING if name in given})
    references = _described(reference)
    if sources:
        tool = Redesigner(model, sources, drawing=drawing, reference=reference, inputs=references, **given)
        settings = {**given, **asdict(drawing), "steps": tool.steps, "order": tool.order, "reference": list(reference)}
        return _Job(tool, [*sources, *reference], settings, None)
    return _sampling(model, drawing, reference, references, given)


def _sampling(
    model: LanguageModel,
    drawing: Drawing,
    reference: Sequence[str],
    references: Sequence[InputFile],
    given: dict[str, Any],
) -> _Job:
    settings = {**given, **asdict(drawing), "reference": list(reference)}
    length = given.pop("length", None)
    shortest, longest = given.pop("min_length", None), given.pop("max_length", None)
    if length is not None and (shortest is not None or longest is not None):
        raise InputError(
            "--length is the exact number of residues: expected it alone, or --min-length and --max-length."
        )
    shortest, longest = (length, length) if length is not None else (shortest or 1, longest or MAX_LENGTH)
    partner, spec = given.pop("partner", None), given.pop("spec", None)
    if spec is not None and partner is None:
        raise InputError("--spec tells partners apart: expected --partner, their sequences.")
    report = FastaReport()
    partners = Partners() if partner is None else read_partners(partner, spec, report=report)
    inputs = [*report.inputs, *([] if spec is None else [_file(spec)])]
    tool = Sampler(
        model,
        min_length=shortest,
        max_length=longest,
        drawing=drawing,
        partners=partners,
        reference=reference,
        inputs=[*inputs, *references],
        **given,
    )
    sources = [path for path in (partner, spec) if path is not None]
    settings |= {"at_once": tool.at_once, "min_length": shortest, "max_length": longest}
    return _Job(tool, [*sources, *reference], settings, tool.partner_effect)


def _file(path: str) -> InputFile:
    return InputFile(path, Path(path).stat().st_size, sha256_of(Path(path)))


def _described(reference: Sequence[str]) -> list[InputFile]:
    """The reference files, once all of them have been read without an error."""
    if not reference:
        return []
    report = FastaReport()
    for _ in read_fasta(list(reference), report=report):
        pass
    return report.inputs
