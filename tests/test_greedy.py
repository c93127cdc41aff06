"""Greedy removal: the least loss each round, NaN passed over, ties to the earlier candidate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import tiny, tiny_tokens
from torch import Tensor

from secateur.engine.loss import NegativeLogLikelihood
from secateur.engine.sweep import Part, Sweeper
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.run import Run
from secateur.solvers.greedy import greedy_removal

PPL = NegativeLogLikelihood()
ALL = [Part(number, kind) for number in range(4) for kind in ("attention", "mlp")]


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


def test_a_candidate_that_leaves_nan_behind_is_passed_over() -> None:
    model = tiny("qwen3")
    with model.open(2) as block, torch.no_grad():
        block.mlp_out.weight.fill_(torch.nan)
    rounds = greedy_removal(Sweeper(model, Run()), tiny_tokens(model, 2, 8), ALL, 2, metric=PPL, key="search")
    part, loss = next(rounds)
    assert part == Part(2, "mlp")  # only without it is anything finite
    assert math.isfinite(loss)


def test_nothing_finite_is_an_error_that_says_what_helps() -> None:
    model = tiny("qwen3")
    with torch.no_grad():
        model.hf.lm_head.weight.fill_(torch.inf)
    rounds = greedy_removal(Sweeper(model, Run()), tiny_tokens(model, 2, 8), ALL, 3, metric=PPL, key="search")
    with pytest.raises(NumericalError, match=r"search 1/3.*float32"):
        next(rounds)


def test_nothing_to_remove_costs_nothing() -> None:
    model, run = tiny("llama"), Run()
    assert list(greedy_removal(Sweeper(model, run), tiny_tokens(model, 2, 8), ALL, 0, metric=PPL, key="search")) == []
    assert run.meter.block_tokens == run.meter.head_tokens == 0
