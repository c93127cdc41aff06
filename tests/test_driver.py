"""The driver: an edit is real before the method resumes; filters see, change and add edits; the account is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import parameters, tiny, tiny_tokens
from oracles import edit_facts, edited

from secateur.driver import Filter, Pruning, run_method
from secateur.engine.tokens import Tokens
from secateur.errors import CheckpointError, InvalidEditError
from secateur.methods import Method
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import Run
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, Edit, KeepNeurons, SetWeight


def of(prune: Callable[..., Iterator[Edit]]) -> Method:
    return Method("test", prune, "p", "blocks", 1, 4, "@b", (DropBlock,))


def run(model: Model, prune: Callable[..., Iterator[Edit]], **options: Any) -> Pruning:
    return run_method(model, of(prune), tiny_tokens(model, 2, 5), Budget(0.5, of="model"), Run(4), **options)


def test_an_edit_is_real_when_the_method_resumes() -> None:
    edits = [KeepNeurons(1, (0, 5, 9)), DropAttention(2), DropBlock(0), DropMLP(3)]  # numbers stay those as loaded
    seen: list[Any] = []

    def method(model: Model, tokens: Tokens, budget: Budget, run: Run, *, extra: int = 7) -> Iterator[Edit]:
        """A method.

        Args:
            extra: some.
        """
        assert (tokens.samples, tokens.length, budget.of, run.seed) == (2, 5, "model", 4)
        for place, edit in enumerate(edits, start=1):
            yield edit
            assert model.layout() == edited(tiny("qwen3"), *edits[:place]).layout()
        seen.append(extra)

    model = tiny("qwen3")
    before = model.layout()
    pruning = run(model, method, extra=8)
    assert seen == [8]
    assert (pruning.method, pruning.options, pruning.budget) == ("test", {"extra": 8}, Budget(0.5, of="model"))
    assert edit_facts(pruning.edits) == edit_facts(edits)
    assert (pruning.before, pruning.after) == (before, model.layout())
    assert pruning.after.parameters == parameters(model)
    assert model.fingerprint() == edited(tiny("qwen3"), *edits).fingerprint()


def narrow(model: Model, tokens: Tokens, budget: Budget, run: Run) -> Iterator[Edit]:
    """Keep four neurons everywhere, and drop an attention."""
    for number in model.numbers:
        yield KeepNeurons(number, (0, 1, 2, 3))
    yield DropAttention(1)


def refit(model: Model, tokens: Tokens, run: Run, edits: Iterator[Edit]) -> Iterator[Edit]:
    """Fill in output weights."""
    assert (tokens.samples, run.seed) == (2, 4)
    for edit in edits:
        if isinstance(edit, KeepNeurons):
            with model.open(edit.block) as block:
                assert block.shape.width > 4  # before the edit
                weight = torch.full((block.mlp_out.out_features, len(edit.index)), float(edit.block))
            yield KeepNeurons(edit.block, edit.index, weight)
        else:
            yield edit


def leave_out(model: Model, tokens: Tokens, run: Run, edits: Iterator[Edit]) -> Iterator[Edit]:
    """Spare the attentions, and zero what `refit` made of block 2."""
    for edit in edits:
        if not isinstance(edit, DropAttention):
            yield edit
        if isinstance(edit, KeepNeurons) and edit.block == 2:
            assert edit.out_weight is not None
            assert bool((edit.out_weight == 2).all())  # the filter before has done its work
            with model.open(2) as block:
                assert torch.equal(block.mlp_out.weight, edit.out_weight)  # and the edit is real here, too
            yield SetWeight(2, "mlp_out", torch.zeros_like(edit.out_weight))


def test_filters_compose_and_may_change_edits() -> None:
    model = tiny("qwen3")
    pruning = run(model, narrow, filters=[Filter("refit", (), refit), Filter("spare", (SetWeight,), leave_out)])
    assert [type(edit).__name__ for edit in pruning.edits] == ["KeepNeurons"] * 3 + ["SetWeight", "KeepNeurons"]
    for number in range(4):
        with model.open(number) as block:
            assert block.has_attention
            weight = block.mlp_out.weight
            assert torch.equal(weight, torch.full_like(weight, 0 if number == 2 else number))
    with pytest.raises(InvalidEditError, match="only names its weight"):  # what is kept of an edit has no bytes
        edited(tiny("qwen3"), *pruning.edits)


def test_a_method_that_prunes_by_itself_is_found_out() -> None:
    def method(model: Model, tokens: Tokens, budget: Budget, run: Run) -> Iterator[Edit]:
        """Change the model behind the driver's back."""
        yield DropMLP(0)
        model.blocks[1].mlp.down_proj = torch.nn.Linear(3, model.hidden_size, bias=False)

    with pytest.raises(CheckpointError, match="not the one that its edits predict"):
        run(tiny("qwen3"), method)


def test_an_edit_that_does_not_fit_stops_the_run() -> None:
    def method(model: Model, tokens: Tokens, budget: Budget, run: Run) -> Iterator[Edit]:
        """Drop a block twice."""
        yield DropBlock(2)
        yield DropBlock(2)

    with pytest.raises(InvalidEditError, match="block 2 is not there"):
        run(tiny("qwen3"), method)
