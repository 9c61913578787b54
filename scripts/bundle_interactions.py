"""Put the model of interactions that a benchmark trained and measured into the package, with all of its figures on its card.

    python scripts/bundle_interactions.py FOLDER --sources TEXT --name bernett="Bernett's validation pairs"

FOLDER is what `performers benchmark interactions` left; its language model has to be the bundled one. The verdict, which every
`performers interact predict` prints, is made from the benchmark's figures: better than its baselines, or not, set by set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from performers.errors import PerformersError
from performers.folders import sealed_folder
from performers.tools.interactions.figures import verdict
from performers.tools.interactions.model import (
    BUNDLED,
    BUNDLED_NAME,
    CARD,
    HEAD,
    SETTINGS,
    InteractionModel,
    card,
    figures_table,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--sources", required=True, help="where the pairs are from and under what licence, for the card"
    )
    parser.add_argument(
        "--name", action="append", default=[], metavar="TEST=TEXT", help="what the card calls a set of test pairs"
    )
    arguments = parser.parse_args()
    try:
        bundle(arguments.folder, arguments.sources, dict(name.split("=", 1) for name in arguments.name))
    except PerformersError as error:
        sys.exit(str(error))


def bundle(folder: Path, sources: str, names: dict[str, str]) -> None:
    report: dict[str, Any] = json.loads((folder / "interactions.json").read_text(encoding="utf-8"))
    if report["quick"]:
        sys.exit(f"{folder}: quick figures do not go into the package.")
    models = [path.parent for path in folder.glob(f"runs/*/model/{SETTINGS}") if _figures(path) == _own(report)]
    if len(models) != 1:
        sys.exit(f"{folder}: {len(models)} models have the figures of the report; expected one.")
    settings = InteractionModel.open(models[0], device="cpu").settings
    if not settings.body.startswith("performers/"):
        sys.exit(f"{models[0]}: its language model is {settings.body}; expected a bundled one.")
    sets = {"pairs held out of its training table": _own(report)}
    tested: dict[str, dict[str, Any]] = {cell["test"][0]: cell for cell in report["cells"] if cell["kind"] == "pairs"}
    if strange := names.keys() - tested.keys():
        sys.exit(f"--name {min(strange)}: expected one of {', '.join(tested)}.")
    sets |= {names.get(name, name): cell for name, cell in tested.items()}
    sentence = "; ".join(
        f"{how}, measured on " + " and on ".join(f"{name} ({sets[name]['pairs']:,})" for name in measured)
        for how, measured in _by_verdict(sets).items()
    )
    settings = dataclasses.replace(settings, verdict=sentence)
    texts = [card(settings), *(f"{name}. {figures_table(found)}" for name, found in list(sets.items())[1:])]
    content = json.loads((models[0] / SETTINGS).read_text(encoding="utf-8")) | {"verdict": sentence}
    with sealed_folder(BUNDLED, replace=True) as building:
        shutil.copyfile(models[0] / HEAD, building / HEAD)
        (building / SETTINGS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (building / CARD).write_text("\n".join([*texts, f"Pairs: {sources}", ""]), encoding="utf-8")
    print(f"{BUNDLED_NAME} is {sentence}.")


def _by_verdict(sets: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, figures in sets.items():
        found.setdefault(verdict(figures, "joint"), []).append(name)
    return found


def _own(report: dict[str, Any]) -> dict[str, Any]:
    return report["training"]["figures"]


def _figures(settings: Path) -> dict[str, Any]:
    return json.loads(settings.read_text(encoding="utf-8"))["figures"]


if __name__ == "__main__":
    main()
