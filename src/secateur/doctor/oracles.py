"""What the engines must equal, the long way: edit a copy, run the whole model, loop over the tokens in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.tokens import Tokens
from secateur.model.handle import Model
from secateur.solvers.halves import units_of
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, Edit, KeepHeads, KeepNeurons

Removal = DropBlock | DropAttention | DropMLP | KeepHeads | KeepNeurons


@torch.no_grad()
def logits(model: Model | nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """ids (samples, length) -> (samples, length, vocabulary), without a cache."""
    hf: Any = model.hf if isinstance(model, Model) else model
    here = ids if hf.device.type == "meta" else ids.to(hf.device)  # accelerate takes them to what it offloads
    return hf(input_ids=here, use_cache=False, **kwargs).logits


def edited(model: Model, *edits: Edit) -> Model:
    """A copy of a model, with edits made real."""
    other = copy.deepcopy(model)
    for edit in edits:
        apply(other, edit)
    return other


@torch.no_grad()
def muted(model: Model, edit: Removal) -> Model:
    """A copy in which what an edit would remove is still there and adds nothing to the residual stream."""
    other = copy.deepcopy(model)
    with other.open(edit.block, write=True) as block:
        if isinstance(edit, KeepHeads | KeepNeurons):
            units = units_of(edit)
            count = units.count(block.shape)
            gone = [unit for unit in range(count) if unit not in edit.index]
            block.weight(units.out).unflatten(1, (count, -1))[:, gone] = 0
            return other
        outs = [] if isinstance(edit, DropMLP) else [block.attention_out]
        outs += [] if isinstance(edit, DropAttention) else [block.mlp_out]
        for parameter in [each for out in outs for each in out.parameters()]:
            parameter.zero_()
    return other


def mean_nll(model: Model, tokens: Tokens) -> float:
    """-log p of every token but a window's first, weighed by that token's weight."""
    total = count = 0.0
    scores = logits(model, tokens.ids).double().cpu()  # (samples, length, vocabulary)
    for sample, weights in enumerate(tokens.weights.tolist()):
        for place in range(1, tokens.length):
            row = scores[sample, place - 1]
            total += weights[place] * float(torch.logsumexp(row, dim=0) - row[tokens.ids[sample, place]])
            count += weights[place]
    return total / count if count else math.nan
