"""A comparison in short, for readers: a row per method, a column per size, one number in each."""

from __future__ import annotations

from typing import Any

from secateur.report.comparing import Measure, accuracies, bold, losses
from secateur.report.looks import listed, number, percent
from secateur.report.results import CellResult, Results
from secateur.report.table import Column, Row, Table


def by_text_and_task(results: Results) -> list[Measure]:
    """What such tables are made of: perplexity on each text, and the mean accuracy on tasks."""
    tasks = [accuracies(results)] if results.average.tasks else []
    return [*(losses(results, text) for text in results.texts), *tasks]


def short_table(results: Results, measure: Measure, *, matched: bool = False) -> Table:
    """The dense model first, then the methods, the best at the smallest size first.

    Args:
        measure: what is shown; the ranking and what is bold are the main table's.
        matched: with the rows of 2SSP at the sizes that other methods really have.
    """
    sizes = results.sparsities
    rows: dict[str, dict[float, CellResult]] = {}
    for cell in results.pruned:
        size = results.size_of(cell)
        if size in sizes and (matched or not cell.matched_to):
            rows.setdefault(cell.shown, {})[size] = cell
    labels = sorted(rows, key=lambda label: _place(rows[label], measure))
    best, _ = bold(results, measure)
    shown: list[Row] = [
        {"label": label, **{size_key(size): _words(cell, measure) for size, cell in rows[label].items()}}
        for label in labels
    ]
    marked = {
        size_key(size): [n for n, label in enumerate(labels) if rows[label].get(size) in best] for size in sizes
    }  # fmt: skip
    if results.dense:
        dense = in_form(measure, measure.shown(results.dense))
        shown.insert(0, {"label": "dense", **{size_key(size): dense for size in sizes}})
        marked = {key: [n + 1 for n in places] for key, places in marked.items()}
    columns: list[Column[Any]] = [
        Column("label", "method"),
        *(Column(size_key(size), percent(size), form="s") for size in sizes),
    ]
    return Table(columns, shown, bold=marked, notes=_notes(results, measure, any(marked.values())))


def size_key(size: float) -> str:
    """The key of a size's column."""
    return f"size:{size:g}"


def in_form(measure: Measure, value: float | None) -> str:
    """A number of a measure, in three digits."""
    return number(value) if measure.lower else percent(value)


def _place(by_size: dict[float, CellResult], measure: Measure) -> tuple[float, float]:
    size = min(by_size)
    value = measure.shown(by_size[size])
    return size, float("inf") if value is None else value if measure.lower else -value


def _words(cell: CellResult, measure: Measure) -> str:
    value = measure.shown(cell) if cell.done else None
    if value is None and cell.status == "failed":
        return "failed"
    return in_form(measure, value) + (f" ({percent(cell.removed)})" if cell.off_target else "")


def _notes(results: Results, measure: Measure, any_bold: bool) -> list[str]:
    notes = [measured(results, measure)]
    if any_bold:
        notes.append("Bold: the best at a size, and all that the 95% interval of the paired difference does not tell "
                     "from it.")  # fmt: skip
    if any(cell.done and cell.off_target for cell in results.pruned):
        notes.append("In brackets: the share that really went, where it is another.")
    return [" ".join(notes)]


def measured(results: Results, measure: Measure) -> str:
    """What such a table's numbers are."""
    dtype, (name, *_) = results.index.versions.get("dtype"), measure.names
    what = f"{measure.title} ({listed(measure.names)})"
    if measure.lower:
        windows = results.windows[name]
        what = f"perplexity on {name} ({windows.samples} windows of {windows.length:,} tokens)"
    return (
        f"{results.name}{f' in {dtype}' if dtype else ''}: {what} by the share of {results.whose} that was to go. "
        f"{'Lower' if measure.lower else 'Higher'} is better."
    )
