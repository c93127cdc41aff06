"""Principal components of activations, in float64; see `moments.SecondMoment`."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import NumericalError


def basis_bytes(features: int) -> int:
    """What `principal_basis` holds at its peak: the moment, the eigenvectors, and twice that for LAPACK."""
    return 8 * 4 * features**2


def principal_basis(moment: Tensor, count: int) -> Tensor:
    """The eigenvectors of the `count` largest eigenvalues, largest first: (features, features) -> (features, count).

    An eigenvector's sign is free; here the first of its largest components is positive.

    Raises:
        NumericalError: the moment has NaN or Inf.
    """
    if moment.is_meta:  # of a rehearsal
        return moment.new_empty(len(moment), count)
    if not torch.isfinite(moment).all():
        raise NumericalError("the activations have NaN or Inf; use another dtype (float32, bfloat16) or other data")
    vectors = torch.linalg.eigh(moment.double()).eigenvectors.flip(1)[:, :count]  # eigh: ascending
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()
