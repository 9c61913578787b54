"""The files of a converted model that Hugging Face does not write: the tensors that cannot be drawn again, and a README.

They cannot be in the model's own weights file, where stock classes would report them as unexpected, and are too big for its
configuration. So they are in a file beside it, whose SHA-256 the configuration names: it is found wherever the model was opened
from, and shows it when it is another one's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from transformers.utils.hub import cached_file

from performers.conversion.specification import Specification
from performers.errors import CheckpointError
from performers.folders import fsync, room_for, temporary_name, write_file

TENSORS = "performers.safetensors"
# Of a tokenizer, mostly; weights and code are not among them.
_COMPANIONS = (".json", ".txt", ".model", ".jinja")
# What says how the folder they are in was made, or was measured or fitted on its very weights.
_NOT_COPIED = ("run.json", "manifest.json", "calibration.json", "evaluation.json", "contact-regression.json")
_TITLE = "# A Transformer with linear attention"

# Of each layer the entries of its mechanism's state_dict.
LayerTensors = dict[int, dict[str, Tensor]]


def pack(tensors: LayerTensors) -> tuple[bytes, str] | None:
    """The bytes of the tensors' file and their SHA-256; None where there are no tensors."""
    flat = {f"{layer}.{name}": x.contiguous() for layer, entries in tensors.items() for name, x in entries.items()}
    if not flat:
        return None
    content = safetensors.torch.save(flat)
    return content, hashlib.sha256(content).hexdigest()


def write_tensors(folder: Path, content: bytes) -> None:
    """Writes the tensors' file, in one step.

    Raises:
        DiskFullError, OutputError: as in `performers.folders.room_for`.
    """
    path = folder / TENSORS
    temporary = temporary_name(path)
    with room_for(path, len(content)):
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        fsync(temporary)
        os.replace(temporary, path)


def read_tensors(config: Any, specification: Specification) -> LayerTensors:
    """The tensors that a configuration asks for, from where the model was opened.

    Raises:
        CheckpointError: the file is not there, or another one.
    """
    if specification.tensors is None:
        return {}
    origin = config._name_or_path
    try:
        file = cached_file(origin, TENSORS, revision=getattr(config, "_commit_hash", None)) if origin else None
    except OSError:
        file = None
    if file is None:
        where = f"not in {origin}" if origin else "in a folder that this model was not opened from"
        raise CheckpointError(
            f"The model's calibration is in a file of its own, {TENSORS}, which is {where}: open the model's folder with "
            f"performers.load(folder)."
        )
    content = Path(file).read_bytes()
    if hashlib.sha256(content).hexdigest() != specification.tensors:
        raise CheckpointError(f"{file} is damaged or another model's: its SHA-256 is not the one in config.json.")
    tensors: LayerTensors = {}
    for name, x in safetensors.torch.load(content).items():
        layer, _, entry = name.partition(".")
        tensors.setdefault(int(layer), {})[entry] = x
    return tensors


def copy_companions(origin: Path, folder: Path) -> None:
    """Copies what a model's folder holds besides the model, as far as it is small: its tokenizer, its licence.

    Files that `folder` has already stay as they are.
    """
    for path in sorted(origin.iterdir()):
        wanted = path.suffix in _COMPANIONS or path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        ours = path.name in _NOT_COPIED or path.name.endswith(".index.json") or (folder / path.name).exists()
        if wanted and not ours and path.is_file():
            shutil.copyfile(path, folder / path.name)


def write_readme(folder: Path, model: str, specification: Specification) -> None:
    """Says in the folder what it is and how to open it; a README.md of somebody else's stays.

    Arguments:
        folder: the folder.
        model: the name of the model's class.
        specification: its attention.
    """
    path = folder / "README.md"
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(_TITLE):
        return
    name = specification.attention
    which = "all" if specification.layers is None else ", ".join(map(str, specification.layers)) or "none"
    arguments = ", ".join(f"{key}={value!r}" for key, value in specification.arguments.items()) or "the defaults"
    single = ", with other settings in single layers (`config.json`)" if specification.by_layer else ""
    beside = f"\n`{TENSORS}` holds its calibration and belongs to the model." if specification.tensors else ""
    text = f"""\
{_TITLE}

This is a `{model}` whose attention the Python package `performers` has replaced by
`{name}` attention ({arguments}{single}), in these attention layers: {which}.{beside}

Open it with performers, which gives what was saved:

```python
import performers

model = performers.load("path/to/this/folder")
```

or, after `import performers`, with any class of transformers and `attn_implementation="{name}"`:

```python
import performers
from transformers import AutoModel

model = AutoModel.from_pretrained("path/to/this/folder", attn_implementation="{name}")
```

Opened with transformers alone, without that argument, the model has its original attention back: the weights load and the
numbers are those of a **different model** from the one that was saved here. With that argument but without `import performers`,
transformers refuses to open it.
"""
    write_file(path, text)
