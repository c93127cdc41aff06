"""What removed modules added to the residual stream, folded into the output projections that stay: no parameter more.

As in ReplaceMe (arXiv 2505.02819), which fits a map behind the cut and multiplies it into the projection before; here
that projection itself is fitted, which undamped can do no worse on the calibration.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.compensation.refit import DTYPE, refitted
from secateur.driver import Filter
from secateur.engine.reference import Reference
from secateur.engine.stream import OUT, Hidden
from secateur.engine.tokens import Tokens
from secateur.engine.walk import Follower
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.ridge import FloatOrAuto, check_ridge
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, Edit, SetWeight

_TAPS: dict[str, Hidden] = {out: tap for tap, out in OUT.items()}


class Module(NamedTuple):
    """One that reads the residual stream at a site (2n enters block n, 2n + 1 lies between its attention and its MLP)
    and gives it on at a later one.

    Attributes:
        role: of its output projection.
    """

    block: int
    role: str
    reads: int
    gives: int


def modules(layout: Layout, *, parallel: bool) -> list[Module]:
    """In the order of the stream. The modules of a parallel block read and give at the same sites."""
    order = []
    for number, block in layout.blocks.items():
        first = 2 * number
        if block.attention:
            order.append(Module(number, "attention_out", first, first + 1 + parallel))
        if block.mlp:
            order.append(Module(number, "mlp_out", first + 1 - parallel, first + 2))
    return order


def folded_into(before: Layout, after: Layout, *, parallel: bool) -> dict[Module, int]:
    """The modules that take over what is gone behind them, each with the site up to which they do: where the next one
    reads. What went before the first one, it makes up for, too; in a parallel block, the MLP does.
    """
    whole, kept = modules(before, parallel=parallel), modules(after, parallel=parallel)
    gone = [module.gives for module in whole if module not in kept]
    last = {module.gives: module for module in kept}  # of a parallel block's two the MLP
    kept = list(last.values())
    ends = [*(module.reads for module in kept[1:]), max(2 * number + 2 for number in before.blocks)]
    starts = [0, *(module.gives for module in kept[1:])]
    return {
        module: end
        for module, start, end in zip(kept, starts, ends, strict=True)
        if any(start <= place <= end for place in gone)
    }


def fold(
    model: Model, tokens: Tokens, run: Run, edits: Iterator[Edit], *, damping: FloatOrAuto = "auto"
) -> Iterator[Edit]:
    """After the last edit, refit the output projections before removed modules: with the rest of the model as it is
    then, the stream that the next module reads is to be the one that it read before the first removal.

    Nothing else is changed, and the method sees its own removals only. The removed weights are held until then, but for
    a streamed model's, which are read again.

    Args:
        damping: see `solvers.ridge`; auto: what does best on tokens held out.
    """
    check_ridge(damping)
    reference: Reference | None = None
    before, held_bytes = model.layout(), 0
    try:
        for edit in edits:
            if reference is None and isinstance(edit, (DropAttention, DropMLP, DropBlock)):
                reference, before = Reference(model, tokens, run), model.layout()
            size = model.layout().parameters
            yield edit
            if reference is not None and not model.is_streamed:
                gone_bytes = (size - model.layout().parameters) * model.dtype.itemsize
                run.hold(gone_bytes)
                held_bytes += gone_bytes
        chosen = folded_into(before, model.layout(), parallel=model.is_parallel) if reference is not None else {}
        if not chosen:
            return
        with closing(Follower(model, tokens, run, reference=reference or False)) as follower:
            reference = None  # the follower's
            with run.progress("fold", len(chosen)) as done:
                for module, end in chosen.items():
                    solve = functools.partial(_fitted, run, follower, module, end, damping)
                    yield SetWeight(module.block, module.role, run.step(f"{module.role} {module.block}", solve))
                    done(1)
    finally:
        run.hold(-held_bytes)
        if reference is not None:
            reference.close()


def _fitted(run: Run, follower: Follower, module: Module, end: int, damping: FloatOrAuto) -> Tensor:
    with follower.visit(module.block) as visit:
        weight = visit.block.weight(module.role).detach()
        moments = visit.moments(_TAPS[module.role], "stream", DTYPE, until=end, halves=damping == "auto")
        name = f"block {module.block}, {module.role}"
        return refitted(run, weight, moments, torch.arange(weight.shape[1]), damping=damping, name=name)


FOLD = Filter("fold", (SetWeight,), fold)
