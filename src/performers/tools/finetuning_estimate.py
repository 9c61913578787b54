"""What a finetuning will take, said before it begins: its settings, a model and labelled proteins in; time and bytes out.

One step is taken on the device and thrown away. Its time per token holds for all steps, and a third of it for tokens that are
only read: backward takes about twice as long as forward. Nothing is written here.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from performers.errors import RunError
from performers.folders import room_for
from performers.tools.beside import say
from performers.tools.finetuning import NEEDS_LESS, FinetuneConfig
from performers.tools.jobs import duration
from performers.tools.labelled import LabelledProteins, held_out_share
from performers.tools.language_model import LanguageModel, is_want_of_memory
from performers.tools.learning import Lessons
from performers.training.distributed import World, choose_device, choose_dtype, use_threads

_MOMENTS = 2  # that an optimizer keeps of a parameter, at most
_PICTURES = 150_000  # bytes of the pictures and texts of an output folder
_QUICK = 5.0  # seconds; what comes first is slower than what follows, which shows in a quick step only


def announce(
    config: FinetuneConfig, reader: LanguageModel, proteins: LabelledProteins, done: int = 0
) -> dict[str, Any]:
    """Says what a run will take, and refuses one that there is no room for.

    Arguments:
        config, reader, proteins, done: as of `estimate`.

    Returns:
        The attributes of the `Estimate`.

    Raises:
        ConfigError, RunError: as `estimate`.
        DiskFullError: there is no room for the output.
    """
    found = estimate(config, reader, proteins, done)
    say(
        f"{found.proteins:,} proteins, {found.residues:,} residues; {'at most ' if config.patience else ''}{found.steps:,} steps "
        f"of {config.batch_size}: about {duration(found.seconds)} on {found.device}, {found.bytes / 1e6:,.1f} MB in "
        f"{config.folder}."
    )
    with room_for(config.folder, found.bytes_to_write):
        return asdict(found)


@dataclass(frozen=True)
class Estimate:
    """What is to be done.

    Attributes:
        proteins, residues: in the table.
        steps: that are left, if training does not stop early.
        seconds: they take at most, with all evaluations.
        bytes: of the output folder.
        bytes_to_write: that have to be free; a checkpoint is written before an older one goes.
        device: that it was measured on.
    """

    proteins: int
    residues: int
    steps: int
    seconds: float
    bytes: int
    bytes_to_write: int
    device: str


def estimate(config: FinetuneConfig, reader: LanguageModel, proteins: LabelledProteins, done: int = 0) -> Estimate:
    """Times a step and counts what there is to do.

    Arguments:
        config: of the run.
        reader: the language model.
        proteins: with or without sets; without, shares of them are assumed.
        done: steps that are taken already.

    Raises:
        ConfigError: the device is none.
        RunError: a step does not fit into memory.
    """
    training, held_out = len(proteins.of("train")), len(proteins.of("validation"))
    if not proteins.sets:
        held_out = round(held_out_share(len(set(proteins.sequences)), config.held_out) * len(proteins))
        training = len(proteins) - 2 * held_out
        proteins = replace(proteins, sets=("train",) * len(proteins))
    device = choose_device(config.device)
    residues = sum(map(len, proteins.sequences))
    mean = residues / len(proteins) + 2
    with use_threads(config.threads):
        lessons = Lessons(config, reader, proteins)
        model: Any = lessons.model(None).to(device)
        pace = _seconds_of_a_step(config, lessons, model, device) / lessons.tokens(0)
    steps = max(config.steps - done, 0)
    evaluations = math.ceil(steps / config.evaluation_interval) + (not done)
    read = evaluations * min(config.evaluate_proteins, held_out) + len(proteins) - training
    read += len(proteins) if config.baselines else 0
    read += lessons.probed if config.linear_probe and not done else 0
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    model_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    checkpoint = (1 + _MOMENTS) * trained
    kept = config.keep + (config.patience > 0)
    num_bytes = model_bytes + kept * checkpoint + 2 * residues + 64 * len(proteins) + _PICTURES
    return Estimate(
        proteins=len(proteins),
        residues=residues,
        steps=steps,
        seconds=round(pace * mean * (steps * config.batch_size + read / 3) / processes, 3),
        bytes=num_bytes,
        bytes_to_write=model_bytes + checkpoint if done else num_bytes + checkpoint,
        device=str(device),
    )


def _seconds_of_a_step(config: FinetuneConfig, lessons: Lessons, model: Any, device: Any) -> float:
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        try:
            loss = lessons.accumulate(model, 0, World(0, 1, device), choose_dtype(config.dtype, device))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not is_want_of_memory(error):
                raise
            raise RunError(f"A step does not fit into memory. {NEEDS_LESS}") from error
        loss.item()  # waits for the device
        seconds = time.monotonic() - started
        if seconds > _QUICK:
            break
    return seconds
