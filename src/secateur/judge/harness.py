"""lm-eval as a library: it builds tasks and answers them with a model of ours, and prints nothing.

Everything that touches lm-eval is here. Its own task files are used as they are installed with it; only where their
rows come from is replaced, so the requests are the originals' by construction.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import io
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from secateur.assets import Bos, Rows
from secateur.assets.hub import hub_error
from secateur.engine.tokens import bos_id_of
from secateur.errors import DataError, MissingExtraError, NumericalError, UnknownNameError
from secateur.hf import own_randomness, quiet_transformers
from secateur.judge.results import Facts
from secateur.model.handle import Model
from secateur.run import Run

Tasks = dict[str, Any]  # lm-eval's task objects, of which it has no types, by name

_SEED = 1234  # lm-eval's own default, for the same examples
_NO_HUB = "Without a hub: a task file of your own, or the tasks that `secateur fetch tasks` brings."


def require_lm_eval() -> ModuleType:
    """lm-eval, with what this project uses of it.

    Raises:
        MissingExtraError: it, or what it needs to hold a transformers model, is not here.
    """
    with _silenced():
        try:
            import lm_eval.api.metrics
            import lm_eval.api.task
            import lm_eval.evaluator
            import lm_eval.models.huggingface
            import lm_eval.tasks
        except ImportError as error:
            raise MissingExtraError.of(error.name or "lm_eval", "tasks", "judging by tasks") from error
    return lm_eval


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, warnings or prints of lm-eval and of what it uses; settings and shared generators come back."""
    task = require_lm_eval().api.task
    bar = task.tqdm  # building contexts draws one that has no switch
    task.tqdm = functools.partial(bar, disable=True)
    try:
        with _silenced(), own_randomness(_SEED):
            yield
    finally:
        task.tqdm = bar


@contextmanager
def _silenced() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import datasets
    except ImportError:  # then lm-eval is not here either
        bars = False
    else:
        bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


# --- tasks ---


def local_tasks(names: Mapping[str, Mapping[str, list[Any]]], folder: str, rows: Rows) -> Tasks:
    """lm-eval's own tasks, whose files lie in a `folder` of its `tasks`, with rows of ours: of each task by split.

    Raises:
        DataError: the rows do not have what the tasks need.
    """
    root = Path(require_lm_eval().tasks.__file__).parent / folder
    from lm_eval.tasks._yaml_loader import load_yaml

    with quiet():
        manager = require_lm_eval().tasks.TaskManager(include_path=root, include_defaults=False)
        configs = {name: load_yaml(manager.task_index[name].yaml_path, resolve_func=False) for name in names}
        members = [_with_rows(configs[name], splits, rows.where) for name, splits in names.items()]
        try:
            return dict(manager.load({"group": "local", "task": members})["tasks"])
        except Exception as error:  # templates and functions of lm-eval's, over rows that may have anything
            raise DataError(f"{rows.where} does not have the rows that {folder} needs: {_said(error)}") from error


def _with_rows(config: Facts, splits: Mapping[str, list[Any]], where: str) -> Facts:
    """A task's configuration with its data set replaced, and the splits for examples left out that are not there."""
    import datasets

    judged = config.get("test_split") or config["validation_split"]
    if judged not in splits:
        raise DataError(f"{config['task']} is judged on its split '{judged}', which is not in {where}")

    def rows(**_: Any) -> Any:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(each) for split, each in splits.items()})

    missing = {key: None for key in ("training_split", "validation_split") if config.get(key) not in splits}
    return {"task": config["task"], "custom_dataset": rows, **missing}


def file_tasks(path: Path) -> Tasks:
    """The tasks of a user's file.

    Raises:
        DataError: there is no such file, or lm-eval cannot make tasks of it.
    """
    if not path.is_file():
        raise DataError(f"there is no task file {path}")
    with quiet():
        try:
            manager = require_lm_eval().tasks.TaskManager(include_path=path.parent, include_defaults=False)
            _require_named_files(path)
            return dict(manager.load(str(path))["tasks"])
        except DataError:
            raise
        except Exception as error:  # it may hold anything, functions of the user's too
            raise DataError(f"lm-eval cannot make a task of {path}: {_said(error)}") from error


def _require_named_files(path: Path) -> None:
    """Refuse a reader of files without files: `datasets` would search all that lies below the working directory."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path, resolve_func=False)
    names = {"data_files", "data_dir"} & set(config.get("dataset_kwargs") or {})
    if config.get("dataset_path") in ("json", "csv", "parquet", "text", "arrow") and not names:
        raise DataError(
            f"{path} reads {config['dataset_path']} and names no files: put them under `dataset_kwargs`, as "
            "`data_files: {test: rows.jsonl}`"
        )


def named_tasks(name: str, known: Sequence[str]) -> Tasks:
    """lm-eval's own tasks behind a name, with the rows that they themselves ask the hub for.

    Raises:
        UnknownNameError: lm-eval has no such task.
        FetchError: its rows could not be fetched.
    """
    with quiet():
        manager = require_lm_eval().tasks.TaskManager()  # reads some fifteen thousand files, in seconds
        if name not in manager.task_index:
            unknown = UnknownNameError.of("task", name, known)
            raise UnknownNameError(f"{unknown} A task of lm-eval's, or the path of a task file, is fine, too.")
        try:
            return dict(manager.load(name)["tasks"])
        except Exception as error:  # see `assets.hub`
            page = "https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks"
            raise hub_error(f"the rows of {name}", error, page=page, instead=_NO_HUB) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def is_mean(task: Any, metric: str) -> bool:
    """Whether a task's metric is the mean of its documents' outcomes."""
    return task.aggregation()[metric] is require_lm_eval().api.metrics.mean


def characters(name: str, task: Any, documents: int) -> float:
    """About how many characters a model will read per document, by the first ones: each answer after all that stands
    before it; answers of one word after the same words are read off one forward."""
    with quiet():
        task.set_fewshot_seed(_SEED)
        some = list(itertools.islice(task.eval_docs, documents))
        read = 0
        for document in some:
            context = task.fewshot_context(document, num_fewshot=task.config.num_fewshot or 0)
            made = task.construct_requests(doc=document, ctx=context, metadata=(name, 0, 1))
            pairs = [request.args for request in (made if isinstance(made, list) else [made])]
            answers = [(str(before), after if isinstance(after, str) else "") for before, after in pairs]
            read += sum(map(len, {before + (after if " " in after.strip() else "") for before, after in answers}))
    return read / len(some) if some else 0.0


# --- answers ---


def answer(
    model: Model, tasks: Tasks, documents: Mapping[str, int], *, batch_size: int, bos: Bos, run: Run, label: str
) -> Facts:
    """lm-eval's results for the first so many documents of each task; its samples lie under "samples", its version
    under "harness", its `add_bos_token` under "bos".

    Under "truncated" stands how many sequences lost their beginning, being longer than the model's positions.

    Raises:
        DataError: the tokenizer gives ids that the model has not; an answer is longer than the model's positions.
        NumericalError: the model gives NaN.
    """
    with quiet():
        for task in tasks.values():
            task.set_fewshot_seed(_SEED)
        judged = _wrapped(model, batch_size, bos, run, label)
        results = require_lm_eval().evaluator.evaluate(
            judged,
            {"tasks": dict(tasks), "groups": {}},
            samples={name: range(documents[name]) for name in tasks},  # a list is searched for each document
            bootstrap_iters=0,  # standard errors are taken from the documents' outcomes
        )
        version = importlib.metadata.version("lm_eval")  # figures of other versions may differ
        return {**results, "truncated": judged.truncated, "harness": f"lm_eval {version}", "bos": judged.begins}


def _wrapped(model: Model, batch_size: int, bos: Bos, run: Run, label: str) -> Any:
    """The model as lm-eval wants it: its own wrapper, with our progress and checks."""

    HFLM: Any = require_lm_eval().models.huggingface.HFLM  # noqa: N806  # a class
    tokenizer: Any = copy.deepcopy(model.tokenizer)  # a padding token is put into it
    bos_id = bos_id_of(model, bos)
    add_bos = True if bos_id is not None else False if bos == "never" else None  # None: what the tokenizer does
    # lm-eval's `add_bos_token` only lets a tokenizer do what it does by itself
    before = tokenizer.bos_token if bos_id is not None and bos_id not in tokenizer("")["input_ids"] else ""

    class Judged(HFLM):
        begins, truncated = add_bos, 0
        add_bos_token: bool | None

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, override_bs: Any = None
        ) -> list[tuple[float, bool]]:
            sequences = {tuple(context + continuation[:-1]) for _, context, continuation in requests}
            highest = max(max(context + continuation) for _, context, continuation in requests)
            if highest >= model.vocab_size:
                raise DataError(
                    f"the tokenizer does not fit the model: token id {highest}, vocabulary {model.vocab_size}"
                )
            if (longest := max(len(continuation) for _, _, continuation in requests)) > self.max_length:
                raise DataError(f"an answer has {longest} tokens; the model's positions end at {self.max_length}")
            self.truncated += sum(len(sequence) > self.max_length for sequence in sequences)
            with run.progress(label, len(sequences)) as self._advance:
                answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, True, override_bs)
            if any(math.isnan(value) for value, _ in answers):
                raise NumericalError("the model gives NaN; try --dtype float32")
            return answers

        def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            logits: torch.Tensor = super()._model_call(inps, **kwargs)
            self._advance(len(inps))
            return logits

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if add_special_tokens is None and self.add_bos_token and not string.startswith(before):
                string = before + string
            encoded: list[int] = super().tok_encode(string, add_special_tokens, **kwargs)
            return encoded

        def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
            strings = [string if string.startswith(before) else before + string for string in strings]
            return super().tok_batch_encode(strings, *args, **kwargs)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            self.add_bos_token = False if add_bos else add_bos  # lm-eval puts the token before such texts already
            answers: list[float] = super().loglikelihood_rolling(requests, True)
            self.add_bos_token = add_bos
            return answers

        # lm-eval draws bars unless it is told not to
        loglikelihood = functools.partialmethod(HFLM.loglikelihood, disable_tqdm=True)
        generate_until = functools.partialmethod(HFLM.generate_until, disable_tqdm=True)

    return Judged(
        pretrained=model.hf,
        tokenizer=tokenizer,
        add_bos_token=add_bos,
        backend="causal",
        batch_size=batch_size,
        max_length=model.max_length,
    )
