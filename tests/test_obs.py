"""Optimal brain surgery against its theory: the textbook formula, the ridge in closed form, least squares."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import PROPERTY
from torch import Tensor

from secateur.errors import NumericalError
from secateur.solvers.obs import group_errors, group_sizes, prune_groups

ERRORS = ("grouped", "ordinary", "exact")


def problem(columns: int, rows: int = 5, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs (tokens, columns), a weight (rows, columns), and H = 2 E[x x^T], float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return x, torch.randn(rows, columns, generator=generator, dtype=torch.float64), 2 * x.T @ x / tokens


def columns_of(groups: Tensor, size: int) -> Tensor:
    return torch.cat([torch.arange(size) + size * int(group) for group in groups])


def true_error(x: Tensor, weight: Tensor, kept: Tensor, columns: Tensor) -> float:
    """E |W x - W' x|^2, on the inputs themselves."""
    return float((x @ weight.T - x[:, columns] @ kept.T).square().sum()) / len(x)


# --- equation 4 ---


def test_one_column_is_the_textbook_formula() -> None:
    _, weight, h = problem(7)
    inverse = torch.linalg.inv(h)
    costs = [float(weight[:, p].square().sum() / inverse[p, p]) for p in range(7)]
    worst = min(range(7), key=costs.__getitem__)
    by_hand = weight - weight[:, [worst]] / inverse[worst, worst] * inverse[[worst], :]
    kept = prune_groups(weight, h.clone(), 1, [1], damping=0)
    stay = [p for p in range(7) if p != worst]
    assert kept.index.tolist() == stay
    assert torch.allclose(by_hand[:, worst], torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(kept.weight, by_hand[:, stay])
    assert kept.error == pytest.approx(costs[worst] / 2)  # |dW X|^2 is half of dW H dW^T


@settings(PROPERTY)
@given(
    size=st.integers(1, 4), groups=st.integers(2, 6), data=st.data(), error=st.sampled_from(ERRORS),
    damping=st.sampled_from([0.0, 0.01, 1.0]), shrinkage=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_sequence_of_removals_is_the_ridge_in_closed_form(
    size: int, groups: int, data: st.DataObject, error: Any, damping: float, shrinkage: float, seed: int
) -> None:
    """W'_K = W (H + R)[:, K] (H_KK + R)^-1, a ridge towards the original weights."""
    schedule = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    schedule = schedule if sum(schedule) < groups else [1]
    x, weight, h = problem(size * groups, seed=seed)
    kept = prune_groups(weight, h.clone(), size, schedule, error=error, damping=damping, shrinkage=shrinkage)
    assert len(kept.index) == groups - sum(schedule)
    columns = columns_of(kept.index, size)
    shrunk = h + shrinkage * h.diagonal().diag()
    ridge = shrunk + damping * shrunk.diagonal().mean() * torch.eye(len(h))
    closed = weight @ ridge[:, columns] @ torch.linalg.inv(ridge[columns][:, columns])
    assert torch.allclose(kept.weight, closed, atol=1e-8)
    if not damping and not shrinkage:
        assert kept.error == pytest.approx(true_error(x, weight, kept.weight, columns), rel=1e-6)


def test_shrinkage_loses_less_on_fresh_tokens_where_there_were_few() -> None:
    """Two tokens to a column, and columns that have as much of their own as they share."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(9_000, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    x = (shared / 8**0.5 + torch.randn(9_000, 64, generator=generator)) * torch.logspace(0, -1, 64)
    weight, few = torch.randn(5, 64, generator=generator), x[:128]
    errors = []
    for shrinkage in (0.0, 64 / 128):
        kept = prune_groups(weight, 2 * few.T @ few / 128, 1, [1] * 32, damping=0.001, shrinkage=shrinkage)
        errors.append(true_error(x[128:], weight, kept.weight, kept.index))
    assert errors[1] < 0.9 * errors[0]


def anew(weight: Tensor, h: Tensor, schedule: list[int], damping: float) -> tuple[Tensor, Tensor]:
    """Kept columns and their weight, with an inverse of its own in every iteration, float64."""
    ridge = h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h))
    weight, alive = weight.double(), torch.arange(len(h))
    for count in schedule:
        inverse = torch.linalg.inv(ridge[alive][:, alive])
        order = torch.sort(group_errors(weight, inverse, 1), stable=True).indices
        gone, stay = order[:count], order[count:].sort().values
        weight = (weight - weight[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], inverse[gone]))[:, stay]
        alive = alive[stay]
    return alive, weight


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
@pytest.mark.parametrize("schedule", [[1] * 60, [32, 16, 8, 4]])
def test_down_dated_inverses_choose_as_inverses_anew(dtype: torch.dtype, close: float, schedule: list[int]) -> None:
    _, weight, h = problem(96)
    kept = prune_groups(weight, h.to(dtype, copy=True), 1, schedule)
    alive, expected = anew(weight, h, schedule, 0.01)
    assert torch.equal(kept.index, alive)
    assert torch.allclose(kept.weight.double(), expected, rtol=0, atol=close * float(expected.abs().max()))


def test_an_inverse_that_rounding_has_spoiled_is_made_anew() -> None:
    """Columns of unequal size, no damping, float32: down-dates alone would lose a quarter more here."""
    x, weight, _ = problem(96, tokens=400)
    x = x @ torch.diag(torch.logspace(0, -2, 96, dtype=torch.float64))
    h = 2 * x.T @ x / len(x)
    kept = prune_groups(weight, h.to(torch.float32, copy=True), 1, [1] * 48, damping=0)
    alive, expected = anew(weight, h, [1] * 48, 0)
    least = true_error(x, weight, expected, alive)
    assert true_error(x, weight, kept.weight.double(), kept.index) == pytest.approx(least, rel=1e-3)


def test_the_order_of_columns_does_not_matter() -> None:
    _, weight, h = problem(12)
    shuffled = torch.randperm(4, generator=torch.Generator().manual_seed(2))
    columns = columns_of(shuffled, 3)
    before = weight.clone(), h.clone()
    one = prune_groups(weight, h.clone(), 3, [1, 1])
    assert all(torch.equal(now, was) for now, was in zip((weight, h), before, strict=True))  # not changed
    other = prune_groups(weight[:, columns], h[columns][:, columns], 3, [1, 1])
    assert sorted(shuffled[other.index].tolist()) == one.index.tolist()
    assert other.error == pytest.approx(one.error)


# --- how a head is judged ---


def test_the_grouped_factors_diagonal_are_the_pivots_of_elimination() -> None:
    """Down-dating H^-1 column by column (equation 3) inside a head meets the squared diagonal of its block's factor."""
    _, _, h = problem(12)
    inverse, size = torch.linalg.inv(h), 4
    ones = torch.ones(1, 12, dtype=torch.float64)
    for group in range(3):
        down, pivots = inverse.clone(), []
        for p in columns_of(torch.tensor([group]), size).tolist():
            pivots.append(float(down[p, p]))
            down = down - down[:, [p]] @ down[[p], :] / down[p, p]
        by_pivots = sum(1 / pivot for pivot in pivots)
        assert float(group_errors(ones, inverse, size, "grouped")[group]) == pytest.approx(by_pivots)


def test_the_exact_error_is_that_of_least_squares() -> None:
    x, weight, h = problem(12)
    errors = group_errors(weight, torch.linalg.inv(h), 3, "exact")
    for group in range(4):
        rest = columns_of(torch.tensor([g for g in range(4) if g != group]), 3)
        fitted = torch.linalg.lstsq(x[:, rest], x @ weight.T).solution.T
        assert float(errors[group]) / 2 == pytest.approx(true_error(x, weight, fitted, rest), rel=1e-8)


def test_the_three_errors_are_one_for_single_columns_and_for_uncorrelated_inputs() -> None:
    _, weight, h = problem(8)
    apart = torch.diag(torch.linspace(1, 2, 8, dtype=torch.float64))
    for inverse, size in ((torch.linalg.inv(h), 1), (apart, 2)):
        first, *others = (group_errors(weight, inverse, size, error) for error in ERRORS)
        assert all(torch.allclose(first, other) for other in others)


# --- what must go first, and what costs nothing ---


def test_an_unused_head_goes_first() -> None:
    for error in ERRORS:
        x, weight, _ = problem(12)
        x[:, 3:6] = 0  # nothing ever comes in
        weight[:, 9:12] = 0  # nothing ever goes out
        kept = prune_groups(weight, 2 * x.T @ x / len(x), 3, [1, 1], error=error)
        assert kept.index.tolist() == [0, 2]
        assert torch.allclose(kept.weight, weight[:, [0, 1, 2, 6, 7, 8]], atol=1e-6)


def test_factors_decide_between_losses_and_change_no_weight() -> None:
    _, weight, h = problem(8)
    first = prune_groups(weight, h.clone(), 2, [1])
    factors = torch.ones(4)
    factors[first.order[0]] = 1e6
    later = prune_groups(weight, h.clone(), 2, [1, 1, 1], factors=factors)
    assert later.index.tolist() == [first.order[0]]
    same = prune_groups(weight, h.clone(), 2, [1], factors=3 * torch.ones(4))
    assert same.index.tolist() == first.index.tolist()
    assert torch.equal(same.weight, first.weight)


@pytest.mark.parametrize("dependence", ["duplicate", "sum of two"])
def test_a_neuron_that_others_can_stand_for_costs_nothing(dependence: str) -> None:
    x, weight, _ = problem(8)
    x[:, 5] = x[:, 2] if dependence == "duplicate" else x[:, 1] - 0.5 * x[:, 2]
    h = 2 * x.T @ x / len(x)
    scale = float((x @ weight.T).square().sum()) / len(x)
    shares = []
    for damping in (1e-2, 1e-4, 1e-8):
        kept = prune_groups(weight, h.clone(), 1, [1], damping=damping)
        shares.append(true_error(x, weight, kept.weight, kept.index) / scale)
    assert shares[-1] < 1e-5
    assert shares == sorted(shares, reverse=True)


def test_with_compensation_the_error_is_smaller() -> None:
    x, weight, h = problem(12)
    with_it, without = (prune_groups(weight, h.clone(), 3, [1, 1], damping=0, compensate=on) for on in (True, False))
    assert torch.equal(without.weight, weight[:, columns_of(without.index, 3)])
    assert without.error == pytest.approx(true_error(x, weight, without.weight, columns_of(without.index, 3)))
    assert with_it.error < without.error


# --- numbers that go wrong ---


def test_a_singular_hessian_gets_more_damping(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))  # 3 tokens for 10 columns
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.WARNING):
        kept = prune_groups(weight, 2 * x.T @ x / 3, 1, [2, 2], damping=0, name="block 7, FFN")
    assert torch.isfinite(kept.weight).all()
    assert "block 7, FFN: the Hessian is singular" in caplog.text


def test_inputs_that_are_not_finite_are_an_error() -> None:
    h = torch.eye(4)
    h[1, 2] = torch.nan
    with pytest.raises(NumericalError, match="block 3, FFN: the inputs have NaN or Inf"):
        prune_groups(torch.ones(2, 4), h, 1, [1], name="block 3, FFN")


# --- dynamic group size ---


def test_the_released_schedule_is_the_authors() -> None:
    assert group_sizes(2752, "released") == [1024, 304, *[64] * 22, 16]
    assert group_sizes(5504, "released")[:4] == [1024, 992, 240, 64]
    assert len(group_sizes(5504, "released")) == 54


@settings(PROPERTY)
@given(total=st.integers(0, 6000), size=st.sampled_from(["released", "paper", 1, 128, 5000]))
def test_every_schedule_removes_what_is_asked(total: int, size: Any) -> None:
    sizes = group_sizes(total, size)
    assert sum(sizes) == total
    assert all(count > 0 for count in sizes)
    if isinstance(size, str):
        assert max(sizes, default=0) <= 1024
