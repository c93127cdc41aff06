"""The allocation: curves that meet a budget, what a search's estimates are, and what it finds."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import tiny, tiny_closed, tiny_tokens
from oracles import arithmetic

from secateur.engine.sweep import Part, sweep
from secateur.engine.tokens import Tokens
from secateur.errors import DataError, InfeasibleBudgetError, InvalidOptionError
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import MemoryStore, Meter, Rehearsal, Run
from secateur.solvers import allocation_search
from secateur.solvers.allocation import Allocation, FFNCurve, curve_allocation
from secateur.solvers.allocation_search import _Database, _Search, search_allocation
from secateur.solvers.obs import prune_groups

SMOLLM2 = arithmetic(30, 576, 1536, 9, 3, 64)


@pytest.mark.parametrize("curve", ["log", "uniform"])
@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.2, of="model"), Budget(0.25, round_to=32)])
def test_a_curve_meets_the_budget_to_a_step_of_neurons(curve: FFNCurve, budget: Budget) -> None:
    allocation = curve_allocation(SMOLLM2, budget, curve)
    gone = SMOLLM2.block_parameters - allocation.parameters(SMOLLM2)
    assert abs(gone - budget.target(SMOLLM2)) <= budget.round_to * SMOLLM2.blocks[0].neuron
    assert all(width % budget.round_to == 0 for width in allocation.widths.values())
    widths = list(allocation.widths.values())
    assert widths[0] > widths[-1] if curve == "log" else max(widths) - min(widths) <= budget.round_to


@pytest.mark.parametrize("budget", [Budget(0.25), Budget(0.2, of="model"), Budget(0.25, round_to=32)])
def test_an_equal_allocation_has_one_width_and_all_heads(budget: Budget) -> None:
    allocation = curve_allocation(SMOLLM2, budget, "uniform", equal=True)
    (width,) = set(allocation.widths.values())
    assert width % budget.round_to == 0
    assert set(allocation.kv_heads.values()) == {3}
    gone = SMOLLM2.block_parameters - allocation.parameters(SMOLLM2)
    assert abs(gone - budget.target(SMOLLM2)) <= 30 * budget.round_to * SMOLLM2.blocks[0].neuron / 2


def test_an_equal_allocation_is_refused_where_its_steps_are_too_coarse_or_heads_would_go() -> None:
    for budget in (Budget(0.1, round_to=512), Budget(0.8)):
        with pytest.raises(InfeasibleBudgetError, match="FFN neurons reach"):
            curve_allocation(SMOLLM2, budget, "uniform", equal=True)


def test_the_refusal_of_an_equal_allocation_says_what_the_steps_can_reach() -> None:
    budget = Budget(0.18, round_to=256)  # a step of all FFNs is an eighth of the blocks
    with pytest.raises(InfeasibleBudgetError) as refused:
        curve_allocation(SMOLLM2, budget, "uniform", equal=True)
    ranges = re.findall(r"(0\.\d+) to (0\.\d+)", str(refused.value))
    assert len(ranges) == 2
    for low, high in ranges:
        assert not float(low) <= budget.sparsity <= float(high)
        for end in (low, high):
            curve_allocation(SMOLLM2, replace(budget, sparsity=float(end)), "uniform", equal=True)


def test_the_ends_lose_no_more_than_their_share() -> None:
    for budget, ends in ((Budget(0.5), 0.3), (Budget(0.25), 0.0), (Budget(0.5), 2.0)):
        widths = list(curve_allocation(SMOLLM2, budget, ends=ends).widths.values())
        lost = [1536 - width for width in widths]
        most = ends * sum(lost) / 30
        assert lost[0] == pytest.approx(min(most, 0.7 * sum(lost) / 30), abs=1)
        assert lost[-1] == pytest.approx(min(most, lost[-2] + 4), abs=1)
        assert sum(lost) * SMOLLM2.blocks[0].neuron == pytest.approx(budget.target(SMOLLM2), abs=3 * 576)


def test_ends_that_leave_too_little_to_the_others_give_way() -> None:
    """Of three blocks the one between the ends cannot lose half of all alone."""
    layout = arithmetic(3, 64, 256, 4, 2, 16)
    assert curve_allocation(layout, Budget(0.5), ends=0.1) == curve_allocation(layout, Budget(0.5), "uniform")


def test_kv_heads_go_where_neurons_do_not_suffice() -> None:
    alone, both = curve_allocation(SMOLLM2, Budget(0.55)), curve_allocation(SMOLLM2, Budget(0.6))
    assert set(alone.kv_heads.values()) == {3}
    assert (both.kv_heads[0], both.kv_heads[29]) == (3, 2)
    assert 0.6 * SMOLLM2.block_parameters == pytest.approx(
        SMOLLM2.block_parameters - both.parameters(SMOLLM2), abs=SMOLLM2.blocks[0].neuron
    )


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"0\.74"):
        curve_allocation(SMOLLM2, Budget(0.8), heads=False)
    with pytest.raises(InfeasibleBudgetError, match=r"0\.91"):
        curve_allocation(SMOLLM2, Budget(0.95))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the latter keeps its maps as (in, out)
def test_an_estimate_of_a_small_change_is_exact(family: str) -> None:
    """Of versions that are the present one and a little noise, on more columns."""
    model = tiny(family)
    tokens, budget = tiny_tokens(model, 5, 12), Budget(0.3)
    start = curve_allocation(model.layout(), budget)
    database = _Database(model, start, 3, 0.01)
    narrow = {place: database.sizes[place][1] for place in ((0, "attention"), (1, "mlp"), (3, "mlp"))}
    choice = {**database.choice(start), **narrow}
    database.fill(tokens, choice, Run())
    search = _Search(model, tokens, budget, Run(), database)
    larger = {}
    for place, small in (((0, "attention"), 2), ((1, "mlp"), 2), ((3, "mlp"), 3)):
        number, half = place
        size = database.sizes[place][small]
        part = Part(number, half, size)
        with model.open(number) as block:
            columns, weight = database.version(place, size, block.weight(f"{half}_out"))
            now = search._wide(block, half, choice)[:, columns]
        database.edits[part] = replace(database.edits[part], out_weight=now + 3e-4 * torch.randn_like(weight))
        larger[place] = size
    changes = search._changes(choice)
    variants = [
        database.variant(choice),
        *(database.variant({**choice, place: size}) for place, size in larger.items()),
    ]
    now_loss, *losses = sweep(model, tokens, variants, versions=database.edits).tolist()
    for (place, size), loss in zip(larger.items(), losses, strict=True):
        assert changes[place][choice[place]] == 0
        assert changes[place][size] == pytest.approx(loss - now_loss, rel=0.1, abs=5e-6)


def test_a_step_gives_where_it_gains_and_takes_where_it_costs_nothing() -> None:
    model = tiny("llama")
    layout, budget = model.layout(), Budget(0.3)
    allocation = curve_allocation(layout, budget, "uniform")
    database = _Database(model, allocation, 6, 0.01)
    start = database.choice(allocation)
    search = _Search(model, tiny_tokens(model, 1, 8), budget, Run(), database)
    free = {(1, "attention"), (2, "mlp")}

    def convex(place: Any, size: int) -> float:
        lost = (start[place] - size) / database.sizes[place][-1]
        return 0.0 if place in free else lost + lost**2

    changes = {place: {size: convex(place, size) for size in sizes} for place, sizes in database.sizes.items()}
    for stride in (1, 2, 3):
        step = search._step(start, changes, stride)
        for place, size in step.items():
            moved = database.sizes[place].index(size) - database.sizes[place].index(start[place])
            assert abs(moved) <= stride
            assert (moved < 0) if place in free else (moved >= 0)
        saved = sum(search._saved(place, size) for place, size in step.items())
        assert saved >= budget.target(layout)
        assert sum(changes[place][size] for place, size in step.items()) < 0


@pytest.mark.parametrize("family", ["qwen3", "opt", "olmo2", "gemma2", "phi"])
def test_a_search_changes_nothing_in_the_model_and_meets_the_budget(family: str) -> None:
    model = tiny(family)
    layout, budget, run, fingerprint = model.layout(), Budget(0.3), Run(), model.fingerprint()
    start, tokens = curve_allocation(layout, budget), tiny_tokens(model, 8, 16)
    allocation = search_allocation(model, tokens, budget, run, start=start, levels=6, search_samples=4)
    assert model.fingerprint() == fingerprint
    gone = layout.block_parameters - allocation.parameters(layout)
    assert abs(gone - budget.target(layout)) <= layout.blocks[0].neuron
    curve = run.notes["loss while allocating"]
    assert curve == sorted(curve, reverse=True)


def test_a_search_is_replayed_without_a_forward_and_rehearsed_by_its_cost() -> None:
    model = tiny("llama")
    tokens, budget, store = tiny_tokens(model, 6, 12), Budget(0.3), MemoryStore()

    def searched(run: Run, model: Model = model) -> Allocation:
        start = curve_allocation(model.layout(), budget)
        return search_allocation(model, tokens, budget, run, start=start, levels=4, rounds=2, search_samples=2)

    first, again, rehearsed = Run(store=store), Run(store=store), Rehearsal()
    allocation = searched(first)
    assert searched(again) == allocation
    assert again.meter == Meter()
    assert again.notes == first.notes
    assert searched(Run(), tiny_closed("llama")).widths.keys() == allocation.widths.keys()
    hollow = searched(rehearsed, model.hollow())
    assert hollow.widths.keys() == allocation.widths.keys()
    assert rehearsed.meter.block_tokens == pytest.approx(first.meter.block_tokens, rel=0.5)
    assert rehearsed.held_bytes < rehearsed.peak_bytes


def test_an_interrupted_search_goes_on_with_the_versions_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, store, made = tiny("llama"), MemoryStore(), list[str]()
    tokens, budget = tiny_tokens(model, 6, 12), Budget(0.3)

    def pruned(*args: Any, name: str, **settings: Any) -> Any:
        made.append(name)
        if interrupts and name == "block 2, mlp":
            raise KeyboardInterrupt
        return prune_groups(*args, name=name, **settings)

    def searched(store: MemoryStore) -> Allocation:
        start = curve_allocation(model.layout(), budget)
        return search_allocation(model, tokens, budget, Run(store=store), start=start, levels=4, search_samples=2)

    monkeypatch.setattr(allocation_search, "prune_groups", pruned)
    interrupts = True
    with pytest.raises(KeyboardInterrupt):
        searched(store)
    interrupts = False
    made.clear()
    assert searched(store) == searched(MemoryStore())
    assert made[0] == "block 2, mlp"  # those before it are there


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"levels": 1}, "searched allocation .* 2 levels"), ({"rounds": 0}, "searched allocation .* 1 round"),
     ({"search_samples": 0}, "search_samples .* 4 windows"), ({"search_samples": 4}, "search_samples .* 4 windows")],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(wrong: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    budget = Budget(0.3)
    start = curve_allocation(model.layout(), budget)
    with pytest.raises(InvalidOptionError, match=message):
        search_allocation(model, tiny_tokens(model, 4, 8), budget, Run(), start=start, **wrong)


def test_a_search_on_windows_where_nothing_counts_is_refused_before_any_work() -> None:
    model, run = tiny("llama"), Run()
    tokens, weights = tiny_tokens(model, 4, 8), torch.ones(4, 8)
    weights[-2:, 1:] = 0  # a window's first token is not predicted
    tokens = Tokens.of(tokens.ids, weights)
    budget = Budget(0.3)
    start = curve_allocation(model.layout(), budget)
    with pytest.raises(DataError, match="search_samples"):
        search_allocation(model, tokens, budget, run, start=start, search_samples=2)
    assert run.meter.block_tokens == 0
