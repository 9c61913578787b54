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
    device: str,
    dtype: str,
    threads: int | None,
    seed: int,
) -> dict[str, Any]:
    """Takes one step untimed and `steps` timed on concatenated contexts of the bundled sample.

    Returns:
        attention, preset, context, batch_size, device, dtype, threads, parameters, seconds_per_step (the median) and
        tokens_per_second; on cuda peak_bytes too.
    """
    import torch

    from performers.data import Contexts, in_memory_corpus, read_fasta
    from performers.training.configuration import PretrainConfig
    from performers.training.distributed import World, choose_device, choose_dtype, use_threads
    from performers.training.loop import accumulate_gradients, micro_batches, new_model, new_optimizer

    with use_threads(threads), tempfile.TemporaryDirectory() as folder:
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
                "batch_size": batch_size,
                "steps": steps + 1,
                "seed": seed,
            }
        )
        proteins = in_memory_corpus(_enough(read_fasta(config.input), batch_size * context))
        contexts = Contexts(proteins, context, mode="concatenated", seed=seed)
        world = World(0, 1, chosen)
        model = new_model(config).to(chosen).train()
        optimizer = new_optimizer(config, model)
        seconds: list[float] = []
        for step in range(steps + 1):
            started = time.perf_counter()
            examples = micro_batches(config, contexts, step, world)
            accumulate_gradients(model, examples, world, precision).item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
        figures: dict[str, Any] = {
            "attention": attention,
            "preset": preset,
            "context": context,
            "batch_size": batch_size,
            "objective": objective,
            "device": str(chosen),
            "dtype": str(precision).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "parameters": model.num_parameters(),
            "seconds_per_step": statistics.median(seconds[1:]),
            "tokens_per_second": batch_size * context / statistics.median(seconds[1:]),
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
