"""How much each block loses: SlimGPT's incremental pruning ratio and its relatives (section 3.4, equation 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from secateur.errors import InfeasibleBudgetError, InvalidOptionError

Shape = Literal["log", "linear", "uniform", "log-decrease", "linear-decrease"]

_FIRST = 0.25  # of the mean: the paper's first ratios are 0.31 (at 20 %) and 0.24 (at 50 %) of its mean ratios


def curve(shape: Shape, blocks: int) -> list[float]:
    """From 0 at one end to 1 at the other. Equation 6: log(i + 1) / log(n), 0 <= i < n."""
    if blocks == 1 or shape == "uniform":
        return [0.0] * blocks
    if shape.startswith("log"):
        rising = [math.log(i + 1) / math.log(blocks) for i in range(blocks)]
    else:
        rising = [i / (blocks - 1) for i in range(blocks)]
    return rising[::-1] if shape.endswith("decrease") else rising


def ratios(
    sizes: Sequence[float],
    target: float,
    shape: Shape = "log",
    *,
    first: float | None = None,
    last: float | None = None,
    highest: float = 1.0,
) -> list[float]:
    """The share that each block loses of what it can lose, so that all together lose `target`.

    r_i = low + (high - low) * curve_i. Of `low` and `high` at the ends, one not given is solved from the target,
    so that all shapes are compared at equal parameters; if neither is, low is a quarter of the mean, or more where high
    would exceed `highest`.

    Args:
        sizes: parameters that each block can lose.
        target: parameters to lose.
        first, last: the ratios of the first and the last block; given both, they decide, not the target.

    Raises:
        InfeasibleBudgetError: a ratio would lie outside [0, highest].
        InvalidOptionError: an endpoint given to the uniform shape, or outside [0, 1].
    """
    if any(end is not None and not 0 <= end <= 1 for end in (first, last)):
        raise InvalidOptionError(f"the ratios of the first and last block lie between 0 and 1, not {first} and {last}")
    if shape == "uniform" and (first is not None or last is not None):
        raise InvalidOptionError("a uniform ratio has no first and last: leave them out")
    weights = curve(shape, len(sizes))
    low, high = (last, first) if shape.endswith("decrease") else (first, last)
    share = sum(size * weight for size, weight in zip(sizes, weights, strict=True)) / sum(sizes)
    mean = target / sum(sizes)
    if share == 0:
        low, high = mean, mean
    elif low is None and high is None:
        low = _FIRST * mean
        high = low + (mean - low) / share
        if high > highest:
            high = highest
            low = (mean - share * high) / (1 - share)
    elif high is None:
        assert low is not None  # narrows the type
        high = low + (mean - low) / share
    elif low is None:
        low = (mean - share * high) / (1 - share)
    shares = [low + (high - low) * weight for weight in weights]
    if min(shares) < 0 or max(shares) > highest:
        raise InfeasibleBudgetError(
            f"to lose {mean:.4g} of what the blocks can lose, each block would have to lose {min(shares):.4g} to "
            f"{max(shares):.4g} of it; 0 to {highest:.4g} is possible. Ask for less, or for other endpoints"
        )
    return shares
