"""What a training step costs: the very steps of `performers pretrain`, on real proteins, timed."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.benchmarks.isolation import run_alone

if TYPE_CHECKING:
    from performers.data import Record


def measure_training(attention: list[str], **settings: Any) -> list[dict[str, Any]]:
    """Times training steps with each attention mechanism, one process after the other.

    Arguments:
        attention: mechanisms, e.g. ["favor", "exact"].
        settings: the other arguments of `training_steps`.

    Returns:
        For each mechanism the figures of `training_steps` and the peak memory of its process (of the GPU, on cuda).

    Raises:
        InputError: a setting is not valid.
        RunError: a process failed.
    """
    return [
        run_alone("performers.benchmarks.training:training_steps", attention=name, **settings) for name in attention
    ]


def training_steps(
    attention: str,
    preset: str,
    context: int,
    kernel: str,
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
) -> dict[str, Any]:
    """Takes `warm_up` steps untimed and `steps` timed on concatenated contexts of the bundled sample.

    Arguments:
        layer_chunk: `chunk_size_layer` of the model; None leaves it as it is.
        sequence_chunk: as in `PretrainConfig`.
        attention, preset, context, kernel, batch_size, steps, objective, device, dtype, threads, seed: those of the command.

    Returns:
        attention, preset, context, batch_size, objective, layer_chunk, sequence_chunk, device, dtype, threads, parameters, loss
        (of the last step), seconds_per_step (the median) and tokens_per_second; on cuda peak_bytes too.
    """
    import torch

    from performers.data import Contexts, in_memory_corpus, read_fasta
    from performers.training.configuration import PretrainConfig
    from performers.training.distributed import World, choose_device, choose_dtype, keep_freed_memory, use_threads
    from performers.training.loop import accumulate_gradients, micro_batches, new_model, new_optimizer

    with use_threads(threads), tempfile.TemporaryDirectory() as folder:
        keep_freed_memory()
        chosen = choose_device(device)
        precision = choose_dtype(dtype, chosen)
        config = PretrainConfig.parse(
            {
                "input": "bundled:train",
                "output": str(Path(folder) / "run"),
                "objective": objective,
                "context": context,
                "contexts": "concatenated",
                "preset": preset,
                "attention": attention,
                "kernel": kernel if attention == "favor" else None,
                "architecture": {} if layer_chunk is None else {"chunk_size_layer": layer_chunk},
                "sequence_chunk": sequence_chunk,
                "batch_size": batch_size,
                "steps": warm_up + steps,
                "seed": seed,
            }
        )
        proteins = in_memory_corpus(_enough(read_fasta(config.input), batch_size * context))
        contexts = Contexts(proteins, context, mode="concatenated", seed=seed)
        world = World(0, 1, chosen)
        model = new_model(config).to(chosen).train()
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
            "attention": attention,
            "preset": preset,
            "context": context,
            "batch_size": batch_size,
            "objective": objective,
            "layer_chunk": model.config.chunk_size_layer,
            "sequence_chunk": sequence_chunk,
            "device": str(chosen),
            "dtype": str(precision).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "parameters": model.num_parameters(),
            "loss": loss,
            "seconds_per_step": median,
            "tokens_per_second": batch_size * context / median,
        }
        if chosen.type == "cuda":
            figures["peak_bytes"] = torch.cuda.max_memory_allocated(chosen)
        return figures


def _enough(records: Iterable[Record], residues: int) -> Iterator[Record]:
    """The first records that together have so many residues."""
    for record in records:
        yield record
        residues -= len(record.sequence)
        if residues <= 0:
            return
