"""How sure a difference between two cells is: paired over the same windows and documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from secateur.evaluation.chance import at_chance
from secateur.evaluation.statistics import is_binary, mcnemar, paired_bootstrap
from secateur.study.cells import DENSE

Cells = Mapping[str, Mapping[str, Any]]
SAME_SPARSITY, SAME_SIZE = "same sparsity asked", "same size"


def differences(cells: Cells, base: str, *, seed: int = 0, draws: int = 10_000) -> list[dict[str, Any]]:
    """Each cell against the base method's at the same sparsity asked, and against 2SSP's at its own size.

    Args:
        cells: finished or failed ones, by name, in the table's order.
        base: a method's name.

    Returns:
        Entries with `cell`, `against`, `kind`, and `perplexity` by text: `difference` in nats per token with its 95%
        interval `low` to `high`, below 0 where the cell is better, and the `ratio` of the perplexities; `tasks` by
        task: `difference` in the metric with its interval, above 0 where the cell is better, and McNemar's exact `p`
        where answers are right or wrong.
    """
    told = []
    for name, cell in cells.items():
        if cell["method"] == DENSE or cell["matched_to"] is not None or (not cell["perplexity"] and not cell["tasks"]):
            continue
        for kind, other in _others(name, cell, cells, base):
            told.append(
                {
                    "cell": name,
                    "against": other["name"],
                    "kind": kind,
                    "perplexity": _perplexities(cell, other, seed, draws),
                    "tasks": _tasks(cell, other, seed, draws),
                }
            )
    return told


def _others(name: str, cell: Mapping[str, Any], cells: Cells, base: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = []
    for other in cells.values():
        if other["status"] != "done":
            continue
        if other["matched_to"] == name:
            found.append((SAME_SIZE, other))
        elif (
            other["method"] == base != cell["method"]
            and other["matched_to"] is None
            and other["sparsity"] == cell["sparsity"]
        ):
            found.append((SAME_SPARSITY, other))
    return found


def _perplexities(
    cell: Mapping[str, Any], other: Mapping[str, Any], seed: int, draws: int
) -> dict[str, dict[str, float | None]]:
    told: dict[str, dict[str, float | None]] = {}
    for text, mine in cell["perplexity"].items():
        theirs = other["perplexity"].get(text)
        if theirs is None:
            continue
        found = paired_bootstrap(
            mine["window_nll"], theirs["window_nll"], mine["window_predictions"], seed=seed, draws=draws
        )
        told[text] = {**_finite(found), "ratio": math.exp(found["difference"])}
    return told


def _tasks(
    cell: Mapping[str, Any], other: Mapping[str, Any], seed: int, draws: int
) -> dict[str, dict[str, float | None]]:
    told: dict[str, dict[str, float | None]] = {}
    for task, mine in cell["tasks"].items():
        theirs = other["tasks"].get(task)
        if theirs is None:
            continue
        a, b = mine["per_document"], theirs["per_document"]
        if not a or not b:  # a metric of the whole, as a corpus' F1: nothing to pair
            told[task] = {"difference": mine["value"] - theirs["value"], "low": None, "high": None, "p": None}
            continue
        binary = is_binary([*a, *b])
        found = _finite(paired_bootstrap(a, b, seed=seed, draws=draws))
        told[task] = {**found, "p": mcnemar(a, b) if binary else None}
    return told


def _finite(found: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def grey_tasks(cells: Cells) -> dict[str, str]:
    """Tasks that cannot tell models apart, with the reason: the dense model is at chance. None without a dense one."""
    dense = cells.get(DENSE)
    if dense is None:
        return {}
    reasons = {task: at_chance(result) for task, result in dense["tasks"].items()}
    return {task: reason for task, reason in reasons.items() if reason is not None}


def task_average(cell: Mapping[str, Any], tasks: list[str], grey: Mapping[str, str]) -> float | None:
    """The mean over the tasks that are not grey; None if there is none, or the cell lacks one."""
    counted = [task for task in tasks if task not in grey]
    if not counted or any(task not in cell["tasks"] for task in counted):
        return None
    return sum(float(cell["tasks"][task]["value"]) for task in counted) / len(counted)
