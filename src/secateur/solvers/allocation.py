"""How much each block keeps under one budget, and the curves over the blocks that say it in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.model.budget import COARSE, Budget, inside, reachable
from secateur.model.layout import BlockLayout, Layout
from secateur.solvers.halves import Half
from secateur.solvers.ratios import ratios

FFNCurve = Literal["log", "uniform"]

# Of their FFNs' parameters blocks lose no more before KV heads go, too: a choice, not yet measured.
_FFN_SHARE = 0.75


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

    def kept(self, half: Half) -> Mapping[int, int]:
        """Units of these halves, by block number."""
        return self.kv_heads if half == "attention" else self.widths

    def parameters(self, layout: Layout) -> int:
        """What the blocks have left of the layout's, norms included."""
        return sum(
            narrowed(block, self.widths[number], self.kv_heads[number]).parameters
            for number, block in layout.blocks.items()
        )

    def to_json(self) -> dict[str, dict[str, int]]:
        return {name: {str(n): count for n, count in kept.items()} for name, kept in vars(self).items()}

    @classmethod
    def from_json(cls, entry: Mapping[str, Mapping[str, int]]) -> Allocation:
        return cls(**{name: {int(n): count for n, count in kept.items()} for name, kept in entry.items()})


def curve_allocation(
    layout: Layout,
    budget: Budget,
    curve: FFNCurve = "log",
    first: float = 0.7,
    ends: float = math.inf,
    *,
    heads: bool = True,
    equal: bool = False,
) -> Allocation:
    """FFN neurons by a share that grows over the blocks as SlimGPT's equation 6, the target to a neuron. Where the FFNs
    would lose more than three quarters, KV heads go as well, one of each block in turn, from the last block on.

    Args:
        first: the first block's share, relative to the mean; the paper's is about 0.25.
        ends: the share at most, relative to the mean, of the first and of the last block, whatever the curve gives
            them: all others stand on the one, and none can make up for the other.
        heads: whether KV heads can go; each attention keeps one.
        equal: blocks of one width keep one width, and all KV heads: of a uniform curve. The target is then met to half
            a step of all FFNs together.

    Raises:
        InvalidOptionError: `first` or `ends` out of its range.
        InfeasibleBudgetError: with the reachable range.
    """
    if not (0 <= first < math.inf and ends >= 0):
        raise InvalidOptionError(f"first and ends are relative to the mean share, 0 or more, not {first} and {ends}")

    def met(wanted: Budget) -> Allocation | None:
        allocation = _along(layout, wanted, curve, first, ends, heads=heads and not equal, carry=not equal)
        return allocation if _meets(layout, wanted, allocation, equal=equal) else None

    if (allocation := met(budget)) is not None:
        return allocation
    heads = heads and not equal and any(block.shape.kv_heads > 1 for block in layout.blocks.values())
    raise InfeasibleBudgetError(
        f"cannot remove {budget.sparsity:.4g} of the parameters of the {budget.of}: FFN neurons"
        f"{' and KV heads' if heads else ''} reach "
        f"{reachable(met, budget) if equal else _reach(layout, budget, heads=heads)}"
    )


def _along(
    layout: Layout,
    budget: Budget,
    curve: FFNCurve,
    first: float,
    ends: float,
    *,
    heads: bool,
    carry: bool,
) -> Allocation:
    """As near to the budget as it goes; else as `curve_allocation` and `rounded` have it."""
    full, target = Allocation.of(layout), budget.target(layout)
    blocks = {n: block for n, block in layout.blocks.items() if block.shape.width}
    sizes = [block.neuron * block.shape.width for block in blocks.values()]
    most = [1 - min(budget.round_to, block.shape.width) / block.shape.width for block in blocks.values()]
    kv_heads, left = full.kv_heads, target
    if heads:
        kv_heads, left = _without_heads(layout, target, min(_FFN_SHARE * sum(sizes), _spare(layout, budget)))
    asked = _curve(sizes, most, left, curve, first, ends) if blocks and left > 0 else [0.0] * len(blocks)
    wanted = {n: block.shape.width * (1 - share) for (n, block), share in zip(blocks.items(), asked, strict=True)}
    return Allocation({**full.widths, **rounded(layout, wanted, budget, carry=carry)}, kv_heads)


def _spare(layout: Layout, budget: Budget) -> int:
    """Parameters that FFNs can give up: all but a step of each."""
    return sum(
        block.neuron * (block.shape.width - min(budget.round_to, block.shape.width)) for block in layout.blocks.values()
    )


def _without_heads(layout: Layout, target: float, from_ffns: float) -> tuple[dict[int, int], float]:
    """KV heads by block, so few gone that FFNs need give no more than `from_ffns`; and how much these give."""
    kv_heads, left = dict(Allocation.of(layout).kv_heads), target
    for number in _in_turn(Allocation.of(layout).kv_heads):
        if left <= from_ffns:
            break
        kv_heads[number] -= 1
        left -= layout.blocks[number].kv_group
    return kv_heads, left


def _meets(layout: Layout, budget: Budget, allocation: Allocation, *, equal: bool) -> bool:
    """Whether the target is met to a step; of equal widths to half a step of all, but not coarsely."""
    full, target = Allocation.of(layout).kv_heads, budget.target(layout)
    gone = layout.block_parameters - allocation.parameters(layout)
    steps = [block.neuron * budget.round_to for block in layout.blocks.values() if block.shape.width]
    if equal:
        return gone > 0 and abs(gone - target) <= min(sum(steps), COARSE * target)
    group = max((layout.blocks[n].kv_group for n in full if full[n] > allocation.kv_heads[n]), default=0)
    return gone > 0 and abs(gone - target) <= max(*steps, 0, group)


def _reach(layout: Layout, budget: Budget, *, heads: bool) -> str:
    """In words, what sparsities `curve_allocation` can meet, of widths that need not be equal."""
    target, blocks = budget.target(layout), layout.blocks.values()
    unit = max((block.neuron * budget.round_to for block in blocks if block.shape.width), default=0)
    groups = sum((block.shape.kv_heads - 1) * block.kv_group for block in blocks if block.shape.kv_heads and heads)
    return inside(budget.sparsity * unit / target, budget.sparsity * (_spare(layout, budget) + groups) / target)


def _curve(
    sizes: Sequence[float],
    most: Sequence[float],
    target: float,
    curve: FFNCurve,
    first: float,
    ends: float,
) -> list[float]:
    """Each block's share; where the curve cannot reach the target with those ends, it is uniform."""
    if curve == "log":
        mean = target / sum(sizes)
        low, limits = min(first * mean, max(most)), list(most)
        limits[0], limits[-1] = (min(ends * mean, limit) for limit in (most[0], most[-1]))
        asked = ratios(sizes, target, curve, most=limits, first=low)
        if abs(sum(size * share for size, share in zip(sizes, asked, strict=True)) - target) < 1:
            return asked
    return ratios(sizes, target, "uniform", most=most)


def _in_turn(kv_heads: Mapping[int, int]) -> Iterator[int]:
    """Blocks in the order in which each gives one of its KV heads, then the next, until it has one left."""
    for given in range(max(kv_heads.values(), default=0) - 1):
        yield from (number for number in sorted(kv_heads, reverse=True) if kv_heads[number] - 1 > given)


def rounded(layout: Layout, wanted: Mapping[int, float], budget: Budget, *, carry: bool = True) -> dict[int, int]:
    """FFN widths; what one is rounded by goes on to the next, and what is left at the end back again, if it is carried
    at all."""
    widths: dict[int, int] = {}
    owed = 0.0  # in parameters, that were kept beyond what was wanted
    for number, neurons in [*wanted.items(), *list(wanted.items())[::-1]]:
        block = layout.blocks[number]
        width, size = block.shape.width, block.neuron
        before = widths.get(number, neurons)
        widths[number] = max(budget.width(before - owed / size, width), min(budget.round_to, width))
        owed += (widths[number] - before) * size * carry
    return widths


def narrowed(block: BlockLayout, width: int, kv_heads: int) -> BlockLayout:
    if kv_heads < block.shape.kv_heads:
        block = block.with_kv_heads(kv_heads) if kv_heads else block.without_attention()
    if width < block.shape.width:
        block = block.with_width(width) if width else block.without_mlp()
    return block
