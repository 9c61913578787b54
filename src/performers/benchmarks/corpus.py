"""What size costs: building and reading corpora of up to 10^9 residues, and embedding 10^6 records; rates and peak memory.

The proteins are synthetic: 50 to 650 residues drawn uniformly, in FASTA files of the same size. Every figure comes from a Python
process of its own. Files are in the system's cache when they are read, as far as there is room for them. Beside seconds on the
clock stand those that the processors worked, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from performers.benchmarks.experiment import DONE, Cell, Experiment, Figures
from performers.benchmarks.isolation import run_alone
from performers.errors import InputError
from performers.folders import room_for
from performers.memory import forget_peak, peak_memory
from performers.randomness import derive_seed

_LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)
_SHORTEST, _LONGEST = 50, 650
# Rows as the bundled models were trained on, and as in the paper's experiment with long contexts.
_READINGS = (("packed", 1024), ("concatenated", 8192))


@dataclass(frozen=True)
class CorpusSettings:
    """What `measure_corpus` measures.

    Attributes:
        residues: sizes of corpora; each is read, and the largest is built with every number of workers.
        workers: numbers of processes.
        files: FASTA files that a corpus is built from.
        contexts: rows to read.
        records: short proteins to embed with a model of two layers, one size after the other; memory should not follow.
        seed: of the proteins.
        device: of the embedding.
    """

    residues: Sequence[int] = (10**6, 10**8, 10**9)
    workers: Sequence[int] = (1, 2)
    files: int = 16
    contexts: int = 20_000
    records: Sequence[int] = (10**4, 10**5, 10**6)
    seed: int = 0
    device: str = "cpu"

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> CorpusSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: a number that is not in order.
        """
        defaults: dict[str, Any] = {}
        if quick:
            defaults = {"residues": (10**4, 10**5), "files": 3, "contexts": 100, "records": (50, 100)}
        settings = cls(**{**defaults, **{key: value for key, value in given.items() if value is not None}})
        if not settings.residues or min(settings.residues) < 1000 * settings.files or settings.files < 1:
            raise InputError("--residues: expected at least 1,000 for each of the files.")
        if not settings.workers or min(settings.workers) < 1 or min(settings.records, default=1) < 1:
            raise InputError("--workers and --records: expected positive numbers.")
        return settings


def measure_corpus(
    settings: CorpusSettings, output: str | Path, *, quick: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Measures whatever the output folder does not hold yet, and writes the report.

    Arguments:
        settings: what to measure.
        output: a folder for `corpus.json`, `run.json` and `cells.jsonl`; the proteins are in it too, until all is measured.
        quick: whether the settings are too small to mean anything.
        restart: measure again what the folder holds.

    Returns:
        The report: a cell for every build, reading and embedding.

    Raises:
        InputError: a setting is not valid, or the folder is in use for something else.
        DiskFullError: there is no room for the proteins.
        RunError: nothing could be measured.
    """
    sizes, most = sorted(set(settings.residues)), max(settings.workers)
    shared = {"files": settings.files, "seed": settings.seed}
    builds = [(size, most) for size in sizes[:-1]] + [(sizes[-1], workers) for workers in sorted(set(settings.workers))]
    cells: list[Cell] = [{"what": "build", "residues": size, "workers": workers, **shared} for size, workers in builds]
    cells += [
        {"what": "read", "residues": size, "mode": mode, "length": length, "contexts": settings.contexts, **shared}
        for mode, length in _READINGS
        for size in sizes
    ]
    cells += [
        {"what": "embed", "records": records, "seed": settings.seed, "device": settings.device}
        for records in settings.records
    ]
    with Experiment("corpus", asdict(settings), output, quick=quick, restart=restart) as experiment:
        folder = experiment.log.folder / "proteins"

        def measure(cell: Cell, before: list[Figures]) -> Figures:
            with room_for(folder, 3 * cell.get("residues", 0)):
                folder.mkdir(exist_ok=True)
            arguments = {key: value for key, value in cell.items() if key != "what"}
            return run_alone(f"performers.benchmarks.corpus:measure_{cell['what']}", folder=str(folder), **arguments)

        experiment.measure(cells, measure, name=_name, result=_result)
        shutil.rmtree(folder, ignore_errors=True)
        return experiment.report(lambda report, where: [])


def measure_build(*, folder: str, residues: int, workers: int, files: int, seed: int) -> Figures:
    """Seconds and peak memory of building a corpus; `peak_bytes` is the largest of any one of its processes."""
    from performers.data import build_corpus

    sources = _sources(Path(folder), residues, files, seed)
    target = Path(folder) / f"corpus-{residues}"
    shutil.rmtree(target, ignore_errors=True)
    forget_peak()
    started = time.perf_counter()
    cpu_before = _cpu_seconds()
    corpus = build_corpus(sources, target, workers=workers)
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - cpu_before
    unit = 1 if sys.platform == "darwin" else 1024
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return {
        "status": DONE,
        "proteins": len(corpus),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "residues_per_second": corpus.num_residues / seconds,
        "peak_bytes": max(peak_memory(), largest),
    }


def measure_read(
    *, folder: str, residues: int, mode: str, length: int, contexts: int, files: int, seed: int
) -> Figures:
    """Contexts read in a second, and the seconds until the first one is there."""
    from performers.data import Contexts, Corpus, build_corpus

    target = Path(folder) / f"corpus-{residues}"
    if not target.exists():
        build_corpus(_sources(Path(folder), residues, files, seed), target)
    forget_peak()
    cpu_started = _cpu_seconds()
    rows = Contexts(Corpus.open(target), length, mode, seed=seed)  # pyright: ignore[reportArgumentType]
    rows.rows([0])
    begun, cpu_begun = time.perf_counter(), _cpu_seconds()
    for first in range(0, contexts, 16):
        rows.rows(range(first, first + 16))
    return {
        "status": DONE,
        "cpu_seconds_to_first": cpu_begun - cpu_started,
        "cpu_seconds": _cpu_seconds() - cpu_begun,
        "contexts_per_second": contexts / (time.perf_counter() - begun),
        "peak_bytes": peak_memory(),
    }


def measure_embed(*, folder: str, records: int, seed: int, device: str) -> Figures:
    """Records embedded in a second with a tiny model, from FASTA to an .npz file."""
    import torch

    from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
    from performers.tools import embed_to

    model, fasta, output = (Path(folder) / name for name in ("tiny", f"short-{records}.fasta", f"short-{records}.npz"))
    if not model.exists():
        torch.manual_seed(derive_seed(seed, "tiny model"))
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        tiny = PerformerForMaskedLM(
            PerformerConfig(**sizes, intermediate_size=32, attention_kwargs={"num_features": 8})
        )
        tiny.save_pretrained(model)
        PerformerTokenizer().save_pretrained(model)
    _write_fasta(fasta, 30 * records, derive_seed(seed, "short proteins"), shortest=20, longest=40, count=records)
    torch.set_num_threads(1)
    forget_peak()
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    outcome = embed_to(output, [str(fasta)], model, device=device, restart=True)
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - cpu_started
    fasta.unlink()
    output.unlink()
    return {
        "status": DONE,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "records_per_second": outcome.items / seconds,
        "peak_bytes": peak_memory(),
    }


def _cpu_seconds() -> float:
    """What the processors have worked for this process and those that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _sources(folder: Path, residues: int, files: int, seed: int) -> list[Path]:
    """The FASTA files of a size, written unless they are there."""
    paths = [folder / f"proteins-{residues}-{number:03d}.fasta" for number in range(files)]
    for number, path in enumerate(paths):
        if not path.exists():
            _write_fasta(path, residues // files, derive_seed(seed, "proteins", residues, number))
    return paths


def _write_fasta(
    path: Path,
    residues: int,
    seed: int,
    *,
    shortest: int = _SHORTEST,
    longest: int = _LONGEST,
    count: int | None = None,
) -> None:
    """Random proteins until there are that many residues, or so many proteins."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    temporary = path.with_suffix(".writing")
    written = number = 0
    with temporary.open("wb") as stream:
        while number < count if count is not None else written < residues:
            lengths = generator.integers(shortest, longest + 1, size=4096)
            text = _LETTERS[generator.integers(0, 20, size=int(lengths.sum()), dtype=np.uint8)].tobytes()
            start = 0
            for length in lengths.tolist():
                if number == count or (count is None and written >= residues):
                    break
                size = length if count is not None else min(length, residues - written)
                number, written = number + 1, written + size
                stream.write(b">synthetic|%s|%d\n%s\n" % (path.stem.encode(), number, text[start : start + size]))
                start += length
    temporary.rename(path)


def _name(cell: Cell) -> str:
    if cell["what"] == "embed":
        return f"embed {cell['records']:,} records"
    how = f"{cell['workers']} workers" if cell["what"] == "build" else f"{cell['mode']} rows of {cell['length']:,}"
    return f"{cell['what']} {cell['residues']:,} residues, {how}"


def _result(figures: Figures) -> str:
    rate, what = next((figures[key], key) for key in figures if key.endswith("_per_second"))
    return f"{rate:,.0f} {what.removesuffix('_per_second')} a second, {figures['peak_bytes'] / 2**20:,.0f} MiB"


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of what the command prints."""
    cells = [cell for cell in report["cells"] if cell["status"] == DONE]

    def figures(cell: Figures, total: float) -> list[str]:
        """The rate by the clock and by the processors' work, that work in seconds, and the peak."""
        rate = next(cell[key] for key in cell if key.endswith("_per_second"))
        peak = f"{cell['peak_bytes'] / 2**20:,.0f}"
        return [f"{rate:,.0f}", f"{total / cell['cpu_seconds']:,.0f}", f"{cell['cpu_seconds']:,.1f}", peak]

    def rows(what: str, about: Callable[[Figures], list[str]], total: str) -> list[list[str]]:
        return [[*about(cell), *figures(cell, cell[total])] for cell in cells if cell["what"] == what]

    def header(what: str) -> list[str]:
        return [f"{what}/s", f"{what}/CPU s", "CPU s", "peak MiB"]

    return [
        (
            "Building: the peak is that of the largest process",
            ["residues", "proteins", "workers", *header("residues")],
            rows("build", lambda c: [f"{c['residues']:,}", f"{c['proteins']:,}", str(c["workers"])], "residues"),
        ),
        (
            "Reading, one row after the other",
            ["contexts", "tokens", "residues", "CPU s to the first", *header("contexts")],
            rows(
                "read",
                lambda c: [
                    c["mode"],
                    f"{c['length']:,}",
                    f"{c['residues']:,}",
                    f"{c['cpu_seconds_to_first']:,.2f}",
                ],
                "contexts",
            ),
        ),
        (
            "Embedding short proteins with a tiny model",
            ["records", *header("records")],
            rows("embed", lambda c: [f"{c['records']:,}"], "records"),
        ),
    ]
