"""Prunings run to their end: `prune` in memory, `prune_to` into a folder; where a goal asks for it, several of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import convert, to_builtins

from secateur.engine.tokens import Tokens, ready
from secateur.errors import (
    InfeasibleBudgetError,
    Interrupted,
    InvalidOptionError,
    NumericalError,
    UnsupportedEditError,
    UnsupportedExportError,
)
from secateur.folders import claimed, require_space
from secateur.goals import Goal, Tried
from secateur.journal import Journal, Journaled, claimed_run, fingerprint, forget, run_folder, scratch_in, taken_bytes
from secateur.judge.judging import Judge, Judging
from secateur.judge.perplexity import before_and_after, perplexity, ratio
from secateur.judge.results import Perplexity
from secateur.model.coerce import Loaded, ModelSource, handed
from secateur.model.handle import Model, with_random_weights
from secateur.model.load import Source, TokenizerSource
from secateur.output import Outcome, Output
from secateur.planning import NOT_BOTH, Plan, Request, faster, met, plan, plans_of
from secateur.pruning import Job, Pruned, calibration_of, run_job
from secateur.record import Cost, MeasuredPerplexity, MetGoal, read_record
from secateur.run import Meter, Observer, Run, Silent
from secateur.sharing import Shared, SharingRun
from secateur.signatures import RECOMMENDED
from secateur.workers.session import Workers
from secateur.workers.sweeps import spreading

_HELD_OUT_TOKENS = 16_384  # of the calibration text, to measure a loss on where no text is given for it


def prune(
    model: ModelSource,
    method: str = RECOMMENDED,
    *,
    tokenizer: TokenizerSource | None = None,
    run: Run | None = None,
    **request: Any,
) -> Pruned:
    """Prune a model in place.

    Args:
        model: a folder, a hub id or "demo"; a `Source`; a `Model`; or a transformers model. That is pruned itself, no
            copy is made: it is the smaller one afterwards (`Pruned.model.hf`), of secateur's subclass of its class.
        tokenizer: the model's, or the name of one, where it does not lie where the model was loaded from.
        request: `sparsity`, and whatever else `Request` has; the method's own options by name.

    Raises:
        InfeasibleBudgetError: with the reachable range. Other typed errors for other bad input, before anything is
            changed. If the run itself fails (NumericalError) or is interrupted, the model is left half-pruned: load it
            again.
    """
    asked = Request.given(method, request)
    with handed(model, tokenizer, cache=asked.cache, adopt=True) as given:
        planned, tokens, held_out = _specified(asked, given.hollow(tokenizer=True), given)
        job, loaded = _loaded(planned, given, tokens)
        return _run_for_goal(job, loaded, given, held_out, run=run)


def _loaded(planned: Plan, source: Source | Loaded, tokens: Tokens) -> tuple[Job, list[Model]]:
    """A job with a hollow model, and its model, for whoever takes it out of the list: nobody else holds on to it."""
    job = Job.of(planned, source.load(), tokens, tokenizer_given=source.tokenizer is not None)
    return replace(job, model=job.model.hollow()), [job.model]


def _specified(request: Request, hollow: Model, source: Source | Loaded) -> tuple[Plan, Tokens, dict[str, Tokens]]:
    """All that can be refused before gigabytes are read: the plan, the calibration, and the texts that a loss is to be
    kept on. For such a goal the plan is one of those that are possible, and its request has no sparsity yet."""
    goal = request.goal
    if goal is None or not goal.is_loss:
        planned = plan(request, hollow, device=source.main_device)
        return planned, calibration_of(planned, hollow), {}
    if request.sparsity is not None:
        raise InvalidOptionError(NOT_BOTH)
    first = plans_of(request, goal, hollow, source.main_device).first_plan
    planned = replace(first, request=replace(first.request, sparsity=None, goal=goal))
    if goal.judging.texts:
        return planned, calibration_of(planned, hollow), _windows(goal.judging, request, hollow)
    if ready(request.calibration) is not None:
        raise InvalidOptionError(
            "windows of token ids leave none to measure the perplexity on: give a text for it (--perplexity TEXT, or "
            "the texts of the goal's judging)"
        )
    extra = goal.judging.samples or max(1, _HELD_OUT_TOKENS // planned.length)
    together = calibration_of(replace(planned, samples=planned.samples + extra), hollow)
    named = {**together.source, "name": f"{together.source['name']}, held out", "samples": extra}
    held_out = Tokens(together.ids[planned.samples :], together.weights[planned.samples :], named)
    tokens = together.first(planned.samples)
    return planned, replace(tokens, source={**tokens.source, "samples": planned.samples}), {named["name"]: held_out}


def _windows(judging: Judging, request: Request, hollow: Model) -> dict[str, Tokens]:
    """Of a judging's texts."""
    judge = Judge(judging, (), data=request.data, cache=request.cache, text_field=request.text_field)
    return judge.windows(hollow)


def prune_to(
    request: Request,
    source: ModelSource,
    output: Output | str | Path,
    *,
    tokenizer: TokenizerSource | None = None,
    judging: Judging | None = None,
    observer: Observer | None = None,
    arguments: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
) -> Outcome:
    """Prune a model and write a smaller checkpoint, whole or not at all.

    All that can be refused is refused before gigabytes are read, but for weights that are NaN and too little room on
    the disk: before the work.

    Args:
        source, tokenizer: as `prune` has them; one that is in memory is pruned in place.
        output: or the folder.
        judging: of which the texts are measured before and after.
        arguments: goes into the record as given.
        workers: over which the sweeps of searches are spread; the model is then one that is loaded by its name.

    Raises:
        OutputExistsError, OutputBusyError, OutputError: the folder holds something else, another process is about to
            write it, or it cannot be written.
        SecateurError: what `plan`, `calibration_of`, `Job.of` and `run_job` raise.
    """
    judging = judging or Judging()
    output = output if isinstance(output, Output) else Output(Path(output))
    with handed(source, tokenizer, cache=request.cache, adopt=True) as given:
        output.check(given.name, request.calibration, *judging.sources.values())
        return _prune_to(request, given, output, judging, observer, arguments, workers)


def _prune_to(
    request: Request,
    source: Source | Loaded,
    output: Output,
    judging: Judging,
    observer: Observer | None,
    arguments: Mapping[str, Any] | None,
    workers: Workers | None,
) -> Outcome:
    run_in = run_folder(output.folder)
    with claimed(output.folder), scratch_in(run_in) as scratch, spreading(workers, source) as spread:
        if isinstance(source, Source) and source.scratch is None:
            source = replace(source, scratch=scratch)
        hollow = source.hollow(tokenizer=True)
        asked, request = request, _found_before(request, output, hollow)
        planned, tokens, held_out = _specified(request, hollow, source)
        texts = _windows(judging, request, hollow)
        job, loaded = _loaded(planned, source, tokens)
        if request.goal is None and (record := output.holds(job.fingerprint)) is not None:
            if not output.keep_run:  # it was killed just before its run folder went
                begun = replace(planned.request, goal=asked.goal)  # its sizes are those of the plan
                forget(run_in, replace(job, plan=replace(planned, request=begun)).run_identity)
            return Outcome(record, was_there=True)
        after = planned.before if held_out else planned.after  # a loss may leave nearly all
        beside = planned.run_bytes(job.model, keep_states=output.keep_states, texts=list(texts.values()))
        require_space(output.folder, after.parameters * job.model.dtype.itemsize + beside - taken_bytes(run_in))
        sweeper = spread(job.model_fingerprint)
        with _on_disk(job, run_in, output, observer or Silent()) as store:
            run = SharingRun(request.seed, store, observer=observer, keep_states=output.keep_states, sweeper=sweeper)
            job = _as_begun(job, source, run)
            pruned = _run_for_goal(job, loaded, source, held_out, run=run, measure_on=texts, arguments=arguments)
            output.write(pruned)
        return Outcome(pruned.record, was_there=False)


@contextmanager
def _on_disk(job: Job, folder: Path, output: Output, observer: Observer) -> Iterator[Journaled]:
    """The store of a job's run in the folder beside the output's, which goes when the output is there.

    Nothing is kept of a run that would fail again.

    Raises:
        JournalError, OutputBusyError, OutputError: see `claimed_run`.
        Interrupted: by the user; says how it goes on.
    """
    journal, over = None, False
    try:
        with claimed_run(folder, job.run_identity, overwrite=output.overwrite):
            journal = Journal(folder)
            if journal.entries:
                observer.note(f"going on from {folder}: {journal.standing}")
            try:
                yield Journaled(journal)
                over = not output.keep_run
            except KeyboardInterrupt as interrupt:
                raise Interrupted(
                    f"interrupted; {journal.standing} in {folder}, and the same command goes on from there"
                ) from interrupt
            except (
                InfeasibleBudgetError, InvalidOptionError, NumericalError, UnsupportedEditError, UnsupportedExportError
            ):  # fmt: skip
                over = not output.keep_run  # the same would come again
                raise
    finally:
        if over or (journal is not None and not journal.entries):
            forget(folder)


def _found_before(request: Request, output: Output, hollow: Model) -> Request:
    """With the sparsity that an earlier run found for the same goal, where the folder has that run's result.

    Raises:
        OutputExistsError: the folder has the result of something else, for which no sparsity need be searched.
    """
    if (goal := request.goal) is None:
        return request
    record = None if output.overwrite else read_record(output.folder)
    if record is not None and record.goal is not None and record.sparsity is not None:
        known = record.goal.goal, record.goal.asked, record.goal.by, record.goal.tolerance
        if known == (goal.name, goal.asked, goal.measured_by(), goal.step):
            texts = _windows(goal.judging, request, hollow) if goal.is_loss else {}  # one name may be of two texts
            measured = {each.fingerprint for each in record.perplexity or ()}
            if {tokens.fingerprint() for tokens in texts.values()} <= measured:
                return replace(request, goal=None, sparsity=record.sparsity.asked)
    output.holds("")
    return request


def _as_begun(job: Job, source: Source | Loaded, run: Run) -> Job:
    """The job with the sparsity at which its run met the goal when it began, a journaled step. Layouts that are timed
    again may meet it at another one, for which none of the steps that are kept would hold."""
    planned = job.plan
    if planned.goal is None:
        return job
    run.store.open(fingerprint(job.run_identity))
    found: dict[str, Any] = {
        "sparsity": planned.request.budget.sparsity,
        "met": msgspec.json.encode(planned.goal).decode(),
    }
    begun = run.step("goal/met", lambda: found)
    if begun["sparsity"] != found["sparsity"]:
        request = replace(planned.request, sparsity=begun["sparsity"])
        there = plan(replace(request, goal=None), job.model, device=source.main_device)
        planned = replace(there, request=request)
    return replace(job, plan=replace(planned, goal=msgspec.json.decode(begun["met"], type=MetGoal)))


# --- goals that real prunings decide ---


def _run_for_goal(
    job: Job,
    loaded: list[Model],
    source: Source | Loaded,
    held_out: Mapping[str, Tokens],
    *,
    run: Run | None = None,
    measure_on: Mapping[str, Tokens] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Pruned:
    """Run a job; where its goal is not met by layouts alone, several, and the best once more from its journal.

    Args:
        job, loaded: see `_loaded`.
        source: of fresh models. A model in memory is copied for each try, and pruned itself at the end.
        held_out: texts to keep a loss on.
    """
    planned = job.plan
    goal = planned.request.goal
    if goal is None or not (goal.is_loss or planned.approximate):
        return run_job(replace(job, model=loaded.pop()), run=run, measure_on=measure_on, arguments=arguments)
    began, tries = time.monotonic(), _Tries(job, loaded, source, run or Run(planned.request.seed))
    if goal.is_loss:
        planned, got, tried = plans_of(planned.request, goal, tries.hollow, source.main_device).meet(
            lambda some: tries.loss(some, goal, held_out)
        )
    else:
        planned, got, tried = tries.until_met(planned, goal)
    planned = replace(planned, goal=met(goal, got, tried, tries.cost(time.monotonic() - began)))
    known = {tokens.fingerprint() for tokens in held_out.values()}
    others = {name: text for name, text in (measure_on or {}).items() if text.fingerprint() not in known}
    return tries.best(planned, measure_on=others, arguments=arguments)


class _Tries:
    """Prunings of one model at several sparsities, which share the steps that hold at all of them."""

    def __init__(self, job: Job, loaded: list[Model], source: Source | Loaded, run: Run) -> None:
        self.hollow, self._job, self._source, self._run = job.model, job, source, run
        self._loaded = None if isinstance(source, Loaded) else loaded.pop()  # not pruned yet
        own, beginning = run.store, job.plan.method.shared
        self._store = self._best = own.sibling(beginning) if isinstance(own, Shared) else Shared(beginning)
        run.store.open(fingerprint(job.run_identity))
        self._judge = Run(observer=run.observer)
        self._dense: dict[str, Perplexity] = {}
        self._measured: list[MeasuredPerplexity] = []
        self._work, self._cost = Meter(), Cost(seconds=0)

    def loss(self, planned: Plan, goal: Goal, texts: Mapping[str, Tokens]) -> float:
        """The share by which the perplexity rises, on the text where it rises most."""
        if not self._dense:
            self._dense = self._perplexities(lambda: self._loaded or self._source.load(), texts, "dense")
        sparsity = planned.request.sparsity
        cost, after = self._tried(planned, texts)
        loss = max(ratio(self._dense[name], after[name]) for name in texts) - 1
        self._run.log("sparsity %.4g: %s", sparsity, goal.words(loss))
        if goal.meets(loss):
            self._best, self._cost = self._store.copy(), cost
            self._measured = [before_and_after(self._dense[name], after[name]) for name in texts]
        return loss

    def _tried(self, planned: Plan, texts: Mapping[str, Tokens]) -> tuple[Cost, dict[str, Perplexity]]:
        """What a pruning took, and what it left of the texts; steps of the search, which are not done again."""
        pruned: list[Pruned] = []

        def prune() -> Pruned:
            if not pruned:
                pruned.append(self._prune(planned, self._fresh()))
            return pruned[0]

        at = repr(planned.request.sparsity)
        after = self._perplexities(lambda: prune().model, texts, at)
        return convert(self._run.step(f"goal/{at}/cost", lambda: to_builtins(prune().record.cost)), Cost), after

    def until_met(self, planned: Plan, goal: Goal) -> tuple[Plan, float, Tried]:
        """From the sparsity that meets a goal by a rehearsal upwards, until a real pruning does."""
        plans = plans_of(planned.request, goal, self.hollow, self._source.main_device)
        foretold = plans.at(round(planned.request.budget.sparsity * plans.count))
        assert planned.goal is not None  # narrows the type
        assert foretold is not None  # it was found
        tried = planned.goal.tried
        while True:
            model = self._fresh()
            pruned = self._prune(foretold, model)
            after = pruned.pruning.after
            if goal.name == "bytes":
                got = float(after.parameters * model.dtype.itemsize)
            elif after == planned.after:
                got = planned.goal.got
            else:
                dense = with_random_weights(self.hollow.hf.config, model.dtype, model.device)
                got = faster(goal, dense, model, self._judge)
            if goal.meets(got):
                self._best, self._cost = self._store.copy(), pruned.record.cost
                return foretold, got, tried
            tried = [*tried, (foretold.request.budget.sparsity, got)]
            foretold = plans.smaller(foretold)
            del model, pruned  # before the next one is loaded

    def best(self, planned: Plan, **more: Any) -> Pruned:
        """The best once more, from its journal, on a model that stays."""
        job = replace(self._job, plan=planned, model=self._source.load())
        run = self._sharing(planned, self._best)
        pruned = run_job(job, run=run, **more)
        pruned.record.cost = self._cost  # a replay costs nothing
        pruned.record.perplexity = [*self._measured, *(pruned.record.perplexity or ())]
        return pruned

    def cost(self, seconds: float) -> Cost:
        """Of all tries, with what was judged."""
        meter, judged, layout = self._work, self._judge.meter, self.hollow.layout()
        work = Meter(meter.block_tokens + judged.block_tokens, meter.head_tokens + judged.head_tokens)
        forwards = work.forwards(len(layout.blocks), self._job.tokens.length, head=self.hollow.head_cost)
        return Cost(
            seconds=seconds, block_tokens=work.block_tokens, head_tokens=work.head_tokens, forwards=round(forwards, 2)
        )

    def _sharing(self, planned: Plan, store: Shared) -> SharingRun:
        own = self._run
        return SharingRun(
            planned.request.seed, store, observer=own.observer, keep_states=own.keep_states, sweeper=own.sweeper
        )

    def _fresh(self) -> Model:
        model, self._loaded = self._loaded, None
        if model is not None:
            return model
        loaded = self._source.load()
        return copy.deepcopy(loaded) if isinstance(self._source, Loaded) else loaded

    def _prune(self, planned: Plan, model: Model) -> Pruned:
        run = self._sharing(planned, self._store)
        pruned = run_job(replace(self._job, plan=planned, model=model), run=run)
        computed = run.computed
        self._work.block_tokens += computed.block_tokens
        self._work.head_tokens += computed.head_tokens
        return pruned

    def _perplexities(
        self, model: Callable[[], Model], texts: Mapping[str, Tokens], when: str
    ) -> dict[str, Perplexity]:
        def measured(name: str) -> object:
            return to_builtins(perplexity(model(), texts[name], run=self._judge))

        return {
            name: convert(
                self._run.step(f"goal/{when}/{name}/{tokens.fingerprint()}", partial(measured, name)), Perplexity
            )
            for name, tokens in texts.items()
        }
