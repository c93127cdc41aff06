"""Scores of neurons: each against its definition; those that follow the loss against the loss itself."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from models import tiny, tiny_tokens
from oracles import activations, edits_of
from torch import Tensor

from secateur.errors import InvalidOptionError
from secateur.methods import get_method
from secateur.model.budget import Budget
from secateur.run import Run
from secateur.solvers.obs import prune_groups
from secateur.solvers.scores import Score, by_weights, elimination, leverages, neuron_scores, saliencies, top_neurons
from secateur.surgery.edits import KeepNeurons

SCORES = get_args(Score)


def statistics(width: int = 12, rows: int = 5, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated activations (tokens, width), a down projection (rows, width), and the second moment, float64."""
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    h = h @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return h, torch.randn(rows, width, generator=generator, dtype=torch.float64), h.T @ h / tokens


def fitted_loss(h: Tensor, down: Tensor, kept: list[int]) -> float:
    """E |W h - W' h_K|^2 by the best W'."""
    y = h @ down.T
    return float((y - h[:, kept] @ torch.linalg.lstsq(h[:, kept], y).solution).square().sum()) / len(h)


def test_a_saliency_is_what_is_lost_after_the_refit_of_the_others() -> None:
    h, down, moment = statistics()
    for neuron, saliency in enumerate(saliencies(down, moment, damping=0).tolist()):
        assert saliency == pytest.approx(fitted_loss(h, down, [i for i in range(12) if i != neuron]))


def test_leverage_is_the_share_that_no_other_neuron_can_stand_for() -> None:
    h, _, _ = statistics()
    h[:, 7] = h[:, 2] + h[:, 5]
    h[:, 9] = 0
    found = leverages(h.T @ h / len(h), damping=1e-9)
    assert found[[2, 5, 7]].max() < 0.7 < 0.999 < found[[0, 1, 3, 4, 6, 8, 10, 11]].min()
    assert found[9] == pytest.approx(0)
    ridge = 0.1 * h.square().sum(dim=0).mean() / len(h)
    other = torch.linalg.inv(h.T @ h / len(h) + ridge * torch.eye(12))
    assert torch.allclose(leverages(h.T @ h / len(h), damping=0.1), torch.diagonal(h.T @ h / len(h) @ other))


def test_elimination_takes_at_each_step_what_costs_least_after_a_refit() -> None:
    h, down, moment = statistics()
    left = list(range(12))
    for neuron in elimination(down, moment, damping=0).argsort().tolist()[:-1]:
        losses = {n: fitted_loss(h, down, [i for i in left if i != n]) for n in left}
        assert neuron == min(losses, key=losses.__getitem__)
        left.remove(neuron)


def test_sizes_of_weights_count_by_their_share_of_the_largest() -> None:
    gate = torch.tensor([[3.0, -1.0], [1.0, 1.0], [0.0, 2.0]])
    down = torch.tensor([[0.0, 5.0], [0.0, 0.0], [-10.0, 0.0]])
    ones = torch.ones(3, dtype=torch.float64)
    assert by_weights(ones, [gate, down], "ranges").tolist() == pytest.approx([1 + 0.5, 0, 0.5 + 1])
    assert by_weights(2 * ones, [gate], "norms").tolist() == pytest.approx([2, 2 * 0.2**0.5, 2 * 0.4**0.5])
    assert by_weights(ones, [1e4 * gate, down], "ranges").tolist() == by_weights(ones, [gate, down], "ranges").tolist()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])  # gate and up; fused; none, and transposed; none
def test_2ssp_keeps_the_neurons_of_the_highest_scores_of_the_dense_model(family: str, score: Any) -> None:
    model = tiny(family)
    tokens = tiny_tokens(model, 3, 16)
    scores = neuron_scores(model, tokens, score=score, order="blocks", run=Run())
    options = {"score": score, "stage1_only": True}
    edits = edits_of(tiny(family), get_method("2ssp"), tokens, Budget(0.3), **options)
    assert len(edits) == len(scores) == 4
    for edit in edits:
        assert isinstance(edit, KeepNeurons)
        assert edit.index == top_neurons(scores[str(edit.block)], len(edit.index))


def test_elimination_of_a_block_ends_as_brain_surgery_does() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 4, 16)
    found = neuron_scores(model, tokens, score="elimination", order="samples", run=Run())["1"]
    h = activations(model, tokens.ids)[1]["mlp_hidden"].flatten(0, 1).double()
    with model.open(1) as block:
        kept = prune_groups(block.weight("mlp_out").detach(), 2 * h.T @ h / len(h), 1, [1] * (len(found) // 2))
    same = set(top_neurons(found, len(kept.index))) & set(kept.index.tolist())
    assert len(same) >= len(kept.index) - 1  # float32 there, float64 here


def test_a_norm_where_none_is_taken_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InvalidOptionError, match="obs"):
        neuron_scores(model, tiny_tokens(model, 2, 8), score="obs", norm="l1", order="blocks", run=Run())
