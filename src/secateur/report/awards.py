"""Who is best by each measure at each size, with all that the data do not tell from it. Only methods at a size that was
asked for are in the running: a 2SSP at another method's size stands beside that one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.report.compared import accuracy, by_accuracy, by_loss, ratio
from secateur.report.figures import speed
from secateur.report.looks import percent, seconds, times
from secateur.report.results_before import CellResult, Results


@dataclass(frozen=True)
class Award:
    """The best at one size.

    Attributes:
        level: the best number's cell, then those that are level with it.
        unsure: those of which it is not known whether they are, for want of an interval.
        value: the best number.
    """

    level: tuple[CellResult, ...]
    unsure: tuple[CellResult, ...]
    value: str


@dataclass(frozen=True)
class Measure:
    """One measure's best at each of the results's sizes; None where nothing was measured."""

    name: str
    awards: tuple[Award | None, ...]


def measures(results: Results) -> tuple[Measure, ...]:
    """Of all measures that at least one pruned model has."""
    kinds: tuple[tuple[str, Callable[[Results, Sequence[CellResult]], Award | None]], ...] = (
        ("perplexity over dense", _loss),
        (f"mean {results.average.metric} on tasks", _accuracy),
        ("prefill ms, over dense", lambda _, cells: _speed(cells, "prefill")),
        ("ms per token, over dense", lambda _, cells: _speed(cells, "token")),
        ("time to prune, in one run each", _pruning),
    )
    found = []
    for name, best in kinds:
        awards = tuple(best(results, results.of_size(sparsity)) for sparsity in results.sparsities)
        if any(awards):
            found.append(Measure(name, awards))
    return tuple(found)


def _loss(results: Results, cells: Sequence[CellResult]) -> Award | None:
    ranking = by_loss(results, cells)
    over = ratio(results, ranking.cells[0]) if ranking.cells else None
    return Award(ranking.level, ranking.unsure, times(over)) if over else None


def _accuracy(results: Results, cells: Sequence[CellResult]) -> Award | None:
    ranking = by_accuracy(results, cells)
    if not ranking.cells:
        return None
    return Award(ranking.level, ranking.unsure, percent(accuracy(results, ranking.cells[0])))


def _speed(cells: Sequence[CellResult], kind: str) -> Award | None:
    """Two are level if the ranges of their ratios' quartiles touch; where one has no range, it is not known."""
    found = [(timing, cell) for cell in cells if (timing := speed(cell, kind))]
    if not found:
        return None
    (best, first), *others = sorted(found, key=lambda each: each[0].ratio)
    level, unsure = [first], []
    for timing, cell in others:
        if best.high is None or timing.low is None:
            unsure.append(cell)
        elif timing.low <= best.high:
            level.append(cell)
    return Award(tuple(level), tuple(unsure), times(best.ratio))


def _pruning(results: Results, cells: Sequence[CellResult]) -> Award | None:
    timed = [(cell.wall_s, cell) for cell in cells if cell.wall_s is not None]
    if not timed:
        return None
    seconds_taken, fastest = min(timed, key=lambda each: each[0])
    return Award((fastest,), (), seconds(seconds_taken))
