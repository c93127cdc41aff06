"""The gate: conditions such as `kl>0.1`, on which a judgement fails."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.judge.averages import average_over
from secateur.judge.results import Evaluation, Failure, Judgement

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt
}  # fmt: skip
_CONDITION = re.compile(r"\s*([^\s<>=]+)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*", re.ASCII)

# By the part of a judgement: the name of a figure in conditions, and its field there.
_BY_TEXT = {
    "perplexity": {"ppl": "perplexity"},
    "fidelity": {"kl": "kl", "loss": "loss", "top1": "top1_agreement"},
}
_OF_GENERATION = ("greedy_agreement", "common_prefix_tokens", "distinct_1", "distinct_2", "distinct_3", "ended_share")
_TASKS = "tasks"  # the mean over them, see `averages`


@dataclass(frozen=True)
class Condition:
    """NAME OP NUMBER: what must not hold of a figure."""

    name: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.bound:g}"

    def holds(self, value: float) -> bool:
        return _OPERATORS[self.operator](value, self.bound)


def parse(text: str) -> Condition:
    """Read one condition; the names are not checked here.

    Raises:
        InvalidOptionError: it is none.
    """
    found = _CONDITION.fullmatch(text)
    if found is None or not math.isfinite(float(found[3])):
        raise InvalidOptionError(f"{text!r} is no condition; one is NAME OP NUMBER with OP >, >=, < or <=, as kl>0.1")
    name, sign, bound = found.groups()
    return Condition(name, sign, float(bound))


def known_names(
    *, perplexity: Sequence[str] = (), fidelity: Sequence[str] = (), tasks: Sequence[str] = (), generation: bool = False
) -> list[str]:
    """The names that conditions may use where this is asked for.

    `ppl` is every text's; `ppl:wikitext2` is one text's, by the last part of its name. `tasks` is the mean over the
    tasks that tell models apart, and a task's own name stands for its value.
    """
    names = [
        name
        for part, texts in (("perplexity", perplexity), ("fidelity", fidelity))
        for short in (_BY_TEXT[part] if texts else ())
        for name in (short, *(f"{short}:{PurePath(text).name}" for text in texts))
    ]
    return [*names, *((_TASKS, *tasks) if tasks else ()), *(_OF_GENERATION if generation else ())]


def check(conditions: Sequence[Condition], names: Sequence[str], *, dense: bool) -> None:
    """Refuse what could not be told, before any work.

    Args:
        dense: whether the dense model is judged beside.

    Raises:
        UnknownNameError: a name that is not there, with those that are.
        InvalidOptionError: nothing is judged, or the mean over tasks is asked for without the dense model.
    """
    for condition in conditions:
        if condition.name not in names:
            if not names:
                raise InvalidOptionError(f"'{condition}' has no figure to look at; ask for one, as --fidelity FILE")
            raise UnknownNameError.of("figure", condition.name, names)
        if condition.name == _TASKS and not dense:
            raise InvalidOptionError(
                f"'{condition}' is of the mean over the tasks at which the dense model is above chance; give it as "
                "--against (`against`), or put conditions on single tasks"
            )


def failures(report: Evaluation, conditions: Sequence[Condition]) -> list[Failure]:
    """The conditions that hold of the model's judgement, once for each figure of that name of which they do.

    A figure that is asked about and not there, as an agreement without a dense model, cannot pass: its value is None.
    The dense model's judgement (`against`) says what tasks are in their mean.
    """
    figures = list(_figures(report.model, report.against or None))
    return [
        Failure(condition=str(condition), figure=full, value=value)
        for condition in conditions
        for short, full, value in figures
        if condition.name in (short, full) and (value is None or condition.holds(value))
    ]


def _figures(judged: Judgement, dense: Judgement | None) -> Iterator[tuple[str, str, float | None]]:
    """Short name, full name and value."""
    for part, fields in _BY_TEXT.items():
        for result in getattr(judged, part) or ():
            for short, field in fields.items():
                yield short, f"{short}:{PurePath(str(result.text)).name}", getattr(result, field)
    if tasks := judged.tasks or None:
        yield _TASKS, _TASKS, average_over([tasks], dense.tasks).of(tasks) if dense and dense.tasks else None
        for name, result in tasks.items():
            yield name, name, result.value
    if generation := judged.generation or None:
        for name in _OF_GENERATION:
            yield name, name, getattr(generation.figures, name)
