"""A cell's pruning, by a registered method or one that exists in memory only, and what its file says of it."""

from __future__ import annotations

from dataclasses import replace

from msgspec import UNSET

from secateur.engine.tokens import Tokens
from secateur.grid import inverted
from secateur.grid.cells import Cell
from secateur.judge.inference import device_peak
from secateur.model.budget import shares
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.planning import Plan, Request, plan
from secateur.pruning import Job, calibration_of, run_job
from secateur.record import public_facts
from secateur.report.results import PruneCost, Shape, Shares
from secateur.sharing import SharingRun

Fields = dict[str, object]  # of a `CellResult`


def plan_cell(cell: Cell, model: Model) -> Plan:
    """Args: cell: whose size is known; model: the dense one; it may be a hollow one.

    Raises:
        InfeasibleBudgetError and the other errors with which the cell would be refused.
    """
    assert cell.calibration is not None  # narrows the type
    request = Request(
        sparsity=cell.budget.sparsity, method=cell.made_by, of=cell.of, round_to=cell.round_to, options=cell.options,
        refit=cell.refit, samples=cell.calibration.samples, length=cell.calibration.length, seed=cell.calibration.seed,
    )  # fmt: skip
    return plan(request, model)


def counted(cell: Cell, before: Layout, after: Layout) -> Layout:
    """The layout after a cell's pruning, with what is only muted taken off."""
    if cell.method != inverted.NAME:
        return after
    return inverted.invert(before, cell.budget, **cell.complete_options).counted(after)


def prune_cell(cell: Cell, planned: Plan, model: Model, tokens: Tokens, run: SharingRun) -> Fields:
    """Prune the model in place and give what the cell's file says of it."""
    planned = replace(planned, request=replace(planned.request, calibration=tokens))
    job = Job.of(planned, model, calibration_of(planned, model))  # looks at all weights, which is no pruning
    with device_peak(model) as peak:
        began = run.spent()
        pruned = run_job(job, run=run)
        spent = run.spent().since(began)
    pruning, cost = pruned.pruning, pruned.record.cost
    curve = next((note for note in run.notes.values() if isinstance(note, list)), None)  # the search's, by generation
    return {
        "options": pruning.options,
        "filters": pruned.record.filters or UNSET,
        **sizes(pruning.before, counted(cell, pruning.before, pruning.after), model),
        "notes": {key: note for key, note in run.notes.items() if isinstance(note, str)},
        "curve": list(enumerate(curve)) if curve else None,
        "shape": shape(pruning.before, pruning.after),
        "calibration": {**public_facts(tokens.source), "fingerprint": tokens.fingerprint()},
        "prune": PruneCost(
            wall_s=round(spent.wall_s, 3), cpu_s=round(spent.cpu_s, 3), forwards=cost.forwards,
            forwards_asked=cost.forwards_asked, peak_device_memory_bytes=peak[0],
        ),
    }  # fmt: skip


def dense_fields(model: Model) -> Fields:
    """What the dense cell's file says of its model."""
    layout = model.layout()
    blocks = shape(layout, layout)
    return {**sizes(layout, layout, model), "shape": blocks, "dense_shape": blocks}


def sizes(before: Layout, after: Layout, model: Model) -> Fields:
    """What a cell's file says of the size that is left."""
    parameters, achieved = after.parameters, Shares(**shares(before, after))
    return {"achieved": achieved, "parameters": parameters, "weight_bytes": parameters * model.dtype.itemsize}


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
