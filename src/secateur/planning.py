"""What is asked of a pruning and the plan that it makes of it: `Request` -> `Plan`. No weights are read.

For a goal that layouts decide, the plan's sparsity is searched for here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from secateur.assets import Bos
from secateur.compensation import require_refits
from secateur.disk_room import DiskRoom
from secateur.driver import Filter, check_filters, require_edits_of, run_method
from secateur.engine.tokens import Count, Tokens, TokenSource, check_tokens, ready
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.goals import Goal, Plans, Tried
from secateur.judge.inference import speedup
from secateur.methods import Method, Options, get_method
from secateur.model.budget import Budget, Convention
from secateur.model.handle import Model, with_random_weights
from secateur.model.layout import Layout
from secateur.record import Cost, MetGoal, Sparsity
from secateur.run import Meter, Rehearsal, Run
from secateur.serving import ANY, require_served, within
from secateur.signatures import RECOMMENDED

NOT_BOTH = "a sparsity or a goal is asked for, not both"


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides a pruning of a given model. Nothing is checked yet.

    Attributes:
        sparsity: share of parameters to remove, in (0, 1); or None where there is a goal.
        goal: what the model must meet; the sparsity is then searched for.
        of: a share of the blocks' parameters, or of the whole model's.
        round_to: round FFN widths to a multiple of this, in methods that choose FFN widths; None: as the engine wants.
        method: its name, or one that is not registered.
        options: the method's own; `secateur methods` lists them.
        for_: the engine that is to run what is left, unpatched: one of `secateur.serving.ENGINES`. Options and rounding
            that keep within its layouts are then those of the plan's request; "any" keeps to none.
        refit: refit the output projections of what is narrowed, and fold what whole modules added into those that
            stay: `secateur.compensation.refits`.
        filters: others, in the order in which edits go through them.
        calibration: a text's name or file (if None c4, or demo for the demo model where `data` is None), a list of
            documents, a `datasets.Dataset`, token ids or `Tokens`; see `secateur.engine.tokens.read_tokens`.
        samples, length: calibration windows; the paper's if None.
        seed: 0 takes the calibration text's first windows, as the papers do; others draw from all. Of what the method
            or a filter draws, too.
        count: "responses" counts only what the assistant says, in chat data.
        bos: whether each window of a text begins with the begin-of-sequence token; "auto": if the model's family needs
            it. Windows of ids are taken as they are.
        data: folder with the named texts, for machines without a hub; cache: where fetched ones lie.
        text_field: the column of rows that holds text or conversations, where it is none that is known.
    """

    sparsity: float | None = None
    goal: Goal | None = None
    method: str | Method = RECOMMENDED
    of: Convention = "blocks"
    round_to: int | None = None
    options: Options = field(default_factory=dict)
    for_: str = ANY
    refit: bool = False
    filters: Sequence[Filter] = ()
    calibration: TokenSource | None = None
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    count: Count = "all"
    bos: Bos = "auto"
    data: Path | None = None
    cache: Path | None = None
    text_field: str | None = None

    @classmethod
    def given(cls, method: str, arguments: Options) -> Request:
        """From a call's keyword arguments: this class's fields, and the method's options.

        Raises:
            InvalidOptionError: neither a sparsity nor a goal, or a number as the method.
            UnknownNameError: no such method; an argument that is neither.
        """
        if isinstance(method, (int, float)):
            raise InvalidOptionError(f"{method} is no method; give the sparsity by its name: sparsity={method}")
        if "sparsity" not in arguments and "goal" not in arguments:
            raise InvalidOptionError("no sparsity is given; it is the share of parameters to remove, as sparsity=0.25")
        names = {field.name for field in fields(cls)}
        own = {name: value for name, value in arguments.items() if name in names}
        options = {name: value for name, value in arguments.items() if name not in own}
        known = get_method(method).options
        for name in options:
            if name not in known:
                raise UnknownNameError.of(f"argument or option of {get_method(method).name}", name, {*names, *known})
        return cls(method=method, **{**own, "options": {**own.get("options", {}), **options}})

    @property
    def budget(self) -> Budget:
        """
        Raises:
            InvalidOptionError: a value out of its range, or none.
        """
        if self.sparsity is None:
            raise InvalidOptionError("no sparsity is given, and no goal to search it for")
        return Budget(self.sparsity, of=self.of, round_to=1 if self.round_to is None else self.round_to)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A pruning that can be made, as far as a model's shapes and family tell, and what it will take.

    Attributes:
        options: all of the method's, those not asked for at their defaults.
        filters: those that edits go through, `refit`'s first.
        samples, length: of the calibration.
        meter: the work, in tokens.
        held_bytes: held at the peak beside the weights: hidden states, statistics, results.
        room: what it takes on the disk beside its output.
        before, after: the layouts; the second is approximate where the method decides on the way.
        sparsity: asked, got and why, as far as `after` goes.
        config: of a model of the layout `after`.
        approximate: losses decide what goes, which a rehearsal makes up: so `after` need not come out exactly.
        goal: what the sparsity was searched for, where none was asked for.
    """

    request: Request
    options: Options
    filters: Sequence[Filter]
    samples: int
    length: int
    meter: Meter
    held_bytes: float
    room: DiskRoom
    before: Layout
    after: Layout
    sparsity: Sparsity
    config: Any = field(default=None, repr=False, compare=False)
    approximate: bool = False
    goal: MetGoal | None = None

    @property
    def method(self) -> Method:
        return get_method(self.request.method)

    def peak_bytes(self, model: Model) -> int:
        """Memory at the peak, weights included; of a streamed model the ends, a block, the one that is read ahead and
        what an edit puts in place of a block's."""
        weights = self.before.parameters
        if model.is_streamed:
            largest = max((block.parameters for block in self.before.blocks.values()), default=0)
            weights = self.before.ends.parameters + 3 * largest
        return int(weights * model.dtype.itemsize + self.held_bytes)

    def run_bytes(self, model: Model, *, keep_states: int = 0, texts: Sequence[Tokens] = ()) -> int:
        """What the run folder takes, at most; where prunings decide on a goal, about. See `DiskRoom.bytes`."""
        goal = self.request.goal
        tries = round(1 / goal.step).bit_length() if goal and (goal.is_loss or self.approximate) else 1
        return self.room.bytes(model, tries=tries, keep_states=keep_states, texts=texts)


def plan(request: Request, model: Model, *, device: torch.device | None = None) -> Plan:
    """Check all of a pruning that needs no weights, and rehearse it: the method runs on a hollow twin of the model,
    with engines that count instead of computing.

    Args:
        model: it may be a hollow one.
        device: that it will run on; the model's if None.

    Raises:
        UnknownNameError, InvalidOptionError: no such method or option; a value out of its range.
        UnsupportedEditError: the model's family cannot do one of the edits.
        InfeasibleBudgetError: with the reachable range, or what is nearest to the goal.
        UnsupportedExportError: the engine that it is for would not run what is left.
    """
    if request.goal is not None:
        return _aimed(request, request.goal, model, device)
    method, tokens = get_method(request.method), ready(request.calibration)
    kept, round_to = within(request.for_, method, request.options, request.round_to, model)
    request = replace(request, options=kept, round_to=round_to)
    budget = request.budget
    options = method.complete(request.options)
    filters = [*(require_refits(method, model.family) if request.refit else ()), *request.filters]
    require_edits_of(model, method, filters)
    check_filters(filters)
    if tokens is not None:
        check_tokens(model, tokens)
        samples, length = method.window_shape(model.max_length, tokens.samples, tokens.length)
        for name, there in (("samples", samples), ("length", length)):
            if (asked := getattr(request, name)) not in (None, there):
                raise InvalidOptionError(f"windows of token ids are taken as they are: {name} is {there}, not {asked}")
    else:
        samples, length = method.window_shape(model.max_length, request.samples, request.length)
        tokens = Tokens.of(torch.zeros(samples, length, dtype=torch.long))
    hollow, run = model.hollow(), Rehearsal(request.seed, device=(device or model.device).type)
    rehearsed = run_method(hollow, method, tokens, budget, run, filters=filters, **options)
    require_served(request.for_, hollow, method, model)
    return Plan(
        request=request, options=options, filters=filters, samples=samples, length=length, meter=run.meter,
        held_bytes=run.peak_bytes, room=DiskRoom.of(run, rehearsed), before=rehearsed.before, after=rehearsed.after,
        sparsity=rehearsed.sparsity, config=hollow.hf.config, approximate=run.made_up,
    )  # fmt: skip


def _aimed(request: Request, goal: Goal, model: Model, device: torch.device | None) -> Plan:
    """The plan that meets a goal of bytes or of speed, which layouts decide."""
    if request.sparsity is not None:
        raise InvalidOptionError(NOT_BOTH)
    if goal.is_loss:
        raise InvalidOptionError("what a pruning does to the perplexity cannot be foretold; ask for a sparsity")
    began = time.monotonic()
    figure = _speed_of(goal, model, device) if goal.name == "speedup" else _bytes_of(goal, model)
    planned, got, tried = plans_of(request, goal, model, device).meet(figure)
    request = replace(planned.request, goal=goal)
    return replace(planned, request=request, goal=met(goal, got, tried, Cost(seconds=time.monotonic() - began)))


def _bytes_of(goal: Goal, model: Model) -> Callable[[Plan], float]:
    dense, item = model.layout().parameters * model.dtype.itemsize, model.dtype.itemsize
    if goal.meets(dense):
        raise InvalidOptionError(f"nothing needs to go: the model has {goal.words(dense)} already")
    return lambda planned: float(planned.after.parameters * item)


def _speed_of(goal: Goal, model: Model, device: torch.device | None) -> Callable[[Plan], float]:
    """Of models of random weights beside the dense one, which has random weights too where it is not loaded."""
    model.require_whole("timing it")
    hollow = model.device.type == "meta"
    dense = with_random_weights(model.hf.config, model.dtype, device or "cpu") if hollow else model

    def figure(planned: Plan) -> float:
        smaller = with_random_weights(planned.config, dense.dtype, dense.device)
        return faster(goal, dense, smaller)

    return figure


def faster(goal: Goal, dense: Model, smaller: Model, run: Run | None = None) -> float:
    """How many times as fast the smaller model is. On a busy machine a few rounds may be lucky: what meets the goal
    must do so twice, and the lower figure counts."""
    first = speedup(dense, smaller, run=run, **goal.measured_by())
    return min(first, speedup(dense, smaller, run=run, **goal.measured_by())) if goal.meets(first) else first


def plans_of(request: Request, goal: Goal, model: Model, device: torch.device | None) -> Plans[Plan]:
    return Plans(goal, lambda sparsity: plan(replace(request, sparsity=sparsity, goal=None), model, device=device))


def met(goal: Goal, got: float, tried: Tried, cost: Cost) -> MetGoal:
    cost.seconds = round(cost.seconds, 1)
    return MetGoal(
        goal=goal.name, asked=goal.asked, got=got, by=goal.measured_by(), tried=tried, tolerance=goal.step, cost=cost
    )
