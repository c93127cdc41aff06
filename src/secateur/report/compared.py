"""Which cells differ, which do not, and of which it is not known: paired over windows and documents."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.judge import statistics
from secateur.judge.statistics import Pairs, told_apart
from secateur.report.results_before import CellResult, Results, finite_or_none, same_windows


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
    differences = _losses(a, b, texts)
    if not differences:
        return None
    both = [(a.section("perplexity")[text], b.section("perplexity")[text]) for text in texts]
    return _gap(
        differences,
        [_pairs(x.get("window_nll"), y.get("window_nll"), x.get("window_predictions") or []) for x, y in both],
    )


def loss_difference(a: CellResult, b: CellResult, texts: tuple[str, ...]) -> float | None:
    """That of `loss_gap`, without the work for an interval."""
    return _mean(_losses(a, b, texts))


@functools.lru_cache(maxsize=1024)
def accuracy_gap(a: CellResult, b: CellResult, tasks: tuple[str, ...]) -> Gap | None:
    """The difference of the mean over tasks; None if a task is not measured in both in the same way."""
    differences = _accuracies(a, b, tasks)
    if not differences:
        return None
    both = [(a.section("tasks")[task], b.section("tasks")[task]) for task in tasks]
    return _gap(differences, [_pairs(x.get("per_document"), y.get("per_document"), None) for x, y in both])


def accuracy_difference(a: CellResult, b: CellResult, tasks: tuple[str, ...]) -> float | None:
    """That of `accuracy_gap`, without the work for an interval."""
    return _mean(_accuracies(a, b, tasks))


def _losses(a: CellResult, b: CellResult, texts: tuple[str, ...]) -> list[float] | None:
    """The difference on each text."""
    found: list[float] = []
    for text in texts:
        one, other = a.section("perplexity").get(text), b.section("perplexity").get(text)
        if not one or not other or not same_windows(one, other):
            return None
        losses = finite_or_none(one.get("nll")), finite_or_none(other.get("nll"))
        if losses[0] is None or losses[1] is None:
            return None
        found.append(losses[0] - losses[1])
    return found


def _accuracies(a: CellResult, b: CellResult, tasks: tuple[str, ...]) -> list[float] | None:
    """The difference at each task."""
    found: list[float] = []
    for task in tasks:
        one, other = a.section("tasks").get(task), b.section("tasks").get(task)
        if not one or not other or any(one.get(key) != other.get(key) for key in ("metric", "fewshot", "documents")):
            return None
        values = finite_or_none(one["value"]), finite_or_none(other["value"])
        if values[0] is None or values[1] is None:
            return None
        found.append(values[0] - values[1])
    return found


def _mean(differences: Sequence[float] | None) -> float | None:
    return sum(differences) / len(differences) if differences else None


def _pairs(ours: Any, theirs: Any, weights: Any) -> Pairs | None:
    """One text's windows or one task's documents; None where they are not told, or not of both."""
    columns = [ours or [], theirs or [], *([] if weights is None else [weights])]
    told = len({len(column) for column in columns}) == 1 and len(columns[0]) > 0
    if not told or any(finite_or_none(value) is None for column in columns for value in column):
        return None
    return ours, theirs, weights


def _gap(differences: Sequence[float], strata: Sequence[Pairs | None]) -> Gap:
    difference = sum(differences) / len(differences)
    known = [each for each in strata if each is not None]
    if len(known) < len(strata):
        return Gap(difference, None, None)
    found = statistics.difference(known)
    return Gap(difference, finite_or_none(found["low"]), finite_or_none(found["high"]), found["p"])


def ratio(results: Results, cell: CellResult) -> float | None:
    """Perplexity over the dense model's: the geometric mean over the texts of one length."""
    if results.dense is None or not cell.done:
        return None
    found = loss_gap(cell, results.dense, results.averaged_texts)
    return math.exp(found.difference) if found and found.difference < 700 else None


def accuracy(results: Results, cell: CellResult) -> float | None:
    """The mean over the tasks that count; None unless the cell has them all."""
    return results.average.of(cell.section("tasks"))


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
        found = [finite_or_none(results.loss(cell, text).get("nll")) for text in chosen]
        known = [each for each in found if each is not None]
        return sum(known) / len(chosen) if chosen and len(known) == len(chosen) else None

    return _rank(cells, mean, lambda a, b: loss_gap(a, b, chosen))


def by_accuracy(results: Results, cells: Sequence[CellResult], tasks: Sequence[str] | None = None) -> Ranking:
    """Rank by the mean accuracy over tasks (those that count if None); cells that lack one are left out."""
    chosen = results.average.tasks if tasks is None else tuple(tasks)

    def shortfall(cell: CellResult) -> float | None:
        found = [cell.section("tasks").get(task, {}) for task in chosen]
        values = [finite_or_none(each.get("value")) for each in found]
        known = [value for value in values if value is not None]
        alike = all(
            each.get("metric") == results.average.metrics.get(task) for each, task in zip(found, chosen, strict=True)
        )
        return -sum(known) / len(chosen) if chosen and alike and len(known) == len(chosen) else None

    return _rank(cells, shortfall, lambda a, b: accuracy_gap(a, b, chosen))


def bold(
    results: Results, rank: Callable[[Sequence[CellResult]], Ranking]
) -> tuple[frozenset[CellResult], frozenset[CellResult]]:
    """Whom every table prints bold in a column, and of whom it is not known whether they should be.

    Bold are, of each size that was asked for, the best and all that the intervals do not tell from it; without an
    interval the best alone. A failed cell is in no ranking, nor is a 2SSP at another method's size; one that is alone
    at its size is the best of nothing.
    """
    found = [ranking for size in results.sparsities if len((ranking := rank(results.of_size(size))).cells) > 1]
    return (
        frozenset(cell for ranking in found for cell in ranking.level),
        frozenset(cell for ranking in found for cell in ranking.unsure),
    )


def _rank(
    cells: Sequence[CellResult],
    badness: Callable[[CellResult], float | None],
    gap: Callable[[CellResult, CellResult], Gap | None],
) -> Ranking:
    scored = [(value, order, cell) for order, cell in enumerate(cells) if (value := badness(cell)) is not None]
    ranked = tuple(cell for _, _, cell in sorted(scored, key=lambda each: each[:2]))
    return Ranking(ranked, tuple(None if cell is ranked[0] else gap(cell, ranked[0]) for cell in ranked))
