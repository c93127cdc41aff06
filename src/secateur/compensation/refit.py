"""Ridge refit of the output projections of what is narrowed, whichever method chose what stays."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from secateur.driver import Filter
from secateur.engine.stream import Moments, Target
from secateur.engine.tokens import Tokens
from secateur.engine.walk import Follower
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.halves import units_of
from secateur.solvers.obs import columns_of
from secateur.solvers.ridge import (
    DAMPING,
    FloatOrAuto,
    check_ridge,
    held_out_damping,
    ridge,
    ridge_bytes,
    shrinkage_for,
)
from secateur.surgery.edits import Edit, KeepHeads, KeepNeurons

DTYPE = torch.float32  # of the moments and the solution; the one in which SlimGPT looks, too


def refit(
    model: Model,
    tokens: Tokens,
    run: Run,
    edits: Iterator[Edit],
    *,
    target: Target = "original",
    share: float = 1.0,
    damping: FloatOrAuto = "auto",
    shrinkage: FloatOrAuto = "auto",
) -> Iterator[Edit]:
    """Give each `KeepNeurons` and `KeepHeads` the output projection that makes up best for what goes, on the
    activations of the model as it is by then; also where the method compensates in its own way.

    Args:
        target: what the projection is to give, see `Visit.moments`.
        share: of that target, the rest being "original".
        damping: see `solvers.ridge`; auto: 0.01 for the target original, else what does best on tokens held out.
        shrinkage: see `solvers.ridge`; auto: three times the projection's inputs by the calibration's tokens for the
            target original, else none, since damping is chosen.
    """
    check_ridge(damping, share, shrinkage)
    if shrinkage == "auto" and target != "original":
        shrinkage = 0.0
    counted = float(tokens.weights.sum())

    def fitted(edit: KeepNeurons | KeepHeads) -> Tensor:
        units = units_of(edit)
        with follower.visit(edit.block) as visit:
            weight, name = visit.block.weight(units.out).detach(), f"block {edit.block}, {units.out}"
            moments = visit.moments(units.hidden, target, DTYPE, halves=damping == "auto")
            columns = columns_of(torch.tensor(edit.index), weight.shape[1] // units.count(visit.block.shape))
            shrunk = shrinkage_for(shrinkage, weight.shape[1], counted)
            return refitted(run, weight, moments, columns, damping=damping, shrinkage=shrunk, share=share, name=name)

    with closing(Follower(model, tokens, run, reference=target != "original")) as follower:
        for place, edit in enumerate(edits):
            if isinstance(edit, (KeepNeurons, KeepHeads)):
                weight = run.step(f"{type(edit).__name__} {place}", functools.partial(fitted, edit))
                edit = replace(edit, out_weight=weight)
            yield edit
            if isinstance(edit, KeepNeurons) and edit.block == model.numbers[-1]:
                follower.close()  # its states are not held while the method goes on in another way


def refitted(
    run: Run, weight: Tensor, moments: Moments, kept: Tensor, *, damping: FloatOrAuto, shrinkage: float = 0.0,
    share: float = 1.0, name: str,
) -> Tensor:  # fmt: skip
    """The ridge of a projection on the columns that stay, in its dtype; the forecast hears of what it holds."""
    with run.holding(ridge_bytes(len(weight), len(kept), DTYPE)):
        if damping == "auto" and moments.halves:
            halves = [(half.inputs, half.target) for half in moments.halves if half.target is not None]
            damping = held_out_damping(weight, halves, kept, shrinkage=shrinkage, share=share)
            run.log("%s: damping %g", name, damping)
        number = DAMPING if damping == "auto" else damping
        new = ridge(
            weight, moments.inputs, kept, damping=number, shrinkage=shrinkage, target=moments.target, share=share,
            name=name,
        )  # fmt: skip
    return new.to(weight.dtype)


REFIT = Filter("refit", (), refit)
