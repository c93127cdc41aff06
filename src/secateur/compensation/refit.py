"""Ridge refit of the output projections of what is narrowed, whichever method chose what stays."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from secateur.engine.tokens import Tokens
from secateur.engine.walk import Follower, Hidden, Target
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.ridge import check_ridge, refit_bytes
from secateur.solvers.ridge import refit as ridge
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
    damping: float = 0.01,
) -> Iterator[Edit]:
    """Give each `KeepNeurons` and `KeepHeads` the output projection that makes up best for what goes, on the
    activations of the model as it is by then; also where the method compensates in its own way.

    Args:
        target: what the projection is to give, see `Visit.moments`.
        share: of that target, the rest being "original".
        damping: see `solvers.ridge`.
    """
    check_ridge(damping, share)

    def fitted(edit: KeepNeurons | KeepHeads) -> Tensor:
        heads = isinstance(edit, KeepHeads)
        tap, role = ("attention_hidden", "attention_out") if heads else ("mlp_hidden", "mlp_out")
        with follower.visit(edit.block) as visit:
            weight, shape = visit.block.weight(role).detach(), visit.block.shape
            moments = visit.moments(cast(Hidden, tap), target, DTYPE)
            size = weight.shape[1] // (shape.kv_heads if heads else shape.width)
            columns = (torch.tensor(edit.index)[:, None] * size + torch.arange(size)).flatten()
            scratch_bytes = refit_bytes(len(weight), len(columns), DTYPE)
            run.hold(scratch_bytes)
            new = ridge(
                weight, moments.inputs, columns, damping=damping, target=moments.target, share=share,
                name=f"block {edit.block}, {role}",
            )  # fmt: skip
            run.hold(-scratch_bytes)
            return new.to(weight.dtype)

    with closing(Follower(model, tokens, run, reference=target != "original")) as follower:
        for place, edit in enumerate(edits):
            if isinstance(edit, (KeepNeurons, KeepHeads)):
                weight = run.step(f"{type(edit).__name__} {place}", functools.partial(fitted, edit))
                edit = replace(edit, out_weight=weight)
            yield edit
            if isinstance(edit, KeepNeurons) and edit.block == model.numbers[-1]:
                follower.close()  # its states are not held while the method goes on in another way
