"""Who is best by each measure at each size, with all that the data do not tell from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.report.compared import accuracy, by_accuracy, by_loss, ratio
from secateur.report.comparison import Cell, Comparison
from secateur.report.figures import speed
from secateur.report.looks import percent, seconds, times


@dataclass(frozen=True)
class Award:
    """The best at one size; `level` has it first, then those that are level with it. `value` is the best one's."""

    level: tuple[Cell, ...]
    value: str


@dataclass(frozen=True)
class Measure:
    """One measure's best at each of the comparison's sizes; None where nothing was measured."""

    name: str
    awards: tuple[Award | None, ...]


def measures(comparison: Comparison) -> tuple[Measure, ...]:
    """Of all measures that at least one pruned model has."""
    kinds: tuple[tuple[str, Callable[[Comparison, Sequence[Cell]], Award | None]], ...] = (
        ("perplexity over dense", _loss),
        ("mean accuracy on tasks", _accuracy),
        ("time for the prompt, over dense", lambda _, cells: _speed(cells, "prefill")),
        ("time per further token, over dense", lambda _, cells: _speed(cells, "token")),
        ("time to prune", _pruning),
    )
    found = []
    for name, best in kinds:
        awards = tuple(best(comparison, comparison.of_size(sparsity)) for sparsity in comparison.sparsities)
        if any(awards):
            found.append(Measure(name, awards))
    return tuple(found)


def _loss(comparison: Comparison, cells: Sequence[Cell]) -> Award | None:
    level = by_loss(comparison, cells).level
    over = ratio(comparison, level[0]) if level else None
    return Award(level, times(over)) if over else None


def _accuracy(comparison: Comparison, cells: Sequence[Cell]) -> Award | None:
    level = by_accuracy(comparison, cells).level
    return Award(level, percent(accuracy(comparison, level[0]))) if level else None


def _speed(cells: Sequence[Cell], kind: str) -> Award | None:
    """Two are level if the median of the one lies within the spread of the other, or theirs touch."""
    found = sorted(
        ((each, n) for n, cell in enumerate(cells) if (each := speed(cell, kind))), key=lambda pair: pair[0][0]
    )
    if not found:
        return None
    (value, _, high, _), _ = found[0]
    return Award(tuple(cells[n] for each, n in found if each is found[0][0] or each[1] <= high), times(value))


def _pruning(comparison: Comparison, cells: Sequence[Cell]) -> Award | None:
    timed = sorted((cell.wall_s, n) for n, cell in enumerate(cells) if cell.wall_s is not None)
    return Award((cells[timed[0][1]],), seconds(timed[0][0])) if timed else None
