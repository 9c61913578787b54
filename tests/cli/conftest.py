import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from performers.cli import main
from performers.data import read_fasta


class Finished(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs a command line in this process, as the shell would."""

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["performers", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        status = caught.value.code
        assert isinstance(status, int)
        return Finished(status, out, err)

    return call


@pytest.fixture(scope="session")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty short real proteins."""
    path = tmp_path_factory.mktemp("proteins") / "proteins.fasta"
    records = [record for record in read_fasta("bundled:validation") if len(record.sequence) <= 120][:30]
    path.write_text("".join(f">{record.id}\n{record.sequence}\n" for record in records))
    return path


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options of a run that takes about a second."""
    return [
        *("--preset", "tiny", "--architecture", "hidden_size=16", "--architecture", "num_hidden_layers=1"),
        *("--num-features", "8", "--context", "64", "--batch-size", "4", "--steps", "4", "--threads", "1"),
    ]
