"""Checkpoints and model folders: what a run needs to go on, and how weights from outside are opened safely.

A checkpoint is a sealed folder `step-00000100` that is at the same time an ordinary Hugging Face folder: weights, configuration
and tokenizer, and beside them `optimizer.safetensors` and `generator.json`. There is no generator state in it, because every
draw is a function of the seed and the step. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from performers.data import VOCAB_SIZE
from performers.errors import CheckpointError, PerformersError
from performers.folders import MANIFEST, sealed_folder, verify_folder
from performers.training.pretraining import (
    GENERATOR,
    OPTIMIZER,
    Progress,
    checkpoint_path,
    list_checkpoints,
    remove_checkpoint,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def save_checkpoint(
    run: Path, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, progress: Progress, *, keep: int
) -> Path:
    """Writes the checkpoint of `progress.step`, then removes all but the newest `keep`.

    Raises:
        DiskFullError: there is no room; the earlier checkpoints are untouched.
    """
    path = checkpoint_path(run, progress.step)
    path.parent.mkdir(exist_ok=True)
    moments = {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
    }
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*model.state_dict().values(), *moments.values()))
    with sealed_folder(path, needed=needed, replace=True) as folder, _without_bars():
        save_file(moments, folder / OPTIMIZER)
        (folder / GENERATOR).write_text(json.dumps(dataclasses.asdict(progress)) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    for old in list_checkpoints(run)[:-keep]:
        remove_checkpoint(old)
    return path


def save_model(path: Path, model: Any, tokenizer: Any) -> None:
    """Writes a sealed Hugging Face folder, in the place of one that is there already.

    Raises:
        DiskFullError: there is no room for it.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with sealed_folder(path, needed=needed, replace=True) as folder, _without_bars():
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


def load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Puts the moments of the checkpoint `path` into `optimizer`, which has taken no step yet.

    Raises:
        CheckpointError: the moments are not those of the model's parameters.
    """
    moments = load_file(path / OPTIMIZER)
    parameters = dict(model.named_parameters())
    expected = {f"{name}.{moment}": parameter.shape for name, parameter in parameters.items() for moment in _MOMENTS}
    if {name: tensor.shape for name, tensor in moments.items()} != expected:
        raise CheckpointError(f"{path / OPTIMIZER} does not belong to the model beside it: names or shapes differ.")
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{moment: moments[f"{name}.{moment}"].to(parameter.device) for moment in _MOMENTS},
        }


def find_model(path: str | Path) -> Path:
    """The model folder that `path` means: itself, the `model` folder of a run, or a run's newest checkpoint.

    Raises:
        CheckpointError: there is no model, or only one in a format that is never read.
    """
    path = Path(path)
    if path.suffix in _PICKLES and path.is_file():
        raise CheckpointError(_pickle_sentence(path))
    for folder in (path, path / "model", *reversed(list_checkpoints(path))):
        if (folder / "config.json").is_file():
            break
    else:
        raise CheckpointError(f"{path}: expected a model folder with config.json and model.safetensors.")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
        raise CheckpointError(
            _pickle_sentence(pickles[0])
            if pickles
            else f"{folder / 'model.safetensors'} is missing: the folder has no weights."
        )
    return folder


def open_model(path: str | Path, objective: str | None = None) -> Any:
    """The language model in a folder, in evaluation mode on the CPU, after its files have been verified.

    Arguments:
        path: anything `find_model` understands.
        objective: "mlm" or "clm" to open the weights as that kind of model; None opens what was saved.

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
    objective = objective or _saved_objective(folder)
    auto: Any = transformers.AutoModelForCausalLM if objective == "clm" else transformers.AutoModelForMaskedLM
    try:
        with _without_bars():
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
    yield from sorted(file for file in folder.glob("*.safetensors") if file.name != OPTIMIZER)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
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


def _saved_objective(folder: Path) -> str:
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        raise CheckpointError(
            f"{folder / 'config.json'}: expected JSON whose 'architectures' names the model."
        ) from None
    if not str(architecture).endswith(("ForMaskedLM", "ForCausalLM")):
        raise CheckpointError(f"{folder} holds a {architecture}: expected a masked or causal language model.")
    return "clm" if architecture.endswith("ForCausalLM") else "mlm"


def _pickle_sentence(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is opened, so it is never read: "
        "save the model as safetensors (model.save_pretrained does) and give that folder."
    )
