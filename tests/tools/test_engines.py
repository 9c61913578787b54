"""The same work in one process, in many, or on a cluster: each record once, and the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from performers.errors import InputError, MissingExtraError, OutputError
from performers.tools import embed_to, engine, score_to, work
from performers.tools.tool import Outcome, Tool

Start = Callable[..., BaseProcess]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The number of threads decides the last bits, and workers have as many as this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of one to three proteins."""
    monkeypatch.setattr(Tool, "shard_tokens", 60)


@pytest.fixture
def whole(masked: Path, fasta: Path, tmp_path: Path, small_shards: None) -> str:
    """The digest of what one process makes."""
    embed(masked, fasta, tmp_path / "whole" / "e.h5")
    return digest(tmp_path / "whole" / "e.h5")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def embed(model: Path, fasta: Path, output: Path, **options: Any) -> Outcome:
    return embed_to(output, [str(fasta)], model, include=("mean", "per_tok"), device="cpu", **options)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the shards that this process saves."""
    numbers: list[int] = []
    save = work.Work.save

    def noted(self: work.Work, index: int, results: Any) -> None:
        save(self, index, results)
        numbers.append(index)

    monkeypatch.setattr(work.Work, "save", noted)
    return numbers


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_share_the_shards_and_the_last_one_writes_the_bytes_of_one_process(
    masked: Path, fasta: Path, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch, saved: list[int], order: Any
) -> None:
    output = tmp_path / "ranks" / "e.h5"
    shares: dict[int, list[int]] = {}
    for place, rank in enumerate(order):
        as_rank(monkeypatch, rank, 3)
        outcome = embed(masked, fasta, output)  # under torchrun, "auto" is "rank"
        assert outcome.done == output.exists() == (place == 2)
        shares[rank] = saved.copy()
        saved.clear()
    assert sorted(index for share in shares.values() for index in share) == list(range(sum(map(len, shares.values()))))
    assert {rank: {index % 3 for index in share} for rank, share in shares.items()} == {0: {0}, 1: {1}, 2: {2}}
    assert digest(output) == whole
    assert not (tmp_path / "ranks" / ".e.h5.building").exists()
    # A task that comes late finds nothing to do.
    as_rank(monkeypatch, 1, 3)
    assert embed(masked, fasta, output, engine="rank").done
    assert not saved
    assert not (tmp_path / "ranks" / ".e.h5.building").exists()


def test_a_rank_that_was_killed_does_what_it_had_not_and_no_more(
    masked: Path,
    fasta: Path,
    tmp_path: Path,
    whole: str,
    monkeypatch: pytest.MonkeyPatch,
    saved: list[int],
    start: Start,
) -> None:
    output = tmp_path / "ranks" / "e.h5"
    arguments = {"sources": [str(fasta)], "model": masked, "include": ("mean", "per_tok"), "device": "cpu"}
    as_rank(monkeypatch, 0, 2)
    child = start("run_as_rank_and_die", {"output": output, **arguments}, 0, 2, 2, 60)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    done = {int(path.stem) for path in (tmp_path / "ranks" / ".e.h5.building").glob("*.safetensors")}
    assert done == {0, 2}
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        embed(masked, fasta, output)
    assert not done & set(saved)
    assert len(saved) == len(set(saved))
    assert digest(output) == whole


def test_processes_at_the_same_time_write_each_record_once(
    masked: Path, fasta: Path, tmp_path: Path, whole: str, start: Start
) -> None:
    output = tmp_path / "ranks" / "e.h5"
    arguments = {"sources": [str(fasta)], "model": masked, "include": ("mean", "per_tok"), "device": "cpu"}
    children = [start("run_as_rank", {"output": output, **arguments}, rank, 3, 60) for rank in range(3)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert digest(output) == whole
    assert not (tmp_path / "ranks" / ".e.h5.building").exists()


def test_one_process_goes_on_with_what_ranks_have_left(
    masked: Path, fasta: Path, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch, saved: list[int]
) -> None:
    as_rank(monkeypatch, 1, 2)
    assert not embed(masked, fasta, tmp_path / "x" / "e.h5").done
    ranks = saved.copy()
    embed(masked, fasta, tmp_path / "x" / "e.h5", engine="local")
    assert len(saved) == len(set(saved)) > len(ranks) > 0
    assert digest(tmp_path / "x" / "e.h5") == whole


def test_a_slurm_array_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="finds neither RANK"):
        engine.choose_engine("rank")
    for name, value in {"ID": "7", "COUNT": "4", "MIN": "3", "STEP": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert engine.choose_engine("auto") == engine.LOCAL
    assert engine.choose_engine("rank") == engine.Engine("rank", rank=2, size=4)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "12")
    with pytest.raises(InputError, match="expected an array without gaps"):
        engine.choose_engine("rank")
    with pytest.raises(InputError, match="--workers is for --engine ray"):
        engine.choose_engine("local", 3)


def test_ranks_do_not_start_anew_each_on_its_own(
    masked: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(InputError, match="each would start anew"):
        embed(masked, fasta, tmp_path / "e.h5", restart=True)
    assert os.listdir(tmp_path) == []


def test_two_commands_do_not_make_one_output(masked: Path, fasta: Path, tmp_path: Path) -> None:
    with (
        work.Work(tmp_path / "e.h5", {}, []).claimed(wait=False),
        pytest.raises(OutputError, match="is being made by another process"),
    ):
        embed(masked, fasta, tmp_path / "e.h5")


def test_variants_are_scored_by_ranks_as_by_one_process(
    masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    def score(output: Path) -> Outcome:
        return score_to(output, "MKTAYIAKQRQISFVKSHFSRQ", masked, heat_map=False, device="cpu")

    score(tmp_path / "whole" / "s.csv")
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        score(tmp_path / "ranks" / "s.csv")
    assert digest(tmp_path / "ranks" / "s.csv") == digest(tmp_path / "whole" / "s.csv")


# -- Ray


def test_without_ray_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'performers\[ray\]'"):
        engine.choose_engine("ray")


@pytest.fixture(scope="module")
def ray() -> Any:
    module = pytest.importorskip("ray", reason="Ray is not installed: pip install 'performers[ray]'")
    module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield module
    module.shutdown()


def workers() -> list[int]:
    """The Ray workers among this process's descendants that have begun to read; other clusters of the machine have their own."""
    found: list[int] = []
    unseen = [os.getpid()]
    while unseen:
        process = Path("/proc", str(unseen.pop()))
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::_Worker"):
                found.append(int(process.name))
            for children in process.glob("task/*/children"):
                unseen += map(int, children.read_text().split())
    return found


def test_ray_workers_make_the_bytes_of_one_process_though_one_is_killed(
    ray: Any, masked: Path, fasta: Path, tmp_path: Path, whole: str, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    save = work.Work.save

    def and_kill(self: work.Work, index: int, results: Any) -> None:
        save(self, index, results)
        if len(saved) == 3:
            killed.append(workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(work.Work, "save", and_kill)
    outcome = embed(masked, fasta, tmp_path / "ray" / "e.h5", engine="ray", workers=2)
    assert outcome.done
    assert len(killed) == 1
    assert sorted(saved) == list(range(len(saved)))
    assert digest(tmp_path / "ray" / "e.h5") == whole


@pytest.mark.slow
def test_scores_can_be_made_on_ray(ray: Any, masked: Path, tmp_path: Path, small_shards: None) -> None:
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
        score_to(
            tmp_path / name / "s.csv",
            "MKTAYIAKQRQISFVKSHFSRQ",
            masked,
            heat_map=False,
            device="cpu",
            engine=name,  # type: ignore[arg-type]
        )
    assert digest(tmp_path / "ray" / "s.csv") == digest(tmp_path / "local" / "s.csv")


@pytest.mark.slow
def test_what_goes_wrong_in_a_worker_is_said_as_it_is_here(
    ray: Any, masked: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    compute = engine._compute_with_ray

    def with_another_model(tool: Any, *others: Any) -> Any:
        monkeypatch.setattr(type(tool.model), "fingerprint", lambda self: {"model": "another"})
        return compute(tool, *others)

    monkeypatch.setattr(engine, "_compute_with_ray", with_another_model)
    with pytest.raises(InputError, match="holds another model on"):
        embed(masked, fasta, tmp_path / "e.h5", engine="ray", workers=1)
    # What was planned is kept, and one process can go on.
    monkeypatch.undo()
    monkeypatch.setattr(Tool, "shard_tokens", 60)
    assert (tmp_path / ".e.h5.building" / "plan.json").exists()


@pytest.mark.slow
def test_the_command_starts_a_cluster_of_its_own(masked: Path, fasta: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'performers[ray]'")
    command = [sys.executable, "-m", "performers", "embed", "-i", str(fasta), "--model", str(masked), "--device", "cpu"]
    options = ["-o", str(tmp_path / "e.npz"), "--engine", "ray", "--workers", "2", "--threads", "1", "--json"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") or name == "RAY_worker_niceness"
    }
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["items"] == 12
