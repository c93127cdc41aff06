"""A cell's pruning, a registered method's or one that exists in memory only, and what its file says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from secateur.engine.tokens import Tokens
from secateur.grid import inverted
from secateur.grid.cells import DENSE, Cell, calibration_facts
from secateur.grid.clocked import Clocked
from secateur.grid.index import now
from secateur.judge.memory import device_peak
from secateur.methods import get_method
from secateur.model.budget import Budget, shares
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.pruning import Plan, Request, plan, prepare, run_job
from secateur.run import Meter

Facts = dict[str, Any]


def budget_of(cell: Cell) -> Budget:
    """The cell's budget.

    Raises:
        InvalidOptionError: a sparsity outside (0, 1).
    """
    assert cell.sparsity is not None  # narrows the type; only the dense cell has none
    return Budget(cell.sparsity, of=cell.of, round_to=cell.round_to)


def complete_options(cell: Cell) -> dict[str, Any]:
    """The cell's options with the method's defaults: two cells that say the same in other words are the same."""
    if cell.method == DENSE:
        return {}
    if cell.method == inverted.NAME:
        return inverted.complete(cell.options)
    return get_method(cell.method).complete(cell.options)


@dataclass(frozen=True)
class Foretold:
    """What a cell's pruning will take, and the shares of the blocks' and of the model's parameters that will be gone;
    `plan` is None for one that exists in memory only."""

    meter: Meter
    removed: dict[str, float]
    plan: Plan | None


def foretell(cell: Cell, model: Model, tokens: Tokens | None = None) -> Foretold:
    """What the cell's pruning will take and leave; the model may be a hollow one.

    Raises:
        InfeasibleBudgetError and the other errors with which the cell would be refused.
    """
    assert cell.calibration is not None  # narrows the type
    samples, length, budget = cell.calibration.samples, cell.calibration.length, budget_of(cell)
    if cell.method == inverted.NAME:
        meter, result = inverted.rehearsed(model, samples, length, budget, **inverted.complete(cell.options))
        return Foretold(meter, result.achieved(model.layout()), None)
    request = Request(
        sparsity=budget.sparsity, method=cell.method, of=cell.of, round_to=cell.round_to, options=cell.options,
        calibration=tokens, samples=samples, length=length, seed=cell.calibration.seed,
    )  # fmt: skip
    planned = plan(request, model)
    return Foretold(planned.meter, shares(planned.before, planned.after), planned)


@contextmanager
def pruned(cell: Cell, model: Model, tokens: Tokens, run: Clocked) -> Iterator[Facts]:
    """Prune the model in place and give what the cell's file says of it; in the context the model can be judged."""
    foretold = foretell(cell, model, tokens)
    run.expect(foretold.meter, head=model.head_cost)
    with ExitStack() as stack:
        if foretold.plan is None:
            facts = stack.enter_context(_in_memory(cell, model, tokens, run))
        else:
            facts = _by_method(foretold.plan, model, tokens, run)
        yield {"calibration": calibration_facts(tokens), **facts}


def _by_method(planned: Plan, model: Model, tokens: Tokens, run: Clocked) -> Facts:
    head = model.head_cost
    job = prepare(planned, model)
    with run.clocked() as took, device_peak(model) as peak:
        done = run_job(job, run=run)
    before, after = done.pruning.before, done.pruning.after
    return {
        "options": dict(done.pruning.options),
        "achieved": shares(before, after),
        "parameters": after.parameters,
        "weight_bytes": after.parameters * model.dtype.itemsize,
        **_notes(run.notes),
        "shape": shape(before, after),
        "prune": _measured(took, peak[0], len(before.blocks), tokens.length, head),
    }


@contextmanager
def _in_memory(cell: Cell, model: Model, tokens: Tokens, run: Clocked) -> Iterator[Facts]:
    before, head = model.layout(), model.head_cost
    with ExitStack() as stack:
        with run.clocked() as took, device_peak(model) as peak:
            result = stack.enter_context(inverted.inverted(model, tokens, budget_of(cell), run, **cell.options))
        prune = _measured(took, peak[0], len(before.blocks), tokens.length, head)
        yield {**_inverted_facts(result, before, cell, model), "prune": prune}


def _measured(took: Mapping[str, float], peak: int | None, blocks: int, length: int, head: float) -> Facts:
    meter = Meter(int(took["block_tokens"]), int(took["head_tokens"]), int(took["asked_tokens"]))
    return {
        "wall_s": round(took["wall_s"], 3),
        "cpu_s": round(took["cpu_s"], 3),
        "forwards": round(meter.forwards(blocks, length, head=head), 2),
        "forwards_asked": round(meter.forwards_asked(blocks, length), 2),
        "peak_device_memory_bytes": peak,
    }


def _inverted_facts(result: inverted.InvertedResult, before: Layout, cell: Cell, model: Model) -> Facts:
    achieved = result.achieved(before)
    over = achieved[cell.of] - budget_of(cell).sparsity
    told = (
        f"{achieved[cell.of]:.2%} of the {cell.of} removed, {over:+.2%} against what was asked: "
        f"{result.plan.kept} of {result.plan.hidden} hidden directions stay on either side of each FFN, and "
        f"{result.plan.attentions} attention modules go. In memory only: its FFNs are muted, not smaller."
    )
    return {
        "options": inverted.complete(cell.options),
        "achieved": achieved,
        "parameters": result.parameters,
        "weight_bytes": result.parameters * model.dtype.itemsize,
        "notes": {"inverted": told},
        "curve": None,
        "shape": shape(before, result.after),
    }


def dense_facts(model: Model) -> Facts:
    """What the dense cell's file says of its model."""
    layout = model.layout()
    blocks = shape(layout, layout)
    return {
        "achieved": {"blocks": 0.0, "model": 0.0},
        "parameters": layout.parameters,
        "weight_bytes": layout.parameters * model.dtype.itemsize,
        "shape": blocks,
        "dense_shape": blocks,
    }


def _notes(notes: Mapping[str, Any]) -> Facts:
    """Texts are notes, the first list of numbers is the search's curve by generation."""
    curves = [value for value in notes.values() if isinstance(value, list)]
    return {
        "notes": {key: value for key, value in notes.items() if isinstance(value, str)},
        "curve": [[generation, value] for generation, value in enumerate(curves[0])] if curves else None,
    }


def shape(before: Layout, after: Layout) -> list[dict[str, Any]]:
    """What every block of the dense model has now; a removed one has nothing left.

    `sites` are the widths of the residual stream where it enters, between attention and MLP, and where it leaves; only
    where it was rebased.
    """
    told = []
    for number in before.blocks:
        block = after.blocks.get(number)
        if block is None:
            sizes = {"width": 0, "kv_heads": 0, "query_heads": 0}
        else:
            has = block.shape
            sizes = {"width": has.width, "kv_heads": has.kv_heads, "query_heads": has.query_heads}
        entry: dict[str, Any] = {
            "block": number,
            **sizes,
            "attention": sizes["kv_heads"] > 0,
            "mlp": sizes["width"] > 0,
        }
        if block is not None and (block.shape.attention_skip or block.shape.mlp_skip):
            entry["sites"] = list(block.shape.stream(after.ends.hidden))
        told.append(entry)
    return told


def blank(cell: Cell) -> dict[str, Any]:
    """A cell's file before anything is known."""
    return {
        "name": cell.name,
        "method": cell.method,
        "label": cell.label,
        "sparsity": cell.sparsity,
        "of": cell.of,
        "status": "failed",
        "error": None,
        "options": dict(cell.options),
        "notes": {},
        "calibration": None,
        "achieved": None,
        "parameters": None,
        "weight_bytes": None,
        "prune": None,
        "curve": None,
        "shape": None,
        "perplexity": {},
        "tasks": {},
        "inference": None,
        "generation": None,
        "matched_to": cell.matched_to,
        "ablation": dict(cell.ablation) if cell.ablation is not None else None,
        "created": now(),
    }
