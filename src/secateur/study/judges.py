"""How a cell's model is judged: the one place where a grid meets the parts of `evaluation`.

They are imported when they are first needed, since tasks need an extra.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.engine.tokens import Tokens
from secateur.evaluation.perplexity import perplexity_by_window
from secateur.model.handle import Model
from secateur.report.record import public_name
from secateur.run import Run
from secateur.study.cells import Judging

TaskPlan = tuple[Any, ...]  # of `evaluation.tasks.Planned`


def perplexities(model: Model, texts: Mapping[str, Tokens], run: Run) -> dict[str, dict[str, Any]]:
    """By text (a file by its name only): perplexity, and each window's own loss."""
    found = {}
    for name, tokens in texts.items():
        result = perplexity_by_window(model, tokens, run=run, label=f"perplexity on {name}")
        found[public_name(name)] = {**result, "text": public_name(name)}
    return found


def tasks(model: Model, plan: TaskPlan, run: Run) -> dict[str, dict[str, Any]]:
    """By task: value, standard error, chance, and each document's own."""
    results: dict[str, dict[str, Any]] = _part("tasks").judge_tasks(model, plan, run=run)
    return results


def inference(dense: Model, pruned: Model, judging: Judging, *, run: Run) -> dict[str, dict[str, Any]]:
    """Latency, throughput and bytes of both, timed in turn. The dense model beside itself shows the noise."""
    results: dict[str, dict[str, Any]] = _part("inference").inference(
        {"dense": dense, "pruned": pruned}, prompt_length=judging.prompt_length, new_tokens=judging.new_tokens,
        rounds=judging.rounds, batch_size=judging.batch_size, run=run,
    )  # fmt: skip
    return results


def generation(model: Model, prompts: Sequence[str], *, dense: Model) -> dict[str, Any]:
    """Samples of text, with figures that tell when it breaks."""
    results: dict[str, Any] = _part("generation").generation(model, list(prompts), dense=dense)
    return results


def prepare(judging: Judging, *, data: Path | None, cache: Path | None) -> TaskPlan:
    """Import what the judging will need, and read its tasks once for all cells: a missing extra or an unknown task is
    said now, and not after hours of pruning."""
    for name, wanted in {"inference": judging.inference, "generation": bool(judging.prompts)}.items():
        if wanted:
            _part(name)
    if not judging.tasks:
        return ()
    plan: TaskPlan = _part("tasks").plan_tasks(
        list(judging.tasks), metric=judging.metric, limit=judging.limit, fewshot=judging.fewshot, data=data,
        cache=cache,
    )  # fmt: skip
    return plan


def documents(plan: TaskPlan) -> int:
    """How many documents a model will be judged on."""
    return sum(sum(task.sizes.values()) for task in plan)


def _part(name: str) -> Any:
    return importlib.import_module(f"secateur.evaluation.{name}")
