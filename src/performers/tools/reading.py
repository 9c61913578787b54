"""`read`: proteins and states in, one state out.

`read_to` is what the command runs. It reads the proteins, adds and subtracts the states it is given, and writes one file at the
end, so an interruption leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performers.data import FastaReport
from performers.errors import InputError, OutputError
from performers.tools.context_states import ContextState, read_context
from performers.tools.language_model import LanguageModel


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
    **options: Any,
) -> ReadOutcome:
    """Read proteins into a state, and add and subtract others.

    Arguments:
        output: the file to write.
        sources: files, "-" or "bundled:NAME"; may be empty where there are states to add, and then no model is opened.
        model: a folder or the name of a bundled model.
        add, subtract: files that this function wrote.
        device, dtype: as in `LanguageModel.open`.
        restart: replace the output if it is there.
        options: those of `read_context`.

    Raises:
        InputError: nothing to read, a file that is no state, states of different models; OutputError: the output is in use.
        UnsupportedError, RunError: as in `read_context`.
    """
    path = Path(output)
    if path.exists() and not restart:
        raise OutputError(f"{path} is already there; --restart replaces it.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: its folder is not there.")
    added, taken = [ContextState.read(file) for file in add], [ContextState.read(file) for file in subtract]
    report, failed, remarks = FastaReport(), list[tuple[int, str, str]](), list[str]()
    if sources:
        opened = LanguageModel.open(model, device=device, dtype=dtype)
        for state in (*added, *taken):
            state.for_model(opened)
        read = read_context(opened, list(sources), report=report, failures=failed, **options)
        remarks = [*report.remarks(), *read.remarks(opened)]
        added = [read, *added]
    if not added:
        raise InputError("There is nothing to read: expected proteins, or states to add.")
    total, *others = added
    for state in others:
        total = total + state
    for state in taken:
        total = total - state
    total.write(path, overwrite=restart)
    return ReadOutcome(path, total, failed, remarks, report.to_dict()["inputs"])
