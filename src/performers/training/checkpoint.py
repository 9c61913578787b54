"""Checkpoints and model folders: what a run needs to go on, and how weights from outside are opened safely.

A checkpoint is a sealed folder `step-00000100` with what the task needs to open its model again, and beside it
`optimizer.safetensors` and `generator.json`. In pretraining it is at the same time an ordinary Hugging Face folder: weights,
configuration and tokenizer. Where each process holds a share of the weights, all of them write theirs into its folder `shards`
(see `performers.training.shards`), and any number of processes goes on from there, sharded or not. There is no generator state
in it, because every draw is a function of the seed and the step. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from performers.data import VOCAB_SIZE
from performers.errors import CheckpointError, PerformersError
from performers.folders import MANIFEST, room_for, sealed_folder, temporary_name, verify_folder
from performers.models.bundled import located
from performers.training.distributed import World, placed_like
from performers.training.optimizers import moments_of
from performers.training.run_folder import (
    GENERATOR,
    OPTIMIZER,
    SHARDS,
    Progress,
    checkpoint_path,
    list_checkpoints,
    remove_checkpoint,
)
from performers.training.shards import load_moments, load_weights, save_shards
from performers.training.task import Task

_HEADS = {"mlm": "MaskedLM", "clm": "CausalLM"}
_OTHER_HEADS = ("SequenceClassification", "TokenClassification")
_COUNT = "step"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def save_checkpoint(
    run: Path,
    task: Task[Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    world: World,
) -> None:
    """Writes the checkpoint of `progress.step`, then removes all but the newest `task.config.keep` and the best.

    All processes call it. The first one makes the folder, writes what all have, and gives it its name when everything is in it.

    Raises:
        DiskFullError: there is no room; the earlier checkpoints are untouched.
    """
    if not (world.is_main or world.is_sharded):
        return
    path = checkpoint_path(run, progress.step)
    moments = _moments(model, optimizer, progress.step)
    if not world.is_main:
        world.wait()
        with room_for(path):
            save_shards(temporary_name(path) / SHARDS, model, moments)
        return
    path.parent.mkdir(exist_ok=True)
    needed = _num_bytes(model.state_dict()) + _num_bytes(moments)
    with sealed_folder(path, needed=needed, replace=True) as folder, without_bars():
        if world.is_sharded:
            world.wait()  # the others, until the folder is there
            save_shards(folder / SHARDS, model, moments)
            task.save_architecture(model, folder)
        else:
            save_file(moments, folder / OPTIMIZER)
            task.save(model, folder, finished=False)
        (folder / GENERATOR).write_text(json.dumps(dataclasses.asdict(progress)) + "\n", encoding="utf-8")
    checkpoints = list_checkpoints(run)
    kept = set(checkpoints[-task.config.keep :])
    kept |= {checkpoint_path(run, _progress_of(checkpoint).best_step) for checkpoint in kept}
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            remove_checkpoint(checkpoint)


def _progress_of(path: Path) -> Progress:
    return Progress(**json.loads((path / GENERATOR).read_text(encoding="utf-8")))


def save_model(path: Path, task: Task[Any], model: torch.nn.Module) -> None:
    """Writes the finished model as a sealed folder, in the place of one that is there already.

    Raises:
        DiskFullError: there is no room for it.
    """
    with sealed_folder(path, needed=_num_bytes(model.state_dict()), replace=True) as folder, without_bars():
        task.save(model, folder, finished=True)


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, torch.Tensor]:
    """The moments of all parameters that have ever had a gradient, by name.

    One that had none in some steps, as parts of a model that a stage of training leaves alone, has a count of its own.
    """
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            moments |= {f"{name}.{moment}": state[moment] for moment in moments_of(optimizer, parameter)}
            if int(state.get(_COUNT, step)) != step:
                moments[f"{name}.{_COUNT}"] = state[_COUNT]
    return moments


def load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Puts the moments of the checkpoint `path` into `optimizer`, which has taken no step yet.

    Raises:
        CheckpointError: the moments are not those of the model's parameters.
    """
    file = path / (SHARDS if (path / SHARDS).is_dir() else OPTIMIZER)
    moments = load_moments(file, model) if file.is_dir() else load_file(file)
    for name, parameter in model.named_parameters():
        found = {moment: moments.pop(f"{name}.{moment}", None) for moment in moments_of(optimizer, parameter)}
        count = moments.pop(f"{name}.{_COUNT}", torch.tensor(float(step)))
        shapes = {None if tensor is None else tensor.shape for tensor in found.values()}
        if shapes == {parameter.shape} and parameter.requires_grad:
            state = {_COUNT: count, **found}
            optimizer.state[parameter] = {key: placed_like(tensor, parameter) for key, tensor in state.items()}
        elif shapes != {None}:
            moments[name] = count
    if moments:
        raise CheckpointError(f"{file} does not belong to the model beside it: names or shapes differ.")


def find_model(path: str | Path) -> Path:
    """The model folder that `path` means: a bundled model's, itself, the `model` folder of a run, or a run's newest checkpoint.

    Raises:
        InputError: there is no bundled model of that name.
        CheckpointError: there is no model, or only one in a format that is never read.
    """
    path = Path(located(path))
    if path.suffix in _PICKLES and path.is_file():
        raise CheckpointError(_pickle_sentence(path))
    for folder in (path, path / "model", *reversed(list_checkpoints(path))):
        if (folder / "config.json").is_file():
            break
    else:
        raise CheckpointError(f"{path}: expected a model folder with config.json and model.safetensors.")
    if not any(weights_files(folder)):
        pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
        raise CheckpointError(
            _pickle_sentence(pickles[0])
            if pickles
            else f"{folder / 'model.safetensors'} is missing: the folder has no weights."
        )
    return folder


def open_model(path: str | Path, objective: str | None = None, *, any_head: bool = False) -> Any:
    """The Performer in a folder, in evaluation mode on the CPU, after its files have been verified.

    Arguments:
        path: anything `find_model` understands.
        objective: "mlm" or "clm" to open the weights as that kind of model; None opens what was saved.
        any_head: whether a model that classifies proteins or residues will do, too; otherwise only a language model does.

    Raises:
        CheckpointError: the folder is damaged, unsafe or no language model, or its weights do not fit its configuration.
        ConfigError: its configuration is not valid.
    """
    import transformers

    folder = find_model(path)
    if (folder / MANIFEST).exists():
        try:
            verify_folder(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error} After a change on purpose, remove {MANIFEST}.") from None
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged or hostile: {error}.") from None
    _check_is_ours(folder)
    head = _HEADS[objective] if objective else _saved_head(folder, any_head)
    auto: Any = getattr(transformers, f"AutoModelFor{head}")
    if (folder / SHARDS).is_dir():
        model = auto.from_config(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
        load_weights(folder / SHARDS, model)
        return model.eval()
    try:
        with without_bars():
            model, report = auto.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except PerformersError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be opened: {' '.join(str(error).split())}.") from None
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in report[kind])
    if wrong:
        raise CheckpointError(f"{folder}: the weights do not fit config.json, first at {wrong[0]}.")
    return model.eval()


def objective_of(model: Any) -> str:
    """ "clm" for a causal language model, else "mlm"."""
    return "clm" if type(model).__name__.endswith("ForCausalLM") else "mlm"


def weights_files(folder: Path) -> Iterator[Path]:
    """The weights of a model folder, shard by shard."""
    at = folder / SHARDS if (folder / SHARDS).is_dir() else folder
    yield from sorted(file for file in at.glob("*.safetensors") if file.name != OPTIMIZER)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keeps Hugging Face's progress bars for single files off the screen."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _check_is_ours(folder: Path) -> None:
    """Refuses other models before Hugging Face looks at them: they may bring code, and do not know our tokens."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, vocabulary = config["model_type"], config.get("vocab_size", VOCAB_SIZE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / 'config.json'}: expected JSON whose 'model_type' is performer.") from None
    if kind != "performer":
        raise CheckpointError(f"{folder} holds a model of type {kind!r}: expected a Performer.")
    if vocabulary != VOCAB_SIZE:
        raise CheckpointError(
            f"{folder} has a vocabulary of {vocabulary!r} tokens: expected the {VOCAB_SIZE} of residues."
        )


def _saved_head(folder: Path, any_head: bool) -> str:
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        raise CheckpointError(
            f"{folder / 'config.json'}: expected JSON whose 'architectures' names the model."
        ) from None
    head = str(architecture).partition("For")[2]
    if head not in _HEADS.values() and not (any_head and head in _OTHER_HEADS):
        raise CheckpointError(f"{folder} holds a {architecture}: expected a masked or causal language model.")
    return head


def _pickle_sentence(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is opened, so it is never read: "
        "save the model as safetensors (model.save_pretrained does) and give that folder."
    )
