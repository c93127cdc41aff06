"""Judge a model as Python: `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.engine.tokens import Count, Tokens, read_tokens
from secateur.errors import InvalidOptionError
from secateur.judge.fidelity import fidelity
from secateur.judge.gate import check, failures, known_names, parse
from secateur.judge.generation import generation
from secateur.judge.inference import inference, weight_bytes
from secateur.judge.judging import Judging
from secateur.judge.perplexity import perplexity
from secateur.judge.tasks import judge_tasks, plan_tasks
from secateur.model.handle import Model, require_same_vocabulary
from secateur.run import Run


def evaluate(
    model: Model,
    judging: Judging,
    *,
    against: Model | None = None,
    fidelity_on: Sequence[str] = (),
    fail_if: Sequence[str] = (),
    data: Path | None = None,
    cache: Path | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Judge a model, and beside it another one on the same tokens.

    Args:
        judging: what both are put through. The two are timed alternately.
        against: usually the dense model; reported under "against".
        fidelity_on: names of texts, or files, to compare the model with `against` on, in the judging's windows; of chat
            data only responses count.
        fail_if: conditions such as "kl>0.1"; see `secateur.judge.gate`. `tasks`, their mean, needs `against`.

    Returns:
        {"model": {...}, "against": {...}}, each with `parameters`, `weight_bytes`, and `perplexity` (a list),
        `fidelity` (a list; the model's only), `inference`, `generation` and `tasks` (by name) as asked. With `fail_if`,
        also "failed": the conditions that hold, with the figures of which they do.

    Raises:
        InvalidOptionError, UnknownNameError: a condition that is none, or asks for a figure that cannot be told;
            fidelity without a model to be faithful to. Before any work, as are errors on texts, and those of
            `Judging.check`.
    """
    run = run or Run()
    conditions = [parse(each) for each in fail_if]
    plan = plan_tasks(
        judging.tasks, metric=judging.metric, limit=judging.limit, fewshot=judging.fewshot, data=data, cache=cache
    )
    check(
        conditions,
        known_names(
            perplexity=judging.texts,
            fidelity=fidelity_on,
            tasks=[each.name for each in plan],
            generation=bool(judging.prompts),
        ),
        dense=against is not None,
    )
    if fidelity_on:
        if against is None:
            raise InvalidOptionError("fidelity compares with the dense model; give it as --against (`against`)")
        require_same_vocabulary(model, against, "fidelity")
    if judging.prompts and against is not None:
        require_same_vocabulary(model, against, "greedy agreement")
    models = {"model": model} | ({"against": against} if against else {})
    for each in models.values():
        judging.check(each)

    def read(each: Model, text: str, count: Count | None) -> Tokens:
        return read_tokens(
            each, text, purpose="evaluation", length=judging.length, samples=judging.samples, count=count, data=data,
            cache=cache,
        )  # fmt: skip

    windows = {(text, name): read(each, text, "all") for text in judging.texts for name, each in models.items()}
    own = {text: read(model, text, None) for text in fidelity_on}
    report: dict[str, Any] = {
        name: {
            "name": each.source.get("name"),
            "parameters": each.layout().parameters,
            "weight_bytes": weight_bytes(each),
        }
        for name, each in models.items()
    }
    for (text, name), tokens in windows.items():
        label = f"perplexity on {text}" + (" (against)" if name == "against" else "")
        result = perplexity(models[name], tokens, run=run, label=label)
        report[name].setdefault("perplexity", []).append(result)
    for text, tokens in own.items():
        assert against is not None  # narrows the type; refused above
        result = fidelity(model, against, tokens, run=run, label=f"fidelity on {text}")
        report["model"].setdefault("fidelity", []).append(result)
    if judging.inference:
        timed = inference(
            models, prompt_length=judging.prompt_length, new_tokens=judging.new_tokens, rounds=judging.rounds,
            batch_size=judging.batch_size, run=run,
        )  # fmt: skip
        for name, result in timed.items():
            report[name]["inference"] = result
    if judging.prompts:
        told: dict[str, Any] = {"prompts": judging.prompts, "decodings": judging.decodings, "run": run}
        dense = against and generation(against, **told, label="generation (against)")
        known = dense["samples"] if dense else None
        report["model"]["generation"] = generation(model, dense=against, dense_samples=known, **told)
        if dense:
            report["against"]["generation"] = dense
    for name, each in models.items() if plan else ():
        report[name]["tasks"] = judge_tasks(each, plan, run=run)
    if conditions:
        report["failed"] = failures(report["model"], conditions, report.get("against"))
    return report
