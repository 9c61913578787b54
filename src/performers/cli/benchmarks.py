"""`performers benchmark ...`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from performers.cli.application import Device, Dtype, Json, Seed, Threads, app, listed, numbers, print_tables, table

benchmark = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure time, memory and quality on this machine."
)
app.add_typer(benchmark, name="benchmark")


@benchmark.command("training")
def benchmark_training(
    preset: Annotated[str, typer.Option(help="Size of the model.")] = "paper-regular",
    config: Annotated[
        str | None,
        typer.Option(
            help="Settings of pretrain, or a recipe, whose model is timed, too, and gives the size of the others."
        ),
    ] = None,
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
        config,
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


_SYSTEMS = (
    "transformer, transformer-materialised, performer-relu, performer-softmax, reformer, sparse, local, "
    "performer-relu+sparse, performer-relu|local, performer-relu|local16, identity"
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
    print_report(measure_attention(settings, output, restart=restart), tables, output, as_json)


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
    print_report(report, lambda report: tables(report, error), output, as_json)


Systems = Annotated[
    str | None, typer.Option("--system", help=f"Systems, with commas, of {_SYSTEMS}.", show_default="all that apply")
]
Seeds = Annotated[str | None, typer.Option(help="Seeds of the runs, with commas.", show_default="1,2,3")]
Proteins = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", help="FASTA files to split and train on.", show_default="the bundled sample"),
]
Labels = Annotated[
    str | None,
    typer.Option(help="TSV of record id and family, to split the input by family.", show_default="by cluster"),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps of a run.", show_default="1000")]
Context = Annotated[int | None, typer.Option(min=4, help="Tokens in one context.", show_default="512")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Contexts in one step.", show_default="4")]
Heads = Annotated[int | None, typer.Option(min=1, help="Heads of the model.", show_default="2")]
Layers = Annotated[int | None, typer.Option(min=1, help="Layers of the model.", show_default="4")]
FeedForward = Annotated[
    int | None, typer.Option("--d-ff", min=1, help="Width inside its feed-forward blocks.", show_default="512")
]
Width = Annotated[int | None, typer.Option("--d", min=1, help="Width of the model.", show_default="128")]
LearningRate = Annotated[
    float | None,
    typer.Option(min=0.0, help="Peak learning rate.", show_default="0.004; family: 0.002; concatenated: 0.001"),
]
ScoreProteins = Annotated[
    int | None, typer.Option(min=1, help="Proteins of each set that are scored.", show_default="500")
]
Recompute = Annotated[
    str | None,
    typer.Option(help="What the backward pass recomputes, with commas: none, layers, reversible, default."),
]
MaxMinutes = Annotated[
    float | None, typer.Option(min=0.01, help="Flag a step that would take longer, and skip it.", show_default="10")
]
Restart = Annotated[bool, typer.Option("--restart", help=_RESTART_HELP)]
Quick = Annotated[bool, typer.Option("--quick", help=_QUICK_HELP)]


def output_folder(name: str) -> Any:
    """The option that says where a benchmark's report goes."""
    return typer.Option("--output", "-o", help=_FOLDER_HELP, show_default=f"benchmark-{name}")


@benchmark.command("cost")
def benchmark_cost(
    system: Systems = None,
    size: Annotated[
        str | None, typer.Option(help="Models, with commas: regular is (8, 6, 2048, 512), small is (1, 6, 64, 64).")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Parts, with commas: layer, model.", show_default="both")] = None,
    length: Annotated[
        str | None, typer.Option(help="Lengths in tokens, with commas.", show_default="1024 to 32768")
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(min=64, help="Weigh models at every power of two up to this length.", show_default="2097152"),
    ] = None,
    cap: Annotated[str | None, typer.Option(help="Memory in GiB, with commas.", show_default="4,8,16")] = None,
    recompute: Recompute = None,
    energy_length: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens in a context of the energy measurement; 0 for none.", show_default="1024"),
    ] = None,
    grams_per_kwh: Annotated[
        float | None,
        typer.Option(min=0.0, help="Carbon intensity of the grid, CO2 equivalent.", show_default="475, the world's"),
    ] = None,
    objective: Annotated[Literal["mlm", "clm"], typer.Option(help="Bidirectional or causal.")] = "mlm",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="bfloat16 is autocast.")] = "float32",
    output: Annotated[str, output_folder("cost")] = "benchmark-cost",
    restart: Restart = False,
    max_minutes: MaxMinutes = None,
    quick: Quick = False,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time, peak memory and energy of a training step against the length, and the longest that fits a given memory.

    Example: performers benchmark cost --size small --system transformer,performer-relu,reformer,identity
    """
    from performers.benchmarks.cost import CostSettings, measure_cost
    from performers.benchmarks.cost_report import tables
    from performers.training.distributed import choose_device

    settings = CostSettings.of_size(
        quick,
        systems=listed(system),
        sizes=listed(size),
        parts=listed(part),
        lengths=numbers("--length", length),
        longest=longest,
        caps=numbers("--cap", cap, float),
        recomputations=listed(recompute, empty=None),
        energy_length=energy_length,
        grams_per_kwh=grams_per_kwh,
        objective=objective,
        dtype=dtype,
        device=str(choose_device(device)),
        threads=threads,
        seed=seed,
        max_minutes=max_minutes,
    )
    print_report(measure_cost(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("concatenated")
def benchmark_concatenated(
    input: Proteins = None,
    labels: Labels = None,
    context: Annotated[int | None, typer.Option(min=64, help="Tokens in one context.", show_default="8192")] = None,
    cap: Annotated[float | None, typer.Option(min=0.01, help="Memory in GiB.", show_default="16")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Heads, layers, d_ff and d of the model, with commas.", show_default="8,6,2048,512"),
    ] = None,
    recompute: Recompute = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Of training, for each; 0 trains nothing.", show_default="60")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Contexts in a step of training.", show_default="1")
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(help="Systems to train beside Performer and its rival; or none.", show_default="transformer"),
    ] = None,
    learning_rate: LearningRate = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the runs, with commas.", show_default="1")] = None,
    output: Annotated[str, output_folder("concatenated")] = "benchmark-concatenated",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Proteins joined to 8,192 tokens: what fits 16 GiB, and Performer against the Transformer that fits, in equal time.

    Example: performers benchmark concatenated --minutes 0
    """
    from performers.benchmarks.concatenated import ConcatenatedSettings, measure_concatenated, tables
    from performers.training.distributed import choose_device

    settings = ConcatenatedSettings.of_size(
        quick,
        sources=input,
        labels=labels,
        context=context,
        cap=cap,
        size=numbers("--size", size),
        recomputations=listed(recompute, empty=None),
        minutes=minutes,
        batch_size=batch_size,
        others=listed(other),
        learning_rate=learning_rate,
        seeds=numbers("--seeds", seeds),
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    print_report(measure_concatenated(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("quality")
def benchmark_quality(
    system: Systems = None,
    objective: Annotated[
        str | None, typer.Option(help="Objectives, with commas: mlm, clm.", show_default="both")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="What is equal, with commas: steps, time.", show_default="both")
    ] = None,
    input: Proteins = None,
    labels: Labels = None,
    steps: Steps = None,
    trial_steps: Annotated[int | None, typer.Option(min=1, help="Steps of a trial.", show_default="200")] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(help="Learning rates that each system tries, with commas.", show_default="0.002,0.004,0.008"),
    ] = None,
    seeds: Seeds = None,
    context: Context = None,
    batch_size: BatchSize = None,
    heads: Heads = None,
    layers: Layers = None,
    d_ff: FeedForward = None,
    d: Width = None,
    score_proteins: ScoreProteins = None,
    output: Annotated[str, output_folder("quality")] = "benchmark-quality",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Accuracy of every system in the same model, at equal steps and equal time, and what it says of the paper's order.

    Example: performers benchmark quality --system transformer,performer-relu,reformer --objective mlm
    """
    from performers.benchmarks.quality import QualitySettings, measure_quality, tables
    from performers.training.distributed import choose_device

    settings = QualitySettings.of_size(
        quick,
        systems=listed(system),
        objectives=listed(objective),
        budgets=listed(budget),
        sources=input,
        labels=labels,
        steps=steps,
        trial_steps=trial_steps,
        learning_rates=numbers("--learning-rate", learning_rate, float),
        seeds=numbers("--seeds", seeds),
        context=context,
        batch_size=batch_size,
        heads=heads,
        layers=layers,
        d_ff=d_ff,
        d=d,
        score_proteins=score_proteins,
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    print_report(measure_quality(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("context")
def benchmark_context(
    model: Annotated[
        str | None, typer.Option(help="A masked model folder, or a run folder.", show_default="one is trained")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What is trained.", show_default="performer-relu")] = None,
    window: Annotated[
        str | None, typer.Option(help="Windows in tokens, with commas.", show_default="512,1024,2048")
    ] = None,
    longer_than: Annotated[
        int | None, typer.Option(min=1, help="Residues; shorter proteins are left out.", show_default="1022")
    ] = None,
    proteins: Annotated[int | None, typer.Option(min=1, help="At most so many are read.", show_default="200")] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", help="FASTA files to read.", show_default="the held-out sets of the bundled sample"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of the training.", show_default="1000")
    ] = None,
    context: Annotated[int | None, typer.Option(min=4, help="Tokens in training.", show_default="4096")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Contexts in one step.", show_default="1")] = None,
    learning_rate: LearningRate = None,
    output: Annotated[str, output_folder("context")] = "benchmark-context",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a model loses when long proteins are cut into windows, and how near the cuts.

    Example: performers benchmark context --model run/model -i proteins.fasta
    """
    from performers.benchmarks.context import ContextSettings, measure_context, tables
    from performers.training.distributed import choose_device

    settings = ContextSettings.of_size(
        quick,
        model=model,
        system=system,
        windows=numbers("--window", window),
        longer_than=longer_than,
        proteins=proteins,
        sources=input,
        steps=steps,
        context=context,
        batch_size=batch_size,
        learning_rate=learning_rate,
        device=str(choose_device(device)),
        threads=threads,
        seed=seed,
    )
    print_report(measure_context(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("redraw")
def benchmark_redraw(
    redraw_every: Annotated[
        str | None,
        typer.Option(help="Steps between redraws, with commas; 0, never, among them.", show_default="0,20,100"),
    ] = None,
    objective: Annotated[Literal["mlm", "clm"], typer.Option(help="Masked or causal.")] = "mlm",
    input: Proteins = None,
    labels: Labels = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    seeds: Seeds = None,
    context: Context = None,
    batch_size: BatchSize = None,
    heads: Heads = None,
    layers: Layers = None,
    d_ff: FeedForward = None,
    d: Width = None,
    score_proteins: ScoreProteins = None,
    output: Annotated[str, output_folder("redraw")] = "benchmark-redraw",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Training softmax Performers with features that are redrawn, and with the first ones kept.

    Example: performers benchmark redraw --redraw-every 0,100 --seeds 1,2,3,4,5
    """
    from performers.benchmarks.redraw import RedrawSettings, measure_redraw, tables
    from performers.training.distributed import choose_device

    settings = RedrawSettings.of_size(
        quick,
        intervals=numbers("--redraw-every", redraw_every),
        objective=objective,
        sources=input,
        labels=labels,
        steps=steps,
        learning_rate=learning_rate,
        seeds=numbers("--seeds", seeds),
        context=context,
        batch_size=batch_size,
        heads=heads,
        layers=layers,
        d_ff=d_ff,
        d=d,
        score_proteins=score_proteins,
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    print_report(measure_redraw(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("recall")
def benchmark_recall(
    system: Systems = None,
    length: Annotated[
        str | None, typer.Option(help="Lengths in tokens, with commas.", show_default="128 to 65536")
    ] = None,
    first_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps at the shortest length, at most.", show_default="800")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps at each longer one, at most; fewer of longer sequences, with as many tokens.",
            show_default="300",
        ),
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in one step.", show_default="4096")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Learning rate.", show_default="0.003")] = None,
    output: Annotated[str, output_folder("recall")] = "benchmark-recall",
    restart: Restart = False,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Flag a step that would take longer, and skip it.", show_default="1")
    ] = None,
    quick: Quick = False,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Associative recall over up to 65,536 tokens, which no model with a local view can solve.

    Example: performers benchmark recall --system transformer,performer-relu,local --length 128,512,4096
    """
    from performers.benchmarks.recall import RecallSettings, measure_recall, tables
    from performers.training.distributed import choose_device

    settings = RecallSettings.of_size(
        quick,
        systems=listed(system),
        lengths=numbers("--length", length),
        first_steps=first_steps,
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        device=str(choose_device(device)),
        threads=threads,
        seed=seed,
        max_minutes=max_minutes,
    )
    print_report(measure_recall(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("finetuning")
def benchmark_finetuning(
    variants: Annotated[
        str | None, typer.Option(help="The scan of avGFP: a table with variant (A108D,N144D), num_mutations and score.")
    ] = None,
    wild_type: Annotated[str | None, typer.Option(help="FASTA with the record avgfp, numbered from 0.")] = None,
    structures: Annotated[
        str | None, typer.Option(help="Lines of identifier, SCOPe family, sequence and DSSP, with tabs (.gz too).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to finetune.", show_default="the bundled one")] = None,
    way: Annotated[
        str | None, typer.Option(help="Ways to finetune, with commas: all, lora, frozen.", show_default="all of them")
    ] = None,
    proteins: Annotated[
        int | None, typer.Option(min=50, help="Proteins of each task, over all sets.", show_default="4000")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps at most.", show_default="1500")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Proteins in one step.", show_default="16")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Learning rate.", show_default="0.0001")] = None,
    output: Annotated[str, output_folder("finetuning")] = "benchmark-finetuning",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Finetuning on the fluorescence of avGFP variants and on secondary structure, beside ridge regressions.

    Example: performers benchmark finetuning --variants avgfp.tsv.gz --wild-type wild-types.fasta --structures scope.tsv.gz
    """
    from performers.benchmarks.finetuning import FinetuningSettings, measure_finetuning, tables
    from performers.training.distributed import choose_device

    settings = FinetuningSettings.of_size(
        quick,
        variants=variants,
        wild_type=wild_type,
        structures=structures,
        model=model,
        ways=listed(way),
        proteins=proteins,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    print_report(measure_finetuning(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("interactions")
def benchmark_interactions(
    input: Annotated[
        list[str] | None, typer.Option("--input", "-i", help="The proteins to learn from: FASTA files, .gz too.")
    ] = None,
    pairs: Annotated[str | None, typer.Option(help="TSV of the pairs to learn from: two identifiers, 1 or 0.")] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(help="A set of test pairs, NAME=FASTA,TSV; the first is also where groups are drawn. Repeatable."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder of a language model.")] = None,
    together: Annotated[Literal["states", "body"], typer.Option(help="As of `performers interact train`.")] = "states",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of training.", show_default="1500")] = None,
    most_proteins: Annotated[
        int | None, typer.Option(min=4, help="Of each table, with the pairs among them.", show_default="all")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Sizes of groups, with commas.", show_default="8,16,32")] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Groups of each size.", show_default="100")] = None,
    decoys: Annotated[int | None, typer.Option(min=1, help="That join a group.", show_default="8")] = None,
    output: Annotated[str, output_folder("interactions")] = "benchmark-interactions",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Which proteins interact: the joint model beside its baselines, on pairs and on groups read in one context.

    Example: performers benchmark interactions -i train.fasta --pairs train.tsv --test human=test.fasta,test.tsv
    """
    from performers.benchmarks.interactions import InteractionBenchmark, measure_interactions, tables
    from performers.training.distributed import choose_device

    settings = InteractionBenchmark.of_size(
        quick,
        proteins=input,
        pairs=pairs,
        tests=test,
        model=model,
        together=together,
        steps=steps,
        most_proteins=most_proteins,
        sizes=numbers("--size", size),
        groups=groups,
        decoys=decoys,
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    print_report(measure_interactions(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("family")
def benchmark_family(
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", help="FASTA files, held-out families among them.", show_default="with --quick none"
        ),
    ] = None,
    clusters: Annotated[str | None, typer.Option(help="TSV of representative and member.")] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="FASTA files: the clusters of these proteins are read.", show_default="clusters drawn by the seed"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A Performer that was trained without these clusters.", show_default="one of each --system is trained"
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What is trained, with commas.", show_default="performer-relu|local,transformer")
    ] = None,
    objective: Annotated[Literal["mlm", "clm"], typer.Option(help="Masked or causal, of what is trained.")] = "mlm",
    families: Annotated[int | None, typer.Option(min=2, help="At most so many are read.", show_default="200")] = None,
    members: Annotated[
        int | None, typer.Option(min=2, help="Of each family; one less is a context.", show_default="8")
    ] = None,
    targets: Annotated[
        int | None, typer.Option(min=0, help="Members that are predicted; 0: the assay alone.", show_default="2")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Residues; others are left out.", show_default="500")
    ] = None,
    assay: Annotated[
        str | None, typer.Option(help="A table of variants with DMS_score, to score with --homologs as the family.")
    ] = None,
    wild_type: Annotated[str | None, typer.Option(help="FASTA of the assay's protein.")] = None,
    homologs: Annotated[
        str | None, typer.Option(help="FASTA of its relatives; the wild type itself is left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of a run.", show_default="3000")] = None,
    learning_rate: LearningRate = None,
    context: Annotated[int | None, typer.Option(min=4, help="Tokens in training.", show_default="4096")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Contexts in one step.", show_default="1")] = None,
    heads: Heads = None,
    layers: Layers = None,
    d_ff: FeedForward = None,
    d: Width = None,
    output: Annotated[str, output_folder("family")] = "benchmark-family",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a family's summed states are worth to a protein: none, its own family and a wrong one, and a profile HMM.

    Example: performers benchmark family -i proteins.fasta.gz --clusters clusters.tsv.gz --held-out bundled:test
    """
    from performers.benchmarks.family import FamilySettings, measure_family, tables
    from performers.training.distributed import choose_device

    settings = FamilySettings.of_size(
        quick,
        sources=input,
        clusters=clusters,
        held_out=held_out,
        model=model,
        systems=listed(system),
        objective=objective,
        families=families,
        members=members,
        targets=targets,
        max_length=max_length,
        assay=assay,
        wild_type=wild_type,
        homologs=homologs,
        steps=steps,
        learning_rate=learning_rate,
        context=context,
        batch_size=batch_size,
        heads=heads,
        layers=layers,
        d_ff=d_ff,
        d=d,
        device=str(choose_device(device)),
        threads=threads,
        seed=seed,
    )
    print_report(measure_family(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("design")
def benchmark_design(
    model: Annotated[
        str | None, typer.Option(help="The causal model: a name or a folder.", show_default="the bundled one")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="A masked model.", show_default="the bundled one")] = None,
    input: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="Held-out natural proteins.", show_default="bundled:test"),
    ] = None,
    proteins: Annotated[int | None, typer.Option(min=2, help="Sequences of each set.", show_default="200")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Residues of each.", show_default="100")] = None,
    families: Annotated[
        int | None, typer.Option(min=0, help="Families whose profiles score designs; 0: none.", show_default="20")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Residues of a member that they go on from.", show_default="30")
    ] = None,
    designs: Annotated[int | None, typer.Option(min=1, help="Designs for each family.", show_default="8")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="TSV of held-out interacting proteins, and a label of which 1 counts.")
    ] = None,
    partners: Annotated[list[str] | None, typer.Option(help="FASTA files of those proteins.")] = None,
    most_pairs: Annotated[
        int | None, typer.Option(min=2, help="Pairs that are read, at most.", show_default="300")
    ] = None,
    longest: Annotated[
        int | None, typer.Option(min=1, help="Residues; longer partners are left out.", show_default="500")
    ] = None,
    label: Annotated[
        bool, typer.Option("--label", help="Write the effect of partners into the model's folder, for generate.")
    ] = False,
    output: Annotated[str, output_folder("design")] = "benchmark-design",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Designs judged by a second model and by family profiles, and whether they heed a partner.

    Example: performers benchmark design --pairs pairs.tsv --partners proteins.fasta --label
    """
    from performers.benchmarks.design import DesignSettings, measure_design, tables
    from performers.training.distributed import choose_device

    settings = DesignSettings.of_size(
        quick,
        model=model,
        judge=judge,
        natural=input,
        proteins=proteins,
        length=length,
        families=families,
        prompt=prompt,
        designs=designs,
        pairs=pairs,
        partners=partners,
        most_pairs=most_pairs,
        longest=longest,
        label=label,
        device=str(choose_device(device)),
        threads=threads,
        seed=seed,
    )
    print_report(measure_design(settings, output, quick=quick, restart=restart), tables, output, as_json)


@benchmark.command("corpus")
def benchmark_corpus(
    residues: Annotated[
        str | None, typer.Option(help="Sizes of corpora, with commas.", show_default="1000000,100000000,1000000000")
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="Processes that build the largest one, with commas.", show_default="1,2")
    ] = None,
    files: Annotated[int | None, typer.Option(min=1, help="FASTA files of a corpus.", show_default="16")] = None,
    contexts: Annotated[int | None, typer.Option(min=1, help="Rows to read.", show_default="20000")] = None,
    records: Annotated[
        str | None,
        typer.Option(
            help="Records to embed with a tiny model, with commas; 'none'.", show_default="10^4, 10^5 and 10^6"
        ),
    ] = None,
    output: Annotated[str, output_folder("corpus")] = "benchmark-corpus",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Building and reading corpora of up to 10^9 residues, and embedding 10^6 records: rates and peak memory.

    Example: performers benchmark corpus --residues 1000000,1000000000 --workers 1,2,4
    """
    from performers.benchmarks.corpus import CorpusSettings, measure_corpus, tables

    settings = CorpusSettings.of_size(
        quick,
        residues=numbers("--residues", residues),
        workers=numbers("--workers", workers),
        files=files,
        contexts=contexts,
        records=numbers("--records", records),
        seed=seed,
        device=device,
    )
    print_report(measure_corpus(settings, output, quick=quick, restart=restart), tables, output, as_json)


def print_report(
    report: dict[str, Any],
    tables: Callable[[dict[str, Any]], list[tuple[str, list[str], list[list[str]]]]],
    output: str,
    as_json: bool,
) -> None:
    """Prints a benchmark's report; cells that failed end the command with status 3."""
    if as_json:
        print(json.dumps(report))
    else:
        print_tables(tables(report))
        print(f"\nThe report and the pictures are in {output}.")
        for note in report["notes"]:
            print(note)
    if report["failed"]:
        raise typer.Exit(3)
