"""What a task's accuracy is worth nothing below: the level of chance."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

STANDARD_ERRORS = 3.0  # above chance, for a task that can tell models apart
OF_CHOICES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # accuracies of choosing, which guessing reaches too
ACCURACIES = (*OF_CHOICES, "exact_match")  # shares of right answers; other metrics have another unit or another zero


def at_chance(dense: Mapping[str, Any]) -> str | None:
    """Why a task cannot tell models apart, in words; None if it can.

    Args:
        dense: the dense model's result: `value`, `stderr`, `chance` (None where chance is not known).
    """
    value, error, chance = dense["value"], dense["stderr"], dense["chance"]
    if chance is None:
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
    guess = statistics.fmean(count / len(each) for count, each in zip(right, choices, strict=True))
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
    choices = [task.doc_to_choice(doc) for part, task in parts.items() for doc in documents[part]]
    if not first.multiple_target and not _all_same(choices):
        return chance_level(choices, [0] * len(choices))  # which one is right does not matter then, and takes time
    answers = [
        task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        for part, task in parts.items()
        for doc in documents[part]
    ]
    return chance_level(choices, answers)


def _all_same(choices: Sequence[Sequence[str]]) -> bool:
    return all(list(each) == list(choices[0]) for each in choices)
