"""`performers embed` and `score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

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
    listed,
    numbers,
    table,
)
from performers.errors import InputError

Model = Annotated[
    str | None,
    typer.Option(
        help="A bundled model's name, or a folder: of a Performer, a converted or a Hugging Face protein model.",
        show_default="performers/protein-masked",
    ),
]
Context = Annotated[
    str | None,
    typer.Option(help="A state of `performers read`, of the same model: a family to read every sequence with."),
]
ToksPerBatch = Annotated[int, typer.Option(min=1, help="Tokens in one forward pass.")]
Engine = Annotated[
    Literal["auto", "local", "rank", "ray"],
    typer.Option(
        help="Where the work is done: here, by each process of torchrun or a Slurm array its share (rank), or on a Ray cluster.",
        show_default="rank under torchrun, else local",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Workers on a Ray cluster.", show_default="as many as it has GPUs, or cores for"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what the work would take, and do none of it.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Forget what an earlier run left, and replace the output if it is there.")
]


def finish(outcome: Any, as_json: bool) -> None:
    """Prints what became of a tool's run; items that failed end the command with status 3."""
    if as_json:
        print(json.dumps(outcome.to_dict()))
    elif outcome.done:
        print(f"{outcome.output}: {outcome.items - len(outcome.failed):,} of {outcome.items:,} done.")
    if outcome.failed:
        raise typer.Exit(3)


@app.command()
def embed(
    input: Inputs,
    output: Annotated[
        str, typer.Option("--output", "-o", help="An .h5, .npz or .parquet file, or a folder for .pt files.")
    ],
    model: Model = None,
    include: Annotated[
        str, typer.Option(help="mean, per_tok and cls, with commas or spaces between them.", metavar="KINDS")
    ] = "mean",
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    layers: Annotated[str, typer.Option(help="Layers, with commas; -1 is the last, after the final norm.")] = "-1",
    chains: Annotated[
        Literal["isolated", "joint"],
        typer.Option(help="How chains (A:B) of one record are read: each alone, or seeing each other."),
    ] = "isolated",
    file_format: Annotated[
        Literal["h5", "npz", "parquet", "pt"] | None,
        typer.Option("--format", help="Of the output.", show_default="what its name ends in"),
    ] = None,
    toks_per_batch: ToksPerBatch = 16_384,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    context: Context = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    engine: Engine = "auto",
    workers: Workers = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Vectors of proteins and of their residues, of any length; killed at any moment, the same command goes on.

    Example: performers embed -i proteins.fasta -o embeddings.h5 --model run/model --include mean,per_tok
    """
    # "--include mean per_tok", as fair-esm takes it: what follows the first word arrives as arguments.
    for word in more or ():
        if Path(word).suffix or Path(word).name != word:
            raise InputError(f"{word} stands alone: expected -i before every file, as in -i {input[-1]} -i {word}.")
    kinds = listed(",".join([include, *(word for word in more or () if not _is_number(word))]))
    layer_numbers = numbers("--layers", ",".join([layers, *(word for word in more or () if _is_number(word))]))

    from performers.tools.embedding import embed_to
    from performers.training.distributed import use_threads

    with use_threads(threads):
        outcome = embed_to(
            output,
            input,
            model,
            include=kinds,
            layers=layer_numbers,
            chains=chains,
            file_format=file_format,
            toks_per_batch=toks_per_batch,
            max_length=max_length,
            on_invalid=on_invalid,
            device=device,
            dtype=dtype,
            context=context,
            engine=engine,
            workers=workers,
            dry_run=dry_run,
            restart=restart,
        )
    finish(outcome, as_json)


def _is_number(word: str) -> bool:
    return word.lstrip("-").isdigit()


@app.command()
def score(
    output: Annotated[str, typer.Option("--output", "-o", help="A .csv file; with --proteingym a folder.")],
    wild_type: Annotated[
        str | None, typer.Option(help="The wild type: a sequence, or a file with one or more proteins.")
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="CSV, TSV or parquet with a column mutant (A1P:D2N or p.Ala1Pro) or mutated_sequence."),
    ] = None,
    saturate: Annotated[bool, typer.Option("--saturate", help="Score every single substitution.")] = False,
    proteingym: Annotated[str | None, typer.Option(help="A folder of ProteinGym assays to score.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="ProteinGym's reference file.", show_default="reference.csv in the folder"),
    ] = None,
    model: Model = None,
    scoring_strategy: Annotated[
        Literal["masked-marginals", "wt-marginals", "pseudo-ppl", "likelihood"] | None,
        typer.Option(
            help="What a score is.",
            show_default="masked-marginals; pseudo-ppl for insertions and deletions; likelihood for a causal model",
        ),
    ] = None,
    offset_idx: Annotated[int, typer.Option(help="The number of the first residue in the names of variants.")] = 1,
    mutation_col: Annotated[str, typer.Option(help="The column with the names of variants.")] = "mutant",
    measurement_col: Annotated[
        str | None, typer.Option(help="A column with measurements to compare with.", show_default="DMS_score")
    ] = None,
    stripes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Passes over a protein, each with every so many-th residue masked; 0: each residue alone.",
            show_default="each alone up to 2,000 residues, 16 above",
        ),
    ] = None,
    check_stripes: Annotated[
        int,
        typer.Option(
            min=0, help="Positions to mask alone as well, to measure how well stripes agree by masked-marginals."
        ),
    ] = 0,
    heat_map: Annotated[
        bool,
        typer.Option(help="Draw the single substitutions as a PNG, where the strategy or --saturate scores them all."),
    ] = True,
    toks_per_batch: ToksPerBatch = 16_384,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    context: Context = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    engine: Engine = "auto",
    workers: Workers = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """How well a protein tolerates variants, by what a language model finds likely. Not for clinical use.

    Example: performers score --wild-type wild-type.fasta --variants variants.csv -o scores.csv --model run/model
    """
    if sum((variants is not None, saturate, proteingym is not None)) != 1:
        raise InputError("Expected one of --variants, --saturate and --proteingym.")

    from performers.tools.scoring import score_to
    from performers.training.distributed import use_threads

    with use_threads(threads):
        outcome = score_to(
            output,
            wild_type,
            model,
            variants=variants,
            proteingym=proteingym,
            reference=reference,
            strategy=scoring_strategy,
            offset_idx=offset_idx,
            mutation_column=mutation_col,
            measurement_column=measurement_col,
            stripes=stripes,
            check_stripes=check_stripes,
            heat_map=heat_map,
            toks_per_batch=toks_per_batch,
            max_length=max_length,
            on_invalid=on_invalid,
            device=device,
            dtype=dtype,
            context=context,
            engine=engine,
            workers=workers,
            dry_run=dry_run,
            restart=restart,
        )
    if outcome.done and not as_json:
        _print_scores(outcome.figures)
    finish(outcome, as_json)


def _print_scores(figures: dict[str, Any]) -> None:
    print(f"Scores by {figures['strategy']}; higher is better tolerated. Not for clinical use.")
    table(["status", "variants"], [[status, f"{count:,}"] for status, count in figures["statuses"].items()])
    if "agreement" in figures:
        rows = [(name, row) for name, rows in figures["agreement"].items() for row in rows]
        table(
            ["measurements", "mutations", "variants", "Spearman", "BLOSUM62", "minus wild type's", "AUC", "NDCG@10%"],
            [
                [
                    name,
                    row["mutations"],
                    f"{row['variants']:,}",
                    _correlation(row),
                    *map(_correlation, row["baselines"].values()),
                    *(_figure(row[key]) for key in ("auc", "ndcg")),
                ]
                for name, row in rows
            ],
        )
    if "stripes_agreement" in figures:
        print(f"Spearman of stripes with single masks: {figures['stripes_agreement']['spearman']:.4f}")


def _correlation(found: dict[str, Any]) -> str:
    """With its 95 % interval, where there is one."""
    interval = "" if found["interval"] is None else f" ({' to '.join(map(_figure, found['interval']))})"
    return _figure(found["spearman"]) + interval


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
