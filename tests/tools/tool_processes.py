"""What the test processes run: a tool that is killed at a chosen moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from performers.tools import embed_to, jobs, score_to
from performers.tools.tool import Tool

TOOLS: dict[str, Callable[..., Any]] = {"embed": embed_to, "score": score_to}


def run_and_die(tool: str, arguments: dict[str, Any], event: int, shard_tokens: int) -> None:
    """Runs a tool and dies by SIGKILL at event number `event`: before a file is flushed, renamed or removed."""
    Tool.shard_tokens = shard_tokens
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
