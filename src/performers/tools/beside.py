"""What stands beside a tool's output: the record of the run that made it, the methods text, the list of what failed.

`run.json` and `cite.bibtex` are written by `performers.training.runs.RunRecord`; here is where they go, what is written next to
them, and how a later run of the same command finds that there is nothing left to do. Nothing here knows what an output holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from performers.errors import OutputError
from performers.folders import write_file, writing
from performers.tools.work import describe_sources


def record_folder(output: Path, *, makes_folder: bool = False) -> Path:
    """Where the record of an output goes: into it or beside it, but never over the record of something else."""
    if makes_folder:
        return output
    beside = output.absolute().parent
    try:
        content = json.loads((beside / "run.json").read_text(encoding="utf-8"))
        mine = Path(content["results"]["output"]).name == output.name
    except FileNotFoundError:
        mine = True
    except (OSError, ValueError, KeyError, TypeError):
        mine = False
    if not mine:
        beside = beside / f"{output.name}.record"
    with writing(beside):
        beside.mkdir(parents=True, exist_ok=True)
    return beside


def write_beside(folder: Path, methods: str, failed: Sequence[tuple[int, str, str]], total: str) -> None:
    """Write what stands beside the record of an output.

    Arguments:
        folder: where the record is.
        methods: what was done, fit for a methods section.
        failed: number, identifier and reason of each item that failed; says so if there are any.
        total: of how many, as in "12 proteins".
    """
    write_file(folder / "methods.txt", methods + "\n")
    path = folder / "failed.tsv"
    if failed:
        rows = [f"{number}\t{_in_a_cell(name)}\t{_in_a_cell(reason)}\n" for number, name, reason in failed]
        write_file(path, "number\tid\treason\n" + "".join(rows))
        say(f"{len(failed):,} of {total} failed; {path} says why.")
    else:
        path.unlink(missing_ok=True)


def read_failed(folder: Path) -> list[tuple[int, str, str]]:
    """Number, identifier and reason of each item that failed, as `write_beside` wrote them."""
    path = folder / "failed.tsv"
    if not path.is_file():
        return []
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [(int(number), name, reason) for number, name, reason in rows]


def results_before(output: Path, folder: Path, settings: dict[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """The results of the run that made an output, if it was of these settings and sources; says that there is nothing to do.

    Arguments:
        output: the file or folder that is there.
        folder: where its record is.
        settings: what the record's results have as their `fingerprint`.
        sources: the files that the items come from.

    Raises:
        OutputError: it was of others, or there is no record of it.
    """
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        results: dict[str, Any] = content["results"]
        same = results["fingerprint"] == settings and content["inputs"] == describe_sources(sources)
    except (OSError, ValueError, KeyError, TypeError):
        same, results = False, {}
    if not same:
        raise OutputError(f"{output} is already there, of other settings or inputs; --restart replaces it.")
    say(f"{output} is complete; --restart makes it again.")
    return results


def say(text: str) -> None:
    """Tell the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _in_a_cell(text: str) -> str:
    return " ".join(text.split())
