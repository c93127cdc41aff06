"""Second moments of activations: what principal components and optimal brain surgery start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SecondMoment:
    """A running sum of w x x^T over tokens x of weight w.

    Args:
        dtype: of the sum and of all products, float32 or better whatever the activations are.

    Attributes:
        total: (features, features); None before the first tokens.
        weight: the sum of w.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0
        self._dtype = dtype

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor) -> None:
        """Take tokens x (..., features) in, each by its weight (...), 0 or more."""
        rows = x.reshape(-1, x.shape[-1]).to(self._dtype)  # (tokens, features)
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows.to(self.total.device)
        with _full_precision():
            self.total.addmm_((rows * weights.reshape(-1, 1).to(rows)).T, rows)
        self.weight += float(weights.double().sum())

    @property
    def mean(self) -> Tensor:
        """The mean of x x^T by weights, (features, features); 0 where nothing has weight.

        Raises:
            ValueError: no tokens were added.
        """
        if self.total is None:
            raise ValueError("a mean of no tokens")
        return self.total / (self.weight or 1.0)


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, whose ten bits of mantissa spoil a Hessian; the caller's setting comes back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
