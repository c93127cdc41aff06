"""The table of an ablation: a row per value, its mean and spread over seeds, and what it does against the default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateur.grid.cells import DENSE
from secateur.grid.differences import Cells, average_notes
from secateur.grid.raw import RawFolder
from secateur.grid.render import Column, Row, Table, as_json, comma_separated, latex, markdown
from secateur.judge.averages import Average
from secateur.report.ablated import (
    ALL,
    Group,
    Measure,
    Value,
    against,
    groups,
    left_out_in_words,
    measures,
    spread,
)
from secateur.report.ablated_words import difference_in_words
from secateur.report.results import dumps
from secateur.report.results_before import CellResult, Results, finite_or_none

NAME = "ablation-table"
_Value = Callable[[CellResult], float | None]


def write_ablation_table(folder: RawFolder) -> None:
    """Write the tables of all cells that are there."""
    index = folder.index() or {"cells": [], "model": {}}
    cells = folder.cells(index["cells"])
    table = ablation_table(cells)
    title = f"{index['model'].get('name')}: ablations."
    folder.write(f"{NAME}.md", f"# {title}\n\n{markdown(table)}")
    folder.write(f"{NAME}.csv", comma_separated(table))
    folder.write(f"{NAME}.json", dumps(as_json(table)))
    folder.write(f"{NAME}.tex", latex(table, caption=title))


def ablation_table(cells: Cells) -> Table:
    """The dense row, then by ablation, method, sparsity and value in the order of the cells, all seeds in one.

    Nothing is bold: the lowest mean may be so by chance. What a value does is said against the default, paired by seed.
    """
    results = Results({"model": {}}, tuple(CellResult(name, cell) for name, cell in cells.items()))
    average = results.average
    shown: dict[str, _Value] = {}
    compared = [measure for measure in measures(results) if measure.key != ALL]
    columns = [
        Column("what", "ablation"),
        Column("value", "value"),
        Column("method", "method"),
        Column("sparsity", "asked", ".4g"),
        Column("seeds", "seeds", "d"),
        Column("failed", "failed", "d", hidden=all(cell["status"] == "done" for cell in cells.values())),
    ]

    def measured(key: str, title: str, form: str, value: _Value, **more: Any) -> None:
        shown[key] = value
        columns.append(Column(key, title, form, sd=f"{key}:sd", **more))

    measured("achieved", "removed", ".2%", lambda cell: cell.removed)
    for measure in compared:
        if measure.relative:
            measured(measure.key, measure.title, ".2f", measure.of)
            columns += _against_columns(measure)
    for task in results.tasks:
        form, title = (".1%", task) if average.is_share(task) else (".4g", f"{task}, {average.metrics[task]}")
        measured(f"task:{task}", title, form, _task(task), grey=task in average.grey)
    for measure in compared:
        if not measure.relative:
            measured("task_average", f"average of {average.metric}", ".1%", measure.of)
            columns += _against_columns(measure)
    for key, title, name in (("prune_cpu_s", "pruning, CPU s", "cpu_s"), ("forwards", "forwards", "forwards")):
        measured(key, title, ",.0f", _cost(name))
    found = groups(results)
    rows = [_row(group, value, shown, compared) for group in found for value in group.values]
    if results.dense:
        rows.insert(0, _dense_row(results.dense, shown))
    return Table(columns, rows, group="group", notes=_notes(cells, found, average))


def _task(task: str) -> _Value:
    return lambda cell: finite_or_none(cell.section("tasks").get(task, {}).get("value"))


def _cost(name: str) -> _Value:
    return lambda cell: finite_or_none((cell.data["prune"] or {}).get(name))


# --- against the default ---


def _against_columns(measure: Measure) -> list[Column]:
    """In words for readers; its numbers in the files of numbers."""
    key = f"against:{measure.key}"
    title = f"{measure.title}, against the default"
    hidden = [Column(f"{key}:{edge}", f"{title}, {edge}", ".4g", hidden=True) for edge in ("low", "high")]
    return [
        Column(f"{key}:shown", title, "s"),
        Column(key, title, ".4g", sd=f"{key}:sd", hidden=True),
        *hidden,
    ]


def _against_row(group: Group, value: Value, measure: Measure) -> Row:
    found, key = against(group, value, measure), f"against:{measure.key}"
    if found is None:
        return {f"{key}:shown": "default" if value is group.default else None}
    return {
        key: found.difference, f"{key}:sd": found.sd, f"{key}:low": found.low, f"{key}:high": found.high,
        f"{key}:shown": difference_in_words(found, measure),
    }  # fmt: skip


# --- rows and notes ---


def _row(group: Group, value: Value, shown: Mapping[str, _Value], compared: list[Measure]) -> Row:
    row: dict[str, Any] = {
        "what": group.what, "value": value.shown, "method": value.method, "sparsity": group.sparsity,
        "matched_to": value.matched_to, "group": f"{group.what} {group.of} {group.sparsity}",
        "seeds": len(group.seeds) if value.cells else 0, "failed": value.failed,
    }  # fmt: skip
    for key, of in shown.items():
        row[key], row[f"{key}:sd"] = spread(group, value, of) or (None, None)
    for measure in compared:
        row |= _against_row(group, value, measure)
    return row


def _dense_row(dense: CellResult, shown: Mapping[str, _Value]) -> Row:
    row: dict[str, Any] = {"what": DENSE, "value": "", "method": DENSE, "sparsity": None, "matched_to": None}
    row |= {"group": DENSE, "seeds": 1, "failed": 0}
    return row | {key: of(dense) for key, of in shown.items()} | {f"{key}:sd": None for key in shown}


def _notes(cells: Cells, found: list[Group], average: Average) -> list[str]:
    notes = [
        "Mean ± standard deviation over seeds: draws of the calibration windows (seed 0: the first ones).",
        "Against the default: the difference to the method's own default with the same seed, ± its standard deviation "
        "over seeds; of one seed, with the 95 % interval of a paired bootstrap over windows or documents. Relative for "
        "perplexity. Empty where the default is not among the values. Nothing is bold: the best of many values may be "
        "so by chance.",
    ]
    notes += [left_out_in_words(group) for group in found if group.left_out]
    notes += average_notes(average)
    seen: dict[str, str] = {}
    for name, cell in cells.items():
        for note in cell["notes"].values():
            seen.setdefault(note, name)
        if cell["status"] == "failed":
            notes.append(f"{name} failed: {cell['error']}")
    return [*notes, *(f"{name}: {note}" for note, name in seen.items())]
