"""What heads attend to: diagonal, vertical and block patterns, and how alike amino acids are to them (2009.14794, appendix C).

With A_ij the attention of residue i to residue j of one head, start and end tokens left out, T its sum over all i and j, and
c_j = (1 / T) sum_i A_ij the share of it that residue j gets:

    diagonal = (1 / T) sum over |i - j| <= 3 in one chain of A_ij
    vertical = 1/2 sum_j |c_j - 1 / L|: the part of the attention that would have to move for all residues to get as much
    block    = sum over tiles of n D^2 / sum over pairs of d_ij^2,  d_ij = A_ij - T c_j / L, D its mean over a tile's n pairs

Tiles are squares of 16 residues that lie neither on the diagonal nor next to it; `block` is the part of what attention differs by
from its vertical pattern that is the same all over a tile (about 1 / 256 where nothing is). All three lie between 0 and 1. A head
is called after the first of them that reaches its threshold in `KINDS`, and "spread" if none does.

The amino-acid similarity is that of Vig et al. (2021): for each of the 20 the share of its attention that a head spends on it,
and for each two the Pearson correlation of these shares over all heads. It is compared with BLOSUM62.

Maps go in block by block, sums come out, which add up over the parts of a protein; nothing of size L x L is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from performers.data import STANDARD_RESIDUES
from performers.randomness import derive_seed
from performers.tools.agreement import spearman
from performers.tools.attention_maps import AttentionMaps
from performers.tools.blosum import blosum62

NEAR, TILE, GRID = 3, 16, 96
KINDS = {"diagonal": 0.5, "vertical": 0.5, "block": 0.25}
REPLICATES = 1000

_Floats = npt.NDArray[np.float64]


class PatternSums:
    """The sums of one protein's maps, or of some of its rows: filled block by block, in the upper triangle.

    Arguments:
        maps: of the protein.
        chain: (L,) the number of each residue's chain.
        with_picture: whether coarse maps are kept as well.
    """

    def __init__(self, maps: AttentionMaps, chain: Tensor, *, with_picture: bool) -> None:
        self._maps, self._chain = maps, chain
        self._heads = np.concatenate(([0], np.cumsum(maps.heads)))
        count = int(self._heads[-1])
        self._near = np.zeros(count)
        self._tiles, self._squares = np.zeros(count), np.zeros(count)
        self._cells = min(GRID, maps.length)
        self._picture = np.zeros((count, self._cells, self._cells), np.float32) if with_picture else None

    def add(self, rows: slice, columns: slice) -> None:
        """Take a block and the one across the diagonal from it."""
        for layer in range(len(self._maps.heads)):
            self._add(layer, rows, columns)
            if rows.start != columns.start:
                self._add(layer, columns, rows)

    def _add(self, layer: int, rows: slice, columns: slice) -> None:
        heads = slice(int(self._heads[layer]), int(self._heads[layer + 1]))
        block = self._maps.raw(layer, rows, columns).double()
        device = block.device
        i = torch.arange(rows.start, rows.stop, device=device)
        j = torch.arange(columns.start, columns.stop, device=device)
        near = ((i[:, None] - j[None]).abs() <= NEAR) & (self._chain[rows, None] == self._chain[None, columns])
        self._near[heads] += (block * near).sum((1, 2)).cpu().numpy()
        _, got = self._maps.sums(layer)
        differences = block - got[:, None, columns] / self._maps.length
        apart = (i[:, None] // TILE - j[None] // TILE).abs() > 1
        differences = differences * apart
        self._squares[heads] += differences.square().sum((1, 2)).cpu().numpy()
        pairs = _tiles(torch.ones_like(apart, dtype=torch.float64)[None])
        self._tiles[heads] += (_tiles(differences).square() / pairs).sum((1, 2)).cpu().numpy()
        if self._picture is not None:
            up, across = (F.one_hot(x * self._cells // self._maps.length, self._cells).double() for x in (i, j))
            self._picture[heads] += (up.T @ block @ across).float().cpu().numpy()

    def arrays(self, sequence: str, *, first_part: bool) -> dict[str, npt.NDArray[np.float32]]:
        """What a protein's parts add up to: what concerns whole columns comes with its first part.

        Arguments:
            sequence: all chains, one after the other.
            first_part: whether this is it.
        """
        arrays: dict[str, npt.NDArray[Any]] = {"near": self._near, "tiles": self._tiles, "squares": self._squares}
        if self._picture is not None:
            arrays["picture"] = self._picture
        if first_part:
            letters = torch.tensor([STANDARD_RESIDUES.find(letter) for letter in sequence])
            kinds = F.one_hot(letters + 1, len(STANDARD_RESIDUES) + 1)[:, 1:].double()
            got = torch.cat([self._maps.sums(layer)[1] for layer in range(len(self._maps.heads))]).cpu()
            total = got.sum(1, keepdim=True)
            arrays["total"] = total[:, 0].numpy()
            arrays["vertical"] = (got / total - 1 / self._maps.length).abs().sum(1).numpy() / 2
            arrays["kinds"] = (got / total @ kinds).numpy()
        return {name: array.astype(np.float32) for name, array in arrays.items()}


def _tiles(block: Tensor) -> Tensor:
    """The sums of (H, r, c) over tiles."""
    height, width = block.shape[1:]
    padded = F.pad(block, (0, -width % TILE, 0, -height % TILE))
    return padded.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).sum((2, 4))


@dataclass(frozen=True)
class Patterns:
    """The measures of every head, means over proteins.

    Attributes:
        diagonal, vertical, block: (heads of all layers,); NaN where no protein was long enough for tiles.
        shares: (heads of all layers, 20): the share of the attention of a head that each amino acid gets, in the order of
            `STANDARD_RESIDUES`; the mean over residues rather than proteins.
    """

    diagonal: _Floats
    vertical: _Floats
    block: _Floats
    shares: _Floats

    def kind(self, head: int) -> str:
        """What a head is called."""
        measures = {"diagonal": self.diagonal[head], "vertical": self.vertical[head], "block": self.block[head]}
        return next((name for name, least in KINDS.items() if measures[name] >= least), "spread")


class PatternMeans:
    """Means over proteins of what `PatternSums` gives, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self._proteins = self._tiled = self._residues = 0
        self._diagonal = self._vertical = self._block = self._shares = np.zeros(0)

    def add(self, sums: dict[str, npt.NDArray[np.float32]], residues: int) -> None:
        """Take a protein: the sums of all its parts."""
        near, total, vertical, kinds = (
            sums[name].astype(np.float64) for name in ("near", "total", "vertical", "kinds")
        )
        tiles, squares = sums["tiles"].astype(np.float64), sums["squares"].astype(np.float64)
        if not self._proteins:
            self._diagonal, self._vertical, self._block = (np.zeros_like(near) for _ in range(3))
            self._shares = np.zeros_like(kinds)
        self._proteins += 1
        self._residues += residues
        self._diagonal += near / total
        self._vertical += vertical
        self._shares += kinds * residues
        if residues > 3 * TILE:
            self._tiled += 1
            self._block += np.divide(tiles, squares, out=np.zeros_like(tiles), where=squares > 0)

    def patterns(self) -> Patterns | None:
        """The means; None without a protein."""
        if not self._proteins:
            return None
        block = self._block / self._tiled if self._tiled else np.full_like(self._block, np.nan)
        return Patterns(
            self._diagonal / self._proteins, self._vertical / self._proteins, block, self._shares / self._residues
        )


@dataclass(frozen=True)
class Similarity:
    """How alike amino acids are to attention, against BLOSUM62.

    Attributes:
        matrix: (20, 20) Pearson correlations over heads, in the order of `STANDARD_RESIDUES`; NaN for one that never occurs.
        spearman: the rank correlation of its 190 pairs with those of BLOSUM62; None where too few occur.
        interval: 95 %, from resampling amino acids, since the pairs of one are not independent.
    """

    matrix: _Floats
    spearman: float | None
    interval: tuple[float, float] | None


def similarity(shares: _Floats) -> Similarity:
    """Of the shares of `Patterns`."""
    varies = shares.std(0) > 1e-12
    matrix = np.full((20, 20), np.nan)
    if varies.sum() > 1 and len(shares) > 2:
        matrix[np.ix_(varies, varies)] = np.corrcoef(shares[:, varies].T)
    known = np.flatnonzero(varies)
    if len(known) < 3 or len(shares) <= 2:
        return Similarity(matrix, None, None)
    reference = blosum62()
    generator = np.random.Generator(np.random.Philox(key=derive_seed(0, "similarity of amino acids")))
    found = [
        value
        for _ in range(REPLICATES)
        if (value := _agreement(matrix, reference, generator.choice(known, len(known)))) is not None
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return Similarity(matrix, _agreement(matrix, reference, known), (float(low), float(high)))


def _agreement(matrix: _Floats, reference: _Floats, letters: npt.NDArray[np.int64]) -> float | None:
    """Spearman's correlation over the pairs of different amino acids among some, which may repeat."""
    first, second = np.triu_indices(len(letters), 1)
    first, second = letters[first], letters[second]
    different = first != second
    return spearman(matrix[first, second][different], reference[first, second][different])
