"""The training loop: a task and a prepared run folder in, a trained model in the folder out.

There is one loop, in `train`, for every `Task`. What a step does is a function of the configuration, the weights and the number
of the step; nothing is remembered between steps but weights and optimizer moments. So a run that is killed at any moment and
started again ends with the same bits, and any number of processes takes the same steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from performers.errors import ConfigError, NonFiniteError, RunError
from performers.folders import room_for
from performers.randomness import derive_seed
from performers.training.checkpoint import load_optimizer, save_checkpoint, save_model, weights_files
from performers.training.configuration import TrainConfig
from performers.training.distributed import (
    World,
    autocast,
    choose_dtype,
    join_world,
    keep_freed_memory,
    use_threads,
    whole,
)
from performers.training.optimizers import new_optimizer
from performers.training.progress import ProgressDisplay
from performers.training.run_folder import LOG, Progress, RunFolder, RunResult, checkpoint_path, join_run
from performers.training.runs import RunRecord
from performers.training.task import Figures, Task


def train(task: Task[Any], folder: RunFolder | None) -> RunResult:
    """Takes the steps that a run still lacks, and leaves the finished model.

    Arguments:
        task: what to do.
        folder: the folder, held by this process; None on the processes that join the one which holds it.

    Raises:
        NonFiniteError, DiskFullError, KeyboardInterrupt, SystemExit: as `run_task`.
    """
    config = task.config
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_threads(config.threads))
        keep_freed_memory()
        world = stack.enter_context(join_world(config.device, **task.layout))
        folder = folder or join_run(task)
        if config.batch_size % world.data_size:
            groups = "processes" if world.sequence is None else "groups of processes"
            raise ConfigError(f"batch_size={config.batch_size}: expected a multiple of the {world.data_size} {groups}.")
        record = RunRecord(
            folder.path,
            task.command,
            arguments=config.model_dump(),
            seed=config.seed,
            device=str(world.device),
            inputs=task.inputs(),
        )
        if world.is_main:
            stack.enter_context(record)
        model = world.place(task.open(folder.checkpoint))
        progress = _take_steps(task, folder, world, model, record)
        if world.is_main:
            kept = progress.best_step if config.patience else progress.step
            if world.is_sharded or kept < progress.step:
                model = task.open(checkpoint_path(folder.path, kept) if kept else None)
            save_model(folder.path / "model", task, model.eval())
            task.picture(folder.path)
        world.wait()
        result = RunResult.read(folder.path, progress)
        for file in weights_files(result.model):
            record.weights(file)
        record.results(loss=result.loss, tokens=result.tokens, evaluations=result.evaluations)
    return result


def _take_steps(
    task: Task[Any], folder: RunFolder, world: World, model: torch.nn.Module, record: RunRecord
) -> Progress:
    """The loop."""
    config, progress, saved = task.config, folder.progress, folder.checkpoint
    world.check_agreement(model)
    optimizer = new_optimizer(config, model)
    if saved:
        load_optimizer(saved, model, optimizer, progress.step)
    dtype = choose_dtype(config.dtype, world.device)

    with (
        _Interruption() as interruption,
        _Log(folder, world) as log,
        ProgressDisplay(config.steps, progress.step, shown=world.is_main) as display,
    ):

        def evaluate() -> float | None:
            """Measures the model; returns the validation loss."""
            loss: float | None = None
            for figures in task.evaluate(model, world, dtype):
                log.evaluation(progress, figures)
                display.note(f"step {progress.step}: {figures.sentence}")
                if figures.name == "validation":
                    loss = figures.logged["loss"]
            return loss

        display.note(
            f"{_count(model)} parameters on {world.device} x {world.size}; {task.describe()}; "
            f"steps {progress.step:,} to {config.steps:,}"
        )
        if task.evaluates_at_the_start and not saved:
            found = evaluate()
            if config.patience and found is not None:
                progress = progress.judged(found)
        for step in range(progress.step, progress.step if _has_settled(progress, config) else config.steps):
            started = time.monotonic()
            # Our own draws are all keyed; this is for foreign modules and for torch.compile.
            torch.manual_seed(derive_seed(config.seed, "global", step, world.rank))
            if task.before_step(model, step):
                world.check_agreement(model)
            rate = config.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = rate

            with _explained(step + 1, saved, task.needs_less):
                loss = task.accumulate(model, step, world, dtype)
            world.sum_gradients_(model.parameters())
            norm = whole(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            # Every process learns of the loss and of the signals of all, so they stop at the same step.
            loss_value, *stop = world.sum_(torch.stack((loss, *interruption.flags(world.device)))).tolist()
            if not (math.isfinite(loss_value) and math.isfinite(norm.item())):
                raise _non_finite(model, world, loss_value, step + 1, saved)
            if config.clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
            optimizer.step()
            optimizer.zero_grad()
            if world.sequence is not None and step == folder.progress.step:
                display.note(_traffic(task, model, world, dtype, record))

            tokens = task.tokens(step)
            progress = dataclasses.replace(progress, step=step + 1, tokens=progress.tokens + tokens)
            display.step(progress.step, loss_value, tokens, time.monotonic() - started)
            log.training(progress, loss_value, rate, norm.item(), display.tokens_per_second)
            last = progress.step == config.steps
            if last or progress.step % config.evaluation_interval == 0:
                found = evaluate()
                if config.patience:
                    if found is None:
                        raise ConfigError(f"patience={config.patience}: there is no validation set to go by.")
                    progress = progress.judged(found)
            last = last or _has_settled(progress, config)
            is_best = progress.best_step == progress.step
            if last or is_best or any(stop) or progress.step % config.checkpoint_every == 0:
                log.flush()
                save_checkpoint(folder.path, task, model, optimizer, progress, world)
                world.wait()
                saved = checkpoint_path(folder.path, progress.step)
            if any(stop) and not last:
                display.note(f"interrupted and saved after step {progress.step}; the same command goes on from there")
                interruption.leave(stop)
            if last:
                break
        if progress.step < config.steps:
            display.note(
                f"stopped after step {progress.step}: the validation loss was lowest at step {progress.best_step}"
            )
    return progress


def _traffic(task: Task[Any], model: torch.nn.Module, world: World, dtype: torch.dtype, record: RunRecord) -> str:
    """What attention has sent in the first step, beside what ring attention would; for people and for `run.json`."""
    assert world.sequence is not None
    sent = world.most(world.sequence.bytes_sent)
    ring = task.ring_attention_bytes(model, world, dtype)
    record.results(attention_bytes_per_step=sent, ring_attention_bytes_per_step=ring)
    return (
        f"attention sends {sent:,} bytes a process and step between the {world.sequence.size} that hold a context; "
        f"ring attention would send {ring:,}"
    )


def _has_settled(progress: Progress, config: TrainConfig) -> bool:
    """Whether a run with patience has lost it."""
    return 0 < config.patience <= progress.evaluations_since


def _count(model: torch.nn.Module) -> str:
    """The number of parameters, and of those that are trained where not all are."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    return f"{total:,}" if trained == total else f"{trained:,} of {total:,}"


def accumulate_gradients(
    forward: Callable[..., Any],
    examples: list[dict[str, torch.Tensor]],
    world: World,
    dtype: torch.dtype,
    sequence_chunk: int | None = None,
) -> torch.Tensor:
    """Adds this process's share of the gradients, of which the sum over all processes is the gradient of the step.

    The loss is a sum over labelled tokens, divided by their number over all processes, so nothing depends on how the tokens
    are dealt out.

    Arguments:
        forward: takes an example and `num_items_in_batch`, and returns an object with the `loss`: a model, or anything that
            computes another loss with one.
        examples: a forward pass each, `labels` among them; -100 where nothing is scored.
        world: the processes.
        dtype: the precision of the forward pass.
        sequence_chunk: tokens at a time, as in `accumulate_in_chunks`; then `forward` is a causal model.

    Returns:
        This process's part of the loss, a scalar.
    """
    stretches = [world.stretch(example) for example in examples]
    labelled = sum(int((example["labels"] >= 0).sum()) for example, _ in stretches)
    items = world.sum_(torch.tensor(labelled, device=world.device))
    loss = torch.zeros((), device=world.device)
    for example, shard in stretches:
        placed = {key: value.to(world.device) for key, value in example.items()}
        if sequence_chunk is not None:
            from performers.training.streaming import accumulate_in_chunks

            loss += accumulate_in_chunks(forward, placed, items, sequence_chunk, lambda: autocast(world.device, dtype))
            continue
        with autocast(world.device, dtype):
            part = forward(**placed, **shard, num_items_in_batch=items).loss
        part.backward()
        loss += part.detach().float()
    return loss


@contextlib.contextmanager
def _explained(step: int, saved: Path | None, needs_less: str = "") -> Generator[None]:
    """Says in a sentence what a user can do about memory or a compiler that is not there.

    Raises:
        RunError: a step does not fit into memory, or cannot be compiled.
    """
    kept = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise RunError(
                f"The model cannot be compiled ({str(error).splitlines()[0]}); --compile needs a C++ compiler, leave it out "
                "where there is none."
            ) from error
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise RunError(f"Step {step} does not fit into memory; {kept}. {needs_less}") from error


def _non_finite(model: torch.nn.Module, world: World, loss: float, step: int, saved: Path | None) -> NonFiniteError:
    first = next(
        (
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not world.is_finite(parameter.grad)
        ),
        None,
    )
    what = f"The loss is {loss}" if not math.isfinite(loss) else f"The gradient is not finite (first in {first})"
    kept = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
    return NonFiniteError(f"{what} at step {step}; the step was not taken, and {kept}.")


class _Log:
    """`log.jsonl`, a line per step and per evaluation, and the same for TensorBoard where it is installed.

    The lines depend on nothing but the configuration, so that the log of a resumed run is that of an uninterrupted one: times
    and speeds go to TensorBoard and the screen. Lines after the checkpoint that the run goes on from are given up.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        self._path = folder.path / LOG
        self._shown = world.is_main
        self._writer: Any = None
        if not self._shown:
            return
        kept = _length_up_to(self._path, folder.progress.step) if folder.checkpoint else 0
        with room_for(self._path):
            self._file = self._path.open("ab")
            self._file.truncate(kept)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=folder.progress.step + 1)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def training(self, progress: Progress, loss: float, rate: float, norm: float, speed: float) -> None:
        """Logs one step."""
        figures = {"loss": loss, "learning_rate": rate, "gradient_norm": norm}
        self._write({"step": progress.step, "tokens": progress.tokens, **figures})
        self._board("training", {**figures, "tokens_per_second": speed}, progress.step)

    def evaluation(self, progress: Progress, figures: Figures) -> None:
        """Logs one evaluation."""
        self._write({"step": progress.step, "evaluation": figures.name, **figures.logged})
        self._board(figures.name, figures.charted, progress.step)

    def flush(self) -> None:
        """Waits until all lines are on the disk."""
        if self._shown:
            os.fsync(self._file.fileno())

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._shown:
            with room_for(self._path):
                self._file.write(json.dumps(entry).encode() + b"\n")
                self._file.flush()

    def _board(self, group: str, figures: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def _length_up_to(log: Path, step: int) -> int:
    """The bytes of the log's lines up to `step`; the last line of a killed run may be torn."""
    length = 0
    if log.exists():
        with log.open("rb") as stream, contextlib.suppress(ValueError):
            for line in stream:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
                length += len(line)
    return length


class _Interruption:
    """Remembers the first SIGINT or SIGTERM, so that the loop can save between two steps; a second one acts at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._caught: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._remember) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def flags(self, device: torch.device) -> list[torch.Tensor]:
        """For SIGINT and SIGTERM, 1 if this process has caught it and else 0."""
        return [torch.tensor(float(self._caught == number), device=device) for number in self._SIGNALS]

    def leave(self, flags: list[float]) -> NoReturn:
        """Ends the run as the signal asked.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: for SIGTERM, with status 143.
        """
        if flags[0]:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
