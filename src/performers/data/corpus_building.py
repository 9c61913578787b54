"""From FASTA to a corpus folder, by one process or many, and on from where a build was cut off.

With several workers each input is read by one of them into streams of its own, a *part*; the main process joins the parts in the
order of the inputs and drops each when it is joined, so the disk never holds more than the corpus and a few parts. The corpus has
the same bytes whatever the number of workers. What is finished is kept when a build ends early: inputs that were joined, and
parts. The next build with these settings, of inputs that still have the same bytes, does none of it again.

Memory is that of one block and one record in each process, whatever the size of the inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from performers.data.alphabet import ENCODING_TABLE
from performers.data.corpus import Corpus
from performers.data.corpus_files import CorpusWriter, CountsOnly, Streams, note_progress, read_metadata, read_progress
from performers.data.fasta import MAX_LENGTH, FastaReport, OnInvalid, Source, locate, read_fasta
from performers.errors import FastaError, InputError, RunError
from performers.folders import check_unused, writing


def build_corpus(
    inputs: Source | Sequence[Source],
    folder: str | os.PathLike[str],
    *,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    workers: int = 1,
    progress: Callable[[FastaReport], None] | None = None,
) -> Corpus:
    """Read FASTA once and leave a corpus folder; continues a build of the same inputs that was cut off.

    Arguments:
        inputs: what `read_fasta` takes. Several inputs are several points from which a build can continue, and can be read at
            the same time.
        folder: where the corpus goes; must not exist, be empty, or hold the corpus of exactly these inputs, which is opened.
        max_length: see `read_fasta`.
        on_invalid: see `read_fasta`.
        workers: processes that read; the corpus has the same bytes with any number. A script that asks for more than one has
            to do so under `if __name__ == "__main__":`, as with all processes that Python starts.
        progress: called with the counts so far after every few megabytes, or after every input with several workers.

    Raises:
        FastaError: see `read_fasta`; the first that any worker finds ends the build.
        InputError: there are no workers, or several are to read standard input.
        OutputError: the folder is in use for something else or cannot be written.
        DiskFullError: there is no room; what was finished is kept beside the folder for the next attempt.
        RunError: a worker was killed; what was finished is kept likewise.
    """
    path = Path(folder)
    sources = _listed(inputs)
    # A missing input is found before anything is written.
    read_fasta(sources, max_length=max_length, on_invalid=on_invalid)
    if workers < 1:
        raise InputError(f"There are {workers} workers; expected at least 1.")
    if workers > 1 and any(os.fspath(source) == "-" for source in sources):
        raise InputError("Standard input cannot be read by several workers; expected files, or one worker.")
    settings: dict[str, Any] = {"max_length": max_length, "on_invalid": on_invalid}
    if (path / "corpus.json").exists() and _is_built_from(read_metadata(path), settings, sources):
        return Corpus.open(path)
    check_unused(path, "a new or empty folder, or the corpus of these inputs")
    with CorpusWriter(path, settings) as writer:
        known = writer.resume()
        finished = len(known)
        if not _are_the_first(known, sources):
            finished = 0
            writer.report = CountsOnly()
            writer.start_again()
        read = _read_all if workers == 1 or len(sources) - finished < 2 else _read_in_parts
        read(writer, sources, finished, workers, progress or (lambda report: None))
        if not writer.report.records:
            names = ", ".join(os.fspath(source) for source in sources)
            raise FastaError(f"{names}: all {writer.report.skipped:,} records were left out; expected one to remain.")
        writer.finish()
    return Corpus.open(path)


def is_corpus_of(
    inputs: Source | Sequence[Source], folder: str | os.PathLike[str], *, max_length: int, on_invalid: OnInvalid
) -> bool:
    """Whether a folder holds the corpus that `build_corpus` would build of these files as they are now."""
    settings: dict[str, Any] = {"max_length": max_length, "on_invalid": on_invalid}
    path = Path(folder)
    return (path / "corpus.json").exists() and _is_built_from(read_metadata(path), settings, _listed(inputs))


def _read_all(
    writer: CorpusWriter,
    sources: Sequence[Source],
    finished: int,
    workers: int,
    progress: Callable[[FastaReport], None],
) -> None:
    """Reads the inputs from number `finished` on, one after the other, in this process."""
    for number in range(finished, len(sources)):
        part = _part_of(sources[number], _part(writer, number), writer.settings)
        if part is not None:
            _join(writer, number, part)
            continue
        for wrote in _read(sources[number], writer.add, writer.report, writer.settings):
            if wrote:
                progress(writer.report)
        writer.finish_input()


def _read_in_parts(
    writer: CorpusWriter,
    sources: Sequence[Source],
    finished: int,
    workers: int,
    progress: Callable[[FastaReport], None],
) -> None:
    """Reads the inputs from number `finished` on, each into a part, and joins these in order."""
    done: dict[int, FastaReport] = {}
    following = finished
    with _workers(min(workers, len(sources) - finished)) as executor:
        futures = {
            executor.submit(_read_part, source, _part(writer, number), writer.settings): number
            for number, source in enumerate(sources[finished:], start=finished)
        }
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                while following in done:
                    _join(writer, following, done.pop(following))
                    progress(writer.report)
                    following += 1
        except BrokenProcessPool as error:
            raise RunError(
                "A worker of the build was killed, as happens when memory runs out; what was finished is kept, and the same "
                "command goes on."
            ) from error


@contextlib.contextmanager
def _workers(number: int) -> Generator[ProcessPoolExecutor]:
    """Processes that end at once when the block is left early or this process dies, whatever they are doing."""
    context = multiprocessing.get_context("spawn")
    # Nothing is ever sent: a worker sees the other end close, and this process alone holds that end.
    lifeline, held = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(number, mp_context=context, initializer=_depend_on, initargs=(lifeline,))
    try:
        yield executor
    finally:
        held.close()
        executor.shutdown(cancel_futures=True)
        lifeline.close()


def _depend_on(lifeline: Connection) -> None:
    """Makes this process end when the other end of `lifeline` is closed."""

    def watch() -> None:
        with contextlib.suppress(EOFError):
            lifeline.recv_bytes()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt goes to the whole group; the main process answers it
    threading.Thread(target=watch, daemon=True).start()


def _read_part(source: Source, folder: Path, settings: dict[str, Any]) -> FastaReport:
    """Reads one input into streams in a folder of their own, unless that was done before; what there is to report of it."""
    earlier = _part_of(source, folder, settings)
    if earlier is not None:
        return earlier
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    streams, report = Streams(folder), CountsOnly()
    for _ in _read(source, streams.add, report, settings):
        pass
    streams.sync()
    note_progress(streams, settings, report)
    return report


def _read(
    source: Source, add: Callable[[bytes, str, str], bool], report: FastaReport, settings: dict[str, Any]
) -> Iterator[bool]:
    """Adds the proteins of one input; yields what `add` says."""
    for record in read_fasta(source, report=report, **settings):
        yield add(record.sequence.encode("ascii").translate(ENCODING_TABLE), record.id, record.description)


def _join(writer: CorpusWriter, number: int, report: FastaReport) -> None:
    """Adds a part that is complete to the corpus, and drops it when that is on the disk."""
    folder = _part(writer, number)
    writer.append(folder, report)
    writer.finish_input()
    with writing(folder):
        shutil.rmtree(folder)


def _part(writer: CorpusWriter, number: int) -> Path:
    return writer.building / f"part-{number:06d}"


def _part_of(source: Source, folder: Path, settings: dict[str, Any]) -> FastaReport | None:
    """What was reported of a part, if it is complete and of this input as it is now."""
    state = read_progress(folder, settings)
    if state is None or not _are_the_first(state["report"]["inputs"], [source]):
        return None
    return CountsOnly.from_dict(state["report"])


def _listed(inputs: Source | Sequence[Source]) -> list[Source]:
    return [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)


def _is_built_from(metadata: dict[str, Any], settings: dict[str, Any], sources: Sequence[Source]) -> bool:
    known = metadata.get("report", {}).get("inputs", [])
    return metadata.get("settings") == settings and len(known) == len(sources) and _are_the_first(known, sources)


def _are_the_first(inputs: Sequence[Mapping[str, Any]], sources: Sequence[Source]) -> bool:
    """Whether what was read before is, byte for byte, the first of `sources`."""
    return len(inputs) <= len(sources) and all(map(_is_the_same, inputs, sources))


def _is_the_same(known: Mapping[str, Any], source: Source) -> bool:
    path = locate(os.fspath(source))
    if path is None or not path.is_file() or path.stat().st_size != known["num_bytes"]:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == known["sha256"]
