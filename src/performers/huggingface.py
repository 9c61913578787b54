"""What performers tells Hugging Face about itself, and when.

`AutoModel.from_pretrained(folder)` opens our folders once our classes are registered with the Auto classes, and registering
needs both sides imported, which takes seconds. So nothing is imported here: each of our modules registers itself when it is
imported, and an import hook imports it right after the part of transformers that it plugs into, whichever of the two packages
comes first. Only transformers' own submodules are watched, so `import transformers` costs what it always did.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

# As soon as the module on the left is imported, the one on the right is, and registers what it has with it.
COMPANIONS = {
    "transformers.modeling_layers": "performers.conversion.interface",
    "transformers.models.auto.configuration_auto": "performers.models.configuration_performer",
    "transformers.models.auto.modeling_auto": "performers.models.modeling_performer",
    "transformers.models.auto.tokenization_auto": "performers.models.tokenization_performer",
}

# Half-way through this module, transformers imports its Auto classes, and our models are made of what the other half defines:
# whatever is found meanwhile waits until it is whole.
_LAYERS = "transformers.modeling_layers"
_waiting: list[str] = []


class _CompanionFinder(importlib.abc.MetaPathFinder):
    """Finds the watched modules where they are, and imports their companions after them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in COMPANIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_import_companion(module: ModuleType) -> None:
            execute(module)
            _waiting.append(COMPANIONS[fullname])
            layers = sys.modules.get(_LAYERS)
            if module is layers or not getattr(getattr(layers, "__spec__", None), "_initializing", False):
                _import_waiting()

        spec.loader.exec_module = execute_and_import_companion
        return spec


def _import_waiting() -> None:
    while _waiting:
        importlib.import_module(_waiting.pop(0))


def install_hooks() -> None:
    """Register our classes with Hugging Face: now with what is already imported of transformers, later with the rest."""
    sys.meta_path.insert(0, _CompanionFinder())
    for watched, companion in COMPANIONS.items():
        if watched in sys.modules:
            importlib.import_module(companion)
