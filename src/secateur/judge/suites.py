"""Which tasks are known, and which of them papers report, how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """How a task is asked; None: as its own file has it (metric: acc, if the task has that)."""

    metric: str | None = None
    fewshot: int | None = None


@dataclass(frozen=True)
class Suite:
    """The tasks of a paper, as it reports them.

    Attributes:
        paper: where.
        tasks: each task's setting.
    """

    paper: str
    tasks: Mapping[str, Setting]


_ACC, _NORM = Setting("acc", 0), Setting("acc_norm", 0)

SUITES: dict[str, Suite] = {
    "2ssp": Suite(
        "https://arxiv.org/abs/2501.17771",
        dict.fromkeys(("mmlu", "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge"), _ACC),
    ),
    "slimgpt": Suite(
        "https://arxiv.org/abs/2412.18110",
        {
            "boolq": _ACC,
            "piqa": _NORM,
            "hellaswag": _NORM,
            "winogrande": _ACC,
            "arc_easy": _NORM,
            "arc_challenge": _NORM,
            "openbookqa": _NORM,
            "mmlu": Setting("acc", 5),
        },
    ),
}

OFFLINE: dict[str, tuple[str, str]] = {
    "arc_challenge": ("arc", "arc_challenge"),
    "arc_easy": ("arc", "arc_easy"),
    "boolq": ("super_glue/boolq", "boolq"),
    "commonsense_qa": ("commonsense_qa", "commonsense_qa"),
    "copa": ("super_glue/copa", "copa"),
    "hellaswag": ("hellaswag", "hellaswag"),
    "lambada_openai": ("lambada", "lambada_openai"),
    "mmlu": ("mmlu/default", "mmlu"),
    "openbookqa": ("openbookqa", "openbookqa"),
    "piqa": ("piqa", "piqa"),
    "social_iqa": ("siqa", "social_i_qa"),
    "winogrande": ("winogrande", "winogrande"),
}
"""The tasks whose rows are at hand without a hub: lm-eval's name of each, its folder in lm-eval, and the name of its
rows in `secateur.assets`."""
