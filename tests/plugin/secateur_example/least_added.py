"""Least added: the blocks whose output differs least from their input, by the length of what they add, go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from secateur import Budget, Model, Run, Tokens
from secateur.engine.walk import Visit, walk
from secateur.methods import method
from secateur.surgery.edits import DropBlock, Edit

Norm = Literal["l1", "l2"]
BIBTEX = "@misc{leastadded, title = {Least added}, year = {2026}}"


def added(visit: Visit, norm: Norm) -> Tensor:
    """The sum over tokens of |out - in| / |in|, float64."""
    entered: list[Tensor] = []
    shares: list[Tensor] = []

    def leave(x: Tensor, weights: Tensor) -> None:  # (batch, length, hidden), (batch, length)
        before = entered.pop()
        sizes = [each.double().norm(int(norm[1]), dim=-1) for each in (x - before, before)]
        shares.append((sizes[0] / sizes[1] * weights).sum())

    visit.advance(block_in=lambda x, _: entered.append(x.clone()), block_out=leave)
    return torch.stack(shares).sum()


@method(
    "least-added",
    paper="https://example.org/least-added",
    unit="whole blocks",
    samples=32,
    length=2048,
    bibtex=BIBTEX,
    edits=(DropBlock,),
    needs="S forwards without the LM head",
)
def least_added(
    model: Model, tokens: Tokens, budget: Budget, run: Run, *, norm: Norm = "l2", protect: int = 1
) -> Iterator[Edit]:
    """The blocks that add the shortest vectors to the residual stream, in one shot.

    Args:
        norm: how a vector is measured.
        protect: so many blocks at the start stay if others can go.
    """
    count = budget.whole_blocks(model.layout())  # refuses what cannot be reached, before any work

    def score() -> Tensor:
        return torch.stack([added(visit, norm).cpu() for visit in walk(model, tokens, run=run, label="least-added")])

    scores = run.step("added", score)  # (blocks,); journaled, so that a replay costs no forward
    order = sorted(range(len(scores)), key=lambda place: (place < protect, float(scores[place])))
    for number in [model.numbers[place] for place in order[:count]]:
        yield DropBlock(number)
