"""`read`: proteins and states in, one state out.

`read_to` is what the command runs. It reads the proteins, adds and subtracts the states it is given, and writes one file, with
`run.json`, `cite.bibtex`, `methods.txt` and, if some proteins failed, `failed.tsv` beside it. On the way, the sum of the proteins
that have been read is kept in the hidden folder `.NAME.building`, and the same command goes on from it after a kill. Any sum that
is kept is one that an undisturbed run comes by, so both end with the same bytes. Of what comes through a pipe nothing is kept: it
cannot be read twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from performers import __version__
from performers.data import MAX_LENGTH, FastaReport
from performers.data.fasta import OnInvalid, locate
from performers.errors import InputError, OutputError
from performers.tools.beside import read_failed, record_folder, results_before, say, write_beside
from performers.tools.context_states import ContextState, chains_of, model_hash, running_sums
from performers.tools.language_model import LanguageModel
from performers.tools.proteins import read_proteins
from performers.tools.work import Work, describe_sources
from performers.training.runs import RunRecord, describe_file

KEEP_EVERY = 2_000_000  # residues: what a killed run reads again at most
TELL_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class ReadOutcome:
    """What became of a run.

    Attributes:
        output: the file.
        state: what it holds.
        failed: number, identifier and reason of each protein that was left out.
        remarks: what a user should be told.
        inputs: the files that were read, with their SHA-256.
    """

    output: Path
    state: ContextState
    failed: list[tuple[int, str, str]]
    remarks: list[str]
    inputs: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The figures, fit for JSON."""
        return {
            "output": str(self.output),
            "bytes": self.output.stat().st_size,
            **self.state.to_dict(),
            "failed": len(self.failed),
            "remarks": self.remarks,
            "inputs": self.inputs,
        }


def read_to(
    output: str | Path,
    sources: Sequence[str],
    model: str | Path | None = None,
    *,
    add: Sequence[str | Path] = (),
    subtract: Sequence[str | Path] = (),
    device: str = "auto",
    dtype: str = "auto",
    restart: bool = False,
    toks_per_batch: int = 16_384,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
) -> ReadOutcome:
    """Read proteins into a state, and add and subtract others, going on with what an earlier run of the same command left.

    Arguments:
        output: the file to write.
        sources: files, "-" or "bundled:NAME"; may be empty where there are states to add, and then no model is opened.
        model: a folder or the name of a bundled model.
        add, subtract: files that this function wrote.
        device, dtype: as in `LanguageModel.open`.
        restart: forget what an earlier run left, and replace the output if it is there.
        toks_per_batch, max_length, on_invalid: as in `read_context`.

    Raises:
        InputError: nothing to read, a file that is no state, states of different models.
        OutputError: the output is there and was made otherwise, or another process is at it.
        UnsupportedError, RunError: as in `read_context`.
    """
    path = Path(output)
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: its folder is not there.")
    added, taken = [ContextState.read(file) for file in add], [ContextState.read(file) for file in subtract]
    opened = LanguageModel.open(model, device=device, dtype=dtype) if sources else None
    if opened is not None:
        for state in (*added, *taken):
            state.for_model(opened)
    elif not added:
        raise InputError("There is nothing to read: expected proteins, or states to add.")
    options: dict[str, Any] = {"toks_per_batch": toks_per_batch, "max_length": max_length, "on_invalid": on_invalid}
    reading = {
        "version": __version__,
        "model": added[0].model if opened is None else model_hash(opened),
        "device": "cpu" if opened is None else str(opened.device),
        "dtype": "float32" if opened is None else str(opened.dtype).removeprefix("torch."),
        **options,
    }
    settings = {**reading, "add": [*map(describe_file, add)], "subtract": [*map(describe_file, subtract)]}
    work = Work(path, settings, sources)
    kept = _Kept(work.folder, reading, sources)
    with work.claimed(wait=False), _tidy(work, kept):
        before = None if restart else kept.load()
        folder = record_folder(path)
        if before is None and path.exists() and not restart:
            results = results_before(path, folder, settings, sources)
            state = ContextState.read(path)
            return ReadOutcome(path, state, read_failed(folder), results["remarks"], results["inputs"])
        if before is None:
            kept.forget()
        record = RunRecord(
            folder,
            "read",
            arguments={**settings, "input": list(sources), "output": str(path)},
            seed=None,
            device=reading["device"],
            announce=False,  # the folder may hold the record of an earlier run until this one is done
        )
        with record:
            report, failed, remarks = FastaReport(), list[tuple[int, str, str]](), list[str]()
            if opened is not None:
                whole = _read(opened, sources, report, kept, before, **options)
                failed, remarks = (
                    sorted([*report.left_out, *whole.failed]),
                    [*report.remarks(), *whole.state.remarks(opened)],
                )
                added = [whole.state, *added]
                for file in opened.weights:
                    record.weights(file)
            total, *others = added
            for state in others:
                total = total + state
            for state in taken:
                total = total - state
            total.write(path, overwrite=True)
            outcome = ReadOutcome(path, total, failed, remarks, report.to_dict()["inputs"])
            record.inputs(outcome.inputs)
            record.results(fingerprint=settings, **outcome.to_dict())
            asked = report.records + len(report.left_out)
            methods = _methods(total, opened, asked - len(failed), add, subtract)
            write_beside(folder, methods, failed, f"{len(failed):,} of {asked:,} proteins failed")
        kept.forget()
        return outcome


@dataclass(frozen=True)
class _Sum:
    """What the first chains left behind, and number, identifier and reason of the proteins among them that failed."""

    chains: int
    state: ContextState
    failed: list[tuple[int, str, str]]


class _Kept:
    """The sum of the chains so far, in a file that only a run of the same settings and inputs goes on from.

    Attributes:
        can_keep: whether the inputs can be read again; otherwise nothing is kept.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], sources: Sequence[str]) -> None:
        self._path = folder / "sum.safetensors"
        files = [locate(source) for source in sources]
        self.can_keep = all(file is not None and file.is_file() for file in files)
        self._settings = {**settings, "input": describe_sources(sources)} if self.can_keep else {}

    @property
    def exists(self) -> bool:
        """Whether there is such a file, of whatever run."""
        return self._path.exists()

    def save(self, so_far: _Sum) -> None:
        """Keep a sum instead of the one before, whole and durable."""
        if self.can_keep:
            notes = {"settings": self._settings, "chains": so_far.chains, "failed": so_far.failed}
            so_far.state.write(self._path, overwrite=True, notes=notes)

    def load(self) -> _Sum | None:
        """What an earlier run of the same command kept; says why, if something is there and not used."""
        if not self.can_keep or not self.exists:
            return None
        try:
            state, notes = ContextState.read_with_notes(self._path)
        except InputError as error:
            say(f"What an earlier run kept is not used: {error}")
            return None
        different = [key for key, value in self._settings.items() if notes["settings"].get(key) != value]
        if different:
            say(f"What is kept in {self._path.parent} is not used: it was read with another {', '.join(different)}.")
            return None
        return _Sum(notes["chains"], state, [(number, name, reason) for number, name, reason in notes["failed"]])

    def forget(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


@contextmanager
def _tidy(work: Work, kept: _Kept) -> Iterator[None]:
    """Says what is kept when a block is interrupted; where that is nothing in the end, the folder goes as well."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not kept.can_keep:
            say("Nothing is kept: what comes through a pipe cannot be read again.")
        elif kept.exists:
            say(f"The sum of what was read is kept in {work.folder}; the same command goes on.")
        raise
    finally:
        if not kept.exists:
            work.forget()


def _read(
    model: LanguageModel,
    sources: Sequence[str],
    report: FastaReport,
    kept: _Kept,
    before: _Sum | None,
    *,
    toks_per_batch: int,
    max_length: int,
    on_invalid: OnInvalid,
) -> _Sum:
    """The sum of all chains of the sources, going on from that of the first ones."""
    proteins = read_proteins(list(sources), max_length=max_length, on_invalid=on_invalid, report=report)
    start, state, failed = (0, None, []) if before is None else (before.chains, before.state, before.failed[:])
    if state is not None:
        say(f"{state.proteins:,} proteins, {state.residues:,} residues were read before.")
    so_far, residues_kept, tell = before, 0 if state is None else state.residues, _teller(state)
    try:
        chains = islice(chains_of(proteins), start, None)
        for read, total in running_sums(model, chains, toks_per_batch=toks_per_batch, failures=failed, before=state):
            so_far = _Sum(start + read, total, failed[:])
            tell(total)
            if total.residues - residues_kept >= KEEP_EVERY:
                kept.save(so_far)
                residues_kept = total.residues
    finally:
        # The last one as well: with it, a run killed while it writes the output has nothing to read again.
        if so_far is not None:
            kept.save(so_far)
    assert so_far is not None  # else running_sums has raised
    return so_far


def _teller(before: ContextState | None) -> Callable[[ContextState], None]:
    """Says now and then, on stderr, how far the reading is that began after some proteins."""
    started = last = time.monotonic()
    residues_before = 0 if before is None else before.residues

    def tell(state: ContextState) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= TELL_EVERY:
            last = now
            rate = (state.residues - residues_before) / (now - started)
            say(f"{state.proteins:,} proteins  {state.residues:,} residues  {rate:,.0f} residues/s")

    return tell


def _methods(
    total: ContextState, model: LanguageModel | None, proteins: int, add: Sequence[Any], subtract: Sequence[Any]
) -> str:
    """Two sentences."""
    changes = "".join(
        f", those in {', '.join(map(str, files))} were {what}"
        for files, what in ((add, "added"), (subtract, "taken out"))
        if files
    )
    result = f"a context of {total.proteins:,} proteins ({total.residues:,} residues)"
    if model is None:
        return (
            f"The states that proteins leave behind in the FAVOR attention of the protein language model {total.model_name} "
            f"were combined with performers {__version__}{changes}. The result is {result}."
        )
    return (
        f"{proteins:,} proteins were read with performers {__version__} by the protein language model {model.name} "
        f"({model.num_parameters:,} parameters), each whole and alone, in {str(model.dtype).removeprefix('torch.')}. "
        f"The states that they left behind in its FAVOR attention were summed{changes}, which makes {result}."
    )
