"""Finetuning on real measurements: the fluorescence of variants of one protein, and the secondary structure of domains.

Every way to finetune (all weights, adapters, head only) and the ridge regressions learn from the same proteins and are measured
on the same test proteins. avGFP (Sarkisyan et al., 2016): the number of mutations alone explains much, so the figures are those
within each number of mutations. Secondary structure in three states (SCOPe domains, DSSP): no superfamily is on two sides.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from performers.benchmarks.experiment import DONE, Cell, Experiment, Figures
from performers.data import RESIDUES, read_fasta
from performers.errors import InputError
from performers.folders import sha256_of, write_file
from performers.randomness import derive_seed
from performers.tools.agreement import MOST_MUTATIONS
from performers.tools.tables import read_table
from performers.tools.variants import parse_variant

WAYS: dict[str, dict[str, bool]] = {"all": {}, "lora": {"lora": True}, "frozen": {"frozen": True}}
TASKS = {"avgfp": ("score", "regression"), "structure": ("structure", "residue")}
_THREE_STATES = str.maketrans("HGIEBTSL", "HHHEECCC")
_OF_A_SUPERFAMILY = 5  # domains at most, so that no large one decides
_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
_COLOURS = ("#1f4e79", "#c2410c", "#15803d", "#9aa5b1", "#6b21a8", "#a16207")


@dataclass(frozen=True)
class FinetuningSettings:
    """What `measure_finetuning` measures.

    Attributes:
        variants: the scan of avGFP: a table with `variant` (A108D,N144D, numbered from 0), `num_mutations` and `score`; or None.
        wild_type: FASTA whose record "avgfp" is the protein that is numbered.
        structures: domains as lines of identifier, SCOPe family, sequence and DSSP, separated by tabs (.gz too); or None.
        model: that is finetuned; None for the bundled one.
        ways: some of `WAYS`.
        proteins: of each task, over all sets, drawn with the seed.
        steps, batch_size, learning_rate: of a finetuning.
        device, dtype, threads, seed: where it runs, and what is drawn.
    """

    variants: str | None = None
    wild_type: str | None = None
    structures: str | None = None
    model: str | None = None
    ways: Sequence[str] = ("all", "lora", "frozen")
    proteins: int = 4000
    steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 1e-4
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> FinetuningSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: there is nothing to measure, or a way to finetune is not known.
        """
        defaults: dict[str, Any] = {"proteins": 300, "steps": 20} if quick else {}
        settings = cls(**defaults | {key: value for key, value in given.items() if value is not None})
        if settings.variants is None and settings.structures is None:
            raise InputError("There is nothing to measure on: expected --variants or --structures, or both.")
        if (settings.variants is None) != (settings.wild_type is None):
            raise InputError("Expected --variants and --wild-type together.")
        unknown = [way for way in settings.ways if way not in WAYS]
        if unknown or not settings.ways:
            raise InputError(f"--way {','.join(unknown) or 'none'}: expected {', '.join(WAYS)}.")
        return settings


def measure_finetuning(
    settings: FinetuningSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Finetunes and measures whatever the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `finetuning.json`, the picture, `run.json`, the proteins, the models and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report: a cell for each task and way, and one for the baselines of each task, with "figures" by system and group.

    Raises:
        InputError: a setting or a file is not in order, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    with Experiment("finetuning", asdict(settings), output, quick=quick, restart=restart) as experiment:
        folder = experiment.log.folder
        tables: dict[str, Path] = {}
        if settings.variants is not None and settings.wild_type is not None:
            tables["avgfp"] = folder / "avgfp.csv"
            _write(tables["avgfp"], avgfp(settings.variants, settings.wild_type), "score", settings)
            experiment.notes.append(
                "avGFP is split by variant: the same substitutions are in training and test, in other company."
            )
        if settings.structures is not None:
            tables["structure"] = folder / "structure.csv"
            _write(tables["structure"], domains(settings.structures), "structure", settings)
            experiment.notes.append(
                "Domains are split by SCOPe superfamily, at most five of each; C is all that is neither H nor E."
            )
        apart = ("ways", "variants", "wild_type", "structures")
        common = {key: value for key, value in asdict(settings).items() if key not in apart}
        cells = [
            {"task": task, "system": system, "table": sha256_of(table), **common}
            for task, table in tables.items()
            for system in (*settings.ways, "baselines")
        ]
        experiment.measure(
            cells,
            lambda cell, before: _measured(cell, tables[cell["task"]], experiment),
            name=lambda cell: f"{cell['task']}, {cell['system']}",
            result=lambda figures: "; ".join(
                f"{row['system']} {_with_interval(row)}" for row in figures["figures"] if row["group"] == "all"
            ),
        )
        return experiment.report(draw)


def avgfp(variants: str | Path, wild_type: str | Path) -> Iterator[tuple[str, str, str, str]]:
    """Identifier, sequence, score and number of mutations of every variant without a stop.

    Raises:
        InputError: a variant does not fit the wild type: the numbering is another one.
    """
    protein = next((record.sequence for record in read_fasta(str(wild_type)) if record.id.startswith("avgfp")), None)
    if protein is None:
        raise InputError(f"{wild_type} has no record avgfp.")
    table = read_table(variants)
    table.require("variant", "num_mutations", "score")
    for number, row in table.rows:
        found = parse_variant(protein, row["variant"].replace(",", ":"), offset_idx=0)
        if found.status == "stop":
            continue
        if found.status != "ok":
            raise InputError(f"{variants}, row {number:,} ({row['variant']}): {found.reason or found.status}.")
        yield row["variant"].replace(",", ":"), found.apply(protein), row["score"], row["num_mutations"]


def domains(path: str | Path) -> Iterator[tuple[str, str, str, str]]:
    """Identifier, sequence, structure in three states and superfamily of every domain whose residues are all known.

    Raises:
        InputError: a line is not what is expected.
    """
    opener: Any = gzip.open if Path(path).suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            parts = line.rstrip("\n").split("\t")
            if len(parts) != 4 or len(parts[2]) != len(parts[3]):
                raise InputError(
                    f"{path}, line {number:,}: expected identifier, SCOPe family, sequence and one state of DSSP per residue."
                )
            identifier, family, sequence, states = parts
            structure = states.translate(_THREE_STATES)
            if set(structure) <= set("HEC") and set(sequence) <= set(RESIDUES):
                yield identifier, sequence, structure, ".".join(family.split(".")[:3])


def _write(path: Path, rows: Iterator[tuple[str, str, str, str]], target: str, settings: FinetuningSettings) -> None:
    """Some of the rows, drawn with the seed, as a table for `finetune`; all domains of a superfamily are in one set."""
    seed, seen = settings.seed, Counter[str]()
    drawn = sorted(rows, key=lambda row: derive_seed(seed, "proteins", row[0]))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "sequence", target, "group", "split"])
    taken = 0
    for identifier, sequence, value, group in drawn:
        seen[group] += 1
        if target == "structure" and seen[group] > _OF_A_SUPERFAMILY:
            continue
        key = derive_seed(seed, "split", group if target == "structure" else identifier) / 2**63
        name = "train" if key < _SHARES["train"] else "test" if key >= 1 - _SHARES["test"] else "validation"
        writer.writerow([identifier, sequence, value, group, name])
        taken += 1
        if taken == settings.proteins:
            break
    write_file(path, text.getvalue())


def _measured(cell: Cell, table: Path, experiment: Experiment) -> Figures:
    """The figures of one system, or of all baselines, on the test proteins: of all, and of each group of avGFP."""
    from performers.tools.baselines import baselines
    from performers.tools.finetuned import predictions_for_test
    from performers.tools.finetuning import finetune
    from performers.tools.heads import HeadedModel
    from performers.tools.labelled import read_labelled
    from performers.tools.language_model import LanguageModel
    from performers.training.distributed import use_threads

    target, kind = TASKS[cell["task"]]
    proteins = read_labelled(table, target, kind)  # pyright: ignore[reportArgumentType]
    groups = np.array([row["group"] for _, row in read_table(table).rows])[proteins.of("test")]
    with use_threads(cell["threads"]):
        if cell["system"] == "baselines":
            reader = LanguageModel.open(cell["model"], device=cell["device"], dtype=cell["dtype"])
            systems = baselines(proteins, reader, seed=cell["seed"])
            if cell["task"] == "avgfp":
                systems["fewer mutations"] = [np.array([[-float(group)]]) for group in groups]
        else:
            folder = experiment.log.folder_of(cell)
            settings = {key: cell[key] for key in ("steps", "batch_size", "learning_rate", "device", "dtype", "seed")}
            finetune(
                table,
                target,
                kind,
                folder,
                model=cell["model"],
                baselines=False,
                threads=cell["threads"],
                **settings,
                **WAYS[cell["system"]],
            )
            model = HeadedModel.of(folder, device=cell["device"], dtype=cell["dtype"])
            systems = {cell["system"]: predictions_for_test(model, proteins)}
    truth = [proteins.targets[index] for index in proteins.of("test")]
    figures = [
        row
        for system, predicted in systems.items()
        for row in _by_group(cell["task"], kind, system, predicted, truth, groups, cell["seed"])
    ]
    counts = {name: len(proteins.of(name)) for name in ("train", "validation", "test")}
    return {"status": DONE, "figures": figures, "proteins": counts}


def _by_group(
    task: str, kind: Any, system: str, predicted: Any, truth: list[Any], groups: npt.NDArray[Any], seed: int
) -> Iterator[Figures]:
    from performers.tools.assessment import HEADLINE, assess

    chosen = {"all": np.ones(len(groups), dtype=np.bool_)}
    if task == "avgfp":
        numbers = groups.astype(int)
        chosen |= {str(count): numbers == count for count in range(1, MOST_MUTATIONS)}
        chosen[f"{MOST_MUTATIONS}+"] = numbers >= MOST_MUTATIONS
    for name, members in chosen.items():
        rows = np.flatnonzero(members).tolist()
        if len(rows) > 1:
            found = assess(kind, [predicted[row] for row in rows], [truth[row] for row in rows], seed=seed)
            yield {"system": system, "group": name, "proteins": len(rows), **found[HEADLINE[kind]]}


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a report: for each task a row for each system, a column for each group."""
    found: list[tuple[str, list[str], list[list[str]]]] = []
    for task, rows in _rows(report).items():
        groups = list(dict.fromkeys(row["group"] for row in rows))
        systems: dict[str, dict[str, Figures]] = defaultdict(dict)
        for row in rows:
            systems[row["system"]][row["group"]] = row
        title = (
            "avGFP: Spearman within a number of mutations"
            if task == "avgfp"
            else "Secondary structure: accuracy of three states"
        )
        header = ["system", *(_group_name(task, group) for group in groups)]
        body = [
            [system, *(_with_interval(by_group[group]) if group in by_group else "" for group in groups)]
            for system, by_group in systems.items()
        ]
        found.append((f"{title} (95 % bootstrap interval over proteins)", header, body))
    return found


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Points with intervals: a panel for each task."""
    from matplotlib.figure import Figure

    by_task = _rows(report)
    figure = Figure(figsize=(5.5 * len(by_task), 4), layout="constrained")
    for axes, (task, rows) in zip(np.ravel(figure.subplots(1, len(by_task))), by_task.items(), strict=True):
        groups = list(dict.fromkeys(row["group"] for row in rows))
        systems = list(dict.fromkeys(row["system"] for row in rows))
        for number, system in enumerate(systems):
            own = [row for row in rows if row["system"] == system and row["value"] is not None]
            x = [groups.index(row["group"]) + 0.12 * (number - (len(systems) - 1) / 2) for row in own]
            y = np.array([row["value"] for row in own])
            ends = np.array([row["interval"] or (row["value"], row["value"]) for row in own]).reshape(-1, 2)
            error = np.abs(ends - y[:, None]).T
            colour = _COLOURS[number % len(_COLOURS)]
            axes.errorbar(x, y, yerr=error, fmt="o", markersize=4, linewidth=1, color=colour, label=system)
        axes.set_xticks(range(len(groups)), [_group_name(task, group) for group in groups], fontsize="small")
        axes.set_ylabel("Spearman" if task == "avgfp" else "accuracy")
        axes.set_title("avGFP" if task == "avgfp" else "secondary structure, three states")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.legend(frameon=False, fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    path = folder / "finetuning.png"
    figure.savefig(path, dpi=150)
    return [path]


def _rows(report: dict[str, Any]) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {}
    for cell in report["cells"]:
        if cell["status"] == DONE:
            found.setdefault(cell["task"], []).extend(cell["figures"])
    return found


def _group_name(task: str, group: str) -> str:
    if task != "avgfp" or group == "all":
        return group
    return f"{group} mutation{'' if group == '1' else 's'}"


def _with_interval(row: Figures) -> str:
    from performers.tools.finetuned import with_interval

    return with_interval(row)
