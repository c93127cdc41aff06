"""ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.engine.tokens import Tokens
from secateur.engine.walk import Order
from secateur.methods.registry import Amount, method
from secateur.model.budget import Budget, leading
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.similarity import Positions, span_distances
from secateur.surgery.edits import DropBlock, Edit


def influence(cosine: Tensor) -> Tensor:
    """Equation 1, inside its expectation: BI_l = 1 - E_t[cos(x_(l,t), x_(l+1,t))], x_l being block l's input."""
    return 1 - cosine


def least_influential(layout: Layout, influences: Tensor, budget: Budget) -> list[int]:
    """The numbers of the blocks to drop, of least influence first, ties to the lower number.

    As many as come nearest to the target in parameters; at least one goes and at least one stays.
    """
    numbers = list(layout.blocks)
    ranked = [numbers[place] for place in torch.sort(influences, stable=True).indices.tolist()]
    count = leading(budget.target(layout), [layout.blocks[number].parameters for number in ranked])
    return ranked[: max(1, min(count, len(ranked) - 1))]


@method(
    "shortgpt",
    paper="https://arxiv.org/abs/2403.03853",
    unit="whole blocks",
    samples=128,
    length=2048,
    bibtex="men2024shortgpt",
    edits=(DropBlock,),
    needs="S forwards without the LM head",
    amount=Amount(shared="influence"),
)
def shortgpt(
    model: Model, tokens: Tokens, budget: Budget, run: Run, *, positions: Positions = "all", order: Order = "samples"
) -> Iterator[Edit]:
    """The whole blocks that change the residual stream least (Block Influence), in one shot.

    The paper does not fix the amount of calibration; the 2SSP paper's comparison takes 256 windows of C4.

    Args:
        positions: all tokens (the paper's mean), or only the last of each window (the 2SSP repository's).
        order: samples or blocks; how the calibration walks (equal results, different memory).
    """
    layout = model.layout()
    budget.whole_blocks(layout)  # is it feasible at all?

    def measured() -> Tensor:
        spans, label = [(1, influence)], "shortgpt block influence"
        return span_distances(model, tokens, spans, positions=positions, order=order, run=run, label=label)[0]

    influences = run.step("influence", measured)
    for number in least_influential(layout, influences, budget):
        run.log("shortgpt: block %d goes, influence %.6f", number, influences[list(layout.blocks).index(number)])
        yield DropBlock(number)
