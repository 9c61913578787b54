"""What a tool says of itself, and what becomes of its work.

A `Tool` says what its items are, what they cost, and what to compute for some of them. `results_of` runs it in memory, for
Python: items in, results out, in order. `performers.tools.jobs` runs it for the command line. Nothing here knows of files.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy.typing as npt

from performers.data import FastaReport
from performers.errors import RunError
from performers.tools.language_model import LanguageModel, Unread

Item = TypeVar("Item")
Arrays = Mapping[str, npt.NDArray[Any]]
Result = Arrays | Unread


class Tool(abc.ABC, Generic[Item]):
    """What a tool does, item by item.

    Attributes:
        command: the verb, as in `performers VERB`.
        noun: what an item is, in the plural, for people.
        entries: what an output lists, in the plural, where that is something else than its items.
        shard_tokens: about how many tokens are read before results are saved, and memory is free again.
        makes_folder: whether the output is a folder rather than a file.
        model: what reads.
    """

    command: ClassVar[str]
    noun: ClassVar[str] = "records"
    entries: ClassVar[str] = ""
    shard_tokens: ClassVar[int] = 131_072
    makes_folder: bool = False
    model: LanguageModel

    @abc.abstractmethod
    def items(self, report: FastaReport) -> Iterator[Item]:
        """The items, in order; what was read to find them goes to the report."""

    @abc.abstractmethod
    def to_json(self, item: Item) -> Any:
        """An item as JSON can hold it."""

    @abc.abstractmethod
    def from_json(self, content: Any) -> Item:
        """The inverse of `to_json`."""

    @abc.abstractmethod
    def label(self, item: Item) -> tuple[int, str]:
        """The number and the identifier of an item, for the list of those that failed."""

    @abc.abstractmethod
    def tokens(self, item: Item) -> int:
        """How many tokens are read for it."""

    def probe(self, item: Item) -> Item:
        """What is computed to tell how long an item takes: itself, or a smaller one of the same kind."""
        return item

    def longest(self, item: Item) -> int:
        """The most tokens that are read at a time for it; all of them, where it is read at once."""
        return self.tokens(item)

    def refusal(self, item: Item) -> str | None:
        """Why it cannot be read, where that shows before anything is; without a full stop."""
        return None

    def about(self, report: FastaReport) -> str:
        """What `items`, once it is through, has found, for people."""
        return f"{report.records:,} {self.noun}, {report.residues:,} residues"

    @abc.abstractmethod
    def num_bytes(self, item: Item) -> int:
        """About how many bytes its result takes."""

    @abc.abstractmethod
    def compute(self, items: Sequence[Item]) -> Sequence[Result]:
        """The results of some items, each the same whatever the others are."""

    @abc.abstractmethod
    def write(self, results: Iterable[tuple[Item, Result]], path: Path) -> Written | None:
        """Write the output, a file or a folder; other files may go beside it, in the same folder.

        Arguments:
            results: all items in order with their results, as often as they are iterated.
            path: where to write; there is nothing yet.

        Returns:
            What was written, where that is something else than a result for each item that has one.
        """

    def beside(self, path: Path) -> Sequence[str]:
        """The names of the files that `write` puts beside the output at `path`, as far as they are known before."""
        return ()

    @abc.abstractmethod
    def methods(self, outcome: Outcome) -> str:
        """What was done, in two sentences fit for a methods section."""

    def tally(self, outcome: Outcome) -> str:
        """How many failed, for people."""
        return f"{len(outcome.failed):,} of {outcome.items:,} {self.entries or self.noun} failed"

    @property
    def references(self) -> str:
        """The BibTeX of the papers that `methods` names, besides those of Performers."""
        return ""


@dataclass(frozen=True)
class Written:
    """What an output holds.

    Attributes:
        items: how many there are, in the tool's own sense.
        failed: number, identifier and reason of each that has no result.
        figures: what there is to say of the whole.
    """

    items: int
    failed: list[tuple[int, str, str]]
    figures: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        output: the file or folder.
        items: how many there were.
        tokens: read for them, as planned.
        failed: number, identifier and reason of each item without a result.
        figures: what the tool has to say of the whole.
        estimate: of the work before it began: seconds and bytes.
        done: whether there is an output; False after a dry run.
    """

    output: Path
    items: int
    tokens: int
    failed: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    estimate: dict[str, Any] = field(default_factory=dict[str, Any])
    done: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The figures, fit for JSON."""
        return {
            "output": str(self.output),
            "items": self.items,
            "tokens": self.tokens,
            "failed": len(self.failed),
            "estimate": self.estimate,
            "done": self.done,
            "figures": self.figures,
        }


def results_of(
    tool: Tool[Item],
    items: Iterable[Item],
    failures: list[tuple[int, str, str]] | None = None,
) -> Iterator[tuple[Item, Arrays]]:
    """Run a tool in memory: each item with its result, in order, a shard at a time.

    Arguments:
        tool: what to run.
        items: on what.
        failures: gets number, identifier and reason of each item that fails and is left out; without it the first one raises.

    Raises:
        RunError: an item failed, and nobody takes the failures.
    """
    for item, result in all_results_of(tool, items):
        if not isinstance(result, Unread):
            yield item, result
            continue
        number, identifier = tool.label(item)
        if failures is None:
            raise RunError(f"Number {number:,} ({identifier}): {result.reason}.")
        failures.append((number, identifier, result.reason))


def all_results_of(tool: Tool[Item], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Run a tool in memory, as `results_of`, but with the items that fail among the others."""
    for window in _windows(tool, items):
        yield from zip(window, tool.compute(window), strict=True)


def _windows(tool: Tool[Item], items: Iterable[Item]) -> Iterator[list[Item]]:
    window: list[Item] = []
    tokens = 0
    for item in items:
        window.append(item)
        tokens += tool.tokens(item)
        if tokens >= tool.shard_tokens:
            yield window
            window, tokens = [], 0
    if window:
        yield window
