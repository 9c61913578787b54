"""What training on a very large corpus takes: storage, throughput, communication, time and cost, as Markdown tables.

    python scripts/plan_training.py [--residues 1e11] [--preset paper-trembl] [--context 8192] [--gpus 8,16,...]

Sizes of models and messages are computed from the package itself. What cannot be computed is an assumption and an option, and is
printed above the tables: the speed of a GPU and of its links, how much of it a run reaches, and prices. Put in your own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

from performers import PerformerConfig, PerformerForMaskedLM
from performers.attention.parallel import ring_attention_bytes

ASSUMPTIONS = {
    "residues": (1e11, "residues of the corpus, read once"),
    "mean-length": (350, "mean residues of a protein"),
    "header-bytes": (100, "mean bytes of a FASTA header"),
    "compression": (0.55, "bytes of .fasta.gz for a residue with its share of the header"),
    "build-rate": (
        20e6,
        "residues that one process turns into a corpus in a second; measure: performers benchmark corpus",
    ),
    "context": (8192, "tokens of a row"),
    "batch-tokens": (2**21, "tokens of a step, over all GPUs"),
    "peak": (989e12, "operations of a GPU in a second; H100 SXM, bfloat16, dense, by its data sheet"),
    "utilisation": (0.3, "the part of that which a run reaches; measure: performers benchmark training"),
    "inside": (450e9, "bytes in a second and direction between the 8 GPUs of a machine; NVLink 4, by its data sheet"),
    "between": (50e9, "bytes in a second and direction between machines, for each GPU; 400 Gb/s, by its data sheet"),
    "gpu-hour": (2.5, "dollars for a GPU and hour"),
    "gigabyte-month": (0.1, "dollars for a gigabyte of disk and month"),
    "long": (2**20, "tokens of one sequence that is divided over GPUs"),
}
GPUS_OF_A_MACHINE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="paper-trembl", help="size of the model [paper-trembl]")
    parser.add_argument("--gpus", default="8,16,32,64,128,256", help="numbers of GPUs [8,16,32,64,128,256]")
    for name, (default, text) in ASSUMPTIONS.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{text} [{default:g}]")
    given = parser.parse_args()
    gpus = [int(number) for number in given.gpus.split(",")]
    config = PerformerConfig.preset(given.preset)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in PerformerForMaskedLM(config).parameters())

    print("Assumed:\n")
    for name, (_, text) in ASSUMPTIONS.items():
        print(f"- {text}: {getattr(given, name.replace('-', '_')):,g} (`--{name}`)")
    print_storage(given, parameters)
    print_training(given, config, parameters, gpus)
    print_long(given, config, gpus)


def print_storage(given: argparse.Namespace, parameters: int) -> None:
    proteins = given.residues / given.mean_length
    corpus = given.residues + proteins * (2 * 8 + given.header_bytes)
    rows = [
        ("FASTA, compressed", given.residues * given.compression, "read once, then not needed"),
        ("corpus: residues, a byte each", given.residues, "what training reads"),
        ("corpus: offsets and headers", corpus - given.residues, "memory-mapped as well"),
        ("a checkpoint: weights and two moments in float32", 12 * parameters, "the last few are kept"),
    ]
    print(f"\n{proteins:,.0f} proteins; a model of {parameters:,} parameters (`{given.preset}`).\n")
    print_table(
        ["what", "GB", "", "dollars a month"],
        ([what, f"{size / 1e9:,.1f}", why, f"{size / 1e9 * given.gigabyte_month:,.2f}"] for what, size, why in rows),
    )
    print("\nBuilding the corpus:\n")
    print_table(
        ["processes", "hours"],
        ([f"{n}", f"{given.residues / given.build_rate / n / 3600:,.2f}"] for n in (1, 8, 64)),
    )


def print_training(given: argparse.Namespace, config: PerformerConfig, parameters: int, gpus: list[int]) -> None:
    tokens = given.residues + 2 * given.residues / given.mean_length
    width, layers = config.hidden_size, config.num_hidden_layers
    features = num_features(config)
    embedded = config.vocab_size * width
    dense = 6 * (parameters - embedded)
    # Features of queries and keys, the sum over keys, and its reading: 8 operations forward, twice that backward.
    linear = 3 * layers * 8 * width * features
    quadratic = 3 * layers * 4 * width * int(given.context)
    print(
        f"\nOperations for a token: {dense + linear:,} with FAVOR ({linear:,} of them attention), {dense + quadratic:,} with "
        f"exact attention over {int(given.context):,} tokens.\n"
    )
    reached = given.peak * given.utilisation / (dense + linear)
    steps = tokens / given.batch_tokens

    def row(number: int) -> list[str]:
        seconds = given.batch_tokens / number / reached
        sent = 2 * 4 * parameters * (number - 1) / number
        link = given.inside if number <= GPUS_OF_A_MACHINE else given.between
        hours = steps * (seconds + sent / link) / 3600
        return [
            f"{number}",
            f"{given.batch_tokens / number:,.0f}",
            f"{1000 * seconds:,.1f}",
            f"{sent / 1e6:,.0f}",
            f"{1000 * sent / link:,.1f}",
            f"{given.batch_tokens / (seconds + sent / link) / 1e6:,.1f}",
            f"{hours:,.1f}",
            f"{hours * number * given.gpu_hour:,.0f}",
        ]

    print(
        f"One pass over the corpus, {steps:,.0f} steps, data parallel; gradients in float32, sent when all are there:\n"
    )
    header = ["GPUs", "tokens each", "ms computing", "MB sent", "ms sending", "million tokens/s", "hours", "dollars"]
    print_table(header, map(row, gpus))


def print_long(given: argparse.Namespace, config: PerformerConfig, gpus: list[int]) -> None:
    heads, length = config.num_attention_heads, int(given.long)
    width = config.hidden_size // heads
    features = num_features(config)

    def row(number: int) -> list[str]:
        # Forward the largest exponents and the sums, backward the sums; an all-reduce sends twice a tensor, less a share.
        states = 2 * 4 * heads * features * (1 + 2 * (width + 1)) * (number - 1) // number
        ring = ring_attention_bytes(length, heads, width, number, 2)
        link = given.inside if number <= GPUS_OF_A_MACHINE else given.between
        layers = config.num_hidden_layers
        return [
            f"{number}",
            f"{layers * states / 1e6:,.1f}",
            f"{layers * ring / 1e6:,.0f}",
            f"{ring / states:,.0f}",
            f"{1000 * layers * states / link:,.2f}",
            f"{1000 * layers * ring / link:,.1f}",
        ]

    print(
        f"\nOne sequence of {length:,} tokens over all GPUs, masked, {config.num_hidden_layers} layers, forward and backward; "
        "each sends FAVOR's states in float32, or keys and values in bfloat16 in a ring:\n"
    )
    print_table(["GPUs", "MB of states", "MB in a ring", "times as much", "ms states", "ms ring"], map(row, gpus))


def num_features(config: PerformerConfig) -> int:
    return int(config.attention_kwargs.get("num_features", 256))


def print_table(header: list[str], rows: Iterable[list[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
