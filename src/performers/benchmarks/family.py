"""What a family is worth to a protein: held-out families read with no context, with their own, and with a wrong one.

A family is a cluster of related proteins. Some clusters are held out; a model is trained on the others, with members of a cluster
read in each other's context, unless one is given. Residues of a held-out protein are then predicted alone, with the summed states
of its cluster mates, and with those of as many members of another held-out cluster of about the same length. What counts is own
against wrong: anything that any proteins would do for any others is in both. The same model with exact attention, which keeps
every key, stands beside it, and so do the two simplest uses of the same mates: how often each residue occurs in them, and a
profile HMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from performers.benchmarks.comparison import OBJECTIVES, Recipe, recipe_and_rest, run_cell, train
from performers.benchmarks.experiment import DONE, UNAVAILABLE, Cell, Experiment, Figures
from performers.benchmarks.families import Families, prepare_families
from performers.benchmarks.systems import SYSTEMS, check_systems
from performers.errors import InputError

CONTEXTS = ("none", "own", "wrong")
COMPOSITION, PROFILE = "composition of the context", "profile HMM of the context"
_RESAMPLES = 1000


@dataclass(frozen=True)
class FamilySettings:
    """What `measure_family` measures.

    Attributes:
        sources: FASTA files with the proteins, held-out families among them; none in quick settings for families made up of
            bundled proteins by substitutions.
        clusters: TSV of representative and member.
        held_out: FASTA files; the clusters of their proteins are read. None draws `families` clusters by the seed. What a model
            that is given was trained on has to be kept out by this.
        model: a folder with a masked or causal Performer, or None to train one of each system.
        systems: what is trained, by name.
        objective: "mlm" or "clm", of what is trained.
        families: at most so many are read.
        members: of each; one less is a context.
        targets: members that are predicted, each in the context of the others.
        max_length: residues; longer proteins are left out.
        assay: a table of variants with measurements, of the protein in `wild_type`, to be scored with `homologs` as its family;
            three files, or none.
        recipe, steps, learning_rate: of the training.
        device, threads, seed: of training and reading.
    """

    sources: Sequence[str] = ()
    clusters: str | None = None
    held_out: Sequence[str] = ()
    model: str | None = None
    systems: Sequence[str] = ("performer-relu|local", "transformer")
    objective: str = "mlm"
    families: int = 200
    members: int = 8
    targets: int = 2
    max_length: int = 500
    assay: str | None = None
    wild_type: str | None = None
    homologs: str | None = None
    recipe: Recipe = field(
        default_factory=lambda: Recipe(context=4096, batch_size=1, contexts="related", scheme="mask")
    )
    steps: int = 3000
    learning_rate: float = 2e-3
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> FamilySettings:
        """The full or the quick settings, with what was given in their place; `Recipe`'s keys go into the recipe.

        Raises:
            InputError: a name or a number that is not in order, or files that belong together and are not all there.
        """
        defaults: dict[str, Any] = {"families": 6, "members": 4, "targets": 1, "steps": 10} if quick else {}
        shape = {"context": 512 if quick else 4096, "batch_size": 1, "contexts": "related", "scheme": "mask"}
        clusters = given.pop("clusters", None)  # also a key of the recipe, which gets it once the families are prepared
        settings = cls(clusters=clusters, **recipe_and_rest(quick, defaults, {**shape, **given}))
        check_systems(settings.systems)
        if settings.objective not in OBJECTIVES:
            raise InputError(f"--objective {settings.objective}: expected one of {', '.join(OBJECTIVES)}.")
        if bool(settings.sources) != (settings.clusters is not None):
            raise InputError("--input and --clusters belong together: proteins, and which of them are related.")
        if not settings.sources and not quick:
            raise InputError("--input and --clusters are needed: proteins, and which of them are related.")
        if not 1 <= settings.targets <= settings.members or settings.members < 2 or settings.families < 2:
            raise InputError("Expected at least two families of at least two members, and at most as many targets.")
        if len({value is None for value in (settings.assay, settings.wild_type, settings.homologs)}) > 1:
            raise InputError("--assay, --wild-type and --homologs belong together.")
        return settings


def measure_family(
    settings: FamilySettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Trains what has to be trained, reads the held-out families, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `family.json`, `run.json`, the runs and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: train and read again what the folder holds.

    Returns:
        The report: the cells; "accuracy", a row for each model and context with 95 % bootstrap intervals over families;
        "verdicts", own against none and wrong for each model; "assays", the correlation with measurements.

    Raises:
        InputError: a setting or a file is not valid, too few families are held out, or the folder is in use.
    """
    from performers.training.checkpoint import find_model
    from performers.training.runs import describe_file

    with Experiment("family", asdict(settings), output, quick=quick, restart=restart) as experiment:
        families = prepare_families(
            experiment.log.folder,
            settings.sources,
            settings.clusters,
            held_out=settings.held_out,
            families=settings.families,
            members=settings.members,
            max_length=settings.max_length,
            seed=settings.seed,
            training=settings.model is None,
        )
        models: dict[str, Path] = {}
        if settings.model is not None:
            models["the given model"] = find_model(settings.model)
        else:
            models = _trained(settings, families, experiment)
        parts: list[Cell] = [
            {
                "part": "reading",
                "model": name,
                "weights": [describe_file(file)["sha256"] for file in sorted(folder.glob("*.safetensors"))],
                "context": context,
                "families": families.key,
                **{key: getattr(settings, key) for key in ("targets", "device", "seed")},
            }
            for name, folder in models.items()
            for context in CONTEXTS
        ]
        parts += [
            {"part": "baseline", "model": baseline, "context": context, "families": families.key}
            | {key: getattr(settings, key) for key in ("targets", "seed")}
            for baseline in (COMPOSITION, PROFILE)
            for context in CONTEXTS[1:]
        ]
        read = experiment.measure(
            parts,
            lambda cell, before: _read(cell, models, families, settings.threads),
            name=lambda cell: f"{cell['model']}, {_named(cell['context'])}",
            result=lambda figures: f"accuracy {sum(figures['right']) / sum(figures['residues']):.4f}",
        )
        assays = experiment.measure(
            _assay_cells(settings, models),
            lambda cell, before: _score(cell, models[cell["model"]], settings, families),
            name=lambda cell: f"assay by {cell['model']}, {_named(cell['context'])}",
            result=lambda figures: f"Spearman {figures['spearman']:.3f}",
        )
        done = [cell for cell in read if cell["status"] == DONE]
        return experiment.report(
            lambda report, folder: [],
            accuracy=accuracies(done, settings.seed),
            verdicts=verdicts(done, settings.seed),
            assays=[cell for cell in assays if cell["status"] == DONE],
            families=len(families.held_out),
        )


def _trained(settings: FamilySettings, families: Families, experiment: Experiment) -> dict[str, Path]:
    """A model of each system, trained on the other clusters with members in each other's context."""
    from dataclasses import replace

    proteins = families.proteins
    assert proteins is not None
    recipe = replace(settings.recipe, clusters=families.clusters)
    cells = [
        run_cell(
            recipe,
            proteins,
            system,
            settings.objective,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            score_on=(),
            score_proteins=100,
        )
        for system in settings.systems
    ]
    trained = experiment.measure(
        cells,
        lambda cell, before: train(cell, experiment.log, proteins),
        name=lambda cell: f"training {SYSTEMS[cell['system']].title}",
        result=lambda figures: f"validation accuracy {figures['scores']['validation']['accuracy']:.4f}",
    )
    return {
        SYSTEMS[cell["system"]].title: experiment.log.folder / cell["model"]
        for cell in trained
        if cell["status"] == DONE
    }


def _read(cell: Cell, models: dict[str, Path], families: Families, threads: int | None) -> Figures:
    """The figures of one model and kind of context."""
    from performers.benchmarks.families import read_by_composition, read_by_profile, read_families
    from performers.errors import MissingExtraError
    from performers.training.distributed import use_threads

    arguments = (families, cell["context"], cell["targets"], cell["seed"])
    if cell["model"] == COMPOSITION:
        return {"status": DONE, **read_by_composition(*arguments)}
    if cell["model"] == PROFILE:
        try:
            return {"status": DONE, **read_by_profile(*arguments)}
        except MissingExtraError as error:
            return {"status": UNAVAILABLE, "reason": str(error)}
    with use_threads(threads):
        return {"status": DONE, **read_families(models[cell["model"]], *arguments, cell["device"])}


def _assay_cells(settings: FamilySettings, models: dict[str, Path]) -> list[Cell]:
    if settings.assay is None or settings.wild_type is None or settings.homologs is None:
        return []
    from performers.training.runs import describe_file

    files = [describe_file(path)["sha256"] for path in (settings.assay, settings.wild_type, settings.homologs)]
    return [
        {"part": "assay", "model": name, "context": context, "files": files, "device": settings.device}
        | {"weights": [describe_file(file)["sha256"] for file in sorted(folder.glob("*.safetensors"))]}
        for name, folder in models.items()
        for context in CONTEXTS
    ]


def _score(cell: Cell, model: Path, settings: FamilySettings, families: Families) -> Figures:
    """The correlation of a table's measurements with scores by a model in a context."""
    from performers.data import read_fasta
    from performers.errors import UnsupportedError
    from performers.tools.agreement import spearman
    from performers.tools.context_states import read_context
    from performers.tools.language_model import LanguageModel
    from performers.tools.scoring import score
    from performers.training.distributed import use_threads

    assert settings.wild_type is not None
    assert settings.homologs is not None
    opened = LanguageModel.open(model, device=cell["device"])
    with use_threads(settings.threads):
        try:
            if cell["context"] != "none":
                wild_type = {record.sequence for record in read_fasta(settings.wild_type)}
                own = [record for record in read_fasta(settings.homologs) if record.sequence not in wild_type]
                opened.use_context(
                    read_context(
                        opened, own if cell["context"] == "own" else families.unlike(own, settings.members - 1)
                    )
                )
        except UnsupportedError as error:
            return {"status": UNAVAILABLE, "reason": str(error)}
        scored = [
            (found.score, float(found.values["DMS_score"]))
            for found in score(settings.wild_type, settings.assay, opened)
            if found.score is not None and found.values.get("DMS_score")
        ]
    if len(scored) < 2:
        raise InputError(f"{settings.assay}: expected a column DMS_score, and variants that can be scored.")
    import numpy as np

    found, measured = np.array(scored).T
    return {"status": DONE, "spearman": spearman(found, measured), "variants": len(scored)}


def accuracies(cells: Sequence[Figures], seed: int) -> list[Figures]:
    """A row for each model and context: accuracy and perplexity over all residues, with bootstrap intervals over families."""
    import numpy as np

    rows: list[Figures] = []
    for cell in cells:
        right, count, loss = (np.array(cell[key], dtype=float) for key in ("right", "residues", "loss"))
        draws = _draws(len(count), seed)
        low, high = np.quantile(right[draws].sum(1) / count[draws].sum(1), [0.025, 0.975])
        rows.append(
            {
                "model": cell["model"],
                "context": cell["context"],
                "accuracy": right.sum() / count.sum(),
                "interval": [float(low), float(high)],
                "perplexity": float(np.exp(loss.sum() / count.sum())),
                "families": len(count),
                "residues": int(count.sum()),
            }
        )
    return rows


def verdicts(cells: Sequence[Figures], seed: int) -> list[Figures]:
    """What the own context gains over none and over a wrong one, on the same residues, families resampled together."""
    import numpy as np

    found = {(cell["model"], cell["context"]): cell for cell in cells}
    rows: list[Figures] = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        for other in ("none", "wrong"):
            if (model, other) not in found or (model, "own") not in found:
                continue
            own, against = found[model, "own"], found[model, other]
            gained = np.array(own["right"], dtype=float) - np.array(against["right"], dtype=float)
            count = np.array(own["residues"], dtype=float)
            draws = _draws(len(count), seed)
            low, high = (float(x) for x in np.quantile(gained[draws].sum(1) / count[draws].sum(1), [0.025, 0.975]))
            outcome = "above" if low > 0 else "below" if high < 0 else "undecided against"
            gain = float(gained.sum() / count.sum())
            rows.append(
                {
                    "model": model,
                    "against": other,
                    "gain": gain,
                    "interval": [low, high],
                    "text": f"{model}: own context {outcome} {_named(other)} ({gain:+.4f}, {low:+.4f} to {high:+.4f}).",
                }
            )
    return rows


def _draws(count: int, seed: int) -> Any:
    import numpy as np

    from performers.randomness import derive_seed

    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap")))
    return generator.integers(count, size=(_RESAMPLES, count))


def _named(context: str) -> str:
    """A context, for people."""
    return {"none": "no context", "own": "its own family", "wrong": "a wrong family"}[context]


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    settings = report["settings"]
    found = [
        (
            f"Residues of {report['families']} held-out families, {settings['members'] - 1} relatives as context; "
            "95 % intervals over families",
            ["model", "context", "accuracy (more is better)", "perplexity (less is better)"],
            [
                [
                    row["model"],
                    _named(row["context"]),
                    f"{row['accuracy']:.4f} ({row['interval'][0]:.4f} to {row['interval'][1]:.4f})",
                    f"{row['perplexity']:.3f}",
                ]
                for row in report["accuracy"]
            ],
        ),
        ("Is the family worth reading?", ["verdict"], [[row["text"]] for row in report["verdicts"]]),
    ]
    if report["assays"]:
        rows = [
            [row["model"], _named(row["context"]), f"{row['spearman']:.3f}", f"{row['variants']:,}"]
            for row in report["assays"]
        ]
        found.append((f"Variants of {settings['wild_type']}", ["model", "context", "Spearman", "variants"], rows))
    return found
