"""Which cells differ, which do not, and of which it is not known: paired over windows and documents. Times over the
dense model's, paired over rounds."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import UnsetType

from secateur.judge.averages import Average
from secateur.judge.results import Inference
from secateur.judge.statistics import Pairs, quartiles, told_apart
from secateur.judge.statistics import difference as paired_difference
from secateur.report.results import CellResult, Results, same_windows

LARGEST = 700.0  # nats whose exponential is still a number
TIMED = {"prefill": "prefill_ms", "token": "token_ms", "throughput": "throughput_tokens_s"}  # by kind: its key
_Numbers = Sequence[float | None] | UnsetType


def exp(nats: float | None) -> float | None:
    """A ratio of perplexities; None where it is no number."""
    return math.exp(nats) if nats is not None and nats < LARGEST else None


# --- differences ---


@dataclass(frozen=True)
class Gap:
    """The difference a - b of two cells with its 95 % interval, None where the data allow none.

    Of perplexities it is the difference of losses in nats per token, of tasks that of the mean accuracy; `p` is
    McNemar's where all answers are right or wrong.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None = None

    @property
    def apart(self) -> bool | None:
        """Whether the two differ as far as the data tell: `statistics.told_apart`."""
        return told_apart(self.low, self.high, self.p)


@functools.lru_cache(maxsize=1024)  # words, table and plots ask for the same ones
def loss_gap(a: CellResult, b: CellResult, texts: tuple[str, ...]) -> Gap | None:
    """The mean over texts of the difference in loss; None unless both have each text, on the same windows.

    A window weighs as much as it has predictions; every text weighs the same, whatever its number of windows. The
    exponent is a ratio of perplexities.
    """
    both = [(a.perplexity[text], b.perplexity[text]) for text in texts if text in a.perplexity and text in b.perplexity]
    return _gap(
        loss_difference(a, b, texts), [pairs(x.window_nll, y.window_nll, x.window_predictions or []) for x, y in both]
    )


def loss_difference(a: CellResult, b: CellResult, texts: Sequence[str]) -> float | None:
    """That of `loss_gap`, without the work for an interval."""
    differences = []
    for text in texts if a.done and b.done else ():
        one, other = a.perplexity.get(text), b.perplexity.get(text)
        if not one or not other or not same_windows(one, other) or one.nll is None or other.nll is None:
            return None
        differences.append(one.nll - other.nll)
    return sum(differences) / len(differences) if differences else None


@functools.lru_cache(maxsize=1024)
def accuracy_gap(a: CellResult, b: CellResult, tasks: tuple[str, ...]) -> Gap | None:
    """The difference of the mean over tasks; None if a task is not measured in both in the same way."""
    both = [(a.tasks[task], b.tasks[task]) for task in tasks if task in a.tasks and task in b.tasks]
    return _gap(accuracy_difference(a, b, tasks), [pairs(x.per_document, y.per_document, None) for x, y in both])


def accuracy_difference(a: CellResult, b: CellResult, tasks: Sequence[str]) -> float | None:
    """That of `accuracy_gap`, without the work for an interval."""
    differences = []
    for task in tasks if a.done and b.done else ():
        one, other = a.tasks.get(task), b.tasks.get(task)
        if not one or not other or one.value is None or other.value is None:
            return None
        if (one.metric, one.fewshot, one.documents) != (other.metric, other.fewshot, other.documents):
            return None
        differences.append(one.value - other.value)
    return sum(differences) / len(differences) if differences else None


def pairs(ours: _Numbers, theirs: _Numbers, weights: Sequence[float] | None) -> Pairs | None:
    """One text's windows or one task's documents; None where they are not known, or not of both."""
    known = [value for value in ours or () if value is not None], [value for value in theirs or () if value is not None]
    sizes = {len(known[0]), len(known[1]), len(ours or ()), len(theirs or ())}
    sizes |= set() if weights is None else {len(weights)}
    return (*known, weights) if len(sizes) == 1 and known[0] else None


def _gap(difference: float | None, strata: Sequence[Pairs | None]) -> Gap | None:
    if difference is None:
        return None
    known = [each for each in strata if each is not None]
    if len(known) < len(strata):
        return Gap(difference, None, None)
    found = paired_difference(known)
    return Gap(difference, _finite(found["low"]), _finite(found["high"]), found["p"])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def ratio(results: Results, cell: CellResult) -> float | None:
    """Perplexity over the dense model's: the geometric mean over the texts of one length."""
    return exp(loss_difference(cell, results.dense, results.averaged_texts)) if results.dense else None


# --- rankings ---


@dataclass(frozen=True)
class Ranking:
    """Cells from best to worst by one measure.

    Attributes:
        gaps: of each cell to the best one, in the same order; the first is None.
    """

    cells: tuple[CellResult, ...]
    gaps: tuple[Gap | None, ...]

    @property
    def level(self) -> tuple[CellResult, ...]:
        """The one with the best number, and those that the data do not tell from it."""
        return self.cells[:1] + tuple(cell for cell, gap in self._behind if gap and gap.apart is False)

    @property
    def unsure(self) -> tuple[CellResult, ...]:
        """Those of which it is not known whether they differ from the one with the best number: no interval."""
        return tuple(cell for cell, gap in self._behind if gap is None or gap.apart is None)

    @property
    def _behind(self) -> list[tuple[CellResult, Gap | None]]:
        return list(zip(self.cells, self.gaps, strict=True))[1:]


def by_loss(results: Results, cells: Sequence[CellResult], texts: Sequence[str] | None = None) -> Ranking:
    """Rank by the mean loss over texts (those of one length if None); cells without one of them are left out."""
    chosen = results.averaged_texts if texts is None else tuple(texts)

    def mean(cell: CellResult) -> float | None:
        losses = [result.nll for text in chosen if (result := results.loss(cell, text)) and result.nll is not None]
        return sum(losses) / len(chosen) if chosen and len(losses) == len(chosen) else None

    return _rank(cells, mean, lambda a, b: loss_gap(a, b, chosen))


def by_accuracy(results: Results, cells: Sequence[CellResult], tasks: Sequence[str] | None = None) -> Ranking:
    """Rank by the mean accuracy over tasks (those that count if None); cells that lack one are left out."""
    chosen, metrics = results.average.tasks if tasks is None else tuple(tasks), results.average.metrics

    def shortfall(cell: CellResult) -> float | None:
        of_cell = [result for task in chosen if (result := cell.tasks.get(task)) and result.metric == metrics.get(task)]
        values = [result.value for result in of_cell if result.value is not None and cell.done]
        return -sum(values) / len(chosen) if chosen and len(values) == len(chosen) else None

    return _rank(cells, shortfall, lambda a, b: accuracy_gap(a, b, chosen))


def can_be_best(average: Average, task: str) -> bool:
    """Whether a task tells models apart, and it is known which way it is better."""
    return average.is_share(task) and task not in average.grey


def bold(
    results: Results, rank: Callable[[Sequence[CellResult]], Ranking]
) -> tuple[frozenset[CellResult], frozenset[CellResult]]:
    """Whom every table prints bold in a column, and of whom it is not known whether they should be.

    Bold are, of each size that was asked for, the best and all that the intervals do not tell from it; without an
    interval the best alone. A failed cell is in no ranking, nor is a 2SSP at another method's size; one that is alone
    at its size is the best of nothing.
    """
    rankings = [ranking for size in results.sparsities if len((ranking := rank(results.of_size(size))).cells) > 1]
    return (
        frozenset(cell for ranking in rankings for cell in ranking.level),
        frozenset(cell for ranking in rankings for cell in ranking.unsure),
    )


def _rank(
    cells: Sequence[CellResult],
    badness: Callable[[CellResult], float | None],
    gap: Callable[[CellResult, CellResult], Gap | None],
) -> Ranking:
    scored = [(value, order, cell) for order, cell in enumerate(cells) if (value := badness(cell)) is not None]
    ranked = tuple(cell for _, _, cell in sorted(scored, key=lambda each: each[:2]))
    return Ranking(ranked, tuple(None if cell is ranked[0] else gap(cell, ranked[0]) for cell in ranked))


# --- times ---


class Timing(NamedTuple):
    """What was timed, relative to the dense model timed in turn with it.

    Attributes:
        low, high: the range of the ratio's quartiles; None where it is not known.
        value: the cell's own median, in ms or in tokens per second.
    """

    ratio: float
    low: float | None
    high: float | None
    value: float


def speed(cell: CellResult, kind: str) -> Timing | None:
    """What was timed of a cell; None where it was not.

    Args:
        kind: "prefill" (the whole prompt), "token" (each further one) or "throughput" (the higher, the faster).
    """
    if cell.inference is None or not cell.done:
        return None
    ours, theirs, key = cell.inference.pruned, cell.inference.dense, TIMED[kind]
    value, dense = getattr(ours, key), getattr(theirs, key)
    return Timing(*_over_dense(ours, theirs, key), value) if value is not None and dense else None


def _over_dense(ours: Inference, theirs: Inference, key: str) -> tuple[float, float | None, float | None]:
    """A ratio and the range of its quartiles, in one of two ways.

    Where the rounds are stored: median and quartiles of the ratios round by round. In each round the models run right
    after each other, so that what slows down both cancels.

    Where they are not, as in cells made before they were: median over median. The range is from the lower quartile over
    the dense model's upper one to the upper one over its lower one: nobody knows which rounds belong together. A
    quartile is taken as half the stored range from the median; the range is not known where one has no range, or the
    dense model's lower quartile would be below 0.
    """
    rounds = [getattr(each, f"{key}_rounds") or [] for each in (ours, theirs)]
    if rounds[0] and len(rounds[0]) == len(rounds[1]) and all(rounds[1]):
        ratios = [value / dense for value, dense in zip(*rounds, strict=True)]
        return statistics.median(ratios), *(quartiles(ratios) or (None, None))
    value, dense = getattr(ours, key), getattr(theirs, key)
    spreads = [getattr(each, f"{key}_iqr", None) for each in (ours, theirs)]
    if spreads[0] is None or spreads[1] is None or spreads[1] >= 2 * dense:
        return value / dense, None, None
    half, dense_half = spreads[0] / 2, spreads[1] / 2
    return value / dense, max(0.0, value - half) / (dense + dense_half), (value + half) / (dense - dense_half)
