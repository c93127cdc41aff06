"""Generation with a cache equals generation without one, whatever is missing, before saving and after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, LAYOUTS, REBASABLE, STREAM_LAYOUTS, WINDOW, logits, tiny, tiny_in, tiny_tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

from secateur import load
from secateur.export import save
from secateur.hf import with_cache
from secateur.model import modeling_secateur as modeling
from secateur.model.handle import Model
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropBlock

PROMPT, NEW = 7, 6


def generate(model: Model, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.hf.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )


def stepwise(model: Model, ids: Tensor, first: int, cache: Any) -> Tensor:
    """Logits of all positions: `first` tokens at once, the others one by one on the cache."""
    parts = []
    with torch.no_grad():
        for start, end in [(0, first), *((k, k + 1) for k in range(first, ids.shape[1]))]:
            parts.append(model.hf(ids[:, start:end], **with_cache(model.hf, cache)).logits)
    return torch.cat(parts, dim=1)


def assert_cache_is_right(model: Model) -> None:
    ids = tiny_tokens(model, 2, PROMPT + NEW).ids
    assert ids.shape[1] > 2 * WINDOW
    full = logits(model, ids)
    for first in (1, PROMPT):
        assert torch.allclose(stepwise(model, ids, first, DynamicCache(config=model.hf.config)), full, atol=1e-4)
    assert torch.allclose(stepwise(model, ids, PROMPT, DynamicCache()), full, atol=1e-4)
    prompt = ids[:, :PROMPT]
    assert torch.equal(generate(model, prompt), generate(model, prompt, use_cache=False))


def assert_searches_are_right(model: Model) -> None:
    prompt = tiny_tokens(model, 2, PROMPT, seed=1).ids
    without = generate(model, prompt, use_cache=False)
    beams = generate(model, prompt, use_cache=False, num_beams=3)
    assert torch.equal(generate(model, prompt, num_beams=3), beams)  # the cache is reordered
    assert torch.equal(generate(model, prompt, cache_implementation="static"), without)
    lookup = generate(model, prompt[:1], prompt_lookup_num_tokens=2)  # the cache is cropped
    assert torch.equal(lookup, without[:1])


def assert_padding_is_right(model: Model) -> None:
    prompts = [tiny_tokens(model, 1, length, seed=length).ids for length in (4, PROMPT)]
    alone = [generate(model, prompt)[0, -NEW:] for prompt in prompts]
    padding = torch.zeros(1, PROMPT - 4, dtype=torch.long)
    batch = torch.cat([torch.cat([padding, prompts[0]], dim=1), prompts[1]])
    mask = torch.ones_like(batch)
    mask[0, : PROMPT - 4] = 0
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, batch, mask, **options)[:, -NEW:], torch.stack(alone))


FEW = [
    *((family, "everything") for family in FAMILY_NAMES),
    *(("llama", layout) for layout in ("block 0 without attention", "all attentions missing")),
    ("llama", "sliced stream and more"),
]
ALL = [
    *((family, layout) for family in FAMILY_NAMES for layout in LAYOUTS),
    *((family, layout) for family in REBASABLE for layout in STREAM_LAYOUTS),
]
THOROUGH = [pytest.param(*case, True, marks=pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("family", "layout", "thorough"), [*((*case, False) for case in FEW), *THOROUGH])
def test_cached_generation_is_right(family: str, layout: str, thorough: bool, tmp_path: Path) -> None:
    """Before saving and after loading; where not thorough, each is asked for a part."""
    model = tiny_in(layout, family)
    save(model, tmp_path / "pruned")
    loaded = load(str(tmp_path / "pruned"))
    for each in (model, loaded):
        if thorough or each is model:
            assert_searches_are_right(each)
            assert_padding_is_right(each)
        if thorough or each is loaded:
            assert_cache_is_right(each)
    prompt = tiny_tokens(model, 2, PROMPT).ids
    assert torch.equal(generate(loaded, prompt), generate(model, prompt))


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_window_still_slides(family: str) -> None:
    """Where attention slides, a token further back than all windows together does not reach the last one."""
    model = tiny(family)
    sliding = model.hf.base_model.config.layer_types if family == "qwen2" else ["sliding_attention"] * 4
    apply(model, DropAttention(0))
    for number in [number for number, kind in enumerate(sliding) if kind == "full_attention"]:
        apply(model, DropBlock(number))
    reach = sum(block.attention > 0 for block in model.layout().blocks.values()) * (WINDOW - 1)
    ids = tiny_tokens(model, 1, reach + 5).ids
    for place, reaches in ((3, False), (4, True)):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % model.vocab_size
        for one, two in ((logits(model, ids), logits(model, other)), (by_cache(model, ids), by_cache(model, other))):
            assert (not torch.equal(one[:, -1], two[:, -1])) == reaches


def by_cache(model: Model, ids: Tensor) -> Tensor:
    return stepwise(model, ids, 3, DynamicCache(config=model.hf.config))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("layout", ["block 0 without attention", "blocks dropped, block 2 without attention"])
def test_the_cache_knows_how_much_it_holds(family: str, layout: str) -> None:
    model = tiny_in(layout, family)
    ids = tiny_tokens(model, 2, WINDOW + 3).ids
    static = StaticCache(config=model.hf.config, max_cache_len=32)
    for cache in (DynamicCache(config=model.hf.config), DynamicCache(), static):
        with torch.no_grad():
            model.hf(ids, **with_cache(model.hf, cache))
        assert len(cache.layers) == len(model.blocks)
        assert [int(cache.get_seq_length(k)) for k in range(len(model.blocks))] == [ids.shape[1]] * len(model.blocks)


@pytest.mark.parametrize("name", ["past_key_values", "layer_past", "cache", None])
def test_a_cache_is_known_by_any_name(name: str | None) -> None:
    """What 5.23 calls `past_key_values` is `cache` in 5.24. A mark that is not stored breaks generation."""
    removed, hidden, cache = modeling.RemovedAttention(1), torch.ones(2, 3, 8), DynamicCache()
    removed(hidden, *([cache] if name is None else []), **({name: cache} if name else {}))
    assert cache.get_seq_length(1) == 3
    assert cache.layers[1].keys.numel() == 2 * 3
