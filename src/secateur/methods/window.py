"""The sliding window of "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.engine.tokens import Tokens
from secateur.engine.walk import Order
from secateur.errors import InfeasibleBudgetError
from secateur.methods.registry import method
from secateur.model.budget import Budget, leading, reachable
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.similarity import Positions, span_distances
from secateur.surgery.edits import DropBlock, Edit


def angle(cosine: Tensor) -> Tensor:
    """The angular distance: arccos(cosine) / pi, in [0, 1]."""
    return torch.arccos(cosine) / math.pi


def window_lengths(layout: Layout, budget: Budget) -> dict[int, int]:
    """The windows that meet the budget: by place of the first block, the number of blocks.

    Every start is tried, that of block 0 included. For blocks of one size all windows have one length n; otherwise each
    start's parameters are added up until they come nearest to the target.

    Raises:
        InfeasibleBudgetError: no window, or only the whole model, would do.
    """
    budget.whole_blocks(layout)
    if not (lengths := _lengths(layout, budget)):
        reach = reachable(lambda other: other.whole_blocks(layout) and _lengths(layout, other), budget)
        raise InfeasibleBudgetError(
            f"the blocks' sizes differ so much that no window comes near {budget.sparsity:.4g} of the parameters of "
            f"the {budget.of}; {reach} can be reached"
        )
    return lengths


def _lengths(layout: Layout, budget: Budget) -> dict[int, int]:
    sizes, target = [block.parameters for block in layout.blocks.values()], budget.target(layout)
    lengths = {}
    for start in range(len(sizes)):
        n = leading(target, sizes[start:])
        ends_short = start + n == len(sizes) and sum(sizes[start:]) + max(sizes) / 2 <= target
        if 0 < n < len(sizes) and not ends_short:
            lengths[start] = n
    return lengths


def mean_angles(
    model: Model,
    tokens: Tokens,
    lengths: dict[int, int],
    *,
    positions: Positions = "last",
    order: Order = "samples",
    run: Run,
) -> Tensor:
    """Mean angular distance over each window, from what enters its first block to what leaves its last.

    Args:
        lengths: by place of the first block, the number of blocks.

    Returns:
        (len(lengths),) float64, in the order of `lengths`.
    """
    spans = sorted(set(lengths.values()))
    distances = span_distances(
        model, tokens, [(n, angle) for n in spans], positions=positions, order=order, run=run, label="window distances"
    )
    by_length = dict(zip(spans, distances, strict=True))
    return torch.stack([by_length[n][start] for start, n in lengths.items()])


@method(
    "window",
    paper="https://arxiv.org/abs/2403.17887",
    unit="consecutive whole blocks",
    samples=128,
    length=2048,
    bibtex="gromov2025unreasonable",
    edits=(DropBlock,),
    needs="S forwards without the LM head",
)
def window(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    positions: Positions = "last",
    order: Order = "samples",
) -> Iterator[Edit]:
    """The consecutive whole blocks over which the residual stream turns least (angular distance), in one shot.

    The paper heals what is left by fine-tuning, which this does not do. It does not fix the amount of calibration; the
    2SSP paper's comparison takes 256 windows of C4, and averages cosines where the paper averages angles.

    Args:
        positions: only the last token of each window (the paper's), or all.
        order: samples or blocks; how the calibration walks (equal results, different memory).
    """
    lengths = window_lengths(model.layout(), budget)
    distances = run.step(
        "distances", lambda: mean_angles(model, tokens, lengths, positions=positions, order=order, run=run)
    )
    best = int(distances.argmin())  # of equal ones the first
    start, n = list(lengths.items())[best]
    numbers = list(model.numbers)[start : start + n]
    run.log("window: blocks %d to %d go, angular distance %.6f", numbers[0], numbers[-1], distances[best])
    for number in numbers:
        yield DropBlock(number)
