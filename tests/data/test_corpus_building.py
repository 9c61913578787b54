"""Corpora from many files by many processes: the same bytes, and nothing done twice."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from performers.data import Corpus, FastaReport, build_corpus, corpus_building, corpus_files
from performers.errors import FastaError, InputError, RunError

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Six files of some 200 proteins each, of which some identifiers occur twice, every other one compressed."""
    made: list[Path] = []
    for part in range(6):
        text = "".join(
            f">p{i % 150}-{part % 4} protein {i}\n{(LETTERS * 20)[i % 20 :][: 37 * i % 300 + 1]}\n"
            for i in range(200 + part)
        )
        path = tmp_path / f"shard-{part}.fasta{'.gz' if part % 2 else ''}"
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if part % 2 else text.encode())
        made.append(path)
    return made


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def read_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that this process reads from now on."""
    names: list[str] = []
    read = corpus_building._read

    def noted(source: Any, *others: Any) -> Any:
        names.append(Path(source).name)
        return read(source, *others)

    monkeypatch.setattr(corpus_building, "_read", noted)
    return names


def test_any_number_of_workers_leaves_the_same_bytes(tmp_path: Path, shards: list[Path]) -> None:
    build_corpus(shards, tmp_path / "one")
    reports: list[int] = []
    build_corpus(shards, tmp_path / "three", workers=3, progress=lambda report: reports.append(report.records))
    assert digest(tmp_path / "three") == digest(tmp_path / "one")
    assert reports == [200, 401, 603, 806, 1010, 1215]
    assert not (tmp_path / ".three.building").exists()


def test_repeated_identifiers_are_counted_in_spans_of_their_hashes(
    tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_files, "_HASHES_AT_ONCE", 16)
    corpus = build_corpus(shards, tmp_path / "corpus")
    seen: set[str] = set()
    repeated: list[str] = []
    for record in corpus.records():
        (repeated.append if record.id in seen else seen.add)(record.id)
    report = FastaReport.from_dict(corpus.metadata["report"])
    assert (report.duplicates, report.duplicate_ids) == (len(repeated), repeated[:10])


def test_a_bad_record_is_named_with_its_file_and_the_other_files_are_not_read_again(
    tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_corpus(shards, tmp_path / "whole")
    good = shards[4].read_text()
    shards[4].write_text(good + ">bad\nMK*\n")
    with pytest.raises(FastaError, match=r"shard-4\.fasta, record 205 \(bad\), residue 3"):
        build_corpus(shards, tmp_path / "corpus", workers=2)
    shards[4].write_text(good)
    kept = {f"shard-{number}" for number in range(6) if _is_kept(tmp_path / ".corpus.building", number)}
    assert len(kept) >= 3
    names = read_by(monkeypatch)
    build_corpus(shards, tmp_path / "corpus")
    assert "shard-4.fasta" in names
    assert not kept & {name.partition(".")[0] for name in names}
    assert digest(tmp_path / "corpus") == digest(tmp_path / "whole")


def _is_kept(building: Path, number: int) -> bool:
    """Whether input number `number` was joined, or its part is complete."""
    state = corpus_files.read_progress(building, {"max_length": 10_000_000, "on_invalid": "error"})
    joined = 0 if state is None else len(state["report"]["inputs"])
    return number < joined or (building / f"part-{number:06d}" / "progress.json").exists()


BUILD = """
import sys
from performers.data import build_corpus
if __name__ == "__main__":
    build_corpus(sys.argv[2:], sys.argv[1], workers=2)
"""


def test_a_killed_build_leaves_no_process_behind_and_goes_on(
    tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_corpus(shards, tmp_path / "whole")
    # One worker waits for ever, for the text that nobody writes into the pipe; the other reads the rest.
    waiting = tmp_path / "waiting.fasta"
    os.mkfifo(waiting)
    inputs = [str(path) for path in (*shards[:3], waiting, *shards[4:])]
    child = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path / "corpus"), *inputs])
    building = tmp_path / ".corpus.building"
    _wait_until(lambda: all(_is_kept(building, number) for number in (0, 1, 2, 4, 5)))
    workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    assert len(workers) >= 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    _wait_until(lambda: not any(_is_alive(pid) for pid in workers))
    names = read_by(monkeypatch)
    build_corpus(shards, tmp_path / "corpus")
    assert names == [shards[3].name]
    whole, corpus = digest(tmp_path / "whole"), digest(tmp_path / "corpus")
    assert {name: corpus[name] for name in corpus if name != "corpus.json"} == {
        name: whole[name] for name in whole if name != "corpus.json"
    }


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_is_killed_ends_the_build_with_a_sentence(tmp_path: Path, shards: list[Path]) -> None:
    waiting = tmp_path / "waiting.fasta"
    os.mkfifo(waiting)

    def kill_one() -> None:
        _wait_until(lambda: _is_kept(tmp_path / ".corpus.building", 0))
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RunError, match="A worker of the build was killed"):
        build_corpus([shards[0], waiting, shards[1]], tmp_path / "corpus", workers=2)
    killer.join()
    assert not (tmp_path / "corpus").exists()


def test_standard_input_has_one_reader(tmp_path: Path, shards: list[Path]) -> None:
    with pytest.raises(InputError, match="Standard input cannot be read by several workers"):
        build_corpus([shards[0], "-"], tmp_path / "corpus", workers=2)
    with pytest.raises(InputError, match="0 workers"):
        build_corpus(shards, tmp_path / "corpus", workers=0)


def test_the_command_builds_what_pretraining_reads(tmp_path: Path, shards: list[Path]) -> None:
    arguments = ["-i", *(str(path) for path in shards[:1]), "-i", str(shards[1]), "-o", str(tmp_path / "corpus")]
    command = [sys.executable, "-m", "performers", "corpus", "build", *arguments, "--workers", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    corpus = Corpus.open(tmp_path / "corpus")
    assert f'"proteins": {len(corpus)}' in done.stdout
    assert len(corpus) == 401
