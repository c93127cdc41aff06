"""What every registered method owes, whatever it does: edits and nothing else, the same again, a budget that is met.

A new method adds one line to `SETTINGS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import apply_all, logits, tiny, tiny_closed, tiny_in, tiny_tokens
from oracles import edited, lopsided, planned
from torch import Tensor

import secateur
from secateur.driver import Pruning, run_method
from secateur.engine.tokens import Tokens
from secateur.errors import DataError, InvalidOptionError, NumericalError, UnsupportedEditError
from secateur.methods import Method, get_method, methods, registry
from secateur.methods.slicegpt import sliced
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.surgery.edits import Edit, from_json, to_json
from secateur.testing import TINY_OPTIONS, Contract, edit_facts


@dataclass(frozen=True)
class Setting:
    """How a method is tried on tiny models.

    Attributes:
        unit: of what it removes, in parameters: the target may be missed by as much.
        options: its own; `variants` are further ones, of which each must keep the contract too.
        wrong: options' values that it must refuse by itself, beyond their kind.
        spread: how many times more or less than planned the work may be, where parts are searched for.
        families: that it is tried on.
    """

    unit: Callable[[Layout], float]
    options: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    wrong: tuple[dict[str, Any], ...] = ()
    spread: float = 1.0
    families: tuple[str, ...] = ("llama", "phi3", "gpt_neox")


def a_neuron_per_block_or_attention(layout: Layout) -> float:
    rows = sum(block.neuron for block in layout.blocks.values())
    attentions = [block.attention for block in layout.blocks.values() if block.attention]
    return rows / 2 + max(attentions) - min(attentions)  # which attention goes is not planned


def a_neuron(layout: Layout) -> float:
    return max(block.neuron for block in layout.blocks.values())


def a_block(layout: Layout) -> float:
    return max(block.parameters for block in layout.blocks.values())


def a_module(layout: Layout) -> float:
    return max(
        max(block.attention + block.attention_norms, block.mlp + block.mlp_norms) for block in layout.blocks.values()
    )


def two_directions(layout: Layout) -> float:
    """What the widest two cost, skip matrices included."""
    widest = max(layout.stream_width(site) for site in layout.sites[:-1])
    full, less = (sliced(layout, widest - k, slice_head=False, untie=False) for k in (1, 3))
    return full.block_parameters - less.block_parameters


OWN: dict[str, dict[str, Any]] = {name: dict(options) for name, options in TINY_OPTIONS.items()}
SETTINGS: dict[str, Setting] = {
    "2ssp": Setting(a_neuron_per_block_or_attention, OWN["2ssp"],
                    ({"attentions": 2, "criterion": "kl"}, {"score": "elimination", "attentions": 3, "screen": 2},
                     {"score": "ranges"}),
                    ({"score": "obs", "norm": "l1"}, {"screen": 0}, {"alpha": 0}, {"alpha": -1.5}, {"alpha": math.nan},
                     {"attentions": -1}, {"attentions": 5}, {"search_samples": 0}, {"search_samples": 3},
                     {"search_length": 1}, {"search_length": 9}),
                    spread=1.1),
    "shortgpt": Setting(a_block, {}, ({"positions": "last"},)),
    "window": Setting(a_block, {}, ({"positions": "all"},)),
    "blockpruner": Setting(a_module, {}, ({"alternate": True, "criterion": "kl"}, {"screen": 2}),
                           ({"search_samples": 9}, {"screen": 0}),
                           spread=1.1),
    "evopress": Setting(a_block, OWN["evopress"], ({**OWN["evopress"], "units": "blocks", "criterion": "ppl"},), (
        {"generations": 0}, {"offspring": 0}, {"initial": 0}, {"max_mutations": 0}, {"initial_tokens": 1},
        {"initial_tokens": 17}, {"selection_tokens": "8,17"}, {"selection_tokens": "8"}, {"selection_tokens": "1,8"},
        {"survivors": "2,1,1"}, {"survivors": "1,2"}, {"survivors": "7,1"}, {"survivors": ""}, {"survivors": "2;1"},
        {"survivors": "2,0"}, {"survivors": "-2,1"}, {"survivors": "4,4", "initial": 3},
    ), spread=1.2),  # how often a parent survives cannot be foretold
    "slimgpt": Setting(a_neuron, OWN["slimgpt"],
                       ({"ratio": "uniform", "head_error": "exact", "compensate": False, "rounding": "carry"},),
                       ({"group": 0}, {"damping": -0.1}, {"damping": math.inf}, {"first_ratio": 2.0})),
    "secateur": Setting(a_neuron, {}, (
        {"allocation": "uniform", "sequential": False, "score": "activation"}, {"compensate": False},
        {"target": "original", "score": "ranges"}, {"target": "dense", "share": 1.0},
        {"allocation": "searched", "search_samples": 1, "search_rounds": 2},
    ), ({"first": -0.1}, {"ends": -0.1}, {"damping": -0.1}, {"share": 1.5}, {"shrinkage": -0.1},
        {"target": "dense", "sequential": False}),
        spread=1.1),
    "slicegpt": Setting(two_directions, OWN["slicegpt"],
                        ({"multiple": 2, "slice_head": True, "signal": "norm"}, {"mean_centre": True}),
                        ({"dimension": 0}, {"dimension": 32}, {"multiple": 32}), families=("llama", "phi3", "qwen3")),
}  # fmt: skip
ORDERS = [name for name, method in methods().items() if "order" in method.options]
BUDGET = Budget(0.5)

EVERY = pytest.mark.parametrize(
    ("name", "family"),
    [pytest.param(name, family, marks=[pytest.mark.slow] * (family != each.families[0]))
     for name, each in SETTINGS.items() for family in each.families],
)  # fmt: skip
ONCE = pytest.mark.parametrize("name", SETTINGS)
# A replay, which prunes, is tried with all options; what else they all owe is slow but for a method's first.
VARIANTS = [(name, {**each.options, **variant}) for name, each in SETTINGS.items() for variant in ({}, *each.variants)]
FIRST = [
    pytest.param(name, options, marks=[pytest.mark.slow] * (options != SETTINGS[name].options))
    for name, options in VARIANTS
]
EVERY_VARIANT, FIRST_VARIANT = (
    pytest.mark.parametrize(("name", "options"), each, ids=str) for each in (VARIANTS, FIRST)
)


def tokens_for(model: Model) -> Tokens:
    return tiny_tokens(model, 2, 8)


def prune(model: Model, method: Method, run: Run | None = None, budget: Budget = BUDGET, **options: Any) -> Pruning:
    chosen = options or SETTINGS[method.name].options
    return run_method(model, method, tokens_for(model), budget, run or Run(), **chosen)


def contract(
    name: str, model: Callable[[], Model], options: dict[str, Any] | None = None, budget: Budget = BUDGET, **how: Any
) -> Contract:
    setting = SETTINGS[name]
    chosen = setting.options if options is None else options
    return Contract(method=name, options=chosen, unit=setting.unit, model=model, budget=budget, **how)


def shaped(shape: str, family: str = "llama", **overrides: Any) -> Model:
    if shape == "sliced stream":
        return tiny_in(shape, family)
    model = tiny(family, **overrides)
    return lopsided(model) if shape == "lopsided" else model


def test_every_method_is_under_contract() -> None:
    assert set(SETTINGS) == set(methods())


# --- edits and nothing else ---


def test_a_family_that_cannot_do_what_a_method_needs_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, method in methods().items():
        model, run = tiny("llama"), Run()
        monkeypatch.setattr(model, "family", replace(model.family, cannot={method.edits[0].__name__: "of a whim"}))
        with pytest.raises(UnsupportedEditError, match=f"llama cannot do {method.edits[0].__name__}: of a whim"):
            prune(model, method, run, **SETTINGS[name].options)
        with pytest.raises(UnsupportedEditError, match="of a whim"):
            secateur.prune(model, name, sparsity=0.5, calibration=tokens_for(model))
        assert run.meter.block_tokens == model.edits_applied == 0


@FIRST_VARIANT
@pytest.mark.parametrize("shape", ["dense", pytest.param("lopsided", marks=pytest.mark.slow)])
def test_only_the_driver_changes_the_model(name: str, options: dict[str, Any], shape: str) -> None:
    contract(name, lambda: shaped(shape), options).changes_by_edits_alone()


@EVERY_VARIANT
def test_the_same_again_and_a_replay_costs_no_forward(name: str, options: dict[str, Any]) -> None:
    contract(name, lambda: tiny("qwen2"), options).replays()


def check_closed(name: str, family: str, options: dict[str, Any]) -> None:
    model, closed, method = tiny(family), tiny_closed(family), get_method(name)
    edits = prune(model, method, **options).edits
    assert edit_facts(prune(closed, method, **options).edits) == edit_facts(edits)
    assert closed.whole().fingerprint() == model.fingerprint()


@EVERY
def test_closed_blocks_have_no_weights(name: str, family: str) -> None:
    check_closed(name, family, SETTINGS[name].options)


@pytest.mark.slow
@EVERY_VARIANT
def test_closed_blocks_have_no_weights_whatever_the_options(name: str, options: dict[str, Any]) -> None:
    check_closed(name, "qwen2", options)


@pytest.mark.parametrize("name", ORDERS)
def test_both_orders_of_a_walk_give_the_same_edits(name: str) -> None:
    method, options = get_method(name), SETTINGS[name].options
    by_order = [prune(tiny("mistral"), method, **{**options, "order": o}).edits for o in ("samples", "blocks")]
    assert edit_facts(by_order[0]) == edit_facts(by_order[1])


# --- the budget ---


@EVERY
@pytest.mark.parametrize(
    ("shape", "budget"),
    [("dense", Budget(0.5)), ("dense", Budget(0.3, of="model", round_to=2)), ("lopsided", Budget(0.4))], ids=str,
)  # fmt: skip
def test_the_target_is_met_to_a_unit(name: str, family: str, shape: str, budget: Budget) -> None:
    contract(name, lambda: shaped(shape, family), budget=budget).meets_the_budget()


@FIRST_VARIANT
def test_an_impossible_target_is_refused_with_what_can_be_reached(name: str, options: dict[str, Any]) -> None:
    contract(name, lambda: tiny("llama"), options).refuses_what_cannot_be()


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, each in SETTINGS.items() for wrong in each.wrong])
def test_bad_options_are_refused_before_anything_happens(name: str, wrong: dict[str, Any]) -> None:
    model, run, method = tiny("llama"), Run(), get_method(name)
    before, wrong = model.fingerprint(), method.complete({**SETTINGS[name].options, **wrong})
    with pytest.raises(InvalidOptionError):
        prune(model, method, run, **wrong)
    with pytest.raises(InvalidOptionError):
        planned(model, name, BUDGET, 2, 8, **wrong)
    assert (model.fingerprint(), run.meter.block_tokens) == (before, 0)


@pytest.mark.parametrize("name", ["2ssp", "blockpruner"])  # whose defaults search on the first windows
def test_a_search_on_windows_where_nothing_counts_is_refused_in_time(name: str) -> None:
    model, run = tiny("llama"), Run()
    tokens, weights, before = tokens_for(model), torch.ones(2, 8), model.fingerprint()
    weights[0, 1:] = 0  # a window's first token is not predicted
    tokens = Tokens.of(tokens.ids, weights)
    with pytest.raises(DataError, match="search_samples"):
        run_method(model, get_method(name), tokens, BUDGET, run, **SETTINGS[name].options)
    assert (model.fingerprint(), run.meter.block_tokens) == (before, 0)
    run_method(model, get_method(name), tokens, BUDGET, run, **{**SETTINGS[name].options, "search_samples": 2})


@pytest.mark.parametrize("name", ["2ssp", "shortgpt", "window", "slimgpt", "slicegpt"])  # a search passes it over
def test_numbers_that_overflow_are_an_error_not_a_choice(name: str) -> None:
    model = tiny("qwen3")
    with model.open(2) as block, torch.no_grad():
        block.linear("mlp.up_proj").weight[3] = torch.nan
    with pytest.raises(NumericalError):
        prune(model, get_method(name), **SETTINGS[name].options)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [pytest.param(
        name, {**each.options, **variant}, shape, marks=[pytest.mark.slow] * ((shape, variant) != ("dense", {}))
     )
     for name, each in SETTINGS.items() for variant in ({}, *each.variants)
     for shape in ("dense", "lopsided", "sliced stream")
     if shape != "sliced stream" or not variant],
    ids=str,
)  # fmt: skip
def test_the_cost_is_what_was_rehearsed(name: str, options: dict[str, Any], shape: str) -> None:
    # which parts go, and so which prefixes are shared, is not known; of a screened search nor which few are tried
    spread = 1.2 if options.get("screen") else SETTINGS[name].spread
    tried = contract(
        name, lambda: shaped(shape, num_hidden_layers=8), options,
        spread=1.4 if spread > 1 and shape != "dense" else spread,
    )  # fmt: skip
    tried.costs_what_was_planned()
    if shape == "dense":
        model = tried.model()
        assert tried.planned(model).held_bytes >= 8 * model.hidden_size * 4  # a window's states


@ONCE
def test_a_plan_is_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator runs twice: on the hollow twin, and for real."""
    runs: list[bool] = []
    method = get_method(name)

    def counted(model: Model, tokens: Tokens, budget: Budget, run: Run, **options: Any) -> Iterator[Edit]:
        runs.append(run.rehearses)
        return method.prune(model, tokens, budget, run, **options)

    monkeypatch.setitem(registry._METHODS, name, replace(method, prune=functools.wraps(method.prune)(counted)))
    model = tiny("llama")
    secateur.prune(model, name, sparsity=0.5, calibration=tokens_for(model), **SETTINGS[name].options)
    assert runs == [True, False]


# --- afterwards ---


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Model, dict[str, Any], Path]]:
    """A model pruned by a method through the API, its record, and its checkpoint; made once."""
    made: dict[str, tuple[Model, dict[str, Any], Path]] = {}

    def get(name: str) -> tuple[Model, dict[str, Any], Path]:
        if name not in made:
            model = tiny("llama")
            pruned = secateur.prune(model, name, sparsity=0.5, calibration=tokens_for(model), **SETTINGS[name].options)
            folder = tmp_path_factory.mktemp("models") / "model"
            secateur.save(pruned, folder)
            made[name] = model, pruned.record, folder
        return made[name]

    return get


@ONCE
def test_a_record_is_replayed_and_a_checkpoint_is_the_model(name: str, chain: Any) -> None:
    model, record, folder = chain(name)
    assert record.cost.forwards_asked > 0
    edits = record.edits
    if not any(isinstance(value, dict) for edit in edits for value in edit.values()):  # tensors are only named
        replayed = apply_all(tiny("llama"), map(from_json, edits))
        assert replayed.fingerprint() == model.fingerprint()
        assert [to_json(from_json(edit)) for edit in edits] == edits
    loaded = secateur.load(str(folder))
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.layout() == model.layout()
    ids = tokens_for(model).ids
    assert same(logits(loaded, ids), logits(model, ids))


def same(one: Tensor, other: Tensor) -> bool:
    return bool((one == other).all())


@pytest.mark.parametrize("second", SETTINGS)
@pytest.mark.parametrize(
    "first", [name if name == "slicegpt" else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_a_pruned_model_is_pruned_again_by_any_method(first: str, second: str, chain: Any) -> None:
    model = edited(chain(first)[0])
    before, unit = model.layout(), SETTINGS[second].unit(model.layout())
    pruned = secateur.prune(model, second, sparsity=0.4, calibration=tokens_for(model), **SETTINGS[second].options)
    gone = before.block_parameters - model.layout().block_parameters
    assert abs(gone - 0.4 * before.block_parameters) <= unit
    assert [parent.method for parent in pruned.record.parents] == [first]
