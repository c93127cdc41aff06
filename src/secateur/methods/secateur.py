"""secateur's own method: of the papers' parts, those that earned their place (docs/methods/secateur.md).

It stands on SlimGPT's surgery (arXiv 2412.18110), which is why that is the paper to cite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.engine.reference import leads_to_stream
from secateur.engine.stream import Target
from secateur.engine.tokens import Tokens
from secateur.engine.walk import Visit, walk
from secateur.errors import InvalidOptionError
from secateur.methods.registry import Amount, method
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.allocation import Allocation, FFNCurve, curve_allocation
from secateur.solvers.allocation_search import search_allocation
from secateur.solvers.halves import HALVES, Half
from secateur.solvers.obs import group_sizes, prune_bytes, prune_groups
from secateur.solvers.ridge import FloatOrAuto, check_ridge, ridge, shrinkage_for
from secateur.solvers.scores import by_weights, maps_around, relative_sizes, top_neurons
from secateur.surgery.edits import DropAttention, DropMLP, Edit, KeepHeads, KeepNeurons, keep

Allocating = Literal["log", "uniform", "equal", "searched"]
NeuronScore = Literal["obs-ranges", "obs", "activation", "ranges"]
Aim = Literal["auto", "original", "dense", "stream"]


@method(
    "secateur",
    paper="https://arxiv.org/abs/2412.18110",
    unit="FFN neurons of every block, and KV groups where these do not suffice; what stays is refitted",
    samples=32,
    length=2048,
    bibtex="ling2024slimgpt",
    edits=(KeepNeurons,),
    able=(KeepHeads, DropAttention, DropMLP),
    needs="three forwards of every window without the LM head, and the solves; two with the target 'original'; "
    "one more of the attentions where KV heads go",
    amount=Amount(equal=("allocation", "equal")),
)
def secateur(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    allocation: Allocating = "log",
    first: float = 0.7,
    ends: float = 0.2,
    search_samples: int = 8,
    search_rounds: int = 4,
    score: NeuronScore = "obs-ranges",
    compensate: bool = True,
    target: Aim = "auto",
    share: float = 0.25,
    damping: float = 0.001,
    shrinkage: FloatOrAuto = "auto",
    sequential: bool = True,
) -> Iterator[Edit]:
    """FFN neurons by optimal brain surgery, block by block on the model pruned so far; what stays is refitted.

    Args:
        allocation: how much each block loses: log (less from early blocks), uniform, equal (uniform, all to one width,
            heads stay), or searched (KV heads, whole attentions and MLPs may go, too).
        first: where the log curve begins, relative to the mean share.
        ends: what the first and the last block lose of their FFNs at most, relative to the mean share; not of a uniform
            allocation.
        search_samples: calibration windows, the last, on which a searched allocation is judged.
        search_rounds: of that search, at most.
        score: which neurons stay: obs (whose loss the others can least make up for), obs-ranges (that times the ranges
            of the weights around them), activation (norm), or ranges (activation norm times the same ranges).
        compensate: whether the output projections make up for what goes; off is an ablation.
        target: what they are fitted to: original (what they would give), dense (what they gave in the dense model) or
            stream (what makes the residual stream the dense model's); auto: stream where that can be, else original.
        share: of such a target; the rest is original.
        damping: added to the second moments' diagonal, as a share of its mean.
        shrinkage: added to each element of that diagonal, as a share of it, against what chance puts into the moments
            of few tokens; auto: three times the projection's inputs by the calibration's tokens.
        sequential: statistics of the model pruned so far; off (an ablation): of the dense model.
    """
    check_ridge(damping, share, shrinkage)
    apart = sequential and compensate  # the pruned model's states and the dense one's differ, and it matters
    if target in ("dense", "stream") and not apart:
        raise InvalidOptionError(f"the target '{target}' differs from 'original' in a sequential refit only")
    aim: Target = "stream" if apart and leads_to_stream(model) else "original"
    if target != "auto":
        aim = target
    equal = allocation == "equal"
    curve: FFNCurve = "uniform" if equal or allocation == "uniform" else "log"
    heads = "KeepHeads" not in model.family.cannot
    kept = curve_allocation(model.layout(), budget, curve, first, ends, heads=heads, equal=equal)
    if allocation == "searched":
        kept = search_allocation(
            model, tokens, budget, run, start=kept, rounds=search_rounds, search_samples=search_samples, damping=damping
        )
    solve = _Solve(
        run=run, score=score, compensate=compensate, target=aim, share=share, damping=damping, shrinkage=shrinkage,
        counted=float(tokens.weights.sum()),
    )  # fmt: skip
    late: list[Edit] = []
    for visit in walk(model, tokens, order="blocks", run=run, label="secateur", reference=aim != "original"):
        # Attention first; the FFN's statistics then see the pruned attention, and the next block the pruned block.
        for half in ("attention", "mlp"):
            edit = solve.edit(visit, half, kept)
            if edit is not None and sequential:
                yield edit
            elif edit is not None:
                late.append(edit)
    yield from late


@dataclass(frozen=True, kw_only=True)
class _Solve:
    """How what stays of a block is chosen and fitted; `counted`: tokens of the calibration."""

    run: Run
    score: NeuronScore
    compensate: bool
    target: Target
    share: float
    damping: float
    shrinkage: FloatOrAuto
    counted: float

    def edit(self, visit: Visit, half: Half, kept: Allocation) -> Edit | None:
        """What makes a half of the visited block as small as the allocation says; None where it stays as it is."""
        number, units = visit.block.number, HALVES[half]
        count, stay = units.count(visit.block.shape), kept.kept(half)[number]
        if stay == count:
            return None
        if not stay:
            return units.dropping(number)
        rows, columns = visit.block.weight(units.out).shape
        solution: dict[str, Any] = self.run.step(
            f"{number}/{half}",
            lambda: self._solution(visit, half, count, stay),
            scratch_bytes=prune_bytes(rows, columns, torch.float32),
        )
        weight = solution["weight"] if self.compensate else None
        return units.narrowing(number, keep(solution["index"]), weight)

    def _solution(self, visit: Visit, half: Half, count: int, stay: int) -> dict[str, Any]:
        """The map that fits the target best, without the units whose loss can best be made up for."""
        units, name = HALVES[half], f"block {visit.block.number}, {half}"
        weight = visit.block.weight(units.out).detach()
        moments = visit.moments(units.hidden, self.target, torch.float32)
        shrinkage = shrinkage_for(self.shrinkage, weight.shape[1], self.counted)

        def fitted(index: Tensor) -> Tensor:
            return ridge(
                weight, moments.inputs, index, damping=self.damping, shrinkage=shrinkage, target=moments.target,
                share=self.share, name=name,
            )  # fmt: skip

        if half == "mlp" and self.score in ("activation", "ranges"):
            index = torch.tensor(self._highest(visit, moments.inputs, stay))
            return {"index": index, "weight": fitted(index).to(weight.dtype) if self.compensate else weight[:, index]}
        schedule = [1] * (count - stay) if half == "attention" else group_sizes(count - stay, "released")
        whole = weight if moments.target is None else fitted(torch.arange(weight.shape[1]))
        ranged = half == "mlp" and self.score == "obs-ranges" and not weight.is_meta
        hessian = moments.inputs.mul_(2)  # in place: it is large, and nobody else's
        left = prune_groups(
            whole, hessian, weight.shape[1] // count, schedule, error="exact", damping=self.damping,
            shrinkage=shrinkage, compensate=self.compensate, name=name,
            factors=relative_sizes(maps_around(visit.block), "ranges") if ranged else None,
        )  # fmt: skip
        self.run.log("%s: %d stay, error %.6g", name, stay, left.error)
        return {"index": left.index, "weight": left.weight.to(weight.dtype)}

    def _highest(self, visit: Visit, moment: Tensor, stay: int) -> tuple[int, ...]:
        if moment.is_meta:  # of a rehearsal
            return tuple(range(stay))
        scores = moment.diagonal().sqrt().cpu()
        if self.score == "ranges":
            scores = by_weights(scores, maps_around(visit.block), "ranges")
        return top_neurons(scores, stay)
