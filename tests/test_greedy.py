"""Greedy removal: the least loss each round, NaN passed over, ties to the earlier candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import tiny, tiny_tokens
from torch import Tensor

from secateur.engine.loss import NegativeLogLikelihood
from secateur.engine.sweep import Part, Sweeper, Variant
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.run import Run
from secateur.solvers.greedy import Screen, greedy_removal

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


# --- screened ---


class Growing(Sweeper):
    """Losses by a rule: a part adds its own cost, times a growth per part that is gone already."""

    def __init__(self, growth: float) -> None:
        super().__init__(tiny("llama"), Run())
        self.costs = {part: 1.0 + place for place, part in enumerate(reversed(ALL))}
        self.growth, self.gone, self.tried = growth, list[Part](), list[int]()

    def loss(self, parts: list[Part]) -> float:
        return sum(self.costs[part] * self.growth**place for place, part in enumerate(parts))

    def sums(self, tokens: Tokens, variants: Sequence[Variant], *_: Any) -> Tensor:
        self.tried.append(len(variants))
        losses = [self.loss([*self.gone, *variant]) for variant in variants]
        return torch.tensor(losses, dtype=torch.float64)[:, None] * (tokens.length - 1)


def chosen(sweeper: Growing, screen: Screen | None) -> list[Part]:
    for part, loss in greedy_removal(
        sweeper, tiny_tokens(sweeper.model, 1, 8), ALL, 6, metric=PPL, key="search", screen=screen
    ):
        sweeper.gone.append(part)
        assert loss == pytest.approx(sweeper.loss(sweeper.gone))
    return sweeper.gone


@pytest.mark.parametrize(("growth", "count"), [(1.0, 1), (1.1, 3), (3.0, 8)])
def test_a_screened_search_chooses_as_the_exact_one_and_tries_fewer(growth: float, count: int) -> None:
    exact, screened = Growing(growth), Growing(growth)
    assert chosen(screened, Screen(count)) == chosen(exact, None) == ALL[:1:-1]
    assert exact.tried == [8, 7, 6, 5, 4, 3]
    assert screened.tried == [8 + 1, *(min(count, left) for left in (7, 6, 5, 4, 3))]  # and the model as it is


def test_a_candidate_whose_cost_has_risen_gives_way_to_one_that_was_not_tried_lately() -> None:
    sweeper = Growing(1.0)
    order = []
    for part, _ in greedy_removal(
        sweeper, tiny_tokens(sweeper.model, 1, 8), ALL, 6, metric=PPL, key="search", screen=Screen(2)
    ):
        order.append(part)
        sweeper.gone.append(part)
        if len(order) == 1:
            sweeper.costs |= dict.fromkeys(ALL[5:7], 100.0)  # those that would have been next
    assert order[0] == ALL[7]
    assert order[1] in ALL[5:7]  # only these were tried
    assert order[2:] == [ALL[4], ALL[3], ALL[2], ALL[1]]
