"""How well contacts are predicted: precision on chains of known structure, none of them like those a regression was fitted on.

Every system ranks the pairs of each of the bundled test chains (`performers.tools.structures`). P@L is the share of contacts
among the best L pairs of a chain of L residues, P@L/5 that among the best fifth as many; pairs are at least 6 residues apart
("all"), 12 to 23 ("medium") or at least 24 ("long").

- attention, jacobian: the two methods of `performers contacts`.
- separation: how often residues so far apart in sequence touch, counted on the very chains that are judged, which favours it:
  what can be had without looking at the residues. Pairs of equal separation stand in any order, and the mean over all orders is
  taken.
- random: the share of contacts among all pairs.

Figures are means over chains with 95 % bootstrap intervals over chains; so are the differences from separation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from performers.benchmarks.experiment import DONE, Cell, Experiment, Figures
from performers.errors import InputError

METHODS = ("attention", "jacobian")
PRIORS = ("separation", "random")
RANGES = {"all": (6, None), "medium": (12, 24), "long": (24, None)}
MEASURES = ("P@L", "P@L/5")
_COLOURS = {"attention": "tab:blue", "jacobian": "tab:green", "separation": "tab:orange", "random": "lightgrey"}


@dataclass(frozen=True)
class ContactSettings:
    """What `measure_contacts` measures.

    Attributes:
        model: a folder or the name of a bundled model; None for the bundled masked model.
        systems: names in `METHODS` and `PRIORS`.
        chains: how many of the test chains are judged; 0 for all.
        jacobian_chains: how many of these by Jacobian, which takes 20 passes per residue.
        resamples: bootstrap samples of the chains.
        device, dtype, threads, seed: of everything.
    """

    model: str | None = None
    systems: Sequence[str] = (*METHODS, *PRIORS)
    chains: int = 0
    jacobian_chains: int = 20
    resamples: int = 2000
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> ContactSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: a system that is not known.
        """
        defaults: dict[str, Any] = {"chains": 4, "jacobian_chains": 1, "resamples": 200} if quick else {}
        settings = cls(**defaults | {key: value for key, value in given.items() if value is not None})
        unknown = [name for name in settings.systems if name not in (*METHODS, *PRIORS)]
        if unknown or not settings.systems:
            raise InputError(
                f"--system {', '.join(unknown) or '(none)'}: expected some of {', '.join((*METHODS, *PRIORS))}."
            )
        return settings


def measure_contacts(
    settings: ContactSettings, output: str | Path, *, quick: bool, restart: bool = False
) -> dict[str, Any]:
    """Measures all systems on the test chains and writes contacts.json, a picture, and the regression that was used.

    Raises:
        RunError, OutputError: as in `Experiment`.
        MissingExtraError: scikit-learn is not installed, and the model brings no regression.
    """
    from performers.tools.contact_regression import FILE_NAME, fit_regression, regression_of
    from performers.tools.language_model import LanguageModel
    from performers.tools.structures import bundled_chains, bundled_chains_hash
    from performers.training.distributed import use_threads

    chains = bundled_chains(training=False)[: settings.chains or None]
    by_id = {chain.id: chain for chain in chains}
    rates = _rates(chains)
    with (
        use_threads(settings.threads),
        Experiment("contacts", asdict(settings), output, quick=quick, restart=restart) as experiment,
    ):
        cells: list[Cell] = [
            {"system": system, "chain": chain.id, "chains": len(chains), "structures": bundled_chains_hash()}
            for system in settings.systems
            for chain in chains[: settings.jacobian_chains if system == "jacobian" else None]
        ]
        model = regression = None
        if set(settings.systems) & set(METHODS):
            model = LanguageModel.open(settings.model, device=settings.device, dtype=settings.dtype)
            about = {"model": model.fingerprint(), "dtype": settings.dtype, "device": settings.device}
            cells = [{**cell, **about} if cell["system"] in METHODS else cell for cell in cells]
        if "attention" in settings.systems:
            assert model is not None
            regression = regression_of(model) or fit_regression(model)
            regression.save(experiment.log.folder / FILE_NAME)

        def measure(cell: Cell, results: list[Figures]) -> Figures:
            chain = by_id[cell["chain"]]
            if cell["system"] in METHODS:
                scores = _scores(chain, model, cell["system"], regression)
            else:
                scores = _prior(chain, rates if cell["system"] == "separation" else None)
            return {"status": DONE, **precisions(chain.contacts, scores)}

        results = experiment.measure(
            cells,
            measure,
            name=lambda cell: f"{cell['system']} {cell['chain']}",
            result=lambda figures: f"P@L long range {figures['long P@L']:.3f}",
            weight=lambda cell: len(by_id[cell["chain"]].sequence) ** 2 * (1000 if cell["system"] == "jacobian" else 1),
        )
        rows = [summary for system in settings.systems for summary in _summaries(system, results, settings)]
        return experiment.report(_draw, rows=rows, num_parameters=None if model is None else model.num_parameters)


def _scores(chain: Any, model: Any, method: Any, regression: Any) -> Any:
    """(L, L), NaN below separation 6, of a method of the tool."""
    import numpy as np

    from performers.data import Record
    from performers.tools.contact_prediction import contacts

    length = len(chain.sequence)
    (found,) = contacts(
        [Record(chain.id, "", chain.sequence, 1)], model, method=method, regression=regression, top=float(length)
    )
    scores = np.full((length, length), np.nan)
    scores[found.i, found.j] = found.score
    return scores


def _rates(chains: Sequence[Any]) -> Any:
    """How often residues of each separation touch."""
    import numpy as np

    longest = max(len(chain.sequence) for chain in chains)
    touching, pairs = np.zeros(longest), np.zeros(longest)
    for chain in chains:
        for separation in range(len(chain.sequence)):
            diagonal = np.diagonal(chain.contacts, separation)
            touching[separation] += diagonal.sum()
            pairs[separation] += len(diagonal)
    return touching / pairs


def _prior(chain: Any, rates: Any) -> Any:
    """(L, L): the rate of a pair's separation; the same for all pairs without rates."""
    import numpy as np

    length = len(chain.sequence)
    if rates is None:
        return np.zeros((length, length))
    places = np.arange(length)
    return rates[np.abs(places[:, None] - places[None])]


def precisions(contacts: Any, scores: Any) -> dict[str, float]:
    """P@L and P@L/5 at every range.

    Arguments:
        contacts: (L, L) bool.
        scores: (L, L); the upper triangle counts. Of pairs with equal scores all orders are averaged over.
    """
    import numpy as np

    length = len(contacts)
    figures: dict[str, float] = {}
    for name, (least, most) in RANGES.items():
        i, j = np.triu_indices(length, least)
        if most is not None:
            i, j = i[j - i < most], j[j - i < most]
        values, inverse = np.unique(-scores[i, j], return_inverse=True)
        sizes = np.bincount(inverse, minlength=len(values))
        rates = np.bincount(inverse, weights=contacts[i, j], minlength=len(values)) / sizes
        for measure, count in (("P@L", length), ("P@L/5", max(1, length // 5))):
            count = min(count, len(i))
            before = np.concatenate(([0], np.cumsum(sizes)[:-1]))
            taken = np.clip(count - before, 0, sizes)
            figures[f"{name} {measure}"] = float((taken * rates).sum() / count) if count else float("nan")
    return figures


def _summaries(system: str, results: Sequence[Figures], settings: ContactSettings) -> list[dict[str, Any]]:
    """For each range the means of a system, their intervals, and the difference from separation on the same chains."""
    import numpy as np

    from performers.randomness import derive_seed

    own = {result["chain"]: result for result in results if result["system"] == system and result["status"] == DONE}
    other = {result["chain"]: result for result in results if result["system"] == "separation"}
    rows: list[dict[str, Any]] = []
    generator = np.random.Generator(np.random.Philox(key=derive_seed(settings.seed, "contacts", system)))
    for name in RANGES if own else ():
        row: dict[str, Any] = {"system": system, "range": name, "chains": len(own)}
        for measure in MEASURES:
            key = f"{name} {measure}"
            chains = [chain for chain in own if own[chain][key] is not None]
            values = np.array([own[chain][key] for chain in chains])
            drawn = generator.integers(len(values), size=(settings.resamples, len(values)))
            row[measure] = float(values.mean())
            row[f"{measure} interval"] = np.quantile(values[drawn].mean(1), [0.025, 0.975]).tolist()
            if other and system in METHODS:
                differences = values - np.array([other[chain][key] for chain in chains])
                row[f"{measure} above separation"] = float(differences.mean())
                row[f"{measure} above separation interval"] = np.quantile(
                    differences[drawn].mean(1), [0.025, 0.975]
                ).tolist()
        rows.append(row)
    return rows


def _draw(report: dict[str, Any], folder: Path) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(MEASURES), sharey=True)
    systems = list(dict.fromkeys(row["system"] for row in report["rows"]))
    for axes, measure in zip(all_axes, MEASURES, strict=True):
        for place, system in enumerate(systems):
            rows = [row for row in report["rows"] if row["system"] == system]
            x = [number + 0.8 * (place + 0.5) / len(systems) - 0.4 for number in range(len(rows))]
            heights = [row[measure] for row in rows]
            errors = [[abs(row[f"{measure} interval"][side] - row[measure]) for row in rows] for side in (0, 1)]
            label = f"{system} ({rows[0]['chains']} chains)"
            axes.bar(x, heights, 0.8 / len(systems), yerr=errors, capsize=2, color=_COLOURS[system], label=label)
        axes.set_xticks(
            range(len(RANGES)), [f"{name} range" if name != "all" else "all" for name in RANGES], fontsize=8
        )
        axes.set_title(measure, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("precision", fontsize=8)
    all_axes[-1].legend(fontsize=7, frameon=False)
    path = folder / "contacts.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return [path]


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report for people."""

    def cell(row: dict[str, Any], key: str) -> str:
        if key not in row:
            return ""
        low, high = row[f"{key} interval"]
        return f"{row[key]:.3f} ({low:.3f} to {high:.3f})"

    header = ["system", "range", "chains", "P@L", "P@L/5", "P@L above separation", "P@L/5 above separation"]
    keys = [*MEASURES, *(f"{measure} above separation" for measure in MEASURES)]
    rows = [
        [row["system"], row["range"], str(row["chains"]), *(cell(row, key) for key in keys)] for row in report["rows"]
    ]
    return [("Precision of predicted contacts, with 95 % intervals over chains", header, rows)]
