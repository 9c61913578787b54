"""What the test processes run: a tool that is killed at a chosen moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from performers.data import Record
from performers.memory import forget_peak, peak_memory, resident_memory
from performers.tools import LanguageModel, contacts_to, embed, embed_to, generate_to, jobs, reading, score_to
from performers.tools.tool import Tool

TOOLS: dict[str, Callable[..., Any]] = {
    "contacts": contacts_to,
    "embed": embed_to,
    "generate": generate_to,
    "read": reading.read_to,
    "score": score_to,
}


def run_and_die(tool: str, arguments: dict[str, Any], event: int, shard_tokens: int) -> None:
    """Runs a tool and dies by SIGKILL at event number `event`: before a file is flushed, renamed or removed."""
    Tool.shard_tokens = reading.KEEP_EVERY = shard_tokens
    remaining = event

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining -= 1
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace, os.unlink = mortal(os.fsync), mortal(os.replace), mortal(os.unlink)
    TOOLS[tool](**arguments)


def run_and_be_interrupted(tool: str, arguments: dict[str, Any], shard_tokens: int) -> None:
    """Runs a tool as the command line does and gets a SIGTERM after its third shard."""
    Tool.shard_tokens = shard_tokens
    save, done = jobs._Work.save, 0

    def interrupted(*args: Any) -> None:
        nonlocal done
        save(*args)
        done += 1
        if done == 3:
            raise SystemExit(143)

    jobs._Work.save = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    TOOLS[tool](**arguments)


def embed_and_weigh(model: str, length: int, path: str) -> None:
    """Embeds a protein and writes down how much memory that took beyond the model, in bytes."""
    torch.set_num_threads(1)
    opened = LanguageModel.open(model, device="cpu")
    list(embed([Record("short", "", "MKT", 1)], opened))  # what is taken once
    forget_peak()
    before = resident_memory()
    list(embed([Record("long", "", "MKTAYIAKQR" * (length // 10), 1)], opened, include=["mean", "per_tok"]))
    Path(path).write_text(str(peak_memory() - before))


def run_as_rank(arguments: dict[str, Any], rank: int, size: int, shard_tokens: int) -> None:
    """Embeds as process `rank` of `size`, as torchrun starts them."""
    Tool.shard_tokens = shard_tokens
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    embed_to(**arguments)


def run_as_rank_and_die(arguments: dict[str, Any], rank: int, size: int, shards: int, shard_tokens: int) -> None:
    """As `run_as_rank`, and dies by SIGKILL when it has saved some shards."""
    save, done = jobs._Work.save, 0

    def last_words(*args: Any) -> None:
        nonlocal done
        save(*args)
        done += 1
        if done == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    jobs._Work.save = last_words  # pyright: ignore[reportAttributeAccessIssue]
    run_as_rank(arguments, rank, size, shard_tokens)
