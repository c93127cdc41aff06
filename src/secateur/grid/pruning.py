"""A cell's pruning, by a registered method or one that exists in memory only, and what its file says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from msgspec import UNSET

from secateur.engine.tokens import Tokens
from secateur.grid import inverted
from secateur.grid.cells import Cell
from secateur.grid.sharing import SharingRun
from secateur.judge.inference import device_peak
from secateur.model.budget import shares
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.pruning import Plan, Request, plan, prepare, run_job
from secateur.record import public_facts
from secateur.report.results import PruneCost, Shape, Shares
from secateur.run import Meter, Run

Fields = dict[str, object]  # of a `CellResult`


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
        "options": cell.complete_options,
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
