"""Principal components of activations, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import NumericalError


class SecondMoment:
    """A running sum of w x x^T over tokens x of weight w, (features, features) float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, x: Tensor, weights: Tensor) -> None:
        """x (..., features), weights (...)."""
        rows = x.reshape(-1, x.shape[-1]).double()
        moment = (rows * weights.reshape(-1, 1).to(rows)).T @ rows  # float64: what is sliced off are the small ones
        self.total = moment if self.total is None else self.total + moment.to(self.total.device)


def principal_basis(moment: Tensor, count: int) -> Tensor:
    """The eigenvectors of the `count` largest eigenvalues, largest first: (features, features) -> (features, count).

    An eigenvector's sign is free; here the first of its largest components is positive.

    Raises:
        NumericalError: the moment has NaN or Inf.
    """
    if not torch.isfinite(moment).all():
        raise NumericalError("the activations have NaN or Inf; use another dtype (float32, bfloat16) or other data")
    vectors = torch.linalg.eigh(moment.double()).eigenvectors.flip(1)[:, :count]  # eigh: ascending
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()
