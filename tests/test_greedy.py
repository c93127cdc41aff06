"""Greedy removal: the least loss each round, NaN passed over, ties to the earlier candidate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import tiny, tiny_tokens
from oracles import mean_nll, without
from torch import Tensor

from secateur.engine.loss import NegativeLogLikelihood
from secateur.engine.sweep import Part, Sweeper
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.greedy import greedy_removal
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropMLP

PPL = NegativeLogLikelihood()
ALL = [Part(number, kind) for number in range(4) for kind in ("attention", "mlp")]


def remove(model: Model, part: Part) -> None:
    apply(model, DropAttention(part.block) if part.kind == "attention" else DropMLP(part.block))


def removals(
    model: Model, count: int, candidates: list[Part] = ALL, run: Run | None = None
) -> list[tuple[Part, float]]:
    tokens = tiny_tokens(model, 2, 8)
    made = []
    for part, loss in greedy_removal(Sweeper(model, run or Run()), tokens, candidates, count, metric=PPL, key="search"):
        remove(model, part)
        made.append((part, loss))
    return made


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_round_removes_the_part_whose_absence_hurts_least(family: str) -> None:
    model, tokens = tiny(family), tiny_tokens(tiny(family), 2, 8)
    gone: list[Part] = []
    for part, loss in removals(tiny(family), 3):
        losses = {each: mean_nll(without(model, [*gone, each]), tokens) for each in ALL if each not in gone}
        assert part == min(losses, key=losses.__getitem__)
        assert loss == pytest.approx(losses[part], rel=1e-6)
        gone.append(part)
    assert len(set(gone)) == 3


@pytest.mark.parametrize(
    ("losses", "best"),
    [([3.0, 1.0, 2.0], 1), ([2.0, 1.0, 1.0], 1), ([1.0, 1.0, 1.0], 0), ([math.nan, 5.0, 4.0], 2),
     ([math.inf, 9.0, math.nan], 1), ([-math.inf, 9.0, math.nan], 1), ([0.0, -1.0, math.nan], 1)],
)  # fmt: skip
def test_the_least_finite_loss_wins_and_ties_go_to_the_earlier(losses: list[float], best: int) -> None:
    class MadeUp(Sweeper):
        def sums(self, tokens: Tokens, *_: Any) -> Tensor:
            return torch.tensor(losses, dtype=torch.float64)[:, None] * (tokens.length - 1)

    model = tiny("llama")
    candidates, tokens = ALL[5:2:-1], tiny_tokens(model, 1, 8)
    ((part, loss),) = greedy_removal(MadeUp(model, Run()), tokens, candidates, 1, metric=PPL, key="search")
    assert (part, loss) == (candidates[best], pytest.approx(losses[best]))


def test_nothing_finite_is_an_error_that_says_what_helps() -> None:
    model = tiny("qwen3")
    with torch.no_grad():
        model.hf.lm_head.weight.fill_(torch.inf)
    with pytest.raises(NumericalError, match=r"search 1/3: every candidate's loss is NaN or Inf.*float32"):
        removals(model, 3)


def test_nothing_to_remove_costs_nothing() -> None:
    run = Run()
    assert removals(tiny("llama"), 0, run=run) == []
    assert run.meter.block_tokens == run.meter.head_tokens == 0
