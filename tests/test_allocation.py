"""The allocation: curves that meet a budget."""

from __future__ import annotations

import pytest
from oracles import arithmetic

from secateur.errors import InfeasibleBudgetError
from secateur.model.budget import Budget
from secateur.solvers.allocation import curve_allocation
from secateur.solvers.ratios import Curve

SMOLLM2 = arithmetic(30, 576, 1536, 9, 3, 64)


@pytest.mark.parametrize("shape", ["log", "uniform", "linear", "log-decrease"])
@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.2, of="model"), Budget(0.25, round_to=32)])
def test_a_curve_meets_the_budget_to_a_step_of_neurons(shape: Curve, budget: Budget) -> None:
    allocation = curve_allocation(SMOLLM2, budget, shape)
    gone = SMOLLM2.block_parameters - allocation.parameters(SMOLLM2)
    assert abs(gone - budget.target(SMOLLM2)) <= budget.round_to * SMOLLM2.blocks[0].neuron
    assert all(width % budget.round_to == 0 for width in allocation.widths.values())
    widths = list(allocation.widths.values())
    falling = {"log": widths[0] > widths[-1], "linear": widths[0] > widths[-1], "log-decrease": widths[0] < widths[-1]}
    assert falling.get(shape, max(widths) - min(widths) <= budget.round_to)


def test_ffns_alone_do_not_reach_everything() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"reach 0.*0\.74"):
        curve_allocation(SMOLLM2, Budget(0.8))
