"""Runs the code blocks of a Markdown page as a reader would: in order, in one fresh Python process, in one folder.

    python blocks.py page.md

Python blocks share their names, bash blocks stop at the first command that fails. A block is left out if an HTML comment that
begins with "not executed:" stands on the line before it. Run by `test_blocks.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(
    r"(?:^<!-- not executed: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block; `reason` says why it is not executed, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None


def code_blocks(page: Path) -> list[Block]:
    """The bash and python blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")), found["reason"])
        for found in _FENCE.finditer(text)
        if found["language"] in ("bash", "python")
    ]


def run_blocks(page: Path) -> None:
    """Run the blocks of a page in this process and folder."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in code_blocks(page):
        if block.reason is not None:
            continue
        print(f"--- {page.name}, line {block.line}", flush=True)
        if block.language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
        else:
            # As many line ends as stand before the block, so that a traceback names the line of the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)


if __name__ == "__main__":
    run_blocks(Path(sys.argv[1]))
