"""Any number of processes, each with the whole model or with a share of it, takes the steps that one process takes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from victims import as_options, outcome

from performers.attention import SequenceGroup
from performers.errors import CheckpointError, ConfigError
from performers.training import PretrainResult, open_model
from performers.training.distributed import World
from performers.training.run_folder import list_checkpoints, load_progress

Train = Callable[..., PretrainResult]
Settings = Callable[..., dict[str, Any]]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
COMMAND = ["-m", "performers", "pretrain"]


def entries(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_steps(run: Path, reference: Path) -> None:
    found, expected = entries(run), entries(reference)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for key in ("loss", "gradient_norm"):
        values = [entry.get(key, 0.0) for entry in found]
        assert values == pytest.approx([entry.get(key, 0.0) for entry in expected], abs=1e-5)


TWENTY_STEPS = {"steps": 20, "checkpoint_every": 10, "keep": 5, "learning_rate": 3e-3, "kernel": "softmax"}
TWENTY_STEPS |= {"redraw_every": 7, "evaluate_tokens": 2000}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, fasta: Path, settings: Settings) -> Path:
    """The run of one process."""
    from performers.training import PretrainConfig, pretrain

    values = settings(tmp_path_factory.mktemp("one") / "run", validation=[str(fasta)], **TWENTY_STEPS)
    return pretrain(PretrainConfig.parse(values)).output


@pytest.fixture
def twenty(fasta: Path, settings: Settings, context: ForkServerContext) -> Callable[..., Path]:
    """Twenty steps on so many processes, in a new folder or going on in a copy of another run."""

    def run(output: Path, size: int, *, of: Path | None = None, **changes: Any) -> Path:
        if of is not None:
            shutil.copytree(of, output)
        values = settings(output, validation=[str(fasta)], **{**TWENTY_STEPS, **changes})
        begin = () if of is None else ("step-00000010",)
        assert ranks.statuses(ranks.launch(context, ranks.train, size, values, *begin)) == [0] * size
        return output

    return run


@pytest.mark.parametrize(
    ("size", "sharding"), [(2, "none"), pytest.param(4, "none", marks=pytest.mark.slow), (4, "full")]
)
def test_any_number_of_processes_sharded_or_not_gives_the_losses_of_one(
    size: int, sharding: str, tmp_path: Path, one: Path, twenty: Callable[..., Path]
) -> None:
    run = twenty(tmp_path / "run", size, sharding=sharding)
    assert_same_steps(run, one)
    weights = open_model(run).state_dict()
    for name, expected in open_model(one).state_dict().items():
        torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=1e-4)


def test_a_sharded_run_goes_on_in_any_number_of_processes_and_unsharded_and_back(
    tmp_path: Path, one: Path, twenty: Callable[..., Path]
) -> None:
    two = twenty(tmp_path / "two", 2, sharding="full")
    assert_same_steps(two, one)
    shards = sorted(path.name for path in (list_checkpoints(two)[0] / "shards").iterdir())
    assert len(shards) == 2, "each process writes its own share"
    assert all(name.endswith(".safetensors") for name in shards), "and no pickle"
    for name, size, of, sharding in (
        ("one, whole", 1, two, "none"),
        ("four, sharded", 4, two, "full"),
        ("two, whole", 2, two, "none"),
        ("from one to two, sharded", 2, one, "full"),
    ):
        assert_same_steps(twenty(tmp_path / name, size, of=of, sharding=sharding), one)


def test_a_sharded_checkpoint_is_a_model_and_every_damage_to_a_share_is_found(
    tmp_path: Path, twenty: Callable[..., Path]
) -> None:
    run = twenty(tmp_path / "run", 2, sharding="full")
    last = list_checkpoints(run)[-1]
    opened, final = open_model(last).state_dict(), open_model(run / "model").state_dict()
    assert all(torch.equal(opened[name], final[name]) for name in final)
    for share in (last / "shards").iterdir():
        content = share.read_bytes()
        for damaged in (content[:-1], bytes([*content[:-1], content[-1] ^ 4])):
            share.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"{share.name}.*--resume-from step-00000010"):
                load_progress(last)
        share.write_bytes(content)
    (last / "manifest.json").unlink()
    config = json.loads((last / "config.json").read_text())
    (last / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        open_model(last)


def test_rows_over_groups_of_two_and_their_tokens_within_give_the_losses_of_one(
    tmp_path: Path, one: Path, twenty: Callable[..., Path]
) -> None:
    run = twenty(tmp_path / "run", 4, sequence_parallel=2)
    assert_same_steps(run, one)
    results = json.loads((run / "run.json").read_text())["results"]
    assert results["attention_bytes_per_step"] > 0
    # Keys and values of two layers and two rows, out and back with gradients: half of 64 tokens, 2 x 8 numbers of 4 bytes.
    assert results["ring_attention_bytes_per_step"] == 2 * 2 * 3 * 2 * 32 * 16 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "clm", "contexts": "packed", "micro_batch_size": 2, "gradient_checkpointing": True},
        {"objective": "mlm", "contexts": "concatenated", "sharding": "full", "reversible": True},
        pytest.param({"objective": "clm", "contexts": "concatenated", "sharding": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_over_two_processes_give_the_losses_of_one(
    changes: dict[str, Any], tmp_path: Path, settings: Settings, twenty: Callable[..., Path]
) -> None:
    if changes.pop("reversible", False):
        changes["architecture"] = {**settings(tmp_path)["architecture"], "reversible": True}
    alone = twenty(tmp_path / "alone", 1, **{**changes, "sharding": "none"})
    assert_same_steps(twenty(tmp_path / "shared", 2, sequence_parallel=2, **changes), alone)


@pytest.mark.parametrize("contexts", ["packed", "concatenated"])
def test_rows_and_their_tokens_are_dealt_out_to_a_grid_without_loss_or_repeats(
    contexts: str, tmp_path: Path, settings: Settings, fasta: Path
) -> None:
    from performers.data import Contexts, in_memory_corpus, read_fasta
    from performers.training import PretrainConfig
    from performers.training.language_modelling import micro_batches

    config = PretrainConfig.parse(settings(tmp_path, contexts=contexts, micro_batch_size=1))
    source = Contexts(in_memory_corpus(read_fasta(str(fasta))), config.context, mode=config.contexts, seed=config.seed)

    def dealt_out(size: int, together: int) -> dict[int, list[int]]:
        """The tokens of each row, by its key, from processes that hold a row `together`."""
        found: dict[int, list[int]] = {}
        for rank in range(size):
            group = SequenceGroup()
            group.rank, group.size = rank % together, together
            world = World(rank, size, torch.device("cpu"), group if together > 1 else None)
            for whole in micro_batches(config, source, 3, world):
                example, _ = world.stretch(whole)
                assert example["input_ids"].shape == example["position_ids"].shape == (1, config.context // together)
                found.setdefault(int(example["dropout_keys"][0]), []).extend(example["input_ids"][0].tolist())
        return found

    expected = dealt_out(1, 1)
    assert len(expected) == config.batch_size
    for size, together in ((2, 1), (4, 1), (2, 2), (4, 2), (8, 2), (4, 4)):
        assert dealt_out(size, together) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_parallel": 2}, "sequence_parallel=2: expected a divisor of the number of processes, 1"),
        ({"sharding": "full", "compile": True}, "compile and sharding=full exclude each other"),
        ({"sharding": "full", "optimizer": "muon"}, "optimizer=muon and sharding=full exclude each other"),
        (
            {"sequence_parallel": 2, "sequence_chunk": 8, "objective": "clm", "contexts": "concatenated"},
            "sequence_chunk and sequence_parallel exclude each other",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, Any], message: str, tmp_path: Path, train: Train) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, **changes)


@pytest.mark.parametrize("attention", ["exact", "sparse", "reformer", "local", "split"])
def test_attention_that_cannot_lie_on_several_processes_is_refused_by_name(
    attention: str, tmp_path: Path, settings: Settings
) -> None:
    from performers.training import PretrainConfig
    from performers.training.language_modelling import open_for_training

    values = settings(tmp_path, attention=["favor", attention], sequence_parallel=2)
    with pytest.raises(ConfigError, match=rf"sequence_parallel=2: .* but the model has {attention}\."):
        open_for_training(PretrainConfig.parse(values), None)


def test_a_batch_that_cannot_be_shared_equally_is_refused(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from performers.training import loop

    world = contextlib.nullcontext(World(0, 3, torch.device("cpu")))
    monkeypatch.setattr(loop, "join_world", lambda device, **layout: world)
    with pytest.raises(ConfigError, match="batch_size=4: expected a multiple of the 3 processes"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("trouble", "changes", "message"),
    [
        ("poison", {}, "The loss is nan at step 4; the step was not taken, and the last good checkpoint is "),
        ("poison", {"sharding": "full"}, "The loss is nan at step 4; the step was not taken"),
        (
            "redraw_otherwise",
            {"kernel": "softmax", "redraw_every": 3},
            "performer.layers.0.attention.mechanism.features.projection differs between the processes",
        ),
        (
            "begin_otherwise",
            {},
            "performer.layers.1.attention.mechanism.features.projection differs between the processes",
        ),
    ],
)
def test_what_goes_wrong_in_one_process_stops_all_with_the_same_words(
    trouble: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    settings: Settings,
    context: ForkServerContext,
) -> None:
    values = settings(tmp_path / "run", checkpoint_every=2, **changes)
    found = ranks.statuses(ranks.launch(context, ranks.train_and_tell, 2, values, str(tmp_path), trouble))
    assert found == [1, 1]
    last = [(tmp_path / f"stderr-{rank}").read_text().splitlines()[-1] for rank in range(2)]
    assert last[0] == last[1]
    assert message in last[0]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]


def test_a_worker_killed_under_torchrun_is_started_again_and_the_run_ends_as_if_undisturbed(
    tmp_path: Path, settings: Settings, context: ForkServerContext
) -> None:
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("the workers of torchrun are found in /proc")
    changes = {"steps": 60, "checkpoint_every": 5, "evaluate_every": 0}
    whole = ranks.launch(context, ranks.train, 2, settings(tmp_path / "whole", **changes))
    run = tmp_path / "killed"
    options = [*COMMAND, *as_options(settings(run, **changes)), "--no-resume"]
    launcher = [*LAUNCHER, "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun = subprocess.Popen([*launcher, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list_checkpoints(run):
        assert time.monotonic() < deadline
        assert torchrun.poll() is None, torchrun.communicate()[1][-3000:]
        time.sleep(0.005)
    children = (Path("/proc") / str(torchrun.pid) / "task" / str(torchrun.pid) / "children").read_text().split()
    (worker,) = (pid for pid in children if b"RANK=1" in Path("/proc", pid, "environ").read_bytes().split(b"\0"))
    os.kill(int(worker), signal.SIGKILL)
    finish([torchrun])
    assert ranks.statuses(whole) == [0, 0]
    assert outcome(run) == outcome(tmp_path / "whole")
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert [session["status"] for session in sessions][-1] == "finished"
    assert len(sessions) == 2


@contextlib.contextmanager
def two_hosts(kind: str) -> Iterator[list[tuple[list[str], str, dict[str, str]]]]:
    """What stands before a command on each host, its address, and its environment."""
    if kind == "loopback":
        yield [([], "127.0.0.1", {})] * 2
        return
    names = [f"performers-{os.getpid()}-{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"network namespaces need root: ip {' '.join(arguments)}: {done.stderr.strip()}")

    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [
            (["ip", "netns", "exec", name], f"10.77.0.{number + 1}", {"GLOO_SOCKET_IFNAME": "veth0"})
            for number, name in enumerate(names)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.parametrize("kind", ["loopback", pytest.param("namespaces", marks=pytest.mark.slow)])
def test_one_sequence_over_two_hosts(kind: str, tmp_path: Path, one: Path, fasta: Path, settings: Settings) -> None:
    values = settings(tmp_path / "run", validation=[str(fasta)], sequence_parallel=2, sharding="full", **TWENTY_STEPS)
    with two_hosts(kind) as hosts:
        agents = []
        for number, (before, address, environment) in enumerate(hosts):
            launcher = [*LAUNCHER, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--node-rank={number}"]
            where = [f"--rdzv-endpoint={hosts[0][1]}:29517", "--rdzv-id=performers", f"--local-addr={address}"]
            leads = f"--rdzv-conf=is_host={1 - number}"  # a name of the machine does not tell its namespaces apart
            command = [*before, *launcher, *where, leads, *COMMAND, *as_options(values)]
            agents.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        finish(agents)
    assert_same_steps(tmp_path / "run", one)
