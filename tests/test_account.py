"""Asked, got, why: a target is met to a unit, or refused with a range that can be reached, or the reason is given."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from models import tiny, tiny_tokens
from oracles import arithmetic, edited, lopsided, planned, standing

import secateur
from secateur.card import card
from secateur.errors import InfeasibleBudgetError
from secateur.methods import methods, slimgpt, two_ssp
from secateur.methods.slicegpt import sliced, sliced_width
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import Ends, Layout
from secateur.surgery.apply import predict
from secateur.surgery.edits import DropAttention, DropMLP, KeepHeads, KeepNeurons

SPARSITIES = [i / 10 for i in range(1, 10)]
HEADS = [(1, 1), (2, 1), (2, 2), (32, 8), (32, 32)]  # query and KV heads
SHAPES: tuple[Any, ...] = ("log", "linear", "uniform", "log-decrease", "linear-decrease")
BUDGETS = [Budget(s, of=of, round_to=r) for s in SPARSITIES for of in ("blocks", "model") for r in (1, 32)]


def made_up(blocks: int, query: int, kv: int, width: int = 300) -> Layout:
    layout = arithmetic(blocks, 64, width, query, kv, 4 if query > 2 else 32, other=2 * 97 * 64 + 64)
    return replace(layout, ends=Ends(97, 64, False, 64, 64))


def after(layout: Layout, plans: dict[int, slimgpt.BlockPlan]) -> Layout:
    for number, each in plans.items():
        shape = layout.blocks[number].shape
        if each.kv_groups:
            layout = predict(layout, KeepHeads(number, tuple(range(shape.kv_heads - each.kv_groups))))
        if each.neurons:
            layout = predict(layout, KeepNeurons(number, tuple(range(shape.width - each.neurons))))
    return layout


def ranges(refusal: BaseException) -> list[float]:
    """The ends of all ranges that a refusal states."""
    return [float(end) for pair in re.findall(r"(\d\.\d+)(?: \(.*?\))? to (\d\.\d+)", str(refusal)) for end in pair]


def met_or_refused(make: Callable[[Budget], Layout], before: Layout, budget: Budget, unit: float) -> bool:
    """Whether it is met, to a unit; if it is refused, the ends of what is said to be in reach are."""

    def missed(budget: Budget) -> float:
        gone = before.parameters - make(budget).parameters
        assert gone > 0
        return abs(gone - budget.target(before))

    try:
        assert missed(budget) <= unit * (1 + 1e-9)
    except InfeasibleBudgetError as refusal:
        for end in ranges(refusal):
            assert missed(Budget(end, of=budget.of, round_to=budget.round_to)) <= unit * (1 + 1e-9)
        return False
    return True


# --- SlimGPT ---


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("blocks", [2, 36])
def test_slimgpt_meets_every_target_to_a_step_of_neurons(blocks: int, heads: tuple[int, int]) -> None:
    layout = made_up(blocks, *heads)
    met = 0
    for place, budget in enumerate(BUDGETS):
        shape, rounding = SHAPES[place % 5], ("auto", "paper", "carry")[place % 3]

        def make(budget: Budget, shape: Any = shape, rounding: Any = rounding) -> Layout:
            return after(layout, slimgpt.plan(layout, budget, ratio=shape, rounding=rounding))

        met += met_or_refused(make, layout, budget, layout.blocks[0].neuron * budget.round_to)
    assert met >= len(BUDGETS) / 3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_slimgpt_of_uneven_blocks_meets_its_target(shape: Any) -> None:
    """Blocks without attention, without FFN, with one KV head, and narrow ones among them."""
    layout = made_up(8, 4, 4)
    narrow = [KeepHeads(3, (0,)), KeepNeurons(3, tuple(range(20))), KeepHeads(5, (0, 1)), KeepNeurons(7, (0,))]
    for edit in (DropAttention(1), DropMLP(2), *narrow):
        layout = predict(layout, edit)
    for sparsity in SPARSITIES:
        met_or_refused(lambda b: after(layout, slimgpt.plan(layout, b, ratio=shape)), layout, Budget(sparsity), 3 * 64)


def test_a_target_a_little_beyond_reach_is_refused_though_a_head_is_larger() -> None:
    layout = predict(made_up(3, 32, 8), DropMLP(1))
    budget = Budget(0.9, of="model")
    assert not met_or_refused(lambda b: after(layout, slimgpt.plan(layout, b)), layout, budget, 3 * 64)
    most = 21 * layout.blocks[0].kv_group + 2 * 299 * 3 * 64  # 7 of 8 KV heads, and all neurons but one
    assert budget.target(layout) - most < layout.blocks[0].kv_group


def test_without_ffns_the_unit_is_a_kv_head() -> None:
    layout = made_up(6, 8, 8)
    for number in layout.blocks:
        layout = predict(layout, DropMLP(number))
    for sparsity in SPARSITIES:
        met_or_refused(lambda b: after(layout, slimgpt.plan(layout, b)), layout, Budget(sparsity), 4 * 4 * 64)


@pytest.mark.parametrize(
    ("sparsity", "ends"), [(0.85, {"first_ratio": 0.05}), (0.85, {"last_ratio": 0.1}), (0.3, {"first_ratio": 0.9})],
    ids=str,
)  # fmt: skip
def test_endpoints_that_cannot_meet_the_target_are_refused_with_both_ranges(
    sparsity: float, ends: dict[str, float]
) -> None:
    layout = made_up(12, 8, 8)
    with pytest.raises(InfeasibleBudgetError) as refusal:
        slimgpt.plan(layout, Budget(sparsity), ratio="linear", **ends)  # type: ignore[arg-type]
    low, high, *free = ranges(refusal.value)
    assert not low <= sparsity <= high
    assert free[0] <= sparsity <= free[1]
    for end in (low, high):
        got = after(layout, slimgpt.plan(layout, Budget(end), ratio="linear", **ends))  # type: ignore[arg-type]
        assert Budget(end).achieved(layout, got) == pytest.approx(end, abs=1e-3)


# --- the others, where they plan by arithmetic ---


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("blocks", [2, 36])
def test_2ssp_and_slicegpt_meet_every_target_to_a_step_in_all_blocks(blocks: int, heads: tuple[int, int]) -> None:
    layout = made_up(blocks, *heads)

    def narrowed(budget: Budget) -> Layout:
        balance = two_ssp.balance(layout, budget)
        made = layout
        for number, width in balance.widths.items():
            made = predict(made, KeepNeurons(number, tuple(range(width))))
        for number in range(balance.attentions):
            made = predict(made, DropAttention(number))
        return made

    row = sum(block.neuron for block in layout.blocks.values()) / 2
    for budget in BUDGETS if blocks == 2 else BUDGETS[::7]:
        met_or_refused(narrowed, layout, budget, row * budget.round_to)

    def slim(budget: Budget) -> Layout:
        width = sliced_width(layout, budget, dimension=None, multiple=8, slice_head=False, untie=False)
        return sliced(layout, width, slice_head=False, untie=False)

    widest = [sliced(layout, width, slice_head=False, untie=False) for width in (56, 40)]
    for budget in BUDGETS[::4] if blocks == 2 else BUDGETS[16:17]:
        met_or_refused(slim, layout, budget, widest[0].parameters - widest[1].parameters)


# --- what is said ---


EVOPRESS = {"generations": 1, "offspring": 2, "initial": 2, "initial_tokens": 8, "selection_tokens": "8,8"}


@pytest.mark.parametrize("shape", ["dense", pytest.param("lopsided", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", methods())
def test_every_plan_is_as_asked_or_says_why_not(name: str, shape: Any) -> None:
    model, options, refused = standing("llama", shape), EVOPRESS if name == "evopress" else {}, list[int]()
    for sparsity, (of, round_to) in zip(SPARSITIES[::2], itertools.cycle([("blocks", 1), ("model", 8)]), strict=False):
        budget = Budget(sparsity, of=of, round_to=round_to)  # type: ignore[arg-type]
        try:
            plan = planned(model, name, budget, 1, 8, **options)
        except InfeasibleBudgetError as refusal:
            refused.append(len(ranges(refusal)))
            for end in ranges(refusal):
                planned(model, name, Budget(end, of=budget.of, round_to=round_to), 1, 8, **options)
            continue
        account = plan.sparsity
        assert (account.asked, account.of, account.round_to) == (sparsity, of, round_to)
        assert account.got == pytest.approx(budget.achieved(plan.before, plan.after))
        assert (account.reason is None) == (f"{account.got:.2%}" == f"{sparsity:.2%}")
    assert 0 not in refused
    assert len(refused) <= (2 if shape == "dense" else 4)  # of five


def units(text: str | None) -> set[str]:
    return set(re.findall(r"whole blocks|attention modules|MLPs|KV heads|FFN neurons|hidden directions", text or ""))


@pytest.mark.parametrize(
    ("name", "options", "removed"),
    [("shortgpt", {}, {"whole blocks"}), ("window", {}, {"whole blocks"}),
     ("blockpruner", {}, {"attention modules", "MLPs"}), ("evopress", EVOPRESS, {"attention modules", "MLPs"}),
     ("evopress", {**EVOPRESS, "units": "blocks"}, {"whole blocks"}), ("2ssp", {"attentions": 0}, {"FFN neurons"}),
     ("2ssp", {"attentions": 1}, {"FFN neurons", "attention modules"}), ("slicegpt", {}, {"hidden directions"}),
     ("slimgpt", {}, {"KV heads", "FFN neurons"})],
)  # fmt: skip
def test_the_reason_is_the_units_that_went(name: str, options: dict[str, Any], removed: set[str]) -> None:
    account = planned(standing("llama"), name, Budget(0.41), 1, 8, **options).sparsity
    assert units(account.reason) == removed


def test_a_reason_gives_the_size_of_a_unit() -> None:
    model = standing("llama")
    reason = planned(model, "shortgpt", Budget(0.3), 1, 8).sparsity.reason or ""
    assert re.findall(r"([\d.]+)%", reason) == ["25"]  # of four blocks
    uneven = planned(standing("llama", "lopsided"), "shortgpt", Budget(0.33), 1, 8).sparsity.reason or ""
    sizes = [block.parameters for block in standing("llama", "lopsided").layout().blocks.values()]
    low, high = (float(size) for size in re.findall(r"([\d.]+)%", uneven))
    assert [low, high] == pytest.approx([100 * size / sum(sizes) for size in (min(sizes), max(sizes))], rel=0.05)


@pytest.mark.parametrize(
    ("name", "options"),
    [("slicegpt", {"dimension": 16}), ("slimgpt", {"first_ratio": 0.1, "last_ratio": 0.2})],
)
def test_options_that_decide_are_the_reason(name: str, options: dict[str, Any]) -> None:
    account = planned(standing("llama"), name, Budget(0.7), 1, 8, **options).sparsity
    assert all(f"{option} {value}" in (account.reason or "") for option, value in options.items())
    assert not units(account.reason)


# --- real runs ---


@pytest.mark.parametrize("make", [tiny, lambda family: lopsided(tiny(family))], ids=["dense", "lopsided"])
@pytest.mark.parametrize("name", ["slimgpt", "2ssp", "slicegpt"])
def test_the_plan_is_the_layout_that_comes_and_the_record_says_so(name: str, make: Callable[[str], Model]) -> None:
    model = make("llama")
    plan = planned(model, name, Budget(0.37), 2, 8)
    pruned = secateur.prune(model, name, sparsity=0.37, calibration=tiny_tokens(model, 2, 8))
    if name != "2ssp":  # which attentions go decides how much
        assert plan.after == model.layout()
        assert pruned.record.sparsity == plan.sparsity
    assert pruned.record.sparsity is not None
    assert f"got {pruned.record.sparsity.got:.2%}" in card(pruned.record)


def test_2ssp_stops_at_the_attentions_that_weigh_what_was_planned() -> None:
    """Attentions of 1, 1, 4 and 4 KV heads: as many as come nearest to the parameters of average ones."""
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=4)
    model = edited(model, KeepHeads(0, (0,)), KeepHeads(1, (1,)))
    before = model.layout()
    secateur.prune(model, "2ssp", sparsity=0.5, alpha=4.0, calibration=tiny_tokens(model, 2, 8))
    gone = before.block_parameters - model.layout().block_parameters
    sizes = [block.attention + block.attention_norms for block in before.blocks.values()]
    neurons = sum(block.neuron for block in before.blocks.values())
    assert abs(gone - 0.5 * before.block_parameters) <= max(sizes) / 2 + neurons / 2
