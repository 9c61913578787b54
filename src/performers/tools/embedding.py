"""`embed`: proteins in, vectors out.

The vector of a protein is the mean over its residues (the start and end tokens are left out), or that of its start token ("cls");
the vectors of its residues are "per_tok". Layer -1 is the last, after the final norm; 0 is the embeddings that go into the first.
Several chains in one record are read isolated (each alone, positions from the start) or jointly (they see each other, positions
still from the start of each; Performers only), and their residues follow one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from performers import __version__
from performers.data import MAX_LENGTH, FastaReport
from performers.data.fasta import OnInvalid
from performers.errors import InputError, UnsupportedError
from performers.tools.embedding_files import FORMATS, check_format, write_embeddings
from performers.tools.engine import EngineName, choose_engine, use_own_gpu
from performers.tools.jobs import run_tool
from performers.tools.language_model import LanguageModel, Unread
from performers.tools.proteins import Protein, Proteins, read_proteins
from performers.tools.tool import Arrays, Outcome, Result, Tool, results_of

Include: TypeAlias = Literal["mean", "per_tok", "cls"]
Chains: TypeAlias = Literal["isolated", "joint"]

_WHAT = {
    "mean": "the mean over the residues",
    "per_tok": "one vector per residue",
    "cls": "the vector of the start token",
}


@dataclass(frozen=True)
class Embedding:
    """What a model makes of one protein of L residues. With a single layer asked for, the leading axis is left out.

    Attributes:
        id, description: as in the input.
        number: the position in the input, counted from 1.
        layers: n layer numbers.
        mean: (n, d) float32, or None if not asked for.
        cls: (n, d) float32, or None.
        per_tok: (n, L, d) float16, or None.
    """

    id: str
    description: str
    number: int
    layers: tuple[int, ...]
    mean: npt.NDArray[np.float32] | None = None
    cls: npt.NDArray[np.float32] | None = None
    per_tok: npt.NDArray[np.float16] | None = None


class Embedder(Tool[Protein]):
    """`embed` as a `Tool`.

    Arguments:
        model: what reads.
        proteins: as `read_proteins` takes them.
        include: which vectors.
        layers: numbers, counted from 0 (embeddings) or from the end.
        chains: how several chains in one record are read.
        toks_per_batch: tokens in one forward pass.
        max_length, on_invalid: as in `read_proteins`.
        file_format: of the output, one of `FORMATS`.

    Raises:
        InputError: an argument is out of range.
        UnsupportedError: the model cannot read chains jointly.
    """

    command: ClassVar[str] = "embed"

    def __init__(
        self,
        model: LanguageModel,
        proteins: Proteins,
        *,
        include: Sequence[Include] = ("mean",),
        layers: Sequence[int] = (-1,),
        chains: Chains = "isolated",
        toks_per_batch: int = 16_384,
        max_length: int = MAX_LENGTH,
        on_invalid: OnInvalid = "error",
        file_format: str = "h5",
    ) -> None:
        for what in include:
            if what not in get_args(Include):
                raise InputError(f"include has {what!r}: expected {', '.join(get_args(Include))}.")
        if not include or not layers or toks_per_batch < 1:
            raise InputError("Nothing is asked for: expected at least one vector to include, one layer and one token.")
        if chains not in get_args(Chains):
            raise InputError(f"chains is {chains!r}: expected 'isolated' or 'joint'.")
        if chains == "joint" and not model.is_performer:
            raise UnsupportedError(f"{model.folder}: only a Performer can read several chains jointly.")
        self.model, self.proteins = model, proteins
        self.include = tuple(what for what in get_args(Include) if what in include)
        self.layers = tuple(dict.fromkeys(model.layer(layer) for layer in layers))
        self.chains, self.toks_per_batch = chains, toks_per_batch
        self.max_length, self.file_format = max_length, file_format
        self.makes_folder = file_format == "pt"
        self.on_invalid: OnInvalid = on_invalid

    def items(self, report: FastaReport) -> Iterator[Protein]:
        """The proteins."""
        return read_proteins(self.proteins, max_length=self.max_length, on_invalid=self.on_invalid, report=report)

    def to_json(self, item: Protein) -> Any:
        """A list of four."""
        return item

    def from_json(self, content: Any) -> Protein:
        """The protein in a list of four."""
        identifier, description, chains, number = content
        return Protein(identifier, description, tuple(chains), number)

    def label(self, item: Protein) -> tuple[int, str]:
        """Number and identifier."""
        return item.number, item.id

    def tokens(self, item: Protein) -> int:
        """Residues, and two tokens for each chain."""
        return item.length + 2 * len(item.chains)

    def longest(self, item: Protein) -> int:
        """The tokens of its longest row."""
        return self.tokens(item) if self.chains == "joint" else max(map(len, item.chains)) + 2

    def refusal(self, item: Protein) -> str | None:
        """Why the model has no positions for it, if so."""
        return self.model.refusal(self.longest(item))

    def num_bytes(self, item: Protein) -> int:
        """Its arrays and what the formats put around them."""
        vectors = ("mean" in self.include) + ("cls" in self.include)
        per_layer = 4 * vectors + 2 * item.length * ("per_tok" in self.include)
        return len(self.layers) * self.model.hidden_size * per_layer + len(item.id) + 512

    def compute(self, items: Sequence[Protein]) -> Sequence[Result]:
        """For each protein the arrays of `Embedding`, with the axis of the layers."""
        owners: list[int] = []
        rows = []
        for number, protein in enumerate(items):
            for group in [protein.chains] if self.chains == "joint" else [(chain,) for chain in protein.chains]:
                owners.append(number)
                rows.append(self.model.row(group))
        parts: list[dict[int, _Part | Unread]] = [{} for _ in items]
        for index, reading in self.model.read(rows, layers=self.layers, toks_per_batch=self.toks_per_batch):
            part = (
                reading
                if isinstance(reading, Unread)
                else self._part(list(reading.hidden.values()), rows[index].residues)
            )
            parts[owners[index]][index] = part
        return [
            self._joined([found[index] for index in sorted(found)], item.length)
            for item, found in zip(items, parts, strict=True)
        ]

    def _part(self, states: list[Tensor], residues: npt.NDArray[np.int64]) -> _Part:
        """The vectors of one row, given its hidden states (T, d) of each layer."""
        first, last = int(residues[0]), int(residues[-1])
        is_one_piece = last - first + 1 == len(residues)
        chosen = [state[first : last + 1] if is_one_piece else state[residues] for state in states]
        part: _Part = {}
        if "mean" in self.include:
            part["sum"] = np.stack([state.sum(0).cpu().numpy() for state in chosen])
        if "cls" in self.include:
            part["cls"] = np.stack([state[0].cpu().numpy() for state in states])
        if "per_tok" in self.include:
            part["per_tok"] = np.stack([state.half().cpu().numpy() for state in chosen])
        return part

    def _joined(self, parts: Sequence[_Part | Unread], length: int) -> Result:
        """The vectors of a protein, given those of its rows in order."""
        read: list[_Part] = []
        for part in parts:
            if isinstance(part, Unread):
                return part
            read.append(part)
        arrays: dict[str, npt.NDArray[Any]] = {}
        if "mean" in self.include:
            arrays["mean"] = np.stack([part["sum"] for part in read]).sum(axis=0, dtype=np.float32) / np.float32(length)
        if "cls" in self.include:
            arrays["cls"] = read[0]["cls"]
        if "per_tok" in self.include:
            arrays["per_tok"] = np.concatenate([part["per_tok"] for part in read], axis=1)
            if not np.isfinite(arrays["per_tok"]).all():
                return Unread("the vectors of its residues do not fit into float16; ask for the mean alone")
        return arrays

    def write(self, results: Iterable[tuple[Protein, Result]], path: Path) -> None:
        """An output of the format."""
        about = {"model": self.model.name, "layers": list(self.layers), "chains": self.chains, "version": __version__}
        write_embeddings(results, path, self.file_format, include=self.include, layers=self.layers, about=about)

    def methods(self, outcome: Outcome) -> str:
        """Two sentences."""
        layers = ", ".join(
            f"{layer} (after the final norm)" if layer == self.model.num_layers else str(layer) for layer in self.layers
        )
        what = ", ".join(_WHAT[name] for name in self.include)
        return (
            f"Embeddings of {outcome.items - len(outcome.failed):,} proteins ({what}; layer {layers}) were computed with "
            f"performers {__version__} from the protein language model {self.model.name} "
            f"({self.model.num_parameters:,} parameters). "
            f"Every protein was read whole, {self.model.company()}, in {str(self.model.dtype).removeprefix('torch.')}, "
            "and start and end tokens were left out of the means."
        )


_Part: TypeAlias = dict[str, npt.NDArray[Any]]


def embed(
    proteins: Proteins,
    model: LanguageModel | str | Path | None = None,
    *,
    include: Sequence[Include] = ("mean",),
    layers: Sequence[int] = (-1,),
    chains: Chains = "isolated",
    toks_per_batch: int = 16_384,
    max_length: int = MAX_LENGTH,
    on_invalid: OnInvalid = "error",
    device: str = "auto",
    dtype: str = "auto",
    context: str | Path | None = None,
    failures: list[tuple[int, str, str]] | None = None,
) -> Iterator[Embedding]:
    """The embeddings of proteins, in order, in bounded memory.

    ```text
    for embedding in embed("proteins.fasta", "run/model"):
        print(embedding.id, embedding.mean.shape)
    ```

    Arguments:
        proteins: a FASTA, A3M, CSV, parquet, PDB or mmCIF file, several of them, or records.
        model: a Performer, a converted model or a Hugging Face protein model: its folder, or opened; None for the bundled one.
        include, layers, chains, toks_per_batch, max_length, on_invalid: as in `Embedder`.
        device, dtype, context: as in `LanguageModel.open`, for a folder.
        failures: gets number, identifier and reason of each protein that fails and is left out; without it the first raises.

    Raises:
        InputError: an argument or a protein is not valid; FastaError, CheckpointError and UnsupportedError as above.
        RunError: a protein failed and nobody takes the failures.
    """
    if not isinstance(model, LanguageModel):
        model = LanguageModel.open(model, device=device, dtype=dtype, context=context)
    tool = Embedder(
        model,
        proteins,
        include=include,
        layers=layers,
        chains=chains,
        toks_per_batch=toks_per_batch,
        max_length=max_length,
        on_invalid=on_invalid,
    )
    return (
        Embedding(protein.id, protein.description, protein.number, tool.layers, **_without_axis(arrays))
        for protein, arrays in results_of(tool, tool.items(FastaReport()), failures)
    )


def _without_axis(arrays: Arrays) -> dict[str, Any]:
    return {name: array[0] if len(array) == 1 else array for name, array in arrays.items()}


def embed_to(
    output: str | Path,
    sources: Sequence[str],
    model: str | Path | None = None,
    *,
    file_format: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    context: str | Path | None = None,
    dry_run: bool = False,
    restart: bool = False,
    engine: EngineName = "auto",
    workers: int | None = None,
    **options: Any,
) -> Outcome:
    """`embed` into a file or folder, resumed where it was interrupted.

    Arguments:
        output: an .h5, .npz or .parquet file, or a folder for one .pt file per protein.
        sources: files, "-" or "bundled:NAME".
        model: a folder; None for the bundled model.
        file_format: one of `FORMATS`; None tells it from the output's ending.
        device, dtype, context: as in `LanguageModel.open`.
        dry_run, restart: as in `run_tool`.
        engine, workers: where the work is done; as in `performers.tools.engine.choose_engine`.
        options: those of `Embedder`.

    Raises:
        InputError, RunError: as in `run_tool` and `Embedder`.
    """
    chosen = check_format(output, file_format)
    chosen_engine = choose_engine(engine, workers)
    use_own_gpu()
    opened = LanguageModel.open(model, device=device, dtype=dtype, context=context)
    tool = Embedder(opened, sources, file_format=chosen, **options)
    settings = {
        "include": tool.include,
        "layers": tool.layers,
        "chains": tool.chains,
        "toks_per_batch": tool.toks_per_batch,
        "max_length": tool.max_length,
        "on_invalid": tool.on_invalid,
        "format": chosen,
    }
    return run_tool(
        tool, output, sources=sources, settings=settings, dry_run=dry_run, restart=restart, engine=chosen_engine
    )


__all__ = ["FORMATS", "Embedder", "Embedding", "embed", "embed_to"]
