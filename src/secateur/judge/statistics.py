"""Whether two models really differ: paired intervals and tests over the same documents or windows.

Two pruned models fail on the same hard windows, so the difference per window varies far less than either model's loss
does. Every comparison here is therefore paired.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from secateur.errors import InvalidOptionError
from secateur.run import Run

SURE = 0.05  # a p below it tells two models apart, as an interval of `LEVEL` without 0 does
LEVEL = 1 - SURE  # of the intervals
DRAWS = 10_000  # bootstrap samples of every interval: tables, page and words rest on the same ones
# Student's t at 97.5 %, by degrees of freedom from 1 on; for more of them the last one, which is somewhat too wide
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_CELLS_AT_ONCE = 2_000_000  # drawn indices held at once
_ALIKE = 10  # units per distinct one, from which counting them is faster than drawing each

Answers = tuple[Sequence[float], Sequence[float]]  # of two models to the questions of one task: 1 right, 0 wrong
Pairs = tuple[Sequence[float], Sequence[float], Sequence[float] | None]  # a, b and the units' weights


class Interval(TypedDict):
    """A mean difference with its 95 % interval; infinite where nothing is known of it."""

    difference: float
    low: float
    high: float


class Difference(Interval):
    """With McNemar's p; None where the units are not answers."""

    p: float | None


def stratified_bootstrap(strata: Sequence[Pairs], *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """The mean of a - b over several texts or tasks, each of which weighs the same, with its percentile interval.

    Units (windows, documents) are drawn with replacement within each stratum, as many as it has. Drawn from all
    together, a sample would have more of one text and less of another than the mean has, and what texts differ in
    would pass for uncertainty. Where a stratum has a single unit, the interval is infinite.

    Args:
        strata: of each text or task `a` and `b`, one value per unit, of the same units in the same order; and the
            units' weights, as the number of predictions of a window, equal if None.
        draws: bootstrap samples.

    Raises:
        InvalidOptionError: no stratum; lengths differ, nothing is there, or weights are negative or all zero.
    """
    if not strata or draws < 1:
        raise InvalidOptionError(f"need at least one stratum and one draw, not {len(strata)} and {draws}")
    generator = Run(seed).rng("paired bootstrap")
    means, samples, known = [], torch.zeros(draws, dtype=torch.float64), True
    for a, b, weights in strata:
        units = _units(a, b, weights)
        means.append(sum(d * w for d, w in units) / sum(w for _, w in units))
        samples += _resampled(units, draws, generator)
        known &= len(units) > 1
    difference = sum(means) / len(means)
    if not known:
        return {"difference": difference, "low": -math.inf, "high": math.inf}
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(samples / len(means), edges).tolist()
    return {"difference": difference, "low": low, "high": high}


def _units(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None) -> list[tuple[float, float]]:
    """Difference and weight of each unit that has one."""
    _check_pairs(a, b)
    w = [1.0] * len(a) if weights is None else weights
    if len(w) != len(a) or any(each < 0 for each in w) or not any(w):
        raise InvalidOptionError(f"need {len(a)} weights, none negative and some above 0")
    return [(float(x) - float(y), float(each)) for x, y, each in zip(a, b, w, strict=True) if each > 0]


def _resampled(units: Sequence[tuple[float, float]], draws: int, generator: torch.Generator) -> Tensor:
    """Weighted means of samples drawn with replacement: (draws,)."""
    alike = Counter(units)
    if len(alike) * _ALIKE <= len(units):  # right and wrong answers by the thousand have three distinct differences
        return _by_counts(alike, draws, generator)
    values, weights = torch.tensor(units, dtype=torch.float64).T
    at_once = max(1, _CELLS_AT_ONCE // len(units))
    means = []
    for start in range(0, draws, at_once):
        drawn = torch.randint(len(units), (min(at_once, draws - start), len(units)), generator=generator)
        means.append((weights * values).take(drawn).sum(dim=1) / weights.take(drawn).sum(dim=1))
    return torch.cat(means)


def _by_counts(alike: Mapping[tuple[float, float], int], draws: int, generator: torch.Generator) -> Tensor:
    """The same by how often each distinct unit is drawn, which is multinomial: one binomial after the other."""
    sums, weights = torch.zeros(2, draws, dtype=torch.float64)
    rest = sum(alike.values())
    to_draw = torch.full((draws,), float(rest), dtype=torch.float64)
    for (value, weight), there in alike.items():
        times = torch.binomial(to_draw, torch.full_like(to_draw, there / rest), generator=generator)
        sums += times * (weight * value)
        weights += times * weight
        to_draw, rest = to_draw - times, rest - there
    return sums / weights


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """McNemar's exact test of two models on the same yes-or-no questions (1 right, 0 wrong); its two-sided p.

    Only the questions on which they disagree count: were the models equally good, each of the two would be right in
    half of them.

    Raises:
        InvalidOptionError: lengths differ, nothing is there, or a value is neither 0 nor 1.
    """
    signs = _disagreements(a, b)
    n, fewer = len(signs), min(signs.count(1), signs.count(-1))
    term = tail = 1
    for k in range(1, fewer + 1):  # the binomial coefficients, as whole numbers
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**n)


def mcnemar_over(strata: Sequence[Answers], *, seed: int = 0, draws: int = DRAWS) -> float:
    """McNemar's test of the mean over several tasks, each of which weighs the same; of a single one the exact test.

    Were the models equally good, each question on which they disagree would be a coin. So many coins are thrown for
    each task; p is the share of throws whose mean difference is as large as the one that was found.

    Raises:
        InvalidOptionError: as `mcnemar`; or there is no task.
    """
    if len(strata) == 1:
        return mcnemar(*strata[0])
    if not strata:
        raise InvalidOptionError("McNemar's test needs at least one task")
    generator = Run(seed).rng("mcnemar")
    found, thrown = 0.0, torch.zeros(draws, dtype=torch.float64)
    for a, b in strata:
        signs = _disagreements(a, b)
        coins = torch.full((draws,), float(len(signs)), dtype=torch.float64)
        heads = torch.binomial(coins, torch.full_like(coins, 0.5), generator=generator)
        found += sum(signs) / len(a)
        thrown += (2 * heads - coins) / len(a)
    as_large = int((thrown.abs() >= abs(found) - 1e-12).sum())  # sums of the same shares in another order
    return (1 + as_large) / (1 + draws)


def _disagreements(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """1 where only `a` is right, -1 where only `b` is."""
    _check_pairs(a, b)
    if not is_binary([*a, *b]):
        raise InvalidOptionError("McNemar's test takes answers that are right (1) or wrong (0), nothing between")
    return [x - y for x, y in zip(a, b, strict=True) if x != y]


def difference(strata: Sequence[Pairs], *, seed: int = 0, draws: int = DRAWS) -> Difference:
    """All that is known of a difference, over one or several texts or tasks: `stratified_bootstrap`, and `mcnemar_over`
    where all units are answers, right or wrong, without weights."""
    interval = stratified_bootstrap(strata, seed=seed, draws=draws)
    answers = [(a, b) for a, b, weights in strata if weights is None and is_binary([*a, *b])]
    p = mcnemar_over(answers, seed=seed, draws=draws) if len(answers) == len(strata) else None
    return {**interval, "p": p}


def told_apart(low: float | None, high: float | None, p: float | None = None) -> bool | None:
    """Whether two models differ as far as the data tell; None where they tell nothing. Tables and page ask here.

    Answers that are right or wrong are McNemar's: where few of them differ, a bootstrap is too sure. All else is the
    interval's.
    """
    if p is not None:
        return p < SURE
    return None if low is None or high is None else not low <= 0 <= high


def is_binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation; None for the latter of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    """The first and the third, never beyond the values themselves; None of a single value."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4)
    return max(low, min(values)), min(high, max(values))


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of a mean over few independent repeats, by Student's t; None for a single one."""
    mean, sd = mean_and_sd(values)
    if sd is None:
        return None
    margin = _T[min(len(values) - 1, len(_T)) - 1] * sd / math.sqrt(len(values))
    return mean - margin, mean + margin


def _check_pairs(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not len(a):
        raise InvalidOptionError(f"paired values are of the same units, at least one, not {len(a)} and {len(b)}")
