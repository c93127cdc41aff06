"""The page's tables: what stands in them, in words and as numbers to sort by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.judge.averages import Average
from secateur.judge.memory import COUNTER
from secateur.report.compared import Ranking, accuracy, bold, by_accuracy, by_loss, ratio
from secateur.report.figures import speed, title
from secateur.report.looks import count, listed, number, percent, seconds, times
from secateur.report.results import DENSE
from secateur.report.results_before import CellResult, Results, finite_or_none

Formatted = Callable[[float], str]
GENERATED = {  # the figures of generated text, of `evaluation.generation`
    "greedy_agreement": "agreement with dense",
    "common_prefix_tokens": "tokens before it differs",
    "distinct_1": "distinct tokens",
    "distinct_2": "distinct pairs",
    "distinct_3": "distinct triples",
    "ended_share": "ended by itself",
}


@dataclass(frozen=True)
class PageColumn:
    """A column of numbers.

    Attributes:
        text: the text that it belongs to, for the page's switch; None if to none.
        value: a cell's number; None where it was not measured.
        hint: what the heading's tooltip says.
        grey: it cannot tell models apart.
        rank: tells the best cells of one size, which are printed bold.
    """

    heading: str
    value: Callable[[CellResult], float | None]
    form: Formatted
    hint: str = ""
    text: str | None = None
    grey: bool = False
    rank: Callable[[Sequence[CellResult]], Ranking] | None = None


@dataclass(frozen=True)
class Entry:
    """A number in the table.

    Attributes:
        best: the best of its size, or level with it.
        unsure: for want of an interval it is not known whether it differs from the best.
    """

    shown: str
    sort: float | None
    best: bool = False
    unsure: bool = False


@dataclass(frozen=True)
class PageRow:
    """A cell's row.

    Attributes:
        size: the one that was asked for, where it is known.
        first: of its size, so that a line parts it from what stands above.
    """

    cell: CellResult
    title: str
    size: float | None
    first: bool
    entries: list[Entry]


def columns(results: Results) -> list[PageColumn]:
    """Those that have at least one number."""
    average = results.average
    found = [
        *(_perplexity(results, text) for text in results.texts),
        PageColumn("× dense", lambda cell: ratio(results, cell), number,
               f"perplexity over the dense model's, geometric mean over {listed(results.averaged_texts)}"),
        PageColumn(f"mean {average.metric}", lambda cell: accuracy(results, cell), percent,
               f"mean over {listed(average.tasks)}",
               rank=lambda cells: by_accuracy(results, cells)),
        PageColumn("pruning", lambda cell: cell.wall_s if cell.method != DENSE else None, seconds,
               "wall-clock time of the pruning itself, in one run"),
        PageColumn("prefill ms, × dense", lambda cell: _time(cell, "prefill"), times,
               "time for the whole prompt, over the dense model's in the same run"),
        PageColumn("ms per token, × dense", lambda cell: _time(cell, "token"), times,
               "time for each further token, over the dense model's in the same run"),
        PageColumn("removed", lambda cell: cell.removed, percent, f"share of {results.whose} that is gone"),
        PageColumn("parameters", lambda cell: cell.parameters, count),
        PageColumn("weights", lambda cell: finite_or_none(cell.data.get("weight_bytes")), _megabytes),
        *(_task(results, task) for task in results.tasks),
    ]  # fmt: skip
    return _known(results, found)


def running(results: Results) -> list[PageColumn]:
    """Of the table of what running a model costs; none where that was not measured."""
    if not any(cell.section("inference") for cell in results.cells):
        return []
    return _known(results, [
        PageColumn("weights", lambda cell: finite_or_none(cell.data.get("weight_bytes")), _megabytes),
        PageColumn("KV cache per token", lambda cell: _ran(cell, "kv_bytes_per_token"), _kilobytes,
                   "what the KV cache of one sequence grows by with each token"),
        PageColumn("throughput, × dense", lambda cell: _time(cell, "throughput"), times,
                   "new tokens per second, the prompt's time included, over the dense model's in the same run"),
        PageColumn("peak memory", _device_peak, _megabytes,
                   "weights and the most beside them, by torch's counter on the device"),
    ])  # fmt: skip


def generated(results: Results) -> list[PageColumn]:
    """Of the table of generated text; none where none was generated."""
    return _known(results, [
        PageColumn(name, functools.partial(_generated, key), number if key.endswith("_tokens") else percent)
        for key, name in GENERATED.items()
    ])  # fmt: skip


def _known(results: Results, found: list[PageColumn]) -> list[PageColumn]:
    return [each for each in found if any(each.value(cell) is not None for cell in results.cells if cell.done)]


def _ran(cell: CellResult, key: str) -> float | None:
    return finite_or_none((cell.section("inference").get("pruned") or {}).get(key))


def _device_peak(cell: CellResult) -> float | None:
    """Of accelerators only: of a CPU it is what could be seen of it, and stands in main-table.csv."""
    by = (cell.section("inference").get("pruned") or {}).get("peak_memory_by")
    return _ran(cell, "peak_memory_bytes") if by == COUNTER else None


def _generated(key: str, cell: CellResult) -> float | None:
    return finite_or_none((cell.section("generation").get("figures") or {}).get(key))


def _time(cell: CellResult, kind: str) -> float | None:
    found = speed(cell, kind)
    return found.ratio if found else None


def _megabytes(size: float) -> str:
    return f"{number(size / 1e6)}\u00a0MB"


def _kilobytes(size: float) -> str:
    return f"{number(size / 1e3)}\u00a0kB"


def _perplexity(results: Results, text: str) -> PageColumn:
    windows = results.windows[text]
    hint = f"perplexity, {windows.get('samples', '?')} windows of {windows.get('length', '?')} tokens"
    return PageColumn(
        text, lambda cell: results.perplexity(cell, text), number, hint, text=text,
        rank=lambda cells: by_loss(results, cells, [text]),
    )  # fmt: skip


def _task(results: Results, task: str) -> PageColumn:
    one = next(cell.section("tasks")[task] for cell in results.cells if task in cell.section("tasks"))
    hint = f"{one['metric']}, {one.get('documents', '?')} documents"
    average = results.average
    why = average.left_out.get(task)
    return PageColumn(
        task, lambda cell: finite_or_none(cell.section("tasks").get(task, {}).get("value")),
        percent if average.is_share(task) else number, f"{hint}; in no average: {why}" if why else hint,
        grey=task in average.grey,
        rank=functools.partial(by_accuracy, results, tasks=[task]) if can_be_best(average, task) else None,
    )  # fmt: skip


def can_be_best(average: Average, task: str) -> bool:
    """Whether a task tells models apart, and it is known which way it is better."""
    return average.is_share(task) and task not in average.grey


def rows(results: Results, wanted: list[PageColumn]) -> list[PageRow]:
    """One row per cell, in the comparison's order.

    What is bold, `compared.bold` says.
    """
    nobody: frozenset[CellResult] = frozenset()
    marked = [bold(results, column.rank) if column.rank else (nobody, nobody) for column in wanted]
    made: list[PageRow] = []
    last: float | None = None
    for cell in results.cells:
        entries = [
            _entry(cell, column, best=cell in best, unsure=cell in unsure)
            for column, (best, unsure) in zip(wanted, marked, strict=True)
        ]
        size = results.size_of(cell)
        made.append(PageRow(cell, title(cell), size, size not in (None, last), entries))
        last = last if size is None else size
    return made


def _entry(cell: CellResult, column: PageColumn, *, best: bool, unsure: bool) -> Entry:
    value = column.value(cell) if cell.done else None
    if value is None:
        return Entry("–", None)
    return Entry(column.form(value), value, best, unsure)
