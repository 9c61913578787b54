"""Embeddings as files: HDF5, npz, parquet, and one .pt per protein as fair-esm writes them.

All take the same stream of proteins with their arrays, in order and with bounded memory, and give the same bytes for the same
stream. A protein that failed is left out of the file. Identifiers never become paths.

- .h5: a dataset per protein under its identifier, with `/` as `%2F` and repeats as `#2`, `#3`, ...; in attrs["id"] the identifier
  as it was. Where more than one kind of vector was asked for, the key is a group that holds them by name.
- .npz: `ids` (N,), `lengths` (N,) and, for each kind, all proteins in one array: `mean` and `cls` (N, d), `per_tok` (sum of the
  lengths, d), protein after protein.
- .parquet: a row per protein: `id`, `length`, and a list of numbers for each kind.
- pt: a folder of NAME.pt files, dictionaries with `label`, `representations`, `mean_representations`, `bos_representations`, by
  layer.

With more than one layer there is one more axis, in front of d (HDF5: in front of all), or a column for each layer (parquet).
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from performers.errors import InputError, MissingExtraError
from performers.tools.language_model import Unread
from performers.tools.proteins import Protein
from performers.tools.tool import Arrays, Result

FORMATS = ("h5", "npz", "parquet", "pt")
_ENDINGS = {".h5": "h5", ".hdf5": "h5", ".npz": "npz", ".parquet": "parquet", "": "pt"}
_ROWS_AT_A_TIME, _NUMBERS_AT_A_TIME = 512, 1 << 24
_MAX_NAME = 200  # bytes of a file name, of the 255 that file systems take

Found = Iterable[tuple[Protein, Arrays]]


def check_format(output: str | Path, file_format: str | None) -> str:
    """The format of an output, by name or by its ending.

    Raises:
        InputError: there is no such format, or the ending says none.
        MissingExtraError: the format needs a package that is not installed.
    """
    ending = Path(output).suffix.lower()
    chosen = _ENDINGS.get(ending) if file_format is None else file_format
    if chosen not in FORMATS or (ending == "" and chosen != "pt"):
        raise InputError(
            f"{output}: expected a name that ends in .h5, .npz or .parquet, or a folder for one .pt file per protein."
        )
    if chosen == "pt" and ending in (*filter(None, _ENDINGS), ".pt"):
        raise InputError(
            f"{output}: the format pt is a folder of files, one per protein; expected a name without an ending."
        )
    if chosen == "parquet":
        try:
            import pyarrow as _  # noqa: F401
        except ImportError:
            raise MissingExtraError("pyarrow", "parquet", f"writing {output}") from None
    return chosen


def write_embeddings(
    results: Iterable[tuple[Protein, Result]],
    path: Path,
    file_format: str,
    *,
    include: Sequence[str],
    layers: Sequence[int],
    about: dict[str, Any],
) -> None:
    """Write the proteins that have results.

    Arguments:
        results: proteins, each with arrays (layers, ...) by kind; iterated as often as the format needs.
        path: the file or folder to write; new.
        file_format: one of `FORMATS`.
        include: the kinds.
        layers: the numbers of the layers.
        about: what the file says of itself, where the format can.
    """
    found = _Found(results)
    if file_format == "h5":
        _write_h5(found, path, include, about)
    elif file_format == "npz":
        _write_npz(found, path, include)
    elif file_format == "parquet":
        _write_parquet(found, path, include, layers, about)
    else:
        _write_pt(found, path, layers)


class _Found:
    """The proteins that have results, as often as is asked."""

    def __init__(self, results: Iterable[tuple[Protein, Result]]) -> None:
        self._results = results

    def __iter__(self) -> Iterator[tuple[Protein, Arrays]]:
        return ((protein, result) for protein, result in self._results if not isinstance(result, Unread))


class Names:
    """A name for each identifier, different even where identifiers are not.

    Arguments:
        safe: the identifier as it may stand in a name.
        taken: whether a name is in use already.
    """

    def __init__(self, safe: Callable[[str], str], taken: Callable[[str], bool]) -> None:
        self._safe, self._taken = safe, taken
        self._repeats: dict[str, int] = {}

    def __call__(self, identifier: str) -> str:
        """The name of the next record of this identifier; the second gets "#2"."""
        name = self._safe(identifier)
        if not self._taken(name):
            return name
        number = self._repeats.get(name, 1) + 1
        while self._taken(f"{name}#{number}"):
            number += 1
        self._repeats[name] = number
        return f"{name}#{number}"


def hdf5_key(identifier: str) -> str:
    """An identifier as an HDF5 key: `/` separates groups there, and "." is the group itself."""
    return {"": "unnamed", ".": "%2E"}.get(identifier) or identifier.replace("/", "%2F")


def _write_h5(found: Found, path: Path, include: Sequence[str], about: dict[str, Any]) -> None:
    import h5py

    with h5py.File(path, "w", libver="latest", track_order=True) as file:
        for key, value in about.items():
            file.attrs[key] = value
        names = Names(hdf5_key, file.__contains__)
        for protein, arrays in found:
            kinds = {kind: _without_layer_axis(arrays[kind]) for kind in include}
            key = names(protein.id)
            if len(kinds) == 1:
                entry = file.create_dataset(key, data=next(iter(kinds.values())))
            else:
                entry = file.create_group(key)
                for kind, array in kinds.items():
                    entry.create_dataset(kind, data=array)
            entry.attrs["id"] = protein.id
            if len(protein.chains) > 1:
                entry.attrs["chain_lengths"] = [len(chain) for chain in protein.chains]


def _without_layer_axis(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array[0] if len(array) == 1 else array


def _write_npz(found: Found, path: Path, include: Sequence[str]) -> None:
    count = width = 0
    lengths: list[int] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for protein, arrays in found:
        count, width = count + 1, max(width, len(protein.id))
        lengths.append(protein.length)
        if not shapes:
            shapes = {kind: _rows(arrays[kind], kind).shape[1:] for kind in include}
    with zipfile.ZipFile(path, "w") as archive:
        with _member(archive, "ids", (count,), np.dtype(f"<U{max(width, 1)}"), compress=True) as stream:
            for protein, _ in found:
                stream.write(np.array([protein.id], dtype=f"<U{max(width, 1)}").tobytes())
        with _member(archive, "lengths", (count,), np.dtype("<i8")) as stream:
            stream.write(np.asarray(lengths, dtype="<i8").tobytes())
        for kind in include:
            rows = sum(lengths) if kind == "per_tok" else count
            dtype = np.dtype("<f2" if kind == "per_tok" else "<f4")
            with _member(archive, kind, (rows, *shapes[kind]), dtype) as stream:
                for _, arrays in found:
                    stream.write(np.ascontiguousarray(_rows(arrays[kind], kind), dtype=dtype).data)


def _rows(array: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """(layers, ...) as rows: (1 or L, d), or (1 or L, layers, d) with several layers."""
    rows = array if kind == "per_tok" else array[:, None]
    return rows[0] if len(rows) == 1 else rows.swapaxes(0, 1)


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, compress: bool = False
) -> Iterator[IO[bytes]]:
    """An array of an npz file, to be written row by row."""
    info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that the same arrays are the same bytes
    info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with archive.open(info, "w", force_zip64=True) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(stream, header)
        yield stream


def _write_parquet(
    found: Found, path: Path, include: Sequence[str], layers: Sequence[int], about: dict[str, Any]
) -> None:
    import pyarrow
    from pyarrow import parquet

    def name(kind: str, layer: int) -> str:
        return kind if len(layers) == 1 else f"{kind}_layer_{layer}"

    columns = [(kind, place, name(kind, layer)) for kind in include for place, layer in enumerate(layers)]
    # Large lists: the vectors of one long protein's residues are more numbers than 32-bit offsets can count.
    types = {"per_tok": pyarrow.large_list(pyarrow.float16())}
    schema = pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("length", pyarrow.int64()),
            *((column, types.get(kind, pyarrow.list_(pyarrow.float32()))) for kind, _, column in columns),
        ],
        metadata={"performers": json.dumps(about)},
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in _batches(found):
            values: dict[str, Any] = {
                "id": [protein.id for protein, _ in batch],
                "length": [protein.length for protein, _ in batch],
            }
            for kind, place, column in columns:
                flat = [arrays[kind][place].reshape(-1) for _, arrays in batch]
                offsets = np.concatenate(([0], np.cumsum([len(array) for array in flat])))
                numbers = pyarrow.array(np.concatenate(flat))
                values[column] = (
                    pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets, pyarrow.int64()), numbers)
                    if kind in types
                    else pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), numbers)
                )
            writer.write_table(pyarrow.table(values, schema=schema))


def _batches(found: Found) -> Iterator[list[tuple[Protein, Arrays]]]:
    batch: list[tuple[Protein, Arrays]] = []
    numbers = 0
    for protein, arrays in found:
        batch.append((protein, arrays))
        numbers += sum(array.size for array in arrays.values())
        if len(batch) == _ROWS_AT_A_TIME or numbers >= _NUMBERS_AT_A_TIME:
            yield batch
            batch, numbers = [], 0
    if batch:
        yield batch


def _write_pt(found: Found, path: Path, layers: Sequence[int]) -> None:
    import torch

    path.mkdir()
    # Some file systems hold A and a for the same name.
    taken: set[bytes] = set()

    def is_taken(name: str) -> bool:
        return hashlib.blake2b(name.casefold().encode(), digest_size=8).digest() in taken

    names = Names(_file_name, is_taken)
    kinds = {"per_tok": "representations", "mean": "mean_representations", "cls": "bos_representations"}
    for protein, arrays in found:
        name = names(protein.id)
        taken.add(hashlib.blake2b(name.casefold().encode(), digest_size=8).digest())
        content: dict[str, Any] = {"label": protein.id}
        for kind, array in arrays.items():
            # Copies: a tensor that is a view would be saved with all that it is a view of.
            content[kinds[kind]] = {layer: torch.tensor(array[place]) for place, layer in enumerate(layers)}
        torch.save(content, path / f"{name}.pt")


def _file_name(identifier: str) -> str:
    """An identifier as a file name: quoted as in an address, and cut where it is long."""
    quoted = quote(identifier, safe=" =+,@[]()").lstrip(".") or "unnamed"
    if len(quoted) <= _MAX_NAME:
        return quoted
    return f"{quoted[:_MAX_NAME]}~{hashlib.sha256(identifier.encode()).hexdigest()[:12]}"
