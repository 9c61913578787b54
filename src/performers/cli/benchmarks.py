"""`performers benchmark ...`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from performers.cli.application import Device, Dtype, Json, Seed, Threads, app, listed, numbers, table

benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure time and memory on this machine.")
app.add_typer(benchmark, name="benchmark")


@benchmark.command("training")
def benchmark_training(
    preset: Annotated[str, typer.Option(help="Size of the model.")] = "paper-regular",
    context: Annotated[int, typer.Option(min=4, help="Tokens in one context.")] = 8192,
    attention: Annotated[str, typer.Option(help="Mechanisms to compare, with commas.")] = "favor,exact",
    kernel: Annotated[str, typer.Option(help="Kernel of favor.")] = "relu",
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts in one step.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 2,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before them that are not timed.")] = 1,
    objective: Annotated[Literal["mlm", "clm"], typer.Option(help="Masked or causal.")] = "mlm",
    layer_chunk: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens that go through a layer at a time; 0 for all.", show_default="16384"),
    ] = None,
    sequence_chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a causal model trains on at a time.", show_default="all")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time and peak memory of training steps on real proteins, for each mechanism in a process of its own.

    Example: performers benchmark training --preset paper-regular --context 8192
    """
    from performers.benchmarks.training import measure_training

    results = measure_training(
        attention.split(","),
        preset=preset,
        context=context,
        kernel=kernel,
        batch_size=batch_size,
        steps=steps,
        warm_up=warm_up,
        objective=objective,
        layer_chunk=layer_chunk,
        sequence_chunk=sequence_chunk,
        device=device,
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    if as_json:
        print(json.dumps(results))
        return
    table(
        ["attention", "seconds per step", "tokens/s", "peak memory"],
        [
            [
                row["attention"],
                f"{row['seconds_per_step']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            ]
            for row in results
        ],
    )


_FOLDER_HELP = "Folder for the report, the pictures and what was measured; the same command goes on with it."
_RESTART_HELP = "Measure again what the folder holds."
_QUICK_HELP = "Small sizes, to see that it works; the figures mean little."


@benchmark.command("attention")
def benchmark_attention(
    against: Annotated[
        str | None,
        typer.Option(
            help="Rivals, with commas: sdpa, performer-pytorch, textbook, materialised, flash-linear-attention, "
            "flash-linear-attention-given; or none.",
            show_default="all that run here",
        ),
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="Lengths in tokens, with commas.", show_default="1024 to 1048576")
    ] = None,
    kernel: Annotated[str, typer.Option(help="Kernels of FAVOR, with commas.")] = "softmax,relu",
    direction: Annotated[str, typer.Option(help="Directions, with commas.")] = "bidirectional,causal",
    dtype: Annotated[
        str | None, typer.Option(help="Types of the inputs, with commas.", show_default="float32,bfloat16")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Backends of FAVOR, with commas.", show_default="auto,native,chunked; on cuda auto,chunked"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 64,
    num_features: Annotated[int, typer.Option(min=1, help="Random features.")] = 256,
    position: Annotated[
        str | None,
        typer.Option(
            help="Tokens already seen when one more is decoded, with commas; or none.", show_default="1000,1000000"
        ),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help=_FOLDER_HELP)] = "benchmark-attention",
    restart: Annotated[bool, typer.Option("--restart", help=_RESTART_HELP)] = False,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Skip a cell that would take longer, judging by shorter lengths.", show_default="10"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=_QUICK_HELP)] = False,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time and memory of attention alone, forward and backward, against the limit of the machine and against rivals.

    Example: performers benchmark attention --against sdpa,performer-pytorch --length 1024,16384 --dtype float32
    """
    from performers.benchmarks.attention import AttentionSettings, measure_attention, tables
    from performers.training.distributed import choose_device

    settings = AttentionSettings.of_size(
        quick,
        str(choose_device(device)),
        against=listed(against),
        lengths=numbers("--length", length),
        kernels=listed(kernel),
        directions=listed(direction),
        dtypes=listed(dtype),
        backends=listed(backend),
        batch_size=batch_size,
        heads=heads,
        head_dim=head_dim,
        num_features=num_features,
        positions=numbers("--position", position),
        threads=threads,
        seed=seed,
        max_minutes=max_minutes,
    )
    _print_report(measure_attention(settings, output, restart=restart), tables, output, as_json)


@benchmark.command("approximation")
def benchmark_approximation(
    kernel: Annotated[
        str | None,
        typer.Option(help="Kernels, with commas.", show_default="all that estimate the softmax kernel"),
    ] = None,
    projection: Annotated[str | None, typer.Option(help="Random projections, with commas.", show_default="all")] = None,
    num_features: Annotated[
        str | None, typer.Option(help="Rows of the projection, M, with commas.", show_default="16 to 512")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens.", show_default="4096")] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 16,
    draws: Annotated[int | None, typer.Option(min=1, help="Draws of the projection.", show_default="15")] = None,
    deviation: Annotated[
        str | None,
        typer.Option(help="Standard deviations of queries and keys, with commas.", show_default="1,0.5,0.25"),
    ] = None,
    error: Annotated[
        Literal["mse", "relative"], typer.Option(help="The error that the tables show; the report has both.")
    ] = "relative",
    output: Annotated[str, typer.Option("--output", "-o", help=_FOLDER_HELP)] = "benchmark-approximation",
    restart: Annotated[bool, typer.Option("--restart", help=_RESTART_HELP)] = False,
    quick: Annotated[bool, typer.Option("--quick", help=_QUICK_HELP)] = False,
    device: Device = "auto",
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="Precision of the comparison.")] = "float32",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Error of FAVOR against exact softmax attention, by kernel, projection and number of features.

    Example: performers benchmark approximation --kernel softmax,softmax-hyperbolic --projection iid,orthogonal
    """
    from performers.benchmarks.approximation import ApproximationSettings, measure_approximation, tables
    from performers.training.distributed import choose_device

    settings, notes = ApproximationSettings.of_size(
        quick,
        kernels=listed(kernel),
        projections=listed(projection),
        num_features=numbers("--num-features", num_features),
        length=length,
        head_dim=head_dim,
        draws=draws,
        deviations=numbers("--deviation", deviation, float),
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    report = measure_approximation(settings, output, notes=notes, restart=restart)
    _print_report(report, lambda report: tables(report, error), output, as_json)


def _print_report(
    report: dict[str, Any],
    tables: Callable[[dict[str, Any]], list[tuple[str, list[str], list[list[str]]]]],
    output: str,
    as_json: bool,
) -> None:
    """Prints a benchmark's report; cells that failed end the command with status 3."""
    if as_json:
        print(json.dumps(report))
    else:
        for title, header, rows in tables(report):
            print(f"\n{title}")
            table(header, rows)
        print(f"\nThe report and the pictures are in {output}.")
        for note in report["notes"]:
            print(note)
    if report["failed"]:
        raise typer.Exit(3)
