"""The part of a checkpoint that many processes write together: each its share of every weight and moment.

A model whose parameters lie on several processes (DTensors) goes in, a folder of safetensors files comes out, one per process,
by torch.distributed.checkpoint. Any number of processes reads it, each what it holds, sharded or not. This knows tensors by name
and nothing of steps, runs or tasks. No pickle is written or read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from performers.errors import CheckpointError

_WEIGHTS, _MOMENTS = "model.", "optimizer."


def save_shards(folder: Path, model: torch.nn.Module, moments: Mapping[str, torch.Tensor]) -> None:
    """Writes this process's share of the weights and moments; returns when every process has. All call it together.

    Raises:
        OSError: a process cannot write; all raise it.
    """
    tensors = {f"{_WEIGHTS}{name}": tensor for name, tensor in _weights(model).items()}
    tensors |= {f"{_MOMENTS}{name}": tensor for name, tensor in moments.items()}
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Fills the parameters and saved buffers of a model.

    Raises:
        CheckpointError: they are not those of the folder.
    """
    weights = {f"{_WEIGHTS}{name}": tensor for name, tensor in _weights(model).items()}
    stored = [name for name in _stored(folder) if name.startswith(_WEIGHTS)]
    wrong = sorted(set(stored) ^ set(weights))
    if wrong:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json, first at {wrong[0].removeprefix(_WEIGHTS)}."
        )
    _load(folder, weights)


def load_moments(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The moments by name, each lying as the parameter does that its name begins with.

    Raises:
        CheckpointError: the files are damaged.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    for key, size in _stored(folder).items():
        if key.startswith(_MOMENTS):
            parameter = parameters.get(key.removeprefix(_MOMENTS).rpartition(".")[0])
            if parameter is not None and parameter.shape == size:
                tensors[key] = torch.zeros_like(parameter)
            else:
                tensors[key] = torch.zeros(size)  # a count of steps, or what will be found not to belong here
    _load(folder, tensors)
    return {key.removeprefix(_MOMENTS): tensor for key, tensor in tensors.items()}


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and saved buffers, each once, under the first of its names."""
    names: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return {name: tensor.detach() for tensor, name in names.items()}


def _stored(folder: Path) -> dict[str, torch.Size]:
    """The names and shapes of the tensors in the folder."""
    try:
        metadata: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}.") from None
    return {name: stored.size for name, stored in metadata.state_dict_metadata.items()}


def _load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be: nobody waits here
        try:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"{folder} does not fit the model: {' '.join(str(reason).split())}.") from None
