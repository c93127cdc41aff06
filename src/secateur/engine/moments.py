"""Second moments of activations: what principal components and optimal brain surgery start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CrossMoment:
    """A running sum of w y x^T over tokens of weight w with two vectors each, y and x.

    Args:
        dtype: of the sum and of all products, float32 or better whatever the activations are.

    Attributes:
        total: (features of y, features of x); None before the first tokens.
        weight: the sum of w.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0
        self.dtype = dtype

    @torch.no_grad()
    def add_pairs(self, y: Tensor, x: Tensor, weights: Tensor) -> None:
        """Take tokens' vectors y (..., features of y) and x (..., features of x) in, each by its weight (...)."""
        columns = x.reshape(-1, x.shape[-1]).to(self.dtype)  # (tokens, features)
        rows = columns if y is x else y.reshape(-1, y.shape[-1]).to(columns)
        if self.total is None:
            self.total = columns.new_zeros(rows.shape[1], columns.shape[1])
        rows, columns = rows.to(self.total.device), columns.to(self.total.device)
        with _full_precision():
            self.total.addmm_((rows * weights.reshape(-1, 1).to(rows)).T, columns)
        self.weight += float(weights.double().sum())

    @property
    def mean(self) -> Tensor:
        """The mean of y x^T by weights, (features of y, features of x); 0 where nothing has weight.

        Raises:
            ValueError: no tokens were added.
        """
        if self.total is None:
            raise ValueError("a mean of no tokens")
        return self.total / (self.weight or 1.0)


class SecondMoment(CrossMoment):
    """A running sum of w x x^T over tokens x of weight w; `total` is (features, features)."""

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Take tokens x (..., features) in, each by its weight (...), 0 or more."""
        self.add_pairs(x, x, weights)


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, whose ten bits of mantissa spoil a Hessian; the caller's setting comes back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
