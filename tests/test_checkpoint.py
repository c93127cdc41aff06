"""Saving and loading: nothing is lost, the tier is the most widely loadable one, and damage is noticed."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
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
    possible,
    tiny,
    tiny_hf,
    tiny_in,
    tiny_tokenizer,
    tiny_tokens,
    whole_load,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import load
from secateur.errors import CheckpointError, FetchError, InvalidOptionError, OutputExistsError
from secateur.export import save, tier
from secateur.hf import quiet_transformers
from secateur.model import modeling_secateur
from secateur.model.described import SUMS, Description, verify_weights
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES, classes, width_of
from secateur.record import RECORD
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, KeepHeads, KeepNeurons

SOURCE = Path(modeling_secateur.__file__)
PER_BLOCK = ("qwen2", "smollm3", "gemma3_text")  # whose configurations name a kind for each block
SOME = ("llama", "qwen2", "phi3", "opt")
# What transformers 4 reads beside the words of 5: test_transformers_4.py
OLD_SPELLING = {
    "torch_dtype", "rope_theta", "partial_rotary_factor", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
}  # fmt: skip
FEW = ("one KV group each", "everything", "sliced stream and more")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def assert_same_model(one: Model, other: Model) -> None:
    assert one.fingerprint() == other.fingerprint()
    ids = tiny_tokens(one, 2, 12).ids
    assert torch.equal(logits(one, ids), logits(other, ids))
    assert list(one.layout().blocks.values()) == list(other.layout().blocks.values())
    assert one.layout().other == other.layout().other


def is_stock(family: str, layout: str) -> bool:
    if layout in STREAM_LAYOUTS:
        return False
    if not layouts(tiny(family))[layout]:  # a family that cannot do its edits
        return True
    return layout in STOCK_LAYOUTS and (layout != "one KV group each" or FAMILIES[family].free_head_dim)


def settings_of(model: Model) -> dict[str, Any]:
    """The configuration without what `assert_same_model` compares on the real modules, and without names."""
    row = model.family
    shapes = {"per_layer_config", "head_dim", row.width, row.query_heads, row.kv_heads}
    names = {"architectures", "auto_map", "transformers_version", "_name_or_path", "dtype"}
    return {name: value for name, value in model.hf.config.to_dict().items() if name not in shapes | names}


UNIT = {("llama", layout) for layout in COVERING} | {(family, layout) for family in FAMILY_NAMES for layout in FEW}
CASES = [
    pytest.param(family, layout, marks=() if (family, layout) in UNIT else pytest.mark.slow)
    for family in FAMILY_NAMES
    for layout in (*LAYOUTS, *(STREAM_LAYOUTS if family in REBASABLE else ()))
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_what_is_saved_is_loaded(family: str, layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    model = tiny_in(layout, family)
    before = model.hf.config.to_dict(), str(model.hf), model.fingerprint()
    written = save(model, folder)
    named = {name: model.hf.config.to_dict().get(name) for name in ("architectures", "auto_map")}
    assert {**before[0], **named} == {**model.hf.config.to_dict(), **named}  # saving changes no more than these names
    assert (str(model.hf), model.fingerprint()) == before[1:]
    assert written == tier(model) == ("A" if is_stock(family, layout) else "B")
    row, config, hf = FAMILIES[family], config_of(folder), whole_load(folder)
    stock_config, stock_class = (classes(family)[auto].__mro__[2] for auto in ("AutoConfig", "AutoModelForCausalLM"))
    if written == "A":
        assert config["model_type"] == family
        assert config["architectures"] == [stock_class.__name__]
        assert not {"auto_map", "per_layer_config"} & config.keys()
        assert not list(folder.glob("*.py"))
        assert type(hf) is stock_class
    else:
        assert config["model_type"] == f"secateur-{family}"
        named = {auto: f"modeling_secateur.{cls.__name__}" for auto, cls in classes(family).items()}
        assert config["auto_map"] == named
        assert (folder / SOURCE.name).read_bytes() == SOURCE.read_bytes()
        assert type(hf) is classes(family)["AutoModelForCausalLM"]
        assert config[row.width] < 0  # what makes the stock class fail
    assert config.get("torch_dtype") == (config["dtype"] if written == "A" else None)
    assert isinstance(hf.config, stock_config)
    loaded = load(str(folder))
    assert loaded.numbers == list(range(len(model.numbers)))
    assert_same_model(loaded, model)
    assert settings_of(loaded) == settings_of(model)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_dense_model_is_saved_as_transformers_would(family: str, tmp_path: Path) -> None:
    tiny_hf(family).save_pretrained(tmp_path / "theirs")
    save(tiny(family), tmp_path / "ours")
    ours, theirs = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    if FAMILIES[family].free_head_dim:
        head_dim = ours.pop("head_dim")
        assert head_dim == (theirs.pop("head_dim", None) or theirs["hidden_size"] // theirs["num_attention_heads"])
    if theirs[FAMILIES[family].width] is None:
        theirs[FAMILIES[family].width] = width_of(tiny_hf(family).config, FAMILIES[family])  # ours says it
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() <= OLD_SPELLING
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names | {SUMS}
    for name in names - {"config.json"}:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("heads", [2, 3])
def test_a_uniform_number_of_heads(family: str, heads: int, tmp_path: Path) -> None:
    """Stock if the stock class takes that many heads, with the same logits either way."""
    model = tiny(family, num_attention_heads=8, num_key_value_heads=4, head_dim=4, hidden_size=32)
    apply_all(model, possible(model, [KeepHeads(number, tuple(range(4 - heads, 4))) for number in range(BLOCKS)]))
    written = save(model, tmp_path / "pruned")
    asks = family in ("llama", "gemma2", "gemma3_text")  # whose number of heads must divide the hidden size
    takes_it = FAMILIES[family].free_head_dim and not (asks and 32 % (2 * heads))
    assert written == ("A" if takes_it else "B")
    ids = tiny_tokens(model, 2, 12).ids
    assert torch.equal(logits(whole_load(tmp_path / "pruned"), ids), logits(model, ids))


@pytest.mark.parametrize("family", [*SOME, "gpt_neox"])  # the last one's head has another name in files
def test_a_pruned_model_can_be_pruned_again(family: str, tmp_path: Path) -> None:
    edits = [DropBlock(1), DropAttention(2), KeepNeurons(3, tuple(range(9)))]
    more = [KeepNeurons(0, (1, 2, 3)), DropMLP(1), KeepHeads(2, (1,)), KeepNeurons(2, (0, 8))]  # by its new numbers
    same_more = [KeepNeurons(0, (1, 2, 3)), DropMLP(2), KeepHeads(3, (1,)), KeepNeurons(3, (0, 8))]
    tiny_hf(family).save_pretrained(tmp_path / "dense")
    save(apply_all(load(str(tmp_path / "dense")), edits), tmp_path / "once")
    again = apply_all(load(str(tmp_path / "once")), more)
    assert save(again, tmp_path / "twice") == "B"
    assert_same_model(load(str(tmp_path / "twice")), apply_all(tiny(family), edits + same_more))
    to_one_shape = [DropBlock(1), KeepNeurons(0, tuple(range(9)))]
    again = apply_all(load(str(tmp_path / "once")), to_one_shape)
    assert save(again, tmp_path / "even") == "A"  # stock again
    assert type(whole_load(tmp_path / "even")) is classes(family)["AutoModelForCausalLM"].__mro__[2]
    assert_same_model(load(str(tmp_path / "even")), again)


@pytest.mark.parametrize(
    ("family", "tied", "layout"),
    [
        *((family, True, "everything") for family in FAMILY_NAMES),
        *((family, False, "blocks dropped") for family in FAMILY_NAMES),
        *(("llama", tied, layout) for tied in (True, False) for layout in ("rotated stream", "sliced stream")),
    ],
)
def test_ties_and_dtypes_are_kept(family: str, tied: bool, layout: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    model = tiny_in(layout, family, tie_word_embeddings=tied)
    for parameter in model.hf.parameters():  # buffers, such as rotary frequencies, stay float32
        parameter.data = parameter.data.to(dtype)
    save(model, tmp_path / "pruned")
    assert config_of(tmp_path / "pruned")["dtype"] == "bfloat16"
    loaded = load(str(tmp_path / "pruned"))
    assert_same_model(loaded, model)
    assert loaded.dtype == dtype
    for each in (model.hf, loaded.hf, whole_load(tmp_path / "pruned")):
        head, embeddings = each.get_output_embeddings().weight, each.get_input_embeddings().weight
        assert (head.data_ptr() == embeddings.data_ptr()) == tied
    assert load(str(tmp_path / "pruned"), dtype="float32").dtype == torch.float32


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*.safetensors*")}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("layout", [pytest.param("blocks dropped", marks=pytest.mark.slow), "everything"])
def test_weights_are_written_as_transformers_would(family: str, layout: str, tmp_path: Path) -> None:
    """To the byte, whole and in shards, where a block may lie in two, and with several dtypes in a block."""
    model = tiny_in(layout, family, num_hidden_layers=BLOCKS if family in PER_BLOCK else 13)
    for dtypes in ("float32", "mixed"):
        if dtypes == "mixed":
            for name, parameter in model.hf.named_parameters():
                parameter.data = parameter.data.to(torch.bfloat16 if "norm" in name else torch.float32)
        for size in ("1GB", "20KB"):
            ours, theirs = tmp_path / f"ours {size} {dtypes}", tmp_path / f"theirs {size} {dtypes}"
            hf = model.hf
            if save(model, ours, max_shard_size=size) == "A":
                hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ours))
                for name, parameter in hf.named_parameters():
                    parameter.data = model.hf.get_parameter(name).data
            with quiet_transformers():
                hf.save_pretrained(theirs, max_shard_size=size)
            assert weight_files(ours) == weight_files(theirs)
            assert hf is not model.hf or config_of(ours) == config_of(theirs)
            assert (len(weight_files(ours)) > 2) == (size == "20KB")
            assert verify_weights(Description("", {}, ours))
        if dtypes == "float32":
            assert_same_model(load(str(ours)), model)


@pytest.mark.parametrize("layout", ["blocks dropped", "everything"])
def test_tokenizer_template_and_generation_settings_come_along(layout: str, tmp_path: Path) -> None:
    model = tiny_in(layout, "llama")
    model.tokenizer = tiny_tokenizer()
    model.hf.generation_config.update(max_new_tokens=17, do_sample=True, temperature=0.5)
    save(model, tmp_path / "pruned", files={"README.md": "# Prüfung\n", "notes.json": '{"method": "m"}'})
    loaded = load(str(tmp_path / "pruned"))
    assert loaded.tokenizer is not None
    messages = [{"role": "user", "content": "Hello, there!"}]
    theirs, ours = (
        each.apply_chat_template(messages, add_generation_prompt=True) for each in (loaded.tokenizer, tiny_tokenizer())
    )
    assert theirs["input_ids"] == ours["input_ids"]
    settings = loaded.hf.generation_config
    assert (settings.max_new_tokens, settings.do_sample, settings.temperature) == (17, True, 0.5)
    assert (tmp_path / "pruned" / "README.md").read_text(encoding="utf-8") == "# Prüfung\n"
    assert (tmp_path / "pruned" / "notes.json").read_text() == '{"method": "m"}'


@pytest.mark.parametrize("layout", ["blocks dropped", "everything"])
def test_settings_that_transformers_loads_and_does_not_save_lose_no_model(layout: str, tmp_path: Path) -> None:
    """A temperature without sampling, as in many checkpoints."""
    model = tiny_in(layout, "llama")
    model.hf.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="temperature"):
        model.hf.generation_config.save_pretrained(tmp_path)
    save(model, tmp_path / "pruned")
    assert load(str(tmp_path / "pruned")).hf.generation_config.temperature == 0.5


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_transformers_own_saving_works_too(family: str, tmp_path: Path) -> None:
    """`hf.save_pretrained`, which trainers and adapters call, writes what `load` reads: always tier B."""
    for layout in ("dense", "everything"):
        once, twice = tmp_path / layout, tmp_path / f"{layout} again"
        model = tiny_in(layout, family)
        model.hf.save_pretrained(once)
        loaded = load(str(once))
        assert_same_model(loaded, model)
        loaded.hf.save_pretrained(twice)
        assert_same_model(load(str(twice)), model)
        assert config_of(twice) == config_of(once)
        assert config_of(once)["model_type"] == f"secateur-{family}"


def test_the_per_layer_schema_is_transformers_own(tmp_path: Path) -> None:
    edits = [DropAttention(0), DropMLP(1), KeepNeurons(2, (4, 5)), KeepHeads(3, (0,))]
    save(apply_all(tiny("llama"), edits), tmp_path / "pruned")
    config = config_of(tmp_path / "pruned")
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 48, "skip": ["attention"]},
        "1": {"intermediate_size": 0, "skip": ["mlp"]},
        "2": {"intermediate_size": 2},
        "3": {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1},
    }
    assert config["num_hidden_layers"] == BLOCKS
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)


def test_what_is_there_is_touched_only_if_asked_and_ours(tmp_path: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    model, written, home = tiny_in("everything", "llama"), tmp_path / "pruned", tmp_path / "home"
    save(tiny("llama"), written, files={"README.md": "old", RECORD: "{}"})
    home.mkdir()
    (home / "precious").write_text("x")
    before = contents()
    for folder, overwrite in ((written, False), (home, False), (home, True)):
        with pytest.raises(OutputExistsError):
            save(model, folder, overwrite=overwrite)
    for size in ("500B", "big", "GB", "1 XB"):
        with pytest.raises(InvalidOptionError, match="as 5GB or 500MB"):
            save(model, written, overwrite=True, max_shard_size=size)
    assert contents() == before
    save(model, written, overwrite=True, max_shard_size="40KB")
    assert not (written / "README.md").exists()
    assert_same_model(load(str(written)), model)
    assert len({stat.S_IMODE(path.stat().st_mode) for path in written.iterdir()}) == 1  # whoever reads one reads all


# --- the modeling file ---


def test_classes_are_found_by_the_names_that_checkpoints_ask_for() -> None:
    for family in FAMILY_NAMES:
        for cls in classes(family).values():
            assert getattr(modeling_secateur, cls.__name__) is cls
    with pytest.raises(AttributeError, match="SecateurBloomerConfig"):
        modeling_secateur.SecateurBloomerConfig  # noqa: B018  # only looked up


# --- damage and bad arguments ---


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    save(tiny_in("everything", "llama"), tmp_path / "pruned")
    (tmp_path / "pruned" / SUMS).unlink()  # which would notice first: see test_bad_input.py
    return tmp_path / "pruned"


def edit_weights(pruned: Path, word: str, change: Any) -> str:
    """Change (or, to None, take away) the first tensor whose name has the word; return the name."""
    weights = load_file(pruned / "model.safetensors")
    name = next(name for name in weights if word in name)
    changed = change(weights.pop(name))
    weights |= {} if changed is None else {name: changed.contiguous()}
    save_file(weights, pruned / "model.safetensors", metadata={"format": "pt"})
    return name


def test_damage_is_noticed(pruned: Path) -> None:
    path, settings = pruned / "model.safetensors", pruned / "config.json"
    whole, config = path.read_bytes(), settings.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load(str(pruned))
        path.write_bytes(whole)
        settings.write_bytes(config)

    refused(f"missing keys: {edit_weights(pruned, 'o_proj', lambda tensor: None)}")
    edit_weights(pruned, "down_proj.weight", lambda tensor: tensor[:, :-1])
    refused("pruned")
    for content in (whole[:-100], whole[:50]):
        path.write_bytes(content)
        refused("pruned")
    path.unlink()
    refused(r"model\.safetensors")
    settings.write_text("{")
    refused(r"config\.json")
    load(str(pruned))


def test_what_is_no_model_is_refused(tmp_path: Path, pruned: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, options, error, says in (
        (tmp_path / "nowhere", {}, CheckpointError, "there is no folder"),
        (tmp_path / "empty", {}, CheckpointError, r"no config\.json"),
        ("nobody/no-such-model", {}, FetchError, "nobody/no-such-model"),
        (pruned, {"dtype": "float64"}, InvalidOptionError, "float64"),
        (pruned, {"device": "abacus"}, InvalidOptionError, "abacus"),
    ):
        with pytest.raises(error, match=says):
            load(str(name), **options)


def test_loading_leaves_the_callers_logging_alone(pruned: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        for verbosity in (logging.INFO, logging.ERROR):
            logging.set_verbosity(verbosity)
            load(str(pruned))
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, True)
    finally:
        logging.set_verbosity(before)
