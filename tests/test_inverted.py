"""2SSP with rows and columns inverted: it equals a really smaller FFN, leaves the weights alone, and counts right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import logits, tiny, tiny_tokens
from transformers import AutoModelForCausalLM, LlamaConfig

from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.grid.inverted import AMOUNTS, complete, direction_norms, inverted, plan, rehearsed
from secateur.methods.two_ssp import attention_count
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run


def smollm2() -> Model:
    """SmolLM2-135M in numbers, without weights."""
    config = LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=128, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        return Model(AutoModelForCausalLM.from_config(config))


def foretold(model: Model, budget: Budget, **options: Any) -> dict[str, float]:
    return rehearsed(model, 2, 12, budget, **options)[1].achieved(model.layout())


def removed(layout: Layout, budget: Budget, amount: str) -> float:
    made = plan(layout, budget, amount)  # type: ignore[arg-type]
    blocks = list(layout.blocks.values())
    directions = (made.hidden - made.kept) * sum(3 * block.shape.width for block in blocks)
    attentions = made.attentions * (blocks[0].attention + blocks[0].attention_norms)
    return (directions + attentions) / layout.block_parameters


def test_as_published_it_removes_56_7_percent_of_smollm2_when_asked_for_50() -> None:
    model = smollm2()
    layout = model.layout()
    assert removed(layout, Budget(0.5), "published") == pytest.approx(0.567, abs=0.001)
    assert removed(layout, Budget(0.5), "equal") == pytest.approx(0.5, abs=0.001)
    for amount in AMOUNTS:  # as a dry run foretells it
        assert foretold(model, Budget(0.5), amount=amount)["blocks"] == pytest.approx(
            removed(layout, Budget(0.5), amount)
        )
    assert plan(layout, Budget(0.5), "equal").attentions == attention_count(layout, 0.5, 1.5) == 8


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_muting_equals_ffns_that_really_lack_the_directions(family: str) -> None:
    model = tiny(family)
    tokens = tiny_tokens(model, 2, 12)
    budget = Budget(0.4)
    whole, before = copy.deepcopy(model), logits(model, tokens.ids)
    norms = direction_norms(model, tokens, Run())
    with inverted(model, tokens, budget, Run()) as result:
        muted = logits(model, tokens.ids)
    assert result.achieved(whole.layout()) == pytest.approx(foretold(whole, budget))
    gone = {n for n, block in result.after.blocks.items() if not block.attention}
    assert len(gone) == result.plan.attentions
    for number in whole.numbers:  # zero what a smaller FFN would not have
        with whole.open(number) as block:
            reads, writes = (each.argsort(descending=True, stable=True) for each in norms[str(number)])
            for role in ("gate", "up", "gate_up"):
                if role in block.roles:
                    block.weight(role).data[:, reads[result.plan.kept :]] = 0
            block.weight("mlp_out").data[writes[result.plan.kept :]] = 0
            if block.mlp_out.bias is not None:
                block.mlp_out.bias.data[writes[result.plan.kept :]] = 0
            if number in gone:
                block.weight("attention_out").data.zero_()
                if block.attention_out.bias is not None:
                    block.attention_out.bias.data.zero_()
    assert torch.allclose(logits(whole, tokens.ids), muted, atol=1e-5)
    assert not torch.allclose(muted, before, atol=1e-2)


def test_the_ffns_are_whole_again_after_the_context_even_after_an_error() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 1, 12)
    budget = Budget(0.02)  # no attention goes
    assert plan(model.layout(), budget, "published").attentions == 0
    before, weights = logits(model, tokens.ids), model.fingerprint()

    def judge() -> None:
        with inverted(model, tokens, budget, Run()):
            assert not torch.equal(logits(model, tokens.ids), before)
            raise RuntimeError("a judge's error")

    with pytest.raises(RuntimeError, match="judge"):
        judge()
    assert torch.equal(logits(model, tokens.ids), before)
    assert model.fingerprint() == weights


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
    assert torch.allclose(found[0], sum(x.double().norm(dim=0) for x in seen[0::2]), rtol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(found[1], sum(x.double().norm(dim=0) for x in seen[1::2]), rtol=1e-5)  # type: ignore[arg-type]


def test_its_cost_is_foretold() -> None:
    model = tiny("llama")
    tokens, budget, run = tiny_tokens(model, 3, 12), Budget(0.5), Run()
    cost, _ = rehearsed(model, 3, 12, budget)
    with inverted(model, tokens, budget, run):
        pass
    assert run.meter.block_tokens == pytest.approx(cost.block_tokens, rel=0.1)
    assert run.meter.head_tokens == cost.head_tokens


def test_what_cannot_be_is_refused() -> None:
    layout = tiny("llama").layout()
    with pytest.raises(InfeasibleBudgetError, match="directions"):
        plan(layout, Budget(0.9), "published")
    with pytest.raises(InvalidOptionError, match="equal"):
        plan(layout, Budget(0.5), "both")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="positive"):
        plan(layout, Budget(0.5), "equal", alpha=0)
    with pytest.raises(InvalidOptionError, match=r"no norm; .* alpha only"):
        complete({"alpha": 2.0, "norm": "l1"})


def test_alpha_is_that_of_equation_5() -> None:
    layout = smollm2().layout()
    for alpha in (0.5, 1.5, 3.0):
        assert plan(layout, Budget(0.5), "equal", alpha=alpha).attentions == attention_count(layout, 0.5, alpha)
