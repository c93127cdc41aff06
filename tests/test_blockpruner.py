"""BlockPruner against brute force, in the paper's form and alternating, and where it stops."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from models import NO_ENDS, tiny, tiny_tokens
from oracles import PROPERTY, mean_kl, mean_nll, pruner, weighted, without

from secateur.engine.sweep import Part
from secateur.errors import InfeasibleBudgetError
from secateur.methods.blockpruner import removals, units
from secateur.model.budget import Budget
from secateur.model.layout import BlockLayout, Layout
from secateur.model.modeling_secateur import Shape
from secateur.run import Run
from secateur.surgery.edits import DropAttention, DropMLP, Edit

prune = pruner("blockpruner")


def parts(edits: list[Edit]) -> list[Part]:
    assert all(isinstance(edit, (DropAttention, DropMLP)) for edit in edits)
    return [Part(edit.block, "attention" if isinstance(edit, DropAttention) else "mlp") for edit in edits]


# --- the search ---


@pytest.mark.parametrize(
    ("family", "alternate", "criterion"),
    [("llama", False, "ppl"), ("phi3", True, "ppl"), ("opt", False, "kl"), ("qwen2", True, "kl")],
)
def test_each_removal_is_the_cheapest_by_brute_force(family: str, alternate: bool, criterion: str) -> None:
    dense = tiny(family)
    tokens = weighted(tiny_tokens(dense, 3, 9), seed=1)
    search = tokens.first(2, 7)
    options = {"alternate": alternate, "criterion": criterion, "search_samples": 2, "search_length": 7}
    edits = prune(tiny(family), tokens, Budget(0.5 if alternate else 0.4), **options).edits
    gone: list[Part] = []
    for place, part in enumerate(parts(edits)):
        kinds = {"attention", "mlp"} if not alternate else {("attention", "mlp")[place % 2]}
        tried = [unit for unit in units(dense.layout()) if unit not in gone and unit.kind in kinds]
        losses = {}
        for unit in tried:
            other = without(dense, [*gone, unit])
            losses[unit] = mean_nll(other, search) if criterion == "ppl" else mean_kl(dense, other, search)
        assert part == min(losses, key=losses.__getitem__)
        gone.append(part)
    assert len(gone) >= 3
    if alternate:
        assert [part.kind for part in gone] == ["attention", "mlp"] * 2  # half of four blocks


def test_a_search_on_less_than_the_repository_s_window_says_so() -> None:
    model = tiny("llama")
    small, full = Run(), Run()
    prune(tiny("llama"), tiny_tokens(model, 3, 12), Budget(0.2), small, search_samples=2, search_length=9)
    assert "18 tokens (in full 2,048)" in small.notes["reduced"]
    prune(model, tiny_tokens(model, 32, 64), Budget(0.1), full, search_samples=32)
    assert "reduced" not in full.notes


# --- where it stops ---


def layout(sizes: list[tuple[int, int]], other: int = 0) -> Layout:
    """Blocks of (attention, MLP) parameters."""
    return Layout(
        {
            number: BlockLayout(
                shape=Shape(1 if mlp else 0, 1 if attention else 0, 1 if attention else 0), head_dim=1,
                attention=attention, attention_norms=0, mlp=mlp, mlp_norms=0, neuron=1, kv_group=1, rest=0,
            )
            for number, (attention, mlp) in enumerate(sizes)
        },
        other,
        NO_ENDS,
    )  # fmt: skip


def chosen(made: Layout, budget: Budget, alternate: bool, order: list[Part]) -> list[Part]:
    """The removals if this is the order of cheapness."""
    return list(removals(made, budget, alternate=alternate, choose=lambda some: min(some, key=order.index)))


@pytest.mark.parametrize(("sparsity", "pairs"), [(0.25, 8), (0.375, 11), (0.5, 15), (0.017, 1), (0.98, 29)])
def test_alternating_makes_the_nearest_number_of_equivalent_blocks(sparsity: float, pairs: int) -> None:
    made = layout([(884736 + 576, 2654208 + 576)] * 30, other=28_312_000)
    got = chosen(made, Budget(sparsity), True, sorted(units(made)))
    assert [part.kind for part in got] == ["attention", "mlp"] * pairs
    assert Budget(sparsity).whole_blocks(made) == pairs
    scaled = sparsity * made.block_parameters / made.parameters
    assert chosen(made, Budget(scaled, of="model"), True, sorted(units(made))) == got


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    st.integers(0, 100), st.floats(0.02, 0.98), st.sampled_from(["blocks", "model"]), st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_end_is_the_nearest_to_the_target(
    sizes: list[tuple[int, int]], other: int, sparsity: float, of: Any, random: Any
) -> None:
    made, budget = layout(sizes, other), Budget(sparsity, of=of)
    order = list(units(made))
    random.shuffle(order)
    try:
        got = chosen(made, budget, False, order)
    except InfeasibleBudgetError:
        assume(False)
    assert got == order[: len(got)]
    assert 0 < len(got) < len(order)
    apart, gone = [], 0
    for unit in order:  # after each removal of this order
        gone += units(made)[unit]
        apart.append(abs(gone - budget.target(made)))
    assert apart[len(got) - 1] == min(apart)
    assert len(got) == max(place for place, each in enumerate(apart) if each == min(apart)) + 1  # ties up


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6), st.floats(0.02, 0.98),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_alternating_ends_within_a_pair_of_the_target(
    sizes: list[tuple[int, int]], sparsity: float, random: Any
) -> None:
    made, budget = layout(sizes), Budget(sparsity)
    order = list(units(made))
    random.shuffle(order)
    try:
        got = chosen(made, budget, True, order)
    except InfeasibleBudgetError:
        assume(False)
    assert 0 < len(got) < len(order)
    gone = sum(units(made)[unit] for unit in got)
    largest = [max((size for unit, size in units(made).items() if unit.kind == kind), default=0)
               for kind in ("attention", "mlp")]  # fmt: skip
    assert abs(gone - budget.target(made)) <= sum(largest)
