"""SlimGPT: Layer-wise Structured Pruning for Large Language Models (arXiv 2412.18110)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from secateur.engine.tokens import Tokens
from secateur.engine.walk import Visit, walk
from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.methods.registry import Amount, method
from secateur.model.budget import Budget, inside
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout, Layout
from secateur.run import Run
from secateur.solvers.halves import HALVES, Half
from secateur.solvers.obs import GroupError, group_sizes, prune_bytes, prune_groups
from secateur.solvers.ratios import Curve, ratios, root_of
from secateur.solvers.ridge import check_ridge
from secateur.surgery.edits import Edit, KeepHeads, KeepNeurons, keep

Rounding = Literal["auto", "paper", "carry"]
Precision = Literal["float32", "float64"]

_EPS = 1e-9  # of a head: what floats add to whole numbers


@dataclass(frozen=True)
class BlockPlan:
    """What one block loses.

    Attributes:
        ratio: the share asked of its heads and neurons.
        kv_groups: KV heads that go, with their query heads.
        neurons: FFN neurons that go.
    """

    ratio: float
    kv_groups: int
    neurons: int


@dataclass(frozen=True)
class _Supply:
    """What a block has to lose; `group`, `neuron` and the properties count parameters.

    Attributes:
        groups: KV heads, 0 if there is only one, which stays.
        narrowest: the FFN's width at the least.
        carries: whether the rounding of its heads goes on to the next block.
    """

    group: int
    groups: int
    neuron: int
    width: int
    narrowest: int
    carries: bool

    @classmethod
    def of(cls, block: BlockLayout, round_to: int, rounding: Rounding) -> _Supply:
        shape = block.shape
        return cls(
            block.kv_group, shape.kv_heads if shape.kv_heads > 1 else 0, block.neuron, shape.width,
            min(shape.width, round_to),
            rounding == "carry" or (rounding == "auto" and shape.kv_heads < shape.query_heads),
        )  # fmt: skip

    @property
    def size(self) -> int:
        """All of it, of which equation 6 takes shares."""
        return self.groups * self.group + self.width * self.neuron

    @property
    def spare(self) -> int:
        """The neurons that can go."""
        return (self.width - self.narrowest) * self.neuron

    @property
    def most(self) -> int:
        """What can go."""
        return max(self.groups - 1, 0) * self.group + self.spare


def plan(
    layout: Layout,
    budget: Budget,
    *,
    ratio: Curve = "log",
    first_ratio: float | None = None,
    last_ratio: float | None = None,
    rounding: Rounding = "auto",
) -> dict[int, BlockPlan]:
    """Each block's share by equation 6, and the whole heads and neurons that come to it: the target to a neuron.

    One KV head and one step of neurons stay in each block; what equation 6 wants beyond is asked of the other blocks.
    The heads are their share rounded ("paper"), and the FFN takes the rest of its block's share; its own rounding goes
    on to the next block. The paper leaves grouped queries open: there a unit is a large part of a block (a third of the
    demo model's attention), and "carry" hands the heads' rounding on to the next block too. "auto" takes "paper" where
    no query heads are grouped. Given both ends of the schedule, they decide, not the target, and "paper" takes the same
    ratio of the neurons as of the heads.

    Raises:
        InfeasibleBudgetError: with the reachable range.
        InvalidOptionError: as `ratios`.
    """
    every = {number: _Supply.of(block, budget.round_to, rounding) for number, block in layout.blocks.items()}
    supplies = {number: supply for number, supply in every.items() if supply.size}
    if not any(supply.most for supply in supplies.values()):
        raise InfeasibleBudgetError("slimgpt reaches nothing: no block has two KV heads, or FFN neurons to spare")
    target, decided = budget.target(layout), first_ratio is not None and last_ratio is not None

    def shares(target: float, first: float | None = first_ratio, last: float | None = last_ratio) -> dict[int, float]:
        sizes, most = [s.size for s in supplies.values()], [s.most / s.size for s in supplies.values()]
        return dict(zip(supplies, ratios(sizes, target, ratio, first=first, last=last, most=most), strict=True))

    asked = shares(target)
    heads = _whole_heads(supplies, asked)
    if not decided:
        _settle(supplies, asked, heads, target)
    wanted = {
        n: share * s.width * s.neuron if decided and not s.carries else share * s.size - heads[n] * s.group
        for (n, share), s in zip(asked.items(), supplies.values(), strict=True)
    }
    if not decided:
        wanted = _spread(supplies, wanted, target - sum(heads[n] * s.group for n, s in supplies.items()))
    neurons = _whole_neurons(supplies, wanted, budget)

    lost = sum(heads[n] * s.group + neurons[n] * s.neuron for n, s in supplies.items())
    group = max(s.group * bool(s.groups) for s in supplies.values())
    unit = max((s.neuron * budget.round_to for s in supplies.values() if s.spare), default=group)
    scheduled = sum(r * supplies[n].size for n, r in asked.items())
    missed = abs(scheduled - target) > unit or abs(lost - target) > max(unit, group)  # FFNs may be smaller than a group
    if not lost or (missed and not decided):
        scale, whole = budget.sparsity / target, sum(s.size for s in supplies.values())
        ends = [[sum(r * supplies[n].size for n, r in shares(t, *given).items()) * scale for t in (0, whole)]
                for given in ((), (None, None))]  # fmt: skip
        reach, freely = (inside(max(low, unit * scale), high) for low, high in ends)
        instead = f"; without first_ratio and last_ratio {freely}" if reach != freely else ""
        raise InfeasibleBudgetError(
            f"slimgpt cannot remove {budget.sparsity:.4g} of the parameters of the {budget.of}; with these options it "
            f"reaches {reach}{instead}"
        )
    return {n: BlockPlan(share, heads[n], neurons[n]) for n, share in asked.items()}


def _whole_heads(supplies: Mapping[int, _Supply], asked: Mapping[int, float]) -> dict[int, int]:
    """Each block's KV heads: not more than its share has room for, nor fewer than its FFN can make up for."""
    heads, owed = dict.fromkeys(asked, 0), 0.0
    for number, share in asked.items():
        supply = supplies[number]
        if supply.groups:
            wanted, loses = share * supply.groups + owed * supply.carries, share * supply.size
            room = math.floor(loses / supply.group + _EPS)
            need = math.ceil((loses - supply.spare) / supply.group - _EPS)
            rounded = max(min(room, need), min(math.floor(wanted + 0.5), max(room, need)))
            heads[number] = max(0, min(rounded, supply.groups - 1))
            owed = wanted - heads[number]
    return heads


def _settle(supplies: Mapping[int, _Supply], asked: Mapping[int, float], heads: dict[int, int], target: float) -> None:
    """Where the FFNs are too small to make up for the rounding of the heads, let more heads go, or fewer."""
    spare = sum(supply.spare for supply in supplies.values())
    rest = target - sum(heads[n] * supply.group for n, supply in supplies.items())  # what the FFNs are to lose

    def beyond(rest: float) -> float:
        return max(-rest, rest - spare, 0)

    while beyond(rest) > 0:
        step = 1 if rest > 0 else -1
        able = [n for n, supply in supplies.items() if 0 <= heads[n] + step < supply.groups]
        owing = [step * (asked[n] * supplies[n].size - heads[n] * supplies[n].group) for n in able]
        if not able or beyond(rest - step * supplies[n := able[owing.index(max(owing))]].group) >= beyond(rest):
            return
        heads[n] += step
        rest -= step * supplies[n].group


def _spread(supplies: Mapping[int, _Supply], wanted: Mapping[int, float], total: float) -> dict[int, float]:
    """What each FFN loses, `total` together: as wanted, but what some cannot lose is a like share of the others."""

    def filled(more: float) -> dict[int, float]:
        return {n: min(max(w + more * supplies[n].spare, 0.0), supplies[n].spare) for n, w in wanted.items()}

    if abs(sum(filled(0).values()) - total) < 0.5:  # of a parameter
        return filled(0)
    bound = 1 + max(map(abs, wanted.values())) / min((s.spare for s in supplies.values() if s.spare), default=1)
    return filled(root_of(lambda more: sum(filled(more).values()), total, -bound, bound))


def _whole_neurons(supplies: Mapping[int, _Supply], wanted: Mapping[int, float], budget: Budget) -> dict[int, int]:
    """Each FFN's neurons; what one is rounded by goes on to the next."""
    neurons, owed = {}, 0.0
    for number, parameters in wanted.items():
        supply = supplies[number]
        owed += parameters
        width = budget.width(supply.width - owed / supply.neuron, supply.width) if supply.width else 0
        neurons[number] = supply.width - max(width, supply.narrowest)
        owed -= neurons[number] * supply.neuron
    return neurons


def _check(group: str | int, damping: float) -> None:
    if isinstance(group, int) and group < 1:
        raise InvalidOptionError(f"group is at least 1 neuron, not {group}")
    check_ridge(damping)


@method(
    "slimgpt",
    paper="https://arxiv.org/abs/2412.18110",
    unit="attention heads (KV groups) and FFN neurons of every block, compensated",
    samples=256,
    length=2048,
    bibtex="ling2024slimgpt",
    edits=(KeepHeads, KeepNeurons),
    needs="up to three forwards of every window without the LM head, and the solves",
    amount=Amount(decides=("first_ratio", "last_ratio")),
)
def slimgpt(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    ratio: Curve = "log",
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
    dtype = getattr(torch, precision)
    solve = functools.partial(_solve, run, dtype, error=head_error, damping=damping, compensate=compensate)
    for visit in walk(model, tokens, order="blocks", run=run, label="slimgpt"):
        number = visit.block.number
        losses = plans.get(number, BlockPlan(0, 0, 0))

        # Heads first; the FFN's statistics then see the pruned attention, and the next block the pruned block.
        if losses.kv_groups:
            kept = solve(visit, "attention", [1] * losses.kv_groups)
            yield KeepHeads(number, keep(kept["index"]), kept["weight"] if compensate else None)
        if losses.neurons:
            kept = solve(visit, "mlp", group_sizes(losses.neurons, group))
            yield KeepNeurons(number, keep(kept["index"]), kept["weight"] if compensate else None)


def _solve(run: Run, dtype: torch.dtype, visit: Visit, half: Half, schedule: list[int], **how: Any) -> dict[str, Any]:
    """One journaled step: which units of a half of a block stay, and its output projection; see `prune_groups`."""
    units, key = HALVES[half], f"slimgpt/{visit.block.number}/{half}"

    def compute() -> dict[str, Any]:
        # H = 2 E[x x^T] of the inputs x of the output projection, over all calibration tokens
        weight, hessian = visit.block.weight(units.out), visit.second_moment(units.hidden, dtype).mean.mul_(2)
        columns_each = weight.shape[1] // units.count(visit.block.shape)
        name = f"block {visit.block.number}, {half}"
        kept = prune_groups(weight, hessian, columns_each, schedule, name=name, **how)
        run.log("%s: %d stay, error %.6g", key, len(kept.index), kept.error)
        return {"index": kept.index, "weight": kept.weight, "error": kept.error}

    rows, columns = visit.block.weight(units.out).shape
    return run.step(key, compute, scratch_bytes=prune_bytes(rows, columns, dtype))
