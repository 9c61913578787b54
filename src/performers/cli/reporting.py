"""`performers report`."""

from __future__ import annotations

from typing import Annotated

import typer

from performers.cli.application import Device, Dtype, Inputs, Json, MaxLength, OnInvalid, Threads, app
from performers.cli.tools import DryRun, Model, Restart, ToksPerBatch, finish


@app.command()
def report(
    input: Inputs,
    output: Annotated[
        str, typer.Option("--output", "-o", help="An .html file; a .tsv of the same name goes beside it.")
    ],
    model: Model = None,
    protein: Annotated[
        str | None,
        typer.Option(help="Identifier of the protein to look at closely.", show_default="the first one"),
    ] = None,
    interactions: Annotated[
        str | None, typer.Option(help="A table p0 p1 prob of `performers interact predict`, shown as a matrix.")
    ] = None,
    designs: Annotated[str | None, typer.Option(help="A table of `performers generate`, shown beside them.")] = None,
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
    """One page about proteins: lengths, likelihoods, a map of embeddings, contacts and substitutions of one of them.

    The page is a single file that needs no network.

    Example: performers report -i proteins.fasta -o report.html --protein P62593
    """
    from performers.tools.reporting import report as make
    from performers.training.distributed import use_threads

    with use_threads(threads):
        outcome = make(
            output,
            input,
            model,
            chosen=protein,
            interactions=interactions,
            designs=designs,
            toks_per_batch=toks_per_batch,
            max_length=max_length,
            on_invalid=on_invalid,
            device=device,
            dtype=dtype,
            dry_run=dry_run,
            restart=restart,
        )
    finish(outcome, as_json)
