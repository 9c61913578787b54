"""Runs on several processes without torchrun: what each process does, and how they are started.

They fork from the server that has imported torch once, and find each other by the environment that torchrun would give them.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from victims import as_options, command_line

from performers.training import PretrainConfig, pretrain


def launch(context: ForkServerContext, function: Callable[..., None], size: int, *arguments: Any) -> list[BaseProcess]:
    """Starts `function(rank, *arguments)` in `size` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_on_rank, args=(function, rank, size, port, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def statuses(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _on_rank(function: Callable[..., None], rank: int, size: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(rank, *arguments)


def train(rank: int, values: dict[str, Any], resume_from: str | None = None) -> None:
    pretrain(PretrainConfig.parse(values), resume_from=resume_from)


def train_and_tell(rank: int, values: dict[str, Any], folder: str, trouble: str = "") -> None:
    """As the command line does it; what it says on stderr goes to a file."""
    if trouble and rank == 1:
        globals()[trouble]()
    with (Path(folder) / f"stderr-{rank}").open("w", buffering=1) as stream, contextlib.redirect_stderr(stream):
        command_line("pretrain", *as_options(values))


def poison() -> None:
    """The fourth loss in training is not a number."""
    from performers.models import PerformerForMaskedLM

    forward, calls = PerformerForMaskedLM.forward, 0

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += self.training
        output = forward(self, *args, **kwargs)
        if calls == 4 and self.training:
            output.loss = output.loss * float("nan")
        return output

    PerformerForMaskedLM.forward = poisoned


def redraw_otherwise() -> None:
    """This process draws other features than the others."""
    from performers.models import PerformerForMaskedLM

    redraw = PerformerForMaskedLM.redraw_features_
    PerformerForMaskedLM.redraw_features_ = lambda self, seed, step: redraw(self, seed + 1, step)


def begin_otherwise() -> None:
    """This process begins with other features in the second layer."""
    from performers.training import language_modelling

    new_model = language_modelling.new_model

    def other(config: Any) -> Any:
        model = new_model(config)
        model.performer.layers[1].attention.mechanism.redraw_(torch.Generator().manual_seed(7))
        return model

    language_modelling.new_model = other


def compare_with_the_whole(rank: int, cases: list[dict[str, Any]]) -> None:
    """Values and gradients of models whose tokens lie on all processes are those of one that has them all."""
    import torch.distributed as dist

    from performers.attention import SequenceGroup
    from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

    dist.init_process_group("gloo")
    group = SequenceGroup()
    for case in cases:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, 24, (case["rows"], 37), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -100)
        whole: dict[str, Any] = {"input_ids": ids, "labels": labels, "dropout_keys": torch.arange(case["rows"])}
        if case["rows"] == 1:
            whole |= {"cu_seqlens": torch.tensor([0, 3, 20, 20, 31, 37]), "dropout_keys": torch.arange(1)}
        if case.get("padded"):
            mask = torch.arange(37) < torch.tensor([37, 22])[:, None]
            mask[1, :4] = False
            whole |= {"attention_mask": mask.long(), "labels": labels.masked_fill(~mask, -100)}
        torch.manual_seed(0)
        config = PerformerConfig.preset(
            "tiny",
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=3,
            intermediate_size=32,
            hidden_dropout_prob=0.2,
            attention_kwargs={"kernel": case["kernel"], "num_features": 16},
            **case.get("architecture", {}),
        )
        model = (PerformerForCausalLM if case["is_causal"] else PerformerForMaskedLM)(config).double().train()
        if case.get("checkpointing"):
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        expected = model(**whole).loss
        expected.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()

        shard = group.shard(37)
        mine = {
            key: value[:, shard.start : shard.stop] if value.shape == ids.shape else value
            for key, value in whole.items()
        }
        part = model(**mine, sequence=shard).loss
        part.backward()
        torch.testing.assert_close(
            group.sum_(part.detach()), expected.detach(), msg=lambda text, c=case: f"{c}: {text}"
        )
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            total = group.sum_(parameter.grad)
            torch.testing.assert_close(total, gradient, rtol=1e-5, atol=1e-7, msg=lambda text, c=case: f"{c}: {text}")
    dist.destroy_process_group()
    sys.exit(0)
