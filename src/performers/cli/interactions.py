"""`performers interact train` and `predict`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from performers.cli.application import (
    Device,
    Dtype,
    Inputs,
    Json,
    MaxLength,
    OnInvalid,
    Threads,
    app,
    options_of,
    table,
)
from performers.cli.tools import DryRun, Restart, ToksPerBatch
from performers.errors import InputError
from performers.tools.interactions.training import InteractConfig
from performers.training.configuration import read_config

interact = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Which proteins interact, from their sequences read together."
)
app.add_typer(interact, name="interact")


@interact.command("train")
@options_of(InteractConfig)
def train(
    *,
    config: Annotated[
        str | None, typer.Option(help="A YAML file with any of the keys below; options override it.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run that the output folder holds.")] = True,
    resume_from: Annotated[str | None, typer.Option(help="The checkpoint to go on from, e.g. step-00000100.")] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Learn from pairs with labels; killed at any moment, the same command goes on to the same result.

    Example: performers interact train -i proteins.fasta --pairs pairs.tsv -o run --model language-model
    """
    values = {
        **(read_config(config) if config else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    settings = InteractConfig.for_run(values)

    from performers.tools.interactions.model import SETTINGS
    from performers.tools.interactions.training import Interaction, left_out_of
    from performers.training.run_folder import run_task

    result = run_task(Interaction(settings), resume=resume, resume_from=resume_from)
    model = json.loads((result.model / SETTINGS).read_text(encoding="utf-8"))
    left_out = left_out_of(result.output)
    if as_json:
        content = {**vars(result), "output": str(result.output), "model": str(result.model), "left_out": left_out}
        print(json.dumps({**content, "verdict": model["verdict"], "figures": model["figures"]}))
    else:
        if model["figures"] is not None:
            _print_systems(model["figures"])
        print(f"The model is {model['verdict']}.")
        print(f"It is in {result.model}: performers interact predict --model {result.output} uses it.")
    if left_out:
        raise typer.Exit(3)


@interact.command("predict")
def predict(
    input: Inputs,
    output: Annotated[
        str, typer.Option("--output", "-o", help="A folder, or a .tsv file (without matrices of groups).")
    ],
    pairs: Annotated[
        str | None, typer.Option(help="TSV of two identifiers and, to be measured, a label; .gz too.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="TSV of a group and an identifier: each group is one context.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Score all pairs of the proteins.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Folder that `performers interact train` made.", show_default="the bundled one"),
    ] = None,
    thresh: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Pairs of at least this probability are written on their own, too.")
    ] = 0.5,
    toks_per_batch: ToksPerBatch = 16_384,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """The probability that proteins interact: of pairs, of all pairs, or of all pairs of groups that are read together.

    Example: performers interact predict -i proteins.fasta --pairs pairs.tsv -o predictions
    """
    if sum((pairs is not None, groups is not None, everything)) != 1:
        raise InputError("Expected one of --pairs, --groups and --all.")

    from performers.tools.interactions.prediction import predict_to
    from performers.training.distributed import use_threads

    with use_threads(threads):
        outcome = predict_to(
            output,
            input,
            model,
            pairs=pairs,
            groups=groups,
            thresh=thresh,
            toks_per_batch=toks_per_batch,
            max_length=max_length,
            on_invalid=on_invalid,
            device=device,
            dtype=dtype,
            dry_run=dry_run,
            restart=restart,
        )
    if outcome.done and not as_json:
        for number, name, reason in outcome.failed[:5]:
            print(f"Number {number:,} ({name}): {reason}.", file=sys.stderr)
        figures = outcome.figures
        print(f"{figures['positives']:,} of {figures['pairs']:,} pairs have a probability of {thresh:g} or more.")
        if "measured" in figures:
            _print_measured(figures["measured"])
        what = "pairs" if groups is None else "groups"
        print(f"{outcome.output}: {figures['scored']:,} of {figures['asked']:,} {what} have a score.")
    if as_json:
        print(json.dumps(outcome.to_dict()))
    if outcome.failed:
        raise typer.Exit(3)


def _print_measured(figures: dict[str, Any]) -> None:
    from performers.tools.interactions.figures import with_interval

    print(
        f"{figures['pairs']:,} pairs with labels of {figures['proteins']:,} proteins, {figures['base_rate']:.1%} interact; 95 % "
        "intervals, resampling proteins"
    )
    table(
        ["AUROC", "AUPR (by chance the share above)", "calibration gap"],
        [[with_interval(figures, "auroc"), with_interval(figures, "aupr"), f"{figures['calibration']['error']:.3f}"]],
    )


def _print_systems(figures: dict[str, Any]) -> None:
    from performers.tools.interactions.figures import ahead, with_interval

    print(
        f"{figures['pairs']:,} pairs of {figures['proteins']:,} proteins held out, {figures['base_rate']:.1%} interact; 95 % "
        "intervals, resampling proteins"
    )
    table(
        ["system", "AUROC", "AUPR", "joint model minus this"],
        [
            [
                name,
                with_interval(system, "auroc"),
                with_interval(system, "aupr"),
                ahead(system),
            ]
            for name, system in figures["systems"].items()
        ],
    )
