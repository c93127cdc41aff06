"""The table rows of downstream tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from secateur.judge.chance import STANDARD_ERRORS, at_chance


def task_rows(table: Table, columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Add a row per task, grey where the first column's model is near chance; return remarks to print below.

    Args:
        columns: the models' reports, the one that is judged against first.
    """
    results = [column.get("tasks", {}) for column in columns]
    grey = False
    for name, first in results[0].items():
        each = [result[name] for result in results]
        near = at_chance(first) is not None
        grey |= near
        cells = [_label(first, near)]
        cells += [_shown(one, one["value"], one["stderr"]) for one in each]
        if len(each) == 2:
            cells.append(_change(*each))
        table.add_row(*map(escape, cells), style="dim" if near else None)
    remarks = [f"{name}: {cut}" for name, first in results[0].items() if (cut := _cut(first))]
    if grey:
        who = "what it is judged against" if len(columns) == 2 else "the model"
        remarks.append(
            f"near chance: {who} is within {STANDARD_ERRORS:g} standard errors of it or below; differences say nothing"
        )
    return remarks


def _label(result: Mapping[str, Any], near: bool) -> str:
    shots = f", {result['fewshot']}-shot from {result['fewshot_split']}" if result["fewshot"] else ""
    chance = f" ({'near ' * near}chance, {_shown(result, result['chance'])})" if _is_share(result) else ""
    return f"{result['task']}, {result['metric']}{shots}, {result['documents']:,} documents{chance}"


def _is_share(result: Mapping[str, Any]) -> bool:
    return result["chance"] is not None


def _shown(result: Mapping[str, Any], value: float, stderr: float | None = None) -> str:
    """A share in per cent, any other metric as it is."""
    factor, form = (100, ".1f") if _is_share(result) else (1, ".3g")
    spread = "" if stderr is None else f" ± {factor * stderr:{form}}"
    return f"{factor * value:{form}}{spread}{' %' if _is_share(result) else ''}"


def _change(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    difference = second["value"] - first["value"]
    return f"{100 * difference:+.1f} points" if _is_share(first) else f"{difference:+.3g}"


def _cut(result: Mapping[str, Any]) -> str:
    if not result["truncated"]:
        return ""
    return f"{result['truncated']} sequences are longer than the model's positions and lost their beginning"
