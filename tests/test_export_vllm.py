"""Tier B for vLLM's transformers backend: stubs where something is gone, the same logits, and no need of secateur.

vLLM itself is not installed here; `bench/vllm_parity.py` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, LAYOUTS, ClosedModel, layouts, logits, tiny, tiny_hf, tiny_in, whole_load
from safetensors.torch import load_file

from secateur.export import vllm
from secateur.surgery.apply import apply

IDS = torch.randint(5, 90, (2, 11), generator=torch.Generator().manual_seed(1))
SOME = ("everything", "block 0 without attention", "mixed KV groups", "nothing left but norms")
SERVED = [family for family in FAMILY_NAMES if family not in vllm.NOT_SERVED]
CASES = [
    pytest.param(family, layout, marks=() if layout == "everything" or family == "llama" else pytest.mark.slow)
    for family in SERVED
    for layout in SOME
]

ALONE = """
import importlib.abc, sys


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "secateur":
            raise ModuleNotFoundError("No module named 'secateur'", name="secateur")


sys.meta_path.insert(0, NotInstalled())
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
ids, found = torch.tensor(eval(sys.argv[1])), {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for parameter in model.parameters():  # aligned as torch aligns them
        parameter.data = parameter.data.clone()
    base = AutoModel.from_config(model.config, trust_remote_code=True)  # as vLLM makes it
    assert base.is_backend_compatible() and type(base).config_class is type(model.config)
    with torch.no_grad():
        found[folder] = model(input_ids=ids, use_cache=False).logits
save_file(found, "found.safetensors")
"""


def in_own_memory(hf: Any) -> Any:
    """The model, its weights where torch puts them: products are equal to the bit only where they are aligned alike,
    and in a file a weight begins anywhere."""
    for parameter in hf.parameters():
        parameter.data = parameter.data.clone()
    return hf


def written(model: Any, folder: Path, shards: str = "5GB") -> dict[str, Any]:
    """Write a model; return its configuration as it stands in the file."""
    assert vllm.refuses(model) is None
    folder.mkdir()
    sums = vllm.write(model, folder, shards)
    assert set(sums) == {path.name for path in folder.glob("*.safetensors")}
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_with_stubs_it_is_the_same_model(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny_in(layout, family)
    before, here = logits(in_own_memory(model.hf), IDS), model.layout()
    config = written(model, tmp_path / "out")
    loaded = in_own_memory(whole_load(tmp_path / "out").eval())
    assert torch.equal(logits(loaded, IDS), before)
    prompt = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS, **prompt), model.hf.generate(IDS, **prompt))
    assert model.layout() == here
    assert torch.equal(logits(model, IDS), before)  # it was left alone
    assert "skip" not in json.dumps(config["per_layer_config"])
    assert config["head_dim"] > 0
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= config["auto_map"].keys()


def test_a_stub_is_as_small_as_can_be(tmp_path: Path) -> None:
    model = tiny_in("nothing left but norms", "llama")
    config = written(model, tmp_path / "out")
    layer = {"intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    assert all(each == layer for each in config["per_layer_config"].values())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.")}
    assert not any(tensor.any() for tensor in inside.values())
    assert inside["model.layers.0.self_attn.q_proj.weight"].shape == (4, model.hidden_size)


def test_what_vllm_must_be_told_is_said(tmp_path: Path) -> None:
    """It divides the hidden size by the whole's number of heads, and multiplies the logits by what it finds."""
    model = tiny_in("mixed KV groups", "granite")
    config = written(model, tmp_path / "out")
    assert config["head_dim"] == model.layout().blocks[1].head_dim
    assert config["logit_scale"] * config["logits_scaling"] == 1


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_closed_blocks_are_read_one_by_one(shards: str, tmp_path: Path) -> None:
    """As of a streamed model; the files are the same."""
    closed, plain = ClosedModel(tiny_hf("llama")), tiny("llama")
    for model in (closed, plain):
        for edit in layouts(tiny("llama"))["everything"]:
            apply(model, edit)
    closed.fetched.clear()
    written(closed, tmp_path / "closed", shards)
    written(plain, tmp_path / "plain", shards)
    assert closed.block_openings == closed.numbers
    files = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    assert len(files) == 1 or shards == "20KB"
    for name in files:
        assert (tmp_path / "closed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_what_it_cannot_hold_is_refused() -> None:
    assert "SliceGPT" in str(vllm.refuses(tiny_in("sliced stream", "llama")))
    assert "16 wide" in str(vllm.refuses(tiny("opt", word_embed_proj_dim=16)))
    hf = tiny("llama")
    type(hf.hf)._supports_attention_backend, before = False, type(hf.hf)._supports_attention_backend
    try:
        assert "attention interface" in str(vllm.refuses(hf))
    finally:
        type(hf.hf)._supports_attention_backend = before


@pytest.mark.slow
def test_it_loads_where_secateur_is_not(tmp_path: Path) -> None:
    expected = {}
    for family in ("llama", "phi"):
        model = tiny_in("everything", family)
        written(model, tmp_path / family)
        expected[family] = logits(in_own_memory(model.hf), IDS)
    own = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(IDS.tolist()), *expected],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, cwd=tmp_path, env={**os.environ, **own},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert all(torch.equal(found[family], expected[family]) for family in expected)


@pytest.mark.slow
def test_every_layout_of_every_family(tmp_path: Path) -> None:
    for family in SERVED:
        for number, layout in enumerate(LAYOUTS):
            model = tiny_in(layout, family)
            written(model, tmp_path / f"{family} {number}")
            loaded = in_own_memory(whole_load(tmp_path / f"{family} {number}"))
            assert torch.equal(logits(loaded, IDS), logits(in_own_memory(model.hf), IDS)), (family, layout)
