"""Where a run computes: the device, the precision, and the processes it shares the work with.

`World` is one process's view of the group that torchrun started (a group of one without torchrun). It says which rows of a step
are this process's, and which tokens of them, and adds up what all have found, so that one process and many take the same steps:
sums go over a fixed layout, whatever order gradients arrive in. In a `World` every process holds the whole model; in a
`ShardedWorld` each holds a share of every weight, gradient and moment (FSDP, 2304.11277). The processes form a grid of two
dimensions: rows are dealt out along one, and along the other a row's tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # no public name in the supported versions
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from performers.attention import SequenceGroup, SequenceShard
from performers.errors import ConfigError, RunError
from performers.training.meeting import meet

# The others wait here while the first process builds the corpus: about an hour for 10^11 residues.
_PATIENCE = timedelta(hours=6)
# Processes that torchrun has just started wait so long for each other; it starts them again where one does not come.
_MEETING = timedelta(minutes=2)
_BUCKET_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class World:
    """One process among `size`.

    Attributes:
        rank: the number of this process, from 0.
        size: how many processes there are.
        device: what this process computes on.
        sequence: the processes that hold a row's tokens between them; None where each row is one process's.
        is_sharded: whether a process holds a share of the weights only.
    """

    rank: int
    size: int
    device: torch.device
    sequence: SequenceGroup | None = None

    is_sharded: ClassVar[bool] = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """How many ways the rows of a step are dealt out."""
        return self.size if self.sequence is None else self.size // self.sequence.size

    def rows(self, first: int, number: int) -> range:
        """Those of `number` rows from `first` on that are this process's, in whole or in part."""
        place = self.rank if self.sequence is None else self.rank // self.sequence.size
        return range(first + place, first + number, self.data_size)

    def stretch(self, example: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, SequenceShard]]:
        """An example's tokens that are this process's, and what tells a model so.

        Arguments:
            example: what a model takes, `labels` of shape (B, L) among it; all of that shape is cut.
        """
        if self.sequence is None:
            return dict(example), {}
        tokens = example["labels"].shape
        shard = self.sequence.shard(tokens[1])
        mine = slice(shard.start, shard.stop)
        cut = {key: value[:, mine] if value.shape == tokens else value for key, value in example.items()}
        return cut, {"sequence": shard}

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this process's device."""
        return model.to(self.device)

    def check_agreement(self, model: nn.Module) -> None:
        """Compares what is random in the model, its buffers, over the processes.

        Raises:
            RunError: a layer's is not the same everywhere; all processes raise it.
        """
        if self.size > 1:
            SequenceGroup().check_agreement(dict(model.named_buffers()))

    def is_finite(self, gradient: Tensor) -> bool:
        """Whether all numbers of a gradient are, also those that other processes hold."""
        mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        return not self.sum_((~mine.isfinite()).sum()).item()

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        largest = torch.tensor(number, device=self.device)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest.item())

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces `tensor` by its sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """A block in which a layer's weights, once gathered, stay until its end: for passes that lead into one another."""
        yield

    def sum_gradients_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its sum over all processes.

        Gradients travel in buckets that hold the parameters in the order of the model, so a resumed run adds them up in the
        order of the run that was not interrupted. (DistributedDataParallel lays its buckets out anew after the first step.)
        """
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        elements = 0
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for index, gradient in enumerate(gradients):
            bucket.append(gradient)
            elements += gradient.numel()
            following = gradients[index + 1] if index + 1 < len(gradients) else None
            if following is None or following.dtype != gradient.dtype or elements >= _BUCKET_ELEMENTS:
                flat = torch.cat([piece.reshape(-1) for piece in bucket])
                dist.all_reduce(flat)
                for piece, total in zip(bucket, flat.split([piece.numel() for piece in bucket]), strict=True):
                    piece.copy_(total.view_as(piece))
                bucket, elements = [], 0

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()


@dataclass(frozen=True)
class ShardedWorld(World):
    """A world whose processes hold a share of each weight, gradient and moment, and gather a layer's weights when it computes.

    Attributes:
        mesh: all processes, in a row.
    """

    mesh: DeviceMesh | None = None

    is_sharded: ClassVar[bool] = True

    def place(self, model: nn.Module) -> nn.Module:
        """The model, each layer of which is sharded on its own, and the rest as one more.

        Arguments:
            model: a model that names the classes of its layers, as those of Hugging Face do (`_no_split_modules`).
        """
        layers: Any = getattr(model, "_no_split_modules", None) or ()
        for module in [module for module in model.modules() if type(module).__name__ in layers]:
            fully_shard(module, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # a step's gradient is a sum; gloo can add, and do nothing else
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model.to(self.device)

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """All layers' weights are whole from the forward pass to the end of the block; gradients and moments are shares."""
        assert isinstance(model, FSDPModule)
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(False)
        try:
            yield
        finally:
            model.set_reshard_after_forward(True)
            model.set_reshard_after_backward(True)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: the backward pass has added them up, each process its share."""


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process holds a share; any other tensor as it is. All processes ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The same numbers where `parameter` lies; of a tensor of its shape this process's share, if it has but a share of it."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor) and tensor.shape == parameter.shape:
        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to(parameter.device)


@contextlib.contextmanager
def join_world(device: str, sharding: str = "none", sequence_parallel: int = 1) -> Iterator[World]:
    """The group of processes that torchrun's environment describes, left again at the end of the block.

    Arguments:
        device: as in `choose_device`; with several processes on cuda each takes the GPU of its local rank.
        sharding: "full" for a `ShardedWorld`; a single process holds everything in any case.
        sequence_parallel: how many consecutive processes hold a row's tokens between them.

    Raises:
        ConfigError: the processes cannot be divided so.
        RunError: another process has left, so that this one cannot go on.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if size % sequence_parallel:
        raise ConfigError(
            f"sequence_parallel={sequence_parallel}: expected a divisor of the number of processes, {size}."
        )
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    store, rank, _ = next(rendezvous("env://", timeout=_MEETING))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store = meet(store, rank, size, _MEETING)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_MEETING)
    try:
        _set_pg_timeout(_PATIENCE)
        sequence = None
        if sequence_parallel > 1:
            grid = (size // sequence_parallel, sequence_parallel)
            mesh = init_device_mesh(chosen.type, grid, mesh_dim_names=("data", "sequence"))
            sequence = SequenceGroup(mesh.get_group("sequence"))
        if sharding == "full":
            mesh = init_device_mesh(chosen.type, (size,), mesh_dim_names=("shard",))
            yield ShardedWorld(dist.get_rank(), size, chosen, sequence, mesh)
        else:
            yield World(dist.get_rank(), size, chosen, sequence)
    except RuntimeError as error:
        is_of_a_connection = isinstance(error, dist.DistBackendError) or "gloo/transport" in str(error)
        if isinstance(error, RunError) or not is_of_a_connection:
            raise
        raise RunError("Another process of the run has stopped, so this one cannot go on.") from error
    finally:
        dist.destroy_process_group()


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, then mps, then cpu.

    Raises:
        ConfigError: there is no such device, or torch cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("this package does not compute there")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r}: expected auto, cuda, mps or cpu, usable here ({reason})") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of forward passes: "auto" is bfloat16 on cuda and float32 elsewhere; mps computes in float32 always."""
    if device.type == "mps" or name == "float32":
        return torch.float32
    if name == "bfloat16" or device.type == "cuda":
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """The context in which forward passes run in `dtype`; weights stay in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def keep_freed_memory() -> None:
    """Lets this process keep what a step frees for the next tensors, where the C library is glibc.

    It would give every tensor of 32 MiB or more back to the system at once, and the next one would come anew, page by page.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 256 * 2**20)
        library.mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def use_threads(number: int | None) -> Iterator[None]:
    """CPU threads for the block; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
