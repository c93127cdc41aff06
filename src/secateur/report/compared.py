"""Which cells differ, and which do not: paired over windows and documents."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.evaluation.statistics import paired_bootstrap
from secateur.report.comparison import Cell, Comparison, finite

DRAWS = 2_000
Pair = tuple[float, float, float]  # both values, and the weight of the window or document


@dataclass(frozen=True)
class Gap:
    """The difference a - b of two cells with its 95 % interval, None where the data allow none.

    Of perplexities it is the difference of losses in nats per token, of tasks that of the mean accuracy.
    """

    difference: float
    low: float | None
    high: float | None

    @property
    def open(self) -> bool:
        """Whether the two may be equal, for all that the interval says."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


@functools.lru_cache(maxsize=1024)  # words, table and plots ask for the same ones
def loss_gap(a: Cell, b: Cell, texts: tuple[str, ...]) -> Gap | None:
    """The mean over texts of the difference in loss; None unless both have each text, on the same windows.

    Every text weighs the same, whatever its number of windows. The exponent is a ratio of perplexities.
    """
    differences: list[float] = []
    windows: list[Pair] = []
    paired = True
    for text in texts:
        one, other = a.section("perplexity").get(text), b.section("perplexity").get(text)
        if not one or not other or finite(one.get("nll")) is None or finite(other.get("nll")) is None:
            return None
        if any(one.get(key) != other.get(key) for key in ("length", "samples", "predictions", "fingerprint")):
            return None  # perplexities of other windows, or of another length, are not comparable
        differences.append(one["nll"] - other["nll"])
        mine, theirs, counts = (
            each.get(key) or []
            for each, key in ((one, "window_nll"), (other, "window_nll"), (one, "window_predictions"))
        )
        paired = paired and len(mine) == len(theirs) == len(counts) > 0 and _all_finite((*mine, *theirs, *counts))
        if paired:
            windows += [(x, y, n / sum(counts)) for x, y, n in zip(mine, theirs, counts, strict=True)]
    return _gap(differences, windows if paired else [])


@functools.lru_cache(maxsize=1024)
def accuracy_gap(a: Cell, b: Cell, tasks: tuple[str, ...]) -> Gap | None:
    """The difference of the mean over tasks; None if a task is not measured in both, or not on the same documents."""
    differences: list[float] = []
    documents: list[Pair] = []
    paired = True
    for task in tasks:
        one, other = a.section("tasks").get(task), b.section("tasks").get(task)
        if not one or not other or one.get("documents") != other.get("documents"):
            return None
        differences.append(one["value"] - other["value"])
        mine, theirs = one.get("per_document") or [], other.get("per_document") or []
        paired = paired and len(mine) == len(theirs) > 0 and _all_finite((*mine, *theirs))
        if paired:
            documents += [(x, y, 1 / len(mine)) for x, y in zip(mine, theirs, strict=True)]
    return _gap(differences, documents if paired else [])


def _gap(differences: Sequence[float], pairs: Sequence[Pair]) -> Gap | None:
    if not differences:
        return None
    difference = sum(differences) / len(differences)
    if not pairs:
        return Gap(difference, None, None)
    ours, theirs, weights = zip(*pairs, strict=True)
    found = paired_bootstrap(ours, theirs, weights, draws=DRAWS)
    return Gap(difference, finite(found["low"]), finite(found["high"]))


def _all_finite(values: Sequence[float | None]) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def ratio(comparison: Comparison, cell: Cell, texts: Sequence[str] | None = None) -> float | None:
    """Perplexity over the dense model's: the geometric mean over the texts, over all if None."""
    if comparison.dense is None or not cell.done:
        return None
    found = loss_gap(cell, comparison.dense, comparison.texts if texts is None else tuple(texts))
    return math.exp(found.difference) if found and found.difference < 700 else None


def accuracy(comparison: Comparison, cell: Cell) -> float | None:
    """The mean over the tasks that count; None unless the cell has them all."""
    results, tasks = cell.section("tasks"), comparison.counted_tasks
    if not tasks or any(task not in results for task in tasks):
        return None
    return sum(results[task]["value"] for task in tasks) / len(tasks)


@dataclass(frozen=True)
class Ranking:
    """Cells from best to worst by one measure.

    Attributes:
        gaps: of each cell to the best one, in the same order; the first is None.
    """

    cells: tuple[Cell, ...]
    gaps: tuple[Gap | None, ...]

    @property
    def level(self) -> tuple[Cell, ...]:
        """Those that the intervals do not tell from the best, which comes first."""
        return self.cells[:1] + tuple(
            cell
            for cell, gap in zip(self.cells[1:], self.gaps[1:], strict=True)
            if gap and (gap.open or not gap.difference)
        )


def by_loss(comparison: Comparison, cells: Sequence[Cell], texts: Sequence[str] | None = None) -> Ranking:
    """Rank by the mean loss over texts; cells that lack one are left out."""
    chosen = comparison.texts if texts is None else tuple(texts)

    def mean(cell: Cell) -> float | None:
        found = [finite(cell.section("perplexity").get(text, {}).get("nll")) for text in chosen]
        known = [each for each in found if each is not None]
        return sum(known) / len(chosen) if chosen and len(known) == len(chosen) else None

    return _rank(cells, mean, lambda a, b: loss_gap(a, b, chosen))


def by_accuracy(comparison: Comparison, cells: Sequence[Cell]) -> Ranking:
    """Rank by the mean over the tasks that count; cells that lack one are left out."""

    def shortfall(cell: Cell) -> float | None:
        mean = accuracy(comparison, cell)
        return None if mean is None else -mean

    return _rank(cells, shortfall, lambda a, b: accuracy_gap(a, b, comparison.counted_tasks))


def _rank(
    cells: Sequence[Cell], badness: Callable[[Cell], float | None], gap: Callable[[Cell, Cell], Gap | None]
) -> Ranking:
    scored = [(value, order, cell) for order, cell in enumerate(cells) if (value := badness(cell)) is not None]
    ranked = tuple(cell for _, _, cell in sorted(scored, key=lambda each: each[:2]))
    return Ranking(ranked, tuple(None if cell is ranked[0] else gap(cell, ranked[0]) for cell in ranked))
