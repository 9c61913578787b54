"""Several systems trained alike on the same proteins: what the experiments on quality have in common.

A `Recipe` says what all systems share (the size of the model, the contexts, the batch), `Proteins` where the sequences are, and a
cell of settings what one run has of its own: system, objective, steps, learning rate, seed. `train` does the run with
`performers pretrain`, which shows progress and goes on where it was cut off, and scores it on [MASK] only. Runs with several
seeds become a `Spread`, and two of them a verdict: an order is stated only where the intervals do not overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from performers.benchmarks.experiment import DIVERGED, DONE, SKIPPED, Cell, CellLog, Figures
from performers.benchmarks.isolation import run_alone
from performers.benchmarks.systems import architecture
from performers.errors import InputError, NonFiniteError

Verdict = Literal["confirmed", "refuted", "undecided"]
CONFIRMED: Verdict = "confirmed"
REFUTED: Verdict = "refuted"
UNDECIDED: Verdict = "undecided"
MAX_STEP_MINUTES = 10
# Above the unigram baseline: a model that is not has learned nothing that an order of systems could rest on.
MEANINGFUL_GAIN = 0.02
OBJECTIVES = {"mlm": "masked", "clm": "causal"}
SETS = {
    "random": "held out at random",
    "clusters": "held-out clusters",
    "families": "held-out families (out of distribution)",
    "validation": "validation",
}
# Too small to mean anything, so that a run takes seconds.
_QUICK_RECIPE: dict[str, Any] = {"layers": 2, "d": 64, "d_ff": 128, "context": 256, "batch_size": 4}


@dataclass(frozen=True)
class Recipe:
    """What all runs of a comparison share.

    The defaults are meant for minutes a run on a core: small batches, twice as many masks as usual, and an optimizer that learns
    proteins in fewer steps.

    Attributes:
        heads, layers, d_ff, d: the size of the model, as the papers give it.
        context, contexts, clusters, batch_size: as in `PretrainConfig`.
        scheme: how masked residues are shown in training; evaluation hides them all.
        mask_proportion: in training; evaluation has 0.15.
        optimizer: as in `PretrainConfig`.
        dtype, device, threads: as in `PretrainConfig`.
    """

    heads: int = 2
    layers: int = 4
    d_ff: int = 512
    d: int = 128
    context: int = 512
    contexts: str = "packed"
    clusters: str | None = None
    batch_size: int = 4
    scheme: str = "mask"
    mask_proportion: float = 0.3
    optimizer: str = "muon"
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None

    @property
    def size(self) -> dict[str, int]:
        """The size as keys of `PerformerConfig`."""
        return {
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.d_ff,
            "hidden_size": self.d,
        }

    def keys(self, system: str, objective: str) -> dict[str, Any]:
        """The keys of `PretrainConfig` that the recipe and a system decide."""
        shared = asdict(self)
        for name in ("heads", "layers", "d_ff", "d"):
            del shared[name]
        return {
            **shared,
            "objective": objective,
            "preset": "tiny",
            "architecture": {**self.size, **architecture(system, self.layers)},
        }


def recipe_and_rest(quick: bool, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an experiment's settings: its own defaults, what was given, and the recipe made of what belongs there.

    Arguments:
        quick: whether the recipe is to be small.
        defaults: that the experiment has in place of those of its class and of the recipe's.
        given: by the user; None is not given. The device and the threads go to both.
    """
    chosen = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    shared = {key: chosen[key] for key in ("device", "threads") if key in chosen}
    recipe = {key: chosen.pop(key) for key in list(chosen) if key in Recipe.__dataclass_fields__}
    return {**chosen, **shared, "recipe": Recipe(**{**(_QUICK_RECIPE if quick else {}), **recipe})}


def check_choices(option: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Refuses an empty list, and one with a word that is not known.

    Raises:
        InputError: names the option, the word, and what is known.
    """
    if not values:
        raise InputError(f"{option}: expected at least one of {', '.join(known)}.")
    for value in values:
        if value not in known:
            raise InputError(f"{option} {value}: expected some of {', '.join(known)}, with commas.")


@dataclass(frozen=True)
class Proteins:
    """The sequences of a comparison.

    Attributes:
        key: changes when any of them does.
        train: a corpus folder.
        validation: FASTA files; what is tuned is tuned on them.
        tests: FASTA files by name: "random" (drawn from the training proteins, whose relatives stay there), "clusters" (no
            relative in training) and, where families are known, "families" (none of the same family either).
    """

    key: str
    train: str
    validation: list[str]
    tests: dict[str, list[str]]


def prepare_proteins(
    folder: Path, sources: Sequence[str], labels: str | None, *, held_out: int, seed: int, threads: int | None = None
) -> Proteins:
    """The proteins of a comparison: split, with some held out at random, and kept in a folder that is found again.

    Arguments:
        folder: of the experiment.
        sources: FASTA files to split by identity, or with `labels` by family; none for the sample that comes with the package.
        labels: as in `split_records`.
        held_out: how many training proteins become the "random" set.
        seed: of the split and of the random set.
        threads: of MMseqs2.

    Raises:
        InputError: the files or labels are not in order; MissingExtraError if MMseqs2 is needed and not installed.
    """
    import numpy as np

    from performers.data import build_corpus, in_memory_corpus, read_fasta, split_records
    from performers.folders import write_file
    from performers.randomness import derive_seed
    from performers.training.runs import describe_file

    if labels is not None and not sources:
        raise InputError("--labels goes with --input; the bundled sample is split by family already.")
    train, validation = ["bundled:train"], ["bundled:validation"]
    tests = {"clusters": ["bundled:test"], "families": ["bundled:ood"]}
    read_fasta(sources or train)  # a missing file is found before anything is written
    files = [describe_file(path) for path in (*sources, *([labels] if labels else [])) if Path(path).is_file()]
    made_of = {"sources": [*sources], "files": files, "held_out": held_out, "seed": seed}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    place = folder / "proteins" / key
    if sources:
        split = place / "split"
        if not (split / "split.json").is_file():
            by: Any = {"by": "identity"} if labels is None else {"by": "family", "labels": labels}
            split_records([*sources], split, nearest=False, seed=seed, threads=threads, **by)
        sets = {path.name.partition(".")[0]: [str(path)] for path in split.glob("*.fasta*")}
        missing = {"train", "validation", "test"} - sets.keys()
        if missing:
            raise InputError(
                f"{', '.join(sources)}: the split leaves no {' and no '.join(sorted(missing))} set; give more proteins."
            )
        train, validation = sets["train"], sets["validation"]
        tests = {"clusters": sets["test"], **({"families": sets["ood"]} if "ood" in sets else {})}
    corpus = place / "train"
    random = place / "random.fasta"
    if not (corpus / "corpus.json").is_file():
        everything = in_memory_corpus(read_fasta(train))
        if len(everything) < 2 * held_out:
            raise InputError(
                f"There are {len(everything):,} training proteins: expected at least {2 * held_out:,}, to hold {held_out:,} out."
            )
        order = np.argsort(
            np.random.Philox(key=derive_seed(seed, "random set")).random_raw(len(everything)), kind="stable"
        )
        place.mkdir(parents=True, exist_ok=True)
        kept = place / "train.fasta"
        for path, chosen in ((random, order[:held_out]), (kept, np.sort(order[held_out:]))):
            write_file(path, "".join(f">{r.id}\n{r.sequence}\n" for r in everything.subset(chosen).records()))
        build_corpus([str(kept)], corpus)
        kept.unlink()
    return Proteins(key, str(corpus), validation, {"random": [str(random)], **tests})


@dataclass(frozen=True)
class ComparisonSettings:
    """What all experiments have settings for that train systems on proteins.

    Attributes:
        sources, labels, held_out: as in `prepare_proteins`.
        recipe: what all runs share.
        seeds: of the runs.
        score_proteins: proteins of each set that are scored.
        device, threads: also in the recipe.
        seed: of the data.
    """

    sources: Sequence[str] = ()
    labels: str | None = None
    held_out: int = 500
    recipe: Recipe = field(default_factory=Recipe)
    seeds: Sequence[int] = (1, 2, 3)
    score_proteins: int = 500
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("--seeds: expected at least one.")

    def proteins(self, folder: Path) -> Proteins:
        """`prepare_proteins` with these settings, in the folder of the experiment."""
        return prepare_proteins(
            folder, self.sources, self.labels, held_out=self.held_out, seed=self.seed, threads=self.threads
        )


def speed_cell(recipe: Recipe, proteins: Proteins, system: str, objective: str) -> Cell:
    """The cell of `measure_speed`."""
    return {
        "part": "speed",
        "system": system,
        "objective": objective,
        "recipe": asdict(recipe),
        "proteins": proteins.key,
        "warm_up": 1,
        "steps": 3,
    }


def measure_speed(cell: Cell, proteins: Proteins) -> Figures:
    """Times training steps in a process of their own; steps of more than ten minutes are flagged.

    Returns:
        status, and the figures of `performers.benchmarks.training.time_steps`.
    """
    keys = {**Recipe(**cell["recipe"]).keys(cell["system"], cell["objective"]), "input": proteins.train}
    limit = 60 * MAX_STEP_MINUTES * (cell["warm_up"] + cell["steps"])
    too_slow = {"status": SKIPPED, "reason": f"a step takes over {MAX_STEP_MINUTES} minutes"}
    try:
        figures = run_alone(
            "performers.benchmarks.training:time_steps",
            timeout=limit,
            keys=keys,
            warm_up=cell["warm_up"],
            steps=cell["steps"],
        )
    except TimeoutError:
        return too_slow
    return too_slow if figures["seconds_per_step"] > 60 * MAX_STEP_MINUTES else {"status": DONE, **figures}


def run_cell(
    recipe: Recipe,
    proteins: Proteins,
    system: str,
    objective: str,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    redraw_every: int | None = None,
    score_on: Sequence[str],
    score_proteins: int,
    points: int = 5,
) -> Cell:
    """The cell of `train`.

    Arguments:
        recipe, proteins, system, objective: what is trained.
        steps, learning_rate, seed, redraw_every: as in `PretrainConfig`.
        score_on: names in `Proteins.tests`; none scores on the validation set alone.
        score_proteins: how many proteins of a set are scored, the same for every run.
        points: how often in training the validation set is scored.
    """
    return {
        "part": "run",
        "system": system,
        "objective": objective,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        "redraw_every": redraw_every,
        "score_on": [*score_on],
        "score_proteins": score_proteins,
        "points": points,
        "recipe": asdict(recipe),
        "proteins": proteins.key,
    }


def train(cell: Cell, log: CellLog, proteins: Proteins) -> Figures:
    """Does a run, or the rest of one that was cut off, and scores it on [MASK] only.

    Returns:
        status; parameters; seconds, with evaluations and saving; curve, the validation figures during training with the step of
        each; scores, the final figures of "validation" and of each set in the cell's "score_on"; model, its folder.
    """
    from performers.training import evaluate, pretrain
    from performers.training.checkpoint import open_model
    from performers.training.configuration import PretrainConfig
    from performers.training.distributed import choose_device, choose_dtype, use_threads

    recipe, folder = Recipe(**cell["recipe"]), log.folder_of(cell)
    config = PretrainConfig.parse(
        {
            **recipe.keys(cell["system"], cell["objective"]),
            "input": proteins.train,
            "output": str(folder),
            "validation": proteins.validation,
            "steps": cell["steps"],
            "learning_rate": cell["learning_rate"],
            "seed": cell["seed"],
            "redraw_every": cell["redraw_every"],
            "evaluate_every": max(1, cell["steps"] // cell["points"]),
            "evaluate_proteins": cell["score_proteins"],
            "checkpoint_every": max(1, cell["steps"] // 10),
            "keep": 1,
        }
    )
    try:
        result = pretrain(config)
    except NonFiniteError as error:
        return {"status": DIVERGED, "reason": str(error)}
    log_lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [_scores(line) | {"step": line["step"]} for line in map(json.loads, log_lines) if "evaluation" in line]
    device = choose_device(recipe.device)
    model = open_model(result.model).to(device)
    scores = {"validation": curve[-1]}
    with use_threads(recipe.threads):
        for name in cell["score_on"]:
            some = sample_proteins(proteins.tests[name], cell["score_proteins"])
            scores[name] = _scores(evaluate(model, some, dtype=choose_dtype(recipe.dtype, device)).to_dict())
    sessions = json.loads((folder / "run.json").read_text(encoding="utf-8"))["sessions"]
    shutil.rmtree(folder / "checkpoints")  # as large as several models, and the run is done
    return {
        "status": DONE,
        "parameters": model.num_parameters(),
        "seconds": sum(session["seconds"] for session in sessions),
        "curve": curve,
        "scores": scores,
        "model": str(result.model.relative_to(log.folder)),
    }


def _scores(evaluation: Mapping[str, Any]) -> Figures:
    names = ("accuracy", "perplexity", "accuracy_gain", "accuracy_gain_interval", "baseline_accuracy", "tokens")
    return {name: evaluation[name] for name in (*names, "baseline_perplexity")}


def sample_proteins(sources: Sequence[str], number: int, *, longer_than: int = 0) -> Any:
    """At most `number` proteins of FASTA files as a `Corpus`, the same ones every time.

    Arguments:
        sources: what `read_fasta` takes.
        number: of proteins.
        longer_than: residues; shorter proteins are left out.

    Raises:
        InputError: no protein is that long.
    """
    import numpy as np

    from performers.data import in_memory_corpus, read_fasta
    from performers.randomness import derive_seed

    records = [record for record in read_fasta(sources) if len(record.sequence) > longer_than]
    if not records:
        raise InputError(f"{', '.join(sources)}: no protein has more than {longer_than:,} residues.")
    keys = np.random.Philox(key=derive_seed(0, "proteins to score")).random_raw(len(records))
    return in_memory_corpus([records[i] for i in np.sort(np.argsort(keys, kind="stable")[:number])])


@dataclass(frozen=True)
class Spread:
    """The figures of several seeds.

    Attributes:
        values: one for each seed.
        mean, deviation: of them; the deviation of one value is 0.
        low, high: the 95 % interval of the mean (Student's t); of one value it is everything.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one figure."""
        found = tuple(values)
        mean = statistics.fmean(found)
        if len(found) == 1:
            return cls(found, mean, 0.0, -math.inf, math.inf)
        deviation = statistics.stdev(found)
        half = _T[min(len(found) - 2, len(_T) - 1)] * deviation / math.sqrt(len(found))
        return cls(found, mean, deviation, mean - half, mean + half)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.deviation:.4f}"


# Quantiles of Student's t at 0.975 for 1, 2, 3 ... degrees of freedom; the last one serves for all above, on the safe side.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def is_above(a: Spread, b: Spread) -> Verdict:
    """Whether `a` is above `b`: undecided where their intervals overlap."""
    return CONFIRMED if a.low > b.high else REFUTED if a.high < b.low else UNDECIDED


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Of a claim that says several things: refuted by any of them, confirmed by all."""
    found = set(verdicts)
    return REFUTED if REFUTED in found else CONFIRMED if found == {CONFIRMED} else UNDECIDED
