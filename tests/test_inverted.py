"""2SSP with rows and columns inverted: it equals a really smaller FFN, leaves the weights alone, and counts right."""

from __future__ import annotations

import pytest
import torch
from models import logits, tiny, tiny_tokens
from transformers import AutoModelForCausalLM, LlamaConfig

from secateur.driver import run_method
from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.grid.cells import Calibration, Cell
from secateur.grid.inverted import METHOD, NAME, SIZES, Size, direction_norms, invert
from secateur.grid.pruning import counted, plan_cell
from secateur.methods import methods
from secateur.methods.two_ssp import attention_count
from secateur.model.budget import Budget, shares
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.planning import Plan
from secateur.run import Run


def smollm2() -> Model:
    """SmolLM2-135M in numbers, without weights."""
    config = LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=128, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        return Model(AutoModelForCausalLM.from_config(config))


def planned(
    model: Model, budget: Budget, amount: Size = "published", samples: int = 2
) -> tuple[Plan, dict[str, float]]:
    calibration = Calibration(text="", samples=3, length=12)
    options = {"amount": amount}
    cell = Cell(name="c", method=NAME, label="c", sparsity=budget.sparsity, options=options, calibration=calibration)
    plan = plan_cell(cell, model)
    return plan, shares(plan.before, counted(cell, plan.before, plan.after))


def removed(layout: Layout, budget: Budget, amount: Size) -> float:
    made = invert(layout, budget, amount)
    blocks = list(layout.blocks.values())
    directions = (made.hidden - made.kept) * sum(3 * block.shape.width for block in blocks)
    attentions = made.attentions * (blocks[0].attention + blocks[0].attention_norms)
    return (directions + attentions) / layout.block_parameters


def test_as_published_it_removes_56_7_percent_of_smollm2_when_asked_for_50() -> None:
    model = smollm2()
    layout = model.layout()
    assert removed(layout, Budget(0.5), "published") == pytest.approx(0.567, abs=0.001)
    assert removed(layout, Budget(0.5), "equal") == pytest.approx(0.5, abs=0.001)
    for amount in SIZES:  # as a dry run foretells it
        foretold = planned(model, Budget(0.5), amount)[1]["blocks"]
        assert foretold == pytest.approx(removed(layout, Budget(0.5), amount))
    assert invert(layout, Budget(0.5), "equal").attentions == attention_count(layout, 0.5, 1.5) == 8


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_muting_equals_ffns_that_really_lack_the_directions(family: str) -> None:
    model = tiny(family)
    tokens = tiny_tokens(model, 2, 12)
    budget = Budget(0.4)
    whole, before = tiny(family), logits(model, tokens.ids)
    norms = direction_norms(model, tokens, Run())
    layout, inversion = model.layout(), invert(model.layout(), budget, "published")
    pruning = run_method(model, METHOD, tokens, budget, Run())
    muted = logits(model, tokens.ids)
    counted = inversion.counted(pruning.after)
    assert shares(layout, counted) == pytest.approx(planned(whole, budget)[1])
    gone = {n for n, block in pruning.after.blocks.items() if not block.attention}
    assert len(gone) == inversion.attentions
    for number in whole.numbers:  # zero what a smaller FFN would not have
        with whole.open(number) as block:
            reads, writes = (each.argsort(descending=True, stable=True) for each in norms[str(number)])
            for role in ("gate", "up", "gate_up"):
                if role in block.roles:
                    block.weight(role).data[:, reads[inversion.kept :]] = 0
            block.weight("mlp_out").data[writes[inversion.kept :]] = 0
            if block.mlp_out.bias is not None:
                block.mlp_out.bias.data[writes[inversion.kept :]] = 0
            if number in gone:
                block.weight("attention_out").data.zero_()
                if block.attention_out.bias is not None:
                    block.attention_out.bias.data.zero_()
    assert torch.allclose(logits(whole, tokens.ids), muted, atol=1e-5)
    assert not torch.allclose(muted, before, atol=1e-2)


def test_no_weight_is_touched() -> None:
    model, budget = tiny("llama"), Budget(0.02)
    assert invert(model.layout(), budget, "published").attentions == 0
    weights, before = model.fingerprint(), logits(model, tiny_tokens(model, 1, 12).ids)
    run_method(model, METHOD, tiny_tokens(model, 1, 12), budget, Run())
    assert model.fingerprint() == weights
    assert not torch.equal(logits(model, tiny_tokens(model, 1, 12).ids), before)


def test_norms_are_those_of_what_enters_and_leaves_the_ffn() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 3, 12)
    seen: list[torch.Tensor] = []
    with model.open(2) as block:
        handle = block.module.get_submodule("mlp").register_forward_hook(
            lambda module, args, output: seen.extend([args[0][0], output[0]])
        )
    for window in tokens.ids:
        logits(model, window[None])
    handle.remove()
    found = direction_norms(model, tokens, Run())["2"]
    for norms, states in zip(found, (seen[0::2], seen[1::2]), strict=True):
        assert torch.allclose(norms, torch.stack([x.double().norm(dim=0) for x in states]).sum(dim=0), rtol=1e-5)


def test_its_cost_is_foretold() -> None:
    model, budget, run = tiny("llama"), Budget(0.5), Run()
    cost = planned(model, budget)[0].meter
    run_method(model, METHOD, tiny_tokens(model, 3, 12), budget, run)
    assert run.meter.block_tokens == pytest.approx(cost.block_tokens, rel=0.1)
    assert run.meter.head_tokens == cost.head_tokens


def test_what_cannot_be_is_refused() -> None:
    layout = tiny("llama").layout()
    with pytest.raises(InfeasibleBudgetError, match="directions"):
        invert(layout, Budget(0.9), "published")
    with pytest.raises(InvalidOptionError, match="equal"):
        METHOD.complete({"amount": "both"})
    with pytest.raises(InvalidOptionError, match="positive"):
        invert(layout, Budget(0.5), "equal", alpha=0)
    assert NAME not in methods()  # nobody can save what it leaves


def test_alpha_is_that_of_equation_5() -> None:
    layout = smollm2().layout()
    for alpha in (0.5, 1.5, 3.0):
        assert invert(layout, Budget(0.5), "equal", alpha=alpha).attentions == attention_count(layout, 0.5, alpha)
