"""Which cells differ, which do not, and of which it is not known: paired over windows and documents. Times over the
dense model's, paired over rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from secateur.judge.results import Inference, Perplexity, TaskResult
from secateur.judge.statistics import Pairs, difference, quartiles, told_apart
from secateur.report.results import CellResult, Results, same_windows

ALL, ACCURACY = "*", "accuracy"  # keys: all texts of one length together, and the tasks that count
LARGEST = 700.0  # nats whose exponential is still a number
TIMED = {"prefill": "prefill_ms", "token": "token_ms", "throughput": "throughput_tokens_s"}  # by kind: its key


def exp(nats: float | None) -> float | None:
    """A ratio of perplexities; None where it is no number."""
    return math.exp(nats) if nats is not None and nats < LARGEST else None


class Gap(NamedTuple):
    """The difference a - b of two cells with its 95 % interval, None where the data allow none.

    Of perplexities it is the difference of losses in nats per token, of tasks that of the accuracy; `p` is McNemar's
    where all answers are right or wrong.
    """

    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def apart(self) -> bool | None:
        """Whether the two differ as far as the data tell: `statistics.told_apart`."""
        return told_apart(self.low, self.high, self.p)


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


@dataclass(frozen=True, eq=False)
class Measure:
    """What cells are compared by: the mean loss over texts, or the mean accuracy over tasks, each of which weighs the
    same. A cell has it if it has every text or task, over the same windows, or asked in the same way, as the rest.

    Attributes:
        key: ALL, a text after "perplexity:", a task after "task:", or ACCURACY.
        lower: whether it is of losses, of which the lower are the better ones; they are compared by the ratio of
            perplexities, accuracies by their difference.
        names: of the texts or tasks; reference: the result of each that others must be like.
        shown: the number that tables show: a perplexity, that over the dense model's, or an accuracy.
    """

    key: str
    title: str
    lower: bool
    names: tuple[str, ...]
    reference: Mapping[str, Perplexity | TaskResult]
    shown: Callable[[CellResult], float | None]

    def of(self, cell: CellResult) -> list[tuple[float, Perplexity | TaskResult]] | None:
        """A cell's numbers and results, by text or task."""
        known: Mapping[str, Perplexity | TaskResult] = cell.perplexity if self.lower else cell.tasks
        numbers = []
        for name in self.names:
            result, reference = known.get(name), self.reference.get(name)
            number = result.nll if isinstance(result, Perplexity) else result.value if result else None
            if result is None or reference is None or number is None or not _alike(result, reference):
                return None
            numbers.append((number, result))
        return numbers or None

    def difference(self, a: CellResult, b: CellResult) -> float | None:
        """That of `gap`, without the work for an interval."""
        ours, theirs = self.of(a), self.of(b)
        if ours is None or theirs is None:
            return None
        return sum(x - y for (x, _), (y, _) in zip(ours, theirs, strict=True)) / len(ours)

    @lru_cache(maxsize=1024)  # noqa: B019  # words, table and pictures ask for the same ones
    def gap(self, a: CellResult, b: CellResult) -> Gap | None:
        """The mean over texts or tasks; None unless both have each. A window weighs as much as it has predictions."""
        ours, theirs, plain = self.of(a), self.of(b), self.difference(a, b)
        if ours is None or theirs is None or plain is None:
            return None
        both = [_pairs(x, y) for (_, x), (_, y) in zip(ours, theirs, strict=True)]
        known = [each for each in both if each is not None]
        if len(known) < len(both):
            return Gap(plain)
        found = difference(known)
        return Gap(found["difference"], _finite(found["low"]), _finite(found["high"]), found["p"])

    def rank(self, cells: Sequence[CellResult]) -> Ranking:
        """From best to worst; cells that lack it are left out."""
        sign = 1 if self.lower else -1
        scored = [(sign * sum(n for n, _ in of), order) for order, cell in enumerate(cells) if (of := self.of(cell))]
        ranked = tuple(cells[order] for _, order in sorted(scored))
        return Ranking(ranked, tuple(None if cell is ranked[0] else self.gap(cell, ranked[0]) for cell in ranked))


def _alike(one: Perplexity | TaskResult, other: Perplexity | TaskResult) -> bool:
    if isinstance(one, Perplexity) and isinstance(other, Perplexity):
        return same_windows(one, other)
    keys = ("metric", "fewshot", "documents")
    return [getattr(one, key, None) for key in keys] == [getattr(other, key, None) for key in keys]


def _pairs(one: Perplexity | TaskResult, other: Perplexity | TaskResult) -> Pairs | None:
    """One text's windows or one task's documents; None where they are not known, or not of both."""
    weights = None
    if isinstance(one, Perplexity) and isinstance(other, Perplexity):
        values, weights = [list(r.window_nll or ()) for r in (one, other)], list(one.window_predictions or ())
    elif isinstance(one, TaskResult) and isinstance(other, TaskResult):
        if one.stderr is None or other.stderr is None:  # no mean over documents
            return None
        values = [list(r.per_document) for r in (one, other)]
    sizes = {*map(len, values), len(values[0] if weights is None else weights)}
    if len(sizes) > 1 or 0 in sizes or any(value is None for each in values for value in each):
        return None
    return values[0], values[1], weights  # type: ignore[return-value]  # none of them is None, as was asked above


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@lru_cache(maxsize=256)
def losses(results: Results, text: str | None = None) -> Measure:
    """Of one text, or of all of one length."""
    key, title, names = ALL, "perplexity over dense", results.averaged_texts
    if text is None:
        return Measure(key, title, True, names, results.windows, lambda cell: ratio(results, cell))
    key, title, names = f"perplexity:{text}", f"perplexity, {text}", (text,)
    return Measure(key, title, True, names, results.windows, lambda cell: results.perplexity(cell, text))


@lru_cache(maxsize=256)
def accuracies(results: Results, task: str | None = None) -> Measure:
    """Of one task, or of all that count."""
    key, title, names = ACCURACY, f"mean {results.average.metric}", results.average.tasks
    if task is None:
        return Measure(key, title, False, names, results.asked, results.accuracy)
    return Measure(f"task:{task}", task, False, (task,), results.asked, lambda cell: value_of(cell, task))


def value_of(cell: CellResult, task: str) -> float | None:
    return cell.tasks[task].value if task in cell.tasks else None


def ratio(results: Results, cell: CellResult) -> float | None:
    """Perplexity over the dense model's: the geometric mean over the texts of one length."""
    return exp(losses(results).difference(cell, results.dense)) if results.dense else None


def bold(results: Results, measure: Measure) -> tuple[frozenset[CellResult], frozenset[CellResult]]:
    """Whom every table prints bold in a column, and of whom it is not known whether they should be.

    Bold are, of each size that was asked for, the best and all that the intervals do not tell from it; without an
    interval the best alone. A failed cell is in no ranking, nor is a 2SSP at another method's size; one that is alone
    at its size is the best of nothing.
    """
    rankings = [measure.rank(results.of_size(size)) for size in results.sparsities]
    some = [ranking for ranking in rankings if len(ranking.cells) > 1]
    return (
        frozenset(cell for ranking in some for cell in ranking.level),
        frozenset(cell for ranking in some for cell in ranking.unsure),
    )


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
    """The median of the ratios round by round, and the range of their quartiles: in each round the models run right
    after each other, so that what slows down both cancels. Of cells made before rounds were stored, median over median
    without a range: nobody knows which rounds belong together."""
    rounds = [getattr(each, f"{key}_rounds") or [] for each in (ours, theirs)]
    if not rounds[0] or len(rounds[0]) != len(rounds[1]) or not all(rounds[1]):
        return getattr(ours, key) / getattr(theirs, key), None, None
    ratios = [value / dense for value, dense in zip(*rounds, strict=True)]
    return statistics.median(ratios), *(quartiles(ratios) or (None, None))
