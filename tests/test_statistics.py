"""Paired intervals cover what they should; McNemar's test is the binomial one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from secateur.errors import InvalidOptionError
from secateur.judge.statistics import (
    DRAWS,
    Interval,
    difference,
    is_binary,
    mcnemar,
    mcnemar_over,
    mean_and_sd,
    stratified_bootstrap,
    told_apart,
)


def paired_bootstrap(a: Any, b: Any, weights: Any = None, **options: int) -> Interval:
    """Of one text or task."""
    return stratified_bootstrap([(a, b, weights)], **options)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        hard = 3 * normal(40, seed=trial)  # shared difficulty, far larger than the difference
        a, b = hard + 0.2 + 0.3 * normal(40, seed=1000 + trial), hard + 0.3 * normal(40, seed=2000 + trial)
        found = paired_bootstrap(a.tolist(), b.tolist(), seed=trial, draws=400)
        covered += found["low"] <= 0.2 <= found["high"]
    assert 0.89 <= covered / 200 <= 0.985


def test_pairing_sees_through_what_both_share() -> None:
    hard = 10 * normal(50, seed=0)
    a, b = hard + 0.1 + 0.05 * normal(50, seed=1), hard
    assert paired_bootstrap(a.tolist(), b.tolist(), draws=1000)["low"] > 0
    shuffled = b[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    assert paired_bootstrap(a.tolist(), shuffled.tolist(), draws=1000)["low"] < 0


def test_weights_are_repetitions_and_the_mean_is_exact() -> None:
    a, b, w = [1.0, 2.0, 4.0, 9.0], [0.0, 0.0, 1.0, 1.0], [1, 2, 1, 0]
    found = paired_bootstrap(a, b, w, draws=500)
    assert found["difference"] == pytest.approx((1 + 2 * 2 + 3) / 4)
    assert 1 <= found["low"] <= found["difference"] <= found["high"] <= 3  # the unit of no weight never counts


def test_the_interval_is_reproducible_and_turns_around_with_its_sides() -> None:
    a, b = normal(30, seed=1).tolist(), normal(30, seed=2).tolist()
    one, again, back = paired_bootstrap(a, b), paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert one == again
    assert (back["low"], back["high"]) == pytest.approx((-one["high"], -one["low"]))
    assert paired_bootstrap(a, b, seed=1) != one
    assert paired_bootstrap(a, a, draws=100) == {"difference": 0, "low": 0, "high": 0}
    assert paired_bootstrap([1.0], [0.5])["high"] == math.inf  # one window says nothing


def test_a_constant_difference_in_each_stratum_is_known_exactly() -> None:
    """Pooled, the interval would be as wide as the strata lie apart."""
    one, other = normal(12, seed=0), normal(50, seed=1)
    strata = [((one + 1).tolist(), one.tolist(), None), ((other - 0.5).tolist(), other.tolist(), [1.0, 3.0] * 25)]
    found = stratified_bootstrap(strata, draws=500)
    assert tuple(found.values()) == pytest.approx((0.25, 0.25, 0.25))
    pooled = paired_bootstrap([1.0] * 12 + [-0.5] * 50, [0.0] * 62, [1 / 12] * 12 + [1 / 50] * 50, draws=500)
    assert pooled["high"] - pooled["low"] > 0.5


def test_strata_weigh_the_same_and_their_errors_add_as_variances_do() -> None:
    short, long = normal(10, seed=3), normal(1000, seed=4)
    strata = [(each.tolist(), [0.0] * len(each), None) for each in (short, long)]
    found = stratified_bootstrap(strata)
    assert found["difference"] == pytest.approx(float(short.mean() + long.mean()) / 2)
    variances = [float(each.var(correction=0)) / len(each) for each in (short, long)]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * math.sqrt(sum(variances)) / 2, rel=0.05)
    alone = paired_bootstrap(*strata[0])
    assert stratified_bootstrap(strata[:1]) == alone
    assert stratified_bootstrap([strata[1], ([1.0], [0.5], None)])["low"] == -math.inf  # one unit says nothing


FEW = ([1.0] * 5 + [0.0] * 95, [0.0] * 100)  # five answers differ, all to one side


def test_one_rule_tells_models_apart() -> None:
    """Of few differing answers a bootstrap is too sure: the table and the page both hold to McNemar's test."""
    found = difference([(*FEW, None)])
    assert found["low"] is not None
    assert found["low"] > 0
    assert found["p"] == pytest.approx(2 / 2**5)
    assert told_apart(found["low"], found["high"], found["p"]) is False
    assert told_apart(found["low"], found["high"]) is True  # of values that are no answers
    assert told_apart(None, None, 0.01) is True
    assert [told_apart(*edges) for edges in ((None, 1.0), (-1.0, 1.0), (0.5, 1.0))] == [None, False, True]
    assert difference([(*FEW, [1.0] * 100)])["p"] is None  # losses of 0 and 1
    assert difference([(*FEW, None), ([0.5, 1.0], [0.5, 0.0], None)])["p"] is None


def test_mcnemar_over_tasks_is_the_pooled_test_where_all_are_of_one_size() -> None:
    right = torch.randint(2, (2, 3, 60), generator=torch.Generator().manual_seed(0)).double()
    right[0, :, :12] = 1.0
    strata = [(a.tolist(), b.tolist()) for a, b in zip(*right, strict=True)]
    pooled = mcnemar(right[0].flatten().tolist(), right[1].flatten().tolist())
    assert 0.01 < pooled < 0.2
    assert mcnemar_over(strata) == pytest.approx(pooled, abs=4 * math.sqrt(pooled / DRAWS))
    assert mcnemar_over(strata) == mcnemar_over([(b, a) for a, b in strata])
    assert mcnemar_over(strata[:1]) == mcnemar(*strata[0])
    assert mcnemar_over([(a, a) for a, _ in strata]) == 1
    big, small = ([1.0] * 10 + [0.0] * 990, [0.0] * 1000), ([0.0] * 5, [1.0] * 5)
    assert mcnemar_over([big, small]) > 0.05  # the small task weighs as much: its five answers decide
    for wrong in ([], [([0.5], [1.0]), ([1.0], [1.0])], [([1.0], [1.0]), ([1.0], [])]):
        with pytest.raises(InvalidOptionError):
            mcnemar_over(wrong)


@pytest.mark.parametrize("copies", [1, 20])  # many that are alike are counted, not drawn one by one
def test_resamples_are_those_of_drawing_units_one_by_one(copies: int) -> None:
    """Against the plain bootstrap, on weighted units."""
    d = [0.0, 0.0, 0.0, 1.0, 1.0, -2.0, 4.0, 4.0] * copies
    w = [1.0, 1.0, 2.0, 1.0, 3.0, 1.0, 0.5, 0.5] * copies
    drawn = torch.randint(len(d), (10_000, len(d)), generator=torch.Generator().manual_seed(0))
    values, weights = torch.tensor(d)[drawn], torch.tensor(w)[drawn]
    plain = torch.quantile((values * weights).sum(1) / weights.sum(1), torch.tensor([0.025, 0.975]))
    found = paired_bootstrap(d, [0.0] * len(d), w)
    assert (found["low"], found["high"]) == pytest.approx(plain.tolist(), abs=0.06 / math.sqrt(copies))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (9, 1), (0, 12), (700, 800)])
def test_mcnemar_is_the_two_sided_binomial_of_the_disagreements(only_a: int, only_b: int) -> None:
    a = [1] * only_a + [0] * only_b + [1] * 7 + [0] * 3
    b = [0] * only_a + [1] * only_b + [1] * 7 + [0] * 3
    n, fewer = only_a + only_b, min(only_a, only_b)
    brute = sum(math.comb(n, k) for k in range(n + 1) if min(k, n - k) <= fewer) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1, brute))
    assert mcnemar(a, b) == mcnemar(b, a)


@pytest.mark.parametrize(
    ("a", "b", "weights"), [([], [], None), ([1.0], [1.0, 2.0], None), ([1.0], [1.0], [0.0]), ([1.0], [1.0], [1, 1])]
)
def test_what_is_no_pair_is_refused(a: list[float], b: list[float], weights: list[float] | None) -> None:
    with pytest.raises(InvalidOptionError):
        paired_bootstrap(a, b, weights)
    with pytest.raises(InvalidOptionError):
        stratified_bootstrap([])
    with pytest.raises(InvalidOptionError, match="right"):
        mcnemar([0.5], [1])
    assert is_binary([0, 1.0, True])


def test_the_spread_of_a_single_value_is_not_known() -> None:
    assert mean_and_sd([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_sd([5.0]) == (5.0, None)
