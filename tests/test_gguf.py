"""GGUF files, written from tiny models and compared with transformers in llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from models import CHAT_TEMPLATE, apply_all, layouts, logits, tiny
from test_cli import call
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from secateur import load
from secateur.engine.tokens import read_tokens
from secateur.engines.llama_cpp import running
from secateur.errors import EngineError, InvalidOptionError
from secateur.export import export, nbytes, save
from secateur.export.gguf import FILE, TYPES, refuses, type_of, write
from secateur.judge.perplexity import perplexity
from secateur.model.handle import Model
from secateur.output import export as export_with_card
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, KeepNeurons

VOCABULARY = 320
WHOLE_GROUPS = {
    "intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
GGUF_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
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


def piece_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Sentencepiece's BPE as Llama 2 has it: spaces are marked, unknown characters fall back to bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(BPE())
    trainer = trainers.BpeTrainer(vocab_size=size - len(special), show_progress=False)
    sentence = "the quick brown fox jumps over the lazy dog there other".replace(" ", "\u2581")
    trained.train_from_iterator([sentence] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate([*special, *model["vocab"]])}
    merges = [tuple(pair) for pair in model["merges"]]
    core = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def pruned(family: str, layout: str = "dense", **overrides: Any) -> Model:
    if family == UNTIED:
        rope = {"rope_type": "default", "rope_theta": 77000.0}
        family, overrides = "qwen3", {"tie_word_embeddings": False, "rope_parameters": rope, **overrides}
    model = tiny(family, **{"vocab_size": VOCABULARY, **OPTIONS.get(family, {}), **overrides})
    model.tokenizer, model.source = byte_tokenizer(), {"name": "tiny"}
    return apply_all(model, layouts(model)[layout])


def difference(model: Model, file: Path) -> float:
    """The largest of log-probabilities of all tokens, at several places; tokens of a text are compared, too."""
    assert model.tokenizer is not None
    expected = logits(model, torch.tensor([IDS])).log_softmax(-1)[0]
    with running(file) as engine:
        assert engine.tokenize(TEXT) == model.tokenizer(TEXT)["input_ids"]
        losses = engine.losses(IDS, VOCABULARY)
        wanted = [-expected[place, then].item() for place, then in enumerate(IDS[1:])]
        worst = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
        for place in (1, 2, 5, 14):
            found = engine.log_probabilities(IDS[:place], VOCABULARY)
            assert len(found) == VOCABULARY
            worst = max(worst, *(abs(value - expected[place - 1, k].item()) for k, value in found.items()))
    return worst


UNTIED = "qwen3, untied"
CASES = [
    *(("llama", layout) for layout in (
        "dense", "block 0 without attention", "several attentions missing", "all MLPs missing", "one MLP missing",
        "mixed widths", "mixed KV groups", "everything", "only block 2 has an attention",
    )),
    *((name, layout) for name in ("mistral", "qwen2", "qwen3", "phi3", "granite")
      for layout in ("dense", "everything")),
    ("qwen3", "all attentions missing"),
    *((UNTIED, layout) for layout in (
        "dense", "block 0 without attention", "several attentions missing", "all attentions missing",
        "one MLP missing", "all MLPs missing", "mixed KV groups", "only block 2 has an attention", "one block left",
    )),
    *((family, "dense") for family in ("smollm3", "gemma2", "gemma3_text", "olmo2", "phi", "gpt_neox", "gpt2")),
]  # fmt: skip
GELU = ("gemma2", "gemma3_text", "phi", "gpt_neox", "gpt2")  # llama.cpp has it in a table of halves


ALWAYS = ("llama", "everything")


@needs_engine
@pytest.mark.parametrize(
    ("family", "layout"), [pytest.param(*case, marks=() if case == ALWAYS else pytest.mark.slow) for case in CASES]
)
def test_llama_cpp_computes_what_transformers_does(family: str, layout: str, tmp_path: Path) -> None:
    model = pruned(family, layout)
    assert refuses(model) is None
    write(model, tmp_path, type="f32")
    assert difference(model, tmp_path / FILE) < (5e-3 if family in GELU else 1e-4)


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dense", "everything"])
def test_llama_3_frequencies_are_carried_over(layout: str, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    model = pruned("llama", layout, rope_parameters=rope)
    plain = pruned("llama", layout)
    plain.hf.load_state_dict(model.hf.state_dict())
    ids = torch.tensor([IDS])
    assert (logits(model, ids) - logits(plain, ids)).abs().max() > 1e-3
    write(model, tmp_path, type="f32")
    assert difference(model, tmp_path / FILE) < 1e-4


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dense", "everything"])
@pytest.mark.parametrize("context", [8, 256], ids=["beyond", "within"])
def test_longrope_is_carried_over(layout: str, context: int, tmp_path: Path) -> None:
    """Positions beyond the original context, where llama.cpp's own is longer, and within it."""
    places = range(len(pruned("phi3").hf.base_model.rotary_emb.inv_freq))
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": context,
            "short_factor": [1 + k / 10 for k in places], "long_factor": [2 + k / 2 for k in places]}  # fmt: skip
    model = pruned("phi3", layout, rope_parameters=rope, original_max_position_embeddings=context)
    write(model, tmp_path, type="f32")
    with running(tmp_path / FILE, context=256) as engine:
        for place in range(9, 15):
            found = engine.log_probabilities(IDS[:place], VOCABULARY)
            wanted = logits(model, torch.tensor([IDS[:place]])).log_softmax(-1)[0, -1]
            assert max(abs(value - wanted[k].item()) for k, value in found.items()) < 1e-4


@needs_engine
@pytest.mark.slow
def test_sentencepiece_splits_texts_alike(tmp_path: Path) -> None:
    model = pruned("llama", vocab_size=420)
    model.tokenizer = piece_tokenizer(420)
    write(model, tmp_path, type="f32")
    texts = (TEXT, "the lazy dog", " the  quick", "brown", "\u20ac fox\n\nthere", "thethe other")
    with running(tmp_path / FILE) as engine:
        for text in texts:
            assert engine.tokenize(text) == model.tokenizer(text)["input_ids"]
    core = json.loads(model.tokenizer.backend_tokenizer.to_str())
    core["normalizer"]["normalizers"].append({"type": "NFKC"})
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="</s>")
    assert "NFKC" in str(refuses(model))


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mine", "Phi-3-mini"])
def test_spaces_beside_added_tokens_are_kept_and_dropped_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    """llama.cpp drops those behind Phi-3's tokens, which it knows by the name of the model."""
    text = "the<|end|> \n fox<s> dog<|endoftext|>  the</s> lazy"
    split = {}
    for drops in (False, True):
        model = pruned("llama", vocab_size=420)
        model.tokenizer, model.source = piece_tokenizer(420), {"name": name}
        rows = [AddedToken(each, special=True, normalized=False) for each in ("<unk>", "<s>", "<|endoftext|>")]
        rows += [AddedToken(each, special=True, normalized=False, rstrip=drops) for each in ("</s>", "<|end|>")]
        model.tokenizer.add_tokens(rows, special_tokens=True)
        write(model, tmp_path, type="f32")
        split[drops] = model.tokenizer(text)["input_ids"]
        with running(tmp_path / FILE) as engine:
            assert engine.tokenize(text) == split[drops]
    assert split[False] != split[True]


def test_spaces_beside_added_tokens_that_llama_cpp_cannot_drop_are_refused() -> None:
    for stripped in ({"lstrip": True}, {"rstrip": True}):
        model = pruned("llama")
        assert model.tokenizer is not None
        model.tokenizer.add_tokens([AddedToken("<|there|>", special=True, **stripped)], special_tokens=True)
        assert "<|there|>" in str(refuses(model))


# What is left beside the weights' type: llama.cpp rounds activations to f16, bf16 or 8 bits, too.
LIMITS = {"f32": 1e-4, "f16": 0.02, "bf16": 0.1, "q8_0": 0.3, "q4_0": 0.3}


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", UNTIED])
def test_types_hold_the_weights_up_to_their_rounding(family: str, type: str, tmp_path: Path) -> None:
    """Transformers with the same rounded weights is what llama.cpp is compared with."""
    sizes = WHOLE_GROUPS | {"tie_word_embeddings": family != UNTIED}
    model = pruned(family, "block 0 without attention", **sizes)
    write(model, tmp_path, type=type)
    rounded: dict[str, torch.Tensor] = {}
    for name, weight in model.hf.state_dict().items():
        if weight.dim() == 2:
            kept = GGMLQuantizationType[type_of(GGUF_NAMES.get(name, name), weight, type).upper()]
            rounded[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kept), kept))
            assert type == "f32" or not torch.equal(rounded[name], weight)
    model.hf.load_state_dict(rounded, strict=False)
    assert difference(model, tmp_path / FILE) < LIMITS[type]


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [*((name, "everything") for name in ("llama", "qwen2", "qwen3", "phi3", "granite")), (UNTIED, "mixed KV groups")],
)
def test_llama_cpp_goes_on_as_transformers_does(family: str, layout: str, tmp_path: Path) -> None:
    """Greedily, token by token: the server does not give the ids of a text whose tokens are parts of characters."""
    model = pruned(family, layout)
    write(model, tmp_path, type="f32")
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.hf.generate(torch.tensor([IDS]), **settings)[0].tolist()
    with running(tmp_path / FILE) as engine:
        for place in range(len(IDS), len(expected)):
            found = engine.log_probabilities(expected[:place], VOCABULARY)
            assert max(found, key=lambda k: found[k]) == expected[place]


@needs_engine
@pytest.mark.slow
def test_the_real_model_has_the_same_perplexity_in_half_precision(tmp_path: Path) -> None:
    """Attentions and neurons gone, widths in multiples of 32 and not: within 1 % over a text in f16, and in q8_0."""
    model = load("demo", dtype="float32")
    neurons = tuple(range(0, 1536, 2))
    apply_all(model, [DropAttention(28), DropAttention(12), DropMLP(20), *(KeepNeurons(k, neurons) for k in (5, 9))])
    tokens = read_tokens(model, "demo", purpose="evaluation", samples=1, length=160)
    expected = perplexity(model, tokens).perplexity
    for type in ("f16", "q8_0"):
        export(model, "gguf", tmp_path / type, type=type)
        with running(tmp_path / type / FILE) as engine:
            losses = engine.losses(tokens.ids[0].tolist(), model.vocab_size)
        assert math.exp(statistics.fmean(losses)) == pytest.approx(expected, rel=0.01)
    apply(model, KeepNeurons(7, tuple(range(1001))))
    assert "--round-to 32" in str(refuses(model, type="q8_0"))
    export(model, "gguf", tmp_path / "odd")
    with running(tmp_path / "odd" / FILE) as engine:
        found = engine.losses(tokens.ids[0, :48].tolist(), model.vocab_size)
    wanted = model_losses(model, tokens.ids[:, :48])
    assert statistics.fmean(found) == pytest.approx(wanted, rel=2e-3)


def model_losses(model: Model, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:]))


@needs_engine
def test_the_command_answers_a_prompt_from_the_folder_and_refuses_others(tmp_path: Path) -> None:
    model = pruned("llama", "everything")
    export(model, "gguf", tmp_path / "out")
    answered = call("run", tmp_path / "out", "--prompt", "the quick", "--max-tokens", "4")
    assert answered.code == 0
    with running(tmp_path / "out" / FILE) as engine:
        assert engine.greedy("the quick", 4).text.strip() == answered.out.strip()
    save(model, tmp_path / "checkpoint")
    refused = call("run", tmp_path / "checkpoint", "--prompt", "the quick")
    assert (refused.code, "--to gguf" in refused.err) == (3, True)
    (tmp_path / "x.gguf").write_bytes(b"GGUF but no more")
    broken = call("run", tmp_path / "x.gguf", "--prompt", "the quick")
    assert (broken.code, "llama.cpp ended" in broken.err or "llama.cpp:" in broken.err) == (3, True)


@needs_engine
def test_an_engine_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").touch()
    monkeypatch.setattr("secateur.engines.llama_cpp._WORKER", tmp_path / "silent.py")
    (tmp_path / "silent.py").write_text("import time; time.sleep(600)")
    with pytest.raises(EngineError, match=r"no answer in 0\.5 s"), running(tmp_path / "x.gguf", patience_s=0.5):
        pass


def test_deci_without_any_attention_is_refused() -> None:
    assert "KV cache" in str(refuses(pruned("llama", "all attentions missing")))


@pytest.mark.parametrize("family", ["gemma2", "smollm3"])
def test_unequal_blocks_are_refused_where_sizes_come_from_the_first(family: str) -> None:
    assert "padded" in str(refuses(pruned(family, "mixed widths")))


@pytest.mark.parametrize(("family", "block"), [("gemma3_text", 0), ("smollm3", 0)])
def test_blocks_out_of_their_turn_are_refused_without_a_way_that_would_lose_it_too(family: str, block: int) -> None:
    """What `padded` writes has the order in its configuration, which llama.cpp's converter does not read."""
    model = pruned(family)
    assert refuses(model) is None
    reason = str(refuses(apply_all(model, [DropBlock(block)])))
    assert "this model in others" in reason
    assert "padded" not in reason


def test_a_trained_dense_model_is_not_called_pruned_and_the_card_names_the_type(tmp_path: Path) -> None:
    model = pruned("llama")
    model.edits_applied = 0
    model.parents = [SimpleNamespace(recovery=object())]  # type: ignore[list-item]  # all that is asked of it
    write(model, tmp_path)
    names = [field.contents() for field in [GGUFReader(tmp_path / FILE).get_field("general.name")] if field]
    assert not str(names[0]).endswith("-pruned")
    model.parents = []
    export_with_card(model, "gguf", tmp_path / "out")
    assert "but for what f16" in (tmp_path / "out" / "README.md").read_text()


def test_unequal_widths_are_refused_where_the_first_is_read() -> None:
    reason = str(refuses(pruned(UNTIED, "mixed widths")))
    assert "as `step35` it takes the FFN width of all blocks from the first" in reason
    assert refuses(pruned(UNTIED, "mixed KV groups")) is None
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    assert "'yarn'" in str(refuses(pruned(UNTIED, "mixed KV groups", rope_parameters=yarn)))


def test_odd_widths_are_refused_for_quantised_types_with_the_way_out() -> None:
    assert "--round-to 32" in str(refuses(pruned("llama"), type="q8_0"))
    assert refuses(pruned("llama", intermediate_size=64), type="q8_0") is None


def test_the_room_asked_for_is_that_of_the_file(tmp_path: Path) -> None:
    """In float32 twice that of the weights in bfloat16; of `padded`, of the zeros too."""
    for layout in ("dense", "everything"):
        model = pruned("llama", layout, dtype=torch.bfloat16)
        for type in ("f32", "f16"):
            write(model, tmp_path, type=type)
            there = (tmp_path / FILE).stat().st_size
            assert 0 < there - nbytes(model.hollow(), "gguf", type=type) < 40_000  # names, sizes, vocabulary
        export(model, "padded", tmp_path / "padded", overwrite=True)
        there = (tmp_path / "padded" / "model.safetensors").stat().st_size
        assert 0 < there - nbytes(model.hollow(), "padded") < 10_000


def test_one_file_has_no_shards(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="gguf has no option 'max_shard_size'"):
        export(pruned("llama"), "gguf", tmp_path / "out", max_shard_size="1GB")
    assert not (tmp_path / "out").exists()
