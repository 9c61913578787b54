"""`performers generate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from performers.cli.application import Device, Dtype, Json, Seed, Threads, app, listed
from performers.cli.tools import Context, DryRun, Restart, finish


@app.command()
def generate(
    output: Annotated[
        str, typer.Option("--output", "-o", help="A FASTA file (.fasta, .fa, .faa); a .tsv goes beside it.")
    ],
    count: Annotated[int, typer.Option(min=1, help="Designs; with --input of each protein.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or name of a causal model, or with --input of a masked one.", show_default="a bundled model"
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Exact number of residues, prompt included.")] = None,
    min_length: Annotated[
        int | None, typer.Option(min=1, help="The model may end a protein from here on.", show_default="1")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="A protein ends here at the latest.", show_default="500")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Residues that every design begins with.")] = None,
    temperature: Annotated[float, typer.Option(help="Log-probabilities are divided by it.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest residues only; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest residues of this probability only.")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Multiplies log-probabilities of recent residues; 1: none.")
    ] = 1.0,
    repetition_window: Annotated[int, typer.Option(min=1, help="How many residues are recent.")] = 8,
    max_run: Annotated[int, typer.Option(min=0, help="Most equal residues in a row; 0: any.")] = 0,
    partner: Annotated[str | None, typer.Option(help="Proteins that are read before a design.")] = None,
    spec: Annotated[
        str | None, typer.Option(help="TSV of partner id and wanted or unwanted.", show_default="all are wanted")
    ] = None,
    context: Context = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences drawn per design; the one that prefers its partners is kept.", show_default="1"
        ),
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Designs drawn side by side.", show_default="16")] = None,
    input: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="FASTA to redesign with a masked model, at ? or --mask."),
    ] = None,
    mask: Annotated[str | None, typer.Option(help="Positions to redesign, counted from 1, such as 10-40,55.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps in which they are filled.", show_default="one residue each, at most 32"),
    ] = None,
    order: Annotated[
        Literal["confident", "entropy", "random"] | None,
        typer.Option(help="Which positions are filled first.", show_default="confident"),
    ] = None,
    toks_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass of redesign.", show_default="16384")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="FASTA files, with commas, to find each design's nearest protein in; or none.",
            show_default="the bundled sample",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """New proteins from a causal model, or parts of proteins written anew by a masked one.

    Example: performers generate --count 10 --length 200 --seed 1 -o designs.fasta
    """
    from performers.tools.generation import generate_to
    from performers.training.distributed import use_threads

    with use_threads(threads):
        outcome = generate_to(
            output,
            input or (),
            model,
            count=count,
            length=length,
            min_length=min_length,
            max_length=max_length,
            prompt=prompt,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            repetition_window=repetition_window,
            max_run=max_run,
            partner=partner,
            spec=spec,
            context=context,
            candidates=candidates,
            at_once=at_once,
            mask=mask,
            steps=steps,
            order=order,
            toks_per_batch=toks_per_batch,
            reference=listed(reference),
            seed=seed,
            device=device,
            dtype=dtype,
            dry_run=dry_run,
            restart=restart,
        )
    if outcome.done and not as_json:
        _print_figures(outcome.figures)
    finish(outcome, as_json)


def _print_figures(figures: dict[str, Any]) -> None:
    print(
        f"{figures['designs']:,} designs, {figures['mean_log_likelihood']:.3f} nats per residue on average, "
        f"{figures['unusual']:,} of unusual composition."
    )
    if "remark" in figures:
        print(figures["remark"])
    elif "without_neighbour" in figures:
        print(f"{figures['without_neighbour']:,} align with no reference protein over 80 % of their length.")
