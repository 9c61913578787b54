"""What mkdocs does beside building the pages: the command line reference, written by the commands, and the models' figures."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.testing import CliRunner

COMMAND_LINE = "<!-- command-line-reference -->"
FIGURES = re.compile(r"<!-- figures of (performers/[\w-]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    markdown = FIGURES.sub(lambda found: figures_of(found[1]), markdown)
    return markdown.replace(COMMAND_LINE, command_line_reference()) if COMMAND_LINE in markdown else markdown


def figures_of(model: str) -> str:
    """What the card of a bundled model says of its accuracy, without its headings."""
    from performers.models.bundled import describe

    return describe(model).card.partition("<!-- figures -->")[2].partition("<!-- /figures -->")[0].strip()


def command_line_reference() -> str:
    """A section for every command of `performers`, with what its --help says."""
    from performers.cli import app

    sections: list[str] = []
    for verbs in _leaves(typer.main.get_command(app)):
        shown = CliRunner().invoke(app, [*verbs, "--help"], prog_name="performers", env={"COLUMNS": "100"})
        sections.append(f"## performers {' '.join(verbs)}\n\n```text\n{shown.stdout.strip()}\n```")
    return "\n\n".join(sections)


def _leaves(command: Any, verbs: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    commands: dict[str, Any] = getattr(command, "commands", {})
    return [leaf for verb, inner in commands.items() for leaf in _leaves(inner, (*verbs, verb))] or [verbs]
