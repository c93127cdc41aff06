"""What the tests of grids share: a tiny model with a tokenizer, texts, fast settings, stand-ins for the judges."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from models import tiny, tiny_tokenizer

from secateur.grid import Comparison, Judging
from secateur.grid.run import Grid
from secateur.judge import judging
from secateur.judge.results import Generation, GenerationFigures, Inference, Sample, TaskResult
from secateur.model.handle import Model

SEARCH = {"generations": 2, "offspring": 4, "initial": 4, "initial_tokens": 24, "selection_tokens": "24,48"}


class Loads:
    """Gives the tiny dense model and counts how often."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.count = seed, 0

    def __call__(self) -> Model:
        self.count += 1
        model = tiny("llama", self.seed)
        model.tokenizer = _tokenizer()
        return model


@functools.cache
def _tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|im_end|>"  # lm-eval needs one
    return tokenizer


def grid(folder: Path, text: Path, *, more: Mapping[str, Any] | None = None, **fields: Any) -> Grid:
    """Args: more: of the judging."""
    judging = Judging(**{"texts": (str(text),), "length": 24, "samples": 5, **(more or {})})
    return Grid(**{"load": Loads(), "folder": folder, "judging": judging, **fields})


def comparison(text: Path, *methods: str, **more: Any) -> Comparison:
    """Without matches, unless they are asked for."""
    settings = {"sparsities": (0.25,), "calibration": str(text), "samples": 2, "length": 24, "matched": False, **more}
    return Comparison(methods=methods or ("2ssp", "shortgpt"), **settings)


def no_times(table: str) -> list[list[str]]:
    """A CSV table without the columns that no two runs have in common."""
    rows = [line.split(",") for line in table.splitlines()]
    timed = ("prune_cpu_s", "prune_wall_s", "prune_cpu_s:sd")
    kept = [place for place, name in enumerate(rows[0]) if name not in timed]
    return [[row[place] for place in kept] for row in rows]


def fake_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what judges but for perplexity: results that depend on the model's size."""

    def plan_tasks(tasks: list[str], *, limit: int | None = None, **more: Any) -> tuple[Any, ...]:
        return tuple(types.SimpleNamespace(name=task, sizes={task: limit or 40}) for task in tasks)

    def judge_tasks(model: Model, plan: tuple[Any, ...], **more: Any) -> dict[str, TaskResult]:
        results = {}
        for planned in plan:
            task, documents = planned.name, planned.sizes[planned.name]
            right = documents // 4 if task == "hopeless" else model.layout().parameters * documents // 40_000
            results[task] = TaskResult(
                task=task, metric="acc", value=right / documents, stderr=0.05, documents=documents, chance=0.25,
                fewshot=0, per_document=[float(place < right) for place in range(documents)],
            )  # fmt: skip
        return results

    def inference(models: Mapping[str, Model], **more: Any) -> dict[str, Inference]:
        sizes = {name: model.layout().parameters for name, model in models.items()}
        return {name: Inference(prefill_ms=size / 1e3, token_ms=size / 1e4) for name, size in sizes.items()}

    def generation(model: Model, prompts: tuple[str, ...], *, dense: Model | None, **more: Any) -> Generation:
        samples = [Sample(prompt=prompt, text="...") for prompt in prompts]
        figures = GenerationFigures(greedy_agreement=None if dense is None else 0.5)
        return Generation(samples=samples, figures=figures)

    def estimated_tokens(plan: tuple[Any, ...]) -> float:
        return sum(100.0 * sum(planned.sizes.values()) for planned in plan)

    for function in (plan_tasks, estimated_tokens, judge_tasks, inference, generation):
        monkeypatch.setattr(judging, function.__name__, function)
