"""A cell's pruning, by a registered method or one that exists in memory only, and what its file says of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass
from typing import TypeVar

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
    """What a cell's pruning will take, and the shares of the blocks' and of the model's parameters that will be gone.

    Attributes:
        plan: None for one that exists in memory only.
    """

    meter: Meter
    removed: Mapping[str, float]
    plan: Plan | None


def plan_of(cell: Cell, model: Model, tokens: Tokens | None = None) -> CellPlan:
    """The plan of a cell's pruning; the model may be a hollow one.

    Raises:
        InfeasibleBudgetError and the other errors with which the cell would be refused.
    """
    assert cell.calibration is not None  # narrows the type
    samples, length, budget = cell.calibration.samples, cell.calibration.length, cell.budget
    if cell.method == inverted.NAME:
        meter, result = inverted.rehearsed(model, samples, length, budget, **inverted.complete(cell.options))
        return CellPlan(meter, result.achieved(model.layout()), None)
    request = Request(
        sparsity=budget.sparsity, method=cell.method, of=cell.of, round_to=cell.round_to, options=cell.options,
        calibration=tokens, samples=samples, length=length, seed=cell.calibration.seed,
    )  # fmt: skip
    planned = plan(request, model)
    return CellPlan(planned.meter, shares(planned.before, planned.after), planned)


# --- what sparsities of one method share ---


@dataclass(frozen=True)
class Spent:
    """Wall and CPU seconds, and the work of a `Meter`."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    block_tokens: int = 0
    head_tokens: int = 0
    asked_tokens: int = 0

    def since(self, earlier: Spent) -> Spent:
        return Spent(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


class Shared(MemoryStore):
    """The steps of one method's runs that hold at every sparsity, with what each took.

    Args:
        beginning: of their keys. With a "/" at its end they are a series, of which a run asks the more, the more it
            removes; without, it is one step, which each run asks.

    Attributes:
        spent: what each took.
        spared_s: seconds that were spared so far by taking steps over.
    """

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning
        self.spent: dict[str, Spent] = {}
        self.spared_s = 0.0

    @property
    def is_series(self) -> bool:
        return self.beginning.endswith("/")

    @property
    def seconds(self) -> float:
        """That the steps which are there took."""
        return sum(each.wall_s for each in self.spent.values())


class SharingRun(Run):
    """A run that takes steps over from earlier ones; its meter and clocks go as if it were run alone.

    Args:
        shared: steps of earlier runs of the same method with the same options, calibration and seed; None if it has
            none that hold at every sparsity.
        clock: seconds.
    """

    def __init__(
        self, seed: int, *, shared: Shared | None, observer: Observer | None = None, clock: Clock = time.monotonic
    ) -> None:
        super().__init__(seed, observer=observer)
        self._shared, self._clock = shared, clock
        self._spared_wall_s = self._spared_cpu_s = 0.0

    def step(self, key: str, compute: Callable[[], T], *, scratch_bytes: float = 0) -> T:
        shared = self._shared
        if shared is None or not key.startswith(shared.beginning):
            return super().step(key, compute)
        return super().step(key, lambda: self._taken_over(shared, key, compute))

    def _taken_over(self, shared: Shared, key: str, compute: Callable[[], T]) -> T:
        try:
            result: T = shared.get(key)
        except KeyError:
            began = self.spent()
            result = compute()
            shared.spent[key] = self.spent().since(began)
            shared.put(key, result)
            return result
        took = shared.spent[key]
        shared.spared_s += took.wall_s
        self._spared_wall_s += took.wall_s
        self._spared_cpu_s += took.cpu_s
        with self.progress(key, 1) as advance:
            self.meter.block_tokens += took.block_tokens
            self.meter.head_tokens += took.head_tokens
            self.meter.asked_tokens += took.asked_tokens
            advance(1)
        return result

    def spent(self) -> Spent:
        """Until now, from some time before the run."""
        clocks = self._clock() + self._spared_wall_s, time.process_time() + self._spared_cpu_s
        return Spent(*clocks, **asdict(self.meter))


# --- the pruning ---


@contextmanager
def pruned(cell: Cell, model: Model, tokens: Tokens, run: SharingRun) -> Iterator[Fields]:
    """Prune the model in place and give what the cell's file says of it; in the context the model can be judged."""
    planned = plan_of(cell, model, tokens)
    before, head = model.layout(), model.head_cost
    run.expect(planned.meter, head=head)
    blocks, length = len(before.blocks), tokens.length
    with ExitStack() as stack:
        with device_peak(model) as peak:
            began = run.spent()
            if planned.plan is None:
                muted = inverted.inverted(model, tokens, cell.budget, run, **cell.options)
                fields = _in_memory(stack.enter_context(muted), cell, model, before)
            else:
                fields = _by_method(planned.plan, model, run)
            took = run.spent().since(began)
        yield {
            **fields,
            "calibration": {**public_facts(tokens.source), "fingerprint": tokens.fingerprint()},
            "prune": PruneCost(
                wall_s=round(took.wall_s, 3), cpu_s=round(took.cpu_s, 3),
                forwards=round(run.meter.forwards(blocks, length, head=head), 2),
                forwards_asked=round(run.meter.forwards_asked(blocks, length), 2), peak_device_memory_bytes=peak[0],
            ),
        }  # fmt: skip


def _by_method(planned: Plan, model: Model, run: Run) -> Fields:
    pruning = run_job(prepare(planned, model), run=run).pruning
    curve = next((note for note in run.notes.values() if isinstance(note, list)), None)  # the search's, by generation
    return {
        "options": pruning.options,
        "achieved": Shares(**shares(pruning.before, pruning.after)),
        "parameters": pruning.after.parameters,
        "weight_bytes": pruning.after.parameters * model.dtype.itemsize,
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
        "achieved": Shares(**achieved),
        "parameters": result.parameters,
        "weight_bytes": result.parameters * model.dtype.itemsize,
        "notes": {"inverted": note},
        "shape": shape(before, result.after),
    }


def dense_fields(model: Model) -> Fields:
    """What the dense cell's file says of its model."""
    layout = model.layout()
    blocks = shape(layout, layout)
    return {
        "achieved": Shares(blocks=0.0, model=0.0),
        "parameters": layout.parameters,
        "weight_bytes": layout.parameters * model.dtype.itemsize,
        "shape": blocks,
        "dense_shape": blocks,
    }


def shape(before: Layout, after: Layout) -> list[Shape]:
    """What every block of the dense model has now."""
    return [_block_shape(number, after) for number in before.blocks]


def _block_shape(number: int, after: Layout) -> Shape:
    if number not in after.blocks:
        return Shape(block=number, width=0, kv_heads=0, query_heads=0, attention=False, mlp=False)
    has = after.blocks[number].shape
    return Shape(
        block=number, width=has.width, kv_heads=has.kv_heads, query_heads=has.query_heads,
        attention=has.kv_heads > 0, mlp=has.width > 0,
        sites=list(has.stream(after.ends.hidden)) if has.attention_skip or has.mlp_skip else UNSET,
    )  # fmt: skip
