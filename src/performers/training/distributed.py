"""Where a run computes: the device, the precision, and the processes it shares the work with.

`World` is one process's view of the group that torchrun started (a group of one without torchrun). The loop asks it for sums over
the group and for nothing else, so that one process and many take the same steps: sums go over a fixed layout, whatever order
gradients arrive in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from performers.errors import ConfigError

# The others wait here while the first process builds the corpus: about an hour for 10^11 residues.
_PATIENCE = timedelta(hours=6)
_BUCKET_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class World:
    """One process among `size`.

    Attributes:
        rank: the number of this process, from 0.
        size: how many processes there are.
        device: what this process computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces `tensor` by its sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

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


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """The group of processes that torchrun's environment describes, left again at the end of the block.

    Arguments:
        device: as in `choose_device`; with several processes on cuda each takes the GPU of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), size, chosen)
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
