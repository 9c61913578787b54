"""What the embeddings of `performers embed` are worth, and how fast they are made, beside simple baselines and a Transformer.

Quality, on SCOPe domains (`performers.benchmarks.domains`), for each model and for its architecture with random weights:

- structure: the accuracy of three states (Q3) of a linear softmax probe on the vectors of residues, no superfamily in two sets;
  beside the probe on the residue alone (one-hot), on a window of 15 residues, and the most common state.
- retrieval: the share of domains whose nearest domain of another family is of their superfamily (top-1), and the mean reciprocal
  rank of the first that is, by the cosine of mean vectors; beside the composition, counts of 3-mers, and chance. "Standardised"
  vectors have mean 0 and deviation 1 in every dimension over all domains.

Intervals are 95 % bootstrap intervals over domains (structure) and superfamilies (retrieval).

Speed: `performers.benchmarks.embedding_speed`.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.benchmarks.embedding_report import (
    ALONE,
    BASELINES,
    CHANCE,
    COMMONEST,
    COMPARED_WITH,
    KMERS,
    UNTRAINED,
    WINDOWED,
    draw,
    length_name,
    tables,
)
from performers.benchmarks.experiment import DONE, UNAVAILABLE, Cell, Experiment, Figures
from performers.errors import InputError, RunError, UnsupportedError
from performers.folders import sha256_of

if TYPE_CHECKING:
    from performers.benchmarks.embedding_speed import Rival
    from performers.tools.language_model import LanguageModel

__all__ = ["EmbeddingSettings", "measure_embedding", "tables"]


@dataclass(frozen=True)
class EmbeddingSettings:
    """What `measure_embedding` measures.

    Attributes:
        domains: a table of domains as `read_domains` takes it, for the quality; or None.
        models: folders or names of bundled models; empty for the bundled masked one. The first one's speed is measured.
        untrained: whether their architectures with random weights are judged too.
        train, test: domains that the probe learns from and is judged on, at most.
        per_family: domains of a family at most.
        superfamilies: of which domains are taken; 0 for all.
        against: "esm2" (downloaded as `performers benchmark conversion` does) or a model folder, for the speed; or None.
        proteins: ordinary ones that are timed together.
        lengths: of long ones, in residues, each timed alone.
        repeats: turns in which the systems are timed, at most.
        toks_per_batch: of all systems.
        max_minutes: after which no turn goes on; a system that would take longer for one is left out.
        resamples: of the bootstrap.
        device, dtype, threads, seed: of everything.
    """

    domains: str | None = None
    models: Sequence[str] = ()
    untrained: bool = True
    train: int = 1500
    test: int = 500
    per_family: int = 2
    superfamilies: int = 0
    against: str | None = None
    proteins: int = 100
    lengths: Sequence[int] = (8192, 16_384, 32_768)
    repeats: int = 5
    toks_per_batch: int = 16_384
    max_minutes: float = 10.0
    resamples: int = 1000
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> EmbeddingSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: there is nothing to measure, or a number is out of range.
        """
        defaults: dict[str, Any] = {}
        if quick:
            defaults = {"train": 40, "test": 20, "superfamilies": 80, "resamples": 200}
            defaults |= {"proteins": 8, "lengths": (512, 1024), "repeats": 2}
        settings = cls(**defaults | {key: value for key, value in given.items() if value is not None})
        if settings.domains is None and settings.against is None:
            raise InputError(
                "There is nothing to measure: expected --domains for quality, --against for speed, or both."
            )
        if settings.domains is not None and not Path(settings.domains).is_file():
            raise InputError(f"--domains {settings.domains}: there is no such file.")
        if any(length < 1 for length in settings.lengths):
            raise InputError(f"--length {min(settings.lengths)}: expected at least 1 residue.")
        return settings


def measure_embedding(
    settings: EmbeddingSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Measures what the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for embedding.json, pictures, run.json and cells.jsonl.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report, with the cells, and "structure", "retrieval" and "speed": rows of figures.

    Raises:
        InputError: a file or a model is not in order, or the folder is in use for something else.
        RunError: nothing could be measured.
        MissingExtraError: scikit-learn is not installed.
    """
    from performers.benchmarks.embedding_speed import compared
    from performers.training.distributed import use_threads

    with (
        use_threads(settings.threads),
        Experiment("embedding", asdict(settings), output, quick=quick, restart=restart) as experiment,
    ):
        models = _Models(settings)
        figures: dict[str, Any] = {"structure": [], "retrieval": [], "speed": []}
        if settings.domains is not None:
            results = _measure_quality(settings, settings.domains, models, experiment)
            figures |= {part: _summaries(part, results, settings) for part in ("structure", "retrieval")}
        if settings.against is not None:
            found = _measure_speed(settings, settings.against, models, experiment)
            figures["speed"] = compared([cell for cell in found if cell["status"] == DONE])
        return experiment.report(draw, parameters=models.num_parameters, **figures)


class _Models:
    """The models by what reports call them, one of them in memory at a time.

    Attributes:
        about: for each what decides its numbers.
        num_parameters: of each.
        first: what the first is called.
    """

    def __init__(self, settings: EmbeddingSettings) -> None:
        self._settings = settings
        self.about: dict[str, Cell] = {}
        self.num_parameters: dict[str, int] = {}
        self._sources: dict[str, str | None] = {}
        for source in settings.models or (None,):
            model = self._opened(source)
            name = model.name if model.name not in self.about else str(source)
            about = {"model": model.fingerprint(), "dtype": str(model.dtype), "device": settings.device}
            self.about[name], self._sources[name] = about, source
            self.num_parameters[name] = model.num_parameters
            if settings.untrained:
                self.about[name + UNTRAINED], self._sources[name + UNTRAINED] = about, source
        self.first = next(iter(self.about))
        self.open = functools.lru_cache(maxsize=1)(self._open)

    def _opened(self, source: str | None) -> LanguageModel:
        from performers.tools.language_model import LanguageModel

        return LanguageModel.open(source, device=self._settings.device, dtype=self._settings.dtype)

    def _open(self, name: str) -> LanguageModel:
        from performers.benchmarks.embedding_quality import untrained
        from performers.randomness import derive_seed

        model = self._opened(self._sources[name])
        return untrained(model, derive_seed(self._settings.seed, "untrained")) if name.endswith(UNTRAINED) else model


def _measure_quality(settings: EmbeddingSettings, path: str, models: _Models, experiment: Experiment) -> list[Figures]:
    from performers.benchmarks.domains import few_of_each, read_domains, split_by_superfamily
    from performers.benchmarks.embedding_quality import queries

    domains = few_of_each(read_domains(path), settings.per_family, settings.superfamilies, seed=settings.seed)
    sets = split_by_superfamily(domains, settings.train, settings.test, seed=settings.seed)
    if not queries(domains):
        raise InputError(
            f"{path}: of {len(domains):,} domains none has a superfamily with a second family to be found."
        )
    counts = ", ".join(f"{len(found):,} for {name}" for name, found in sets.items())
    experiment.notes += [
        f"Structure: {counts} domains, at most {settings.per_family} of a family; no superfamily is in two of the sets.",
        f"Retrieval: {len(queries(domains)):,} queries among {len(domains):,} domains, at most {settings.per_family} of a "
        "family, no sequence twice; the own family is not among the candidates.",
        "Models may have seen the sequences of test domains in training, but no structure or family of any.",
    ]
    data = {"domains": sha256_of(Path(path)), "per_family": settings.per_family, "seed": settings.seed}
    data["superfamilies"] = settings.superfamilies
    cells: list[Cell] = []
    for part in ("structure", "retrieval"):
        shared = {"part": part, **data}
        if part == "structure":
            shared |= {"train": settings.train, "test": settings.test}
        cells += [{**shared, "system": name, **about} for name, about in models.about.items()]
        cells += [{**shared, "system": name} for name in BASELINES[part]]
    # A model's cells are next to each other, so that it is opened once.
    cells.sort(key=lambda cell: list(models.about).index(cell["system"]) if "model" in cell else len(models.about))

    def measure(cell: Cell, before: list[Figures]) -> Figures:
        try:
            model = models.open(cell["system"]) if "model" in cell else None
        except UnsupportedError as error:
            return {"status": UNAVAILABLE, "reason": str(error)}
        found = _structure(cell, model, sets) if cell["part"] == "structure" else _retrieval(cell, model, domains)
        return {"status": DONE, **found}

    def result(figures: Figures) -> str:
        if "right" in figures:
            return f"Q3 {sum(figures['right']) / sum(figures['residues']):.3f}"
        shares = {vectors: _share(list(found.values()), 1) for vectors, found in figures["vectors"].items()}
        return "top-1 " + ", ".join(f"{share:.3f} {vectors}".rstrip() for vectors, share in shares.items())

    return experiment.measure(
        cells,
        measure,
        name=lambda cell: f"{cell['part']}, {cell['system']}",
        result=result,
        weight=lambda cell: 10.0 if "model" in cell else 1.0,
    )


def _structure(cell: Cell, model: LanguageModel | None, sets: dict[str, list[Any]]) -> Figures:
    import numpy as np

    from performers.benchmarks.embedding_quality import WINDOW, embedded, one_hot, probed

    features: dict[str, Callable[[list[Any]], Any] | None] = {
        WINDOWED: lambda domains: one_hot(domains, WINDOW),
        ALONE: lambda domains: one_hot(domains, 1),
        COMMONEST: None,
    }
    if model is not None:
        return probed(sets, lambda domains: np.concatenate(embedded(domains, model, "per_tok")).astype(np.float32))
    return probed(sets, features[cell["system"]])


def _retrieval(cell: Cell, model: LanguageModel | None, domains: list[Any]) -> Figures:
    import numpy as np

    from performers.benchmarks.embedding_quality import (
        composition,
        cosines,
        embedded,
        kmer_counts,
        retrieved,
        standardised,
    )

    if cell["system"] == CHANCE:
        return {"vectors": {"": retrieved(domains, None)}}
    if cell["system"] == KMERS:
        return {"vectors": {"as they are": retrieved(domains, cosines(kmer_counts(domains)))}}
    vectors = composition(domains) if model is None else np.stack(embedded(domains, model, "mean"))
    return {
        "vectors": {
            "as they are": retrieved(domains, cosines(vectors)),
            "standardised": retrieved(domains, cosines(standardised(vectors))),
        }
    }


def _summaries(part: str, results: Sequence[Figures], settings: EmbeddingSettings) -> list[dict[str, Any]]:
    """A row for each system and kind of vectors of a part: figures with intervals, and paired differences from a baseline."""
    counts: dict[tuple[str, str], list[Sequence[float]]] = {}
    measures = ("Q3",) if part == "structure" else ("top-1", "MRR")
    for cell in results:
        if cell["part"] != part or cell["status"] != DONE:
            continue
        if part == "structure":
            counts[cell["system"], ""] = list(zip(cell["residues"], cell["right"], strict=True))
        else:
            for vectors, found in cell["vectors"].items():
                counts[cell["system"], vectors] = [found[name] for name in sorted(found)]
    baseline = next((found for (system, _), found in counts.items() if system == COMPARED_WITH[part]), None)
    rows: list[dict[str, Any]] = []
    for (system, vectors), groups in counts.items():
        row: dict[str, Any] = {"system": system, "vectors": vectors, "groups": len(groups)}
        row["number"] = int(sum(group[0] for group in groups))
        for place, measure in enumerate(measures, start=1):
            row[measure] = _figure([(group[0], group[place]) for group in groups], settings)
            if baseline is not None and system != COMPARED_WITH[part]:
                gains = [(one[0], one[place] - other[place]) for one, other in zip(groups, baseline, strict=True)]
                row[f"{measure} above {COMPARED_WITH[part]}"] = _figure(gains, settings)
        rows.append(row)
    return rows


def _figure(groups: Sequence[tuple[float, float]], settings: EmbeddingSettings) -> dict[str, Any]:
    """The sum of the second numbers per one of the first, and its interval over groups."""
    import numpy as np

    from performers.tools.assessment import interval

    totals = np.array(groups, dtype=np.float64)

    def share(rows: Any) -> float | None:
        number, amount = totals[rows].sum(axis=0)
        return float(amount / number) if number else None

    every = np.arange(len(totals))
    return {"value": share(every), "interval": interval(share, len(totals), settings.seed, settings.resamples)}


def _share(groups: Sequence[Sequence[float]], place: int) -> float:
    return sum(group[place] for group in groups) / sum(group[0] for group in groups)


def _measure_speed(settings: EmbeddingSettings, against: str, models: _Models, experiment: Experiment) -> list[Figures]:
    from performers.benchmarks.embedding_speed import ORDINARY, Rival, measure_speed, rival_folder, speed_weight

    rival: Rival | None = None
    reason = ""
    try:
        rival = Rival(rival_folder(against, experiment.log.folder), settings.device, settings.dtype)
    except RunError as error:
        reason = str(error)
    cells: list[Cell] = [
        {
            "part": "speed",
            "length": length,
            "against": against if rival is None else rival.reader.fingerprint(),
            **models.about[models.first],
            **{key: getattr(settings, key) for key in ("proteins", "repeats", "toks_per_batch", "max_minutes")},
            **{key: getattr(settings, key) for key in ("threads", "seed")},
        }
        for length in (ORDINARY, *sorted(set(settings.lengths)))
    ]
    if rival is not None:
        limit = rival.reader.position_limit
        experiment.notes += [
            f"Speed: {models.first} ({models.num_parameters[models.first]:,} parameters) through `performers embed`'s function; "
            f"{rival.reader.name} ({rival.num_parameters:,} parameters) without its head, through transformers with "
            f"{rival.attention} attention, its tokens and batches made beforehand; both in "
            f"{str(rival.reader.dtype).removeprefix('torch.')}.",
            "Speed: long proteins are bundled ones joined end to end; what their vectors are worth is not asked."
            + (" The rival's positions are computed, so they go on for ever." if limit is None else ""),
        ]

    def measure(cell: Cell, before: list[Figures]) -> Figures:
        if rival is None:
            return {"status": UNAVAILABLE, "reason": reason}
        return measure_speed(cell, before, models.open(models.first), rival)

    found = experiment.measure(
        cells,
        measure,
        name=lambda cell: f"speed, {length_name(cell['length'])}",
        result=lambda figures: ", ".join(
            f"{name} {figures['residues'] / statistics.median(seconds):,.0f} residues/s"
            for name, seconds in figures["seconds"].items()
        ),
        weight=speed_weight,
    )
    experiment.notes += [
        f"skipped: {length_name(cell['length'])}, {name}: {why}"
        for cell in found
        for name, why in cell.get("left_out", {}).items()
    ]
    return found
