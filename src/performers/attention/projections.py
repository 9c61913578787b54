"""Random projection matrices: the rows w_1, ..., w_M onto which FAVOR projects a query or a key.

Each function is a pure function of a shape and a generator. Matrices are drawn in float64 on the CPU and rounded to float32,
so that a seed gives the same matrix on every device.
"""

from __future__ import annotations

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
    directions = torch.cat(blocks)[:num_features]
    gaussian = torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64)
    return (directions * torch.linalg.vector_norm(gaussian, dim=1, keepdim=True)).float()


PROJECTIONS = {"orthogonal": orthogonal_projection, "iid": iid_projection}
