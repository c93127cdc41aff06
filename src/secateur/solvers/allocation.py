"""How much each block keeps under one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.errors import InfeasibleBudgetError
from secateur.model.budget import Budget, inside
from secateur.model.layout import BlockLayout, Layout
from secateur.solvers.ratios import Curve, ratios


@dataclass(frozen=True)
class Allocation:
    """What each block keeps.

    Attributes:
        widths: FFN neurons, by block number; 0: the MLP goes.
        kv_heads: KV heads with the query heads that read them; 0: the attention goes.
    """

    widths: Mapping[int, int]
    kv_heads: Mapping[int, int]

    @classmethod
    def of(cls, layout: Layout) -> Allocation:
        """What there is."""
        shapes = {number: block.shape for number, block in layout.blocks.items()}
        return cls({n: shape.width for n, shape in shapes.items()}, {n: shape.kv_heads for n, shape in shapes.items()})

    def parameters(self, layout: Layout) -> int:
        """What the blocks have left of the layout's, norms included."""
        return sum(
            _narrowed(block, self.widths[number], self.kv_heads[number]).parameters
            for number, block in layout.blocks.items()
        )


def curve_allocation(layout: Layout, budget: Budget, shape: Curve = "log", first: float = 0.7) -> Allocation:
    """FFN neurons only, by a share that grows over the blocks as SlimGPT's equation 6: the target to a neuron.

    Args:
        first: the first block's share, relative to the mean (of a decreasing curve, the last one's); the paper's are
            about 0.25.

    Raises:
        InfeasibleBudgetError: the FFNs have less than that; with what they have.
    """
    full, target = Allocation.of(layout), budget.target(layout)
    blocks = {n: block for n, block in layout.blocks.items() if block.shape.width}
    sizes = [block.neuron * block.shape.width for block in blocks.values()]
    most = [1 - min(budget.round_to, block.shape.width) / block.shape.width for block in blocks.values()]
    spare = sum(size * share for size, share in zip(sizes, most, strict=True))
    if target > spare:
        reach = inside(0, budget.sparsity * spare / target)
        raise InfeasibleBudgetError(
            f"the FFNs cannot lose {budget.sparsity:.4g} of the parameters of the {budget.of}; they reach {reach}"
        )
    low = None if shape == "uniform" else min(first * target / sum(sizes), max(most))
    ends = {"last" if shape.endswith("decrease") else "first": low}
    asked = ratios(sizes, target, shape, most=most, **ends)
    wanted = {n: block.shape.width * (1 - share) for (n, block), share in zip(blocks.items(), asked, strict=True)}
    return Allocation({**full.widths, **_rounded(layout, wanted, budget)}, full.kv_heads)


def _rounded(layout: Layout, wanted: Mapping[int, float], budget: Budget) -> dict[int, int]:
    """FFN widths; what one is rounded by goes on to the next."""
    widths, owed = {}, 0.0  # in parameters, that were kept beyond what was wanted
    for number, neurons in wanted.items():
        block = layout.blocks[number]
        width, size = block.shape.width, block.neuron
        widths[number] = max(budget.width(neurons - owed / size, width), min(budget.round_to, width))
        owed += (widths[number] - neurons) * size
    return widths


def _narrowed(block: BlockLayout, width: int, kv_heads: int) -> BlockLayout:
    if kv_heads < block.shape.kv_heads:
        block = block.with_kv_heads(kv_heads) if kv_heads else block.without_attention()
    if width < block.shape.width:
        block = block.with_width(width) if width else block.without_mlp()
    return block
