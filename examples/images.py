"""Images as sequences of pixels: a causal Performer draws digits, a bidirectional one reads them.

The 1,797 digits of scikit-learn (UCI, 8 x 8 pixels of 17 greys) become sequences of 64 tokens, row by row. A causal model gets
the wanted digit as its first token and predicts every pixel from those before it, so that it can draw. A bidirectional model sees
all pixels and names the digit. Nothing in either model knows that an image has two dimensions.

The classifier stands beside logistic regression, the draughtsman beside each pixel's own distribution for that digit, and both
beside the same models with exact attention.

    python examples/images.py --output images               # the table in docs/beyond-proteins.md

Needs: pip install scikit-learn (which ships the digits).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from performers import PerformerConfig, PerformerForCausalLM, PerformerForSequenceClassification
from performers.randomness import derive_seed

try:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
except ImportError as error:
    sys.exit(f"{error.name} is needed for this example: pip install scikit-learn")

GREYS, DIGITS, SIDE = 17, 10, 8  # token ids: 0 ... 16 are greys; for the causal model 17 ... 26 are the digits to draw


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    digits = load_digits()
    pixels, labels, test_pixels, test_labels = split(digits.data.astype(np.int64), digits.target, args.seed)
    print(f"{len(pixels):,} images to learn from, {len(test_pixels)} to test on")

    logistic = LogisticRegression(max_iter=2000).fit(pixels / (GREYS - 1), labels)
    accuracy = {"logistic regression": float(logistic.score(test_pixels / (GREYS - 1), test_labels))}
    bits = {
        "each pixel alone": pixel_bits(pixels, 0 * labels, test_pixels, 0 * test_labels),
        "each pixel alone, given the digit": pixel_bits(pixels, labels, test_pixels, test_labels),
    }
    for attention, name in (("favor", "Performer"), ("exact", "the same with exact attention")):
        classifier = make(PerformerForSequenceClassification, attention, args, vocab_size=GREYS, num_labels=DIGITS)
        fit(classifier, torch.from_numpy(pixels), torch.from_numpy(labels), args, f"{attention} classifier")
        accuracy[name] = classification_accuracy(classifier, test_pixels, test_labels)

        artist = make(PerformerForCausalLM, attention, args, vocab_size=GREYS + DIGITS)
        fit(artist, as_tokens(pixels, labels), None, args, f"{attention} artist")
        bits[name] = drawing_bits(artist, as_tokens(test_pixels, test_labels))
        if attention == "favor":
            wanted = np.tile(np.arange(DIGITS), DIGITS)
            drawn = draw(artist, wanted, args.seed)
            save_grid(drawn, args.output / "drawn.png")
            recognised = float(logistic.score(drawn / (GREYS - 1), wanted))
            copied = float((drawn[:, None] == pixels).all(-1).any(1).mean())

    error = {name: (value * (1 - value) / len(test_labels)) ** 0.5 for name, value in accuracy.items()}
    reading = Table("reading: test accuracy", "", "standard error", box=None)
    for name, value in accuracy.items():
        reading.add_row(name, f"{value:.1%}", f"{error[name]:.1%}")
    drawing = Table("drawing: bits per test pixel", "", box=None)
    for name, value in bits.items():
        drawing.add_row(name, f"{value:.3f}")
    console = Console(width=120)
    console.print("\n", reading, "\n", drawing)
    seconds = round(time.monotonic() - started)
    print(f"\nOf {len(drawn)} drawn digits, logistic regression reads {recognised:.0%} as what they were meant to be.")
    print(f"{copied:.0%} copy a training image to the pixel. Done in {seconds} s; they are in {args.output}/drawn.png.")
    figures = {"seconds": seconds, "accuracy": accuracy, "bits per pixel": bits}
    figures |= {"recognised": recognised, "copied": copied}
    (args.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def split(pixels: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Training pixels and labels, then those of the test: a quarter, with as many of each digit."""
    seed = derive_seed(seed, "split") % 2**32
    parts = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=seed)
    return parts[0], parts[2], parts[1], parts[3]


def as_tokens(pixels: np.ndarray, digits: np.ndarray) -> torch.Tensor:
    """The token of the digit, then the pixels: (N, 65)."""
    return torch.from_numpy(np.concatenate([GREYS + digits[:, None], pixels], axis=1))


def make(kind: type, attention: str, args: argparse.Namespace, **vocabulary: int) -> torch.nn.Module:
    """A model of one class with either attention; all else, the initial weights included, is the same."""
    config = PerformerConfig(
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 16,
        intermediate_size=4 * args.width,
        hidden_dropout_prob=0.1,
        attention=attention,
        attention_kwargs={"kernel": "relu", "num_features": 64} if attention == "favor" else {},
        bos_token_id=None, eos_token_id=None, pad_token_id=None, mask_token_id=None,
        **vocabulary,
    )  # fmt: skip
    torch.manual_seed(derive_seed(args.seed, "initial weights"))
    return kind(config)


def fit(
    model: torch.nn.Module, rows: torch.Tensor, labels: torch.Tensor | None, args: argparse.Namespace, name: str
) -> None:
    """Trains on rows of tokens: to name their labels, or, without labels, to predict each token from those before it."""
    batches = -(-len(rows) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.epochs * batches, pct_start=0.1)
    model.train()
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        shuffle = torch.Generator().manual_seed(derive_seed(args.seed, "order", epoch))
        torch.manual_seed(derive_seed(args.seed, "dropout", epoch))
        for picked in torch.randperm(len(rows), generator=shuffle).split(args.batch_size):
            loss = model(rows[picked], labels=(rows if labels is None else labels)[picked]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item() / batches
        if epoch % 10 == 0 or epoch == args.epochs:
            print(f"{name}: epoch {epoch}/{args.epochs}, loss {total:.3f}", flush=True)
    model.eval()


@torch.no_grad()
def classification_accuracy(model: torch.nn.Module, pixels: np.ndarray, labels: np.ndarray) -> float:
    return float((model(torch.from_numpy(pixels)).logits.argmax(-1).numpy() == labels).mean())


@torch.no_grad()
def drawing_bits(model: torch.nn.Module, rows: torch.Tensor) -> float:
    return model(rows, labels=rows).loss.item() / np.log(2)


def pixel_bits(pixels: np.ndarray, classes: np.ndarray, test_pixels: np.ndarray, test_classes: np.ndarray) -> float:
    """Bits per test pixel if each pixel has a distribution of its own for each class (counts, one added)."""
    counts = np.ones((DIGITS, SIDE * SIDE, GREYS))
    np.add.at(counts, (classes[:, None], np.arange(SIDE * SIDE), pixels), 1)
    probability = counts / counts.sum(-1, keepdims=True)
    return float(-np.log2(probability[test_classes[:, None], np.arange(SIDE * SIDE), test_pixels]).mean())


def draw(model: torch.nn.Module, digits: np.ndarray, seed: int) -> np.ndarray:
    """A drawing of each digit, (N, 64), pixel by pixel, with Hugging Face's `generate`."""
    torch.manual_seed(derive_seed(seed, "draw"))
    drawn = model.generate(
        torch.from_numpy(GREYS + digits[:, None]),
        max_new_tokens=SIDE * SIDE,
        do_sample=True,
        top_k=0,
        suppress_tokens=list(range(GREYS, GREYS + DIGITS)),
    )
    return drawn[:, 1:].numpy()


def save_grid(images: np.ndarray, path: Path) -> None:
    """A picture of the drawings, ten in a row, a column for each digit."""
    grid = images.reshape(-1, DIGITS, SIDE, SIDE)
    grid = np.pad(grid, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=GREYS - 1)
    figure = Figure(figsize=(5, 5 * len(grid) / DIGITS))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid.transpose(0, 2, 1, 3).reshape(len(grid) * (SIDE + 2), -1), cmap="gray_r")
    axes.set_axis_off()
    figure.savefig(path, dpi=100)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("images"), help="folder for drawn.png and figures.json"
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=64, help="hidden size, a multiple of 16")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a few epochs of smaller models: shows that it runs, no more"
    )
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.width, args.layers = 6, 32, 1
    return args


if __name__ == "__main__":
    main()
