"""Which tasks can tell models apart: the level of chance, and the mean over those tasks that are above it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.judge.results import TaskResult

STANDARD_ERRORS = 3.0  # above chance, for a task that can tell models apart
OF_CHOICES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # accuracies of choosing, which guessing reaches too
ACCURACIES = (*OF_CHOICES, "exact_match")  # shares of right answers; other metrics have another unit or another zero

TaskResults = Mapping[str, TaskResult]  # a model's results by task


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share of right answers."""
    return metric in ACCURACIES


# --- chance ---


def at_chance(dense: TaskResult) -> str | None:
    """Why a task cannot tell models apart by the dense model's result, in words; None if it can."""
    value, error, chance = dense.value, dense.stderr, dense.chance
    if chance is None or value is None:
        return None
    if error is not None and value - chance > STANDARD_ERRORS * error:
        return None
    return (
        f"the dense model's {value:.3f} is within {STANDARD_ERRORS:g} standard errors"
        f"{'' if error is None else f' ({error:.3f})'} of chance ({chance:.3f})"
    )


def chance_level(choices: Sequence[Sequence[str]], answers: Sequence[Any]) -> float:
    """The accuracy that is to be had without looking at the questions.

    The mean of one over the number of choices; but where all documents have the same choices (yes and no, A to D) the
    share of the most frequent answer, which is more: 62 % of BoolQ's answers are yes.

    Args:
        choices: each document's.
        answers: each document's right one: a place among its choices, the choice itself, or a list of several.
    """
    right = [len(answer) if isinstance(answer, list) else 1 for answer in answers]
    guess = statistics.fmean(count / len(some) for count, some in zip(right, choices, strict=True))
    if any(count != 1 for count in right) or not _all_same(choices):
        return guess
    return max(guess, Counter(map(str, answers)).most_common(1)[0][1] / len(answers))


def chance_of(parts: Mapping[str, Any], documents: Mapping[str, Sequence[Any]], metric: str) -> float | None:
    """The level of lm-eval's tasks over their documents; None for a metric that has no such level."""
    first = next(iter(parts.values()))
    if first.OUTPUT_TYPE == "loglikelihood" and metric == "acc":
        return 0.0  # a whole text must be the likeliest one
    if first.OUTPUT_TYPE != "multiple_choice" or metric not in OF_CHOICES:
        return None
    asked = [(task, document) for part, task in parts.items() for document in documents[part]]
    choices = [task.doc_to_choice(document) for task, document in asked]
    answers: list[Any] = [0] * len(choices)  # where choices differ, which one is right does not matter; it takes time
    if first.multiple_target or _all_same(choices):
        answers = [(task.doc_to_text if task.multiple_input else task.doc_to_target)(each) for task, each in asked]
    return chance_level(choices, answers)


def _all_same(choices: Sequence[Sequence[str]]) -> bool:
    return all(list(some) == list(choices[0]) for some in choices)


# --- the mean over tasks ---


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
        taken = [results[task] for task in self.tasks if task in results and results[task].metric == self.metric]
        values = [result.value for result in taken if result.value is not None]
        return sum(values) / len(values) if values and len(values) == len(self.tasks) else None


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
            metrics.setdefault(task, result.metric)
    grey = {task: why for task in metrics if task in dense and (why := at_chance(dense[task]))}
    kinds = Counter(kind for task, kind in metrics.items() if task not in grey and is_accuracy(kind))
    metric = max(kinds, key=lambda kind: kinds[kind], default=None)
    others = {
        task: f"its metric is {kind}, the average is of {metric}"
        if is_accuracy(kind)
        else f"its metric, {kind}, is no accuracy"
        for task, kind in metrics.items()
        if task not in grey and kind != metric
    }
    tasks = tuple(task for task in metrics if task not in grey and task not in others)
    return Average(metric, tasks, grey, {**grey, **others}, metrics)
