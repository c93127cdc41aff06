"""How much is to go: which values are refused, both conventions, rounding."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILY_NAMES, parameters, tiny
from oracles import PROPERTY, edited

from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.model.budget import Budget, leading, shares
from secateur.model.layout import Layout
from secateur.surgery.edits import DropAttention, DropBlock, KeepNeurons


@pytest.mark.parametrize(
    ("field", "value"),
    [("sparsity", value) for value in (0, 1, 0.0, 1.0, -0.25, 1.5, 25, math.nan, math.inf, "0.5", None, True, 1j)]
    + [("of", value) for value in ("layers", "Blocks", "", None)]
    + [("round_to", value) for value in (0, -8, 1.5, 8.0, "8", None, True)],
)
def test_what_no_budget_is_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError):
        Budget(**{"sparsity": 0.5, field: value})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_shares_count_real_parameters(family: str) -> None:
    model = tiny(family)
    pruned = edited(model, DropBlock(0), DropAttention(1), KeepNeurons(2, (0, 1)))
    before, after = model.layout(), pruned.layout()
    gone = parameters(model) - parameters(pruned)
    inside = sum(p.numel() for p in model.blocks.parameters())
    assert shares(before, after) == pytest.approx({"blocks": gone / inside, "model": gone / parameters(model)})
    assert Budget(0.5).achieved(before, after) == pytest.approx(gone / inside)
    assert Budget(0.5, of="model").achieved(before, after) == pytest.approx(gone / parameters(model))


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.6])
def test_the_two_conventions_ask_for_the_same_parameters(sparsity: float) -> None:
    model = tiny("llama")
    layout = model.layout()
    assert Budget(sparsity).block_share(layout) == sparsity
    share = Budget(sparsity, of="model").block_share(layout)
    assert share * layout.block_parameters == pytest.approx(sparsity * parameters(model))
    assert share > sparsity
    assert Budget(sparsity).target(layout) == sparsity * layout.block_parameters
    assert Budget(sparsity, of="model").target(layout) == sparsity * layout.parameters
    assert Budget(0.99, of="model").block_share(layout) > 1  # it may be more than all blocks


@PROPERTY
@given(st.fractions(0, 100, max_denominator=64), st.integers(1, 32))
def test_widths_go_to_the_nearest_multiple_and_ties_go_up(wanted: Fraction, round_to: int) -> None:
    width = Budget(0.5, round_to=round_to).width(float(wanted), 1000)
    assert width % round_to == 0
    assert -Fraction(round_to, 2) < width - wanted <= Fraction(round_to, 2) or width == 0
    assert width >= 0


@pytest.mark.parametrize(
    ("wanted", "round_to", "width", "got"),
    [(2.5, 1, 10, 3), (3.5, 1, 10, 4), (12, 8, 40, 16), (11.9, 8, 40, 8), (4, 8, 40, 8), (3.9, 8, 40, 0),
     (-1, 1, 10, 0), (10.6, 1, 10, 10), (39, 8, 40, 40)],
)  # fmt: skip
def test_rounding_by_example(wanted: float, round_to: int, width: int, got: int) -> None:
    assert Budget(0.5, round_to=round_to).width(wanted, width) == got


# --- whole blocks, and units in a row ---


def blocks(count: int, other: int = 0) -> Layout:
    layout = tiny("llama").layout()
    return Layout(dict.fromkeys(range(count), layout.blocks[0]), other, layout.ends)


@pytest.mark.parametrize(
    ("count", "sparsity", "whole"),
    [(30, 0.25, 8), (30, 0.375, 11), (30, 0.5, 15), (32, 0.25, 8), (28, 0.375, 11), (4, 0.125, 1), (4, 0.874, 3),
     (2, 0.3, 1), (2, 0.7, 1)],
)  # fmt: skip
def test_whole_blocks_are_the_nearest_and_ties_go_up(count: int, sparsity: float, whole: int) -> None:
    layout = blocks(count, other=10**6)
    assert Budget(sparsity).whole_blocks(layout) == whole
    share = sparsity * layout.block_parameters / layout.parameters
    assert Budget(share + 1e-12, of="model").whole_blocks(layout) == whole


@pytest.mark.parametrize(
    ("count", "budget", "reach"),
    [(4, Budget(0.12), r"0\.25 .* to 0\.75 "),
     (4, Budget(0.875), r"0\.25 .* to 0\.75 "),
     (1, Budget(0.5), "nothing"), (4, Budget(0.06, of="model"), r"0\.125 .* to 0\.375 "),
     (4, Budget(0.45, of="model"), r"0\.125 .* to 0\.375 ")],
    ids=str,
)  # fmt: skip
def test_no_block_or_all_blocks_are_refused_with_what_can_be_reached(count: int, budget: Budget, reach: str) -> None:
    layout = blocks(count, other=blocks(count).block_parameters)
    with pytest.raises(InfeasibleBudgetError, match=reach):
        budget.whole_blocks(layout)


@PROPERTY
@given(st.lists(st.integers(0, 50), max_size=8), st.floats(0, 300))
def test_units_in_a_row_are_removed_until_the_nearest_total(sizes: list[int], target: float) -> None:
    apart = [abs(sum(sizes[:count]) - target) for count in range(len(sizes) + 1)]
    assert leading(target, sizes) == max(count for count, each in enumerate(apart) if each == min(apart))
