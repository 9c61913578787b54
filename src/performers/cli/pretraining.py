"""`performers pretrain`, `evaluate` and `split`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from performers.cli.application import (
    Device,
    Dtype,
    Inputs,
    Json,
    MaxLength,
    OnInvalid,
    Output,
    Seed,
    Threads,
    app,
    options_of,
    table,
)
from performers.errors import ConfigError, InputError
from performers.training.configuration import PretrainConfig, read_config


@app.command()
@options_of(PretrainConfig)
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
    if int(os.environ.get("RANK", "0")):
        return  # under torchrun the first process speaks for all
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
    model: Annotated[
        str | None,
        typer.Option(
            help="A model folder, a run folder, or the name of a bundled model.",
            show_default="performers/protein-masked",
        ),
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            help="FASTA files (.gz too), '-' for stdin, bundled:NAME.",
            show_default="each of bundled:random, bundled:test and bundled:ood",
        ),
    ] = None,
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

    Without any option: the bundled model on proteins held out of its training.

    Example: performers evaluate --model run/model -i bundled:test
    """
    from performers.data import FastaReport, in_memory_corpus, read_fasta

    report, sets = FastaReport(), None
    if input is not None:
        proteins = read_fasta(input, max_length=max_length, on_invalid=on_invalid, report=report)
        sets = {"input": in_memory_corpus(proteins)}
        for remark in report.remarks():
            print(remark, file=sys.stderr)

    from performers.training.evaluation import evaluate_folder, held_out_sets

    result = evaluate_folder(
        model,
        held_out_sets() if sets is None else sets,
        scheme=scheme,
        mask_proportion=mask_proportion,
        seed=seed,
        batch_tokens=toks_per_batch,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    if input is None:
        print(json.dumps(result)) if as_json else _print_held_out(result)
        return
    figures = result.pop("sets")["input"]
    if as_json:
        print(json.dumps({**figures, **result, "inputs": report.to_dict()["inputs"]}))
        return
    print(
        f"{figures['proteins']:,} proteins, {figures['tokens']:,} residues scored ({_how(figures)}); 95 % bootstrap intervals "
        "over proteins"
    )
    table(
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


def _print_held_out(result: dict[str, Any]) -> None:
    """The rows of the held-out sets, from easy to hard."""
    first = next(iter(result["sets"].values()))
    print(f"{result['model']}: {_how(first)}; 95 % bootstrap intervals over proteins")
    table(
        ["held out", "proteins", "residues", "accuracy", "unigram", "perplexity", "unigram"],
        [
            [
                {"random": "random proteins", "test": "whole clusters", "ood": "whole families"}[name],
                f"{figures['proteins']:,}",
                f"{figures['tokens']:,}",
                _with_interval(figures, "accuracy", 4),
                f"{figures['baseline_accuracy']:.4f}",
                _with_interval(figures, "perplexity", 3),
                f"{figures['baseline_perplexity']:.3f}",
            ]
            for name, figures in result["sets"].items()
        ],
    )


def _how(figures: dict[str, Any]) -> str:
    return "next residue" if figures["objective"] == "clm" else f"masked residues, scheme {figures['scheme']}"


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
    table(
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
