"""`performers corpus ...`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from performers.cli.application import Inputs, Json, MaxLength, OnInvalid, Output, app

corpus = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Proteins as a memory-mapped folder, which pretraining reads."
)
app.add_typer(corpus, name="corpus")


@corpus.command("build")
def build(
    input: Inputs,
    output: Output,
    workers: Annotated[int, typer.Option(min=1, help="Processes; each reads an input at a time.")] = 1,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    as_json: Json = False,
) -> None:
    """Read FASTA once, in as many processes as are asked for; killed at any moment, the same command goes on.

    Example: performers corpus build -i shard1.fasta.gz -i shard2.fasta.gz -o corpus --workers 8
    """
    from performers.data import FastaReport, build_corpus

    def progress(report: FastaReport) -> None:
        print(
            f"{report.records:,} proteins, {report.residues:,} residues of {len(report.inputs):,} files",
            file=sys.stderr,
            flush=True,
        )

    built = build_corpus(
        input,
        output,
        max_length=max_length,
        on_invalid=on_invalid,
        workers=workers,
        progress=progress if workers > 1 else None,
    )
    for remark in FastaReport.from_dict(built.metadata["report"]).remarks():
        print(remark, file=sys.stderr)
    if as_json:
        figures = {"output": output, "proteins": len(built), "residues": built.num_residues}
        print(json.dumps({**figures, "report": built.metadata["report"]}))
    else:
        print(f"{output}: {len(built):,} proteins, {built.num_residues:,} residues.")
