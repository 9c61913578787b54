"""`performers contacts` and `performers benchmark contacts`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from performers.cli.application import Device, Dtype, Inputs, Json, MaxLength, OnInvalid, Seed, Threads, app, listed
from performers.cli.benchmarks import benchmark, print_report
from performers.cli.tools import DryRun, Engine, Model, Restart, ToksPerBatch, Workers, finish


@app.command()
def contacts(
    input: Inputs,
    output: Annotated[str, typer.Option("--output", "-o", help="A folder: a table and a picture for each record.")],
    model: Model = None,
    method: Annotated[
        Literal["attention", "jacobian"],
        typer.Option(
            help="A regression on attention maps (one pass, probabilities), or the categorical Jacobian (20 passes per residue)."
        ),
    ] = "attention",
    regression: Annotated[
        str | None,
        typer.Option(
            help="The model's regression, the contact-regression.json of an earlier output.",
            show_default="the one in the model's folder; fitted if there is none",
        ),
    ] = None,
    top: Annotated[float, typer.Option(help="Pairs to keep of a record, times its residues.")] = 2.0,
    min_separation: Annotated[int, typer.Option(min=1, help="Least distance in sequence, within a chain.")] = 6,
    attention_maps: Annotated[
        bool, typer.Option("--attention-maps", help="Describe the heads as well: patterns, amino-acid similarity.")
    ] = False,
    pictures: Annotated[int, typer.Option(min=0, help="Draw the first so many records.")] = 100,
    toks_per_batch: ToksPerBatch = 16_384,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    engine: Engine = "auto",
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Which residues touch, in one chain and between the chains of a record (A:B), at any length.

    Example: performers contacts -i proteins.fasta -o contacts
    """
    from performers.tools.contact_prediction import contacts_to
    from performers.training.distributed import use_threads

    with use_threads(threads):
        outcome = contacts_to(
            output,
            input,
            model,
            method=method,
            regression=regression,
            top=top,
            min_separation=min_separation,
            with_patterns=attention_maps,
            pictures=pictures,
            toks_per_batch=toks_per_batch,
            max_length=max_length,
            on_invalid=on_invalid,
            device=device,
            dtype=dtype,
            dry_run=dry_run,
            restart=restart,
            engine=engine,
            workers=workers,
        )
    if outcome.done and not as_json:
        _print_figures(outcome.figures)
    finish(outcome, as_json)


def _print_figures(figures: dict[str, Any]) -> None:
    if figures["method"] == "attention":
        print(
            f"{figures['likely']:,} pairs with a probability of at least 0.5, {figures['likely_long_range']:,} of them 24 or "
            f"more residues apart and {figures['likely_between_chains']:,} between chains."
        )
    if "heads" in figures:
        print("Heads: " + ", ".join(f"{count} {kind}" for kind, count in figures["heads"].items()) + ".")
        found = figures["blosum62"]
        if found["spearman"] is not None:
            low, high = found["interval"]
            print(
                f"Amino acids alike to attention and BLOSUM62: Spearman {found['spearman']:.2f} ({low:.2f} to {high:.2f})."
            )


@benchmark.command("contacts")
def benchmark_contacts(
    model: Model = None,
    system: Annotated[
        str | None,
        typer.Option(help="With commas: attention, jacobian, separation, random.", show_default="all"),
    ] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Test chains to judge.", show_default="all 120")] = None,
    jacobian_chains: Annotated[
        int | None, typer.Option(min=1, help="Of these by Jacobian, which is slow.", show_default="20")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the report; the same command goes on with it.")
    ] = "benchmark-contacts",
    restart: Annotated[bool, typer.Option("--restart", help="Measure again what the folder holds.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few chains, to see that it works.")] = False,
    device: Device = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Precision of predicted contacts on chains of known structure, against what separation in sequence alone tells.

    Example: performers benchmark contacts --model run/model --system attention,separation,random
    """
    from performers.benchmarks.contacts import ContactSettings, measure_contacts, tables
    from performers.training.distributed import choose_device

    settings = ContactSettings.of_size(
        quick,
        model=model,
        systems=listed(system),
        chains=chains,
        jacobian_chains=jacobian_chains,
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    print_report(measure_contacts(settings, output, quick=quick, restart=restart), tables, output, as_json)
