"""Where the shards of a tool's work are computed: in this process, in many that share a folder, or on a Ray cluster.

An `Engine` takes the shards that are missing and gives back their results, in any order. A shard's results are a function of its
items, and `performers.tools.jobs` saves each shard whole under a name of its own, so the assembled output has the same bytes
whatever computed it (on the same kind of device, with the same number of threads), and each record is in it once.

- *local*: one after the other, here.
- *rank*: process r of n, as torchrun or a Slurm array starts them, takes every n-th shard. They need a file system in common and
  nothing else: none waits for another to compute, and the last to finish writes the output.
- *ray*: this process hands shards to workers on a Ray cluster, one each at a time, and saves what comes back; workers need the
  model's folder under the same path. These are Ray's actors, not Ray Data: a shard is the unit that is saved and resumed, which
  Ray Data's blocks are not, and Ray Data would read formats of its own and keep no order. An actor that dies is started again
  and its shard with it.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from performers.errors import InputError, MissingExtraError, RunError
from performers.tools.tool import Result, Tool

EngineName: TypeAlias = Literal["auto", "local", "rank", "ray"]

_TRIES = 3  # a worker dies of something else than its shard twice at most


class Shards(Protocol):
    """What there is to compute: the numbers of shards, and the items of each as JSON holds them."""

    def __iter__(self) -> Iterator[int]: ...

    def contents(self, index: int) -> list[Any]:
        """The items of a shard."""
        ...


@dataclass(frozen=True)
class Engine:
    """What computes shards.

    Attributes:
        name: "local", "rank" or "ray".
        rank, size: of "rank", which process this is among how many.
        workers: of "ray", how many; None for as many as the cluster has room for.
    """

    name: str = "local"
    rank: int = 0
    size: int = 1
    workers: int | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other processes may be at work in the same folder."""
        return self.name == "rank"

    def takes(self, index: int) -> bool:
        """Whether shard `index` is this process's to compute."""
        return index % self.size == self.rank

    def compute(self, tool: Tool[Any], shards: Shards) -> Iterator[tuple[int, Sequence[Result]]]:
        """The results of shards with their numbers, in any order.

        Raises:
            RunError: the workers of a cluster keep dying.
        """
        if self.name == "ray":
            yield from _compute_with_ray(tool, shards, self.workers)
            return
        for index in shards:
            yield index, tool.compute([tool.from_json(content) for content in shards.contents(index)])


LOCAL = Engine()


def choose_engine(name: EngineName = "auto", workers: int | None = None) -> Engine:
    """The engine called `name`, as this process's environment describes it.

    "auto" is "rank" under torchrun and "local" elsewhere. In a Slurm array "rank" has to be asked for: the tasks of an array may
    just as well have a file each.

    Arguments:
        name: one of `EngineName`.
        workers: for "ray".

    Raises:
        InputError: the environment describes no ranks, or workers are given to another engine.
        MissingExtraError: Ray is not installed.
    """
    if workers is not None and name != "ray":
        raise InputError("--workers is for --engine ray; torchrun or Slurm says how many processes --engine rank has.")
    if name == "ray":
        try:
            import ray as _  # noqa: F401
        except ImportError:
            raise MissingExtraError("ray", "ray", "--engine ray") from None
        return Engine("ray", workers=workers)
    if name == "rank" or (name == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        return Engine("rank", *_rank_and_size(os.environ))
    return LOCAL


def use_own_gpu() -> None:
    """Under torchrun, makes the GPU of this process's local rank the one that "cuda" means."""
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def _rank_and_size(environment: Mapping[str, str]) -> tuple[int, int]:
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" not in environment or "SLURM_ARRAY_TASK_COUNT" not in environment:
        raise InputError(
            "--engine rank finds neither RANK and WORLD_SIZE, as torchrun sets them, nor SLURM_ARRAY_TASK_ID and "
            "SLURM_ARRAY_TASK_COUNT, as Slurm does in an array of jobs."
        )
    first, step = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default)) for name, default in (("MIN", "0"), ("STEP", "1"))
    )
    number, size = int(environment["SLURM_ARRAY_TASK_ID"]) - first, int(environment["SLURM_ARRAY_TASK_COUNT"])
    if number % step or not 0 <= number // step < size:
        raise InputError(
            f"Task {number + first} of a Slurm array of {size} tasks from {first} in steps of {step}: "
            "expected an array without gaps, such as --array=0-7."
        )
    return number // step, size


class _Worker:
    """What runs in a process of the cluster: a tool, whose model is opened when the first shard comes."""

    def __init__(self, tool: Tool[Any], model: dict[str, Any], threads: int) -> None:
        self._tool, self._model, self._threads = tool, model, threads

    def compute(self, contents: list[Any]) -> Sequence[Result]:
        """The results of a shard's items."""
        if not hasattr(self._tool, "model"):
            self._open()
        return self._tool.compute([self._tool.from_json(content) for content in contents])

    def _open(self) -> None:
        import torch

        from performers.tools.language_model import LanguageModel

        torch.set_num_threads(self._threads)
        opened = LanguageModel.open(self._model["folder"], device=self._model["device"], dtype=self._model["dtype"])
        if self._model["context"] is not None:
            opened.use_context(self._model["context"])
        if opened.fingerprint() != self._model["fingerprint"]:
            raise InputError(
                f"{self._model['folder']} holds another model on {os.uname().nodename} than where the work began."
            )
        self._tool.model = opened


def _compute_with_ray(tool: Tool[Any], shards: Shards, workers: int | None) -> Iterator[tuple[int, Sequence[Result]]]:
    import ray
    import torch
    from ray.exceptions import RayActorError, RayTaskError

    begun_here = not ray.is_initialized()
    if begun_here:
        # A cluster that RAY_ADDRESS names or that runs on this machine; otherwise one on this machine, for this run.
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        threads = torch.get_num_threads()
        on_gpu = tool.model.device.type == "cuda"
        room = ray.cluster_resources()
        number = workers or int(room.get("GPU", 0) if on_gpu else room.get("CPU", 0) // threads) or 1
        model = {
            "folder": str(tool.model.folder.absolute()),
            "device": tool.model.device.type,
            "dtype": str(tool.model.dtype).removeprefix("torch."),
            "context": tool.model.context,
            "fingerprint": tool.model.fingerprint(),
        }
        shipped = copy.copy(tool)
        del shipped.model  # each worker opens its own
        remote: Any = ray.remote(_Worker).options(
            num_cpus=threads, num_gpus=int(on_gpu), max_restarts=_TRIES, max_task_retries=_TRIES
        )
        free = [remote.remote(shipped, model, threads) for _ in range(number)]
        at_work: dict[Any, tuple[int, Any]] = {}
        waiting = iter(shards)
        while True:
            while free and (index := next(waiting, None)) is not None:
                worker = free.pop()
                at_work[worker.compute.remote(shards.contents(index))] = index, worker
            if not at_work:
                return
            (done, *_), _ = ray.wait(list(at_work), num_returns=1)
            index, worker = at_work.pop(done)
            free.append(worker)
            yield index, ray.get(done)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise RunError(
            f"A worker of the Ray cluster died {_TRIES + 1} times ({str(error).splitlines()[0]}); what was done is kept, and the "
            "same command goes on."
        ) from None
    finally:
        if begun_here:
            ray.shutdown()
