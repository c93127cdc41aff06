"""A planned pruning, run: `Plan` -> `Job` -> edits -> `Pruned`.

`driver.py` has the edits; `running.py` what the command and Python call. A grid goes the same way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import packages_distributions, version
from typing import Any

from msgspec import structs

from secateur.assets import usual_text
from secateur.driver import Pruning, run_method
from secateur.engine.tokens import Tokens, read_tokens
from secateur.errors import InvalidOptionError
from secateur.export import loads_in, tier
from secateur.journal import Identity, fingerprint
from secateur.judge.perplexity import before_and_after, recalled_perplexity
from secateur.model.facts import configuration, environment, origin, sizes
from secateur.model.handle import Model
from secateur.planning import Plan
from secateur.record import FORMAT, Cost, Record, public_arguments, public_facts
from secateur.run import Run
from secateur.serving import ANY, require_served
from secateur.surgery.edits import to_json
from secateur.version import __version__


@dataclass(frozen=True)
class Pruned:
    """A pruned model with the account of how it came to be.

    Attributes:
        model: what was given to `prune`, now smaller; of a transformers model the `Model` around it.
        record: what will be saved as `secateur.json`.
    """

    model: Model
    pruning: Pruning
    record: Record = field(repr=False)


@dataclass(frozen=True)
class Job:
    """A pruning that is fully specified and not yet run: every argument is checked, nothing is changed.

    Attributes:
        model_fingerprint: of the weights; configuration: see `facts.configuration`.
        tokenizer_given: whether the tokenizer, which is saved with the model, is not the model's own.
    """

    plan: Plan
    model: Model
    tokens: Tokens
    model_fingerprint: str
    configuration: str
    tokenizer_given: bool = False

    @classmethod
    def of(cls, planned: Plan, model: Model, tokens: Tokens, *, tokenizer_given: bool = False) -> Job:
        """Looks at all weights, once.

        Raises:
            NumericalError: one is no number.
        """
        return cls(planned, model, tokens, model.fingerprint(), configuration(model), tokenizer_given)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the outcome; on one kind of device, jobs of one identity give the same model."""
        return fingerprint(self._identity(asdict(self.plan.request.budget)))

    @cached_property
    def run_identity(self) -> Identity:
        """The same in parts, by name; where there is a goal, of all prunings that are tried for it."""
        goal, request = self.plan.request.goal, self.plan.request
        size = {**goal.facts, "of": request.of, "round_to": request.round_to} if goal else asdict(request.budget)
        return self._identity(size)

    def _identity(self, size: Mapping[str, Any]) -> Identity:
        request, method = self.plan.request, self.plan.method
        filters = {f"filter {f.name}": [f.name, dict(f.options), _code_version(f.apply)] for f in self.plan.filters}
        tokenizer = {"tokenizer": _tokenizer_parts(self.model.tokenizer)} if self.tokenizer_given else {}
        return {
            "model": self.model_fingerprint, "configuration": self.configuration,
            "calibration": self.tokens.fingerprint(), "method": method.name, "options": dict(self.plan.options),
            "size": size, "seed": request.seed, "secateur": __version__,
            "method's package": _code_version(method.prune), **filters, **tokenizer,
        }  # fmt: skip


def _tokenizer_parts(tokenizer: Any) -> list[str]:
    """All that a saved tokenizer decides, in words; not how it last padded or truncated."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    stated = json.loads(fast.to_str()) | {"padding": None, "truncation": None} if fast else tokenizer.get_vocab()
    parts = stated, tokenizer.chat_template, tokenizer.special_tokens_map
    return [json.dumps(part, sort_keys=True, default=str) for part in parts]


def _code_version(function: Callable[..., Any]) -> str | None:
    """The version of another package that a method or filter comes from, where it has one."""
    package = function.__module__.partition(".")[0]
    return None if package == "secateur" else _package_version(package)


@cache  # half a second each time
def _package_version(package: str) -> str | None:
    return next((version(name) for name in packages_distributions().get(package, ())), None)


def calibration_of(planned: Plan, model: Model) -> Tokens:
    """What a plan is calibrated on: read, where the request has only its name.

    Args:
        model: with its tokenizer; it may be a hollow one.

    Raises:
        DataError: it cannot be read, is too short, or the tokenizer is another model's.
    """
    request = planned.request
    usual = usual_text("c4", model=model.source.get("asked"), data=request.data)
    return read_tokens(
        model, usual if request.calibration is None else request.calibration, purpose="calibration",
        length=planned.length, samples=planned.samples, seed=request.seed, count=request.count, bos=request.bos,
        data=request.data, cache=request.cache, text_field=request.text_field,
    )  # fmt: skip


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

    Raises:
        InvalidOptionError: the run's seed is not the request's.
        JournalError: the run's store has another job's results.
        UnsupportedExportError: the calibration chose what the engine that it is for does not run.
    """
    planned, model = job.plan, job.model
    request, run = planned.request, run or Run(planned.request.seed)
    if run.seed != request.seed:
        raise InvalidOptionError(
            f"the run draws by seed {run.seed}, the request by {request.seed}: Run({request.seed})"
        )
    run.store.open(job.fingerprint)
    texts = dict(measure_on or {})
    judge = Run(observer=run.observer, store=run.store).scoped("judge")  # keeps the evaluation out of the method's cost
    dense = {name: recalled_perplexity(model, tokens, judge, "before") for name, tokens in texts.items()}
    head = model.head_cost
    run.expect(planned.meter, head=head)
    start = time.monotonic()
    pruning = run_method(
        model, planned.method, job.tokens, request.budget, run, filters=planned.filters, **planned.options
    )
    require_served(request.for_, model, planned.method)  # which blocks go may be known only now
    blocks, length = len(pruning.before.blocks), job.tokens.length
    cost = Cost(
        seconds=round(time.monotonic() - start + run.spared_s, 1),
        block_tokens=run.meter.block_tokens,
        head_tokens=run.meter.head_tokens,
        forwards=round(run.meter.forwards(blocks, length, head=head), 2),
        forwards_asked=round(run.meter.forwards_asked(blocks, length), 2),
    )
    record = make_record(job, pruning, cost, run.notes, arguments or {})
    for name, tokens in texts.items():
        after = before_and_after(dense[name], recalled_perplexity(model, tokens, judge, "after"))
        record.perplexity = [*(record.perplexity or ()), after]
    if planned.goal is not None:
        got = float(record.after.weight_bytes) if planned.goal.goal == "bytes" else planned.goal.got
        record.goal = structs.replace(planned.goal, got=got)
    model.edited()  # a further pruning starts from here
    model.parents = [*model.parents, record.alone]
    return Pruned(model, pruning, record)


def make_record(
    job: Job, pruning: Pruning, cost: Cost, notes: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Record:
    """Describe what a finished run did to the job's model."""
    model, filters = job.model, job.plan.filters
    return Record(
        secateur=__version__,
        format=FORMAT,
        fingerprint=job.fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=pruning.method,
        options=dict(pruning.options),
        filters={filtering.name: dict(filtering.options) for filtering in filters} or None,
        seed=job.plan.request.seed,
        engine=None if job.plan.request.for_ == ANY else job.plan.request.for_,
        sparsity=pruning.sparsity,
        tier=tier(model),
        loads_in=loads_in(model),
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
