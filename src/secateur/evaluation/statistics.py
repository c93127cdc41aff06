"""Whether two models really differ: paired intervals and tests over the same documents or windows.

Two pruned models fail on the same hard windows, so the difference per window varies far less than either model's loss
does. Every comparison here is therefore paired.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import InvalidOptionError
from secateur.run import Run

LEVEL = 0.95  # of the intervals
_CELLS_AT_ONCE = 2_000_000  # drawn indices held at once


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    draws: int = 10_000,
) -> dict[str, float]:
    """The mean of a - b with its 95% percentile interval, over units (windows, documents) drawn with replacement.

    Args:
        a, b: one value per unit, of the same units in the same order.
        weights: of the units, as the number of predictions of a window; equal if None.
        draws: bootstrap samples.

    Returns:
        `difference`, `low`, `high`. Of a single unit nothing is known: its interval is infinite.

    Raises:
        InvalidOptionError: lengths differ, nothing is there, or weights are negative or all zero.
    """
    _check_pairs(a, b)
    w = torch.ones(len(a), dtype=torch.float64) if weights is None else torch.tensor(list(weights), dtype=torch.float64)
    if len(w) != len(a) or draws < 1 or bool((w < 0).any()) or not bool((w > 0).any()):
        raise InvalidOptionError(f"need {len(a)} weights, none negative and some above 0, and at least one draw")
    d = torch.tensor(list(a), dtype=torch.float64) - torch.tensor(list(b), dtype=torch.float64)  # (units,)
    d, w = d[w > 0], w[w > 0]
    difference = float((w * d).sum() / w.sum())
    if len(d) == 1:
        return {"difference": difference, "low": -math.inf, "high": math.inf}
    generator, means = Run(seed).rng("paired bootstrap"), []
    rows = max(1, _CELLS_AT_ONCE // len(d))
    for start in range(0, draws, rows):
        drawn = torch.randint(len(d), (min(rows, draws - start), len(d)), generator=generator)
        means.append(_means(d, w, drawn))
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), edges).tolist()
    return {"difference": difference, "low": low, "high": high}


def _means(values: Tensor, weights: Tensor, drawn: Tensor) -> Tensor:
    """Weighted means of the drawn units: drawn (draws, units) -> (draws,)."""
    w = weights[drawn]
    return (w * values[drawn]).sum(dim=1) / w.sum(dim=1)


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """McNemar's exact test of two models on the same yes-or-no questions; its two-sided p.

    Only the questions on which they disagree count: were the models equally good, each of the two would be right in
    half of them.

    Args:
        a, b: 1 where right, 0 where wrong, by question.

    Raises:
        InvalidOptionError: lengths differ, nothing is there, or a value is neither 0 nor 1.
    """
    _check_pairs(a, b)
    if not is_binary([*a, *b]):
        raise InvalidOptionError("McNemar's test takes answers that are right (1) or wrong (0), nothing between")
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    n, fewer = only_a + only_b, min(only_a, only_b)
    term = tail = 1
    for k in range(1, fewer + 1):  # the binomial coefficients, as whole numbers
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**n)


def is_binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation; None for the latter of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _check_pairs(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not len(a):
        raise InvalidOptionError(f"paired values are of the same units, at least one, not {len(a)} and {len(b)}")
