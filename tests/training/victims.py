"""What the test processes run, and what is left to compare.

The processes fork from a server that has imported torch once, so each starts in no time.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from performers.folders import sha256_of
from performers.training import PretrainConfig, checkpoint, pretrain


def train(values: dict[str, Any]) -> None:
    pretrain(PretrainConfig.parse(values))


def train_and_die_in_a_save(values: dict[str, Any], event: int) -> None:
    """Dies by SIGKILL at event number `event` of the first save: before a file is written, flushed, renamed or removed."""
    from performers.training import loop

    remaining = event

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining -= 1
            return function(*args, **kwargs)

        return call

    real_save = loop.save_checkpoint

    def save(*args: Any, **kwargs: Any) -> Any:
        for module, name in (
            (checkpoint, "save_file"),
            (os, "fsync"),
            (os, "rename"),
            (shutil, "rmtree"),
            (os, "unlink"),
        ):
            setattr(module, name, mortal(getattr(module, name)))
        return real_save(*args, **kwargs)

    loop.save_checkpoint = save
    train(values)


def train_and_run_out_of_disk(values: dict[str, Any], limit: int, stderr: str) -> None:
    """Lets one checkpoint be written, then no file of more than `limit` bytes; says what it says into a file."""
    from performers.training import loop

    real_save = loop.save_checkpoint

    def save(*args: Any, **kwargs: Any) -> Any:
        path = real_save(*args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return path

    loop.save_checkpoint = save
    sys.stderr = open(stderr, "w", buffering=1)  # noqa: SIM115
    command_line("pretrain", *as_options(values))


def command_line(*arguments: str) -> None:
    from performers.cli import main

    sys.argv = ["performers", *arguments]
    main()


def as_options(values: dict[str, Any]) -> list[str]:
    options: list[str] = []
    for key, value in values.items():
        if key == "architecture":
            options += [f"--architecture={name}={json.dumps(entry)}" for name, entry in value.items()]
        else:
            options += [f"--{key.replace('_', '-')}={item}" for item in (value if isinstance(value, list) else [value])]
    return options


def outcome(run: Path) -> tuple[str, bytes]:
    """What two runs have in common if they are the same: the final weights and every line of the log."""
    return sha256_of(run / "model" / "model.safetensors"), (run / "log.jsonl").read_bytes()
