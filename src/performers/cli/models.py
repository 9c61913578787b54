"""`performers models`: what comes with the package."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from performers.cli.application import Json, app, table
from performers.models.bundled import (
    Bundled,
    BundledModel,
    bundled_folder,
    bundled_names,
    describe,
    describe_head,
    head_names,
)

models = typer.Typer(
    help="The models that come with the package: their names, their cards, and where they are.", no_args_is_help=True
)
app.add_typer(models, name="models")

Name = Annotated[str, typer.Argument(help="A name that `performers models list` prints.", metavar="NAME")]


@models.command("list")
def list_models(as_json: Json = False) -> None:
    """The bundled models and what they predict of proteins held out of their training.

    Example: performers models list
    """
    known, heads = [describe(name) for name in bundled_names()], [describe_head(name) for name in head_names()]
    if as_json:
        print(json.dumps([model.to_dict() for model in (*known, *heads)]))
        return
    if not known and not heads:
        print("This installation has no bundled models.")
        return
    print("Accuracy on proteins held out of training: drawn at random, of other clusters, of other families.")
    table(
        ["name", "predicts", "parameters", "file", "random", "clusters", "families"], [_row(model) for model in known]
    )
    for head in heads:
        print(f"\n{head.name} (on {head.body}, {_size(head)}) tells which proteins interact: {head.verdict}.")


def _row(model: BundledModel) -> list[str]:
    accuracies = [_accuracy(model.held_out.get(name)) for name in ("random", "test", "ood")]
    predicts = "the next residue" if model.objective == "clm" else "masked residues"
    return [model.name, predicts, f"{model.parameters:,}", _size(model), *accuracies]


def _size(model: Bundled) -> str:
    return f"{model.num_bytes / 1e6:.1f} MB"


def _accuracy(figures: dict[str, Any] | None) -> str:
    return "" if figures is None else f"{figures['accuracy']:.1%}"


@models.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """The card of a bundled model: data, licence, training, figures, what it is for and what it is not.

    Example: performers models show performers/protein-masked
    """
    model = describe_head(name) if name in head_names() else describe(name)
    print(json.dumps(model.to_dict()) if as_json else model.card)


@models.command("path")
def path(name: Name, as_json: Json = False) -> None:
    """The folder of a bundled model, after its files have been verified.

    Example: performers models path performers/protein-masked
    """
    folder = str(bundled_folder(name))
    print(json.dumps({"name": name, "path": folder}) if as_json else folder)
