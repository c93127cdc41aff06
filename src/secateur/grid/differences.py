"""How sure a difference between two cells is: paired over the same windows and documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from secateur.grid.cells import DENSE
from secateur.judge.averages import Average, average_over
from secateur.judge.statistics import DRAWS, difference, paired_bootstrap
from secateur.report.results import finite

CellFile = Mapping[str, Any]  # what a cell.json holds
Cells = Mapping[str, CellFile]
LARGEST = 700.0  # nats whose exponential is still a number
SAME_SPARSITY, SAME_SIZE = "same sparsity asked", "same size"


def differences(cells: Cells, base: str, *, seed: int = 0, draws: int = DRAWS) -> list[dict[str, Any]]:
    """Each cell against the base method's at the same sparsity asked, and against 2SSP's at its own size.

    Args:
        cells: finished or failed ones, by name, in the table's order.
        base: a method's name.

    Returns:
        Entries with `cell`, `against`, `kind`, and `perplexity` by text: `difference` in nats per token with its 95%
        interval `low` to `high`, below 0 where the cell is better, and the `ratio` of the perplexities, each None where
        it is no number; `tasks` by
        task: `difference` in the `metric` with its interval, of an accuracy above 0 where the cell is better, and
        McNemar's exact `p` where answers are right or wrong.
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


def _others(name: str, cell: CellFile, cells: Cells, base: str) -> list[tuple[str, CellFile]]:
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


def _perplexities(cell: CellFile, other: CellFile, seed: int, draws: int) -> dict[str, dict[str, float | None]]:
    told: dict[str, dict[str, float | None]] = {}
    for text, mine in cell["perplexity"].items():
        theirs = other["perplexity"].get(text)
        if theirs is None:
            continue
        losses = mine["window_nll"], theirs["window_nll"]
        if any(loss is None for each in losses for loss in each):  # one that came to NaN
            told[text] = {"difference": None, "low": None, "high": None, "ratio": None}
            continue
        found = paired_bootstrap(*losses, mine["window_predictions"], seed=seed, draws=draws)
        ratio = math.exp(found["difference"]) if found["difference"] < LARGEST else None
        told[text] = {**finite(found), "ratio": ratio}
    return told


def _tasks(cell: CellFile, other: CellFile, seed: int, draws: int) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    for task, mine in cell["tasks"].items():
        theirs = other["tasks"].get(task)
        if theirs is None or mine["value"] is None or theirs["value"] is None:  # a metric that came to NaN
            continue
        a, b = mine["per_document"], theirs["per_document"]
        if not a or not b:  # a metric of the whole, as a corpus' F1: nothing to pair
            found = {"difference": mine["value"] - theirs["value"], "low": None, "high": None, "p": None}
        else:
            found = finite(difference([(a, b, None)], seed=seed, draws=draws))
        told[task] = {"metric": mine["metric"], **found}
    return told


def average_of(cells: Cells) -> Average:
    """What the task average of a grid's cells is taken of; without a dense one no task is known to be at chance."""
    dense = cells.get(DENSE)
    return average_over([cell["tasks"] for cell in cells.values()], dense["tasks"] if dense else {})


def average_notes(average: Average) -> list[str]:
    """What the task average is the mean of, and why other tasks are not in it."""
    told = [f"Average of {average.metric}: the mean over {', '.join(average.tasks)}."] if average.tasks else []
    return told + [f"Left out of the average, {task}: {why}." for task, why in average.left_out.items()]
