"""`performers read`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from performers.cli.application import Device, Dtype, Json, MaxLength, OnInvalid, Threads, app
from performers.cli.tools import Model, Restart, ToksPerBatch
from performers.errors import InputError


@app.command()
def read(
    output: Annotated[str, typer.Option("--output", "-o", help="The state, a file of fixed size.")],
    sequences: Annotated[
        list[str] | None, typer.Argument(help="FASTA files (.gz too), '-' for stdin, bundled:NAME.")
    ] = None,
    input: Annotated[list[str] | None, typer.Option("--input", "-i", help="The same, as an option.")] = None,
    add: Annotated[list[str] | None, typer.Option(help="A state to add; repeatable.")] = None,
    subtract: Annotated[list[str] | None, typer.Option(help="A state to take out again; repeatable.")] = None,
    model: Model = None,
    toks_per_batch: ToksPerBatch = 16_384,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Read a family or partners once, for score, embed and generate --context; killed, the same command goes on.

    Example: performers read homologs.fasta -o family.state
    """
    sources = [*(sequences or ()), *(input or ())]
    if not sources and not add:
        raise InputError("There is nothing to read: expected proteins, or states to --add.")

    from performers.tools.reading import read_to
    from performers.training.distributed import use_threads

    with use_threads(threads):
        result = read_to(
            output,
            sources,
            model,
            add=add or (),
            subtract=subtract or (),
            toks_per_batch=toks_per_batch,
            max_length=max_length,
            on_invalid=on_invalid,
            device=device,
            dtype=dtype,
            restart=restart,
        )
    for remark in result.remarks:
        print(remark, file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        state = result.state
        print(
            f"{result.output}: {state.proteins:,} proteins, {state.residues:,} residues in "
            f"{result.output.stat().st_size:,} bytes, read by {state.model_name}."
        )
    if result.failed:
        raise typer.Exit(3)
