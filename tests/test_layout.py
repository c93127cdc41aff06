"""Layouts: the numbers read off the real modules are those that arithmetic predicts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    BLOCKS,
    COVERING,
    FAMILY_NAMES,
    LAYOUTS,
    REBASABLE,
    STOCK_LAYOUTS,
    STREAM_LAYOUTS,
    apply_all,
    layouts,
    logits,
    orthonormal,
    parameters,
    tiny,
    tiny_closed,
    tiny_in,
    tiny_tokens,
)

from secateur.model.layout import Layout
from secateur.model.modeling_secateur import shapes_from
from secateur.surgery import edits
from secateur.surgery.apply import apply, predict
from secateur.surgery.edits import Edit


def possible_edits(layout: Layout, rebasable: bool) -> st.SearchStrategy[Edit]:
    """Any edit that changes the layout and that a model of this layout allows."""

    def some(size: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.sets(st.integers(0, size - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))

    choices: list[st.SearchStrategy[Edit]] = []
    for number, block in layout.blocks.items():
        if block.attention:
            choices.append(st.just(edits.DropAttention(number)))
            choices.append(some(block.shape.kv_heads).map(lambda kept, number=number: edits.KeepHeads(number, kept)))
        if block.mlp:
            choices.append(st.just(edits.DropMLP(number)))
            choices.append(some(block.shape.width).map(lambda kept, number=number: edits.KeepNeurons(number, kept)))
        if len(layout.blocks) > 1:
            choices.append(st.just(edits.DropBlock(number)))
    if rebasable and layout.is_folded:
        at, less = st.sampled_from([(site, layout.stream_width(site)) for site in layout.sites]), st.integers(0, 3)
        choices += 3 * [
            st.builds(lambda at, less: edits.Rebase(at[0], orthonormal(at[1], max(1, at[1] - less))), at, less)
        ]
    elif rebasable:
        choices += 3 * [st.just(edits.FoldNorms())]
    if rebasable and layout.ends.tied and not layout.is_rebased:
        choices.append(st.just(edits.UntieHead()))
    return st.one_of(choices)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(family=st.sampled_from(FAMILY_NAMES), closed=st.booleans(), data=st.data())
def test_the_real_layout_is_the_predicted_one(family: str, closed: bool, data: st.DataObject) -> None:
    model = tiny_closed(family) if closed else tiny(family)
    predicted = model.layout()
    for _ in range(data.draw(st.integers(1, 7))):
        if not any(block.attention or block.mlp for block in predicted.blocks.values()) and len(model.numbers) == 1:
            break
        edit = data.draw(possible_edits(predicted, model.family.no_rebase is None))
        predicted = predict(predicted, edit)
        apply(model, edit)
        assert model.layout() == predicted
        assert predicted.parameters == parameters(model)
        assert list(predicted.blocks) == model.numbers
        assert len(model.blocks) == len(model.numbers) == model.hf.config.num_hidden_layers
        assert shapes_from(model.hf.config, model.family) == [block.shape for block in predicted.blocks.values()]
    if not closed:
        assert torch.isfinite(logits(model, tiny_tokens(model, 1, 8).ids)).all()


@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_hollow_twin_is_the_model_without_weights(family: str, every: bool) -> None:
    names = {*LAYOUTS, *STREAM_LAYOUTS} if every else set(COVERING)
    for name in sorted(names - (set() if family in REBASABLE else set(STREAM_LAYOUTS))):
        model = tiny_in(name, family)
        twin = model.hollow()
        assert all(parameter.is_meta for parameter in twin.hf.parameters())
        assert not any(parameter.is_meta for parameter in model.hf.parameters())
        assert (twin.layout(), twin.numbers, twin.source) == (model.layout(), model.numbers, model.source), name
        assert (twin.dtype, twin.vocab_size, twin.head_cost) == (model.dtype, model.vocab_size, model.head_cost)
        further: list[Edit] = [edits.DropBlock(model.numbers[0])] if len(model.numbers) > 1 else []
        if (block := model.layout().blocks[model.numbers[-1]]).mlp:
            further.append(edits.KeepNeurons(model.numbers[-1], tuple(range(0, block.shape.width, 2))))
        before = model.layout()
        apply_all(twin, further)
        assert model.layout() == before  # they share nothing
        assert twin.layout() == apply_all(model, further).layout() == twin.hollow().layout(), name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_parameter_is_counted_once_and_goes_with_its_block(family: str) -> None:
    model = tiny(family)
    layout = model.layout()
    assert layout.parameters == parameters(model)
    for number, block in layout.blocks.items():
        assert block.parameters == sum(p.numel() for p in model.blocks[number].parameters())
        with model.open(number) as open_block:
            bias = open_block.mlp_out.bias
        assert block.mlp == block.shape.width * block.neuron + (0 if bias is None else bias.numel())
    matrices = model.hf.get_input_embeddings().weight.numel() * (1 if model.hf.config.tie_word_embeddings else 2)
    assert matrices <= layout.other < matrices + model.hf.get_input_embeddings().weight.numel()
    apply(model, edits.DropBlock(BLOCKS - 1))
    assert layout.parameters - parameters(model) == layout.blocks[BLOCKS - 1].parameters


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_one_shape_without_gaps_is_uniform(name: str) -> None:
    model = tiny("llama")
    before = model.layout()
    assert apply_all(model, layouts(model)[name]).layout().uniform == (name in STOCK_LAYOUTS)
    predict(before, edits.DropBlock(0))
    assert before == tiny("llama").layout()  # it does not change under way
