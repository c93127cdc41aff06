"""SlimGPT: equation 6 and what the blocks make of it; the order of its statistics; its ablations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny, tiny_tokens
from oracles import PROPERTY, activations, arithmetic, edited, edits_of, pruner

from secateur.engine.moments import SecondMoment
from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.methods import get_method
from secateur.methods.slimgpt import plan
from secateur.model.budget import Budget
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.obs import group_sizes, prune_groups
from secateur.solvers.ratios import curve, ratios
from secateur.surgery.edits import KeepHeads, KeepNeurons

METHOD = get_method("slimgpt")
SHAPES = ("log", "linear", "uniform", "log-decrease", "linear-decrease")
FAMILIES = ("llama", "gpt2")  # grouped queries; every query head its own
prune = pruner("slimgpt")


LLAMA_7B = arithmetic(32, 4096, 11008, 32, 32, 128, other=2 * 32000 * 4096 + 4096)
LLAMA_3_8B = arithmetic(32, 4096, 14336, 32, 8, 128)
SMOLLM2 = arithmetic(30, 576, 1536, 9, 3, 64)


# --- equation 6 ---


@pytest.mark.parametrize(
    ("blocks", "mean"),
    [(12, 0.6703), (16, 0.6914), (22, 0.7128), (24, 0.7183), (28, 0.7276), (32, 0.7354), (40, 0.7477)],
)
def test_the_mean_of_the_log_curve(blocks: int, mean: float) -> None:
    assert sum(curve("log", blocks)) / blocks == pytest.approx(mean, abs=5e-5)


def test_the_authors_command_for_20_percent() -> None:
    """r_0 = 0.0625 and r_31 = 0.25 make LLaMA-7B the paper's 5.44 B parameters."""
    made = plan(LLAMA_7B, Budget(0.2, of="model"), first_ratio=0.0625, last_ratio=0.25)
    left = LLAMA_7B.parameters - sum(
        each.kv_groups * LLAMA_7B.blocks[n].kv_group + each.neurons * LLAMA_7B.blocks[n].neuron
        for n, each in made.items()
    )
    assert left / 1e9 == pytest.approx(5.44, abs=0.02)
    assert made[0].kv_groups == 2  # round(32 * 0.0625)
    assert made[31].kv_groups == 8
    assert made[31].neurons == 2752


@settings(PROPERTY)
@given(shape=st.sampled_from(SHAPES), target=st.floats(0.05, 0.6), blocks=st.integers(2, 40), data=st.data())
def test_every_schedule_takes_the_target(shape: Any, target: float, blocks: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from([50.0, 100.0]), min_size=blocks, max_size=blocks))
    made = ratios(sizes, target * sum(sizes), shape, most=[0.99] * blocks)
    assert sum(r * size for r, size in zip(made, sizes, strict=True)) == pytest.approx(target * sum(sizes))
    assert min(made) >= 0
    assert max(made) <= 0.99 + 1e-9
    rises = [b - a for a, b in itertools.pairwise(made)]
    if shape != "uniform":
        assert all((rise < 0) == shape.endswith("decrease") or abs(rise) < 1e-9 for rise in rises)


@pytest.mark.parametrize("shape", ["log", "linear-decrease"])
def test_an_endpoint_that_is_given_is_met(shape: Any) -> None:
    sizes = [1.0] * 10
    for ends in ({"first": 0.3}, {"last": 0.3}):
        made = ratios(sizes, 4.0, shape, **ends)
        assert made[0 if "first" in ends else -1] == pytest.approx(0.3)
        assert sum(made) == pytest.approx(4.0)
    assert ratios(sizes, 4.0, shape, first=0.1, last=0.2)[0] == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "first"), [("log", 1.5), ("uniform", 0.5)])
def test_endpoints_that_cannot_be_are_refused(shape: Any, first: float) -> None:
    with pytest.raises(InvalidOptionError):
        ratios([1.0] * 10, 4.0, shape, first=first)


@settings(PROPERTY)
@given(
    shape=st.sampled_from(SHAPES), target=st.floats(0.01, 0.99),
    most=st.lists(st.floats(0.05, 1), min_size=2, max_size=12), data=st.data(),
)  # fmt: skip
def test_what_some_blocks_cannot_lose_the_others_do(
    shape: Any, target: float, most: list[float], data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.floats(1, 100), min_size=len(most), max_size=len(most)))
    able = sum(size * limit for size, limit in zip(sizes, most, strict=True))
    made = ratios(sizes, target * able, shape, most=most)
    assert sum(r * size for r, size in zip(made, sizes, strict=True)) == pytest.approx(target * able)
    assert all(0 <= r <= limit for r, limit in zip(made, most, strict=True))


# --- whole heads and neurons ---


@pytest.mark.parametrize("layout", [SMOLLM2, LLAMA_3_8B], ids=["smollm2", "llama-3-8b"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_with_grouped_queries_each_block_meets_its_ratio_within_a_neuron(
    layout: Layout, shape: Any, sparsity: float
) -> None:
    made = plan(layout, Budget(sparsity), ratio=shape)
    owed = total = 0.0
    for number, each in made.items():
        block = layout.blocks[number]
        lost = each.kv_groups * block.kv_group + each.neurons * block.neuron
        wanted = each.ratio * (block.shape.kv_heads * block.kv_group + block.shape.width * block.neuron)
        assert abs(lost - wanted) <= block.neuron
        owed += each.ratio * block.shape.kv_heads - each.kv_groups
        more = each.kv_groups + 1
        no_more = more == block.shape.kv_heads or more * block.kv_group > wanted
        assert owed >= -0.5 - 1e-9  # heads that earlier blocks still owe
        assert owed <= 0.5 + 1e-9 or no_more
        total += lost
    assert total / layout.block_parameters == pytest.approx(sparsity, rel=1e-3)


def test_without_grouped_queries_the_papers_rule_applies_as_it_stands() -> None:
    made = plan(LLAMA_7B, Budget(0.5))
    head, neuron = LLAMA_7B.blocks[0].kv_group, LLAMA_7B.blocks[0].neuron
    for each in made.values():
        assert each.kv_groups == math.floor(32 * each.ratio + 0.5)
        block = each.ratio * (32 * head + 11008 * neuron)  # the FFN makes up for the rounding of the heads
        assert abs(each.kv_groups * head + each.neurons * neuron - block) <= neuron


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "uniform"])
def test_given_both_ends_heads_and_neurons_lose_the_same_ratio(shape: Any) -> None:
    for each in plan(LLAMA_7B, Budget(0.2), ratio=shape, first_ratio=0.1, last_ratio=0.6).values():
        assert each.kv_groups == math.floor(32 * each.ratio + 0.5)
        assert abs(each.neurons - 11008 * each.ratio) <= 1


def test_something_stays_of_every_module() -> None:
    made = plan(SMOLLM2, Budget(0.9))
    assert max(each.kv_groups for each in made.values()) <= 2
    assert all(each.neurons < 1536 for each in made.values())
    with pytest.raises(InfeasibleBudgetError):
        plan(SMOLLM2, Budget(0.995))


# --- the order of statistics ---


@pytest.mark.parametrize("family", FAMILIES)
def test_each_statistic_is_of_the_model_as_pruned_so_far(family: str) -> None:
    """Heads on what earlier, already pruned blocks give; the FFN after the block's own heads went. By brute force."""
    model, options = tiny(family), {"group": 3, "rounding": "carry", "precision": "float64"}
    tokens = tiny_tokens(model, 3, 12)
    edits = edits_of(model, METHOD, tokens, Budget(0.4), **options)
    assert {type(edit) for edit in edits} == {KeepHeads, KeepNeurons}
    for place, edit in enumerate(edits):
        assert isinstance(edit, KeepHeads | KeepNeurons)
        assert edit.out_weight is not None
        so_far = edited(tiny(family), *edits[:place])
        tap, role = ("attention_hidden", "attention_out") if isinstance(edit, KeepHeads) else ("mlp_hidden", "mlp_out")
        moment = SecondMoment(torch.float64)
        moment.add(activations(so_far, tokens.ids)[edit.block][tap], tokens.weights)
        with so_far.open(edit.block) as block:
            weight, shape = block.weight(role).detach().clone(), block.shape
        whole = shape.kv_heads if isinstance(edit, KeepHeads) else shape.width
        gone = whole - len(edit.index)
        size, steps = (weight.shape[1] // whole, [1] * gone) if role == "attention_out" else (1, group_sizes(gone, 3))
        expected = prune_groups(weight, 2 * moment.mean, size, steps)
        assert edit.index == tuple(expected.index.tolist())
        assert torch.allclose(edit.out_weight, expected.weight, atol=1e-5)


def test_compensation_leaves_less_error() -> None:
    tokens = tiny_tokens(tiny("llama"), 4, 16)
    errors = {}
    for compensate in (True, False):
        model, run = tiny("llama"), Run()
        pruning = prune(model, tokens, Budget(0.3), run, compensate=compensate)
        assert all((getattr(edit, "out_weight", None) is not None) == compensate for edit in pruning.edits)
        errors[compensate] = run.store.get("slimgpt/0/mlp")["error"]
    assert errors[True] < errors[False]


def test_an_unused_head_and_dead_neurons_go_first() -> None:
    model = tiny("llama")
    with model.open(2) as block, torch.no_grad():
        columns = block.weight("attention_out").shape[1] // block.shape.kv_heads
        block.weight("attention_out")[:, columns : 2 * columns] = 0
        block.weight("mlp_out")[:, [4, 9]] = 0
    edits = prune(model, tiny_tokens(model, 4, 16), Budget(0.3), ratio="uniform").edits
    (heads,) = (edit for edit in edits if isinstance(edit, KeepHeads) and edit.block == 2)
    (neurons,) = (edit for edit in edits if isinstance(edit, KeepNeurons) and edit.block == 2)
    assert 1 not in heads.index
    assert not {4, 9} & set(neurons.index)
