"""Models that secateur cannot prune are refused by name, before anything is read, each with the way out."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import HfApi, errors
from models import tiny, tiny_hf, tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from secateur import load
from secateur.errors import CheckpointError, FetchError, SecateurError, UnsupportedModelError
from secateur.hf import quiet_transformers
from secateur.model import described
from secateur.model import load as load_module
from secateur.model.described import Description
from secateur.model.handle import Model
from secateur.model.load import Source
from secateur.model.modeling_secateur import FAMILIES
from secateur.model.refusals import ARCHITECTURE, base_model, refuse

EXPERTS = "mixture of experts"
STATE = "linear attention, recurrence or state space"
MODAL = "multimodal"
STOCK = {
    EXPERTS: ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "phimoe", "dbrx", "ernie4_5_moe"),
    STATE: ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "recurrent_gemma", "bamba", "rwkv", "zamba2"),
    MODAL: ("gemma3", "llava", "qwen2_5_vl", "mistral3", "idefics3"),
    "encoder-decoder": ("t5", "bart", "pegasus"),
}
ASKS: tuple[Callable[[str], Model], ...] = (load, lambda name: Source(name=name).hollow())


def folder_with(folder: Path, config: dict[str, Any], **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(("reason", "kind"), [(reason, kind) for reason, kinds in STOCK.items() for kind in kinds])
def test_models_of_other_kinds_are_refused_by_their_kind(reason: str, kind: str, tmp_path: Path) -> None:
    with quiet_transformers():
        config = CONFIG_MAPPING[kind]()
        config.save_pretrained(tmp_path)
    for ask in ASKS:
        with pytest.raises(UnsupportedModelError, match=f"{tmp_path}.*{reason}.*{kind}"):
            ask(str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=reason):  # as a model in memory would be
        refuse(Description("this model", config.to_dict()), *ARCHITECTURE)


def test_what_is_both_is_refused_as_one_of_them_and_no_supported_family_as_either() -> None:
    for kind in ("qwen3_next", "jamba", "granitemoehybrid", "nemotron_h"):
        with pytest.raises(UnsupportedModelError, match=f"{EXPERTS}|{STATE}"):
            refuse(Description("m", CONFIG_MAPPING[kind]().to_dict()), *ARCHITECTURE)
    for family in FAMILIES:
        refuse(Description("m", CONFIG_MAPPING[family]().to_dict()), *ARCHITECTURE)


def test_a_model_in_memory_is_refused_too() -> None:
    hf = tiny_hf("llama")
    hf.config.quantization_config = {"quant_method": "awq"}
    other = tiny_hf("llama")
    other._hf_peft_config_loaded = True
    for each, says in ((hf, r"quantised \(awq\)"), (other, "merge_and_unload")):
        with pytest.raises(UnsupportedModelError, match=says):
            Model(each)


# --- multimodal: the text model inside ---


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 40}  # fmt: skip
VISION = {"model_type": "clip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 16, "image_size": 16, "patch_size": 8}  # fmt: skip


def run_snippet(message: str) -> None:
    """Run the Python that a message tells to run."""
    code = re.search(r'python -c ("[^"]*")', message)
    assert code, message
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        exec(shlex.split(code[1])[0], {})


def test_the_text_model_inside_can_be_saved_as_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = {"model_type": "llama", **SMALL}
    config = CONFIG_MAPPING["llava"](text_config=text, vision_config=VISION)
    with quiet_transformers():
        whole = AutoModelForImageTextToText.from_config(config).eval()
        whole.save_pretrained("llava")
    with pytest.raises(UnsupportedModelError, match="The text model inside, a llama") as refused:
        load("llava")
    run_snippet(str(refused.value))
    inside = load("llava-text")
    ids = torch.arange(5, 17)[None]
    assert torch.equal(inside.hf(ids).logits, whole(input_ids=ids).logits)


def test_a_text_model_that_is_not_supported_either_is_named(tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "falcon"}, "vision_config": {}}
    with pytest.raises(UnsupportedModelError, match=r"of type 'falcon', is not supported either; supported: .*llama"):
        load(str(folder_with(tmp_path / "m", config)))


# --- quantised, pickled, adapters ---


LLAMA = {"model_type": "llama"}
QUANTISED: list[tuple[dict[str, Any], dict[str, str], str, str | None]] = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "gptq", None),
    ({"quantization_config": {"quant_method": "awq"}, "_name_or_path": "org/base"}, {}, "awq", "org/base"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}, "_name_or_path": "/me/m"}, {}, "bitsandbytes", None),
    ({"quantization_config": {"quant_method": "fp8"}}, {"README.md": "---\nbase_model: a/b\n---\n"}, "fp8", "a/b"),
    (
        {"quantization_config": {"quant_method": "compressed-tensors"}, "_name_or_path": "c/d"},
        {"README.md": "---\nbase_model:\n- a/b\n- e/f\n---\n# A card"}, "compressed-tensors", "a/b",
    ),
    ({"quantization": {"bits": 4, "group_size": 64}}, {"README.md": "no front matter"}, "unknown method", None),
    ({}, {"quantize_config.json": "{}", "README.md": "---\nbase_model: [broken\n---\n"}, "gptq", None),
    ({}, {"quant_config.json": "{}"}, "awq", None),
]  # fmt: skip


@pytest.mark.parametrize(("config", "files", "method", "base"), QUANTISED, ids=[f"{q[2]} {q[3]}" for q in QUANTISED])
def test_quantised_checkpoints_name_method_and_base(
    config: dict[str, Any], files: dict[str, str], method: str, base: str | None, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "m", {**LLAMA, **config}, **files)
    named = rf" \({base}\)" if base else ""
    says = rf"is quantised \({method}\).*Prune the base model{named} and quantise the result"
    with pytest.raises(UnsupportedModelError, match=says):
        load(str(folder))


def test_gguf_files_alone_name_the_base_which_is_never_the_model_itself(tmp_path: Path) -> None:
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("---\nbase_model: org/base\n---\n")
    with pytest.raises(UnsupportedModelError, match=r"GGUF.*\(org/base\), in safetensors"):
        load(str(tmp_path))
    assert base_model(Description("org/m", {"_name_or_path": "org/m"})) is None
    assert base_model(Description("org/m", {"_name_or_path": 3, "base_model_name_or_path": "org/n"})) == "org/n"


def test_pickles_are_not_read_and_can_be_converted_as_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hf = tiny_hf("llama")
    with quiet_transformers():
        hf.config.save_pretrained("m")
        tiny_tokenizer().save_pretrained("m")
    torch.save(hf.state_dict(), "m/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles only") as refused:
        load("m")
    run_snippet(str(refused.value))
    converted = load("m-safetensors")
    assert converted.fingerprint() == tiny("llama").fingerprint()
    assert converted.tokenizer is not None


@pytest.mark.parametrize("config", [None, LLAMA])
def test_adapters_are_to_be_merged(config: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "lora", config or {})
    if config is None:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="PEFT adapter of org/base") as refused:
        load(str(folder))
    code = re.search(r'python -c "([^"]*)"', str(refused.value))
    assert code
    compile(code[1], "snippet", "exec")
    assert f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('lora-merged')" in code[1]
    assert "T.from_pretrained('org/base').save_pretrained('lora-merged')" in code[1]
    (folder / "adapter_config.json").write_text("{")  # damaged, and still an adapter
    with pytest.raises(UnsupportedModelError, match="PEFT adapter, no whole model"):
        load(str(folder))


# --- unknown kinds, and a checkpoint's own code ---


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (
            {"model_type": "my_model", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
            UnsupportedModelError,
            "'my_model' that transformers does not have.*never runs a checkpoint's code",
        ),
        ({"model_type": "my_model"}, UnsupportedModelError, "does not know; supported: .*llama.*update transformers"),
        ({}, CheckpointError, "names no model_type"),
        ({"model_type": ["llama"]}, CheckpointError, "names no model_type"),
        ({"model_type": "bert"}, UnsupportedModelError, "'bert' are not supported; supported: .*llama"),
    ],
    ids=str,
)
def test_unknown_kinds_are_refused_and_no_code_is_run(
    config: dict[str, Any], error: type[SecateurError], says: str, tmp_path: Path
) -> None:
    # the name of the folder must not decide: transformers guesses from it
    folder = folder_with(tmp_path / "llama", config, **{"evil.py": f"open({str(tmp_path / 'ran')!r}, 'w')"})
    for ask in ASKS:
        with pytest.raises(error, match=says):
            ask(str(folder))
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_stock_model_is_not_run(tmp_path: Path) -> None:
    with quiet_transformers():
        tiny_hf("phi3").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    folder_with(tmp_path / "m", config, **{"evil.py": f"open({str(tmp_path / 'ran')!r}, 'w')"})
    assert load(str(tmp_path / "m")).fingerprint() == tiny("phi3").fingerprint()
    assert not (tmp_path / "ran").exists()


# --- the hub ---


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (errors.GatedRepoError, "accept its licence at https://huggingface.co/org/m.*hf auth login"),
        (errors.RepositoryNotFoundError, "hub has no org/m.*private.*HF_TOKEN"),
        (errors.RevisionNotFoundError, "org/m has no such revision"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room, or set HF_HOME"),
        (ConnectionError("Name or service not known"), "check the network.*no folder here"),
        (TimeoutError("timed out"), "check the network, the proxy and HF_ENDPOINT"),
    ],
)
def test_hub_errors_say_where_licence_and_token_go(cause: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(headers={}, request=None)
    cause = cause("the server's words", response=response) if isinstance(cause, type) else cause

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("cannot load") from cause

    monkeypatch.setattr(described, "hf_hub_download", fail)
    monkeypatch.setattr(described, "is_offline_mode", lambda: False)
    with pytest.raises(FetchError, match=says):
        load("org/m")


@pytest.mark.parametrize("name", ["org/m", "m", "a b", "m" * 300, "..", "org/" + "m" * 5000, "x\0y"])
def test_names_that_are_nothing_are_refused(name: str) -> None:
    for ask in ASKS:
        with pytest.raises((FetchError, CheckpointError)):
            ask(name)


def test_what_the_hub_has_instead_of_a_model_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    listing: list[str] = []

    def only_the_adapter(repository: str, name: str, **options: Any) -> str:
        if repository == "org/lora" and name == "adapter_config.json":
            return str(tmp_path / name)
        raise errors.RemoteEntryNotFoundError(name, response=Mock())

    monkeypatch.setattr(described, "hf_hub_download", only_the_adapter)
    monkeypatch.setattr(load_module, "is_offline_mode", lambda: False)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *a, **k: listing)
    with pytest.raises(UnsupportedModelError, match="org/lora is a PEFT adapter of org/base"):
        load("org/lora")
    with pytest.raises(CheckpointError, match=r"org/m is no model: it has no config\.json"):
        load("org/m")
    listing += ["README.md", "m.Q4_K_M.gguf"]
    with pytest.raises(UnsupportedModelError, match="org/m holds GGUF files"):
        load("org/m")
