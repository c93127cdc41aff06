"""A comparison in short, for readers: a row per method, a column per size, one perplexity in each."""

from __future__ import annotations

from typing import Any

from secateur.report.comparing import bold, losses
from secateur.report.looks import number, percent
from secateur.report.results import CellResult, Results
from secateur.report.table import Column, Row, Table


def short_table(results: Results, text: str, *, matched: bool = False) -> Table:
    """The dense model first, then the methods, the best at the smallest size first.

    Args:
        text: whose perplexity is shown; the ranking and what is bold are the main table's.
        matched: with the rows of 2SSP at the sizes that other methods really have.
    """
    sizes, measure = results.sparsities, losses(results, text)
    rows: dict[str, dict[float, CellResult]] = {}
    for cell in results.pruned:
        size = results.size_of(cell)
        if size in sizes and (matched or not cell.matched_to):
            rows.setdefault(cell.shown, {})[size] = cell
    labels = sorted(rows, key=lambda label: _place(results, rows[label], text))
    best, _ = bold(results, measure)
    shown: list[Row] = [
        {"label": label, **{size_key(size): _words(results, cell, text) for size, cell in rows[label].items()}}
        for label in labels
    ]
    marked = {
        size_key(size): [n for n, label in enumerate(labels) if rows[label].get(size) in best] for size in sizes
    }  # fmt: skip
    if results.dense:
        dense = number(results.perplexity(results.dense, text))
        shown.insert(0, {"label": "dense", **{size_key(size): dense for size in sizes}})
        marked = {key: [n + 1 for n in places] for key, places in marked.items()}
    columns: list[Column[Any]] = [
        Column("label", "method"),
        *(Column(size_key(size), percent(size), form="s") for size in sizes),
    ]
    return Table(columns, shown, bold=marked, notes=_notes(results, text, any(marked.values())))


def size_key(size: float) -> str:
    """The key of a size's column."""
    return f"size:{size:g}"


def _place(results: Results, by_size: dict[float, CellResult], text: str) -> tuple[float, float]:
    size = min(by_size)
    value = results.perplexity(by_size[size], text)
    return size, float("inf") if value is None else value


def _words(results: Results, cell: CellResult, text: str) -> str:
    value = results.perplexity(cell, text) if cell.done else None
    if value is None:
        return "failed" if cell.status == "failed" else "–"
    return number(value) + (f" ({percent(cell.removed)})" if cell.off_target else "")


def _notes(results: Results, text: str, any_bold: bool) -> list[str]:
    notes = [measured(results, text)]
    if any_bold:
        notes.append("Bold: the lowest at a size, and all that the 95% interval of the paired difference does not tell "
                     "from it.")  # fmt: skip
    if any(cell.done and cell.off_target for cell in results.pruned):
        notes.append("In brackets: the share that really went, where it is another.")
    return [" ".join(notes)]


def measured(results: Results, text: str) -> str:
    """What such a table's numbers are."""
    windows, dtype = results.windows[text], results.index.versions.get("dtype")
    precision = f" in {dtype}" if dtype else ""
    return (
        f"{results.name}{precision}: perplexity on {text} ({windows.samples} windows of {windows.length:,} tokens) by "
        f"the share of {results.whose} that was to go. Lower is better."
    )
