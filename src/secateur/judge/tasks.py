"""Downstream tasks by lm-eval: suites of the papers, single tasks, task files of the user's."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.assets import Bos, read_rows
from secateur.engine.tokens import bos_id_of
from secateur.errors import DataError, InvalidOptionError
from secateur.judge import harness
from secateur.judge.averages import chance_of
from secateur.judge.inference import at_least_one
from secateur.judge.results import Facts, TaskResult
from secateur.model.coerce import ModelSource, borrowed
from secateur.model.handle import Model
from secateur.run import Run

HUB = "hub:"
_FILES = (".yaml", ".yml")
_LOOKED_AT = 20  # documents of a task, for an estimate
_CHARACTERS_PER_TOKEN = 4.5


@dataclass(frozen=True)
class Setting:
    """How a task is asked; None: as its own file has it (metric: acc, if the task has that)."""

    metric: str | None = None
    fewshot: int | None = None


_ACC, _NORM = Setting("acc", 0), Setting("acc_norm", 0)

# The tasks of a paper, each with its setting there: arXiv 2501.17771 and 2412.18110.
SUITES: dict[str, dict[str, Setting]] = {
    "2ssp": dict.fromkeys(("mmlu", "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge"), _ACC),
    "slimgpt": {
        "boolq": _ACC, "piqa": _NORM, "hellaswag": _NORM, "winogrande": _ACC, "arc_easy": _NORM,
        "arc_challenge": _NORM, "openbookqa": _NORM, "mmlu": Setting("acc", 5),
    },
}  # fmt: skip

# The tasks whose rows are at hand without a hub: lm-eval's name of each, its folder in lm-eval, and the name of its
# rows in `secateur.assets`.
OFFLINE: dict[str, tuple[str, str]] = {
    "arc_challenge": ("arc", "arc_challenge"), "arc_easy": ("arc", "arc_easy"),
    "boolq": ("super_glue/boolq", "boolq"), "commonsense_qa": ("commonsense_qa", "commonsense_qa"),
    "copa": ("super_glue/copa", "copa"), "hellaswag": ("hellaswag", "hellaswag"),
    "lambada_openai": ("lambada", "lambada_openai"), "mmlu": ("mmlu/default", "mmlu"),
    "openbookqa": ("openbookqa", "openbookqa"), "piqa": ("piqa", "piqa"), "social_iqa": ("siqa", "social_i_qa"),
    "winogrande": ("winogrande", "winogrande"),
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One line of the result: lm-eval's tasks behind it (MMLU has one per subject), and how they are asked.

    Attributes:
        sizes: of each part, how many documents are judged: the first ones.
    """

    name: str
    parts: harness.Tasks = field(repr=False)
    sizes: dict[str, int] = field(repr=False)
    metric: str
    chance: float | None
    fewshot: int
    fewshot_split: str
    source: Facts = field(repr=False)


def task_names() -> tuple[str, ...]:
    """The names that need no hub: suites, then tasks."""
    return (*SUITES, *OFFLINE)


def plan_tasks(
    tasks: Sequence[str],
    *,
    metric: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    data: Path | None = None,
    cache: Path | None = None,
) -> tuple[Planned, ...]:
    """Check and read all that `judge_tasks` will need, once for several models.

    Args:
        tasks: names of suites or tasks, paths of task files (.yaml), or "hub:NAME" for a task with the rows that
            lm-eval asks the hub for (as any name does that is not in `task_names`).
        metric: for all tasks; the suite's if None, else acc, else the task's first.
        limit: only the first so many documents of a task; of MMLU spread over its subjects by their size.
        fewshot: solved examples before each question; the suite's if None, else the task file's, else none.
        data: folder with the rows, for machines without a network; see `secateur.assets.read_rows`.

    Raises:
        UnknownNameError, InvalidOptionError, DataError, FetchError, MissingExtraError: before the model is judged.
    """
    at_least_one(limit=limit)
    if fewshot is not None and fewshot < 0:
        raise InvalidOptionError(f"the number of few-shot examples is not negative; not {fewshot}")
    plans: dict[str, Planned] = {}
    for name, setting in _asked(tasks, Setting(metric, fewshot)).items():
        for plan in _plan(name, setting, limit, data, cache):
            if plans.setdefault(plan.name, plan) is not plan:
                raise InvalidOptionError(f"two of the tasks are called {plan.name}; ask in two calls")
    return tuple(plans.values())


def judge_tasks(
    model: Model, plan: Sequence[Planned], *, batch_size: int = 8, bos: Bos = "auto", run: Run | None = None
) -> dict[str, TaskResult]:
    """Judge a model by what `plan_tasks` gave; results by task.

    Args:
        batch_size: sequences in one forward.
        bos: whether what is asked begins with the begin-of-sequence token: "always", "never", or "auto": if the model's
            family needs it, and else as the tokenizer begins a text, which is lm-eval's own way.

    Raises:
        DataError: see `check_tokenizer`; or the tokenizer gives ids that the model has not.
        NumericalError: the model gives NaN.
    """
    if batch_size < 1:
        raise InvalidOptionError(f"a batch has at least 1 sequence; not {batch_size}")
    check_tokenizer(model, bos)
    model.require_whole("judging by tasks")
    run = run or Run()
    return {line.name: _judge(model, line, batch_size, bos, run) for line in plan}


def run_tasks(
    model: ModelSource,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    bos: Bos = "auto",
    run: Run | None = None,
    **asked: Any,
) -> dict[str, TaskResult]:
    """`plan_tasks`, whose other arguments are passed on, and `judge_tasks` in one; `model` as `secateur.evaluate` has
    it."""
    plan = plan_tasks(tasks, **asked)
    with borrowed(model, cache=asked.get("cache")) as own:
        return judge_tasks(own, plan, batch_size=batch_size, bos=bos, run=run)


def check_tokenizer(model: Model, bos: Bos = "auto") -> None:
    """Refuse a model that lm-eval cannot give text to; `bos` as `judge_tasks` has it.

    Raises:
        DataError: there is no tokenizer, none of its tokens begins or ends a text, or none is the one that `bos` wants.
    """
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer, so it cannot be given tasks")
    if model.tokenizer.bos_token_id is None and model.tokenizer.eos_token_id is None:
        raise DataError("lm-eval needs a tokenizer with a token that begins or ends a text (bos or eos); this has none")
    bos_id_of(model, bos)


def estimated_tokens(plan: Sequence[Planned]) -> float:
    """About how many tokens a model will read to be judged, from the first documents of each task."""
    read = 0.0
    for line in plan:
        some = max(1, _LOOKED_AT // len(line.parts))
        read += sum(n * harness.characters(part, line.parts[part], some) for part, n in line.sizes.items() if n)
    return read / _CHARACTERS_PER_TOKEN


def spread(sizes: Sequence[int], limit: int) -> list[int]:
    """`limit` documents over parts in proportion to their sizes, whole ones; the largest remainders get one more."""
    total = sum(sizes)
    if limit >= total:
        return list(sizes)
    given = [limit * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda part: -(limit * sizes[part] % total))
    for part in by_remainder[: limit - sum(given)]:
        given[part] += 1
    return given


# --- what is asked ---


def _asked(tasks: Sequence[str], given: Setting) -> dict[str, Setting]:
    """Each task's setting, suites unfolded; what is `given` wins over a suite's."""
    if isinstance(tasks, str):
        raise InvalidOptionError(f"tasks is a list of names, not one: [{tasks!r}]")
    asked: dict[str, Setting] = {}
    for name in tasks:
        for task, own in SUITES[name].items() if name in SUITES else [(name, Setting())]:
            setting = Setting(given.metric or own.metric, own.fewshot if given.fewshot is None else given.fewshot)
            if asked.setdefault(task, setting) != setting:
                raise InvalidOptionError(
                    f"{task} is asked for twice, with {_in_words(asked[task])} and with {_in_words(setting)}; "
                    "ask in two calls"
                )
    return asked


def _in_words(setting: Setting) -> str:
    shots = "its own number of examples" if setting.fewshot is None else f"{setting.fewshot} examples"
    return f"{setting.metric or 'its own metric'} and {shots}"


def _plan(name: str, setting: Setting, limit: int | None, data: Path | None, cache: Path | None) -> list[Planned]:
    """The lines of the result that a name stands for."""
    source: Facts
    if name.lower().endswith(_FILES):
        path = Path(name).expanduser()
        loaded = harness.file_tasks(path)
        source = {"source": "task file", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    elif name in OFFLINE:
        loaded, source = _offline(name, data, cache)
    else:
        loaded = harness.named_tasks(name.removeprefix(HUB), task_names())
        source = {"source": "hub", "repository": next(iter(loaded.values())).config.dataset_path}
    whole = name.removeprefix(HUB) == "mmlu"  # its subjects make one line
    groups = {"mmlu": loaded} if whole else {part: {part: task} for part, task in loaded.items()}
    return [_planned(line, parts, setting, limit, source) for line, parts in groups.items()]


def _offline(name: str, data: Path | None, cache: Path | None) -> tuple[harness.Tasks, Facts]:
    folder, rows_name = OFFLINE[name]
    rows = read_rows(rows_name, data=data, cache=cache)
    parts = _by_subject(rows.splits, rows.where) if name == "mmlu" else {name: rows.splits}
    return harness.local_tasks(parts, folder, rows), dict(rows.facts)


def _by_subject(splits: Mapping[str, list[Any]], where: str) -> dict[str, Mapping[str, list[Any]]]:
    """MMLU's rows as lm-eval's tasks, one per subject; each in every split."""
    subjects: dict[str, dict[str, list[Any]]] = defaultdict(dict)
    for split, rows in splits.items():
        for row in rows:
            subjects[str(row.get("subject"))].setdefault(split, []).append(row)
    if "None" in subjects:
        raise DataError(f"{where}: each row needs its 'subject'")
    return {f"mmlu_{subject}": subjects[subject] for subject in sorted(subjects)}


def _planned(name: str, parts: harness.Tasks, setting: Setting, limit: int | None, source: Facts) -> Planned:
    """Settle metric and few-shot examples with lm-eval's tasks, or say why they cannot be had."""
    metrics = list(next(iter(parts.values())).aggregation())
    metric = setting.metric or ("acc" if "acc" in metrics else metrics[0])
    if metric not in metrics:
        raise InvalidOptionError(f"{name} has no metric {metric}; it has {', '.join(metrics)}")
    with harness.quiet():
        shots = {_settle_fewshot(part, task, setting.fewshot) for part, task in parts.items()}
        documents = {part: list(task.eval_docs) for part, task in parts.items()}
        chance = chance_of(parts, documents, metric)
    sizes = [len(each) for each in documents.values()]
    given = dict(zip(parts, spread(sizes, sum(sizes) if limit is None else limit), strict=True))
    return Planned(name, parts, given, metric, chance, *max(shots), source)


def _settle_fewshot(name: str, task: Any, asked: int | None) -> tuple[int, str]:
    """Set the number of examples, and return it with the split that they come from.

    Raises:
        InvalidOptionError: there is nothing to take them from, or too little; or the task's file forbids them.
    """
    own = task.config.num_fewshot
    if asked is not None and own == 0 and asked > 0:
        raise InvalidOptionError(f"{name} is a task without examples by its own file (num_fewshot: 0)")
    count = asked if asked is not None else own or 0
    task.set_config("num_fewshot", count)
    if count == 0:
        return 0, ""
    config = task.config
    if config.fewshot_config.split is None and config.fewshot_config.samples is not None:
        split = "samples in its file"
    else:
        split = config.fewshot_config.split or config.training_split or config.validation_split or config.test_split
        judged = config.test_split or config.validation_split
        if split == judged and config.fewshot_config.split is None:
            raise InvalidOptionError(
                f"{name} has only the split '{judged}', which is judged: examples from it would give answers away. "
                "Put a train.jsonl beside it in the data folder, or take the hub's rows (hub:NAME)"
            )
    there = len(task.fewshot_docs())
    if there < count:
        raise InvalidOptionError(f"{name} has {there} examples to give ({split}); {count} were asked for")
    return count, str(split)


# --- judging ---


def _judge(model: Model, plan: Planned, batch_size: int, bos: Bos, run: Run) -> TaskResult:
    parts = {part: task for part, task in plan.parts.items() if plan.sizes[part]}
    results = harness.answer(model, parts, plan.sizes, batch_size=batch_size, bos=bos, run=run, label=plan.name)
    samples = [sample for part in parts for sample in _of_first_filter(results["samples"][part])]
    outcomes = [sample.get(plan.metric) for sample in samples]
    numbers = [float(outcome) for outcome in outcomes if isinstance(outcome, (int, float))]
    of_mean = len(numbers) == len(outcomes) and all(harness.is_mean(task, plan.metric) for task in parts.values())
    return TaskResult(
        task=plan.name, metric=plan.metric,
        value=statistics.fmean(numbers) if of_mean else _aggregated(plan, parts, results),
        stderr=statistics.stdev(numbers) / math.sqrt(len(numbers)) if of_mean and len(numbers) > 1 else None,
        documents=len(outcomes), chance=plan.chance, fewshot=plan.fewshot, fewshot_split=plan.fewshot_split,
        per_document=numbers if len(numbers) == len(outcomes) else [], truncated=results["truncated"],
        source=plan.source, harness=results["harness"], bos=results["bos"],
    )  # fmt: skip


def _of_first_filter(samples: Iterable[Facts]) -> list[Facts]:
    """A document may be scored once for each of the task's filters."""
    samples = list(samples)
    return sorted((each for each in samples if each["filter"] == samples[0]["filter"]), key=lambda s: s["doc_id"])


def _aggregated(plan: Planned, parts: harness.Tasks, results: Facts) -> float:
    """lm-eval's own figure, for a metric that is no mean; such a line has one part."""
    (figures,) = (results["results"][part] for part in parts)
    return float(next(value for name, value in figures.items() if name.partition(",")[0] == plan.metric))
