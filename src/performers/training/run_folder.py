"""The folder of a training run: which run it holds, where that goes on, and that one process works in it at a time.

The folder holds `config.yaml`, `log.jsonl`, the newest checkpoints, `run.json` and, at the end, `model/` and pictures; a task
may add what it reads. Torch is imported only when the folder and the task's inputs are in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from performers.errors import CheckpointError, ConfigError, OutputError
from performers.folders import claim_output, remove_leftovers, temporary_name, verify_folder, write_file, writing
from performers.training.configuration import RUN_CONFIG, TrainConfig, read_config
from performers.training.task import Task

LOG = "log.jsonl"
OPTIMIZER = "optimizer.safetensors"
SHARDS = "shards"
"""The folder of a checkpoint in which each process has written its share of weights and moments."""
GENERATOR = "generator.json"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come; with the seed, all that decides its future draws.

    Attributes:
        seed: the seed of the run.
        step: optimizer steps taken.
        tokens: tokens of context that these steps have read.
        best_step, best_loss: where the validation loss was lowest, and what it was, in a run with patience.
        evaluations_since: how many evaluations there were after that.
    """

    seed: int
    step: int
    tokens: int
    best_step: int = 0
    best_loss: float | None = None
    evaluations_since: int = 0

    def judged(self, loss: float) -> Progress:
        """The same after an evaluation that found this validation loss."""
        if self.best_loss is None or loss < self.best_loss:
            return dataclasses.replace(self, best_step=self.step, best_loss=loss, evaluations_since=0)
        return dataclasses.replace(self, evaluations_since=self.evaluations_since + 1)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        output: the run folder.
        model: the model folder in it.
        steps: optimizer steps taken.
        tokens: tokens of context read.
        loss: the training loss of the last step; NaN if the log has been removed.
        evaluations: the last figures of each set that was evaluated, by its name, such as "validation".
    """

    output: Path
    model: Path
    steps: int
    tokens: int
    loss: float
    evaluations: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, run: Path, progress: Progress) -> Self:
        """What the folder of a finished run says."""
        entries = read_log(run)
        return cls(
            output=run,
            model=run / "model",
            steps=progress.step,
            tokens=progress.tokens,
            loss=next((entry["loss"] for entry in reversed(entries) if "learning_rate" in entry), math.nan),
            evaluations={entry["evaluation"]: entry for entry in entries if "evaluation" in entry},
        )


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run folder that is ready for the loop.

    Attributes:
        path: the folder.
        checkpoint: the verified checkpoint to go on from, or None at the beginning.
        progress: how far the run has come.
    """

    path: Path
    checkpoint: Path | None
    progress: Progress


def run_task(task: Task[Any], *, resume: bool = True, resume_from: str | None = None) -> RunResult:
    """Trains, or goes on with the run that the task's output folder holds.

    Under torchrun every process calls it; the processes share each step's rows.

    Arguments:
        task: what to do.
        resume: False refuses an output folder that holds a run.
        resume_from: the name of the checkpoint to go on from, e.g. "step-00000100"; by default the newest. Checkpoints and log
            lines after it are given up.

    Raises:
        InputError: an input, the configuration, the output folder or a checkpoint is not in order.
        NonFiniteError: a loss or a gradient is not finite; the step was not taken.
        DiskFullError: there is no room to save; the last checkpoint is whole.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; a checkpoint has been saved.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        # torchrun has started the processes anew after one of them died: they go on, wherever the first ones began.
        resume, resume_from = True, None
    if int(os.environ.get("RANK", "0")):
        from performers.training.loop import train

        return train(task, None)
    with hold_run(task, resume=resume, resume_from=resume_from) as folder:
        from performers.training.loop import train

        return train(task, folder)


@contextlib.contextmanager
def hold_run(task: Task[Any], *, resume: bool, resume_from: str | None) -> Iterator[RunFolder]:
    """Makes the run folder ready, and keeps it from other processes for the length of the block.

    Raises:
        InputError: as `run_task`.
    """
    config = task.config
    run = Path(config.output)
    begun = (run / RUN_CONFIG).is_file()
    if begun and not resume:
        raise OutputError(f"{run} holds a run already; give a new folder, or let it go on.")
    if resume_from is not None and not begun:
        raise ConfigError(f"resume_from={resume_from!r}: {run} holds no run to go on with.")
    task.check(begun=begun)
    if not begun:
        claim_output(run)
    with _lock(run):
        checkpoint = _starting_point(run, task, resume_from) if begun else None
        progress = load_progress(checkpoint) if checkpoint else Progress(config.seed, 0, 0)
        _tidy(run, task, progress.step)
        task.prepare(run)
        yield RunFolder(run, checkpoint, progress)


def join_run(task: Task[Any]) -> RunFolder:
    """The run folder that another process of the group holds and has made ready."""
    run = Path(task.config.output)
    checkpoint = next(reversed(list_checkpoints(run)), None)
    progress = load_progress(checkpoint) if checkpoint else Progress(task.config.seed, 0, 0)
    task.prepare(run)
    return RunFolder(run, checkpoint, progress)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none if it has been removed."""
    lines = (run / LOG).read_text(encoding="utf-8").splitlines() if (run / LOG).is_file() else []
    return [json.loads(line) for line in lines]


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; its name is taken from it first, so that no half of it can be mistaken for the whole."""
    doomed = temporary_name(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


def load_progress(path: Path) -> Progress:
    """How far the run had come at the checkpoint `path`, after every file of it has been verified.

    Raises:
        CheckpointError: a file is missing or damaged; names it, and the newest earlier checkpoint if there is one.
    """
    try:
        verify_folder(path)
        for name in (SHARDS if (path / SHARDS).is_dir() else OPTIMIZER, GENERATOR):
            if not (path / name).exists():
                raise CheckpointError(f"{path / name} is missing.")
        progress = Progress(**json.loads((path / GENERATOR).read_text(encoding="utf-8")))
        if path.name != checkpoint_path(path, progress.step).name:
            raise CheckpointError(f"{path / GENERATOR} is of step {progress.step}: expected that of {path.name}.")
    except CheckpointError as error:
        earlier = [other for other in list_checkpoints(path.parent.parent) if other.name < path.name]
        hint = f" Go on from the previous checkpoint with --resume-from {earlier[-1].name}." if earlier else ""
        raise CheckpointError(f"{error}{hint}") from None
    return progress


def _starting_point(run: Path, task: Task[Any], resume_from: str | None) -> Path | None:
    """The checkpoint that a run goes on from; None if it has not come to its first.

    Raises:
        ConfigError: the run began with other values of keys that decide its result, or there is no such checkpoint.
    """
    checkpoints = list_checkpoints(run)
    if resume_from is not None:
        if resume_from not in [checkpoint.name for checkpoint in checkpoints]:
            known = ", ".join(checkpoint.name for checkpoint in checkpoints) or "none"
            raise ConfigError(f"resume_from={resume_from!r}: {run} has no such checkpoint; it has {known}.")
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.name <= resume_from]
    if not checkpoints:
        return None
    config = task.config
    began = type(config).parse(read_config(run / RUN_CONFIG))
    free = config.FREE_ON_RESUME - ({"evaluate_every"} if config.patience else set())  # patience counts evaluations
    differing = [
        f"{key}={getattr(config, key)!r} (the run has {getattr(began, key)!r})"
        for key in type(config).model_fields
        if key not in free and getattr(config, key) != getattr(began, key)
    ]
    if differing:
        raise ConfigError(
            f"{run} holds a run with other settings: {', '.join(differing)}; give its settings, or a new folder "
            f"({task.elsewhere.format(model=run / 'model')})."
        )
    return checkpoints[-1]


def _tidy(run: Path, task: Task[Any], step: int) -> None:
    """Gives up what interrupted writes left and what lies after `step`, and writes the configuration down."""
    remove_leftovers(run)
    if (run / "checkpoints").is_dir():
        remove_leftovers(run / "checkpoints")
    for checkpoint in list_checkpoints(run):
        if checkpoint.name > checkpoint_path(run, step).name:
            remove_checkpoint(checkpoint)
    config: TrainConfig = task.config
    if step == 0 and (run / RUN_CONFIG).is_file():
        # A run without a checkpoint has nothing to lose, and may begin anew with another input.
        task.discard(run, read_config(run / RUN_CONFIG))
    if not (run / RUN_CONFIG).is_file() or (run / RUN_CONFIG).read_text(encoding="utf-8") != config.to_yaml():
        write_file(run / RUN_CONFIG, config.to_yaml())


@contextlib.contextmanager
def _lock(run: Path) -> Iterator[None]:
    """Keeps a second process out of the run folder.

    Raises:
        OutputError: another process is at work in it.
    """
    with writing(run):
        descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{run} is in use by another process; wait for it, or give a new folder.") from None
        yield
    finally:
        os.close(descriptor)
