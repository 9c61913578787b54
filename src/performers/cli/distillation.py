"""`performers distil`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from performers.cli.application import Json, app, options_of, table
from performers.conversion.distillation import DistilConfig
from performers.training.configuration import read_config


@app.command()
@options_of(DistilConfig, "model")
def distil(
    *,
    config: Annotated[
        str | None, typer.Option(help="A YAML file with any of the keys below; options override it.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run that the output folder holds.")] = True,
    resume_from: Annotated[str | None, typer.Option(help="The checkpoint to go on from, e.g. step-00000100.")] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train a converted model to do what the original did; killed at any moment, the same command goes on to the same result.

    Example: performers distil converted -i proteins.fasta -o run --stages layers:300,end:700
    """
    values = {
        **(read_config(config) if config else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    settings = DistilConfig.for_run(values)

    from performers.conversion.distillation import Distillation
    from performers.training.run_folder import read_log, run_task

    result = run_task(Distillation(settings), resume=resume, resume_from=resume_from)
    measured = [entry for entry in read_log(result.output) if "evaluation" in entry]
    if as_json:
        content = {**vars(result), "output": str(result.output), "model": str(result.model), "measured": measured}
        print(json.dumps(content))
        return
    _print(measured)
    print(
        f"The model is in {result.model} (performers.load opens it), the log in {result.output / 'log.jsonl'}, the curves in "
        f"{result.output / 'quality.png'}."
    )


def _print(measured: list[dict[str, Any]]) -> None:
    last = measured[-1]
    if "accuracy" not in last:
        print(f"{last['sequences']:,} sequences held out; the teacher's cosine is 1")
        table(
            ["step", "cosine to the teacher's embeddings", "error of the last hidden states"],
            [[str(e["step"]), f"{e['cosine']:.4f}", f"{e['hidden_error']:.3f}"] for e in measured],
        )
        return
    print(
        f"{last['sequences']:,} sequences held out, {last['tokens']:,} tokens predicted; accuracy of the teacher "
        f"{last['teacher_accuracy']:.4f}, and of the teacher without attention {last['floor_accuracy']:.4f}"
    )
    table(
        ["step", "accuracy", "recovered above the floor (95 % interval)", "divergence (nats)", "cosine of embeddings"],
        [
            [
                str(entry["step"]),
                f"{entry['accuracy']:.4f}",
                _with_interval(entry),
                f"{entry['divergence']:.4f}",
                f"{entry['cosine']:.4f}",
            ]
            for entry in measured
        ],
    )


def _with_interval(entry: dict[str, Any]) -> str:
    if entry["recovered"] is None:
        return "the teacher is not above the floor"
    low, high = entry["recovered_interval"]
    return f"{entry['recovered']:.1%} ({low:.1%} to {high:.1%})"
