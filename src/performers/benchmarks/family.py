"""What a family is worth to a protein: held-out families read with no context, with their own, and with a wrong one.

A family is a cluster of related proteins. Some clusters are held out; a model is trained on the others, with members of a cluster
read in each other's context, unless one is given. Residues of a held-out protein are then predicted alone, with the summed states
of its cluster mates, and with those of as many members of another held-out cluster of about the same length. What counts is own
against wrong: anything that any proteins would do for any others is in both. The same model with exact attention, which keeps
every key, stands beside it, and so do the two simplest uses of the same mates: how often each residue occurs in them, and a
profile HMM. The variants of one protein can be scored in the same three ways (`performers.benchmarks.family_assay`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.benchmarks.comparison import OBJECTIVES, Recipe, recipe_and_rest, run_cell, train
from performers.benchmarks.experiment import DONE, UNAVAILABLE, Cell, Experiment, Figures
from performers.benchmarks.families import Families, prepare_families
from performers.benchmarks.family_figures import accuracies, agreements, named, verdicts
from performers.benchmarks.systems import SYSTEMS, check_systems
from performers.errors import InputError

if TYPE_CHECKING:
    from performers.benchmarks.family_assay import Assay

CONTEXTS = ("none", "own", "wrong")
COMPOSITION, PROFILE = "composition of the context", "profile HMM of the context"
BLOSUM62 = "BLOSUM62"


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
        targets: members that are predicted, each in the context of the others; 0 for the assay alone.
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
        shape = {"context": 512 if quick else 4096, "batch_size": 1, "contexts": "related", "optimizer": "adamw"}
        clusters = given.pop("clusters", None)  # also a key of the recipe, which gets it once the families are prepared
        settings = cls(clusters=clusters, **recipe_and_rest(quick, {**defaults, **shape}, given))
        check_systems(settings.systems)
        if settings.objective not in OBJECTIVES:
            raise InputError(f"--objective {settings.objective}: expected one of {', '.join(OBJECTIVES)}.")
        if bool(settings.sources) != (settings.clusters is not None):
            raise InputError("--input and --clusters belong together: proteins, and which of them are related.")
        if not settings.sources and not quick:
            raise InputError("--input and --clusters are needed: proteins, and which of them are related.")
        if settings.targets == 0 and settings.assay is None:
            raise InputError("--targets 0 leaves nothing to measure but an assay: expected --assay.")
        if not 0 <= settings.targets <= settings.members or settings.members < 2 or settings.families < 2:
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
        "verdicts", own against none and wrong, and wrong against none, for each model; "assays" and "assay_verdicts", the same of
        the correlation with measurements, with intervals over variants; "relatives", how many were read for that.

    Raises:
        InputError: a setting or a file is not valid, too few families are held out, or the folder is in use.
    """
    from performers.training.checkpoint import find_model

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
        assay = _assay(settings, families)  # before anything is trained: it may be refused
        models: dict[str, Path] = {}
        if settings.model is not None:
            models["the given model"] = find_model(settings.model)
        else:
            models = _trained(settings, families, experiment)
        read = experiment.measure(
            _reading_cells(settings, models, families) if settings.targets else [],
            lambda cell, before: _read(cell, models, families, settings.threads),
            name=lambda cell: f"{cell['model']}, {named(cell['context'])}",
            result=lambda figures: f"accuracy {sum(figures['right']) / sum(figures['residues']):.4f}",
        )
        scored: list[Figures] = []
        if assay is not None:
            scored = experiment.measure(
                _assay_cells(settings, models, families),
                lambda cell, before: _score(cell, models, assay, settings.threads),
                name=lambda cell: f"assay by {cell['model']}, {named(cell['context'])}",
                result=lambda figures: f"{len(figures['rows']):,} variants",
            )
        done = [cell for cell in read if cell["status"] == DONE]
        assays, gains = agreements([cell for cell in scored if cell["status"] == DONE], settings.seed)
        return experiment.report(
            lambda report, folder: [],
            accuracy=accuracies(done, settings.seed),
            verdicts=verdicts(done, settings.seed),
            assays=assays,
            assay_verdicts=gains,
            relatives=0 if assay is None else len(assay.contexts["own"]),
            families=len(families.held_out),
        )


def _assay(settings: FamilySettings, families: Families) -> Assay | None:
    if settings.assay is None or settings.wild_type is None or settings.homologs is None:
        return None
    from performers.benchmarks.family_assay import prepare_assay

    return prepare_assay(settings.assay, settings.wild_type, settings.homologs, families)


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


def _reading_cells(settings: FamilySettings, models: dict[str, Path], families: Families) -> list[Cell]:
    parts: list[Cell] = [
        {
            "part": "reading",
            "model": name,
            "weights": _weights(folder),
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
    return parts


def _assay_cells(settings: FamilySettings, models: dict[str, Path], families: Families) -> list[Cell]:
    from performers.training.runs import describe_file

    given = (settings.assay, settings.wild_type, settings.homologs)
    files = [describe_file(path)["sha256"] for path in given if path is not None]
    shared = {"part": "assay", "files": files, "families": families.key}
    parts: list[Cell] = [
        {**shared, "model": name, "context": context, "weights": _weights(folder), "device": settings.device}
        for name, folder in models.items()
        for context in CONTEXTS
    ]
    return [*parts, {**shared, "model": BLOSUM62, "context": "none"}, {**shared, "model": PROFILE, "context": "own"}]


def _weights(folder: Path) -> list[str]:
    from performers.training.runs import describe_file

    return [describe_file(file)["sha256"] for file in sorted(folder.glob("*.safetensors"))]


def _score(cell: Cell, models: dict[str, Path], assay: Assay, threads: int | None) -> Figures:
    """The scores of an assay's variants by one model in a context."""
    from performers.benchmarks.family_assay import score_by_matrix, score_by_model, score_by_profile
    from performers.training.distributed import use_threads

    if cell["model"] == BLOSUM62:
        return score_by_matrix(assay)
    if cell["model"] == PROFILE:
        return score_by_profile(assay, cell["context"])
    with use_threads(threads):
        return score_by_model(models[cell["model"]], assay, cell["context"], cell["device"])


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    settings = report["settings"]
    found: list[tuple[str, list[str], list[list[str]]]] = []
    if report["accuracy"]:
        rows = [
            [
                row["model"],
                named(row["context"]),
                f"{row['accuracy']:.4f} ({row['interval'][0]:.4f} to {row['interval'][1]:.4f})",
                f"{row['perplexity']:.3f}",
            ]
            for row in report["accuracy"]
        ]
        title = f"Residues of {report['families']} held-out families, {settings['members'] - 1} relatives as context"
        title += "; hidden residues, of causal models all; 95 % intervals over families"
        found.append((title, ["model", "context", "accuracy (more is better)", "perplexity (less is better)"], rows))
        found.append(("Is the family worth reading?", ["verdict"], [[row["text"]] for row in report["verdicts"]]))
    if report["assays"]:
        rows = [
            [row["model"], named(row["context"]), _correlation(row), f"{row['variants']:,}"] for row in report["assays"]
        ]
        title = (
            f"Variants of {settings['wild_type']}, {report['relatives']} relatives as context, or as many proteins of "
        )
        title += "other families; 95 % intervals over variants"
        found.append((title, ["model", "context", "Spearman (more is better)", "variants"], rows))
        texts = [[row["text"]] for row in report["assay_verdicts"]]
        found.append(("Is it worth reading before variants are scored?", ["verdict"], texts))
    return found


def _correlation(row: dict[str, Any]) -> str:
    if row["interval"] is None:
        return "none, the scores are all equal"
    return f"{row['spearman']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})"
