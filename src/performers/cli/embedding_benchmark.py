"""`performers benchmark embedding`."""

from __future__ import annotations

from typing import Annotated

import typer

from performers.cli.application import Device, Dtype, Json, Seed, Threads, numbers
from performers.cli.benchmarks import MaxMinutes, Quick, Restart, benchmark, output_folder, print_report


@benchmark.command("embedding")
def benchmark_embedding(
    domains: Annotated[
        str | None,
        typer.Option(help="For quality: lines of identifier, SCOPe family, sequence and DSSP, with tabs (.gz too)."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A name or a folder; repeatable.", show_default="the bundled masked one"),
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained/--no-untrained", help="Judge their architectures with random weights too.")
    ] = True,
    train: Annotated[
        int | None, typer.Option(min=1, help="Domains that the probe learns from.", show_default="1500")
    ] = None,
    test: Annotated[
        int | None, typer.Option(min=1, help="Domains that the probe is judged on.", show_default="500")
    ] = None,
    per_family: Annotated[
        int | None, typer.Option(min=1, help="Domains of a family, at most.", show_default="2")
    ] = None,
    superfamilies: Annotated[
        int | None, typer.Option(min=0, help="Superfamilies that domains are of; 0 for all.", show_default="0")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="For speed: esm2 (8M, downloaded once) or the folder of another model.")
    ] = None,
    proteins: Annotated[
        int | None, typer.Option(min=1, help="Ordinary proteins that are timed together.", show_default="100")
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(help="Residues of long proteins, with commas; or none.", show_default="8192,16384,32768"),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Turns in which systems are timed, at most.", show_default="5")
    ] = None,
    toks_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass.", show_default="16384")
    ] = None,
    output: Annotated[str, output_folder("embedding")] = "benchmark-embedding",
    restart: Restart = False,
    max_minutes: MaxMinutes = None,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Embeddings: secondary structure and remote relatives beside what letters alone tell, and speed beside ESM-2.

    Example: performers benchmark embedding --domains scope_domains_dssp.tsv.gz --against esm2
    """
    from performers.benchmarks.embedding import EmbeddingSettings, measure_embedding, tables
    from performers.training.distributed import choose_device

    settings = EmbeddingSettings.of_size(
        quick,
        domains=domains,
        models=model,
        untrained=untrained,
        train=train,
        test=test,
        per_family=per_family,
        superfamilies=superfamilies,
        against=against,
        proteins=proteins,
        lengths=numbers("--length", length),
        repeats=repeats,
        toks_per_batch=toks_per_batch,
        max_minutes=max_minutes,
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    print_report(measure_embedding(settings, output, quick=quick, restart=restart), tables, output, as_json)
