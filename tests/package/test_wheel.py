"""The built wheel, installed outside the source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import h5py
import pytest

from performers import PerformerConfig

ROOT = Path(__file__).parents[2]
BUNDLED = ("train", "validation", "test", "ood", "random")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.glob("performers-*.whl")
    return built


def run(python: Path, *arguments: str, cwd: Path) -> str:
    """Run the environment's interpreter as a newcomer would: outside the tree, with nothing of ours in the environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_and_evaluate(python: Path, folder: Path) -> dict[str, float]:
    performers = python.parent / "performers"
    few = "from itertools import islice\nfrom performers import read_fasta\nwith open('few.fasta', 'w') as file:\n" + (
        "    file.writelines(f'>{r.id}\\n{r.sequence}\\n' for r in islice(read_fasta('bundled:test'), 20))"
    )
    run(python, "-c", few, cwd=folder)
    options = ["--preset", "tiny", "--architecture", "num_hidden_layers=1", "--context", "256", "--batch-size", "2"]
    run(performers, "pretrain", "-i", "bundled:validation", "-o", "run", "--steps", "2", *options, cwd=folder)
    return json.loads(run(performers, "evaluate", "--model", "run", "-i", "few.fasta", "--json", cwd=folder))


def test_the_wheel_holds_the_sample_with_its_attribution_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sample = [name for name in names if name.startswith("performers/data/sample/")]
    assert {f"performers/data/sample/{part}.fasta.gz" for part in BUNDLED} <= set(sample)
    assert any("ATTRIBUTION" in name for name in sample)
    assert "performers/py.typed" in names
    assert not any(name.startswith(("tests", "examples", "scripts")) for name in names)
    assert sum(zipfile.ZipFile(wheel).getinfo(name).compress_size for name in sample) < 6e6


def test_the_wheel_holds_the_bundled_models_with_their_cards(wheel: Path) -> None:
    content = zipfile.ZipFile(wheel)
    names = set(content.namelist())
    for model in ("protein-masked", "protein-causal"):
        folder = f"performers/weights/{model}"
        files = ("model.safetensors", "config.json", "config.yaml", "tokenizer.json", "README.md", "curve.png")
        assert {f"{folder}/{file}" for file in (*files, "evaluation.json", "manifest.json")} <= names
        assert "CC BY 4.0" in content.read(f"{folder}/README.md").decode()
    weights = [content.getinfo(name).file_size for name in names if name.endswith(".safetensors")]
    assert 0 < sum(weights) <= 80_000_000


def test_the_wheel_runs_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    # The dependencies are borrowed from the environment that runs the tests; the slow test below installs them for real.
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"
    site = next((tmp_path / "environment" / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert str(site) in run(python, "-c", "import performers; print(performers.__file__)", cwd=tmp_path)
    assert "pretrain" in run(python.parent / "performers", "--help", cwd=tmp_path)
    assert "protein-masked" in run(python.parent / "performers", "models", "list", cwd=tmp_path)
    # The README's first block, where every connection is refused.
    (site / "offline.py").write_text(
        "import socket\n\n\ndef refuse(*arguments):\n    raise OSError('there is no network here')\n\n\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
    )
    (site / "offline.pth").write_text("import offline\n")
    (tmp_path / "proteins.fasta").write_text(">ubiquitin\nMQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGR\n")
    run(python.parent / "performers", "embed", "-i", "proteins.fasta", "-o", "embeddings.h5", cwd=tmp_path)
    with h5py.File(tmp_path / "embeddings.h5") as embeddings:
        assert embeddings["ubiquitin"].shape == (
            PerformerConfig.from_pretrained("performers/protein-masked").hidden_size,
        )
    assert train_and_evaluate(python, tmp_path)["tokens"] > 0


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    for package in ("torch==2.13.0", str(wheel)):
        run(python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), package, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    assert train_and_evaluate(python, tmp_path)["tokens"] > 0
