"""How much is to go, in parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Literal, get_args

from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.model.layout import Layout

Convention = Literal["blocks", "model"]

COARSE = 0.25  # of the target: widths that come so far from it are refused


@dataclass(frozen=True)
class Budget:
    """The share of parameters to remove, relative to the model as loaded.

    Attributes:
        sparsity: in (0, 1).
        of: "blocks": a share of the blocks' parameters (2SSP's convention); "model": of all, embeddings included
            (SlimGPT's). A removed module takes its norm with it, and its biases count.
        round_to: FFN widths are rounded to a multiple of this.

    Raises:
        InvalidOptionError: a value out of its range.
    """

    sparsity: float
    of: Convention = "blocks"
    round_to: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.sparsity, (int, float)) and 0 < self.sparsity < 1):
            raise InvalidOptionError(f"sparsity must lie strictly between 0 and 1, not {self.sparsity!r}")
        if self.of not in get_args(Convention):
            raise InvalidOptionError(f"the sparsity is 'of' one of {', '.join(get_args(Convention))}, not {self.of!r}")
        if not (type(self.round_to) is int and self.round_to >= 1):
            raise InvalidOptionError(f"round_to must be a whole number of at least 1, not {self.round_to!r}")

    def block_share(self, layout: Layout) -> float:
        """The share of the blocks' parameters to remove; above 1 where the target exceeds them."""
        if self.of == "blocks":
            return self.sparsity
        return self.sparsity * layout.parameters / layout.block_parameters

    def target(self, layout: Layout) -> float:
        """The parameters to remove."""
        return self.sparsity * (layout.parameters if self.of == "model" else layout.block_parameters)

    def achieved(self, before: Layout, after: Layout) -> float:
        """The share that really went, in this budget's convention."""
        return shares(before, after)[self.of]

    def width(self, wanted: float, width: int) -> int:
        """`wanted` neurons rounded to the nearest multiple of `round_to`, ties up, within [0, width]."""
        rounded = math.floor(wanted / self.round_to + 0.5) * self.round_to
        return max(0, min(rounded, width))

    def whole_blocks(self, layout: Layout) -> int:
        """The number of blocks of average size that come nearest to the target, ties up.

        Raises:
            InfeasibleBudgetError: that would be none of the blocks, or all.
        """
        blocks, total, target = len(layout.blocks), layout.block_parameters, self.target(layout)
        count = math.floor(target * blocks / total + 0.5) if total else 0
        if not 0 < count < blocks:
            reach = "nothing"
            if blocks > 1 and total:
                one = self.sparsity * total / blocks / target  # an average block, in this convention
                reach = f"{one:.4g} (1 block) to {(blocks - 1) * one:.4g} ({blocks - 1} of them)"
            raise InfeasibleBudgetError(
                f"{self.sparsity:.4g} of the parameters of the {self.of} is nearest to {min(count, blocks)} "
                f"of {blocks} blocks; {reach} can be reached"
            )
        return count


def takes(target: float, removed: float, size: float) -> bool:
    """Whether removing `size` more parameters brings what is removed nearer to the target, or as near from above."""
    return removed + size / 2 <= target


def leading(target: float, sizes: Iterable[int]) -> int:
    """How many units, removed in this order, come nearest to the target in parameters, ties up; all if never met."""
    count, removed = 0, 0
    for size in sizes:
        if not takes(target, removed, size):
            break
        count, removed = count + 1, removed + size
    return count


def shares(before: Layout, after: Layout) -> dict[str, float]:
    """The removed share in both conventions."""
    return {
        "blocks": 1 - after.block_parameters / before.block_parameters,
        "model": 1 - after.parameters / before.parameters,
    }


def reachable(feasible: Callable[[Budget], object], budget: Budget) -> str:
    """For which sparsities something is feasible, to a thousandth: the ranges next below and next above the budget's,
    in words."""

    def reached(sparsity: float) -> bool:
        try:
            return bool(feasible(replace(budget, sparsity=sparsity)))
        except InfeasibleBudgetError:
            return False

    good = {i for i in range(1, 1000) if reached(i / 1000)}
    ranges = []
    for near, step in ((max((i for i in good if i < 1000 * budget.sparsity), default=None), -1),
                       (min((i for i in good if i > 1000 * budget.sparsity), default=None), 1)):  # fmt: skip
        if near is not None:
            end = near
            while end + step in good:
                end += step
            ranges.append(f"{min(near, end) / 1000:.4g} to {max(near, end) / 1000:.4g}")
    return " or ".join(ranges) or "nothing"


def inside(low: float, high: float) -> str:
    """A range in words, in four digits that lie within it; "nothing" where it is empty."""
    if low >= high:
        return f"{low:.4g}" if low == high > 0 else "nothing"
    ends = zip((low * (1 + 1e-9), high * (1 - 1e-9)), (ROUND_CEILING, ROUND_FLOOR), strict=True)
    return " to ".join(f"{Context(prec=4, rounding=way).create_decimal_from_float(end):f}" for end, way in ends)
