"""How much each block loses: SlimGPT's incremental pruning ratio and its relatives (section 3.4, equation 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from secateur.errors import InvalidOptionError

Curve = Literal["log", "linear", "uniform", "log-decrease", "linear-decrease"]

_FIRST = 0.25  # of the mean: the paper's first ratios are 0.31 (at 20 %) and 0.24 (at 50 %) of its mean ratios


def curve(shape: Curve, blocks: int) -> list[float]:
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
    shape: Curve = "log",
    *,
    first: float | None = None,
    last: float | None = None,
    most: Sequence[float] | None = None,
) -> list[float]:
    """The share that each block loses, so that all together lose `target`, or what comes nearest to it.

    r_i = low + (high - low) * curve_i, but no more than the block's `most`. Of `low` and `high` at the ends, one not
    given is solved from the target, so that all shapes are compared at equal parameters and what one block cannot
    lose is asked of the others; if neither is, low is a quarter of the mean, or more where high would exceed `most`.

    Args:
        sizes: parameters of which the shares are taken, by block.
        target: parameters to lose.
        first, last: the ratios of the first and the last block; given both, they decide, not the target.
        most: the share that each block can lose; all of it if None.

    Raises:
        InvalidOptionError: an endpoint given to the uniform shape, or outside [0, 1].
    """
    if any(end is not None and not 0 <= end <= 1 for end in (first, last)):
        raise InvalidOptionError(f"the ratios of the first and last block lie between 0 and 1, not {first} and {last}")
    if shape == "uniform" and (first is not None or last is not None):
        raise InvalidOptionError("a uniform ratio has no first and last: leave them out")
    weights, limits = curve(shape, len(sizes)), list(most or [1.0] * len(sizes))
    low, high = (last, first) if shape.endswith("decrease") else (first, last)
    top, start = max(limits), _FIRST * target / sum(sizes)

    def shares(low: float, high: float) -> list[float]:
        return [min(low + (high - low) * w, limit) for w, limit in zip(weights, limits, strict=True)]

    def lost(low: float, high: float) -> float:
        return sum(size * share for size, share in zip(sizes, shares(low, high), strict=True))

    least = 0.0  # that the end which is solved for may be
    if low is None and high is None:
        low, high, least = (start, None, start) if lost(start, top) > target else (None, top, min(start, top))
    if high is None:
        known = low or 0.0
        high = root_of(lambda x: lost(known, x), target, least, top)
    elif low is None:
        known = high
        low = root_of(lambda x: lost(x, known), target, least, top)
    return shares(low or 0.0, high)


def root_of(rising: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a function that never falls has this value between `low` and `high`, or the end that comes nearest."""
    if rising(low) >= value:
        return low
    if rising(high) <= value:
        return high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if rising(middle) <= value else (low, middle)
    return low
