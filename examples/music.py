"""Music as raw audio, as in Jukebox (2005.00341) but small: a causal Performer over 8-bit samples, told which track it plays.

Sound at 8,000 samples a second becomes 256 levels by the mu-law of telephony, and a sequence of 16,384 of them (two seconds)
after one token that names the track. Exact attention would compare 134 million pairs of samples a head and layer; FAVOR reads
the sequence once. When a model plays, all that it remembers is a state of fixed size, so a sample costs the same after a second
as after an hour.

Two models learn: one of FAVOR alone, and one in which every other layer is local and sees the last samples exactly. Of ten
stretches of a track one is held out. Bits per sample on these stand beside those of predictors that count or fit: levels
(unigram), pairs and triples of levels (Markov), and linear prediction from 32 samples, each of them made for each track.

    python examples/music.py --output music                 # the four tracks of the table in docs/beyond-proteins.md
    python examples/music.py --recordings ~/ogg --tracks solo duet --output music

Needs: pip install soundfile scipy. Without --recordings it fetches Debian's music of The Battle for Wesnoth (GPL-2+,
153 MB) with `apt-get download`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from performers import PerformerConfig, PerformerForCausalLM
from performers.models import PerformerCache
from performers.randomness import derive_seed

try:
    import soundfile
    from scipy.signal import resample_poly
except ImportError as error:
    sys.exit(f"{error.name} is needed for this example: pip install soundfile scipy")

RATE = 8000  # samples a second
LEVELS = 256  # token ids: 0 ... 255 are levels of the sound, the ids after them are tracks
MU = LEVELS - 1
TAPS = 32  # samples that linear prediction looks back
WIDTH, LAYERS, LEARNING_RATE = 128, 4, 3e-3
MODELS = {  # the attention of every layer; a local layer sees the last 64 samples exactly, and nothing before
    "Performer": ["favor"] * LAYERS,
    "Performer, every other layer local": ["local", "favor"] * (LAYERS // 2),
}


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    recordings = args.recordings or fetch_recordings(args.output / "recordings", args.package)
    tracks = [read_track(recordings, name) for name in args.tracks]
    training, held_out = zip(*(split(track, args.context) for track in tracks), strict=True)
    print(f"{sum(map(len, tracks)):,} samples in the tracks {', '.join(args.tracks)}")

    figures = baselines([np.concatenate(pieces) for pieces in training], held_out)
    models = {name: train(name, attention, training, args) for name, attention in MODELS.items()}
    for name, model in models.items():
        figures[name] = [bits(model, rows, i) for i, rows in enumerate(held_out)]
    best = min(models, key=lambda name: np.mean(figures[name]))
    wrong = [bits(models[best], rows, (i + 1) % len(tracks)) for i, rows in enumerate(held_out)]
    figures["the better one, told the wrong track"] = wrong
    openings = np.stack([rows[0, -min(RATE, args.context) :] for rows in held_out])
    for name, sound in zip(args.tracks, play(models[best], openings, args), strict=True):
        soundfile.write(args.output / f"{name}.wav", expand(sound), RATE)

    table = Table("bits per sample", *args.tracks, "mean", box=None)
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.3f}" for value in [*row, np.mean(row)]))
    Console(width=120).print("\nOn stretches of each track that nothing learned from:\n", table)
    seconds = round(time.monotonic() - started)
    content = {"seconds": seconds, "tracks": args.tracks, "bits per sample": figures}
    (args.output / "figures.json").write_text(json.dumps(content, indent=1) + "\n")
    print(
        f"\nDone in {seconds} s. Each WAV in {args.output} is a second of held-out music, then what the better model plays."
    )


def fetch_recordings(folder: Path, package: str) -> Path:
    """The ogg files of a Debian package, unpacked into `folder` (once)."""
    if not any(folder.glob("**/*.ogg")):
        print(f"Fetching {package} from Debian ...")
        try:
            with tempfile.TemporaryDirectory() as download:
                subprocess.run(["apt-get", "-qq", "download", package], cwd=download, check=True)
                archive = next(Path(download).glob("*.deb"))
                subprocess.run(["dpkg-deb", "--extract", str(archive), str(folder.absolute())], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"{package} could not be fetched ({error}). Give a folder of recordings with --recordings.")
    return folder


def read_track(folder: Path, name: str) -> np.ndarray:
    """One recording as mu-law levels, (samples,), at `RATE` samples a second, mixed to one channel and scaled to its peak."""
    paths = {path.stem: path for path in folder.rglob("*.*") if path.suffix in (".ogg", ".wav", ".flac", ".mp3")}
    if name not in paths:
        sys.exit(f"{folder} has no recording {name!r}; it has: {', '.join(sorted(paths)) or 'none'}.")
    sound, original = soundfile.read(paths[name], dtype="float32", always_2d=True)
    sound = resample_poly(sound.mean(axis=1), RATE, original)
    sound = sound / max(np.abs(sound).max(), 1e-9)
    return np.round((np.sign(sound) * np.log1p(MU * np.abs(sound)) / np.log1p(MU) + 1) / 2 * MU).astype(np.int64)


def expand(levels: np.ndarray) -> np.ndarray:
    """Mu-law levels as sound between -1 and 1: the inverse of what `read_track` does."""
    companded = levels / MU * 2 - 1
    return np.sign(companded) * np.expm1(np.abs(companded) * np.log1p(MU)) / MU


def split(track: np.ndarray, length: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The pieces of a track to learn from, and between them one stretch in ten, of `length` samples: (N, length)."""
    whole = len(track) // length
    held_out = [i * length for i in range(4, whole, 10)]
    if not held_out:
        sys.exit(f"A track has {len(track):,} samples: expected at least five contexts of {length:,}.")
    pieces = np.split(track[: whole * length], [edge for start in held_out for edge in (start, start + length)])
    return [piece for piece in pieces[::2] if len(piece)], np.stack(pieces[1::2])


def as_tokens(samples: np.ndarray, track: int) -> torch.Tensor:
    """The token of the track, then the samples: (rows, 1 + L)."""
    return torch.from_numpy(np.pad(samples, ((0, 0), (1, 0)), constant_values=LEVELS + track))


def train(
    name: str, attention: list[str], training: list[np.ndarray], args: argparse.Namespace
) -> PerformerForCausalLM:
    """A model that has learnt from a random window of the pieces at each step."""
    kwargs = {"favor": {"kernel": "relu", "num_features": 64}, "local": {"window": 64}}
    config = PerformerConfig(
        vocab_size=LEVELS + len(training),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 32,
        intermediate_size=2 * WIDTH,
        attention=attention,
        attention_kwargs=kwargs if "local" in attention else kwargs["favor"],
        bos_token_id=None, eos_token_id=None, pad_token_id=None, mask_token_id=None,
    )  # fmt: skip
    torch.manual_seed(derive_seed(args.seed, "initial weights"))
    model = PerformerForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, args.steps, pct_start=0.1)
    pieces = [(i, piece) for i, track in enumerate(training) for piece in track]
    share = np.array([len(piece) - args.context + 1 for _, piece in pieces])
    draw = np.random.Generator(np.random.Philox(derive_seed(args.seed, "windows")))
    recent = []
    for step in range(1, args.steps + 1):
        track, piece = pieces[draw.choice(len(pieces), p=share / share.sum())]
        start = draw.integers(len(piece) - args.context + 1)
        tokens = as_tokens(piece[None, start : start + args.context], track)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(loss.item() / np.log(2))
        if step % 50 == 0 or step == args.steps:
            print(f"{name}: step {step}/{args.steps}, {np.mean(recent[-50:]):.3f} bits per sample", flush=True)
    return model.eval()


@torch.no_grad()
def bits(model: PerformerForCausalLM, samples: np.ndarray, track: int) -> float:
    """Bits per sample that the model needs for windows (N, L), told that they are from this track."""
    rows = as_tokens(samples, track).split(1)
    return float(np.mean([model(row, labels=row).loss.item() for row in rows]) / np.log(2))


@torch.no_grad()
def play(model: PerformerForCausalLM, openings: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """The opening of each track (N, L) and what the model plays after it, side by side, a sample of each at a time."""
    generator = torch.Generator().manual_seed(derive_seed(args.seed, "play"))
    cache = PerformerCache(LAYERS)  # the state: of one size, however long the music
    tokens = torch.cat([as_tokens(opening[None], i) for i, opening in enumerate(openings)])
    played = [tokens[:, 1:]]
    for _ in range(round(args.seconds * RATE)):
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1, :LEVELS]
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        played.append(tokens)
    return torch.cat(played, dim=1).numpy()


def baselines(training: Sequence[np.ndarray], held_out: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Bits per sample of what needs no network, for each track from its own training part."""
    linear = f"linear prediction, {TAPS} samples"
    rows: dict[str, list[float]] = {
        "levels alone (unigram)": [],
        "Markov, order 1": [],
        "Markov, order 2": [],
        linear: [],
    }
    for learned, test in zip(training, held_out, strict=True):
        probability: float | np.ndarray = 1 / LEVELS
        context, test_context = np.zeros_like(learned), np.zeros_like(test)
        for order, name in enumerate(list(rows)[:3]):  # each order falls back on the one before (Witten and Bell, 1991)
            if order:
                context = context * LEVELS + np.roll(learned, order)
                test_context = test_context * LEVELS + np.roll(test, order, axis=-1)
            counts = np.bincount(context * LEVELS + learned, minlength=LEVELS ** (order + 1)).reshape(-1, LEVELS)
            total, distinct = counts.sum(1)[test_context], (counts > 0).sum(1)[test_context]
            seen = counts[test_context, test]
            probability = np.where(
                total > 0, (seen + distinct * probability) / np.maximum(total + distinct, 1), probability
            )
            rows[name].append(float(-np.log2(probability[:, 2:]).mean()))
        rows[linear].append(linear_prediction(learned, test))
    return rows


def linear_prediction(learned: np.ndarray, test: np.ndarray) -> float:
    """Bits per sample of the errors of a least-squares prediction of each level from those before it."""
    view = np.lib.stride_tricks.sliding_window_view
    past, weights = view(learned - MU / 2, TAPS)[:-1], np.zeros(TAPS)
    weights = np.linalg.solve(past.T @ past + np.eye(TAPS), past.T @ (learned[TAPS:] - MU / 2))

    def errors(rows: np.ndarray) -> np.ndarray:
        predicted = np.clip(view(rows - MU / 2, TAPS, axis=-1)[..., :-1, :] @ weights + MU / 2, 0, MU)
        return rows[..., TAPS:] - np.round(predicted).astype(np.int64) + MU

    counts = np.bincount(errors(learned), minlength=2 * MU + 1) + 1
    return float(-np.log2(counts[errors(test)] / counts.sum()).mean())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("music"), help="folder for the WAVs and figures.json")
    parser.add_argument("--recordings", type=Path, help="folder of ogg, wav, flac or mp3 files")
    parser.add_argument("--package", default="wesnoth-1.16-music", help="Debian package to fetch without --recordings")
    parser.add_argument("--tracks", nargs="+", default=["love_theme", "loyalists", "frantic-old", "underground"])
    parser.add_argument("--seconds", type=float, default=2, help="of music to play for each track")
    parser.add_argument("--context", type=int, default=16_384, help="samples of a training sequence")
    parser.add_argument("--steps", type=int, default=200, help="of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of short contexts: shows that it runs, no more"
    )
    args = parser.parse_args()
    if args.quick:
        args.context, args.steps, args.seconds = 2048, 12, 0.1
    return args


if __name__ == "__main__":
    main()
