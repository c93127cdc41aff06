"""The table of families: every row holds for a real model of that family, and what no row covers is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import BLOCKS, FAMILY_NAMES, logits, tiny, tiny_hf, tiny_in, tiny_tokens
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.pytorch_utils import Conv1D

from secateur.errors import UnsupportedModelError
from secateur.export import save
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES, classes


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_row_names_all_parts_of_a_block(family: str) -> None:
    model = tiny(family)
    for number in range(BLOCKS):
        with model.open(number) as block:
            assert all(isinstance(block.linear(path), nn.Linear | Conv1D) for path in block.roles.values())
            named = {id(block.linear(path).weight) for path in block.roles.values()}
            matrices = {id(p) for p in block.module.parameters() if p.dim() == 2}
            assert named == matrices
    for block_layout in model.layout().blocks.values():
        assert block_layout.rest == 0
        assert block_layout.attention
        assert block_layout.mlp
        assert block_layout.attention_norms or block_layout.shared_norms
        assert block_layout.mlp_norms or block_layout.shared_norms


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_shape_is_that_of_the_configuration(family: str) -> None:
    model, row = tiny(family), FAMILIES[family]
    plain = tiny_hf(family).config
    for block in model.layout().blocks.values():
        assert block.shape.width == (getattr(plain, row.width) or 4 * plain.hidden_size)
        assert block.shape.query_heads == plain.num_attention_heads
        assert block.shape.kv_heads == getattr(plain, row.kv_heads or row.query_heads)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_adoption_changes_nothing_but_the_class(family: str) -> None:
    stock = tiny_hf(family)
    weights = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    stock_config = copy.deepcopy(stock.config.to_dict())
    ids = torch.randint(5, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    before = logits(stock, ids)
    stock_class = type(stock)
    model = Model(stock)
    assert isinstance(model.hf, stock_class)
    assert torch.equal(logits(model, ids), before)
    assert model.hf.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.hf.state_dict()[name], tensor) for name, tensor in weights.items())
    ours = model.hf.config.to_dict()
    assert ours.pop("model_type") == f"secateur-{stock_config.pop('model_type')}"
    assert ours == stock_config


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("layout", ["one KV group fewer", "everything"])
def test_attention_can_still_be_switched(family: str, layout: str) -> None:
    """The inner model and each attention follow the outer model's setting, a narrowed Phi-3 attention too."""
    model = tiny_in(layout, family)
    ids = tiny_tokens(model, 2, 12).ids
    by_sdpa = logits(model, ids)
    assert model.hf(ids, use_cache=False).attentions is None
    model.hf.set_attn_implementation("eager")
    eager = model.hf(ids, use_cache=False, output_attentions=True, output_hidden_states=True)
    heads = [shape.query_heads for block in model.layout().blocks.values() if (shape := block.shape).query_heads]
    assert [attention.shape[1] for attention in eager.attentions] == heads  # sdpa would give no weights
    assert len(eager.hidden_states) == len(model.blocks) + 1
    assert torch.allclose(eager.logits, by_sdpa, atol=1e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_pruned_model_can_be_trained(family: str) -> None:
    model = tiny_in("everything", family)
    ids = tiny_tokens(model, 2, 12).ids
    model.hf(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.hf.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_fingerprint_is_of_the_weights(family: str) -> None:
    model = tiny(family)
    assert model.fingerprint() == tiny(family).fingerprint()
    first = model.fingerprint()
    parameter = list(model.hf.parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[-1].add_(1e-3)
    assert model.fingerprint() != first


def test_opt_without_biases_and_with_a_projected_embedding() -> None:
    """Settings of a supported family that change which parameters there are."""
    settings = {"enable_bias": False, "word_embed_proj_dim": 16, "layer_norm_elementwise_affine": False}
    model = tiny_in("everything", "opt", **settings)
    ids = tiny_tokens(model, 2, 9).ids
    layout = model.layout()
    assert layout.parameters == sum(p.numel() for p in model.hf.parameters())
    assert all(block.attention_norms == 0 for block in layout.blocks.values())
    assert torch.isfinite(logits(model, ids)).all()


# --- what is refused ---


def test_an_unknown_family_is_refused_with_the_list_of_families() -> None:
    stranger = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=11))
    with pytest.raises(UnsupportedModelError, match="bloom") as refusal:
        Model(stranger)
    assert all(family in str(refusal.value) for family in FAMILY_NAMES)
    assert type(stranger) is BloomForCausalLM


def test_a_setting_that_the_row_does_not_cover_is_refused() -> None:
    stranger = tiny_hf("opt", do_layer_norm_before=False)
    with pytest.raises(UnsupportedModelError, match="do_layer_norm_before"):
        Model(stranger)
    assert stranger.config.model_type == "opt"


def test_a_subclass_of_the_stock_class_is_refused() -> None:
    class Wrapped(LlamaForCausalLM):
        pass

    stock = tiny_hf("llama")
    stock.__class__ = Wrapped
    with pytest.raises(UnsupportedModelError, match="Wrapped is not the stock class"):
        Model(stock)
    assert type(stock) is Wrapped


def test_a_model_made_by_the_code_in_its_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stand-ins for missing modules are of that file's classes, which the package would not recognise."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save(tiny_in("everything", "llama"), tmp_path / "pruned")
    theirs = get_class_from_dynamic_module("modeling_secateur.SecateurLlamaForCausalLM", tmp_path / "pruned")
    foreign = theirs.from_pretrained(tmp_path / "pruned")
    assert not isinstance(foreign, classes("llama")[1])
    with pytest.raises(UnsupportedModelError, match="load it with secateur"):
        Model(foreign)
