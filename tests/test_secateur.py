"""Our own method: each FFN against its page's equations, written out plainly in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny, tiny_tokens
from torch import Tensor

from secateur.engine.tokens import Tokens
from secateur.methods.secateur import secateur
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.obs import group_sizes
from secateur.surgery.apply import apply
from secateur.surgery.edits import KeepNeurons


def seen(model: Model, tokens: Tokens, number: int) -> dict[str, Tensor]:
    """What a block's FFN sees, (tokens, features): what enters the down projection, the stream it adds to, and the
    stream behind the block."""
    found, layer = dict[str, Tensor](), model.hf.model.layers[number]

    def note(name: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        found[name] = tensor.detach().double().flatten(0, 1)

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: note("inputs", given)),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, given: note("before", given)),
        layer.register_forward_hook(lambda _, given, output: note("behind", output)),
    ]
    model.hf(input_ids=tokens.ids)
    for hook in hooks:
        hook.remove()
    return found


def by_the_equations(mlp: Any, pruned: dict[str, Tensor], dense: dict[str, Tensor], stay: int) -> tuple[Tensor, Tensor]:
    """The kept neurons and the map on them."""
    maps = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
    h, w, width = pruned["inputs"], mlp.down_proj.weight.double(), mlp.down_proj.in_features
    second = h.T @ h / len(h)
    penalty = 3 * width / len(h) * second.diagonal().diag()
    penalty += 0.001 * (second + penalty).diagonal().mean() * torch.eye(width, dtype=torch.float64)
    target = 0.75 * h @ w.T + 0.25 * (dense["behind"] - pruned["before"] - mlp.down_proj.bias)
    fitted = torch.linalg.solve(second + penalty, h.T @ target / len(h) + penalty @ w.T).T
    ranges = [each.double().amax(dim=1) - each.double().amin(dim=1) for each in maps]
    factor = torch.stack([each / each.max() for each in ranges]).sum(dim=0)
    held, kept = second + penalty, torch.arange(width)

    def left(index: Tensor) -> Tensor:
        return torch.linalg.solve(held[index][:, index], held[index] @ fitted.T).T

    for count in group_sizes(width - stay, "released"):
        losses = left(kept).square().sum(dim=0) / torch.linalg.inv(held[kept][:, kept]).diagonal() * factor[kept]
        kept = kept[losses.argsort()[count:]].sort().values
    return kept, left(kept)


@pytest.mark.parametrize("sparsity", [0.1, 0.3])
def test_every_ffn_is_what_the_equations_say(sparsity: float) -> None:
    model, dense = tiny("llama"), tiny("llama")
    tokens = tiny_tokens(model, 6, 40)
    edits = 0
    for edit in secateur(model, tokens, Budget(sparsity), Run()):
        assert isinstance(edit, KeepNeurons)
        assert edit.out_weight is not None
        mlp = model.hf.model.layers[edit.block].mlp
        with torch.no_grad():
            seen_by = [seen(each, tokens, edit.block) for each in (model, dense)]
            kept, weight = by_the_equations(mlp, *seen_by, stay=len(edit.index))
        assert edit.index == tuple(kept.tolist())
        torch.testing.assert_close(edit.out_weight.double(), weight, rtol=2e-4, atol=2e-4)
        apply(model, edit)
        edits += 1
    assert edits == len(model.numbers)
