"""The table of families: every row holds for a real model of that family, and what no row covers is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    row, plain = FAMILIES[family], tiny_hf(family).config
    for layout in model.layout().blocks.values():
        assert layout.rest == 0
        assert all((layout.attention, layout.mlp))
        assert all(norms or layout.shared_norms for norms in (layout.attention_norms, layout.mlp_norms))
        assert layout.shape.width == (getattr(plain, row.width) or 4 * plain.hidden_size)
        assert layout.shape.query_heads == plain.num_attention_heads
        assert layout.shape.kv_heads == getattr(plain, row.kv_heads or row.query_heads)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_adoption_changes_nothing_but_the_class(family: str) -> None:
    stock, model = tiny_hf(family), Model(tiny_hf(family))
    ids = tiny_tokens(model, 2, 12, seed=1).ids
    assert isinstance(model.hf, type(stock))
    assert torch.equal(logits(model, ids), logits(stock, ids))
    weights = model.hf.state_dict()
    assert weights.keys() == stock.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stock.state_dict().items())
    ours, theirs = model.hf.config.to_dict(), stock.config.to_dict()
    assert ours.keys() - theirs.keys() <= {"auto_map", *stock.config.attribute_map}
    assert {**{name: ours[name] for name in theirs}, "model_type": family} == theirs
    assert model.hf.config.model_type == f"secateur-{family}"


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
    model, first = tiny(family), tiny(family).fingerprint()
    assert model.fingerprint() == first
    for parameter in (list(model.hf.parameters())[-1], next(model.blocks[2].parameters())):
        with torch.no_grad():
            parameter.view(-1)[-1].add_(1e-3)
        assert model.fingerprint() != first
        first = model.fingerprint()


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


def wrapped() -> Any:
    stock = tiny_hf("llama")
    stock.__class__ = type("Wrapped", (LlamaForCausalLM,), {})
    return stock


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=11)), "'bloom' .*llama"),
        (lambda: tiny_hf("opt", do_layer_norm_before=False), "do_layer_norm_before"),
        (wrapped, "Wrapped is not LlamaForCausalLM, the stock class"),
    ],
)
def test_what_no_row_covers_is_refused_and_stays_as_it_is(make: Callable[[], Any], message: str) -> None:
    stranger = make()
    before = type(stranger), type(stranger.config), stranger.config.model_type
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        Model(stranger)
    assert "bloom" not in message or all(family in str(refusal.value) for family in FAMILY_NAMES)
    assert (type(stranger), type(stranger.config), stranger.config.model_type) == before


def test_a_model_made_by_the_code_in_its_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stand-ins for missing modules are of that file's classes, which the package would not recognise."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save(tiny_in("everything", "llama"), tmp_path / "pruned")
    theirs = get_class_from_dynamic_module("modeling_secateur.SecateurLlamaForCausalLM", tmp_path / "pruned")
    foreign = theirs.from_pretrained(tmp_path / "pruned")
    assert not isinstance(foreign, classes("llama")["AutoModelForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="load it with secateur"):
        Model(foreign)
