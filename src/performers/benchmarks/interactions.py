"""Which proteins interact: the joint model beside everything simpler that learned from the same pairs.

Three questions. Pairs of proteins that nothing was learned from or chosen with: AUROC, AUPR and accuracy of the joint model and
of each baseline, with intervals that resample proteins. Groups drawn from the interaction graph of such proteins, read in one
context: how well the matrix finds the edges, beside the same pairs one by one and the additive model, and in what time. Decoys,
proteins that interact with none of a group, joining it: whether the ranking of the group's own pairs stands.

The tables come as files of the user's. Each set of test pairs is touched once. A table whose negatives were drawn at random, as
D-SCRIPT's, rewards knowing which proteins are popular; its AUPR stands beside the share of positives, and per protein.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from performers.benchmarks.experiment import DONE, Cell, CellLog, Experiment, Figures
from performers.benchmarks.interaction_groups import measure_groups, table_of_groups
from performers.errors import InputError
from performers.folders import write_file
from performers.randomness import derive_seed

JOINT = "joint"
TEST, GROUPS = "pairs", "groups"
_CACHE = "proteins"


@dataclass(frozen=True)
class InteractionBenchmark:
    """What `measure_interactions` measures.

    Attributes:
        model: the folder of a language model; None for the one that comes with the installation.
        proteins, pairs: what is learned from: FASTA files, and a TSV of pairs with labels.
        tests: name, FASTA file and TSV file of each set of test pairs.
        together: as in `InteractConfig`.
        steps: of training.
        batch_size: pairs in a step.
        held_out: the share of training proteins that choose the weights, and again that make the card.
        most_proteins: of each table, drawn at random, with the pairs among them; None for all.
        sizes: of groups.
        groups: of each size.
        decoys: that join a group.
        device, dtype, threads, seed: of everything.
    """

    proteins: Sequence[str]
    pairs: str
    tests: Sequence[tuple[str, str, str]]
    model: str | None = None
    together: str = "states"
    steps: int = 1500
    batch_size: int = 256
    held_out: float = 0.12
    most_proteins: int | None = None
    sizes: Sequence[int] = (8, 16, 32)
    groups: int = 100
    decoys: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> InteractionBenchmark:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: a table is missing, or a number is out of range.
        """
        defaults: dict[str, Any] = {}
        if quick:
            defaults = {
                "steps": 60,
                "batch_size": 64,
                "most_proteins": 100,
                "sizes": (8,),
                "groups": 10,
                "held_out": 0.2,
            }
        chosen = {**defaults, **{key: value for key, value in given.items() if value is not None}}
        if not chosen.get("proteins") or not chosen.get("pairs") or not chosen.get("tests"):
            raise InputError("Expected --input and --pairs to learn from, and at least one --test NAME=FASTA,TSV.")
        chosen["tests"] = [test if isinstance(test, tuple) else _test(test) for test in chosen["tests"]]
        settings = cls(**chosen)
        if len({name for name, *_ in settings.tests}) < len(settings.tests):
            raise InputError("--test: expected a different name for each set of test pairs.")
        if not settings.sizes or min(settings.sizes) < 3:
            raise InputError(f"--size {min(settings.sizes, default='')}: expected groups of at least three proteins.")
        return settings


def _test(text: str) -> tuple[str, str, str]:
    name, _, files = text.partition("=")
    fasta, _, pairs = files.partition(",")
    if not name or not fasta or not pairs or "," in pairs:
        raise InputError(f"--test {text}: expected NAME=FASTA,TSV.")
    return name, fasta, pairs


def measure_interactions(
    settings: InteractionBenchmark, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Trains and measures whatever the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `interactions.json`, the pictures, `run.json`, the model and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report: for each set of test pairs and each system AUROC, AUPR and accuracy with 95 % intervals, the calibration curve
        of the joint model; for groups of each size the AUROC of the matrix, seconds, and what decoys change.

    Raises:
        InputError: a file or a setting is not in order, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    with Experiment("interactions", asdict(settings), output, quick=quick, restart=restart) as experiment:
        left_out = ("tests", "sizes", "proteins", "pairs")
        common = {key: value for key, value in asdict(settings).items() if key not in left_out}
        common["learned_from"] = [*settings.proteins, settings.pairs]
        tables = [{**common, "kind": TEST, "test": list(test)} for test in settings.tests]
        graphs = [{**common, "kind": GROUPS, "test": list(settings.tests[0]), "size": size} for size in settings.sizes]
        bench = _Bench(settings, experiment.log)
        experiment.measure(
            [*tables, *graphs],
            lambda cell, before: bench.pairs(cell) if cell["kind"] == TEST else bench.groups(cell),
            name=lambda cell: (
                f"{cell['test'][0]}, " + ("pairs" if cell["kind"] == TEST else f"groups of {cell['size']}")
            ),
            result=_result,
        )
        model = bench.card
        experiment.notes.append(f"On pairs held out of its training table the joint model is {model['verdict']}.")
        experiment.notes += _verdicts(experiment.results)
        return experiment.report(draw, training=model)


def _result(figures: Figures) -> str:
    if "systems" not in figures:
        return f"AUROC {figures['auroc']['group']:.3f} in one context, {figures['auroc']['pairs']:.3f} by pairs"
    return ", ".join(f"{name} {system['auroc']:.3f}" for name, system in figures["systems"].items())


class _Table(NamedTuple):
    """A table of pairs: proteins, their sequences, and pairs with labels as `PairSet` has them."""

    proteins: list[Any]
    sequences: list[str]
    pairs: Any
    labels: Any


class _Bench:
    """One trained model, and what was read of the proteins of each table; made when first asked for."""

    def __init__(self, settings: InteractionBenchmark, log: CellLog) -> None:
        self._settings, self._log = settings, log
        keys = {
            key: value for key, value in asdict(settings).items() if key not in ("tests", "sizes", "groups", "decoys")
        }
        self._run = log.folder_of({"kind": "training", **keys})
        self._sets: dict[tuple[str, str], tuple[_Table, Any]] = {}
        self._baselines: dict[str, dict[str, Any]] = {}

    @functools.cached_property
    def _model(self) -> Any:
        """The model, trained once and kept."""
        from performers.tools.interactions.model import InteractionModel
        from performers.tools.interactions.training import train_interactions

        settings = self._settings
        tables = self._run.with_name(f"{self._run.name}-table")
        fasta, pairs = tables / "proteins.fasta", tables / "pairs.tsv"
        if not pairs.is_file():
            table = _read(settings.proteins, settings.pairs, settings.most_proteins, settings.seed)
            tables.mkdir(parents=True, exist_ok=True)
            write_file(
                fasta,
                "".join(f">{one.id}\n{text}\n" for one, text in zip(table.proteins, table.sequences, strict=True)),
            )
            rows = zip(table.pairs.tolist(), table.labels.tolist(), strict=True)
            ids = [protein.id for protein in table.proteins]
            write_file(pairs, "".join(f"{ids[a]}\t{ids[b]}\t{label}\n" for (a, b), label in rows))
        result = train_interactions(
            str(fasta),
            pairs,
            self._run,
            settings.model,
            together=settings.together,
            steps=settings.steps,
            batch_size=settings.batch_size,
            held_out=settings.held_out,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads,
            seed=settings.seed,
        )
        return InteractionModel.open(result.model, device=settings.device, dtype=settings.dtype)

    @property
    def card(self) -> dict[str, Any]:
        """Verdict and figures of the trained model on the test part of its own pairs."""
        from performers.tools.interactions.model import SETTINGS

        content = json.loads((self._run / "model" / SETTINGS).read_text(encoding="utf-8"))
        return {key: content[key] for key in ("verdict", "figures", "training", "together")}

    def _opened(self, test: Sequence[str]) -> tuple[_Table, Any]:
        """A table, and a scorer of its proteins with their means; every protein is read once and kept in the folder."""
        from performers.data import FastaReport
        from performers.tools.interactions.scorer import Scorer
        from performers.tools.interactions.summaries import Summaries, Summariser
        from performers.tools.jobs import run_tool

        _, fasta, pairs = test
        if (fasta, pairs) not in self._sets:
            model = self._model
            table = _read([fasta], pairs, self._settings.most_proteins, self._settings.seed)
            number = model.settings.shape.num_features
            folder = self._run.with_name(f"{self._run.name}-{_CACHE}-{derive_seed(0, fasta, pairs):x}")
            source = folder.with_suffix(".fasta")
            write_file(
                source,
                "".join(f">{one.id}\n{text}\n" for one, text in zip(table.proteins, table.sequences, strict=True)),
            )
            tool = Summariser(model.body, [str(source)], num_features=number)
            run_tool(tool, folder, sources=[str(source)], settings={"num_features": number})
            summaries = Summaries.open(folder)
            scorer = Scorer(model)
            readable = {name: row for row, name in enumerate(summaries.ids)}
            missing = [one.id for one in table.proteins if one.id not in readable]
            if missing:
                raise InputError(f"{fasta}: {missing[0]} cannot be read by the language model.")
            proteins = {one.id: one for one in tool.items(FastaReport())}
            for one in table.proteins:
                row = readable[one.id]
                scorer.add(proteins[one.id], {"mean": summaries.means[row], "state": summaries.states[row]})
            means = summaries.means[[readable[one.id] for one in table.proteins]]
            self._sets[fasta, pairs] = table, (scorer, means)
        return self._sets[fasta, pairs]

    def _scores(self, test: Sequence[str]) -> dict[str, Any]:
        """The scores of the baselines on a table; they learn from the joint model's own training pairs."""
        import numpy as np

        from performers.tools.interactions.baselines import PairSet, baseline_scores
        from performers.tools.interactions.summaries import Summaries
        from performers.tools.interactions.training import SUMMARIES, read_split

        name, *_ = test
        if name not in self._baselines:
            table, (_, means) = self._opened(test)
            known, sets = read_split(self._run)
            summaries = Summaries.open(self._run / SUMMARIES)
            rows = {identifier: row for row, identifier in enumerate(summaries.ids)}
            places = {identifier: place for place, identifier in enumerate(known)}
            own = summaries.means[[rows[identifier] for identifier in known]]
            sequences = ["".join(protein.chains) for protein in known.values()]
            training, selection = (
                PairSet(
                    sequences,
                    own,
                    np.array([[places[a], places[b]] for a, b, _ in sets[kind]], np.int64).reshape(-1, 2),
                    np.array([label for *_, label in sets[kind]], np.int64),
                )
                for kind in ("train", "selection")
            )
            asked = PairSet(table.sequences, means, table.pairs, table.labels)
            # All pairs among the proteins of groups are asked for later; the additive model is kept for them.
            chosen = selection if len(np.unique(selection.labels)) == 2 else None
            found = baseline_scores(
                training, chosen, {name: asked, "every protein": _selves(asked)}, seed=self._settings.seed
            )
            self._baselines[name] = found
        return self._baselines[name]

    def pairs(self, cell: Cell) -> Figures:
        """The table of one set of test pairs."""
        import numpy as np

        from performers.tools.interactions.figures import Curve, calibration, measure

        table, (scorer, _) = self._opened(cell["test"])
        started = time.perf_counter()
        scores = {JOINT: scorer.pairs(table.pairs)}
        seconds = time.perf_counter() - started
        scores |= {name: found[cell["test"][0]] for name, found in self._scores(cell["test"]).items()}
        figures = measure(scores, table.labels, table.pairs, seed=cell["seed"], first=JOINT)
        curve = calibration(1 / (1 + np.exp(-scores[JOINT])), table.labels)
        named = np.bincount(table.pairs.ravel()).astype(np.float64)  # what the table itself gives away
        return {
            "status": DONE,
            **figures,
            "calibration": curve,
            "pairs_per_second": len(table.pairs) / seconds,
            "auroc_of_rows": Curve(named[table.pairs].sum(1), table.labels).areas()[0],
        }

    def groups(self, cell: Cell) -> Figures:
        """Groups of one size from the interaction graph of the first set of test pairs."""
        table, (scorer, _) = self._opened(cell["test"])
        additive = self._scores(cell["test"])["additive"]["every protein"] / 2  # of (i, i): g(i) + g(i)
        edges = {
            frozenset(pair) for pair, label in zip(table.pairs.tolist(), table.labels.tolist(), strict=True) if label
        }
        return measure_groups(
            scorer, edges, additive, size=cell["size"], number=cell["groups"], decoys=cell["decoys"], seed=cell["seed"]
        )


def _selves(asked: Any) -> Any:
    """Every protein with itself, from which an additive model's g can be told."""
    import numpy as np

    number = len(asked.sequences)
    return type(asked)(
        asked.sequences, asked.means, np.repeat(np.arange(number)[:, None], 2, 1), np.zeros(number, np.int64)
    )


def _read(sources: Sequence[str], pairs: str, most: int | None, seed: int) -> _Table:
    """A table of pairs, or that among some of its proteins.

    Raises:
        InputError: a file is not in order, or too little is left.
    """
    import numpy as np

    from performers.tools.interactions.pairs import labelled_pairs
    from performers.tools.interactions.training import by_identifier
    from performers.tools.proteins import read_proteins

    known = by_identifier(read_proteins(list(sources)))
    labelled = labelled_pairs(pairs, {name: place for place, name in enumerate(known)})
    used = np.unique(labelled.pairs)
    if most is not None and most < len(used):
        used = _dense(labelled.pairs, used, most, derive_seed(seed, "proteins to measure", pairs))
    kept = np.isin(labelled.pairs, used).all(axis=1)
    table, labels = labelled.pairs[kept], labelled.labels[kept]
    if len(np.unique(labels)) < 2:
        raise InputError(f"{pairs}: among {len(used):,} of its proteins there are not pairs of both labels; take more.")
    everything = list(known.values())
    proteins = [everything[place] for place in used.tolist()]
    return _Table(proteins, ["".join(one.chains) for one in proteins], np.searchsorted(used, table), labels)


def _dense(pairs: Any, used: Any, most: int, seed: int) -> Any:
    """Some proteins, the half of them with most pairs, so that pairs are left among them, the others at random."""
    import numpy as np

    degree = np.bincount(pairs.ravel())
    by_degree = used[np.argsort(-degree[used], kind="stable")]
    rest = by_degree[most // 2 :]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(rest))
    return np.sort(np.concatenate([by_degree[: most // 2], rest[order[: most - most // 2]]]))


def _verdicts(results: Sequence[Figures]) -> list[str]:
    """A sentence for each set of test pairs, by the intervals alone."""
    from performers.tools.interactions.figures import verdict

    notes: list[str] = []
    for result in results:
        if result["kind"] == TEST and result["status"] == DONE:
            said = verdict(result, JOINT).replace("held-out proteins", f"{result['test'][0]}")
            notes.append(f"On {result['pairs']:,} pairs the joint model is {said}.")
    return notes


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    found: list[tuple[str, list[str], list[list[str]]]] = []
    for cell in report["cells"]:
        if cell["kind"] != TEST or cell["status"] != DONE:
            continue
        title = (
            f"{cell['test'][0]}: {cell['pairs']:,} pairs of {cell['proteins']:,} proteins, {cell['base_rate']:.1%} interact; "
            f"how often its proteins are named alone: AUROC {cell['auroc_of_rows']:.3f}; calibration gap of the joint model "
            f"{cell['calibration']['error']:.3f}; 95 % intervals, resampling proteins"
        )
        header = ["system", "AUROC", "AUPR", "accuracy", "AUPR per protein", "AUROC of joint minus this"]
        found.append((title, header, [_row(name, system) for name, system in cell["systems"].items()]))
    cells = [cell for cell in report["cells"] if cell["kind"] == GROUPS and cell["status"] == DONE]
    if cells:
        found.append(table_of_groups(cells))
    return found


def _row(name: str, system: Mapping[str, Any]) -> list[str]:
    from performers.tools.interactions.figures import ahead, with_interval

    own = system["aupr_per_protein"]
    per_protein = "" if own is None else f"{own['aupr']:.3f} (base {own['base_rate']:.3f})"
    return [name, *(with_interval(system, key) for key in ("auroc", "aupr", "accuracy")), per_protein, ahead(system)]


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws AUROC with intervals for every system and set of test pairs, and the calibration curves."""
    from matplotlib.figure import Figure

    from performers.tools.interactions.figures import draw_calibration

    cells = [cell for cell in report["cells"] if cell["kind"] == TEST and cell["status"] == DONE]
    if not cells:
        return []
    figure = Figure(figsize=(3.2 + 2.4 * len(cells), 3.6), dpi=110, layout="constrained")
    axes_of = figure.subplots(1, len(cells), squeeze=False, sharey=True)[0]
    for axes, cell in zip(axes_of, cells, strict=True):
        names = list(cell["systems"])[::-1]
        for place, name in enumerate(names):
            system = cell["systems"][name]
            if system["auroc_interval"] is not None:
                axes.plot(system["auroc_interval"], [place, place], color="#9aa5b1")
            axes.plot(system["auroc"], place, "o", color="#c2410c" if name == JOINT else "#1f4e79")
        axes.axvline(0.5, color="black", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="AUROC", title=cell["test"][0])
    if report["quick"]:
        figure.suptitle("quick settings", fontsize=8)
    paths = [folder / "interactions.png", folder / "calibration.png"]
    figure.savefig(paths[0], metadata={"Software": None})
    draw_calibration({cell["test"][0]: cell["calibration"] for cell in cells}, paths[1])
    return paths
