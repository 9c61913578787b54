"""What stands beside a tool's output: the record of the run that made it, the methods text, the list of what failed.

`run.json` and `cite.bibtex` are written by `performers.training.runs.RunRecord`; here is where they go, what is written next to
them, and how a later run of the same command finds that there is nothing left to do. A file that was there before is never
replaced: what a run puts beside its output is noted in the folder of its unfinished work, and in its record when it is done.
Nothing here knows what an output holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from performers.errors import OutputError
from performers.folders import building_folder, write_file, writing
from performers.tools.work import BESIDE, describe_sources

_RECORD = ("run.json", "cite.bibtex", "methods.txt", "failed.tsv")


def record_folder(output: Path, *, makes_folder: bool = False) -> Path:
    """Where the record of an output goes: into it or beside it, but never over what something or somebody else wrote.

    Raises:
        OutputError: there is no place for it, neither beside the output nor in `NAME.record`.
    """
    if makes_folder:
        return output
    places = _places(output)
    noted = noted_beside(output)

    def is_free(place: Path) -> bool:
        taken = [name for name in _RECORD if (place / name).exists()]
        return "run.json" not in taken and noted.issuperset(_noted_as(output, place, taken))

    ours = [place for place in places if _results_in(place, output) is not None]
    place = next(iter([*ours, *filter(is_free, places)]), None)
    if place is None:
        raise OutputError(f"{places[-1]} holds what is no record of {output}; move it, or choose another output.")
    note_beside(output, _noted_as(output, place, _RECORD))
    return place


def _places(output: Path) -> tuple[Path, Path]:
    """The folders that may hold an output's record, the preferred one first."""
    beside = output.absolute().parent
    return beside, beside / f"{output.name}.record"


def _results_in(folder: Path, output: Path) -> dict[str, Any] | None:
    """The results in the record in a folder, if it is of this output."""
    try:
        results = json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]
        return results if Path(results["output"]).name == output.name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _noted_as(output: Path, folder: Path, names: Iterable[str]) -> set[str]:
    """Names in a folder, as they are seen from beside the output."""
    return {(folder / name).relative_to(output.absolute().parent).as_posix() for name in names}


def noted_beside(output: Path) -> set[str]:
    """The names that unfinished work has, or was about to have, beside its output."""
    try:
        return set(json.loads((building_folder(output) / BESIDE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return set()


def note_beside(output: Path, names: Iterable[str]) -> None:
    """Note names before files get them, so that a run that goes on after a kill knows them as its own."""
    folder, known, new = building_folder(output), noted_beside(output), set(names)
    if folder.is_dir() and not known.issuperset(new):
        write_file(folder / BESIDE, json.dumps(sorted(known | new)))


def files_beside(output: Path) -> list[str]:
    """The names of the files beside an output that it came with, besides its record."""
    names = noted_beside(output)
    for place in _places(output):
        names.update((_results_in(place, output) or {}).get("files", []))
    names.difference_update({output.name, *_RECORD})
    return sorted(name for name in names if "/" not in name and output.with_name(name).is_file())


def check_beside(output: Path, names: Iterable[str]) -> None:
    """Refuse to replace files that did not come with this output.

    Arguments:
        output: the file or folder that is to be.
        names: of the files that are to stand beside it.

    Raises:
        OutputError: one of them is there already, and no earlier run that made the output wrote it.
    """
    for name in sorted(set(names).difference(files_beside(output))):
        path = output.with_name(name)
        if path.exists():
            raise OutputError(
                f"{path} is there already, and was not made with {output}: it would be replaced; move it, or choose another "
                "output."
            )


def write_beside(folder: Path, methods: str, failed: Sequence[tuple[int, str, str]], tally: str) -> None:
    """Write what stands beside the record of an output; to be called before the record is written.

    Arguments:
        folder: where the record goes; made if it is not there.
        methods: what was done, fit for a methods section.
        failed: number, identifier and reason of each item that failed; says so if there are any.
        tally: how many that are, as in "2 of 12 proteins failed".
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "methods.txt", methods + "\n")
    path = folder / "failed.tsv"
    if failed:
        rows = [f"{number}\t{_in_a_cell(name)}\t{_in_a_cell(reason)}\n" for number, name, reason in failed]
        write_file(path, "number\tid\treason\n" + "".join(rows))
        say(f"{tally}; {path} says why.")
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
