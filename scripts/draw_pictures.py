"""Draws the pictures of the README and the documentation from what it measures on this machine.

    python scripts/draw_pictures.py             # a minute or two; writes docs/images/cost.png and error.png
    python scripts/draw_pictures.py --quick     # a few seconds, smaller sizes, to see that it works

Every number in a picture is printed as well. Times are those of one thread, the shortest of several runs, taken in turn so that
other work on the machine hits all mechanisms alike, and only their ratio is shown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from performers import FavorFeatures, exact_attention, favor_attention

HEADS, HEAD_DIM, NUM_FEATURES = 8, 64, 256
KERNELS = {"relu": "#1b6ca8", "softmax": "#d1495b"}
PROJECTIONS = {"orthogonal": "o-", "iid": "x--"}
DEVIATIONS = {0.25: "#2e7d4f", 0.5: "#1b6ca8", 1.0: "#d1495b"}


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repetitions")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    if arguments.quick:
        draw_cost(arguments.output / "cost.png", [64, 128, 256], seconds=0.01)
        draw_error(arguments.output / "error.png", [4, 16, 64], length=128, draws=2)
    else:
        draw_cost(arguments.output / "cost.png", [2**n for n in range(7, 14)], seconds=8.0)
        draw_error(arguments.output / "error.png", [2**n for n in range(4, 12)], length=1024, draws=8)


def draw_cost(path: Path, lengths: list[int], seconds: float) -> None:
    """The time of exact attention over that of FAVOR attention, forward and backward, against the length.

    Arguments:
        path: of the PNG.
        lengths: in tokens.
        seconds: how long each length is measured, at least once.
    """
    ratios: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for length in lengths:
        times = shortest_times(length, seconds)
        for kernel in KERNELS:
            ratios[kernel].append(times["exact"] / times[kernel])
        figures = ", ".join(f"{kernel} {ratios[kernel][-1]:.2f}" for kernel in KERNELS)
        print(f"length {length}: time of exact attention / time of FAVOR attention: {figures}", flush=True)

    figure, axes = plt.subplots(figsize=(6.4, 3.2), dpi=120, layout="constrained")
    for kernel, colour in KERNELS.items():
        axes.plot(lengths, ratios[kernel], "o-", color=colour, markersize=4, label=f"{kernel} kernel")
    axes.axhline(1, color="0.5", linewidth=1, linestyle="--")
    axes.annotate("same time", (lengths[0], 1), textcoords="offset points", xytext=(0, 4), color="0.4")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} x")
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("speed-up over exact attention")
    axes.set_title(
        f"One attention layer, forward and backward, float32, one CPU core\n{HEADS} heads of {HEAD_DIM}, {NUM_FEATURES} features",
        fontsize=9,
    )
    axes.legend(frameon=False)
    figure.savefig(path)
    print(f"wrote {path}")


def shortest_times(length: int, seconds: float) -> dict[str, float]:
    """Seconds of a forward and backward pass of each mechanism, the shortest of those taken in turn."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).requires_grad_() for _ in range(3))
    mechanisms: dict[str, Callable[[], Tensor]] = {"exact": lambda: exact_attention(q, k, v)}
    for kernel in KERNELS:
        features = FavorFeatures(HEAD_DIM, NUM_FEATURES, kernel=kernel)
        mechanisms[kernel] = lambda features=features: favor_attention(q, k, v, features)
    if length <= 1024:
        for attend in mechanisms.values():
            attend().sum().backward()  # warms up; long sequences need none
    shortest = dict.fromkeys(mechanisms, float("inf"))
    began = time.perf_counter()
    while True:
        for name, attend in mechanisms.items():
            started = time.perf_counter()
            attend().sum().backward()
            shortest[name] = min(shortest[name], time.perf_counter() - started)
        if time.perf_counter() - began > seconds:
            return shortest


def draw_error(path: Path, features: list[int], length: int, draws: int) -> None:
    """How far FAVOR attention with the softmax kernel is from exact attention, against the number of features.

    Values are unit normal, queries and keys normal with a standard deviation of 0.25, 0.5 or 1. The error is
    |FAVOR - exact| / |exact| over all outputs, its mean over draws of the projection.

    Arguments:
        path: of the PNG.
        features: numbers of features, M.
        length: in tokens.
        draws: how many projections.
    """
    figure, axes = plt.subplots(figsize=(6.4, 3.2), dpi=120, layout="constrained")
    for deviation, colour in DEVIATIONS.items():
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, length, HEAD_DIM, generator=generator) for _ in range(3))
        q, k = q * deviation, k * deviation
        for projection, style in PROJECTIONS.items():
            errors = [mean_error(q, k, v, m, projection, draws) for m in features]
            for m, error in zip(features, errors, strict=True):
                print(f"standard deviation {deviation}, {projection}, {m} features: relative error {error:.3f}")
            label = f"q, k of standard deviation {deviation}" if projection == "orthogonal" else None
            axes.plot(features, errors, style, color=colour, markersize=4, label=label)
    axes.plot([], [], PROJECTIONS["iid"], color="0.4", markersize=4, label="independent rows")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(features, [str(m) for m in features])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("number of random features M")
    axes.set_ylabel("relative error of the output")
    axes.set_title(
        f"Softmax kernel against exact attention\n{length:,} tokens, one head of {HEAD_DIM}, mean of {draws} draws",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    print(f"wrote {path}")


def mean_error(q: Tensor, k: Tensor, v: Tensor, num_features: int, projection: str, draws: int) -> float:
    """The relative error of FAVOR attention, its mean over draws of the projection."""
    exact = exact_attention(q, k, v)
    total = 0.0
    for seed in range(draws):
        features = FavorFeatures(HEAD_DIM, num_features, projection=projection, seed=seed)
        total += float((favor_attention(q, k, v, features) - exact).norm() / exact.norm())
    return total / draws


if __name__ == "__main__":
    main()
