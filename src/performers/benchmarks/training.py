"""What a training step costs: the very steps of `performers pretrain`, on real proteins, timed."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.benchmarks.isolation import run_alone
from performers.training.configuration import PretrainConfig, read_config

if TYPE_CHECKING:
    from performers.data import Record


def measure_training(attention: list[str], config: str | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Times training steps with each attention mechanism, one process after the other.

    Arguments:
        attention: mechanisms, e.g. ["favor", "exact"].
        config: a file of settings of `performers pretrain`, such as a recipe, whose model is taken in place of a preset: with its
            own attention, and with each of these mechanisms in place of it.
        settings: the other arguments of `training_steps`.

    Returns:
        For each mechanism the figures of `training_steps` and the peak memory of its process (of the GPU, on cuda).

    Raises:
        InputError: a setting is not valid.
        RunError: a process failed.
    """
    kernel = settings.pop("kernel")
    models: list[dict[str, Any]] = [
        {"attention": name, "kernel": kernel if name == "favor" else None} for name in attention
    ]
    if config is not None:
        given = PretrainConfig.parse({"input": "bundled:train", **read_config(config), "output": "unused"})
        size = {key: value for key, value in given.architecture.items() if key != "attention_kwargs"}
        settings["preset"] = given.preset
        models = [
            {key: getattr(given, key) for key in ("attention", "architecture", "kernel", "num_features", "projection")},
            *({**model, "architecture": size} for model in models),
        ]
    return [run_alone("performers.benchmarks.training:training_steps", **model, **settings) for model in models]


def training_steps(
    attention: str | list[str] | None,
    preset: str | None,
    context: int,
    kernel: str | None,
    batch_size: int,
    steps: int,
    objective: str,
    layer_chunk: int | None,
    sequence_chunk: int | None,
    warm_up: int,
    device: str,
    dtype: str,
    threads: int | None,
    seed: int,
    architecture: dict[str, Any] | None = None,
    num_features: int | None = None,
    projection: str | None = None,
) -> dict[str, Any]:
    """Takes `warm_up` steps untimed and `steps` timed on concatenated contexts of the bundled sample.

    Arguments:
        layer_chunk: `chunk_size_layer` of the model; None leaves it as it is.
        attention, architecture, kernel, num_features, projection, sequence_chunk: as in `PretrainConfig`.
        preset, context, batch_size, steps, objective, device, dtype, threads, seed: those of the command.

    Returns:
        preset, context, batch_size, objective, sequence_chunk, and the figures of `time_steps`.
    """
    keys = {
        "input": "bundled:train",
        "objective": objective,
        "context": context,
        "contexts": "concatenated",
        "preset": preset,
        "attention": attention,
        "kernel": kernel,
        "num_features": num_features,
        "projection": projection,
        "architecture": (architecture or {}) | ({} if layer_chunk is None else {"chunk_size_layer": layer_chunk}),
        "sequence_chunk": sequence_chunk,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }
    figures = time_steps(keys, warm_up, steps)
    return {
        "preset": preset,
        "context": context,
        "batch_size": batch_size,
        "objective": objective,
        "sequence_chunk": sequence_chunk,
        **figures,
    }


def time_steps(keys: dict[str, Any], warm_up: int, steps: int) -> dict[str, Any]:
    """Takes `warm_up` steps of a pretraining run untimed and `steps` timed, without a run folder.

    Arguments:
        keys: of `PretrainConfig`, without "output" and "steps".
        warm_up: steps before those that are timed.
        steps: that are timed, at least one.

    Returns:
        attention (the mechanisms of the layers, joined by "+"), device, dtype, threads, layer_chunk, parameters, loss (of the
        last step), seconds_per_step (the median) and tokens_per_second; on cuda peak_bytes too.

    Raises:
        InputError: a key is not valid.
    """
    import torch

    from performers.data import Contexts, Corpus, in_memory_corpus, read_fasta
    from performers.training.distributed import World, choose_device, choose_dtype, keep_freed_memory, use_threads
    from performers.training.language_modelling import micro_batches, new_model
    from performers.training.loop import accumulate_gradients
    from performers.training.optimizers import new_optimizer

    with use_threads(keys.get("threads")), tempfile.TemporaryDirectory() as folder:
        keep_freed_memory()
        output = str(Path(folder) / "run")
        config = PretrainConfig.parse({**keys, "output": output, "steps": warm_up + steps})
        device = choose_device(config.device)
        precision = choose_dtype(config.dtype, device)
        if (Path(config.input[0]) / "corpus.json").is_file():
            proteins = Corpus.open(config.input[0])
        else:
            proteins = in_memory_corpus(_enough(read_fasta(config.input), config.batch_size * config.context))
        contexts = Contexts(proteins, config.context, mode="concatenated", seed=config.seed)
        world = World(0, 1, device)
        model = new_model(config).to(device).train()
        optimizer = new_optimizer(config, model)
        seconds: list[float] = []
        loss = float("nan")
        for step in range(warm_up + steps):
            started = time.perf_counter()
            examples = micro_batches(config, contexts, step, world)
            loss = accumulate_gradients(model, examples, world, precision, config.sequence_chunk).item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[warm_up:])
        figures: dict[str, Any] = {
            "attention": "+".join(dict.fromkeys(model.config.mechanisms)),
            "device": str(device),
            "dtype": str(precision).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "layer_chunk": model.config.chunk_size_layer,
            "parameters": model.num_parameters(),
            "loss": loss,
            "seconds_per_step": median,
            "tokens_per_second": config.batch_size * config.context / median,
        }
        if device.type == "cuda":
            figures["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        return figures


def _enough(records: Iterable[Record], residues: int) -> Iterator[Record]:
    """The first records that together have so many residues."""
    for record in records:
        yield record
        residues -= len(record.sequence)
        if residues <= 0:
            return
