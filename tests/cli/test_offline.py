"""The protein tools ask nothing of a network: every command runs where asking at all is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from performers.data import read_fasta

# In a process of its own, where nothing tells Hugging Face to stay off the network. One process for all commands: what is slow is
# to import torch.
ALL = """
import json, socket, sys

def refuse(*arguments, **options):
    raise AssertionError(f"the network was asked: {arguments}")

socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refuse

from performers.cli import main

statuses = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["performers", *command]
    try:
        main()
    except SystemExit as stop:
        statuses[command[0]] = stop.code
    except BaseException as error:
        statuses[command[0]] = repr(error)
print(json.dumps(statuses))
"""
MASKED = "performers/protein-masked"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run; `home` in it is the user's."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "home").mkdir()
    return folder


@pytest.fixture(scope="module")
def statuses(folder: Path) -> dict[str, int | str]:
    """How each command ended."""
    records = [record for record in read_fasta("bundled:validation") if len(record.sequence) <= 60][:12]
    rows = [f"{record.sequence},{record.sequence.count('L')}" for record in records]
    (folder / "data.csv").write_text("sequence,y\n" + "\n".join(rows) + "\n")
    (folder / "x.fasta").write_text(">x\nMKTAYIAKQRQISFVKSHFSRQ\n")
    (folder / "v.csv").write_text("mutant\nK2R\nY5W\n")
    finetune = ["finetune", "-i", "data.csv", "--target", "y", "--task", "regression", "-o", "ft", "--model", MASKED]
    commands = [
        ["score", "--wild-type", "x.fasta", "--variants", "v.csv", "-o", "s.csv", "--model", MASKED],
        ["contacts", "-i", "x.fasta", "-o", "contacts", "--model", MASKED],
        [*finetune, "--steps", "1", "--frozen", "--split", "random", "--no-baselines"],
        ["predict", "--model", "ft", "-i", "x.fasta", "-o", "y.csv"],
        ["report", "-i", "x.fasta", "-o", "report.html", "--model", MASKED],
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    environment |= {"HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(commands)], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", ["score", "contacts", "finetune", "predict", "report"])
def test_no_tool_asks_the_network(command: str, statuses: dict[str, int | str]) -> None:
    assert statuses[command] == 0


def test_no_tool_writes_outside_its_output_and_the_cache(folder: Path, statuses: dict[str, int | str]) -> None:
    assert set(statuses.values()) == {0}
    assert [file for file in (folder / "home").rglob("*") if file.is_file() and ".cache" not in file.parts] == []
    given, outputs = {"home", "data.csv", "x.fasta", "v.csv"}, {"s", "contacts", "ft", "y", "report"}
    beside = {"run.json", "cite.bibtex", "methods.txt"}
    others = {file.name for file in folder.iterdir()} - given - beside
    assert {name.split(".")[0] for name in others} == outputs
