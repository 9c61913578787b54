"""Every code block of the README and the documentation, run in order in a process of its own, as a reader would."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from blocks import code_blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES_WITH_BLOCKS = [page for page in PAGES if any(block.reason is None for block in code_blocks(page))]


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path, programs: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": programs}
    done = subprocess.run(["blocks", str(page)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_a_block_that_is_not_executed_says_why() -> None:
    skipped = [block for page in PAGES for block in code_blocks(page) if block.reason is not None]
    assert all(len(block.reason or "") > 10 for block in skipped)
    # In the README: the commands that make an environment of their own, a run that takes hours, and a pretrained model.
    readme = [block.code for block in code_blocks(ROOT / "README.md") if block.reason is not None]
    commands = [["pip", "install"], ["make", "demo"], ["python", "-m"], ["performers", "pretrain"], ["model", "="]]
    assert [code.split()[:2] for code in readme] == commands


def test_every_command_line_in_the_documentation_exists() -> None:
    # Also in the blocks that are not executed.
    from typer.main import get_command

    from performers.cli import app

    root = get_command(app)
    for page in PAGES:
        for block in code_blocks(page):
            for line in block.code.splitlines():
                words = line.split()
                if block.language == "bash" and "performers" in words:
                    command = root
                    for word in words[words.index("performers") + 1 :]:
                        if hasattr(command, "commands"):
                            assert word in command.commands, f"{page.name}: {line}"
                            command = command.commands[word]
                        elif word.startswith("-"):
                            known = {
                                flag for option in command.params for flag in (*option.opts, *option.secondary_opts)
                            }
                            assert word in known, f"{page.name}: {word} in {line}"
