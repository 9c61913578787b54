"""`performers finetune` and `predict`."""

from __future__ import annotations

import json
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
from performers.cli.tools import DryRun, Engine, Restart, ToksPerBatch, Workers, finish
from performers.tools.finetuning import FinetuneConfig, config_for
from performers.training.configuration import read_config


@app.command()
@options_of(FinetuneConfig)
def finetune(
    *,
    config: Annotated[
        str | None, typer.Option(help="A YAML file with any of the keys below; options override it.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run that the output folder holds.")] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train a model on your own measurements; killed at any moment, the same command goes on to the same result.

    Example: performers finetune -i stability.csv --target dG --task regression -o model
    """
    values = {
        **(read_config(config) if config else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    settings = config_for(values)

    from performers.tools.finetuning import finetune_with

    result = finetune_with(settings, resume=resume, dry_run=dry_run)
    if as_json:
        estimate = {"estimate": result.estimate} if result.estimate else {}
        print(json.dumps({"output": str(result.output), **result.figures, **estimate}))
        return
    if not result.figures:
        return  # a dry run, or a process that only joined

    from performers.tools.finetuned import coverage_in_words, rows_of, weights_in_words

    figures = result.figures
    sets = ", ".join(f"{count:,} {name}" for name, count in figures["sets"].items())
    print(
        f"{figures['target']} ({figures['task']}); {sets} proteins, split by {figures['split']['by']}. Test proteins:"
    )
    table(*rows_of(figures))
    print(weights_in_words(figures))
    print(coverage_in_words(figures))
    print(
        f"The model is in {result.output}: performers predict --model {result.output} -i proteins.fasta -o predictions.csv"
    )


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="The folder that performers finetune made.")],
    input: Inputs,
    output: Annotated[str, typer.Option("--output", "-o", help="A .csv file.")],
    confidence: Annotated[
        float, typer.Option(help="Probability that the truth is in an interval or a set of labels.")
    ] = 0.9,
    toks_per_batch: ToksPerBatch = 16_384,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    engine: Engine = "auto",
    workers: Workers = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """What a finetuned model says of proteins, with conformal intervals; killed at any moment, the same command goes on.

    Example: performers predict --model model -i proteins.fasta -o predictions.csv
    """
    from performers.tools.prediction import predict_to
    from performers.training.distributed import use_threads

    with use_threads(threads):
        outcome = predict_to(
            output,
            input,
            model,
            confidence=confidence,
            toks_per_batch=toks_per_batch,
            max_length=max_length,
            on_invalid=on_invalid,
            device=device,
            dtype=dtype,
            engine=engine,
            workers=workers,
            dry_run=dry_run,
            restart=restart,
        )
    finish(outcome, as_json)
