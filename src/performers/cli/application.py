"""What commands share: the application, options of the same name and meaning, and how figures are printed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from performers.errors import InputError
from performers.training.configuration import TrainConfig

app = typer.Typer(
    name="performers",
    help="Linear-time Transformers for proteins: pretrain, evaluate and use Performer protein language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Inputs = Annotated[list[str], typer.Option("--input", "-i", help="FASTA files (.gz too), '-' for stdin, bundled:NAME.")]
Output = Annotated[str, typer.Option("--output", "-o", help="The output folder; new or empty.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout, and nothing else there.")]
Device = Annotated[str, typer.Option(help="auto (cuda, then mps, then cpu), or one by name.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Precision of the forward pass.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads.", show_default="as many as there are cores")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Residues; a longer record is refused, never cut.")]
OnInvalid = Annotated[
    Literal["error", "x", "skip"], typer.Option(help="A character that is no residue: stop, X, or skip.")
]


def listed(text: str | None, *, empty: str | None = "none") -> tuple[str, ...] | None:
    """The names in a list with commas.

    Arguments:
        text: the list, or None, which stays None.
        empty: the word that stands for no name, so that "none" is (); None where every word is a name.
    """
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip() not in ("", empty))


def numbers(option: str, text: str | None, kind: Callable[[str], Any] = int) -> tuple[Any, ...] | None:
    """The numbers in a list with commas.

    Raises:
        InputError: something else is in it; names the option.
    """
    try:
        return None if text is None else tuple(kind(part) for part in listed(text) or ())
    except ValueError:
        raise InputError(f"{option} {text}: expected numbers, with commas.") from None


def table(header: list[str], rows: list[list[str]]) -> None:
    """Prints a table to stdout."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(*header, box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*row)
    # Into a file or a pipe nothing is folded.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(grid)


def options_of(config: type[TrainConfig], *positional: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for every key of a configuration, so that the two cannot come apart.

    Arguments:
        config: the configuration; the command takes its keys as keyword arguments, None where they are not given.
        positional: keys that are arguments, not options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        made = {key: _parameter(key, field, key in positional) for key, field in config.model_fields.items()}
        first = [made.pop(key) for key in positional]
        parameters = [*first, *own, *made.values()]
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameter(key: str, field: Any, positional: bool) -> inspect.Parameter:
    flags = [f"--{key.replace('_', '-')}"]
    kind: Any = field.annotation
    if type(None) in get_args(kind):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is dict:
        kind = list[str]
    if kind is bool:
        flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
    if key in ("input", "output"):
        flags.append(f"-{key[0]}")
    default = field.get_default()
    plain = field.is_required() or default in (None, [], {}, False)
    text = field.description if plain else f"{field.description} [{default}]"
    repeatable = "<str>, repeatable" if get_origin(kind) is list else None
    option = typer.Argument(help=text) if positional else typer.Option(*flags, help=text, metavar=repeatable)
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def print_tables(tables: list[tuple[str, list[str], list[list[str]]]]) -> None:
    """Prints tables of a title, a header and rows to stdout."""
    for title, header, rows in tables:
        print(f"\n{title}")
        table(header, rows)
