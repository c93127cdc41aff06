"""Second moments of activations: what principal components and optimal brain surgery start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
        with matmul_precision():
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
def matmul_precision(level: str = "highest") -> Iterator[None]:
    """What float32 products may be rounded to ("highest": to nothing less), as `torch.set_float32_matmul_precision`
    says it; the caller's setting comes back.

    TF32 has ten bits of mantissa, and what "medium" takes on a CPU has seven: either spoils a Hessian.
    """
    # The caller may have set it by torch's old names or, since torch 2.9, by new ones, after which asking the old is an
    # error. Setting the old sets both.
    devices = [torch.backends.cuda.matmul]
    if hasattr(devices[0], "fp32_precision"):
        devices.append(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # torch makes it at run time
    else:
        devices = []
    before, old = [device.fp32_precision for device in devices], None
    with suppress(RuntimeError):
        old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        if old is not None:
            torch.set_float32_matmul_precision(old)
        for device, precision in zip(devices, before, strict=True):
            device.fp32_precision = precision
