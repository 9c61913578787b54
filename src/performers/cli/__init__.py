"""The command line: one thin command per verb.

A command turns its options into arguments, calls the function that does the work, and prints. Nothing heavy is imported before
a command runs. `main` turns errors into one line on stderr and the exit status: 0 done, 1 the run failed, 2 bad input,
3 finished but some records failed, 130 and 143 interrupted.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated, NoReturn

import typer

# Each module adds its commands to the application, in this order.
from performers.cli import (  # noqa: F401
    benchmarks,
    contacts,
    conversion,
    corpora,
    distillation,
    embedding_benchmark,
    finetuning,
    generation,
    interactions,
    models,
    pretraining,
    reading,
    reporting,
    tools,
)
from performers.cli.application import app
from performers.errors import InputError, PerformersError, UnsupportedError

__all__ = ["app", "main"]


def main() -> NoReturn:
    """Runs the command line and exits with its status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status = app(standalone_mode=False)
    except PerformersError as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error), 2 if isinstance(error, InputError | UnsupportedError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        # What typer says about wrong options; its classes have no public name in all supported versions.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(status or 0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"performers: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        from performers import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback instead of one line when a command fails.")
    ] = False,
) -> None:
    """Options of every command; both are acted on elsewhere."""
