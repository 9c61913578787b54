"""Random projection matrices: the rows w_1, ..., w_M onto which FAVOR projects a query or a key.

Each function is a pure function of a shape and a generator. Matrices are drawn in float64 on the CPU and rounded to float32,
so that a seed gives the same matrix on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def iid_projection(num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Independent rows w_m ~ N(0, I).

    Returns:
        A float32 tensor of shape (M, D).
    """
    return torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64).float()


def orthogonal_projection(num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Rows that are N(0, I) each and exactly orthogonal within every block of D (R-ORF, 2009.14794, section 2.4).

    A block is a Haar-distributed orthogonal matrix: the Q of a Gaussian matrix's QR decomposition is Haar only after the signs
    of R's diagonal are moved into it (Mezzadri, math-ph/0609050). Its rows are then given the norms of independent Gaussian
    vectors, so every single row keeps the distribution N(0, I) and the estimators stay unbiased.

    Returns:
        A float32 tensor of shape (M, D).
    """
    blocks: list[Tensor] = []
    for _ in range(-(-num_features // head_dim)):
        gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
        orthogonal: Tensor
        triangular: Tensor
        orthogonal, triangular = torch.linalg.qr(gaussian)
        blocks.append((orthogonal * triangular.diagonal().sign()).T)
    return (torch.cat(blocks)[:num_features] * _norms(num_features, head_dim, generator)).float()


def givens_projection(num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Rows that are orthogonal within every block of D, a product of random Givens rotations (G-ORF, 2009.14794, appendix B.2).

    Every rotation has an angle and a pair of axes of its own. They go in rounds of D / 2 disjoint pairs, so that no axis is left
    out, and there are 3 D log D of them, three times what the authors' code takes: after D log D a row still leans towards the
    axis it started from, and at D = 64 the kernel of tokens along an axis comes out several times too large
    (docs/estimators.md). Rows get random signs and the norms of Gaussian vectors.

    Returns:
        A float32 tensor of shape (M, D).
    """
    blocks, half = -(-num_features // head_dim), head_dim // 2
    rows = torch.diag_embed(_signs((blocks, head_dim), generator).double())
    for _ in range(6 * math.ceil(math.log(head_dim))):
        order = torch.rand(blocks, head_dim, generator=generator, dtype=torch.float64).argsort(1)
        angles = torch.rand(blocks, half, 1, generator=generator, dtype=torch.float64) * (2 * math.pi)
        cos, sin = torch.cos(angles), torch.sin(angles)
        x, y, left_out = rows.take_along_dim(order.unsqueeze(-1), 1).split([half, half, head_dim - 2 * half], 1)
        rows = torch.cat([cos * x - sin * y, sin * x + cos * y, left_out], 1)
    return (rows.flatten(0, 1)[:num_features] * _norms(num_features, head_dim, generator)).float()


def hadamard_projection(num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """The rows of `hadamard_signs`, written out.

    Returns:
        A float32 tensor of shape (M, D).
    """
    return hadamard_rows(*hadamard_signs(num_features, head_dim, generator), head_dim)


def hadamard_signs(num_features: int, head_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What structured orthogonal features are made of (SORF, Yu et al. 2016; H-ORF, 2009.14794, appendix B.2).

    A block of rows is N (H S1) (H S2) (H S3) / P^(3/2), with H the Hadamard matrix of size P, S diagonal matrices of random
    signs and N the norms. P is the power of two at or above D: tokens are padded with zeros up to it. Rows are orthogonal
    within blocks of P where P = D; otherwise they are the first D coordinates of such rows, whose norms are chi(P), so that
    again every row is nearly N(0, I). Nearly: a coordinate is a sum of signs, and the kernel is off by a bias that falls
    with D (docs/estimators.md has figures).

    Returns:
        signs, an int8 tensor of shape (ceil(M / P), 3, P), and norms, a float32 tensor of shape (M,).
    """
    size = 1 << (head_dim - 1).bit_length()
    signs = _signs((-(-num_features // size), 3, size), generator)
    return signs, _norms(num_features, size, generator).squeeze(1).float()


def hadamard_rows(signs: Tensor, norms: Tensor, head_dim: int) -> Tensor:
    """The matrix W that `hadamard_signs` stands for, (M, D), in the type of the norms: its blocks multiplied out."""
    size = signs.shape[-1]
    hadamard = hadamard_transform(torch.eye(size, dtype=norms.dtype, device=norms.device))
    first, second, third = (hadamard * size**-0.5 * signs.to(norms.dtype).unsqueeze(-2)).unbind(1)  # (blocks, P, P)
    return (first @ second @ third).flatten(0, 1)[: norms.shape[0], :head_dim] * norms.unsqueeze(-1)


def hadamard_project(x: Tensor, signs: Tensor, norms: Tensor) -> Tensor:
    """W x for the rows W that `hadamard_signs` stands for, in O(M log D) operations.

    Arguments:
        x: (..., D), in floating point.
        signs, norms: as `hadamard_signs` gives them.

    Returns:
        (..., M), in the type of x.
    """
    size = signs.shape[-1]
    y = torch.nn.functional.pad(x, (0, size - x.shape[-1])).unsqueeze(-2)  # (..., 1, P)
    for stage in (2, 1, 0):
        y = hadamard_transform(y * signs[:, stage].to(x.dtype))  # (..., blocks, P)
    return y.flatten(-2)[..., : norms.shape[0]] * (norms.to(x.dtype) * size**-1.5)


def hadamard_transform(x: Tensor) -> Tensor:
    """H x along the last dimension, for the Hadamard matrix H of entries +1 and -1 in Sylvester's order, in O(P log P).

    Arguments:
        x: (..., P), P a power of two.

    Returns:
        A tensor of the shape and type of x.
    """
    size, half = x.shape[-1], 1
    while half < size:
        even, odd = x.unflatten(-1, (size // (2 * half), 2, half)).unbind(-2)
        x = torch.stack([even + odd, even - odd], -2).flatten(-3)
        half *= 2
    return x


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1


def _norms(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """The norms of M Gaussian vectors in `dim` dimensions, (M, 1)."""
    gaussian = torch.randn(num_features, dim, generator=generator, dtype=torch.float64)
    return torch.linalg.vector_norm(gaussian, dim=1, keepdim=True)


PROJECTIONS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "orthogonal": orthogonal_projection,
    "iid": iid_projection,
    "hadamard": hadamard_projection,
    "givens": givens_projection,
}
