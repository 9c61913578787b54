"""Recall over long distances: a synthetic task that no model with a local view can solve, up to 65,536 tokens.

The first quarter of a sequence holds pairs of a key and a value, each pair one token, scattered among tokens of noise. The last
quarter asks for keys, and the answer to each is the value that it was paired with in this sequence (associative recall,
1610.06258). Nothing between the two helps: a model finds the answer only if it sees back half of the sequence, and then it takes
one look. Chance is one in the number of values.

Every system starts at the shortest length, and goes on at each longer one from the weights that it reached. At each length it is
trained until it answers nearly always, or has had its share of steps, and is tested on sequences that it has not seen. A local
window is in the table as the control: it learns the task where the whole sequence is in sight, and has to be at chance beyond.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from performers.benchmarks.experiment import (
    DONE,
    SKIPPED,
    Cell,
    CellLog,
    Experiment,
    Figures,
    extrapolated,
    short_length,
)
from performers.benchmarks.systems import SYSTEMS, architecture, check_systems
from performers.errors import InputError

SOLVED, AT_CHANCE, PARTLY = "solved", "at chance", "partly"
NOISE, KEYS, VALUES = 8, 8, 8
CHANCE = 1 / VALUES
_FIRST_KEY = NOISE
_FIRST_VALUE = NOISE + KEYS
_FIRST_PAIR = _FIRST_VALUE + VALUES
VOCABULARY = _FIRST_PAIR + KEYS * VALUES


@dataclass(frozen=True)
class RecallSettings:
    """What `measure_recall` measures.

    Attributes:
        systems: names in `SYSTEMS`.
        lengths: L, in tokens, taken by rising length.
        heads, layers, d_ff, d: the size of the model.
        batch_tokens: of a step; longer sequences make smaller batches, and one that is longer than this is a batch of its own.
        first_steps: at most, at the shortest length.
        steps: at most, at each longer one; where a step has more tokens than `batch_tokens`, fewer steps with as many tokens in
            all, but at least ten (or `steps`).
        questions: in a sequence.
        tests: sequences that are answered to score a length.
        learning_rate: of AdamW.
        device, threads, seed: of everything.
        max_minutes: a length whose step would take longer is flagged, not run.
    """

    systems: Sequence[str] = (
        "transformer",
        "performer-relu",
        "performer-softmax",
        "reformer",
        "sparse",
        "performer-relu|local",
        "local",
    )
    lengths: Sequence[int] = (128, 256, 512, 1024, 4096, 16_384, 65_536)
    heads: int = 2
    layers: int = 2
    d_ff: int = 128
    d: int = 64
    batch_tokens: int = 4096
    first_steps: int = 800
    steps: int = 300
    questions: int = 32
    tests: int = 16
    learning_rate: float = 3e-3
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    max_minutes: float = 1.0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> RecallSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: a name or a number that is not in order.
        """
        defaults: dict[str, Any] = {}
        if quick:
            defaults = {
                "systems": ("transformer", "performer-relu", "local"),
                "lengths": (1024, 2048),
                "first_steps": 20,
            }
            defaults |= {"steps": 5, "batch_tokens": 2048, "tests": 4}
        settings = cls(**defaults | {key: value for key, value in given.items() if value is not None})
        check_systems(settings.systems)
        shortest = 4 * max(KEYS, settings.questions)
        if not settings.lengths or min(settings.lengths) < shortest:
            raise InputError(f"--length {min(settings.lengths, default='')}: expected at least {shortest} tokens.")
        return settings


class Sequences(NamedTuple):
    """A batch of the task.

    Attributes:
        tokens: (B, L).
        labels: (B, L), the value's token where a key is asked for, -100 elsewhere.
    """

    tokens: Any
    labels: Any


def sequences(number: int, length: int, questions: int, seed: int) -> Sequences:
    """Sequences of the task, a pure function of the arguments.

    Arguments:
        number: B.
        length: L, at least four times the questions and the keys.
        questions: asked in the last quarter of each.
        seed: of everything in them.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    quarter = length // 4
    tokens = torch.randint(NOISE, (number, length), generator=generator)
    values = torch.randint(VALUES, (number, KEYS), generator=generator)
    pairs = torch.stack([torch.randperm(quarter, generator=generator)[:KEYS] for _ in range(number)])
    asked = torch.randint(KEYS, (number, questions), generator=generator)
    places = torch.stack([torch.randperm(quarter, generator=generator)[:questions] for _ in range(number)])
    places += length - quarter
    tokens.scatter_(1, pairs, _FIRST_PAIR + torch.arange(KEYS) * VALUES + values)
    tokens.scatter_(1, places, _FIRST_KEY + asked)
    labels = torch.full_like(tokens, -100).scatter_(1, places, _FIRST_VALUE + values.gather(1, asked))
    return Sequences(tokens, labels)


def measure_recall(
    settings: RecallSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Trains and tests whatever the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `recall.json`, the picture, `run.json`, the weights of every length and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: train again what the folder holds.

    Returns:
        The report: for every system and length the accuracy with its 95 % interval, what it says, steps and seconds.

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    with Experiment("recall", asdict(settings), output, quick=quick, restart=restart) as experiment:
        keys = ("heads", "layers", "d_ff", "d", "batch_tokens", "first_steps", "steps", "questions", "tests")
        common = {key: getattr(settings, key) for key in (*keys, "learning_rate", "device", "threads", "seed")}
        lengths = sorted(set(settings.lengths))
        cells: list[Cell] = [
            {"system": system, "length": length, "after": lengths[: lengths.index(length)], **common}
            for system in settings.systems
            for length in lengths
        ]
        experiment.measure(
            cells,
            lambda cell, before: _measure(cell, before, experiment.log, settings.max_minutes),
            name=lambda cell: f"{SYSTEMS[cell['system']].title}, L {cell['length']:,}",
            result=lambda figures: (
                f"accuracy {figures['accuracy']:.3f} ({figures['verdict']}) after {figures['steps_taken']} steps"
            ),
            weight=lambda cell: _most(cell) * _batch(cell) * cell["length"],  # tokens
        )
        return experiment.report(draw)


def _measure(cell: Cell, before: list[Figures], log: CellLog, max_minutes: float) -> Figures:
    shorter = [result for result in before if result["system"] == cell["system"]]
    if shorter and shorter[-1]["status"] != DONE:
        return {"status": SKIPPED, "reason": shorter[-1]["reason"]}
    power = 2.0 if cell["system"] == "transformer" else 1.0
    if shorter:
        points = [(result["length"], result["seconds_per_sequence"]) for result in shorter]
        minutes = extrapolated(points, cell["length"], unknown=power) * _batch(cell) / 60
        if minutes > max_minutes:
            return {"status": SKIPPED, "reason": f"a step would take about {minutes:,.0f} minutes"}
    weights = log.folder / shorter[-1]["weights"] if shorter else None
    return learn(cell, weights, log.folder_of(cell), log.folder)


def _batch(cell: Cell) -> int:
    return max(1, cell["batch_tokens"] // cell["length"])


def _most(cell: Cell) -> int:
    """Steps at most: at every longer length as many tokens, however many a step of it has, but at least ten steps."""
    if not cell["after"]:
        return cell["first_steps"]
    tokens = cell["steps"] * cell["batch_tokens"]
    return max(round(tokens / (_batch(cell) * cell["length"])), min(_FEWEST, cell["steps"]))


def learn(cell: Cell, start: Path | None, folder: Path, relative_to: Path) -> Figures:
    """Trains a system at one length, from weights if there are any, and tests it.

    Returns:
        status; accuracy, low and high (Wilson's 95 % interval over questions), verdict; steps_taken; seconds_per_sequence of
        training; parameters; weights, the file that the next length goes on from.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from performers.models import PerformerConfig, PerformerForMaskedLM
    from performers.randomness import derive_seed
    from performers.training.distributed import use_threads

    seed, length = cell["seed"], cell["length"]
    torch.manual_seed(derive_seed(seed, "recall", "initialization"))
    model: Any = PerformerForMaskedLM(
        PerformerConfig(
            vocab_size=VOCABULARY,
            hidden_size=cell["d"],
            num_hidden_layers=cell["layers"],
            num_attention_heads=cell["heads"],
            intermediate_size=cell["d_ff"],
            # Positions must not turn what is far away out of reach: wavelengths far beyond the longest sequence.
            rope_theta=1e8,
            # Attention that is not nearly uniform at first: with the usual 0.02 the task was not found in 300 steps.
            initializer_range=cell["d"] ** -0.5,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            mask_token_id=None,
            seed=seed,
            **architecture(cell["system"], cell["layers"]),
        )
    )
    if start is not None:
        model.load_state_dict(load_file(start), strict=False)  # the output layer is the embedding, and saved once
        model.tie_weights()
    model.to(cell["device"]).train()
    most = _most(cell)
    warm_up = max(1, most // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cell["learning_rate"], betas=(0.9, 0.98), weight_decay=0.0)
    with use_threads(cell["threads"]):
        recent: list[float] = []
        steps_taken = 0
        started = time.perf_counter()
        for step in range(most):
            for group in optimizer.param_groups:
                group["lr"] = cell["learning_rate"] * min(1.0, (step + 1) / warm_up)
            batch = sequences(_batch(cell), length, cell["questions"], derive_seed(seed, "recall", length, step))
            loss = model(input_ids=batch.tokens.to(model.device), labels=batch.labels.to(model.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent, steps_taken = [*recent[-9:], loss.item()], step + 1
            if len(recent) == 10 and max(recent) < _LEARNED:
                break
        seconds = time.perf_counter() - started
        right, asked = _answer(model.eval(), cell, derive_seed(seed, "recall", "test", length))
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.safetensors"
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head.weight")}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, weights)
    low, high = wilson(right, asked)
    return {
        "status": DONE,
        "accuracy": right / asked,
        "low": low,
        "high": high,
        "verdict": verdict(low, high),
        "steps_taken": steps_taken,
        "seconds_per_sequence": seconds / steps_taken / _batch(cell),
        "parameters": model.num_parameters(),
        "weights": str(weights.relative_to(relative_to)),
    }


# Nats a question, in ten steps on end: nearly every answer is right.
_LEARNED = 0.03
_FEWEST = 10  # steps, however long the sequences are


def _answer(model: Any, cell: Cell, seed: int) -> tuple[int, int]:
    """How many questions are answered right in new sequences, and how many there are."""
    import torch

    right = asked = 0
    with torch.inference_mode():
        for number in range(math.ceil(cell["tests"] / _batch(cell))):
            batch = sequences(_batch(cell), cell["length"], cell["questions"], seed + number)
            guesses = model(input_ids=batch.tokens.to(model.device)).logits.argmax(-1).cpu()
            is_asked = batch.labels >= 0
            right += int((guesses == batch.labels)[is_asked].sum())
            asked += int(is_asked.sum())
    return right, asked


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z = 1.96
    centre, spread = right + z * z / 2, z * math.sqrt(right * (asked - right) / asked + z * z / 4)
    return (centre - spread) / (asked + z * z), (centre + spread) / (asked + z * z)


def verdict(low: float, high: float) -> str:
    """What an interval of the accuracy says: solved (surely above 0.9), at chance (chance is in it) or partly."""
    return SOLVED if low > 0.9 else AT_CHANCE if low <= CHANCE else PARTLY


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    lengths = sorted(set(report["settings"]["lengths"]))
    rows: list[list[str]] = []
    for system in report["settings"]["systems"]:
        cells = {cell["length"]: cell for cell in report["cells"] if cell["system"] == system}
        rows.append([SYSTEMS[system].title, *(_entry(cells.get(length)) for length in lengths)])
    title = f"Answers that are right, {report['cells'][0]['questions']} questions a sequence; chance is {CHANCE:.3f}"
    return [(title, ["system", *(f"L {length:,}" for length in lengths)], rows)]


def _entry(cell: Figures | None) -> str:
    if cell is None:
        return ""
    return f"{cell['accuracy']:.3f} ({cell['verdict']})" if cell["status"] == DONE else cell["status"]


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws accuracy against the length, a line for each system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    lengths = sorted(set(report["settings"]["lengths"]))
    for system in report["settings"]["systems"]:
        cells = [cell for cell in report["cells"] if cell["system"] == system and cell["status"] == DONE]
        if cells:
            width = [[c["accuracy"] - c["low"] for c in cells], [c["high"] - c["accuracy"] for c in cells]]
            places, shares = [c["length"] for c in cells], [c["accuracy"] for c in cells]
            kind = {"color": SYSTEMS[system].colour, "markersize": 3, "linewidth": 1, "elinewidth": 0.6}
            axes.errorbar(places, shares, yerr=width, fmt="o-", label=SYSTEMS[system].title, **kind)
    axes.axhline(CHANCE, color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short_length(length) for length in lengths])
    quick = " (quick settings)" if report["quick"] else ""
    axes.set(xlabel="sequence length (tokens)", ylabel="share of right answers", title=f"Associative recall{quick}")
    axes.legend(frameon=False, fontsize="x-small")
    path = folder / "recall.png"
    figure.savefig(path)
    return [path]
