"""What a model loses that cuts long proteins: the same model and residues, read in windows and whole.

Proteins of more than 1,022 residues (what a context of 1,024 can hold) are read in windows of 512, 1,024 and 2,048 tokens, and
whole. The same residues are hidden each time; only how far the model can see around them differs. Accuracy is given for each
window, and by the distance of a residue to the nearest end at which its window was cut: what cutting costs should be lost there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from performers.benchmarks.comparison import (
    Recipe,
    prepare_proteins,
    recipe_and_rest,
    run_cell,
    sample_proteins,
    train,
)
from performers.benchmarks.experiment import DONE, Cell, Experiment, Figures
from performers.benchmarks.systems import SYSTEMS, check_systems
from performers.errors import InputError

WHOLE = 0
# The distances to the nearest cut, in residues: from one of these numbers to before the next.
DISTANCES = (0, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ContextSettings:
    """What `measure_context` measures.

    Attributes:
        model: a folder with a masked model, or None to train one.
        system: what is trained.
        windows: tokens, among them the bos before a protein and the eos after it.
        longer_than: residues; shorter proteins are left out.
        proteins: at most so many are read.
        sources: FASTA files with the proteins to read; by default held-out ones of the bundled sample.
        recipe, steps, learning_rate: of the training.
        batch_tokens: windows share a forward pass up to so many tokens.
        device, threads, seed: of training and reading.
    """

    model: str | None = None
    system: str = "performer-relu"
    windows: Sequence[int] = (512, 1024, 2048)
    longer_than: int = 1022
    proteins: int = 200
    sources: Sequence[str] = ("bundled:validation", "bundled:test", "bundled:ood")
    recipe: Recipe = field(default_factory=lambda: Recipe(context=4096, batch_size=1))
    steps: int = 1000
    learning_rate: float = 4e-3
    batch_tokens: int = 16_384
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> ContextSettings:
        """The full or the quick settings, with what was given in their place; `Recipe`'s keys go into the recipe.

        Raises:
            InputError: a name or a number that is not in order.
        """
        defaults: dict[str, Any] = {"context": 1024 if quick else 4096, "batch_size": 1}
        if quick:
            defaults |= {"proteins": 8, "steps": 20}
        settings = cls(**recipe_and_rest(quick, defaults, given))
        check_systems((settings.system,))
        if not settings.windows or min(settings.windows) < 3:
            raise InputError("--window: expected numbers of at least 3 tokens.")
        return settings


def measure_context(
    settings: ContextSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Reads the proteins in every window and writes the report; trains the model first unless one is given.

    Arguments:
        settings: what to measure.
        output: a folder for `context.json`, the picture, `run.json`, the run and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: train and read again what the folder holds.

    Returns:
        The report: a cell for the training and for each window; "losses", the accuracy of each window against the whole with a
        95 % bootstrap interval over proteins, and what it says; "distances", the same by distance to the nearest cut.

    Raises:
        InputError: a setting or the model is not valid, no protein is long enough, or the folder is in use.
    """
    from performers.training.checkpoint import find_model
    from performers.training.runs import describe_file

    proteins = sample_proteins(settings.sources, settings.proteins, longer_than=settings.longer_than)
    with Experiment("context", asdict(settings), output, quick=quick, restart=restart) as experiment:
        if settings.model is None:
            place = experiment.log.folder
            data = prepare_proteins(place, (), None, held_out=20, seed=settings.seed, threads=settings.threads)
            cell = run_cell(
                settings.recipe,
                data,
                settings.system,
                "mlm",
                steps=settings.steps,
                learning_rate=settings.learning_rate,
                seed=settings.seed,
                score_on=(),
                score_proteins=100,
            )
            trained = experiment.measure(
                [cell],
                lambda cell, before: train(cell, experiment.log, data),
                name=lambda cell: f"training {SYSTEMS[cell['system']].title}",
                result=lambda figures: f"validation accuracy {figures['scores']['validation']['accuracy']:.4f}",
            )[0]
            if trained["status"] != DONE:
                return experiment.report(draw, losses=[], distances=[], proteins=len(proteins))
            model = place / trained["model"]
        else:
            model = find_model(settings.model)
        weights = [describe_file(file) for file in sorted(model.glob("*.safetensors"))]
        files = [describe_file(source) for source in settings.sources if Path(source).is_file()]
        cells: list[Cell] = [
            {
                "part": "window",
                "window": window,
                "model": [file["sha256"] for file in weights],
                **{
                    key: getattr(settings, key) for key in ("longer_than", "proteins", "batch_tokens", "device", "seed")
                },
                "sources": [*settings.sources],
                "files": [file["sha256"] for file in files],
            }
            for window in (*sorted(set(settings.windows)), WHOLE)
        ]
        results = experiment.measure(
            cells,
            lambda cell, before: {"status": DONE, **read(model, proteins, cell, settings.threads)},
            name=lambda cell: named(cell["window"]),
            result=lambda figures: f"accuracy {_share(figures['hits']):.4f}",
        )
        return experiment.report(draw, losses=losses(results), distances=distances(results), proteins=len(proteins))


def named(window: int) -> str:
    """A window, for people."""
    return f"windows of {window:,}" if window else "whole"


def read(model: Path, proteins: Any, cell: Cell, threads: int | None) -> Figures:
    """Reads proteins in windows and scores their hidden residues, which depend on the seed and the protein alone.

    Arguments:
        model: a folder with a masked model.
        proteins: a `Corpus`.
        cell: window, batch_tokens, device, seed.
        threads: CPU threads.

    Returns:
        hits, for each protein a "1" for every hidden residue that was named and a "0" for the others, in order; and near,
        likewise the place in `DISTANCES` of its distance to the nearest cut, or "-" if its window was not cut.

    Raises:
        InputError: the model is no masked one.
    """
    import numpy as np
    import torch

    from performers.data import BOS, EOS, mask_tokens
    from performers.randomness import derive_seed
    from performers.training.checkpoint import objective_of, open_model
    from performers.training.distributed import autocast, choose_device, choose_dtype, use_threads

    device = choose_device(cell["device"])
    reader = open_model(model).to(device)
    if objective_of(reader) != "mlm":
        raise InputError(f"{model} holds a causal model; expected a masked one.")
    hits, near = [""] * len(proteins), [""] * len(proteins)
    windows: list[tuple[int, Any, Any, Any]] = []  # protein, tokens, labels, distance to the nearest cut
    for number, residues in enumerate(proteins):
        tokens = np.concatenate(([BOS], residues, [EOS])).astype(np.int64)
        hidden, labels = mask_tokens(
            tokens[None], [number], seed=derive_seed(cell["seed"], "context"), step=0, scheme="mask"
        )
        size = cell["window"] or len(tokens)
        for start in range(0, len(tokens), size):
            piece = slice(start, min(start + size, len(tokens)))
            place = np.arange(piece.start, piece.stop)
            beyond = len(tokens) + size  # farther than any cut can be
            left = place - piece.start if start else np.full(len(place), beyond)
            after = piece.stop - 1 - place if piece.stop < len(tokens) else np.full(len(place), beyond)
            windows.append((number, hidden[0, piece], labels[0, piece], np.minimum(left, after)))
    with use_threads(threads), torch.inference_mode():
        for batch in _batches([len(tokens) for _, tokens, _, _ in windows], cell["batch_tokens"]):
            group = [windows[i] for i in batch]
            ends = np.cumsum([0, *(len(tokens) for _, tokens, _, _ in group)])
            with autocast(device, choose_dtype("auto", device)):
                logits = reader(
                    input_ids=torch.from_numpy(np.concatenate([tokens for _, tokens, _, _ in group]))[None].to(device),
                    cu_seqlens=torch.from_numpy(ends.astype(np.int32)).to(device),
                ).logits[0]
            guesses = logits.argmax(-1).cpu().numpy()
            for (number, tokens, labels, distance), end in zip(group, ends[1:].tolist(), strict=True):
                chosen = labels >= 0
                named_right = guesses[end - len(tokens) : end][chosen] == labels[chosen]
                places = np.searchsorted(DISTANCES, distance[chosen], side="right") - 1
                cut = distance[chosen] < len(tokens)
                hits[number] += "".join("1" if hit else "0" for hit in named_right)
                near[number] += "".join(
                    str(place) if is_cut else "-" for place, is_cut in zip(places, cut, strict=True)
                )
    return {"hits": hits, "near": near}


def _share(hits: Sequence[str]) -> float:
    return sum(protein.count("1") for protein in hits) / sum(map(len, hits))


def _batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """The windows that share a forward pass."""
    batches: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not batches or length > room:
            batches.append([])
            room = tokens
        batches[-1].append(index)
        room -= length
    return batches


def losses(results: list[Figures]) -> list[Figures]:
    """What each window loses against the whole, over the same residues.

    Returns:
        A row for each window: window, accuracy, loss (accuracy of the whole minus that of the window), interval (95 %, bootstrap
        over proteins, both resampled together), and text, a plain sentence: a loss, a gain, or undecided.
    """
    cells = {cell["window"]: cell for cell in results if cell.get("part") == "window"}
    count = [len(hits) for hits in cells[WHOLE]["hits"]]
    whole = [hits.count("1") for hits in cells[WHOLE]["hits"]]
    rows: list[Figures] = []
    for window, cell in cells.items():
        right = [hits.count("1") for hits in cell["hits"]]
        row: Figures = {"window": window, "accuracy": _share(cell["hits"])}
        if window:
            row |= _lost(whole, right, count)
            low, high = row["interval"]
            outcome = "less accurate than" if low > 0 else "more accurate than" if high < 0 else "undecided against"
            row["text"] = f"{named(window)}: {outcome} the whole protein: {_loss_of(row)} lost."
        rows.append(row)
    return rows


def distances(results: list[Figures]) -> list[Figures]:
    """Accuracy by distance to the nearest cut, beside that of the whole protein on the same residues.

    Returns:
        A row for each window and distance: window, from, to (None for the last), residues, accuracy, whole, loss and interval
        (as those of `losses`, over the proteins that have such residues).
    """
    cells = {cell["window"]: cell for cell in results if cell.get("part") == "window"}
    rows: list[Figures] = []
    for window, cell in cells.items():
        for index, start in enumerate(DISTANCES):
            place = str(index)
            count = [near.count(place) for near in cell["near"]]
            if not any(count):
                continue
            right, whole = (_right(hits, cell["near"], place) for hits in (cell["hits"], cells[WHOLE]["hits"]))
            rows.append(
                {
                    "window": window,
                    "from": start,
                    "to": DISTANCES[index + 1] if index + 1 < len(DISTANCES) else None,
                    "residues": sum(count),
                    "accuracy": sum(right) / sum(count),
                    "whole": sum(whole) / sum(count),
                    **_lost(whole, right, count),
                }
            )
    return rows


def _right(hits: Sequence[str], near: Sequence[str], place: str) -> list[int]:
    """For each protein, how many of its residues at a place were named."""
    return [
        sum(hit == "1" and at == place for hit, at in zip(*protein, strict=True))
        for protein in zip(hits, near, strict=True)
    ]


def _lost(whole: Sequence[int], right: Sequence[int], count: Sequence[int]) -> Figures:
    """The difference of two accuracies, and its interval over proteins: any difference at all if there are not two of them.

    Arguments:
        whole, right: residues of each protein that were named in the whole protein and in windows.
        count: of how many.
    """
    import numpy as np

    from performers.tools.assessment import interval

    present = np.array(count) > 0
    lost, of = (np.array(whole) - np.array(right))[present], np.array(count)[present]
    found = interval(lambda rows: lost[rows].sum() / of[rows].sum(), len(of), seed=0) if len(of) > 1 else None
    return {"loss": float(lost.sum() / of.sum()), "interval": list(found or (-1.0, 1.0))}


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    rows = [
        [
            named(row["window"]),
            f"{row['accuracy']:.4f}",
            _loss_of(row) if row["window"] else "",
        ]
        for row in report["losses"]
    ]
    title = (
        f"Accuracy on [MASK] in {report['proteins']} proteins of more than {report['settings']['longer_than']:,} residues; "
        "95 % intervals over proteins"
    )
    found = [(title, ["read in", "accuracy", "lost against the whole"], rows)]
    windows = list(dict.fromkeys(row["window"] for row in report["distances"]))
    header = ["residues to the nearest cut", *(named(window) for window in windows)]
    for title, shown in (
        ("Accuracy by distance to the nearest cut / of the whole protein on the same residues", _beside),
        ("Lost by distance to the nearest cut against the whole protein; 95 % intervals over proteins", _loss_of),
    ):
        table: list[list[str]] = []
        for start in _starts(report):
            line = {row["window"]: row for row in report["distances"] if row["from"] == start}
            cells = (shown(line[window]) if window in line else "" for window in windows)
            table.append([_span(next(iter(line.values()))), *cells])
        found.append((title, header, table))
    found.append(
        ("Does cutting lose accuracy?", ["verdict"], [[row["text"]] for row in report["losses"] if "text" in row])
    )
    return found


def _starts(report: dict[str, Any]) -> list[int]:
    """The distances that some residues have."""
    return sorted({row["from"] for row in report["distances"]})


def _span(row: Figures) -> str:
    return f"{row['from']} to {row['to'] - 1}" if row["to"] else f"{row['from']} and more"


def _beside(row: Figures) -> str:
    return f"{row['accuracy']:.4f} / {row['whole']:.4f} ({row['residues']:,})"


def _loss_of(row: Figures) -> str:
    return f"{row['loss']:+.4f} ({row['interval'][0]:+.4f} to {row['interval'][1]:+.4f})"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what is gained against the whole protein, by the distance to the nearest cut, a line for each window."""
    if not report["losses"]:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    colours = ("#d1495b", "#edae49", "#2e7d4f", "#1b6ca8", "#7a5195")
    starts = _starts(report)
    windows = list(dict.fromkeys(row["window"] for row in report["distances"]))
    for number, window in enumerate(windows):
        rows = [row for row in report["distances"] if row["window"] == window]
        beside = 0.12 * (number - (len(windows) - 1) / 2)  # so that bars do not hide each other
        axes.errorbar(
            [starts.index(row["from"]) + beside for row in rows],
            [-row["loss"] for row in rows],
            # What is gained lies between minus the upper and minus the lower end of what is lost.
            yerr=[
                [max(row["interval"][1] - row["loss"], 0) for row in rows],
                [max(row["loss"] - row["interval"][0], 0) for row in rows],
            ],
            fmt="o-",
            color=colours[number % len(colours)],
            markersize=3,
            linewidth=1,
            capsize=2,
            label=named(window),
        )
    axes.axhline(0, color="black", linestyle=":", linewidth=1, label="whole")
    spans = {row["from"]: _span(row) for row in report["distances"]}
    axes.set_xticks(range(len(starts)), [spans[start] for start in starts], fontsize="small")
    quick = " (quick settings)" if report["quick"] else ""
    axes.set(
        xlabel="residues to the nearest cut",
        ylabel="accuracy minus the whole's (95 %)",
        title=f"Cutting long proteins{quick}",
    )
    axes.legend(frameon=False, fontsize="small")
    path = folder / "context.png"
    figure.savefig(path)
    return [path]
