"""Edits: a sliced model is the dense one with the removed parts silenced, and a refused edit changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from conftest import KINDS_OF_FAMILY
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
from secateur.surgery.apply import apply, twin
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
            if isinstance(edit, SetWeight):
                block.weight(edit.role).copy_(edit.tensor)
            if isinstance(edit, (KeepNeurons, KeepHeads)):
                weight = block.weight("mlp_out" if isinstance(edit, KeepNeurons) else "attention_out")
                size = 1 if isinstance(edit, KeepNeurons) else weight.shape[1] // block.shape.kv_heads
                columns = torch.cat([torch.arange(size) + size * unit for unit in edit.index])
                kept = weight[:, columns] if edit.out_weight is None else edit.out_weight
                weight.zero_()
                weight[:, columns] = kept
            for linear, other in ((block.attention_out, DropAttention), (block.mlp_out, DropMLP)):
                for parameter in linear.parameters() if isinstance(edit, (DropBlock, other)) else ():
                    parameter.zero_()
    return model


def assert_equal_to_silenced(family: str, edits: list[Edit]) -> None:
    dense, sliced = tiny(family), apply_all(tiny(family), edits)
    by_silence, by_surgery = logits(silence(tiny(family), edits), IDS), logits(sliced, IDS)
    assert torch.allclose(by_surgery, by_silence, atol=1e-5)
    if edits:  # or this test would compare the dense model with itself
        assert not torch.allclose(by_surgery, logits(dense, IDS), atol=1e-2)
        assert sliced.layout() != dense.layout() or all(isinstance(edit, SetWeight) for edit in edits)


# --- sliced equals silenced ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("kind", SINGLE_EDITS)
def test_one_edit_equals_silencing(family: str, kind: str) -> None:
    edit = single_edits(tiny(family))[kind]
    for number in (2,) if family in KINDS_OF_FAMILY else range(BLOCKS):
        assert_equal_to_silenced(family, possible(tiny(family), [replace(edit, block=number)]))


@pytest.mark.every_family
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    "layout", [name if name == "everything" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_every_layout_equals_silencing(family: str, layout: str) -> None:
    assert_equal_to_silenced(family, layouts(tiny(family))[layout])


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
def test_narrowing_twice_is_narrowing_once_and_by_nothing_changes_nothing(family: str) -> None:
    twice = apply_all(tiny(family), [KeepNeurons(1, (2, 4, 8, 9)), KeepNeurons(1, (1, 3))])
    apply_all(twice, [KeepHeads(1, (1, 2, 3)), KeepHeads(1, (0, 2))])
    once = apply_all(tiny(family), [KeepNeurons(1, (4, 9)), KeepHeads(1, (1, 3))])
    assert same_model(twice, once)
    shape = tiny(family).layout().blocks[1].shape
    kept = [KeepNeurons(1, tuple(range(shape.width))), KeepHeads(1, tuple(range(shape.kv_heads)))]
    assert same_model(apply_all(tiny(family), kept), tiny(family))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_neither_the_order_of_edits_nor_closed_blocks_matter(family: str) -> None:
    edits = layouts(tiny(family))["everything"]
    assert same_model(apply_all(tiny_closed(family), edits).whole(), apply_all(tiny(family), edits))
    edits = [edit for edit in edits if not isinstance(edit, SetWeight)]
    assert same_model(apply_all(tiny(family), edits), apply_all(tiny(family), reversed(edits)))


# --- block numbers are those of the model as loaded ---


@pytest.mark.parametrize("family", SINGLE_FAMILIES)
@pytest.mark.parametrize("edit", [DropAttention(2), DropMLP(3), KeepNeurons(2, (1,)), KeepHeads(3, (0,)), DropBlock(3)])
def test_numbers_outlive_the_blocks_before_them(family: str, edit: Edit) -> None:
    late = apply_all(tiny(family), [DropBlock(0), DropBlock(1), edit])
    early = apply_all(tiny(family), [edit, DropBlock(1), DropBlock(0)])
    assert late.numbers == early.numbers == [number for number in (2, 3) if edit != DropBlock(number)]
    assert late.edits_applied == 3
    assert same_model(late, early)
    untouched = 5 - edit.block  # of blocks 2 and 3 the other one
    assert late.layout().blocks[untouched] == tiny(family).layout().blocks[untouched]


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
        kept = weight.T if isinstance(model.blocks[1].get_submodule(path), Conv1D) else weight
        assert torch.equal(model.hf.get_parameter(name), kept)
        assert same_state({**before, name: kept}, state(model))


def test_dtype_and_what_is_to_be_trained_stay() -> None:
    model = tiny("llama")
    model.hf.to(torch.bfloat16)
    for name, parameter in model.hf.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    weight = random(32, 2).double()
    apply_all(model, [KeepNeurons(0, (0, 1), weight), KeepHeads(0, (0,)), SetWeight(1, "up", random(48, 32))])
    with model.open(0) as block:
        assert torch.equal(block.mlp_out.weight, weight.to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.hf.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad == ("up_proj" in name) for name, p in model.hf.named_parameters())


# --- refusals ---


def bad(value: float, *shape: int) -> Tensor:
    tensor = random(*shape)
    tensor[-1, -1] = value
    return tensor


def refused(width: int, heads: int) -> dict[str, list[Edit]]:
    """Edits by what is said against them, of a model that has lost block 0, attention 1 and MLP 2."""
    return {
        "block 4 is not there": [DropMLP(BLOCKS)],
        "block -1 is not there": [DropAttention(-1)],
        "block 0 is not there": [DropBlock(0), KeepNeurons(0, (1,))],
        "block 1 has no attention": [DropAttention(1), KeepHeads(1, (0,))],
        "block 2 has no MLP": [DropMLP(2), KeepNeurons(2, (0,))],
        "drop it instead": [KeepNeurons(3, ()), KeepHeads(3, ())],
        "distinct, ascending": [
            KeepNeurons(3, (1, 1)), KeepNeurons(3, (2, 1)), KeepHeads(3, (0, 0)), KeepHeads(3, (1, 0)),
        ],
        "among them": [
            KeepNeurons(3, (0, width)), KeepNeurons(3, (-1, 0)), KeepHeads(3, (heads,)), KeepHeads(3, (-1,)),
        ],
        "shape": [
            KeepNeurons(3, (0, 1), random(32, width)),  # of the old width
            KeepNeurons(3, (0, 1), random(2, 32)),  # transposed
            KeepHeads(3, (0,), random(32, 32)),  # of the old heads
            SetWeight(3, "mlp_out", random(width, 32)),
        ],
        "NaN or Inf": [
            KeepNeurons(3, (0, 1), bad(math.nan, 32, 2)),
            KeepHeads(3, (0,), bad(math.inf, 32, 32 // heads)),
            SetWeight(3, "mlp_out", bad(math.nan, 32, width)),
        ],
        "has no 'gates'": [SetWeight(3, "gates", random(2, 2))],
        "no 'mlp_out'": [SetWeight(2, "mlp_out", random(32, width))],
    }  # fmt: skip


@pytest.mark.parametrize("family", SINGLE_FAMILIES)
def test_a_refused_edit_changes_nothing(family: str) -> None:
    model = tiny(family)
    shape = model.layout().blocks[0].shape
    apply_all(model, [DropBlock(0), DropAttention(1), DropMLP(2)])
    for message, edits in refused(shape.width, shape.kv_heads).items():
        for edit in edits:
            with unchanged(model), pytest.raises(InvalidEditError, match=message):
                apply(model, edit)
    apply_all(model, [DropBlock(3), DropBlock(1)])
    with unchanged(model), pytest.raises(InvalidEditError, match="block 2 is the last one"):
        apply(model, DropBlock(2))


@pytest.mark.parametrize("kind", [edit.__name__ for edit in get_args(BlockEdit)])
def test_what_a_family_cannot_do_is_refused_with_the_reason(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(model, "family", replace(model.family, cannot={kind: "its norm spans all heads"}))
    edits = single_edits(model)
    refusal = pytest.raises(UnsupportedEditError, match=f"llama cannot do {kind}: its norm spans all heads")
    with unchanged(model), refusal:
        apply(model, edits[kind])
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
    assert same_model(apply_all(tiny(family), edits), apply_all(tiny(family), read))


def test_a_tensor_is_named_by_its_bytes() -> None:
    weight = random(32, 3)
    one = to_json(KeepNeurons(2, (0, 1, 2), weight))
    assert one["out_weight"]["shape"] == [32, 3]
    assert to_json(KeepNeurons(2, (0, 1, 2), weight.T.contiguous().T)) == one  # whatever its strides
    assert to_json(KeepNeurons(2, (0, 1, 2), weight + 1)) != one
    with pytest.raises(InvalidEditError, match="carries a tensor"):
        from_json(one)


def test_damaged_edits_are_refused_and_indices_are_ascending_whole_numbers() -> None:
    for entry in ({"edit": "DropHouse", "block": 1}, {"edit": "DropBlock"}, {"edit": "DropMLP", "block": 1, "x": [1]}):
        with pytest.raises(InvalidEditError, match="no valid edit"):
            from_json(entry)
    kept = keep(torch.tensor([4, 1, 3]))
    assert kept == (1, 3, 4)
    assert all(type(i) is int for i in kept)


# --- helpers ---


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@contextmanager
def unchanged(model: Model) -> Iterator[None]:
    """Nothing about the model is another after the context."""

    def facts() -> Any:
        config = copy.deepcopy(model.hf.config.to_dict())
        return model.layout(), config, list(model.numbers), model.edits_applied, str(model.hf)

    weights, others = state(model), facts()
    yield
    assert same_state(weights, state(model))
    assert others == facts()


def same_model(one: Model, other: Model) -> bool:
    assert one.layout() == other.layout()
    return same_state(state(one), state(other)) and torch.equal(logits(one, IDS), logits(other, IDS))


@torch.no_grad()
@pytest.mark.parametrize("device_hooks", [False, True])
def test_a_twin_stays_what_the_block_was(device_hooks: bool) -> None:
    model = tiny("llama")
    x, before = random(2, 3, model.hidden_size), logits(model, IDS)
    block = model.blocks[1]
    if device_hooks:  # accelerate has replaced each module's forward by one that keeps the old one
        hooks = pytest.importorskip("accelerate.hooks")
        for module in block.modules():
            hooks.add_hook_to_module(module, hooks.ModelHook())
    other, mlp = twin(block), block.mlp(x)
    apply_all(model, [KeepNeurons(1, (0, 3)), DropAttention(1)])
    assert torch.equal(other.mlp(x), mlp)
    assert not torch.equal(block.mlp(x), mlp)
    model.blocks[1] = other
    assert torch.equal(logits(model, IDS), before)
