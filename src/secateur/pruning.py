"""secateur as Python: `prune`, `save` and what they stand on. The commands are thin wrappers of these."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secateur.engine.tokens import Count, Tokens, check_tokens, read_tokens
from secateur.errors import CheckpointError
from secateur.export import tier
from secateur.judge.perplexity import perplexity
from secateur.methods import Method, get_method
from secateur.model.budget import Budget, Convention, shares
from secateur.model.facts import environment, origin, sizes
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.record import (
    Cost,
    MeasuredPerplexity,
    Record,
    Shares,
    Sparsity,
    public_arguments,
    public_facts,
    public_name,
)
from secateur.run import Run
from secateur.surgery.apply import apply, predict, require_edits
from secateur.surgery.edits import Edit, to_json
from secateur.version import __version__

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
    record: Record = field(repr=False)


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
    blocks, length = len(pruning.before.blocks), job.tokens.length
    cost = Cost(
        seconds=round(time.monotonic() - start, 1),
        block_tokens=run.meter.block_tokens,
        head_tokens=run.meter.head_tokens,
        forwards=round(run.meter.forwards(blocks, length, head=head), 2),
        forwards_asked=round(run.meter.forwards_asked(blocks, length), 2),
    )
    record = make_record(job, pruning, cost, arguments=arguments, notes=run.notes)
    for name, tokens in texts.items():
        after = perplexity(job.model, tokens, run=judge)
        after["text"] = public_name(str(after["text"]))
        measured = {**after, "before": dense[name]["perplexity"], "after": after["perplexity"]}
        record.perplexity = [*(record.perplexity or ()), MeasuredPerplexity(**measured)]
    job.model.edited()  # a further pruning starts from here
    job.model.parents = [*job.model.parents, record.alone]
    return Pruned(job.model, pruning, record)


def make_record(
    job: Job,
    pruning: Pruning,
    cost: Cost,
    *,
    arguments: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Record:
    """Describe what a finished run did to the job's model.

    Args:
        arguments: the command line or call as given.
        notes: what the method said of its run (`Run.note`).
    """
    model, budget = job.model, pruning.budget
    return Record(
        secateur=__version__,
        fingerprint=job.fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=pruning.method,
        options=pruning.options,
        seed=job.seed,
        sparsity=Sparsity(
            asked=budget.sparsity,
            of=budget.of,
            round_to=budget.round_to,
            achieved=Shares(**shares(pruning.before, pruning.after)),
        ),
        tier=tier(model),
        model=origin(model, job.model_fingerprint),
        calibration={**public_facts(job.tokens.source), "fingerprint": job.tokens.fingerprint()},
        arguments=public_arguments(arguments or {}),
        environment=environment(model),
        cost=cost,
        before=sizes(pruning.before, model),
        after=sizes(pruning.after, model),
        perplexity=[],
        evaluations=[],
        notes=dict(notes or {}),
        edits=[to_json(edit) for edit in pruning.edits],
        parents=model.parents,
    )


def identity(
    model_fingerprint: str, tokens: Tokens, method: str, options: Mapping[str, Any], budget: Budget, seed: int
) -> str:
    """sha256 of all that decides a run's outcome; on one kind of device, two runs of one identity give the same
    model."""
    parts = [model_fingerprint, tokens.fingerprint(), method, dict(options), asdict(budget), seed, __version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
