"""The page's main table: what stands in it, in words and as numbers to sort by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur.report.compared import Ranking, accuracy, by_accuracy, by_loss, ratio
from secateur.report.comparison import DENSE, Cell, Comparison, finite
from secateur.report.figures import speed, title
from secateur.report.looks import count, number, percent, seconds, times

Formatted = Callable[[float], str]


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        text: the text that it belongs to, for the page's switch; None if to none.
        value: a cell's number; None where it was not measured.
        hint: what the heading's tooltip says.
        grey: in no average, since it cannot tell models apart.
        rank: tells the best cells of one size, which are printed bold.
    """

    heading: str
    value: Callable[[Cell], float | None]
    form: Formatted
    hint: str = ""
    text: str | None = None
    grey: bool = False
    rank: Callable[[list[Cell]], Ranking] | None = None


@dataclass(frozen=True)
class Entry:
    shown: str
    sort: float | None
    best: bool = False


@dataclass(frozen=True)
class Row:
    cell: Cell
    title: str
    size: float | None
    entries: list[Entry]


def columns(comparison: Comparison) -> list[Column]:
    """Those that have at least one number."""
    found = [
        *(_perplexity(comparison, text) for text in comparison.texts),
        Column("× dense", lambda cell: ratio(comparison, cell), number,
               "perplexity over the dense model's, geometric mean over the texts"),
        Column("tasks", lambda cell: accuracy(comparison, cell), percent, "mean over the tasks that are not grey",
               rank=lambda cells: by_accuracy(comparison, cells)),
        Column("pruning", lambda cell: cell.wall_s if cell.method != DENSE else None, seconds,
               "wall-clock time of the pruning itself"),
        Column("prompt", lambda cell: _time(cell, "prefill"), times, "time for the prompt, over dense"),
        Column("token", lambda cell: _time(cell, "token"), times, "time per further token, over dense"),
        Column("removed", lambda cell: cell.removed, percent, f"share of {comparison.whose} that is gone"),
        Column("parameters", lambda cell: cell.parameters, count),
        Column("weights", lambda cell: finite(cell.data.get("weight_bytes")), _megabytes),
        *(_task(comparison, task) for task in comparison.tasks),
    ]  # fmt: skip
    return [each for each in found if any(each.value(cell) is not None for cell in comparison.cells if cell.done)]


def _time(cell: Cell, kind: str) -> float | None:
    found = speed(cell, kind)
    return found[0] if found else None


def _megabytes(size: float) -> str:
    return f"{number(size / 1e6)}\u00a0MB"


def _perplexity(comparison: Comparison, text: str) -> Column:
    results: list[Any] = [cell.section("perplexity").get(text) for cell in comparison.cells]
    one = next(each for each in results if each)
    hint = f"perplexity, {one.get('samples', '?')} windows of {one.get('length', '?')} tokens"
    return Column(
        text, lambda cell: cell.perplexity(text), number, hint, text=text,
        rank=lambda cells: by_loss(comparison, cells, [text]),
    )  # fmt: skip


def _task(comparison: Comparison, task: str) -> Column:
    results: list[Any] = [cell.section("tasks").get(task) for cell in comparison.cells]
    one = next(each for each in results if each)
    hint = f"{one.get('metric', 'accuracy')}, {one.get('documents', '?')} documents"
    why = comparison.chance_tasks.get(task)
    return Column(
        task, lambda cell: finite(cell.section("tasks").get(task, {}).get("value")), percent,
        f"{hint}; {why}" if why else hint, grey=why is not None,
    )  # fmt: skip


def rows(comparison: Comparison, wanted: list[Column]) -> list[Row]:
    """One row per cell, in the comparison's order; bold are the best of each size and all that are level with them."""
    best: dict[str, set[str]] = {}
    for column in wanted:
        if column.rank:
            rankings = [column.rank(comparison.of_size(size)) for size in comparison.sparsities]
            best[column.heading] = {cell.name for ranking in rankings for cell in ranking.level}
    return [
        Row(
            cell, title(cell), comparison.size_of(cell),
            [_entry(cell, column, cell.name in best.get(column.heading, ())) for column in wanted],
        )
        for cell in comparison.cells
    ]  # fmt: skip


def _entry(cell: Cell, column: Column, best: bool) -> Entry:
    value = column.value(cell) if cell.done else None
    if value is None:
        return Entry("–", None)
    return Entry(column.form(value), value, best)
