"""What a person sees while a run works: a bar on a terminal, plain lines in a log file. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

_SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """Shows step, loss, tokens per second and the time left.

    Arguments:
        total: steps in all.
        done: steps taken before.
        shown: False shows nothing, as on the processes that do not print.
    """

    def __init__(self, total: int, done: int, *, shown: bool = True) -> None:
        self._total = total
        self._first = done
        self._shown = shown
        self._bar: Any = None
        self._started = self._last_line = time.monotonic()
        self._tokens = 0
        self._seconds = 0.0

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s "),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first, loss="-", speed="-")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the steps since the display began; evaluating and saving do not count."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def step(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Reports that `step` steps are done, the last of which read `tokens` tokens in `seconds`."""
        self._tokens += tokens
        self._seconds += seconds
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", speed=f"{self.tokens_per_second:,.0f}")
            return
        now = time.monotonic()
        if step in (self._first + 1, self._total) or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) / (step - self._first) * (self._total - step)
            self.note(
                f"step {step}/{self._total}  loss {loss:.4f}  {self.tokens_per_second:,.0f} tokens/s  {_duration(left)} left"
            )

    def note(self, text: str) -> None:
        """Prints one line beside the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
