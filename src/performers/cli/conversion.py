"""`performers convert`, `calibrate` and `benchmark conversion`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from performers.cli.application import Device, Json, Output, Seed, Threads, app, listed, numbers, print_tables, table
from performers.cli.benchmarks import Quick, Restart, benchmark, output_folder, print_report
from performers.errors import InputError
from performers.folders import check_unused, sealed_folder, write_file

_Model = Annotated[str, typer.Argument(metavar="PATH", help="Folder of a Hugging Face model.")]
_Architecture = Annotated[
    str | None,
    typer.Option(help="Class that opens the model.", show_default="the one in its config.json"),
]
_Layers = Annotated[
    str,
    typer.Option(
        help="Numbers with commas, -1 for the last; or auto:0.05 for as many as keep the error of the last hidden states "
        "under 0.05."
    ),
]
_Sequences = Annotated[int, typer.Option(min=1, help="How many sequences to read, from the first.")]
_InputHelp = "FASTA, or text with a sequence in every line (.gz too)."


@app.command()
def convert(
    path: _Model,
    output: Output,
    attention: Annotated[
        Literal["favor", "reformer", "sparse", "local", "exact"],
        typer.Option(help="Mechanism; exact puts the model's own back."),
    ] = "favor",
    kernel: Annotated[
        str | None, typer.Option(help="Kernel of favor.", show_default="softmax; softmax-prototypes with --input")
    ] = None,
    num_features: Annotated[
        int | None, typer.Option(min=1, help="Random features of favor.", show_default="256")
    ] = None,
    layers: _Layers = "all",
    input: Annotated[
        list[str] | None, typer.Option("--input", "-i", help=f"To fit and measure with: {_InputHelp}")
    ] = None,
    sequences: _Sequences = 16,
    architecture: _Architecture = None,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Replace the attention of a pretrained model by a linear one, or put its own back; nothing is trained.

    Example: performers convert esm2 -o esm2-linear -i proteins.fasta --layers auto:0.05
    """
    if attention != "favor" and (kernel is not None or num_features is not None):
        raise InputError(f"--kernel and --num-features are of favor, not of {attention}.")
    if attention == "exact" and (input or layers != "all"):
        raise InputError(
            "--attention exact puts the model's own attention back in all layers: expected no --input, no --layers."
        )
    arguments: dict[str, Any] = {"kernel": kernel or ("softmax-prototypes" if input else "softmax")}
    arguments["num_features"] = num_features or 256
    chosen = _layer_numbers(layers)

    def work(model: Any, texts: list[str] | None, _: Path) -> dict[str, Any]:
        from performers.conversion import convert
        from performers.conversion.specification import Specification

        convert(
            model,
            attention,
            layers=chosen,
            sequences=texts,
            seed=seed,
            **(arguments if attention == "favor" else {}),
        )
        specification = Specification.stored_in(model.config)  # None if it is exact again
        return {
            "output": output,
            "model": type(model).__name__,
            "attention": attention,
            "arguments": {} if specification is None else specification.arguments,
            "layers": None if specification is None else specification.layers,
            "measured": None if specification is None else specification.measured,
        }

    settings = {"attention": attention, **arguments, "layers": layers, "sequences": sequences}
    figures = _converted("convert", path, output, input, sequences, architecture, device, threads, seed, settings, work)
    if as_json:
        print(json.dumps(figures))
        return
    layers_done = "all layers" if figures["layers"] is None else f"layers {figures['layers']}"
    print(f"{output}: {figures['model']} with {attention} attention in {layers_done}.")
    if figures["measured"] is not None:
        alone = figures["measured"]["alone"]
        print(f"Error of the last hidden states {figures['measured']['error']:.3g}; each layer converted alone:")
        done = range(len(alone)) if figures["layers"] is None else figures["layers"]
        rows = [[str(i), f"{error:.3g}", "yes" if i in done else "no"] for i, error in enumerate(alone)]
        table(["layer", "error", "converted"], rows)
    print(f"Open it with performers.load({output!r}).")


@app.command()
def calibrate(
    path: _Model,
    input: Annotated[list[str], typer.Option("--input", "-i", help=_InputHelp)],
    output: Output,
    kernel: Annotated[
        str | None,
        typer.Option(help="Kernels to choose from, with commas.", show_default="all positive estimates of softmax"),
    ] = None,
    num_features: Annotated[int, typer.Option(min=2, help="Features per layer, on average over the layers.")] = 256,
    choices: Annotated[
        str | None,
        typer.Option(
            help="Numbers of features to choose from, with commas.", show_default="from a quarter to four times that"
        ),
    ] = None,
    layers: _Layers = "all",
    length: Annotated[
        str | None, typer.Option(help="Tokens at which to measure time and memory before and after, with commas.")
    ] = None,
    sequences: _Sequences = 16,
    architecture: _Architecture = None,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Convert a model to FAVOR with the kernels and features that fit some sequences best, and report what it costs.

    Example: performers calibrate esm2 -i proteins.fasta -o esm2-linear --length 1024,4096,16384
    """
    settings: dict[str, Any] = {
        "kernels": listed(kernel),
        "num_features": num_features,
        "choices": numbers("--choices", choices),
        "layers": _layer_numbers(layers),
        "lengths": numbers("--length", length) or (),
    }

    def work(model: Any, texts: list[str] | None, folder: Path) -> dict[str, Any]:
        from performers.conversion.calibration import calibrate, draw

        found = calibrate(model, texts or [], seed=seed, note=_note, **settings)
        write_file(folder / "calibration.json", json.dumps(found.report, indent=1) + "\n")
        draw(found.report, folder / "calibration.png")
        return found.report

    report = _converted(
        "calibrate", path, output, input, sequences, architecture, device, threads, seed, settings, work
    )
    if as_json:
        print(json.dumps(report))
        return
    from performers.conversion.calibration import summary, tables

    print_tables(tables(report))
    print()
    for sentence in summary(report):
        print(sentence)
    print(
        f"{output}: the converted model, calibration.json and calibration.png. Open it with performers.load({output!r})."
    )


@benchmark.command("conversion")
def benchmark_conversion(
    model: Annotated[
        str | None, typer.Option(help="Of antiberty, minilm, esm2, with commas.", show_default="all")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="Of quality (by kernel and features), layers (auto), speed, distillation, with commas.",
            show_default="all",
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            help="Kernels, with commas; the last one is timed and distilled.",
            show_default="all positive estimates of softmax",
        ),
    ] = None,
    num_features: Annotated[str | None, typer.Option(help="Features, with commas.", show_default="64,256,1024")] = None,
    chosen_features: Annotated[
        int | None, typer.Option(min=2, help="Features of what is timed and distilled.", show_default="256")
    ] = None,
    bound: Annotated[
        float | None, typer.Option(min=1e-6, help="Error that automatic layers keep.", show_default="0.05")
    ] = None,
    antibodies: Annotated[
        str | None,
        typer.Option(help="FASTA of antibody variable domains, or a .tsv of SCOPe domains (id, class, sequence)."),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(help="English for minilm, a text in every line.", show_default="Python's reference manual"),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(help="Tokens at which esm2 is timed, with commas; or none.", show_default="1024 to 16384"),
    ] = None,
    fit_to: Annotated[
        int | None, typer.Option(min=2, help="Sequences that kernels are fitted to.", show_default="64")
    ] = None,
    judge_on: Annotated[
        int | None, typer.Option(min=2, help="Other sequences that everything is judged on.", show_default="48")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of distillation.", show_default="1000")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences in a step.", show_default="16")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between the points of a curve.", show_default="125")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate end to end.", show_default="that of performers distil")
    ] = None,
    layers_learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate layer by layer.", show_default="that of performers distil")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision of distillation; bfloat16 is autocast.")
    ] = "float32",
    floor_window: Annotated[
        int | None,
        typer.Option(
            min=1, help="Window of the student without global attention, 1 for a token alone.", show_default="1"
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Folder for the downloads.", show_default="performers in the user's cache")
    ] = None,
    output: Annotated[str, output_folder("conversion")] = "benchmark-conversion",
    restart: Restart = False,
    quick: Quick = False,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Published models converted: quality by kernel and features, speed, and what distillation wins back, against steps.

    Example: performers benchmark conversion --antibodies scope-domains.tsv.gz --model antiberty,minilm
    """
    from performers.benchmarks.conversion import measure_conversion
    from performers.benchmarks.conversion_report import tables
    from performers.benchmarks.conversion_settings import ConversionSettings
    from performers.training.distributed import choose_device

    settings = ConversionSettings.of_size(
        quick,
        models=listed(model),
        parts=listed(part),
        kernels=listed(kernel),
        num_features=numbers("--num-features", num_features),
        chosen_features=chosen_features,
        bound=bound,
        antibodies=antibodies,
        texts=texts,
        lengths=numbers("--length", length),
        fit_to=fit_to,
        judge_on=judge_on,
        steps=steps,
        batch_size=batch_size,
        evaluate_every=evaluate_every,
        learning_rate=learning_rate,
        layers_learning_rate=layers_learning_rate,
        dtype=dtype,
        floor_window=floor_window,
        cache=cache,
        device=str(choose_device(device)),
        threads=threads,
        seed=seed,
    )
    print_report(measure_conversion(settings, output, quick=quick, restart=restart), tables, output, as_json)


def _converted(
    command: str,
    path: str,
    output: str,
    input: list[str] | None,
    limit: int,
    architecture: str | None,
    device: str,
    threads: int | None,
    seed: int,
    settings: dict[str, Any],
    work: Callable[[Any, list[str] | None, Path], dict[str, Any]],
) -> dict[str, Any]:
    """Opens a model, has it converted, and writes it with what belongs to it, its tokenizer for instance, and a record."""
    check_unused(Path(output))
    from performers.conversion.sequences import read_sequences
    from performers.training.distributed import choose_device, use_threads
    from performers.training.runs import RunRecord, describe_file

    texts = None
    if input:
        texts, more = read_sequences(input, limit)
        if more:
            _note(f"the first {limit} sequences are used (--sequences)")
    chosen = choose_device(device)

    from transformers.utils import logging

    from performers.conversion.saving import copy_companions
    from performers.conversion.wiring import open_model

    logging.disable_progress_bar()
    files = [describe_file(source) for source in input or () if Path(source).is_file()]
    arguments = {"path": path, "input": input, "architecture": architecture, **settings}
    with (
        RunRecord(
            Path(output), command, arguments=arguments, seed=seed, device=str(chosen), inputs=files, announce=False
        ) as record,
        use_threads(threads),
    ):
        model: Any = open_model(path, architecture)
        model.to(chosen)
        needed = sum(tensor.nbytes for tensor in model.state_dict().values())
        with sealed_folder(Path(output), needed=needed) as folder:
            figures = work(model, texts, folder)
            model.save_pretrained(folder)
            copy_companions(Path(path), folder)
        for weights in sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("*.bin")):
            record.weights(weights)
        record.results(**{key: value for key, value in figures.items() if key != "layers"})
    return figures


def _layer_numbers(layers: str) -> Any:
    return None if layers == "all" else layers if layers.startswith("auto") else list(numbers("--layers", layers) or ())


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
