"""Tier B with stubs (`export/vllm.py`) in vLLM against the pruned model here: tiny models, family by layout.

Each is written as `secateur export --to vllm` writes it and read by vLLM's transformers backend, in float32 on the
CPU, in the environment that `make vllm` sets up. Compared are the log-probabilities of every token of a prompt, then
those of greedy tokens on the cache, and whether they are the same tokens.

    make vllm           (or: python bench/vllm_parity.py --families llama gemma3_text --layouts "everything")
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, __version__

from secateur.export import vllm
from secateur.hf import quiet_transformers
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropMLP, Edit, KeepHeads, KeepNeurons

SIDE = Path(__file__).with_name("vllm_side.py")
VOCABULARY, HIDDEN, BLOCKS, LENGTH, NEW = 97, 128, 4, 24, 8
# of heads of 32, the smallest that vLLM's attention takes on a CPU
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "max_position_embeddings": 64,
    "num_attention_heads": 4, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
_KINDS = ["sliding_attention", "full_attention"] * 2
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8, "head_dim": 32},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "layer_types": _KINDS},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "granite": {"residual_multiplier": 0.7, "embedding_multiplier": 2.0, "attention_multiplier": 0.3,
                "logits_scaling": 1.5},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 30, "sliding_window": 8, "attn_logit_softcapping": 3.0,
               "final_logit_softcapping": 4.0, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 30, "sliding_window": 8, "layer_types": _KINDS,
                    "tie_word_embeddings": True},
    "phi3": {"sliding_window": None},
    "phi": {"qk_layernorm": True},
    "opt": {"word_embed_proj_dim": HIDDEN, "dropout": 0.0, "tie_word_embeddings": True, "pad_token_id": 1},
    "gpt2": {"tie_word_embeddings": True},
}  # fmt: skip
# As the tests' layouts of these names (tests/models.py), of four blocks.
LAYOUTS: dict[str, list[Edit]] = {
    "everything": [
        DropAttention(0), KeepNeurons(0, tuple(range(1, 40))), KeepHeads(1, (1,)), DropMLP(1),
        KeepNeurons(2, tuple(range(0, 96, 2))), DropMLP(3),
    ],
    "block 0 without attention": [DropAttention(0)],
    "mixed KV groups": [KeepHeads(0, (1,)), KeepHeads(2, (0,))],
    "mixed widths": [KeepNeurons(0, tuple(range(1, 40))), KeepNeurons(3, (5,))],
    "one MLP missing": [DropMLP(1)],
    "nothing left but norms": [edit(k) for k in range(BLOCKS) for edit in (DropAttention, DropMLP)],
    "dense": [],
    "several attentions missing": [DropAttention(1), DropAttention(3)],
    "only block 2 has an attention": [DropAttention(k) for k in (0, 1, 3)],
    "all attentions missing": [DropAttention(k) for k in range(BLOCKS)],
    "all MLPs missing": [DropMLP(k) for k in range(BLOCKS)],
}  # fmt: skip


def made_up(family: str) -> Model:
    """A random model in which a forgotten bias or norm shows."""
    row = FAMILIES[family]
    sizes = SIZES | ({row.kv_heads: 2} if row.kv_heads else {}) | {row.width: 96} | _OWN.get(family, {})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        hf: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes), dtype=torch.float32)
        for parameter in hf.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.1 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    hf.generation_config.eos_token_id = None
    return Model(hf)


@torch.no_grad()
def expected(model: Model, ids: torch.Tensor) -> dict[str, Any]:
    """What vLLM is to find, by plain forwards; ids (length,)."""
    whole = ids
    for _ in range(NEW):
        logits = model.hf(input_ids=whole[None], use_cache=False).logits[0]
        whole = torch.cat([whole, logits[-1].argmax()[None]])
    found = logits.log_softmax(-1)[: len(whole) - 1].gather(-1, whole[1:, None])[:, 0].tolist()
    return {"prompt": found[: LENGTH - 1], "new": whole[LENGTH:].tolist(), "new_logprobs": found[LENGTH - 1 :]}


def prepare(folder: Path, cells: Sequence[tuple[str, str]], ids: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Write what vLLM is to read; return what it is to find, by the checkpoint's name. Refusals are results."""
    found: dict[str, dict[str, Any]] = {}
    for number, (family, layout) in enumerate(cells):
        model, name = made_up(family), f"{number:03}"
        for edit in (edit for edit in LAYOUTS[layout] if type(edit).__name__ not in model.family.cannot):
            apply(model, edit)
        found[name] = {"family": family, "layout": layout, "refused": vllm.refuses(model)}
        if found[name]["refused"] is None:
            (folder / name).mkdir()
            with quiet_transformers():
                vllm.write(model, folder / name, "5GB")
            found[name] |= expected(model, ids)
    names = [name for name, each in found.items() if each["refused"] is None]
    (folder / "job.json").write_text(json.dumps({"names": names, "ids": ids.tolist(), "new": NEW}))
    return found


def compared(wanted: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """One cell: the largest differences of log-probabilities, or why there is none."""
    cell = {key: wanted[key] for key in ("family", "layout", "refused")}
    if wanted["refused"] is not None:
        return cell
    found = json.loads(path.read_text()) if path.is_file() else {"error": "the process died"}
    if "error" in found:
        return cell | found
    differences = {
        key: max(abs(one - other) for one, other in zip(wanted[key], found[key], strict=True))
        for key in ("prompt", "new_logprobs")
    }
    return cell | differences | {"same_tokens": wanted["new"] == found["new"], "seconds": found["seconds"]}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    asked.add_argument("--layouts", nargs="+", default=["everything"], choices=list(LAYOUTS))
    asked.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"), help="of vLLM's environment")
    asked.add_argument("--json", type=Path, default=Path("docs/results/vllm/parity.json"))
    options = asked.parse_args()
    ids = torch.randint(5, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = prepare(folder, [(family, layout) for family in options.families for layout in options.layouts], ids)
        subprocess.run([options.python.absolute(), SIDE, folder], check=True)
        cells = [compared(each, folder / f"{key}.json") for key, each in wanted.items()]
        versions = json.loads((folder / "versions.json").read_text())
    if options.json.is_file():  # what was run before stays
        ran = {(cell["family"], cell["layout"]) for cell in cells}
        before = json.loads(options.json.read_text())["cells"]
        cells = [cell for cell in before if (cell["family"], cell["layout"]) not in ran] + cells
    result = {"machine": machine(), "written_by": {"transformers": __version__}, "read_by": versions, "cells": cells}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for cell in cells:
        print(cell)


if __name__ == "__main__":
    main()
