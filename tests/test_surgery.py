"""Edits: a sliced model is the dense one with the removed parts silenced, and a refused edit changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from models import (
    BLOCKS,
    FAMILY_NAMES,
    LAYOUTS,
    VOCABULARY,
    apply_all,
    layouts,
    logits,
    possible,
    random,
    tiny,
    tiny_closed,
    tiny_config,
)
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from secateur.errors import InvalidEditError, UnsupportedEditError
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES
from secateur.surgery.apply import apply
from secateur.surgery.edits import (
    BlockEdit,
    DropAttention,
    DropBlock,
    DropMLP,
    Edit,
    KeepHeads,
    KeepNeurons,
    SetWeight,
    from_json,
    keep,
    to_json,
)

IDS = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7))
SINGLE_FAMILIES = ("llama", "phi3", "opt")


def single_edits(model: Model) -> dict[str, Edit]:
    """One edit of each kind, at a block in the middle."""
    with model.open(2) as block:
        shape, rows = block.shape, block.weight("mlp_out").shape[0]
        head_columns = block.weight("attention_out").shape[1] // shape.kv_heads
    neurons = (0, 5, shape.width - 1)
    return {
        "DropBlock": DropBlock(2),
        "DropAttention": DropAttention(2),
        "DropMLP": DropMLP(2),
        "KeepNeurons": KeepNeurons(2, neurons),
        "KeepNeurons with a refit": KeepNeurons(2, neurons, random(rows, 3)),
        "KeepHeads": KeepHeads(2, tuple(range(1, shape.kv_heads))),
        "KeepHeads with a refit": KeepHeads(2, (0,), random(rows, head_columns)),
        "SetWeight": SetWeight(2, "mlp_out", random(rows, shape.width)),
    }


SINGLE_EDITS = tuple(single_edits(tiny("llama")))


@torch.no_grad()
def silence(model: Model, edits: Iterable[Edit]) -> Model:
    """The dense model with what the edits remove (once per block and module) multiplied by zero, at full size."""
    for edit in edits:
        with model.open(edit.block) as block:
            attention, mlp = block.attention_out, block.mlp_out
            if isinstance(edit, KeepNeurons):
                columns = torch.tensor(edit.index)
            elif isinstance(edit, KeepHeads):
                size = block.weight("attention_out").shape[1] // block.shape.kv_heads
                columns = torch.cat([torch.arange(size) + size * head for head in edit.index])
            if isinstance(edit, (KeepNeurons, KeepHeads)):
                weight = block.weight("mlp_out" if isinstance(edit, KeepNeurons) else "attention_out")
                kept = weight[:, columns] if edit.out_weight is None else edit.out_weight
                weight.zero_()
                weight[:, columns] = kept
            if isinstance(edit, SetWeight):
                block.weight(edit.role).copy_(edit.tensor)
            gone = []
            if isinstance(edit, (DropAttention, DropBlock)):
                gone.append(attention)
            if isinstance(edit, (DropMLP, DropBlock)):
                gone.append(mlp)
            for linear in gone:
                linear.weight.zero_()
                if linear.bias is not None:
                    linear.bias.zero_()
    return model


def assert_equal_to_silenced(family: str, edits: list[Edit]) -> None:
    dense, sliced = tiny(family), apply_all(tiny(family), edits)
    by_silence, by_surgery = logits(silence(tiny(family), edits), IDS), logits(sliced, IDS)
    assert torch.allclose(by_surgery, by_silence, atol=1e-5)
    if edits:  # or this test would compare the dense model with itself
        assert not torch.allclose(by_surgery, logits(dense, IDS), atol=1e-2)
        assert sliced.layout() != dense.layout() or all(isinstance(edit, SetWeight) for edit in edits)


# --- sliced equals silenced ---


@pytest.mark.parametrize("family", SINGLE_FAMILIES)
@pytest.mark.parametrize("kind", SINGLE_EDITS)
def test_one_edit_equals_silencing(family: str, kind: str) -> None:
    assert_equal_to_silenced(family, [single_edits(tiny(family))[kind]])


@pytest.mark.every_family
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_all_edits_together_equal_silencing(family: str) -> None:
    assert_equal_to_silenced(family, layouts(tiny(family))["everything"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("kind", SINGLE_EDITS)
def test_one_edit_equals_silencing_everywhere(family: str, kind: str) -> None:
    edit = single_edits(tiny(family))[kind]
    for number in range(BLOCKS):
        assert_equal_to_silenced(family, possible(tiny(family), [replace(edit, block=number)]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_silencing(family: str, layout: str) -> None:
    assert_equal_to_silenced(family, layouts(tiny(family))[layout])


def test_the_layouts_by_name_are_all_layouts() -> None:
    assert tuple(layouts(tiny("llama"))) == LAYOUTS


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_model_without_some_blocks_is_the_stock_model_of_the_others(family: str) -> None:
    survivors = [1, 3]
    dense, path = tiny(family), FAMILIES[family].blocks
    per_block = {name: getattr(tiny_config(family), name, None) for name in ("layer_types", "no_rope_layers")}
    kept = {name: [values[number] for number in survivors] for name, values in per_block.items() if values}
    config = tiny_config(family, num_hidden_layers=len(survivors), **kept)
    by_hand: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: t for name, t in dense.hf.state_dict().items() if not name.startswith(path)}
    for place, number in enumerate(survivors):
        state |= {f"{path}.{place}.{name}": t for name, t in dense.blocks[number].state_dict().items()}
    by_hand.load_state_dict(state)

    apply_all(dense, [DropBlock(2), DropBlock(0)])
    assert torch.equal(logits(dense, IDS), logits(by_hand, IDS))
    assert dense.hf.config.num_hidden_layers == 2
    assert {name: getattr(dense.hf.config, name) for name in kept} == kept


@pytest.mark.parametrize("family", SINGLE_FAMILIES)
def test_narrowing_twice_is_narrowing_once(family: str) -> None:
    twice = apply_all(tiny(family), [KeepNeurons(1, (2, 4, 8, 9)), KeepNeurons(1, (1, 3))])
    apply_all(twice, [KeepHeads(1, (1, 2, 3)), KeepHeads(1, (0, 2))])
    once = apply_all(tiny(family), [KeepNeurons(1, (4, 9)), KeepHeads(1, (1, 3))])
    assert torch.equal(logits(twice, IDS), logits(once, IDS))
    assert twice.layout() == once.layout()


@pytest.mark.parametrize("family", SINGLE_FAMILIES)
def test_keeping_everything_changes_nothing(family: str) -> None:
    model = tiny(family)
    shape = model.layout().blocks[1].shape
    kept = apply_all(tiny(family), [KeepNeurons(1, range_of(shape.width)), KeepHeads(1, range_of(shape.kv_heads))])
    assert same_state(state(kept), state(model))
    assert torch.equal(logits(kept, IDS), logits(model, IDS))


def range_of(size: int) -> tuple[int, ...]:
    return tuple(range(size))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_order_of_edits_to_different_modules_does_not_matter(family: str) -> None:
    edits = [edit for edit in layouts(tiny(family))["everything"] if not isinstance(edit, SetWeight)]
    forth, back = apply_all(tiny(family), edits), apply_all(tiny(family), reversed(edits))
    assert same_state(state(forth), state(back))
    assert torch.equal(logits(forth, IDS), logits(back, IDS))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_surgery_needs_no_more_than_one_open_block(family: str) -> None:
    edits = layouts(tiny(family))["everything"]
    closed, model = apply_all(tiny_closed(family), edits), apply_all(tiny(family), edits)
    assert closed.layout() == model.layout()
    assert same_state(state(closed.whole()), state(model))


# --- block numbers are those of the model as loaded ---


@pytest.mark.parametrize("family", SINGLE_FAMILIES)
@pytest.mark.parametrize("edit", [DropAttention(2), DropMLP(3), KeepNeurons(2, (1,)), KeepHeads(3, (0,)), DropBlock(3)])
def test_numbers_outlive_the_blocks_before_them(family: str, edit: Edit) -> None:
    late = apply_all(tiny(family), [DropBlock(0), DropBlock(1), edit])
    early = apply_all(tiny(family), [edit, DropBlock(1), DropBlock(0)])
    assert late.numbers == early.numbers == [number for number in (2, 3) if edit != DropBlock(number)]
    assert late.layout() == early.layout()
    assert torch.equal(logits(late, IDS), logits(early, IDS))
    untouched = 5 - edit.block  # of blocks 2 and 3 the other one
    assert late.layout().blocks[untouched] == tiny(family).layout().blocks[untouched]


def test_every_edit_counts() -> None:
    model = tiny("llama")
    for count, edit in enumerate(layouts(model)["everything"], start=1):
        apply(model, edit)
        assert model.edits_applied == count


# --- weights that come with an edit ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_given_weights_land_exactly_and_the_rest_stays(family: str) -> None:
    model = tiny(family)
    with model.open(1) as block:
        roles = block.roles
    for role, path in roles.items():
        before = state(model)
        with model.open(1) as block:
            weight = random(*block.weight(role).shape, seed=len(role))
        given = weight.clone()
        apply(model, SetWeight(1, role, given))
        given.zero_()  # the model must not share it
        name = f"{FAMILIES[family].blocks}.1.{path}.weight"
        kept = as_kept(model, weight)
        assert torch.equal(model.hf.get_parameter(name), kept)
        assert same_state({**before, name: kept}, state(model))


def as_kept(model: Model, weight: Tensor) -> Tensor:
    """A weight (out, in) as the model's modules keep it."""
    with model.open(2) as block:
        return weight.T if isinstance(block.mlp_out, Conv1D) else weight


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_refit_replaces_only_the_output_projection(family: str) -> None:
    edits = single_edits(tiny(family))
    row = FAMILIES[family]
    for kind, path in (("KeepNeurons", row.mlp_out), ("KeepHeads", row.out)):
        refit: Any = edits[f"{kind} with a refit"]
        if kind in row.cannot:
            continue
        with_refit = apply_all(tiny(family), [refit])
        without = apply_all(tiny(family), [replace(refit, out_weight=None)])
        expected = {**state(without), f"{row.blocks}.2.{path}.weight": as_kept(with_refit, refit.out_weight)}
        assert same_state(expected, state(with_refit))


def test_a_given_weight_takes_the_models_dtype() -> None:
    model = tiny("llama")
    model.hf.to(torch.bfloat16)
    weight = random(32, 3).double()
    apply(model, KeepNeurons(0, (0, 1, 2), weight))
    with model.open(0) as block:
        assert block.mlp_out.weight.dtype == torch.bfloat16
        assert torch.equal(block.mlp_out.weight, weight.to(torch.bfloat16))


def test_surgery_keeps_what_is_to_be_trained() -> None:
    model = tiny("llama")
    for name, parameter in model.hf.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    apply_all(model, [KeepNeurons(0, (0, 1)), KeepHeads(0, (0,)), SetWeight(1, "up", random(48, 32))])
    assert all(p.requires_grad == ("up_proj" in name) for name, p in model.hf.named_parameters())


# --- refusals ---


def _bad(value: float) -> Callable[[tuple[int, ...]], Tensor]:
    def weight(shape: tuple[int, ...]) -> Tensor:
        tensor = random(*shape)
        tensor[-1, -1] = value
        return tensor

    return weight


REFUSED: dict[str, tuple[Callable[[int, int], Edit], str]] = {
    "no such block": (lambda width, heads: DropMLP(BLOCKS), "block 4 is not there"),
    "a negative block": (lambda width, heads: DropAttention(-1), "block -1 is not there"),
    "a dropped block": (lambda width, heads: DropBlock(0), "block 0 is not there"),
    "neurons of a dropped block": (lambda width, heads: KeepNeurons(0, (1,)), "block 0 is not there"),
    "no attention to drop": (lambda width, heads: DropAttention(1), "block 1 has no attention"),
    "no attention to narrow": (lambda width, heads: KeepHeads(1, (0,)), "block 1 has no attention"),
    "no MLP to drop": (lambda width, heads: DropMLP(2), "block 2 has no MLP"),
    "no MLP to narrow": (lambda width, heads: KeepNeurons(2, (0,)), "block 2 has no MLP"),
    "no neurons": (lambda width, heads: KeepNeurons(3, ()), "drop it instead"),
    "no heads": (lambda width, heads: KeepHeads(3, ()), "drop it instead"),
    "a neuron twice": (lambda width, heads: KeepNeurons(3, (1, 1)), "distinct, ascending"),
    "neurons out of order": (lambda width, heads: KeepNeurons(3, (2, 1)), "distinct, ascending"),
    "a neuron too far": (lambda width, heads: KeepNeurons(3, (0, width)), "among them"),
    "a negative neuron": (lambda width, heads: KeepNeurons(3, (-1, 0)), "among them"),
    "a head twice": (lambda width, heads: KeepHeads(3, (0, 0)), "distinct, ascending"),
    "heads out of order": (lambda width, heads: KeepHeads(3, (1, 0)), "distinct, ascending"),
    "a head too far": (lambda width, heads: KeepHeads(3, (heads,)), "among them"),
    "a negative head": (lambda width, heads: KeepHeads(3, (-1,)), "among them"),
    "a refit of the old width": (lambda width, heads: KeepNeurons(3, (0, 1), random(32, width)), "shape"),
    "a transposed refit": (lambda width, heads: KeepNeurons(3, (0, 1), random(2, 32)), "shape"),
    "a refit of the old heads": (lambda width, heads: KeepHeads(3, (0,), random(32, 32)), "shape"),
    "a refit with NaN": (lambda width, heads: KeepNeurons(3, (0, 1), _bad(math.nan)((32, 2))), "NaN or Inf"),
    "a refit with Inf": (lambda width, heads: KeepHeads(3, (0,), _bad(math.inf)((32, 32 // heads))), "NaN or Inf"),
    "an unknown role": (lambda width, heads: SetWeight(3, "gates", random(2, 2)), "has no 'gates'"),
    "the role of a missing module": (lambda width, heads: SetWeight(2, "mlp_out", random(32, width)), "no 'mlp_out'"),
    "a weight of another shape": (lambda width, heads: SetWeight(3, "mlp_out", random(width, 32)), "shape"),
    "a weight with NaN": (lambda width, heads: SetWeight(3, "mlp_out", _bad(math.nan)((32, width))), "NaN or Inf"),
}


@pytest.mark.parametrize("family", SINGLE_FAMILIES)
def test_a_refused_edit_changes_nothing(family: str) -> None:
    model = tiny(family)
    shape = model.layout().blocks[0].shape
    apply_all(model, [DropBlock(0), DropAttention(1), DropMLP(2)])
    before = everything_about(model)
    for case, (make, message) in REFUSED.items():
        edit = make(shape.width, shape.kv_heads)
        with pytest.raises(InvalidEditError, match=message):
            apply(model, edit)
        assert same(everything_about(model), before), case


def test_the_last_block_stays() -> None:
    model = apply_all(tiny("llama"), [DropBlock(0), DropBlock(3), DropBlock(1)])
    before = everything_about(model)
    with pytest.raises(InvalidEditError, match="block 2 is the last one"):
        apply(model, DropBlock(2))
    assert same(everything_about(model), before)


@pytest.mark.parametrize("kind", [edit.__name__ for edit in get_args(BlockEdit)])
def test_what_a_family_cannot_do_is_refused_with_the_reason(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(model, "family", replace(model.family, cannot={kind: "its norm spans all heads"}))
    edits = single_edits(model)
    before = everything_about(model)
    with pytest.raises(UnsupportedEditError, match=f"llama cannot do {kind}: its norm spans all heads"):
        apply(model, edits[kind])
    assert same(everything_about(model), before)
    allowed = next(edit for name, edit in edits.items() if not name.startswith(kind))
    apply(model, allowed)
    assert model.edits_applied == 1


# --- edits as data ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_edits_without_a_tensor_can_be_replayed_from_json(family: str) -> None:
    every = [KeepNeurons(0, (1, 7)), DropBlock(1), KeepHeads(2, (1,)), DropAttention(3), DropMLP(2)]
    edits = possible(tiny(family), every)
    read = [from_json(to_json(edit)) for edit in edits]
    assert [type(edit) for edit in read] == [type(edit) for edit in edits]
    model, replayed = apply_all(tiny(family), edits), apply_all(tiny(family), read)
    assert same_state(state(model), state(replayed))


def test_a_tensor_is_named_by_its_bytes() -> None:
    weight = random(32, 3)
    one = to_json(KeepNeurons(2, (0, 1, 2), weight))
    assert one == to_json(KeepNeurons(2, (0, 1, 2), weight.clone()))
    assert one["out_weight"]["shape"] == [32, 3]
    other = weight.clone()
    other[0, 0] += 1
    assert to_json(KeepNeurons(2, (0, 1, 2), other)) != one
    assert to_json(KeepNeurons(2, (0, 1, 2), weight.T.contiguous().T)) == one  # whatever its strides
    with pytest.raises(InvalidEditError, match="carries a tensor"):
        from_json(one)


@pytest.mark.parametrize(
    "entry", [{"edit": "DropHouse", "block": 1}, {"edit": "DropBlock"}, {"edit": "DropBlock", "block": 1, "index": [1]}]
)
def test_a_damaged_edit_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(InvalidEditError, match="no valid edit"):
        from_json(entry)


def test_kept_indices_are_ascending_whole_numbers() -> None:
    kept = keep(torch.tensor([4, 1, 3]))
    assert kept == (1, 3, 4)
    assert all(type(i) is int for i in kept)


# --- helpers ---


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def everything_about(model: Model) -> tuple[dict[str, Tensor], Any]:
    config = copy.deepcopy(model.hf.config.to_dict())
    return state(model), (model.layout(), config, list(model.numbers), model.edits_applied, str(model.hf))


def same(one: tuple[dict[str, Tensor], Any], other: tuple[dict[str, Tensor], Any]) -> bool:
    return same_state(one[0], other[0]) and one[1] == other[1]
