"""The package as a whole: what importing it costs, which way imports point, what it exports, and how it is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import performers

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "datasets")


def test_importing_performers_imports_nothing_heavy() -> None:
    code = f"import performers, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [["--help"], ["pretrain", "--help"], ["--version"]])
def test_asking_for_help_imports_neither_torch_nor_transformers(command: list[str]) -> None:
    code = (
        "import sys\nfrom performers.cli import main\nsys.argv = ['performers', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"loaded = [name for name in {HEAVY[:2]} if name in sys.modules]\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_public_name_loads_and_an_unknown_one_is_an_attribute_error() -> None:
    for name in performers.__all__:
        assert getattr(performers, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Performer'"):
        performers.Performer  # noqa: B018


def test_a_star_import_gives_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from performers import *", namespace)
    assert {"FavorFeatures", "favor_attention", "exact_attention", "PerformerConfig", "PerformerModel"} <= set(
        namespace
    )


@pytest.mark.parametrize("command", [["lint-imports"], ["ruff", "check"], ["ruff", "format", "--check"]], ids=" ".join)
def test_the_source_is_kept(command: list[str]) -> None:
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([str(program), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
