"""How much is to go, in parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.model.layout import Layout

Convention = Literal["blocks", "model"]


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

    def whole_blocks(self, layout: Layout) -> int:
        """The nearest number of whole blocks, halves up: floor(share * blocks + 0.5).

        Raises:
            InfeasibleBudgetError: that is none of the blocks, or all.
        """
        blocks = len(layout.blocks)
        count = math.floor(self.block_share(layout) * blocks + 0.5)
        if not 0 < count < blocks:
            scale = self.sparsity / self.block_share(layout) / blocks
            reach = f"{scale:.4g} to {(blocks - 1) * scale:.4g}" if blocks > 1 else "nothing"
            raise InfeasibleBudgetError(
                f"{self.sparsity:.4g} of the parameters of the {self.of} is {count} of {blocks} blocks; whole blocks "
                f"reach {reach}, in steps of {scale:.4g}"
            )
        return count

    def achieved(self, before: Layout, after: Layout) -> float:
        """The share that really went, in this budget's convention."""
        return shares(before, after)[self.of]

    def width(self, wanted: float, width: int) -> int:
        """`wanted` neurons rounded to the nearest multiple of `round_to`, ties up, within [0, width]."""
        rounded = math.floor(wanted / self.round_to + 0.5) * self.round_to
        return max(0, min(rounded, width))


def shares(before: Layout, after: Layout) -> dict[str, float]:
    """The removed share in both conventions."""
    return {
        "blocks": 1 - after.block_parameters / before.block_parameters,
        "model": 1 - after.parameters / before.parameters,
    }
