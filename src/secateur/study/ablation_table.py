"""The table of an ablation: a row per value, the mean over seeds with its standard deviation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.evaluation.averages import Average
from secateur.evaluation.statistics import mean_and_sd
from secateur.study.differences import CellFile, Cells, average_notes, average_of
from secateur.study.folder import GridFolder, dumps
from secateur.study.render import Column, Row, Table, as_json, comma_separated, latex, markdown

NAME = "ablation-table"


def write_ablation_table(folder: GridFolder) -> None:
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
    """Rows in the order of the cells: by ablation, sparsity and value, all seeds in one."""
    texts = list(dict.fromkeys(text for cell in cells.values() for text in cell["perplexity"]))
    tasks = list(dict.fromkeys(task for cell in cells.values() for task in cell["tasks"]))
    average = average_of(cells)
    measures: dict[str, Callable[[CellFile], float | None]] = {}
    columns = [
        Column("what", "ablation"),
        Column("value", "value"),
        Column("method", "method"),
        Column("sparsity", "asked", ".4g"),
        Column("seeds", "seeds", "d"),
        Column("failed", "failed", "d", hidden=all(cell["status"] == "done" for cell in cells.values())),
    ]

    def measure(key: str, title: str, form: str, value: Callable[[CellFile], float | None], **more: Any) -> None:
        measures[key] = value
        columns.append(Column(key, title, form, sd=f"{key}:sd", **more))

    measure("achieved", "removed", ".2%", lambda cell: (cell["achieved"] or {}).get(cell["of"]))
    for text in texts:
        found = functools.partial(_in, "perplexity", text, "perplexity")
        measure(f"perplexity:{text}", f"perplexity, {text}", ".2f", found, better="low")
    for task in tasks:
        found = functools.partial(_in, "tasks", task, "value")
        if average.is_share(task):
            measure(f"task:{task}", task, ".1%", found, better="high", grey=task in average.grey)
        else:
            measure(f"task:{task}", f"{task}, {average.metrics[task]}", ".4g", found)
    if average.tasks:
        heading = f"average of {average.metric}"
        measure("task_average", heading, ".1%", lambda cell: average.of(cell["tasks"]), better="high")
    measure("prune_cpu_s", "pruning, CPU s", ",.0f", lambda cell: (cell["prune"] or {}).get("cpu_s"))
    measure("forwards", "forwards", ",.0f", lambda cell: (cell["prune"] or {}).get("forwards"))
    return Table(columns, _rows(cells, measures), group="group", notes=_notes(cells, average))


def _rows(cells: Cells, measures: Mapping[str, Callable[[CellFile], float | None]]) -> list[Row]:
    groups: dict[tuple[Any, ...], list[CellFile]] = {}
    for cell in cells.values():
        if cell["ablation"] is None:
            groups.setdefault(("dense", "", cell["method"], None), []).append(cell)
            continue
        told = cell["ablation"]
        groups.setdefault((told["what"], told["value"], cell["method"], _asked(cell, cells)), []).append(cell)
    rows: list[Row] = []
    for (what, value, method, sparsity), some in groups.items():
        row: dict[str, Any] = {"what": what, "value": value, "method": method, "sparsity": sparsity}
        row["matched_to"] = some[0]["matched_to"]
        row |= {"group": f"{what} {sparsity}", "seeds": len(some), "failed": sum(c["status"] != "done" for c in some)}
        for key, measured in measures.items():
            row[key], row[f"{key}:sd"] = _spread([measured(cell) for cell in some])
        rows.append(row)
    return rows


def _asked(cell: CellFile, cells: Cells) -> float | None:
    """A matched cell belongs to the sparsity of the one that it stands beside."""
    other = cells.get(cell["matched_to"] or "", cell)
    sparsity: float | None = other["sparsity"]
    return sparsity


def _in(part: str, name: str, key: str, cell: CellFile) -> float | None:
    value: float | None = cell[part].get(name, {}).get(key)
    return value


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    there = [value for value in values if value is not None]
    return mean_and_sd(there) if there else (None, None)


def _notes(cells: Cells, average: Average) -> list[str]:
    notes = ["Mean ± standard deviation over seeds: draws of the calibration windows (seed 0: the first ones)."]
    notes += average_notes(average)
    seen: dict[str, str] = {}
    for name, cell in cells.items():
        for note in cell["notes"].values():
            seen.setdefault(note, name)
        if cell["status"] == "failed":
            notes.append(f"{name} failed: {cell['error']}")
    return [*notes, *(f"{name}: {note}" for note, name in seen.items())]
