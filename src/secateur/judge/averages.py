"""Which tasks make the mean over tasks: those that can tell models apart, by one measure of accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.judge.chance import ACCURACIES, at_chance

TaskResults = Mapping[str, Mapping[str, Any]]  # a model's results by task, as `evaluation.tasks.run_tasks` gives them


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share of right answers."""
    return metric in ACCURACIES


@dataclass(frozen=True)
class Average:
    """What the mean over tasks is taken of, the same for all models of a comparison.

    Attributes:
        metric: of all its tasks; None where it has none.
        tasks: those that it is the mean of.
        grey: tasks at which the dense model is at chance, with the reason.
        left_out: all tasks that it does not hold, with the reason; the grey ones first.
        metrics: of all tasks.
    """

    metric: str | None
    tasks: tuple[str, ...]
    grey: Mapping[str, str]
    left_out: Mapping[str, str]
    metrics: Mapping[str, str]

    def is_share(self, task: str) -> bool:
        """Whether a task's value is a share of right answers: shown in per cent, and higher is better."""
        return is_accuracy(self.metrics[task])

    def of(self, results: TaskResults) -> float | None:
        """A model's mean; None where there is none, or it was not judged on all of the tasks by this metric."""
        found = [results.get(task, {}) for task in self.tasks]
        if not found or any(each.get("metric") != self.metric or each.get("value") is None for each in found):
            return None
        return sum(float(each["value"]) for each in found) / len(found)


def average_over(models: Iterable[TaskResults], dense: TaskResults) -> Average:
    """Settle what the mean over tasks is taken of.

    Accuracies of two kinds are never averaged: acc_norm can be ten points above acc. The kind that most tasks have
    stays; of two kinds with as many, the one that comes first.

    Args:
        models: what is to be averaged; the first that has a task says its metric.
        dense: the dense model's own; of a task that is missing there it is not known whether it is at chance.
    """
    metrics: dict[str, str] = {}
    for judged in models:
        for task, result in judged.items():
            metrics.setdefault(task, result["metric"])
    grey = {task: why for task in metrics if task in dense and (why := at_chance(dense[task]))}
    kinds = Counter(kind for task, kind in metrics.items() if task not in grey and is_accuracy(kind))
    metric = max(kinds, key=lambda kind: kinds[kind], default=None)
    others = {task: _why(kind, metric) for task, kind in metrics.items() if task not in grey and kind != metric}
    tasks = tuple(task for task in metrics if task not in grey and task not in others)
    return Average(metric, tasks, grey, {**grey, **others}, metrics)


def _why(metric: str, kept: str | None) -> str:
    if not is_accuracy(metric):
        return f"its metric, {metric}, is no accuracy"
    return f"its metric is {metric}, the average is of {kept}"
