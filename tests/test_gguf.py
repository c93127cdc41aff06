"""GGUF files, written from tiny models and compared with transformers in llama.cpp."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CHAT_TEMPLATE, apply_all, layouts, logits, tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from secateur.engines.llama_cpp import running
from secateur.export.gguf import FILE, refuses, write
from secateur.model.handle import Model

VOCABULARY = 320
IDS = [int(each) for each in torch.randint(5, 300, (14,), generator=torch.Generator().manual_seed(1))]
FULL = {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 64}, "qwen2": FULL, "phi": {"qk_layernorm": False},
    "smollm3": {"use_sliding_window": False, "no_rope_layers": [1, 1, 1, 0]},
}  # fmt: skip
needs_engine = pytest.mark.skipif(
    not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("gguf")),
    reason="no xllamacpp here: pip install 'secateur[gguf,llama-cpp]'",
)
TEXT = "the Quick fox 12 <|im_end|>!\n é"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of some merges."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=312, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the quick brown fox jumps over the lazy dog, and the other thing there"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pruned(family: str, layout: str = "dense", **overrides: Any) -> Model:
    model = tiny(family, vocab_size=VOCABULARY, **{**OPTIONS.get(family, {}), **overrides})
    model.tokenizer, model.source = byte_tokenizer(), {"name": "tiny"}
    return apply_all(model, layouts(model)[layout])


def difference(model: Model, file: Path) -> float:
    """The largest of log-probabilities of all tokens, at several places; tokens of a text are compared, too."""
    assert model.tokenizer is not None
    expected = logits(model, torch.tensor([IDS])).log_softmax(-1)[0]
    worst = 0.0
    with running(file) as engine:
        assert engine.tokenize(TEXT) == model.tokenizer(TEXT)["input_ids"]
        for place in (1, 2, 5, 14):
            found = engine.log_probabilities(IDS[:place], VOCABULARY)
            assert len(found) == VOCABULARY
            worst = max(worst, *(abs(value - expected[place - 1, k].item()) for k, value in found.items()))
    return worst


CASES = [
    *(("llama", layout) for layout in (
        "dense", "block 0 without attention", "several attentions missing", "all MLPs missing", "one MLP missing",
        "mixed widths", "mixed KV groups", "everything", "only block 2 has an attention",
    )),
    *((name, layout) for name in ("mistral", "qwen2", "qwen3", "phi3", "granite")
      for layout in ("dense", "everything")),
    *((family, "dense") for family in ("smollm3", "gemma2", "gemma3_text", "olmo2")),
]  # fmt: skip


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_llama_cpp_computes_what_transformers_does(family: str, layout: str, tmp_path: Path) -> None:
    model = pruned(family, layout)
    assert refuses(model) is None
    write(model, tmp_path, "5GB", type="f32")
    limit = 5e-3 if family.startswith("gemma") else 1e-3  # llama.cpp has GELU in a table of halves
    assert difference(model, tmp_path / FILE) < limit


@pytest.mark.parametrize("family", ["gemma2", "smollm3"])
def test_unequal_blocks_are_refused_where_sizes_come_from_the_first(family: str) -> None:
    assert "padded" in str(refuses(pruned(family, "mixed widths")))


def test_odd_widths_are_refused_for_quantised_types_with_the_way_out() -> None:
    assert "--round-to 32" in str(refuses(pruned("llama"), type="q8_0"))
    assert refuses(pruned("llama", intermediate_size=64), type="q8_0") is None
