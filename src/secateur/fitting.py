"""What fits into a memory: the dense model, or the methods at sparsities, with what each takes; no weights are read."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Any

import torch

from secateur.engine.blocks import activation_bytes
from secateur.errors import SecateurError
from secateur.forecast import Forwards, Speed, probe
from secateur.goals import Goal, Plans
from secateur.judge.inference import kv_bytes
from secateur.methods import methods
from secateur.model.handle import Model, require_positions
from secateur.model.layout import Layout
from secateur.model.load import Source
from secateur.planning import Plan, Request, plan

_PROBE_TOKENS = 512


@dataclass(frozen=True)
class Need:
    """What a model takes while it runs, in bytes.

    Attributes:
        weights: all of them; kv_cache: of all sequences at their full length.
        activations: an estimate of the most that lives beside them, of one prompt of the full length at a time.
    """

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True)
class Choice:
    """A pruning that fits.

    Attributes:
        parameters: that are left; need: what it takes to run.
        least: whether it is the method's smallest sparsity that fits, to a hundredth.
        forwards, seconds: of the pruning, on this device by one probed block; pruning_bytes: its peak memory.
        demo_loss: nats per token above dense by text that the demo model lost, see `Measured`; None where not measured.
    """

    method: str
    sparsity: float
    parameters: int
    need: Need
    least: bool
    forwards: float
    seconds: float
    pruning_bytes: int
    demo_loss: dict[str, float] | None


@dataclass(frozen=True)
class Fitting:
    """The answer to what fits.

    Attributes:
        dense: what the model takes as it is; dense_fits: whether that is enough.
        is_demo: whether it is the model of which the losses were measured; of another one they say nothing but which
            method lost more.
        choices: that fit, the least demo loss first.
        refused: why there is nothing of a method.
    """

    model: str
    fits_bytes: int
    context: int
    batch: int
    dtype: str
    dense: Need
    dense_fits: bool
    is_demo: bool
    loss_source: str
    choices: list[Choice]
    refused: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """What the demo model lost by each method in the committed comparison, which `docs/figures.py` writes it from.

    Attributes:
        source: where the figures come from, and how they were taken.
        losses: by method, (removed share of the blocks' parameters, nats per token above dense by text), in order.
    """

    source: str
    losses: dict[str, list[tuple[float, dict[str, float]]]]

    @classmethod
    @functools.cache
    def read(cls) -> Measured:
        return cls(**json.loads(resources.files("secateur").joinpath("measured.json").read_text(encoding="utf-8")))

    def loss(self, method: str, share: float) -> dict[str, float] | None:
        """By text, at a share that lies between none and the most measured: on the straight line between neighbours."""
        points = self.losses.get(method, [])
        known = [(0.0, dict.fromkeys(points[0][1], 0.0)), *points] if points else []
        for (below, low), (above, high) in pairwise(known):
            if below <= share <= above + 1e-3:
                part = min(1.0, (share - below) / (above - below))
                return {text: low[text] + part * (high[text] - low[text]) for text in low}
        return None


def fitting(
    source: Source,
    *,
    fits: int,
    context: int,
    batch: int = 1,
    sparsities: Sequence[float] = (0.125, 0.25, 0.375, 0.5),
    names: Sequence[str] = (),
) -> Fitting:
    """What of a model fits into so many bytes, with the KV cache of `batch` sequences of `context` tokens.

    Args:
        sparsities: to list where they fit; the smallest that does is listed where the dense model does not.
        names: of methods; all if there are none. Each with its default options and calibration.

    Raises:
        InvalidOptionError: a context beyond the model's positions, or another value out of its range.
    """
    hollow, device = source.hollow(), source.main_device
    require_positions(hollow.max_length, context)
    speed = probe(hollow, min(_PROBE_TOKENS, hollow.max_length or _PROBE_TOKENS), device)
    memory = _Memory(hollow, device, fits, context, batch)
    dense, measured = memory.need(hollow.layout(), hollow.hf.config), Measured.read()
    choices, refused = list[Choice](), dict[str, str]()
    for name in names or methods():
        plans, why = memory.plans(name, sparsities, least=dense.total > fits)
        choices += [_choice(each, memory.need(each.after, each.config), least, hollow, speed) for each, least in plans]
        if not plans and why:
            refused[name] = why
    choices.sort(key=lambda choice: (choice.demo_loss is None, sum((choice.demo_loss or {}).values())))
    return Fitting(
        model=hollow.source["name"], fits_bytes=fits, context=context, batch=batch,
        dtype=str(hollow.dtype).removeprefix("torch."), dense=dense, dense_fits=dense.total <= fits,
        is_demo=source.name == "demo", loss_source=measured.source, choices=choices, refused=refused,
    )  # fmt: skip


@dataclass(frozen=True)
class _Memory:
    """What a model is to fit into, with so many sequences of so many tokens."""

    hollow: Model
    device: torch.device
    fits: int
    context: int
    batch: int

    def need(self, layout: Layout, config: Any) -> Need:
        item = self.hollow.dtype.itemsize
        cached = self.batch * kv_bytes(layout, config, self.context, item)
        return Need(layout.parameters * item, cached, activation_bytes(self.hollow, self.context, layout))

    def plans(self, name: str, sparsities: Sequence[float], *, least: bool) -> tuple[list[tuple[Plan, bool]], str]:
        """Those of a method's that fit, at these sparsities and, with `least`, at its smallest; whether each is that;
        and why another is not there."""
        goal, found, why = Goal(target_bytes=self.fits, tolerance=0.01), dict[float, tuple[Plan, bool]](), ""
        for sparsity in (None, *sparsities) if least else sparsities:
            try:
                planned = self._least(goal, name) if sparsity is None else self._plan(name, sparsity)
                if self._total(planned) <= self.fits:
                    found.setdefault(planned.request.budget.sparsity, (planned, sparsity is None))
            except SecateurError as error:
                why = why or str(error)
        return list(found.values()), why

    def _plan(self, name: str, sparsity: float) -> Plan:
        return plan(Request(method=name, sparsity=sparsity), self.hollow, device=self.device)

    def _least(self, goal: Goal, name: str) -> Plan:
        plans = Plans(goal, functools.partial(self._plan, name), words=_in_memory)
        return plans.meet(self._total)[0]

    def _total(self, planned: Plan) -> float:
        return self.need(planned.after, planned.config).total


def _in_memory(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB with KV cache and activations"


def _choice(planned: Plan, need: Need, least: bool, hollow: Model, speed: Speed) -> Choice:
    meter, sparsity = planned.meter, planned.request.budget.sparsity
    return Choice(
        method=planned.method.name, sparsity=sparsity, parameters=planned.after.parameters, need=need, least=least,
        forwards=Forwards.of(planned, hollow.head_cost).forwards,
        seconds=speed.seconds(meter.block_tokens, meter.head_tokens),
        pruning_bytes=planned.peak_bytes(hollow),
        demo_loss=Measured.read().loss(planned.method.name, planned.sparsity.achieved.blocks),
    )  # fmt: skip
