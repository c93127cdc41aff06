"""secateur as Python: `prune`, `save` and what they stand on. The commands are thin wrappers of these."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from secateur.card import render_card
from secateur.engine.tokens import Count, Tokens, check_tokens, read_tokens
from secateur.errors import CheckpointError, OutputExistsError
from secateur.export import RECORD, Tier
from secateur.export import save as save_checkpoint
from secateur.folders import resolved
from secateur.judge.perplexity import perplexity
from secateur.methods import Method, get_method
from secateur.model.budget import Budget, Convention
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.model.load import read_record
from secateur.record import dump, identity, make_record, public_name
from secateur.run import Run
from secateur.surgery.apply import apply, predict, require_edits
from secateur.surgery.edits import Edit

logger = logging.getLogger(__name__)

EditFilter = Callable[[Model, Tokens, Run, Iterator[Edit]], Iterator[Edit]]


@dataclass(frozen=True)
class Pruning:
    """What was done to a model.

    Attributes:
        edits: in order, with block numbers of the model as loaded.
        before, after: the layouts.
    """

    method: str
    options: dict[str, Any]
    budget: Budget
    edits: list[Edit] = field(repr=False)
    before: Layout = field(repr=False)
    after: Layout = field(repr=False)


def run_method(
    model: Model,
    method: Method,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    filters: Sequence[EditFilter] = (),
    **options: Any,
) -> Pruning:
    """Prune `model` in place: each edit the method yields is applied before the method resumes.

    Raises:
        UnsupportedEditError: the family cannot do what the method needs; nothing has been done.
        CheckpointError: the real model is not what the edits predict (a bug; nothing should be saved).
    """
    complete = method.complete(options)
    require_edits(model.family, *method.edits)
    before = predicted = model.layout()
    stream = method.prune(model, tokens, budget, run, **complete)
    for each in filters:
        stream = each(model, tokens, run, stream)
    edits = []
    for edit in stream:
        apply(model, edit)
        where = getattr(edit, "block", getattr(edit, "site", None))
        logger.debug("applied %s%s", type(edit).__name__, "" if where is None else f" at {where}")
        predicted = predict(predicted, edit)
        edits.append(edit)
    after = model.layout()
    if after != predicted:
        raise CheckpointError("the pruned model's layout is not the one that its edits predict; please report this")
    return Pruning(method.name, complete, budget, edits, before, after)


@dataclass(frozen=True)
class Pruned:
    """A pruned model with the account of how it came to be.

    Attributes:
        model: the same object that was given to `prune`, now smaller.
        record: what will be saved as `secateur.json`.
    """

    model: Model
    pruning: Pruning
    record: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Job:
    """A pruning that is fully specified and not yet run: every argument is checked, nothing is changed."""

    model: Model
    method: str
    tokens: Tokens
    budget: Budget
    seed: int
    options: dict[str, Any]
    model_fingerprint: str

    @property
    def fingerprint(self) -> str:
        """Identity of the outcome; the same in two runs of the same job."""
        return identity(self.model_fingerprint, self.tokens, self.method, self.options, self.budget, self.seed)


def prepare(
    model: Model,
    method: str = "2ssp",
    *,
    sparsity: float,
    of: Convention = "blocks",
    round_to: int = 1,
    calibration: str | Tokens | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    count: Count = "all",
    data: Path | None = None,
    cache: Path | None = None,
    **options: Any,
) -> Job:
    """Check everything that `prune` will need. Arguments and errors are those of `prune`."""
    budget = Budget(sparsity, of=of, round_to=round_to)
    if isinstance(calibration, Tokens):
        tokens = calibration
        samples, length = tokens.samples, tokens.length
        check_tokens(model, tokens)
    plan = get_method(method).plan(model, budget, samples, length, options)
    if not isinstance(calibration, Tokens):
        name = calibration or ("demo" if model.source.get("asked") == "demo" else "c4")
        tokens = read_tokens(
            model, name, purpose="calibration", length=plan.length, samples=plan.samples, seed=seed, count=count,
            data=data, cache=cache,
        )  # fmt: skip
    return Job(model, method, tokens, budget, seed, plan.options, model.fingerprint())


def prune(
    model: Model,
    method: str = "2ssp",
    *,
    sparsity: float,
    of: Convention = "blocks",
    round_to: int = 1,
    calibration: str | Tokens | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    count: Count = "all",
    data: Path | None = None,
    cache: Path | None = None,
    run: Run | None = None,
    **options: Any,
) -> Pruned:
    """Prune a model in place.

    Args:
        sparsity: share of parameters to remove, in (0, 1).
        of: a share of the blocks' parameters, or of the whole model's.
        round_to: round FFN widths to a multiple of this, in methods that choose FFN widths.
        calibration: a text's name or file (c4 if None; demo for the demo model), or ready `Tokens`.
        samples, length: calibration windows; the paper's if None.
        seed: 0 takes the text's first windows, as the papers do; others draw from all.
        count: "responses" counts only what the assistant says, in chat data.
        options: the method's own; `secateur methods` lists them.

    Raises:
        InfeasibleBudgetError: with the reachable range. Other typed errors for other bad input, before anything is
            changed. If the run itself fails (NumericalError) or is interrupted, the model is left half-pruned: load it
            again.
    """
    job = prepare(
        model, method, sparsity=sparsity, of=of, round_to=round_to, calibration=calibration, samples=samples,
        length=length, seed=seed, count=count, data=data, cache=cache, **options,
    )  # fmt: skip
    return run_job(job, run=run)


def run_job(
    job: Job,
    *,
    run: Run | None = None,
    measure_on: Mapping[str, Tokens] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Pruned:
    """Run a prepared job.

    Args:
        measure_on: texts to take the perplexity on, before and after; goes into the record.
        arguments: goes into the record as given.
    """
    run = run or Run(job.seed)
    texts = dict(measure_on or {})
    judge = Run(observer=run.observer)  # keeps the evaluation out of the method's cost
    dense = {name: perplexity(job.model, tokens, run=judge) for name, tokens in texts.items()}
    head = job.model.head_cost
    start = time.monotonic()
    pruning = run_method(job.model, get_method(job.method), job.tokens, job.budget, run, **job.options)
    cost = {
        "seconds": round(time.monotonic() - start, 1),
        "block_tokens": run.meter.block_tokens,
        "head_tokens": run.meter.head_tokens,
        "forwards": round(run.meter.forwards(len(pruning.before.blocks), job.tokens.length, head=head), 2),
        "forwards_asked": round(run.meter.forwards_asked(len(pruning.before.blocks), job.tokens.length), 2),
    }
    record = make_record(
        job.model, pruning, job.tokens, model_fingerprint=job.model_fingerprint, seed=job.seed, cost=cost,
        arguments=arguments, notes=run.notes,
    )  # fmt: skip
    for name, tokens in texts.items():
        after = perplexity(job.model, tokens, run=judge)
        after["text"] = public_name(str(after["text"]))
        record["perplexity"].append({**after, "before": dense[name]["perplexity"], "after": after["perplexity"]})
    job.model.edited()  # a further pruning starts from here
    job.model.parents = [*job.model.parents, {key: value for key, value in record.items() if key != "parents"}]
    return Pruned(job.model, pruning, record)


class Result(Protocol):
    """What `save` writes: `Pruned`, or `Recovered`."""

    @property
    def model(self) -> Model: ...

    @property
    def record(self) -> dict[str, Any]: ...


class Identified(Protocol):
    """A job whose outcome has an identity."""

    @property
    def fingerprint(self) -> str: ...


def save(result: Result, folder: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> Tier:
    """Write a checkpoint with record and card, whole or not at all; return its tier.

    Raises:
        OutputExistsError: the folder exists and `overwrite` is off.
    """
    files = {RECORD: dump(result.record), "README.md": render_card(result.record)}
    return save_checkpoint(result.model, Path(folder), files=files, overwrite=overwrite, max_shard_size=max_shard_size)


def already_there(job: Identified, folder: Path) -> dict[str, Any] | None:
    """The record of `folder` if it already holds this very job's result; None if there is nothing.

    Raises:
        OutputExistsError: it holds something else.
    """
    folder = resolved(folder)
    if not folder.exists():
        return None
    record = read_record(folder) if folder.is_dir() else None
    if record is not None and record.get("fingerprint") == job.fingerprint:
        return record
    what = "another pruning or recovery" if record else "something that secateur did not write"
    raise OutputExistsError(f"{folder} exists and holds {what}; choose another --out, or give --overwrite")
