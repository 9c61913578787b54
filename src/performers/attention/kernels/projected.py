"""Tokens times the rows of the features: what the two families of chunked FAVOR attention share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from performers.attention.features import FeatureRows, Kernel


@dataclass
class Projected:
    """The features of one group of heads.

    Attributes:
        kernel: which features these are.
        rows: of the group: (M', D), or (G, M', D) where heads differ; metric and bias broadcast over (G, L, .).
        product_dtype: the type in which matrix products are taken.
        d_rows: where gradients of the rows of queries and of keys are added up; None if nobody learns them.
    """

    kernel: Kernel
    rows: FeatureRows
    biased: bool
    product_dtype: torch.dtype
    d_rows: tuple[Tensor, Tensor] | None = None

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """x @ y, in the type for products, given back in the type for sums."""
        return (x.to(self.product_dtype) @ y.to(self.product_dtype)).to(self.rows.queries.dtype)

    def project_queries(self, q: Tensor) -> Tensor:
        """The products of queries (G, L, D) and rows, (G, L, M')."""
        return self.multiply(q, self.rows.queries.mT)

    def project_keys(self, k: Tensor) -> Tensor:
        """The products of keys (G, L, D) and rows, (G, L, M')."""
        return self.multiply(k, self.rows.keys.mT)

    def log_weights(self, k: Tensor, real: Tensor | None) -> Tensor:
        """-1/2 sum metric k^2 of each key, (G, L, 1); -inf where it is padding or so far out that the square overflows."""
        log_weights = k.to(self.rows.metric.dtype).square().mul_(self.rows.metric).sum(-1, keepdim=True).mul_(-0.5)
        counts = log_weights.isfinite()
        if real is not None:
            counts = counts & real.unsqueeze(-1)
        return log_weights.masked_fill_(~counts, -torch.inf)

    def pull_queries(self, d_u: Tensor, q: Tensor) -> Tensor:
        """The gradient with respect to q, given the one with respect to its projections."""
        self._learn(0, d_u, q)
        return self.multiply(d_u, self.rows.queries)

    def pull_keys(self, d_u: Tensor, k: Tensor, d_log_weights: Tensor | None = None) -> Tensor:
        """The gradient with respect to k, given those with respect to its projections and its log weight (G, L, 1)."""
        self._learn(1, d_u, k)
        d_k = self.multiply(d_u, self.rows.keys)
        return d_k if d_log_weights is None else d_k.sub_(k * (d_log_weights * self.rows.metric))

    def _learn(self, which: int, d_u: Tensor, x: Tensor) -> None:
        if self.d_rows is None:
            return
        target = self.d_rows[which]
        d_rows = self.multiply(d_u.mT, x)
        target.add_(d_rows.sum(0) if target.ndim == 2 else d_rows)
