"""One cell of `performers benchmark cost` and `concatenated`: a system in a model, and what a step of it takes.

The measurements are called in a process of their own and know nothing of each other. A cell is a dictionary:

    part            "layer" (one layer of the model, on vectors), or "model" (tokens in, loss out)
    system          a name in `performers.benchmarks.systems.SYSTEMS`
    size            heads, layers, d_ff, d
    objective       "mlm" (bidirectional) or "clm" (causal)
    recomputation   "none" (the backward pass finds everything in memory), "layers" (it computes each layer again), "reversible"
                    (layers whose inputs follow from their outputs), or "default" (as the package comes: in chunks of long
                    sequences)
    optimizer       whether a step of AdamW belongs to the pass
    dtype           "float32", or "bfloat16" for autocast
    length, batch_size, device, threads, seed
    seconds         how long passes are repeated to time them
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from performers.attention import Mechanism
from performers.benchmarks.energy import energy_of
from performers.benchmarks.experiment import DONE, UNAVAILABLE, Cell, Figures
from performers.benchmarks.isolation import or_no_room, refuse_beyond_available_memory
from performers.benchmarks.systems import architecture
from performers.errors import MissingExtraError
from performers.memory import forget_peak, peak_memory, resident_memory
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.models.modeling_performer import PerformerAttention
from performers.training.distributed import autocast

_WARM_UP_TOKENS = 64


class IdentityAttention(Mechanism):
    """Attention that returns the values: what remains of a model's cost without any."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        """The values; queries and keys take part in nothing."""
        return value


@or_no_room
def step_memory(cell: Cell) -> Figures:
    """Makes one pass and weighs it.

    Returns:
        status; base_bytes, of the process with the model before; peak_bytes, its largest; seconds that the pass took, with memory
        that is given back at once. On cuda bytes are what torch has allocated.
    """
    step = _Step(cell)
    step.run(_WARM_UP_TOKENS)  # the code of the libraries is in memory now
    on_cuda = step.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(step.device)
        torch.cuda.reset_peak_memory_stats(step.device)
        base = torch.cuda.memory_allocated(step.device)
    else:
        forget_peak()
        base = resident_memory()
    started = time.perf_counter()
    step.run(cell["length"])
    step.wait()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(step.device) if on_cuda else peak_memory()
    return {"status": DONE, "base_bytes": base, "peak_bytes": peak, "seconds": seconds}


@or_no_room
def step_time(cell: Cell) -> Figures:
    """Times passes after a short one.

    Returns:
        status; seconds, of the fastest; all_seconds; threads_used; parameters.
    """
    step = _Step(cell)
    step.run(cell["length"] if step.device.type == "cuda" else _WARM_UP_TOKENS)
    times: list[float] = []
    while not times or (sum(times) < cell["seconds"] and len(times) < 100):
        step.wait()
        started = time.perf_counter()
        step.run(cell["length"])
        step.wait()
        times.append(time.perf_counter() - started)
    return {
        "status": DONE,
        "seconds": min(times),
        "all_seconds": times,
        "threads_used": torch.get_num_threads(),
        "parameters": step.model.num_parameters(),
    }


@or_no_room
def step_energy(cell: Cell) -> Figures:
    """Repeats passes and says what energy they took.

    Returns:
        status; joules_per_million_tokens; source, of the energy; tokens that were read; seconds that it took.
    """
    step = _Step(cell)
    step.run(cell["length"] if step.device.type == "cuda" else _WARM_UP_TOKENS)
    passes, seconds = 0, 0.0

    def work() -> None:
        nonlocal passes, seconds
        started = time.perf_counter()
        while not passes or seconds < cell["seconds"]:
            step.run(cell["length"])
            step.wait()
            passes, seconds = passes + 1, time.perf_counter() - started

    try:
        energy = energy_of(work, cell["device"])
    except MissingExtraError as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    tokens = passes * cell["batch_size"] * cell["length"]
    return {
        "status": DONE,
        "joules_per_million_tokens": energy["joules"] / tokens * 1e6,
        "source": energy["source"],
        "tokens": tokens,
        "seconds": seconds,
    }


class _Step:
    """A model and its inputs."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self.device = torch.device(cell["device"])
        if cell["threads"]:
            torch.set_num_threads(cell["threads"])
        if self.device.type == "cpu":
            refuse_beyond_available_memory()
        size = cell["size"]
        layers = 1 if cell["part"] == "layer" else size["layers"]
        identity = cell["system"] == "identity"
        chunks: dict[str, Any] = {"chunk_size_layer": 0, "chunk_size_feed_forward": 0}
        config = PerformerConfig(
            num_attention_heads=size["heads"],
            num_hidden_layers=layers,
            intermediate_size=size["d_ff"],
            hidden_size=size["d"],
            reversible=cell["recomputation"] == "reversible",
            seed=cell["seed"],
            **architecture("transformer" if identity else cell["system"], layers),
            **({} if cell["recomputation"] == "default" else chunks),
        )
        torch.manual_seed(cell["seed"])
        made = PerformerForCausalLM if cell["objective"] == "clm" else PerformerForMaskedLM
        self.model: Any = made(config)
        if identity:
            for module in self.model.modules():
                if isinstance(module, PerformerAttention):
                    module.mechanism = IdentityAttention()
        self.model.to(self.device).train()
        if cell["recomputation"] == "layers":
            # Renamed in the transformers of 2026.
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), fused=True) if cell["optimizer"] else None
        generator = torch.Generator().manual_seed(cell["seed"])
        shape = (cell["batch_size"], cell["length"])
        if cell["part"] == "layer":
            self._inputs = torch.randn(*shape, size["d"], generator=generator).to(self.device).requires_grad_()
        else:
            self._inputs = torch.randint(5, config.vocab_size, shape, generator=generator).to(self.device)

    def run(self, length: int) -> None:
        """A forward and backward pass over the first `length` tokens, and the optimizer's step if there is one."""
        inputs = self._inputs[:, :length]
        with autocast(self.device, getattr(torch, self._cell["dtype"])):
            if self._cell["part"] == "layer":
                out = self.model.performer(inputs_embeds=inputs).last_hidden_state
            else:
                labels = inputs
                if self._cell["objective"] == "mlm":  # every seventh token, as good as 15 %
                    labels = torch.full_like(inputs, -100)
                    labels[:, ::7] = inputs[:, ::7]
                out = self.model(input_ids=inputs, labels=labels).loss
        out.backward(torch.ones_like(out))
        if self._optimizer is not None:
            self._optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self._inputs.grad = None

    def wait(self) -> None:
        """Returns when the device has done what it was asked to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
