"""A walk with a reference: moments of the pruned model's inputs with what the dense model gives for the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import BLOCKS, FAMILY_NAMES, random, tiny, tiny_closed, tiny_tokens
from oracles import activations, weighted
from torch import Tensor

from secateur.engine.reference import Reference
from secateur.engine.stream import Hidden, Moments, Target
from secateur.engine.tokens import Tokens
from secateur.engine.walk import Follower, walk
from secateur.errors import InvalidEditError, InvalidOptionError, UnsupportedEditError
from secateur.model.handle import Model
from secateur.run import Rehearsal, Run
from secateur.surgery.apply import apply
from secateur.surgery.edits import (
    CentreEmbedding,
    DropAttention,
    DropBlock,
    DropMLP,
    Edit,
    FoldNorms,
    KeepHeads,
    KeepNeurons,
    Rebase,
    SetWeight,
)

TAPS: dict[Hidden, str] = {"attention_hidden": "attention_out", "mlp_hidden": "mlp_out"}
Measured = dict[tuple[int, str], Any]


def edits_of(model: Model) -> dict[tuple[int, str], Edit]:
    """By block and the part that they change; some blocks lose nothing. The model must be dense."""
    with model.open(1) as block:
        rows, columns = block.weight("attention_out").shape
        width = block.shape.width
    return {
        (0, "mlp_hidden"): KeepNeurons(0, (0, 3, 4, 9), random(rows, 4, seed=1)),
        (1, "attention_hidden"): SetWeight(1, "attention_out", random(rows, columns, seed=2)),
        (1, "mlp_hidden"): DropMLP(1),
        (3, "attention_hidden"): DropAttention(3),
        (3, "mlp_hidden"): SetWeight(3, "mlp_out", random(rows, width, seed=3)),
    }


def measure(model: Model, tokens: Tokens, target: Target, **options: Any) -> Measured:
    """Prune by `edits_of` while walking; the moments of each part right before its edit."""
    edits, seen = edits_of(model), {}
    for visit in walk(model, tokens, reference=target != "original", **options):
        for tap in TAPS:
            seen[visit.block.number, tap] = visit.moments(tap, target, halves=True)
            if (edit := edits.get((visit.block.number, tap))) is not None:
                apply(model, edit)
    return seen


def expected(
    dense: Model, was: dict[str, Tensor], now: dict[str, Tensor], number: int, tap: Hidden, target: Target, w: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums of x x^T and y x^T by the block's activations in whole models; the pruned one still has the part."""
    with dense.open(number) as block:
        linear, scale = block.linear(block.roles[TAPS[tap]]), block.multiplier
        weight, bias = block.weight(TAPS[tap]), 0 if linear.bias is None else linear.bias
    y = (now if target == "original" else was)[tap] @ weight.T
    if target == "stream" and tap == "attention_hidden":
        y = y + (was["block_in"] - now["block_in"]) / scale
    elif target == "stream":
        before = now["block_out"] - scale * (now[tap] @ weight.T + bias)
        y = (was["block_out"] - before) / scale - bias
    x = now[tap].double()
    return torch.einsum("st,str,stc->rc", w, x, x), torch.einsum("st,str,stc->rc", w, y.double(), x)


def check(got: Moments, wanted: tuple[Tensor, Tensor], weight: Tensor) -> None:
    target = weight.double() @ got.inputs if got.target is None else got.target
    assert len(got.halves) == (0 if got.target is None else 2)
    for have, want in zip((got.inputs, target), wanted, strict=True):
        assert torch.allclose(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "target"),
    [("llama", "original"), *((family, target) for family in FAMILY_NAMES for target in ("dense", "stream"))],
)
@torch.no_grad()
def test_the_moments_are_those_of_two_whole_models(family: str, target: Target) -> None:
    dense, model = tiny(family), tiny(family)
    tokens = weighted(tiny_tokens(model, 3, 7))
    if dense.family.post_norms and target == "stream":
        with pytest.raises(InvalidOptionError, match="norm"):
            measure(model, tokens, target)
        return
    pruned, edits, was = copy.deepcopy(dense), edits_of(dense), activations(dense, tokens.ids)
    w = tokens.weights.double() / tokens.weights.sum()
    now = was
    for (number, tap), got in measure(model, tokens, target, batch_size=2).items():
        assert (got.target is None) == (target == "original" or (number, tap) <= (0, "mlp_hidden"))  # nothing is edited
        with dense.open(number) as block:
            check(
                got,
                expected(dense, was[number], now[number], number, tap, target, w),
                block.weight(TAPS[tap]),
            )
        if (edit := edits.get((number, tap))) is not None:
            apply(pruned, edit)
            now = activations(pruned, tokens.ids)


@torch.no_grad()
def test_a_reference_remembers_what_went_before_the_walk() -> None:
    dense, model = tiny("qwen2"), tiny("qwen2")  # its blocks are called with different masks
    tokens = tiny_tokens(model, 2, 9)
    reference, was = Reference(model, tokens, Run()), activations(dense, tokens.ids)
    for edit in (DropAttention(2), DropBlock(1), DropBlock(0)):
        apply(model, edit)
    now, w = activations(model, tokens.ids), tokens.weights.double() / tokens.weights.sum()
    for visit in walk(model, tokens, reference=reference):
        number, tap = visit.block.number, "mlp_hidden"
        got = visit.moments("mlp_hidden", "stream", halves=True)
        assert got.target is not None
        check(got, expected(dense, was[number], now[number], number, tap, "stream", w), visit.block.weight("mlp_out"))
    reference.close()
    assert model.guards == []


def work(make: Callable[[str], Model], run: Run, target: Target) -> int:
    model = make("llama")
    measure(model if not run.rehearses else model.hollow(), tiny_tokens(model, 3, 7), target, run=run)
    return run.meter.block_tokens // (3 * 7)


def test_it_costs_one_forward_more_and_none_before_the_first_edit() -> None:
    alone, both = work(tiny, Run(), "original"), work(tiny, Run(), "stream")
    assert both == alone + BLOCKS
    assert work(tiny, Rehearsal(), "stream") == both
    run, model = Run(), tiny("llama")
    for visit in walk(model, tiny_tokens(model, 3, 7), reference=True, run=run):
        assert visit.moments("mlp_hidden", "dense").target is None
    assert run.meter.block_tokens == (2 * BLOCKS - 1) * 3 * 7  # to look and to go on


def test_a_rehearsal_foretells_the_states_that_are_held() -> None:
    alone, both = Rehearsal(), Rehearsal()
    for run, target in ((alone, "original"), (both, "dense")):
        work(tiny, run, target)
        assert run.held_bytes == 0
    assert both.peak_bytes > alone.peak_bytes + 3 * 7 * 32 * 4


def test_closed_blocks_have_no_weights_and_nothing_is_left_behind() -> None:
    closed, model = tiny_closed("qwen2"), tiny("qwen2")
    tokens = tiny_tokens(model, 3, 8)
    seen, wanted = measure(closed, tokens, "stream"), measure(model, tokens, "stream")
    for key, got in seen.items():
        assert torch.equal(got.inputs, wanted[key].inputs)
        assert (got.target is None) == (wanted[key].target is None)
        assert got.target is None or torch.equal(got.target, wanted[key].target)
    for each in (closed, model):
        assert each.guards == []
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.hf.modules())
    assert not closed.opened


def test_what_cannot_be_compared_is_refused() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 2, 6)
    with pytest.raises(InvalidOptionError, match="samples"):
        next(walk(model, tokens, order="samples", reference=True))
    with pytest.raises(InvalidOptionError, match="reference"):
        next(walk(model, tokens)).moments("mlp_hidden", "dense")
    reference = Reference(model, tokens, Run())
    with pytest.raises(InvalidEditError, match="embedding"):
        apply(model, CentreEmbedding())
    apply(model, FoldNorms())
    apply(model, Rebase(2, torch.eye(model.hidden_size)[:, :9]))
    with pytest.raises(UnsupportedEditError, match="basis"):
        list(visit.advance() for visit in walk(model, tokens, reference=reference))


@torch.no_grad()
def test_a_follower_goes_on_with_the_pruned_model_and_begins_anew_for_a_block_behind() -> None:
    model, run = tiny("llama"), Run().scoped("test")
    tokens = tiny_tokens(model, 2, 6)
    follower = Follower(model, tokens, run)
    for number, edit in ((1, KeepHeads(1, (0, 2))), (3, DropMLP(0)), (2, DropMLP(2))):
        x = activations(model, tokens.ids)[number]["mlp_hidden"].double().flatten(0, 1)
        with follower.visit(number) as visit:
            got = visit.moments("mlp_hidden").inputs
        assert torch.allclose(got, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        apply(model, edit)
    follower.close()
    assert model.guards == []
    assert run.meter.block_tokens == ((1 + 1) + (2 + 1) + (2 + 1)) * 2 * 6
