"""The training loop: a prepared run folder in, a trained model in it out.

There is one loop, in `train`. What a step does is a function of the configuration, the weights and the number of the step: its
contexts are numbered from the start of training, and masks, dropout and redraws are drawn from (seed, step, row). So a run
that is killed at any moment and started again ends with the same bits, and any number of processes takes the same steps.
"""

from __future__ import annotations

import contextlib
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

import numpy as np
import torch

from performers.data import VOCAB_SIZE, Contexts, mask_tokens, next_token_labels
from performers.errors import ConfigError, NonFiniteError, RunError
from performers.folders import room_for
from performers.randomness import derive_seed
from performers.training.checkpoint import (
    find_model,
    load_optimizer,
    open_model,
    save_checkpoint,
    save_model,
    weights_files,
)
from performers.training.configuration import PretrainConfig
from performers.training.distributed import (
    World,
    autocast,
    choose_dtype,
    join_world,
    keep_freed_memory,
    use_threads,
)
from performers.training.evaluation import Evaluation, evaluate
from performers.training.plots import plot_loss
from performers.training.pretraining import LOG, PretrainResult, Progress, RunFolder, checkpoint_path, join_run
from performers.training.progress import ProgressDisplay
from performers.training.runs import RunRecord, describe_file

_DEFAULT_REDRAW_INTERVAL = 1000


def train(config: PretrainConfig, folder: RunFolder | None) -> PretrainResult:
    """Takes the steps that a run still lacks, and leaves the finished model.

    Arguments:
        config: what to do.
        folder: the folder, held by this process; None on the processes that join the one which holds it.

    Raises:
        NonFiniteError, DiskFullError, KeyboardInterrupt, SystemExit: as `pretrain`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_threads(config.threads))
        keep_freed_memory()
        world = stack.enter_context(join_world(config.device))
        folder = folder or join_run(config)
        if config.batch_size % world.size:
            raise ConfigError(f"batch_size={config.batch_size}: expected a multiple of the {world.size} processes.")
        record = RunRecord(
            folder.path,
            "pretrain",
            arguments=config.model_dump(),
            seed=config.seed,
            device=str(world.device),
            inputs=[*folder.corpus.metadata["report"]["inputs"], *_initial_weights(config)],
        )
        if world.is_main:
            stack.enter_context(record)
        model = open_model(folder.checkpoint) if folder.checkpoint else new_model(config)
        if config.sequence_chunk is not None and not model.has_fixed_states:
            raise ConfigError(
                f"sequence_chunk={config.sequence_chunk}: expected attention whose state has a fixed size in every layer, such "
                f"as favor, but the model has {', '.join(dict.fromkeys(model.config.mechanisms))}."
            )
        tokenizer = _tokenizer(config)
        progress = _take_steps(config, folder, world, model.to(world.device), tokenizer)
        if world.is_main:
            save_model(folder.path / "model", model.eval(), tokenizer)
            plot_loss(folder.path / LOG, folder.path / "loss.png", _heading(config))
        world.wait()
        result = PretrainResult.read(folder.path, progress)
        for file in weights_files(result.model):
            record.weights(file)
        record.results(loss=result.loss, tokens=result.tokens, evaluations=result.evaluations)
    return result


def _take_steps(config: PretrainConfig, folder: RunFolder, world: World, model: Any, tokenizer: Any) -> Progress:
    """The loop."""
    progress, saved = folder.progress, folder.checkpoint
    contexts = Contexts(folder.corpus, config.context, mode=config.contexts, seed=config.seed)
    optimizer = new_optimizer(config, model)
    if saved:
        load_optimizer(saved, model, optimizer, progress.step)
    if config.gradient_checkpointing:
        # Renamed in the transformers of 2026.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    model.train()
    forward = torch.compile(model) if config.compile else model
    dtype = choose_dtype(config.dtype, world.device)
    redraw_every = _redraw_interval(config, model)

    with (
        _Interruption() as interruption,
        _Log(folder.path, world, progress.step) as log,
        ProgressDisplay(config.steps, progress.step, shown=world.is_main) as display,
    ):
        display.note(
            f"{model.num_parameters():,} parameters on {world.device} x {world.size}; {len(folder.corpus):,} proteins, "
            f"{folder.corpus.num_residues:,} residues; steps {progress.step:,} to {config.steps:,}"
        )
        for step in range(progress.step, config.steps):
            started = time.monotonic()
            # Our own draws are all keyed; this is for foreign modules and for torch.compile.
            torch.manual_seed(derive_seed(config.seed, "global", step, world.rank))
            if redraw_every and step and step % redraw_every == 0:
                model.redraw_features_(config.seed, step)
            rate = config.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = rate

            with _explained(step + 1, saved):
                examples = micro_batches(config, contexts, step, world)
                loss = accumulate_gradients(forward, examples, world, dtype, config.sequence_chunk)
            world.sum_gradients_(model.parameters())
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            # Every process learns of the loss and of the signals of all, so they stop at the same step.
            loss_value, *stop = world.sum_(torch.stack((loss, *interruption.flags(world.device)))).tolist()
            if not (math.isfinite(loss_value) and math.isfinite(norm.item())):
                raise _non_finite(model, loss_value, step + 1, saved)
            if config.clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
            optimizer.step()
            optimizer.zero_grad()

            tokens = config.batch_size * config.context
            progress = Progress(config.seed, step + 1, progress.tokens + tokens)
            display.step(progress.step, loss_value, tokens, time.monotonic() - started)
            log.training(progress, loss_value, rate, norm.item(), display.tokens_per_second)
            last = progress.step == config.steps
            if last or progress.step % config.evaluation_interval == 0:
                for name, proteins in folder.evaluation_sets.items():
                    figures = evaluate(
                        model, proteins, seed=config.seed, batch_tokens=config.evaluate_tokens, dtype=dtype, world=world
                    )
                    log.evaluation(progress, name, figures)
                    display.note(
                        f"step {progress.step}: {name} accuracy {figures.accuracy:.4f} (unigram {figures.baseline_accuracy:.4f})"
                        f", perplexity {figures.perplexity:.3f} (unigram {figures.baseline_perplexity:.3f})"
                    )
            if last or any(stop) or progress.step % config.checkpoint_every == 0:
                log.flush()
                if world.is_main:
                    save_checkpoint(folder.path, model, tokenizer, optimizer, progress, keep=config.keep)
                world.wait()
                saved = checkpoint_path(folder.path, progress.step)
            if any(stop) and not last:
                display.note(f"interrupted and saved after step {progress.step}; the same command goes on from there")
                interruption.leave(stop)
    return progress


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
        examples: what `micro_batches` returns.
        world: the processes.
        dtype: the precision of the forward pass.
        sequence_chunk: tokens at a time, as in `accumulate_in_chunks`; then `forward` is a causal model.

    Returns:
        This process's part of the loss, a scalar.
    """
    labelled = sum(int((example["labels"] >= 0).sum()) for example in examples)
    items = world.sum_(torch.tensor(labelled, device=world.device))
    loss = torch.zeros((), device=world.device)
    for example in examples:
        placed = {key: value.to(world.device) for key, value in example.items()}
        if sequence_chunk is not None:
            from performers.training.streaming import accumulate_in_chunks

            loss += accumulate_in_chunks(forward, placed, items, sequence_chunk, lambda: autocast(world.device, dtype))
            continue
        with autocast(world.device, dtype):
            part = forward(**placed, num_items_in_batch=items).loss
        part.backward()
        loss += part.detach().float()
    return loss


def micro_batches(config: PretrainConfig, contexts: Contexts, step: int, world: World) -> list[dict[str, torch.Tensor]]:
    """This process's share of step `step`, as arguments of the model's forward pass, a forward pass each.

    Row i of the step is context `step * batch_size + i` since the start of training; process r takes rows r, r + size, ... .
    Masks and dropout keys belong to rows, so how the rows are dealt out changes nothing.

    Returns:
        input_ids, labels and position_ids of shape (rows, context), int64, when contexts are concatenated; of shape
        (1, rows * context) with cu_seqlens when they are packed; and dropout_keys of shape (rows,).
    """
    first = step * config.batch_size
    mine = range(first + world.rank, first + config.batch_size, world.size)
    at_once = config.micro_batch_size or len(mine)
    examples: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(mine), at_once):
        rows = np.asarray(mine[start : start + at_once])
        batch = contexts.rows(rows)
        if config.objective == "mlm":
            inputs, labels = mask_tokens(
                batch.input_ids,
                rows,
                seed=config.seed,
                step=step,
                scheme=config.scheme,
                proportion=config.mask_proportion,
            )
        else:
            inputs, labels = batch.input_ids, next_token_labels(batch.input_ids, batch.segments)
        example = {"input_ids": inputs, "labels": labels, "position_ids": batch.position_ids}
        if batch.segments is not None:
            example = {key: value.reshape(1, -1) for key, value in example.items()} | {"cu_seqlens": batch.segments}
        example["dropout_keys"] = np.array([derive_seed(config.seed, "dropout", step, int(row)) for row in rows])
        examples.append({key: torch.from_numpy(value) for key, value in example.items()})
    return examples


def new_model(config: PretrainConfig) -> Any:
    """The model that a run begins with: new from a preset, or from a model folder."""
    from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

    if config.init_from is not None:
        model = open_model(config.init_from, config.objective)
        if config.dropout is not None:
            raise ConfigError("dropout and init_from exclude each other: a model folder brings its own.")
        return model
    favor = {
        key: value
        for key, value in (
            ("kernel", config.kernel),
            ("num_features", config.num_features),
            ("projection", config.projection),
        )
        if value is not None
    }
    attention = config.attention or ["favor"]
    values: dict[str, Any] = {"attention": attention[0] if len(attention) == 1 else attention, "seed": config.seed}
    if favor and "favor" not in attention:
        raise ConfigError(
            f"{next(iter(favor))} belongs to favor attention, which no layer of attention={attention} has."
        )
    if favor:
        values["attention_kwargs"] = favor if len(set(attention)) == 1 else {"favor": favor}
    if config.dropout is not None:
        values["hidden_dropout_prob"] = config.dropout
    architecture = PerformerConfig.preset(config.preset or "small", **{**values, **config.architecture})
    if architecture.vocab_size != VOCAB_SIZE:
        raise ConfigError(f"vocab_size={architecture.vocab_size}: expected the {VOCAB_SIZE} tokens of residues.")
    torch.manual_seed(derive_seed(config.seed, "initialization"))
    return (PerformerForCausalLM if config.objective == "clm" else PerformerForMaskedLM)(architecture)


def _heading(config: PretrainConfig) -> str:
    if config.objective == "clm":
        return "Next-residue prediction"
    # Kept residues are easy to name, so the two losses are comparable only where the schemes are the same.
    return f"Masked residues: scheme {config.scheme} in training, mask in evaluation"


def _initial_weights(config: PretrainConfig) -> list[dict[str, Any]]:
    """The weights files that a run began from, as far as they are still there when it goes on."""
    if config.init_from is None or not Path(config.init_from).exists():
        return []
    return [describe_file(file) for file in weights_files(find_model(config.init_from))]


def _tokenizer(config: PretrainConfig) -> Any:
    from performers.models import PerformerTokenizer

    return PerformerTokenizer(add_eos=config.objective == "mlm")


def new_optimizer(config: PretrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW (1711.05101); vectors, that is biases and norms, do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def _redraw_interval(config: PretrainConfig, model: Any) -> int:
    """Steps between redraws; 0 for never."""
    if config.redraw_every is not None:
        return config.redraw_every
    return _DEFAULT_REDRAW_INTERVAL if model.redraws_by_default else 0


@contextlib.contextmanager
def _explained(step: int, saved: Path | None) -> Generator[None]:
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
        raise RunError(
            f"Step {step} does not fit into memory; {kept}. A smaller --micro-batch-size or --context needs less, and so does "
            "--gradient-checkpointing, or --sequence-chunk for a causal model."
        ) from error


def _non_finite(model: torch.nn.Module, loss: float, step: int, saved: Path | None) -> NonFiniteError:
    first = next(
        (
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ),
        None,
    )
    what = f"The loss is {loss}" if not math.isfinite(loss) else f"The gradient is not finite (first in {first})"
    kept = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
    return NonFiniteError(f"{what} at step {step}; the step was not taken, and {kept}.")


class _Log:
    """`log.jsonl`, a line per step and per evaluation, and the same for TensorBoard where it is installed.

    The lines depend on nothing but the configuration, so that the log of a resumed run is that of an uninterrupted one: times
    and speeds go to TensorBoard and the screen. Lines after step `step` are given up.
    """

    def __init__(self, run: Path, world: World, step: int) -> None:
        self._path = run / LOG
        self._shown = world.is_main
        self._writer: Any = None
        if not self._shown:
            return
        kept = _length_up_to(self._path, step)
        with room_for(self._path):
            self._file = self._path.open("ab")
            self._file.truncate(kept)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

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

    def evaluation(self, progress: Progress, name: str, figures: Evaluation) -> None:
        """Logs one evaluation."""
        losses = {"loss": math.log(figures.perplexity), "baseline_loss": math.log(figures.baseline_perplexity)}
        self._write({"step": progress.step, "evaluation": name, **losses, **figures.to_dict()})
        self._board(name, {"accuracy": figures.accuracy, "perplexity": figures.perplexity}, progress.step)

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
