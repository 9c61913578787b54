import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from performers.training import PretrainConfig, pretrain
from performers.training.pretraining import PretrainResult

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def fasta() -> Path:
    """Forty short real proteins."""
    return Path(__file__).parent / "fixtures" / "proteins.fasta"


@pytest.fixture(scope="session")
def settings(fasta: Path) -> Callable[..., dict[str, Any]]:
    """The keys of a run that takes about a second."""

    def make(output: Path, **changes: Any) -> dict[str, Any]:
        architecture = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
        return {
            "input": [str(fasta)],
            "output": str(output),
            "preset": "tiny",
            "attention": "favor",
            "architecture": architecture,
            "num_features": 8,
            "dropout": 0.1,
            "context": 64,
            "batch_size": 4,
            "steps": 12,
            "checkpoint_every": 4,
            "threads": 1,
            **changes,
        }

    return make


@pytest.fixture
def train(settings: Callable[..., dict[str, Any]]) -> Callable[..., PretrainResult]:
    """Runs a run in this process."""

    def run(output: Path, *, resume: bool = True, resume_from: str | None = None, **changes: Any) -> PretrainResult:
        config = PretrainConfig.parse(settings(output, **changes))
        return pretrain(config, resume=resume, resume_from=resume_from)

    return run


@pytest.fixture(scope="session")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # What a run imports on its way is imported once as well: the log of TensorBoard, and what draws the loss.
    drawn = ["torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg"]
    context.set_forkserver_preload(
        ["performers.training.loop", "performers.models.modeling_performer", "victims", *drawn]
    )
    return context


@pytest.fixture(scope="session")
def start(context: ForkServerContext) -> Callable[..., BaseProcess]:
    """Starts a function of `victims` in a process of its own."""
    import victims

    def start_process(name: str, *arguments: Any) -> BaseProcess:
        process = context.Process(target=getattr(victims, name), args=arguments, daemon=True)
        process.start()
        return process

    return start_process
