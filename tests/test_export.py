"""Exports: the same logits where secateur is not, configurations to the letter, and refusals before any work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS_OF_FAMILY
from huggingface_hub import ModelCard
from models import (
    BLOCKS,
    FAMILY_NAMES,
    LAYOUTS,
    REBASABLE,
    apply_all,
    logits,
    tiny,
    tiny_closed,
    tiny_hf,
    tiny_in,
    tiny_tokenizer,
    tiny_tokens,
    whole_load,
)
from safetensors.torch import load_file, save_file
from test_cli import call
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu
from transformers import AutoConfig, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import secateur.model.load
from secateur import load
from secateur.errors import (
    InvalidOptionError,
    OutputExistsError,
    UnknownNameError,
    UnsupportedExportError,
)
from secateur.export import EXPORT, EXPORTS, export, nemotron_nas, padded, refusal, save
from secateur.hf import quiet_transformers
from secateur.model.described import Description, verify_weights
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES, classes
from secateur.output import export as export_with_card
from secateur.record import RECORD
from secateur.surgery.edits import (
    DropAttention,
    DropBlock,
    DropMLP,
    Edit,
    FoldNorms,
    KeepHeads,
    KeepNeurons,
    UntieHead,
)

SOME_LAYOUTS = ("everything", "all attentions missing", "mixed KV groups")
FOLDERS = [to for to in EXPORTS if to != "gguf"]  # that one wants a byte-level tokenizer: test_gguf.py
BLOCK_KEYS = {
    "attention": {
        "no_op", "replace_with_linear", "sparsify", "n_heads_in_group", "window_length", "num_sink_tokens",
        "use_prefill_window_in_sink_attention", "unshifted_sink",
    },
    "ffn": {"no_op", "replace_with_linear", "sparsify", "ffn_mult"},
}  # fmt: skip


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- padded ---

# Every family in one layout that has all kinds of edits, and one family of each kind in each of some.
UNIT = {(family, layout) for family in KINDS_OF_FAMILY for layout in SOME_LAYOUTS}
UNIT |= {(family, "everything") for family in FAMILY_NAMES}
CASES = [
    pytest.param(family, layout, marks=() if (family, layout) in UNIT else pytest.mark.slow)
    for family in FAMILY_NAMES
    for layout in LAYOUTS
]


@pytest.mark.every_family
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_padded_model_is_a_stock_one_with_the_same_logits(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny_in(layout, family)
    before = model.hf.config.to_dict(), str(model.hf), model.fingerprint()
    export(model, "padded", tmp_path / "out")
    assert (model.hf.config.to_dict(), str(model.hf), model.fingerprint()) == before
    hf, config = whole_load(tmp_path / "out"), config_of(tmp_path / "out")
    assert type(hf) is classes(family)["AutoModelForCausalLM"].__mro__[2]
    assert config["model_type"] == family
    assert not {"auto_map", "per_layer_config", "stream_ends"} & config.keys()
    assert not list((tmp_path / "out").glob("*.py"))
    ids = tiny_tokens(model, 2, 12).ids
    torch.testing.assert_close(logits(hf, ids), logits(model, ids), rtol=0, atol=1e-5)
    blocks = model.layout().blocks.values()
    assert config[FAMILIES[family].width] == (max(block.shape.width for block in blocks) or 1)
    assert hf.config.num_hidden_layers == len(blocks)
    assert verify_weights(Description("", {}, tmp_path / "out"))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_padded_model_generates_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_in("everything", family)
    export(model, "padded", tmp_path / "out")
    ids = tiny_tokens(model, 2, 9).ids
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ours, theirs = (hf.generate(ids, **settings) for hf in (model.hf, whole_load(tmp_path / "out")))
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_padded_models_load_where_secateur_cannot_be_imported(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        model = tiny_in("everything", family)
        export(model, "padded", tmp_path / family)
        ids = tiny_tokens(model, 2, 12).ids
        save_file({"ids": ids, "logits": logits(model, ids).contiguous()}, tmp_path / f"{family}.safetensors")
    program = """
import sys
sys.modules["secateur"] = None  # so that importing it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for family in ("llama", "gpt2"):
    expected = load_file(f"{family}.safetensors")
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(f"./{family}")(expected["ids"]).logits
    torch.testing.assert_close(got, expected["logits"], rtol=0, atol=1e-5)
try:
    import secateur
except ImportError:
    print("loaded without secateur")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert "loaded without secateur" in ran.stdout, ran.stderr


def test_zeros_stand_behind_what_is_there(tmp_path: Path) -> None:
    """KV group 1 of 2 stays: it comes first, with its query heads in their order, and the other is zero."""
    model = tiny("phi3", num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    apply_all(model, [KeepHeads(0, (1,)), KeepNeurons(0, (3, 5)), DropMLP(1)])
    export(model, "padded", tmp_path / "out")
    weights, own = load_file(tmp_path / "out" / "model.safetensors"), model.hf.state_dict()
    qkv, kept = weights["model.layers.0.self_attn.qkv_proj.weight"], own["model.layers.0.self_attn.qkv_proj.weight"]
    query, key, value = qkv.split([32, 16, 16])
    for part, there in zip((query, key, value), kept.split([16, 8, 8]), strict=True):
        assert torch.equal(part[: len(there)], there)
        assert not part[len(there) :].any()
    gate_up = weights["model.layers.0.mlp.gate_up_proj.weight"]
    for part, there in zip(gate_up.chunk(2), own["model.layers.0.mlp.gate_up_proj.weight"].chunk(2), strict=True):
        assert torch.equal(part[:2], there)
        assert not part[2:].any()
    assert not weights["model.layers.1.mlp.down_proj.weight"].any()
    assert torch.equal(weights["model.layers.1.post_attention_layernorm.weight"], torch.ones(32))


@pytest.mark.parametrize("family", REBASABLE)
def test_folded_norms_are_padded_and_a_rebased_stream_is_refused(family: str, tmp_path: Path) -> None:
    model = tiny(family, tie_word_embeddings=False)
    apply_all(model, [FoldNorms(), DropAttention(1), KeepNeurons(2, (1, 2))])
    export(model, "padded", tmp_path / "out")
    ids = tiny_tokens(model, 2, 12).ids
    torch.testing.assert_close(logits(whole_load(tmp_path / "out"), ids), logits(model, ids), rtol=0, atol=1e-5)
    for layout in ("rotated stream", "sliced stream"):
        for tied in (True, False):
            with pytest.raises(UnsupportedExportError, match=r"rotated or sliced.*transformers loads the checkpoint"):
                export(tiny_in(layout, family, tie_word_embeddings=tied), "padded", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_heads_are_filled_up_to_a_number_that_the_stock_class_takes(tmp_path: Path) -> None:
    """Llama's hidden size must be a multiple of the number of heads: 3 of 4 groups stay in all, and 4 are written."""
    model = apply_all(tiny("llama"), [KeepHeads(number, (0, 1, 3)) for number in range(BLOCKS)])
    export(model, "padded", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    ids = tiny_tokens(model, 2, 12).ids
    torch.testing.assert_close(logits(whole_load(tmp_path / "out"), ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["padded", "nemotron-nas"])
def test_exports_read_a_block_once_in_shards_and_in_other_dtypes(to: str, tmp_path: Path) -> None:
    edits = [DropAttention(1), DropMLP(2)]
    model, closed = tiny("llama", **SIZES), tiny_closed("llama", **SIZES)
    for each in (model, closed):
        apply_all(each, edits)
    closed.fetched.clear()
    export(model, to, tmp_path / "whole")
    export(closed, to, tmp_path / "streamed", max_shard_size="100KB")
    assert closed.block_openings == list(range(BLOCKS))
    one, many = ({}, {})
    for folder, weights in ((tmp_path / "whole", one), (tmp_path / "streamed", many)):
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 2
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    for name, parameter in model.hf.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.bfloat16)
    export(model, to, tmp_path / "mixed")
    for name, tensor in load_file(tmp_path / "mixed" / "model.safetensors").items():
        there = model.hf.state_dict().get(name)
        assert there is None or (
            tensor.dtype == there.dtype and torch.equal(tensor, there) == (one[name].shape == there.shape)
        )


# --- nemotron-nas ---

SIZES: dict[str, Any] = {"intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
VARIED: list[Edit] = [
    KeepNeurons(0, tuple(range(256))), DropAttention(1), KeepNeurons(2, tuple(range(100, 612))), DropMLP(3),
]  # fmt: skip


def llama_like(family: str, edits: list[Edit] = VARIED, **overrides: Any) -> Model:
    settings = {**SIZES, "sliding_window": None, "use_sliding_window": False, "layer_types": None, **overrides}
    if family == "llama":
        settings = {**SIZES, **overrides}
    return apply_all(tiny(family, **settings), edits)


def engine_width(mult: float, hidden: int) -> int:
    """How engines read `ffn_mult`, in our words."""
    width = int(2 * mult * hidden / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


@pytest.mark.parametrize("hidden", [32, 576, 896, 2048, 3584, 4096, 5120, 8192, 12288])
def test_every_multiple_of_256_is_read_as_it_was_written(hidden: int) -> None:
    for width in range(256, 65536 + 1, 256):
        assert engine_width(nemotron_nas.ffn_mult(width, hidden), hidden) == width
        assert engine_width(json.loads(json.dumps(nemotron_nas.ffn_mult(width, hidden))), hidden) == width


def test_the_configuration_is_to_the_letter(tmp_path: Path) -> None:
    export(llama_like("llama"), "nemotron-nas", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert config["auto_map"] == {"AutoConfig": "configuration_nemotron_nas.NemotronNasConfig"}
    for block in config["block_configs"]:
        assert {part: set(keys) for part, keys in block.items()} == BLOCK_KEYS
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, True, False, False]
    assert [block["ffn"]["no_op"] for block in config["block_configs"]] == [False, False, False, True]
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == [2, None, 2, 2]
    mults = [block["ffn"]["ffn_mult"] for block in config["block_configs"]]
    assert [mult and engine_width(mult, 32) for mult in mults] == [256, 768, 512, None]
    numbers = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[name] for name in numbers] == [32, 768 + 256, 4, 2, 8]
    assert (config["num_hidden_layers"], config["attention_bias"], config["mlp_bias"]) == (BLOCKS, True, True)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # for readers of either spelling


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies code that it is told to trust; here, not into the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    before = set(sys.modules)
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.mark.usefixtures("modules")
def test_the_configuration_loads_by_the_class_beside_it(tmp_path: Path) -> None:
    model = llama_like("llama")
    export(model, "nemotron-nas", tmp_path / "out")
    source = Path(nemotron_nas.travelling.__file__)
    assert (tmp_path / "out" / source.name).read_bytes() == source.read_bytes()
    assert "secateur" not in source.read_text()
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.block_configs[1].attention.no_op is True
    assert engine_width(config.block_configs[2].ffn.ffn_mult, config.hidden_size) == 512
    written = config_of(tmp_path / "out")
    config.save_pretrained(tmp_path / "again")
    again = config_of(tmp_path / "again")
    assert again["block_configs"] == written["block_configs"]
    assert {name: again[name] for name in again.keys() & written.keys()} == {
        name: written[name] for name in again.keys() & written.keys()
    }
    with pytest.raises(ValueError, match=r"nemotron-nas|trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_stock_class_does_not_fill_what_is_missing_with_random_weights(family: str, tmp_path: Path) -> None:
    export(llama_like(family), "nemotron-nas", tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatch"), quiet_transformers():
        classes(family)["AutoModelForCausalLM"].__mro__[2].from_pretrained(tmp_path / "out")


def test_a_smaller_number_of_heads_is_told_with_its_size(tmp_path: Path) -> None:
    edits = [KeepHeads(number, (0, 2)) for number in range(BLOCKS)]
    model = llama_like("llama", edits, num_attention_heads=8, num_key_value_heads=4)
    export(model, "nemotron-nas", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert [config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")] == [4, 2, 4]
    assert_forward_agrees(model, tmp_path / "out")


@torch.no_grad()
def decilm(folder: Path, ids: Tensor) -> Tensor:
    """Logits by the configuration and the weights alone; written for these tests after what the format means."""
    config, weights = config_of(folder), load_file(folder / "model.safetensors")
    used = set()

    def weight(name: str) -> Tensor | None:
        used.add(name)
        return weights.get(name)

    def mapped(x: Tensor, path: str, rows: int, bias: bool) -> Tensor:
        matrix = weight(f"{path}.weight")
        assert matrix is not None
        assert matrix.shape == (rows, x.shape[-1])
        assert (f"{path}.bias" in weights) == bias
        return linear(x, matrix, weight(f"{path}.bias"))

    def norm(x: Tensor, path: str) -> Tensor:
        scale = weight(f"{path}.weight")
        assert scale is not None
        return nn.functional.rms_norm(x, x.shape[-1:], scale, config["rms_norm_eps"])

    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    table = weight("model.embed_tokens.weight")
    assert table is not None
    x = embedding(ids, table)
    rope_config = classes("llama")["AutoConfig"].__mro__[2](
        hidden_size=hidden, head_dim=size, rope_parameters=config["rope_parameters"], num_attention_heads=1
    )
    cos, sin = LlamaRotaryEmbedding(rope_config)(x, torch.arange(ids.shape[1])[None])
    for number, block in enumerate(config["block_configs"]):
        attention, ffn, path = block["attention"], block["ffn"], f"model.layers.{number}"
        if not attention["no_op"]:
            y, bias, groups = (
                norm(x, f"{path}.input_layernorm"),
                config["attention_bias"],
                attention["n_heads_in_group"],
            )
            q, k, v = (
                mapped(y, f"{path}.self_attn.{name}_proj", n * size, bias).unflatten(-1, (n, size)).transpose(1, 2)
                for name, n in (("q", heads), ("k", heads // groups), ("v", heads // groups))
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            seen = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + mapped(seen.transpose(1, 2).flatten(2), f"{path}.self_attn.o_proj", hidden, bias)
        if not ffn["no_op"]:
            y, width, bias = (
                norm(x, f"{path}.post_attention_layernorm"),
                engine_width(ffn["ffn_mult"], hidden),
                config["mlp_bias"],
            )
            gate, up = (mapped(y, f"{path}.mlp.{name}_proj", width, bias) for name in ("gate", "up"))
            x = x + mapped(silu(gate) * up, f"{path}.mlp.down_proj", hidden, bias)
    x = norm(x, "model.norm")
    head = table if config["tie_word_embeddings"] else weight("lm_head.weight")
    assert head is not None
    assert used & weights.keys() == weights.keys()  # nothing is left over
    return linear(x, head)


def assert_forward_agrees(model: Model, folder: Path) -> None:
    ids = tiny_tokens(model, 2, 12).ids
    torch.testing.assert_close(decilm(folder, ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.every_family
@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if FAMILIES[name].not_llama is None])
@pytest.mark.parametrize("tied", [True, False])
def test_a_forward_written_by_hand_gives_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    model = llama_like(family, tie_word_embeddings=tied)
    export(model, "nemotron-nas", tmp_path / "out")
    assert_forward_agrees(model, tmp_path / "out")
    heads = ["lm_head.weight"] * (not tied)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert [name for name in names if not name.startswith("model.")] == heads


def test_folded_norms_and_dropped_blocks_go_to_nemotron_nas(tmp_path: Path) -> None:
    model = llama_like("llama", [UntieHead(), FoldNorms(), *VARIED, DropBlock(2)], tie_word_embeddings=True)
    export(model, "nemotron-nas", tmp_path / "out")
    assert config_of(tmp_path / "out")["num_hidden_layers"] == BLOCKS - 1
    assert_forward_agrees(model, tmp_path / "out")


def test_what_nemotron_nas_cannot_express_is_refused(tmp_path: Path) -> None:
    for model, says in (
        (llama_like("llama", [DropAttention(0)]), "first block"),
        (llama_like("llama", [DropMLP(number) for number in range(BLOCKS)]), "an MLP in some block"),
        (llama_like("llama", [KeepHeads(1, (0,))]), "one number of query heads"),
        (
            llama_like("llama", [KeepNeurons(n, tuple(range(300))) for n in (1, 2)]),
            "others stand in blocks 1, 2: .*--round-to 256",
        ),
        (llama_like("mistral", sliding_window=6), "last 6 tokens"),
        (llama_like("llama", hidden_act="gelu"), "gelu"),
        (tiny("llama"), "--round-to 256"),
    ):
        with pytest.raises(UnsupportedExportError, match=f"nemotron-nas .*{says}.*--to vllm can hold it"):
            export(model, "nemotron-nas", tmp_path / "out")
    for family in FAMILY_NAMES:
        reason = FAMILIES[family].not_llama
        assert reason is None or reason in str(refusal(tiny(family, hidden_size=32), "nemotron-nas"))
    with pytest.raises(UnsupportedExportError, match="rotated or sliced"):
        export(tiny_in("sliced stream", "llama", **SIZES), "nemotron-nas", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_window_longer_than_all_positions_is_none() -> None:
    assert refusal(llama_like("mistral", sliding_window=64), "nemotron-nas") is None


# --- the frame ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_refusing_asks_for_no_weights(family: str) -> None:
    for layout in ("dense", "everything"):
        model = tiny_in(layout, family)
        for to in EXPORTS:
            assert refusal(model.hollow(), to) == refusal(model, to)


@pytest.mark.parametrize("to", FOLDERS)
@pytest.mark.usefixtures("modules")
def test_tokenizer_card_and_licence_come_along(to: str, tmp_path: Path) -> None:
    save(llama_like("llama"), tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("take it")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: Apache-2.0\n---\n")
    export_with_card(load(str(tmp_path / "model")), to, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "take it"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("Hello")["input_ids"] == tiny_tokenizer()("Hello")["input_ids"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`{to}`" in card
    assert EXPORTS[to].USAGE in card
    said = ModelCard(card).data.to_dict()
    assert (said["library_name"], said["license"]) == (EXPORTS[to].LIBRARY, "apache-2.0")
    assert "base_model" not in said
    assert str(tmp_path) not in card + (tmp_path / "out" / EXPORT).read_text()
    assert json.loads((tmp_path / "out" / EXPORT).read_text())["format"] == to
    assert not (tmp_path / "out" / RECORD).exists()  # which would make it the result of a pruning


def test_an_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_like("llama")
    export(model, "padded", tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError):
        export(model, "nemotron-nas", tmp_path / "out")

    def broken(*_: object) -> None:
        raise RuntimeError("half way")

    monkeypatch.setattr("secateur.export.write_beside", broken)
    for folder, overwrite in (("out", True), ("new", False)):
        with pytest.raises(RuntimeError, match="half way"):
            export(model, "nemotron-nas", tmp_path / folder, overwrite=overwrite)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    export(model, "nemotron-nas", tmp_path / "out", overwrite=True)  # our own export is replaced
    assert config_of(tmp_path / "out")["model_type"] == "nemotron-nas"


def test_names_and_options_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithType:
        """As a format with an option, which also decides whether a model fits."""

        def refuses(self, model: Model, *, type: str = "f16") -> str | None:
            return "wants whole blocks" if type == "q4_0" else None

        def write(self, model: Model, folder: Path, *, type: str = "f16") -> dict[str, str]:
            (folder / "type").write_text(type)
            return {}

        def loads_in(self, model: Model) -> str:
            return "nothing"

    model = tiny("llama")
    with pytest.raises(UnknownNameError, match="Did you mean 'padded'"):
        export(model, "paded", tmp_path / "out")
    with pytest.raises(InvalidOptionError, match="padded has no option 'type'; it has max_shard_size"):
        export(model, "padded", tmp_path / "out", type="f16")
    monkeypatch.setitem(EXPORTS, "typed", WithType())
    with pytest.raises(InvalidOptionError, match="typed has no option 'kind'; it has type"):
        export(model, "typed", tmp_path / "out", kind="f16")
    with pytest.raises(
        UnsupportedExportError, match=r"typed wants whole blocks \(--to typed without these options can hold it\)"
    ):
        export(model, "typed", tmp_path / "out", type="q4_0")
    assert not (tmp_path / "out").exists()
    export(model, "typed", tmp_path / "out", type="f32")
    assert (tmp_path / "out" / "type").read_text() == "f32"
    assert json.loads((tmp_path / "out" / EXPORT).read_text())["options"] == {"type": "f32"}


# --- the command ---


def test_the_command_exports_and_inspect_says_what_fits(tmp_path: Path) -> None:
    save(apply_all(tiny("llama"), [DropAttention(0), KeepNeurons(1, (1, 2))]), tmp_path / "model")
    shown = call("inspect", tmp_path / "model", "--json").json["exports"]
    assert shown["padded"] is None
    assert "first block" in shown["nemotron-nas"]
    told = call("inspect", tmp_path / "model").out
    assert "export --to padded: fits" in told
    assert f"export --to nemotron-nas: no, it {shown['nemotron-nas']}" in told
    done = call("export", tmp_path / "model", "--to", "padded", "--out", tmp_path / "out", "--json")
    assert done.code == 0
    assert done.json["to"] == "padded"
    assert "transformers" in done.json["loads_in"]
    ids = tiny_tokens(tiny("llama"), 2, 12).ids
    one, two = (logits(load(str(tmp_path / name)), ids) for name in ("model", "out"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    again = call("export", tmp_path / "model", "--to", "padded", "--out", tmp_path / "out")
    assert (again.code, "exists" in again.err) == (3, True)
    over = call("export", tmp_path / "model", "--to", "padded", "--out", tmp_path / "out", "--overwrite")
    assert over.code == 0
    assert "written to" in over.out


def test_the_command_refuses_with_exit_code_3_and_leaves_nothing(tmp_path: Path) -> None:
    save(apply_all(tiny("llama"), [DropAttention(0)]), tmp_path / "model")
    (tmp_path / "model" / EXPORT).write_text("{}")  # so that it may be overwritten, if it were not what is read
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()  # no weights are read
    before = contents(tmp_path)
    out = tmp_path / "new" / "out"
    for words, says in (
        (("--to", "nemotron-nas", "--out", out), "--to vllm can hold it"),
        (("--to", "onnx", "--out", out), "unknown export 'onnx'"),
        (("--to", "padded", "--type", "f16", "--out", out), "no option 'type'"),
        (("--to", "padded", "--out", tmp_path), "did not write"),
        (("--to", "padded", "--out", tmp_path / "model"), "exists"),
        (("--to", "padded", "--overwrite", "--out", tmp_path / "model"), "which this run reads"),
        (("--to", "padded", "--max-shard-size", "big", "--out", out), "as 5GB or 500MB"),
        (("--to", "padded", "--out", out), "model.safetensors"),
    ):
        told = call("export", tmp_path / "model", *words)
        assert told.code == 3, told.err
        assert says in told.err
        assert contents(tmp_path) == before
        assert not out.parent.exists()


def test_a_dense_model_of_transformers_is_exported_too(tmp_path: Path) -> None:
    tiny_hf("llama", **SIZES).save_pretrained(tmp_path / "dense")
    for to in FOLDERS:
        assert call("export", tmp_path / "dense", "--to", to, "--out", tmp_path / to).code == 0
    shutil.rmtree(tmp_path / "dense")
    ids = tiny_tokens(tiny("llama", **SIZES), 2, 12).ids
    expected = logits(tiny_hf("llama", **SIZES), ids)
    torch.testing.assert_close(logits(whole_load(tmp_path / "padded"), ids), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(decilm(tmp_path / "nemotron-nas", ids), expected, rtol=0, atol=1e-5)


def test_a_model_is_exported_from_its_files_as_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf("llama", **SIZES).save_pretrained(tmp_path / "dense")
    streamed, from_files = list[Model](), secateur.model.load.from_checkpoint

    def noted(*given: Any) -> Model:
        streamed.append(from_files(*given))
        return streamed[-1]

    monkeypatch.setattr(secateur.model.load, "from_checkpoint", noted)
    for to in FOLDERS:
        for flag, count in (("--stream", 1), ("--no-stream", 0)):
            out = tmp_path / f"{to}{flag}"
            assert call("export", tmp_path / "dense", "--to", to, flag, "--out", out).code == 0
            assert len(streamed) == count
            streamed.clear()
        one, two = (
            (tmp_path / f"{to}{flag}" / "model.safetensors").read_bytes() for flag in ("--stream", "--no-stream")
        )
        assert one == two


def test_the_help_names_every_export() -> None:
    told = call("export", "--help").out
    assert [name for name in EXPORTS if name not in told] == []
    assert padded in EXPORTS.values()
