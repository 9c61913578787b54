"""The command line: one thin command per verb.

A command turns its options into arguments, calls the function that does the work, and prints. Nothing heavy is imported before
a command runs. `main` turns errors into one line on stderr and the exit status: 0 done, 1 the run failed, 2 bad input,
3 finished but some records failed, 130 and 143 interrupted.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
import yaml

from performers.errors import ConfigError, InputError, PerformersError
from performers.training.configuration import PretrainConfig, read_config

app = typer.Typer(
    name="performers",
    help="Linear-time Transformers for proteins: pretrain, evaluate and use Performer protein language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure time and memory on this machine.")
app.add_typer(benchmark, name="benchmark")

Inputs = Annotated[list[str], typer.Option("--input", "-i", help="FASTA files (.gz too), '-' for stdin, bundled:NAME.")]
Output = Annotated[str, typer.Option("--output", "-o", help="The output folder; new or empty.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout, and nothing else there.")]
Device = Annotated[str, typer.Option(help="auto (cuda, then mps, then cpu), or one by name.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Precision of the forward pass.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads.", show_default="as many as there are cores")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Residues; a longer record is refused, never cut.")]
OnInvalid = Annotated[
    Literal["error", "x", "skip"], typer.Option(help="A character that is no residue: stop, X, or skip.")
]


def main() -> NoReturn:
    """Runs the command line and exits with its status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status = app(standalone_mode=False)
    except PerformersError as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        # What typer says about wrong options; its classes have no public name in all supported versions.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(status or 0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"performers: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        from performers import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback instead of one line when a command fails.")
    ] = False,
) -> None:
    """Options of every command; both are acted on elsewhere."""


def _pretrain_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for every key of `PretrainConfig`, so that the two cannot come apart."""
    parameters = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for key, field in PretrainConfig.model_fields.items():
        flags = [f"--{key.replace('_', '-')}"]
        kind: Any = field.annotation
        if type(None) in get_args(kind):
            kind = next(part for part in get_args(kind) if part is not type(None))
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        if get_origin(kind) is dict:
            kind = list[str]
        if kind is bool:
            flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
        if key in ("input", "output"):
            flags.append(f"-{key[0]}")
        default = field.get_default()
        plain = field.is_required() or default in (None, [], {}, False)
        option = typer.Option(
            *flags,
            help=field.description if plain else f"{field.description} [{default}]",
            metavar="<str>, repeatable" if get_origin(kind) is list else None,
        )
        annotation = Annotated[kind | None, option]
        parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_pretrain_options
def pretrain(
    *,
    config: Annotated[
        str | None, typer.Option(help="A YAML file with any of the keys below; options override it.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run that the output folder holds.")] = True,
    resume_from: Annotated[str | None, typer.Option(help="The checkpoint to go on from, e.g. step-00000100.")] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Pretrain a Performer on proteins; killed at any moment, the same command goes on to the same result.

    Example: performers pretrain -i proteins.fasta.gz -o run --objective mlm --context 8192 --contexts concatenated
    """
    values = {
        **(read_config(config) if config else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    if given["architecture"] is not None:
        values["architecture"] = dict(_key_and_value(text) for text in given["architecture"])
    settings = PretrainConfig.for_run(values)

    from performers.training import pretrain

    result = pretrain(settings, resume=resume, resume_from=resume_from)
    if as_json:
        print(json.dumps({**vars(result), "output": str(result.output), "model": str(result.model)}))
        return
    print(
        f"The model is in {result.model}, the log in {result.output / 'log.jsonl'}, the curve in {result.output / 'loss.png'}."
    )
    print(f"Evaluate it: performers evaluate --model {result.model} -i proteins.fasta")


def _key_and_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--architecture {text!r}: expected KEY=VALUE, as in hidden_size=256.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--architecture {text!r}: expected a value as in YAML, e.g. hidden_size=256.") from None


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="A model folder, or a run folder.")],
    input: Inputs,
    scheme: Annotated[
        Literal["mask", "bert", "published"],
        typer.Option(help="How a masked model is shown the scored residues: all hidden, or 80/10/10, or 10/80/10."),
    ] = "mask",
    mask_proportion: Annotated[
        float, typer.Option(help="Share of the residues that a masked model is scored on.")
    ] = 0.15,
    toks_per_batch: Annotated[int, typer.Option(min=1, help="Tokens in one forward pass.")] = 16_384,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Accuracy and perplexity on proteins, beside the unigram baseline measured on the same residues.

    Example: performers evaluate --model run/model -i bundled:test
    """
    from performers.data import FastaReport, in_memory_corpus, read_fasta

    report = FastaReport()
    proteins = in_memory_corpus(read_fasta(input, max_length=max_length, on_invalid=on_invalid, report=report))
    for remark in report.remarks():
        print(remark, file=sys.stderr)

    from performers.training.evaluation import evaluate_folder

    figures = evaluate_folder(
        model,
        proteins,
        scheme=scheme,
        mask_proportion=mask_proportion,
        seed=seed,
        batch_tokens=toks_per_batch,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    if as_json:
        print(json.dumps({**figures, "inputs": report.to_dict()["inputs"]}))
        return
    how = "next residue" if figures["objective"] == "clm" else f"masked residues, scheme {figures['scheme']}"
    print(
        f"{figures['proteins']:,} proteins, {figures['tokens']:,} residues scored ({how}); 95 % bootstrap intervals over proteins"
    )
    _table(
        ["", "accuracy (more is better)", "perplexity (less is better)"],
        [
            ["model", _with_interval(figures, "accuracy", 4), _with_interval(figures, "perplexity", 3)],
            ["unigram", f"{figures['baseline_accuracy']:.4f}", f"{figures['baseline_perplexity']:.3f}"],
            [
                "model against unigram",
                "+ " + _with_interval(figures, "accuracy_gain", 4),
                "x " + _with_interval(figures, "perplexity_ratio", 4),
            ],
        ],
    )


def _with_interval(figures: dict[str, Any], key: str, digits: int) -> str:
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@app.command()
def split(
    input: Inputs,
    output: Output,
    by: Annotated[
        Literal["random", "identity", "family"],
        typer.Option(help="Split at random, by sequence cluster, or hold out whole families."),
    ] = "identity",
    labels: Annotated[str | None, typer.Option(help="TSV of record id and family, for --by family.")] = None,
    identity: Annotated[float, typer.Option(help="Clusters join sequences of at least this identity.")] = 0.5,
    fractions: Annotated[str, typer.Option(help="Shares of train, validation and test.")] = "0.9,0.05,0.05",
    ood_fraction: Annotated[float, typer.Option(help="Share of the records in held-out families.")] = 0.05,
    nearest: Annotated[bool, typer.Option(help="Report each held-out record's nearest training protein.")] = True,
    gzip: Annotated[bool, typer.Option("--gzip", help="Compress the FASTA files.")] = False,
    max_length: MaxLength = 10_000_000,
    on_invalid: OnInvalid = "error",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Divide proteins into training, validation and test sets that share no sequence, cluster or family.

    Example: performers split -i proteins.fasta -o sets --by family --labels families.tsv
    """
    from performers.data import split_records
    from performers.folders import check_unused
    from performers.training.runs import RunRecord

    try:
        train, validation, test = (float(share) for share in fractions.split(","))
    except ValueError:
        raise InputError(f"fractions={fractions!r}: expected three numbers with commas, as in 0.9,0.05,0.05.") from None
    settings: dict[str, Any] = {"by": by, "labels": labels, "identity": identity, "ood_fraction": ood_fraction}
    check_unused(Path(output))
    arguments = {**settings, "fractions": fractions}
    with RunRecord(Path(output), "split", arguments=arguments, seed=seed, device="cpu", announce=False) as record:
        result = split_records(
            input,
            output,
            **settings,
            fractions=(train, validation, test),
            nearest=nearest,
            compress=gzip,
            seed=seed,
            threads=threads,
            max_length=max_length,
            on_invalid=on_invalid,
        )
        record.inputs(json.loads((result.folder / "split.json").read_text(encoding="utf-8"))["inputs"])
        record.results(counts=result.counts)
    for remark in result.remarks:
        print(remark, file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    _table(
        ["set", "records", "median identity to training", f"share above {identity:.0%}", "file"],
        [
            [
                name,
                f"{count:,}",
                f"{result.median_identity[name]:.1%}" if name in result.median_identity else "",
                f"{result.above_identity[name]:.1%}" if name in result.above_identity else "",
                str(result.files[name]) if name in result.files else "",
            ]
            for name, count in result.counts.items()
        ],
    )


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
    _table(
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
        against=_listed(against),
        lengths=_numbers("--length", length),
        kernels=_listed(kernel),
        directions=_listed(direction),
        dtypes=_listed(dtype),
        backends=_listed(backend),
        batch_size=batch_size,
        heads=heads,
        head_dim=head_dim,
        num_features=num_features,
        positions=_numbers("--position", position),
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
        kernels=_listed(kernel),
        projections=_listed(projection),
        num_features=_numbers("--num-features", num_features),
        length=length,
        head_dim=head_dim,
        draws=draws,
        deviations=_numbers("--deviation", deviation, float),
        device=str(choose_device(device)),
        dtype=dtype,
        threads=threads,
        seed=seed,
    )
    report = measure_approximation(settings, output, notes=notes, restart=restart)
    _print_report(report, lambda report: tables(report, error), output, as_json)


def _listed(text: str | None) -> tuple[str, ...] | None:
    """The names in a list with commas; () for "none"."""
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip() not in ("", "none"))


def _numbers(option: str, text: str | None, kind: Callable[[str], Any] = int) -> tuple[Any, ...] | None:
    try:
        return None if text is None else tuple(kind(part) for part in _listed(text) or ())
    except ValueError:
        raise InputError(f"{option} {text}: expected numbers, with commas.") from None


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
            _table(header, rows)
        print(f"\nThe report and the pictures are in {output}.")
        for note in report["notes"]:
            print(note)
    if report["failed"]:
        raise typer.Exit(3)


def _table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # Into a file or a pipe nothing is folded.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
