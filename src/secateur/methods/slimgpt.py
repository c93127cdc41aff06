"""SlimGPT: Layer-wise Structured Pruning for Large Language Models (arXiv 2412.18110)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from secateur.engine.tokens import Tokens
from secateur.engine.walk import Tap, Visit, walk
from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.methods.registry import method
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout, Layout
from secateur.run import Run
from secateur.solvers.obs import GroupError, group_sizes, prune_bytes, prune_groups
from secateur.solvers.ratios import Shape, ratios
from secateur.surgery.edits import Edit, KeepHeads, KeepNeurons, keep

Rounding = Literal["auto", "paper", "carry"]
Precision = Literal["float32", "float64"]

_HIGHEST = 0.99  # of what a block can lose: something stays
_ROUNDING = 0.25  # of the target: plans so coarse that they miss it by more are refused


@dataclass(frozen=True)
class BlockPlan:
    """What one block loses.

    Attributes:
        ratio: the share asked of what it can lose.
        kv_groups: KV heads that go, with their query heads.
        neurons: FFN neurons that go.
    """

    ratio: float
    kv_groups: int
    neurons: int


def plan(
    layout: Layout,
    budget: Budget,
    *,
    ratio: Shape = "log",
    first_ratio: float | None = None,
    last_ratio: float | None = None,
    rounding: Rounding = "auto",
) -> dict[int, BlockPlan]:
    """Each block's share by equation 6, and the whole heads and neurons that come to it.

    With as many KV heads as query heads the paper's rule applies as it stands ("paper"): the same ratio of a block's
    heads and of its neurons. The paper leaves grouped queries open. There a unit is a large part of a block (a third of
    the demo model's attention), so that rounding each block alone would miss the schedule: the rounding error of the
    heads is carried from block to block, and the FFN takes the rest of its block's share ("carry"). "auto" takes
    "paper" where no query heads are grouped. At least one KV head and one neuron stay.

    Raises:
        InfeasibleBudgetError, InvalidOptionError: as `ratios`.
    """
    can_lose = {number: _heads(block) + _neurons(block) for number, block in layout.blocks.items()}
    if not any(can_lose.values()):
        raise InfeasibleBudgetError("slimgpt finds neither heads nor FFN neurons in this model")
    target = budget.block_share(layout) * layout.block_parameters
    with_parts = {number: size for number, size in can_lose.items() if size}
    shares = dict(
        zip(
            with_parts,
            ratios(list(with_parts.values()), target, ratio, first=first_ratio, last=last_ratio, highest=_HIGHEST),
            strict=True,
        )
    )
    plans: dict[int, BlockPlan] = {}
    owed_heads = owed = 0.0  # KV heads, and parameters, that earlier blocks were rounded down by
    for number, share in shares.items():
        block = layout.blocks[number]
        shape = block.shape
        carry = rounding == "carry" or (rounding == "auto" and shape.kv_heads < shape.query_heads)
        wanted_heads = (share * shape.kv_heads if _heads(block) else 0) + (owed_heads if carry else 0)
        most = shape.kv_heads - 1  # one stays, and heads alone do not exceed the block's share
        if carry and block.kv_group:
            most = min(most, int(share * can_lose[number] / block.kv_group))
        heads = max(0, min(_half_up(wanted_heads), most))
        owed_heads = wanted_heads - heads
        wanted_neurons = share * shape.width
        if carry and block.neuron:
            wanted_neurons = (share * can_lose[number] + owed - heads * block.kv_group) / block.neuron
        width = budget.width(shape.width - wanted_neurons, shape.width) if shape.width else 0
        neurons = shape.width - max(width, 1) if shape.width else 0
        owed += share * can_lose[number] - heads * block.kv_group - neurons * block.neuron
        plans[number] = BlockPlan(share, heads, neurons)
    if first_ratio is None or last_ratio is None:
        _check_met(layout, budget, plans)
    return plans


def _check_met(layout: Layout, budget: Budget, plans: dict[int, BlockPlan]) -> None:
    """Refuse a plan whose heads and neurons are too coarse for the target."""
    blocks, target = layout.blocks, budget.target(layout)
    lost = sum(each.kv_groups * blocks[n].kv_group + each.neurons * blocks[n].neuron for n, each in plans.items())
    if abs(lost - target) > _ROUNDING * target:
        units = [size for block in blocks.values() for size in (block.kv_group, block.neuron) if size]
        can_lose = sum(_heads(block) + _neurons(block) for block in blocks.values())
        scale = budget.sparsity / target
        raise InfeasibleBudgetError(
            f"{budget.sparsity:.4g} of the parameters of the {budget.of} cannot be met by whole heads and neurons; "
            f"with these options it comes to {lost * scale:.4g}. The method's reach is {min(units) * scale:.4g} to "
            f"{_HIGHEST * can_lose * scale:.4g}"
        )


def _heads(block: BlockLayout) -> int:
    """Parameters of the heads, where there is more than one KV group: one must stay."""
    return block.shape.kv_heads * block.kv_group if block.shape.kv_heads > 1 else 0


def _neurons(block: BlockLayout) -> int:
    return block.shape.width * block.neuron


def _half_up(x: float) -> int:
    return math.floor(x + 0.5)


def _check(group: str | int, damping: float) -> None:
    if isinstance(group, int) and group < 1:
        raise InvalidOptionError(f"group is at least 1 neuron, not {group}")
    if not 0 <= damping < math.inf:
        raise InvalidOptionError(f"damping is a share of the Hessian's mean diagonal, 0 or more, not {damping}")


@method(
    "slimgpt",
    paper="https://arxiv.org/abs/2412.18110",
    unit="attention heads (KV groups) and FFN neurons of every block, compensated",
    samples=256,
    length=2048,
    bibtex="ling2024slimgpt",
    edits=(KeepHeads, KeepNeurons),
    needs="up to three forwards of every window without the LM head, and the solves",
)
def slimgpt(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    ratio: Shape = "log",
    first_ratio: float | None = None,
    last_ratio: float | None = None,
    head_error: GroupError = "grouped",
    group: Literal["released", "paper"] | int = "released",
    damping: float = 0.01,
    compensate: bool = True,
    rounding: Rounding = "auto",
    precision: Precision = "float32",
) -> Iterator[Edit]:
    """Heads and FFN neurons by optimal brain surgery, block by block, less from the early blocks than from the late.

    Args:
        ratio: how the share grows over the blocks: log (equation 6), linear, uniform, log-decrease or linear-decrease.
        first_ratio: the first block's share of what it can lose; solved from the target if not given.
        last_ratio: the last block's; likewise.
        head_error: how a head is judged: grouped (the paper's grouped Cholesky), ordinary (its ablation) or exact.
        group: neurons removed at a time: released (the authors' code), paper (large, then small), or a number.
        damping: added to the Hessian's diagonal, as a share of its mean; the authors' code has 0.01.
        compensate: whether the columns that stay make up for those that go (off is an ablation).
        rounding: of heads: paper (each block alone), carry (errors go on to the next block), auto (carry if grouped).
        precision: of the Hessian and all that is done with it, float32 (the paper's) or float64.
    """
    _check(group, damping)
    plans = plan(model.layout(), budget, ratio=ratio, first_ratio=first_ratio, last_ratio=last_ratio, rounding=rounding)
    if first_ratio is not None and last_ratio is not None:
        run.note("ratios", "The first and last block's ratios were asked for, which decide; the sparsity does not.")
    dtype = getattr(torch, precision)
    solve = functools.partial(_solve, run, dtype, error=head_error, damping=damping, compensate=compensate)
    for visit in walk(model, tokens, order="blocks", run=run, label="slimgpt"):
        number, block = visit.block.number, visit.block
        losses = plans.get(number, BlockPlan(0, 0, 0))

        # Heads first; the FFN's statistics then see the pruned attention, and the next block the pruned block.
        if losses.kv_groups:
            kept = solve(visit, "attention_hidden", block.shape.kv_heads, [1] * losses.kv_groups)
            yield KeepHeads(number, keep(kept["index"]), kept["weight"] if compensate else None)
        if losses.neurons:
            kept = solve(visit, "mlp_hidden", block.shape.width, group_sizes(losses.neurons, group))
            yield KeepNeurons(number, keep(kept["index"]), kept["weight"] if compensate else None)


def _solve(
    run: Run, dtype: torch.dtype, visit: Visit, tap: Tap, groups: int, schedule: list[int], **how: Any
) -> dict[str, Any]:
    """One journaled step: which of a map's groups of columns stay, and the map on these; see `prune_groups`."""
    role, kind = ("attention_out", "heads") if tap == "attention_hidden" else ("mlp_out", "neurons")
    key = f"slimgpt/{visit.block.number}/{kind}"

    def compute() -> dict[str, Any]:
        # H = 2 E[x x^T] of the inputs x of the output projection, over all calibration tokens
        weight, hessian = visit.block.weight(role), 2 * visit.second_moment(tap, dtype).mean
        name = f"block {visit.block.number}, {kind}"
        kept = prune_groups(weight, hessian, weight.shape[1] // groups, schedule, name=name, **how)
        run.log("%s: %d stay, error %.6g", key, len(kept.index), kept.error)
        return {"index": kept.index, "weight": kept.weight, "error": kept.error}

    rows, columns = visit.block.weight(role).shape
    return run.step(key, compute, scratch_bytes=prune_bytes(rows, columns, dtype))
