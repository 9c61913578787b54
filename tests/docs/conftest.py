"""Lets the tests of this folder import the script that they run, and run `performers` from a process that is loaded already."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The PATH of a reader: `performers`, as `preloaded.py` serves it, and this Python's programs."""
    folder = tmp_path_factory.mktemp("bin")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("preloaded.py")), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    yield os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    os.killpg(server.pid, signal.SIGTERM)
    server.wait()
