"""What one training says of itself; the loop does the rest.

Every training takes steps that are functions of (seed, step), can be killed and goes on to the same bits, runs on any number of
processes, and leaves a run folder. `performers.training.loop` does all of that once. A `Task` adds what differs: which files it
reads, which model it begins with, what a step computes, how well the model does, and what stays at the end. Nothing here imports
torch, so that a task can refuse its inputs before anything heavy is loaded.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from performers.training.configuration import TrainConfig

if TYPE_CHECKING:
    import torch

    from performers.training.distributed import World


Config = TypeVar("Config", bound=TrainConfig)


class Figures(NamedTuple):
    """How well a model does on one set.

    Attributes:
        name: of the set, as "validation"; a run with patience goes by the `loss` that is logged of the set of this name.
        logged: the line of `log.jsonl`; JSON can hold it.
        charted: those of the figures that TensorBoard draws.
        sentence: the figures for people.
    """

    name: str
    logged: dict[str, Any]
    charted: dict[str, float]
    sentence: str


class Task(abc.ABC, Generic[Config]):
    """One kind of training.

    The loop calls the methods in the order in which they stand here; a task may leave out those that are not abstract. What is
    random in them must be a function of the seed and the step, and what a step computes must not depend on how its rows are
    dealt out to processes.

    Arguments:
        config: the settings.

    Attributes:
        command: the verb, as in `performers VERB`.
        evaluates_at_the_start: whether the model is measured before the first step too, and kept if no step makes it better.
        elsewhere: how to begin another run where this one ended; `{model}` is the model of this one.
        needs_less: which options make a step smaller, for a run that does not fit into memory.
    """

    command: ClassVar[str]
    evaluates_at_the_start: ClassVar[bool] = False
    elsewhere: ClassVar[str]
    needs_less: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def layout(self) -> dict[str, Any]:
        """How the work lies on several processes: `sharding` and `sequence_parallel`, as `join_world` takes them.

        By default rows are dealt out and each process holds the whole model.
        """
        return {}

    # Before torch is loaded.

    def check(self, *, begun: bool) -> None:
        """Refuses, before anything is written, what can be refused by then.

        Arguments:
            begun: the run folder holds this run already.

        Raises:
            InputError: an input is not in order.
        """

    def discard(self, run: Path, began: dict[str, Any]) -> None:
        """Removes what a run that has come to no checkpoint made of other settings, `began`."""

    def prepare(self, run: Path) -> None:
        """Makes what the steps read, in the run folder if that takes room; on the processes that join, opens it."""

    @abc.abstractmethod
    def inputs(self) -> list[dict[str, Any]]:
        """The files that were read, as `run.json` lists them."""

    # The model.

    @abc.abstractmethod
    def open(self, checkpoint: Path | None) -> torch.nn.Module:
        """The model that the run begins with, or that of a checkpoint, on the CPU and in the mode it is trained in.

        Parameters that are not to change do not require a gradient.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """What is trained on, in a few words."""

    # A step.

    def before_step(self, model: Any, step: int) -> bool:
        """Changes the model as step `step` (from 0) needs it.

        Returns:
            Whether it drew anything anew, so that the processes compare what they have.
        """
        return False

    @abc.abstractmethod
    def accumulate(self, model: Any, step: int, world: World, dtype: torch.dtype) -> torch.Tensor:
        """Adds this process's share of the gradients of step `step`, the sum of which over the processes is the gradient.

        Returns:
            This process's part of the loss, a scalar.
        """

    def ring_attention_bytes(self, model: Any, world: World, dtype: torch.dtype) -> int:
        """What one process would send in a step by ring attention; of interest where rows lie on several."""
        return 0

    @abc.abstractmethod
    def tokens(self, step: int) -> int:
        """The tokens that step `step` reads, over all processes."""

    # Figures.

    @abc.abstractmethod
    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        """Measures the model, which stays in its mode; all processes get the same figures."""

    # What stays.

    def save_architecture(self, model: Any, folder: Path) -> None:
        """Writes what `open` needs besides the weights, which the processes write themselves where each holds a share."""
        raise NotImplementedError(f"{self.command} has no sharded checkpoints.")

    @abc.abstractmethod
    def save(self, model: Any, folder: Path, *, finished: bool) -> None:
        """Writes the files that `open` needs, or, once finished, those of the model that users open."""

    @abc.abstractmethod
    def picture(self, run: Path) -> None:
        """Draws the run's pictures from its log."""
