"""Are designs any good, and do they heed a partner? Neither is asked of the model that made them.

Three measurements of a causal model, each on its own:

- *judged*: the pseudo-perplexity that a masked model, the judge, gives to the first residues of designs, of natural held-out
  proteins, of the same proteins shuffled, and of sequences from a Markov chain and from residue frequencies. Designs that are no
  nearer to natural proteins than the chain is have learned no more than the chain.
- *families*: designs that go on from the first residues of a member of a family, which was left out of the family's profile. What
  follows the prompt is scored by the profile, beside the rest of the member itself, the same shuffled, and random residues.
- *partner*: log P(b | a) - log P(b | a') per residue of b, for held-out interacting proteins a and b and another protein a' of
  about the length of a that is no known partner of b; and log P(b | a) - log P(b). The interval is over proteins, not pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from performers.benchmarks.control_sequences import INDEPENDENT, beginnings, bits, markov_chain, shuffled, walk
from performers.benchmarks.experiment import DONE, UNAVAILABLE, Cell, Experiment, Figures
from performers.benchmarks.family_profiles import E_VALUE, Profile, families_of_equals
from performers.data import Corpus, Record, in_memory_corpus, read_fasta
from performers.data.pair_contexts import read_pairs
from performers.errors import InputError, MissingExtraError, RunError
from performers.randomness import derive_seed
from performers.tools.composition import composition_of, unusual
from performers.tools.partners import PartnerEffect, said_of

if TYPE_CHECKING:
    from performers.tools.language_model import LanguageModel

SETS = {
    "natural": "natural, held out",
    "designs": "designs",
    "shuffled": "natural, shuffled",
    "markov": "Markov chain",
    "frequencies": "residue frequencies",
}
CONTINUATIONS = {
    "natural": "the member itself",
    "designs": "designs",
    "shuffled": "the member, shuffled",
    "frequencies": "residue frequencies",
}
_RESAMPLES = 1000
_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DesignSettings:
    """What `measure_design` measures.

    Attributes:
        model: the causal model: its folder or name; None for the bundled one.
        judge: a masked model, likewise.
        natural: FASTA sources of held-out proteins.
        proteins: of each set that is judged.
        length: residues of each.
        families: families that designs are made for; 0 for none.
        prompt: residues that such a design goes on from.
        designs: for each family.
        pairs: a table of held-out interacting proteins, or None.
        partners: FASTA sources of those.
        most_pairs: at most so many of them are read, in either order.
        longest: residues; pairs with a longer protein are left out.
        label: whether the effect of partners is written into the model's folder.
        device, threads, seed: as everywhere.
    """

    model: str | None = None
    judge: str | None = None
    natural: Sequence[str] = ("bundled:test",)
    proteins: int = 200
    length: int = 100
    families: int = 20
    prompt: int = 30
    designs: int = 8
    pairs: str | None = None
    partners: Sequence[str] = ()
    most_pairs: int = 300
    longest: int = 500
    label: bool = False
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> DesignSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: a number is out of range, or pairs come without their proteins.
        """
        defaults: dict[str, Any] = {}
        if quick:
            defaults = {
                "proteins": 8,
                "length": 24,
                "families": 1,
                "designs": 2,
                "prompt": 20,
                "most_pairs": 6,
                "longest": 200,
            }
        settings = cls(**{**defaults, **{key: value for key, value in given.items() if value is not None}})
        if settings.proteins < 2 or settings.length < 2 or min(settings.prompt, settings.designs) < 1:
            raise InputError("Expected at least two proteins of two residues, a prompt of one, and one design.")
        if (settings.pairs is None) != (not settings.partners):
            raise InputError("--pairs and --partners belong together: a table of pairs, and their sequences.")
        if settings.label and settings.pairs is None:
            raise InputError("--label writes the effect of partners into the model's folder: expected --pairs.")
        return settings


def measure_design(
    settings: DesignSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Measures whatever the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `design.json`, the picture, `run.json`, `cells.jsonl` and, with pairs, `partner-effect.json`.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report: a cell for each set, family and order of pairs, and "partner", the effect of partners, or None.

    Raises:
        InputError: a setting, a model or a file is not in order.
        RunError: nothing could be measured.
    """
    from performers.models.bundled import CAUSAL
    from performers.tools.language_model import LanguageModel
    from performers.training.distributed import use_threads

    with use_threads(settings.threads):
        model = LanguageModel.open(settings.model, device=settings.device, default=CAUSAL)
        judge = LanguageModel.open(settings.judge, device=settings.device)
        if not model.is_causal or not judge.can_mask:
            raise InputError("Expected a causal model to make designs, and a masked one to judge them.")
        with Experiment("design", asdict(settings), output, quick=quick, restart=restart) as experiment:
            where = {"model": _hash(model), "judge": _hash(judge)}
            shape = {"seed": settings.seed, "proteins": settings.proteins, "length": settings.length}
            experiment.measure(
                [{"part": "judged", "set": name, **shape, "natural": list(settings.natural), **where} for name in SETS],
                lambda cell, before: _judged(cell, model, judge),
                name=lambda cell: SETS[cell["set"]],
                result=lambda figures: f"pseudo-perplexity {figures['perplexity']:.2f}",
            )
            shape = {"seed": settings.seed, "prompt": settings.prompt, "designs": settings.designs}
            families = families_of_equals(settings.families, settings.prompt, settings.seed)
            experiment.measure(
                [{"part": "families", "family": name, **shape, "model": where["model"]} for name in families],
                lambda cell, before: _continued(cell, families[cell["family"]], model),
                name=lambda cell: f"family {cell['family']}",
                result=lambda figures: f"{figures['hits']['designs']:.0%} of designs hit their profile",
            )
            effect = None
            if settings.pairs is not None:
                (cell,) = experiment.measure(
                    [_partner_cell(settings, where["model"])],
                    lambda cell, before: _partnered(settings, model),
                    name=lambda cell: "partners",
                    result=lambda figures: f"{figures['gain']:+.4f} nats per residue",
                )
                if cell["status"] == DONE:
                    effect = _effect(cell, model)
                    effect.save(Path(output))
                    if settings.label:
                        effect.save(model.folder)
            return experiment.report(draw, partner=None if effect is None else asdict(effect))


def _hash(model: LanguageModel) -> str:
    return hashlib.sha256(json.dumps(model.weights_fingerprint(), sort_keys=True).encode()).hexdigest()


# Judged by a second model.


def _judged(cell: Cell, model: LanguageModel, judge: LanguageModel) -> Figures:
    from performers.tools.language_model import Unread
    from performers.tools.likelihood import pseudo_log_likelihoods

    natural = beginnings(cell["natural"], cell["length"], cell["proteins"], cell["seed"])
    sequences = list(_set(cell["set"], natural, model, cell["seed"]))
    read = pseudo_log_likelihoods(judge, [(sequence,) for sequence in sequences])
    found = np.array([value / cell["length"] for value in read if not isinstance(value, Unread)])
    if len(found) < len(read):
        raise RunError(f"{len(read) - len(found)} of {len(read)} sequences could not be read by the judge.")
    low, high = _bootstrap(found, cell["seed"])
    odd = sum(bool(unusual(sequence, composition_of(sequence))) for sequence in sequences)
    return {
        "status": DONE,
        "perplexity": float(np.exp(-found.mean())),
        "low": float(np.exp(-high)),
        "high": float(np.exp(-low)),
        "unusual": odd / len(sequences),
    }


def _set(name: str, natural: list[str], model: LanguageModel, seed: int) -> Iterator[str]:
    """As many sequences of a set, as long as the natural ones."""
    from performers.tools.generation import generate

    if name == "natural":
        yield from natural
    elif name == "designs":
        for design in generate(model, count=len(natural), length=len(natural[0]), seed=seed):
            yield design.sequence
    elif name == "shuffled":
        for number, sequence in enumerate(natural):
            yield shuffled(sequence, seed, number)
    else:
        chain = markov_chain() if name == "markov" else INDEPENDENT
        for number, sequence in enumerate(natural):
            yield walk(chain, len(sequence), seed, name, number)


def _bootstrap(values: _Floats, seed: int) -> tuple[float, float]:
    """The 95 % interval of a mean."""
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "bootstrap")))
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _mean_bits(values: list[float], seed: int) -> str:
    low, high = _bootstrap(np.array(values), seed)
    return f"{np.mean(values):.1f} ({low:.1f} to {high:.1f})"


# Judged by a profile.


def _continued(cell: Cell, members: list[Record], model: LanguageModel) -> Figures:
    from performers.tools.generation import generate

    try:
        profile = Profile(members[1:])
    except MissingExtraError as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    member, prompt, seed = members[0].sequence, cell["prompt"], cell["seed"]
    rest = member[prompt:]
    made = generate(model, count=cell["designs"], length=len(member), prompt=member[:prompt], seed=seed)
    sets = {
        "natural": [rest],
        "designs": [design.sequence[prompt:] for design in made],
        "shuffled": [shuffled(rest, seed, number) for number in range(cell["designs"])],
        "frequencies": [walk(INDEPENDENT, len(rest), seed, "rest", number) for number in range(cell["designs"])],
    }
    found = {name: profile.scores(sequences) for name, sequences in sets.items()}
    return {
        "status": DONE,
        "members": len(members) - 1,
        "hits": {name: float(np.mean([hit for _, hit in scores])) for name, scores in found.items()},
        "bits": {name: float(np.mean([bits for bits, _ in scores])) for name, scores in found.items()},
    }


# Partners.


def _partner_cell(settings: DesignSettings, model: str) -> Cell:
    assert settings.pairs is not None
    return {
        "part": "partner",
        "pairs": settings.pairs,
        "partners": list(settings.partners),
        "most_pairs": settings.most_pairs,
        "longest": settings.longest,
        "seed": settings.seed,
        "model": model,
    }


def _partnered(settings: DesignSettings, model: LanguageModel) -> Figures:
    from performers.tools.interactions.figures import interval, resampled_weights
    from performers.tools.likelihood import Past, log_likelihoods

    assert settings.pairs is not None
    corpus = in_memory_corpus(read_fasta(list(settings.partners)))
    true = read_pairs(settings.pairs, corpus)
    chosen = _chosen(corpus, true, settings)
    others = shuffled_partners(chosen, true, np.asarray(corpus.lengths))
    texts = {index: record.sequence for index, record in enumerate(corpus.records()) if index in set(chosen.ravel())}
    gains = np.empty((len(chosen), 2))
    for row, ((partner, binder), other) in enumerate(zip(chosen.tolist(), others.tolist(), strict=True)):
        after, after_other, alone = (
            float(log_likelihoods(model, [texts[binder]], past)[0])
            for past in (Past.of(model, [texts[partner]]), Past.of(model, [texts[other]]), None)
        )
        gains[row] = (after - after_other) / len(texts[binder]), (after - alone) / len(texts[binder])
    drawn = np.array(
        [
            (weights[:, None] * gains).sum(0) / weights.sum() if weights.sum() else [np.nan, np.nan]
            for weights in resampled_weights(chosen, settings.seed)
        ]
    )
    (low, high), (alone_low, alone_high) = interval(drawn[:, 0]), interval(drawn[:, 1])
    return {
        "status": DONE,
        "gain": float(gains[:, 0].mean()),
        "low": low,
        "high": high,
        "gain_over_none": float(gains[:, 1].mean()),
        "over_none_low": alone_low,
        "over_none_high": alone_high,
        "positive": float((gains[:, 0] > 0).mean()),
        "orders": len(chosen),
        "proteins": len(np.unique(chosen)),
    }


def _chosen(corpus: Corpus, true: _Ints, settings: DesignSettings) -> _Ints:
    """Some pairs of proteins that are short enough, (2 K, 2): partner and binder, in either order."""
    short = true[np.asarray(corpus.lengths)[true].max(axis=1) <= settings.longest]
    if len(short) < 2:
        raise InputError(
            f"{settings.pairs} has {len(short)} true pairs of proteins up to {settings.longest:,} residues: expected more."
        )
    order = np.argsort(bits(len(short), settings.seed, "pairs"), kind="stable")
    kept = short[np.sort(order[: settings.most_pairs])]
    return np.concatenate((kept, kept[:, ::-1]))


def shuffled_partners(chosen: _Ints, true: _Ints, lengths: _Ints) -> _Ints:
    """For each (partner, binder) another partner of about the same length: none of the binder's own, nor the binder itself.

    Raises:
        InputError: some binder has no other.
    """
    known = {tuple(sorted(pair)) for pair in true.tolist()}
    partners = np.unique(chosen[:, 0])
    partners = partners[np.argsort(lengths[partners], kind="stable")]
    found: list[int] = []
    for partner, binder in chosen.tolist():
        by_length = partners[np.argsort(np.abs(lengths[partners] - lengths[partner]), kind="stable")].tolist()
        other = next(
            (one for one in by_length if one not in (partner, binder) and tuple(sorted((one, binder))) not in known),
            None,
        )
        if other is None:
            raise InputError("The pairs are too few to find every binder another protein: expected more of them.")
        found.append(other)
    return np.array(found)


def _effect(cell: Figures, model: LanguageModel) -> PartnerEffect:
    weights = {file.name for file in model.weights}
    return PartnerEffect(
        gain=cell["gain"],
        low=cell["low"],
        high=cell["high"],
        pairs=cell["orders"] // 2,
        weights={name: digest for name, digest in model.weights_fingerprint().items() if name in weights},
    )


# The report.


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables: a title, a header and rows for each."""
    settings = report["settings"]
    done = [cell for cell in report["cells"] if cell["status"] == DONE]
    judged = [
        [
            SETS[cell["set"]],
            f"{cell['perplexity']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]",
            f"{cell['unusual']:.0%}",
        ]
        for cell in done
        if cell["part"] == "judged"
    ]
    title = (
        f"Pseudo-perplexity by the judge, first {settings['length']} residues of {settings['proteins']} sequences each"
    )
    found = [(title, ["sequences", "pseudo-perplexity", "unusual composition"], judged)]
    families = [cell for cell in done if cell["part"] == "families"]
    if families:
        rows = [
            [
                CONTINUATIONS[name],
                f"{np.mean([cell['hits'][name] for cell in families]):.0%}",
                _mean_bits([cell["bits"][name] for cell in families], settings["seed"]),
            ]
            for name in CONTINUATIONS
        ]
        title = (
            f"What follows the first {settings['prompt']} residues of a member, by profiles of {len(families)} families "
            "(95 % interval over them)"
        )
        found.append((title, ["continuation", f"hits (E <= {E_VALUE:g})", "bits"], rows))
    partner = next((cell for cell in done if cell["part"] == "partner"), None)
    if partner is not None:
        rows = [
            ["another protein of its length", _with_interval(partner, "gain", "low", "high")],
            ["no partner", _with_interval(partner, "gain_over_none", "over_none_low", "over_none_high")],
        ]
        title = (
            f"log P(binder | true partner) less that after ..., nats per residue: {partner['orders']:,} orders of pairs, "
            f"{partner['proteins']:,} proteins"
        )
        found.append((title, ["instead", "gain"], rows))
        found.append(("Do designs heed a partner?", ["verdict"], [[said_of(PartnerEffect(**report["partner"]))]]))
    return found


def _with_interval(cell: Figures, *keys: str) -> str:
    value, low, high = (cell[key] for key in keys)
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the pseudo-perplexities with their intervals."""
    from matplotlib.figure import Figure

    cells = [cell for cell in report["cells"] if cell["part"] == "judged" and cell["status"] == DONE]
    figure = Figure(figsize=(6, 2.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    middle = [cell["perplexity"] for cell in cells]
    errors = np.array([[cell["perplexity"] - cell["low"], cell["high"] - cell["perplexity"]] for cell in cells]).T
    colours = ["#d1495b" if cell["set"] == "designs" else "#0b3c5d" for cell in cells]
    axes.barh([SETS[cell["set"]] for cell in cells], middle, xerr=errors, color=colours, height=0.6)
    axes.invert_yaxis()
    quick = " (quick settings)" if report["quick"] else ""
    axes.set(xlabel="pseudo-perplexity by a masked model", title=f"Designs, judged by a second model{quick}")
    path = folder / "design.png"
    figure.savefig(path)
    return [path]
