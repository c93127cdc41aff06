"""A cell's pruning, by a registered method or one that exists in memory only, and what its file says of it."""

from __future__ import annotations

import hashlib
import json
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, TypeVar

from msgspec import UNSET

from secateur.engine.tokens import Tokens
from secateur.forecast import Clock
from secateur.grid import inverted
from secateur.grid.cells import DENSE, Cell
from secateur.judge.memory import device_peak
from secateur.methods import get_method
from secateur.model.budget import shares
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.pruning import Plan, Request, plan, prepare, run_job
from secateur.record import public_facts
from secateur.report.results import PruneCost, Shape, Shares
from secateur.run import MemoryStore, Meter, Observer, Run

T = TypeVar("T")
Fields = dict[str, object]  # of a `CellResult`


def complete_options(cell: Cell) -> dict[str, object]:
    """The cell's options with the method's defaults: two cells that say the same in other words are the same."""
    if cell.method == DENSE:
        return {}
    if cell.method == inverted.NAME:
        return inverted.complete(cell.options)
    return get_method(cell.method).complete(cell.options)


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identity(cell: Cell, judged_by: str, calibration: str | None) -> str:
    """sha256 of all that decides a cell's figures."""
    terms = {"method": cell.method, "sparsity": cell.sparsity, "of": cell.of, "round_to": cell.round_to}
    seed = cell.calibration.seed if cell.calibration else None
    return digest(judged_by, {**terms, "options": complete_options(cell), "seed": seed}, calibration)


@dataclass(frozen=True)
class CellPlan:
    """What a cell's pruning will take and leave.

    Attributes:
        cell: whose size is known.
        meter: the work.
        removed: the shares of the blocks' and of the model's parameters that will be gone, as far as is known before.
        plan: None for one that exists in memory only.
    """

    cell: Cell
    meter: Meter
    removed: Mapping[str, float]
    plan: Plan | None


def plan_cell(cell: Cell, model: Model) -> CellPlan:
    """Args: model: the dense one; it may be a hollow one.

    Raises:
        InfeasibleBudgetError and the other errors with which the cell would be refused.
    """
    assert cell.calibration is not None  # narrows the type
    samples, length, budget = cell.calibration.samples, cell.calibration.length, cell.budget
    if cell.method == inverted.NAME:
        meter, result = inverted.rehearsed(model, samples, length, budget, **inverted.complete(cell.options))
        return CellPlan(cell, meter, result.achieved(model.layout()), None)
    request = Request(
        sparsity=budget.sparsity, method=cell.method, of=cell.of, round_to=cell.round_to, options=cell.options,
        samples=samples, length=length, seed=cell.calibration.seed,
    )  # fmt: skip
    planned = plan(request, model)
    return CellPlan(cell, planned.meter, shares(planned.before, planned.after), planned)


# --- what sparsities of one method share ---


class Spent(NamedTuple):
    """Wall and CPU seconds, and the work of a `Meter`."""

    wall_s: float
    cpu_s: float
    block_tokens: int
    head_tokens: int
    asked_tokens: int

    def since(self, earlier: Spent) -> Spent:
        return Spent(*map(operator.sub, self, earlier))


class Shared(MemoryStore):
    """The store of one method's runs at several sparsities: from one to the next it keeps the steps whose keys begin
    with `beginning`, which hold at every sparsity; none if that is None.

    Attributes:
        spent: what each step took that is kept.
        spared_s: seconds that were spared so far by taking steps over.
    """

    def __init__(self, beginning: str | None = None) -> None:
        super().__init__()
        self.beginning, self.spent, self.spared_s = beginning, dict[str, Spent](), 0.0

    def open(self, identity: str) -> None:
        self._results = {key: result for key, result in self._results.items() if key in self.spent}

    @property
    def seconds(self) -> float:
        """That the steps which lie here took."""
        return sum(spent.wall_s for spent in self.spent.values())


class SharingRun(Run):
    """A run that takes steps over from earlier ones; its meter and clocks go as if it were run alone.

    Args:
        shared: of runs of the same method with the same options, calibration and seed.
        clock: seconds.
    """

    def __init__(
        self, seed: int, shared: Shared, *, observer: Observer | None = None, clock: Clock = time.monotonic
    ) -> None:
        super().__init__(seed, store=shared, observer=observer)
        self._shared, self._clock = shared, clock
        self._spared: list[Spent] = []

    def step(self, key: str, compute: Callable[[], T], *, scratch_bytes: float = 0) -> T:
        shared, name = self._shared, self._scope + key
        if (spent := shared.spent.get(name)) is not None:
            self._spared.append(spent)
            shared.spared_s += spent.wall_s
            with self.progress(key, 1) as advance:
                self.meter.block_tokens += spent.block_tokens
                self.meter.head_tokens += spent.head_tokens
                self.meter.asked_tokens += spent.asked_tokens
                advance(1)
        began = self.spent()
        result = super().step(key, compute)
        if spent is None and shared.beginning is not None and name.startswith(shared.beginning):
            shared.spent[name] = self.spent().since(began)
        return result

    def spent(self) -> Spent:
        """Until now, from some time before the run."""
        wall_s = self._clock() + sum(spent.wall_s for spent in self._spared)
        cpu_s = time.process_time() + sum(spent.cpu_s for spent in self._spared)
        return Spent(wall_s, cpu_s, **asdict(self.meter))


# --- the pruning ---


@contextmanager
def pruned(planned: CellPlan, model: Model, tokens: Tokens, run: SharingRun) -> Iterator[Fields]:
    """Prune the model in place and give what the cell's file says of it; in the context the model can be judged."""
    cell, before, head = planned.cell, model.layout(), model.head_cost
    run.expect(planned.meter, head=head)
    with ExitStack() as stack:
        with device_peak(model) as peak:
            began = run.spent()
            if planned.plan is None:
                muted = inverted.inverted(model, tokens, cell.budget, run, **cell.options)
                fields = _in_memory(stack.enter_context(muted), cell, model, before)
            else:
                request = replace(planned.plan.request, calibration=tokens)
                fields = _by_method(replace(planned.plan, request=request), model, run)
            spent = run.spent().since(began)
        forwards = run.meter.forwards(len(before.blocks), tokens.length, head=head)
        forwards_asked = run.meter.forwards_asked(len(before.blocks), tokens.length)
        yield {
            **fields,
            "calibration": {**public_facts(tokens.source), "fingerprint": tokens.fingerprint()},
            "prune": PruneCost(
                wall_s=round(spent.wall_s, 3), cpu_s=round(spent.cpu_s, 3), forwards=round(forwards, 2),
                forwards_asked=round(forwards_asked, 2), peak_device_memory_bytes=peak[0],
            ),
        }  # fmt: skip


def _by_method(planned: Plan, model: Model, run: Run) -> Fields:
    pruning = run_job(prepare(planned, model), run=run).pruning
    curve = next((note for note in run.notes.values() if isinstance(note, list)), None)  # the search's, by generation
    return {
        "options": pruning.options,
        **_sizes(shares(pruning.before, pruning.after), pruning.after.parameters, model),
        "notes": {key: note for key, note in run.notes.items() if isinstance(note, str)},
        "curve": list(enumerate(curve)) if curve else None,
        "shape": shape(pruning.before, pruning.after),
    }


def _in_memory(result: inverted.InvertedResult, cell: Cell, model: Model, before: Layout) -> Fields:
    achieved = result.achieved(before)
    over = achieved[cell.of] - cell.budget.sparsity
    note = (
        f"{achieved[cell.of]:.2%} of the {cell.of} removed, {over:+.2%} against what was asked: "
        f"{result.plan.kept} of {result.plan.hidden} hidden directions stay on either side of each FFN, and "
        f"{result.plan.attentions} attention modules go. In memory only: its FFNs are muted, not smaller."
    )
    return {
        "options": complete_options(cell),
        **_sizes(achieved, result.parameters, model),
        "notes": {"inverted": note},
        "shape": shape(before, result.after),
    }


def dense_fields(model: Model) -> Fields:
    """What the dense cell's file says of its model."""
    layout = model.layout()
    blocks = shape(layout, layout)
    return {**_sizes(shares(layout, layout), layout.parameters, model), "shape": blocks, "dense_shape": blocks}


def _sizes(achieved: dict[str, float], parameters: int, model: Model) -> Fields:
    weight_bytes = parameters * model.dtype.itemsize
    return {"achieved": Shares(**achieved), "parameters": parameters, "weight_bytes": weight_bytes}


def shape(before: Layout, after: Layout) -> list[Shape]:
    """What every block of the dense model has now."""
    shapes = []
    for number in before.blocks:
        if number not in after.blocks:
            shapes.append(Shape(block=number, width=0, kv_heads=0, query_heads=0, attention=False, mlp=False))
            continue
        has = after.blocks[number].shape
        rebased = has.attention_skip or has.mlp_skip
        shapes.append(
            Shape(
                block=number, width=has.width, kv_heads=has.kv_heads, query_heads=has.query_heads,
                attention=has.kv_heads > 0, mlp=has.width > 0,
                sites=list(has.stream(after.ends.hidden)) if rebased else UNSET,
            )
        )  # fmt: skip
    return shapes
