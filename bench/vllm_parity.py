"""What `secateur export` writes for vLLM, in vLLM against the pruned model here: tiny models, family by layout.

`--to vllm` is read by vLLM's transformers backend, `--to nemotron-nas` by vLLM's own class of that type, on the CPU, in
the environment that `make vllm` sets up. Compared are the log-probabilities of every token of a prompt, then those of
greedy tokens on the cache, and whether they are the same tokens. In bfloat16 near-ties may fall otherwise; there all is
also compared with float32 on the same weights, so that one sees what is rounding.

    make vllm           (or: python bench/vllm_parity.py --families llama gemma3_text --layouts "everything")
    python bench/vllm_parity.py --families llama qwen2 --form nemotron-nas --layouts "widths of 256"
    python bench/vllm_parity.py --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import machine
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, __version__

from secateur.export import EXPORTS
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
    "widths of 256": [KeepNeurons(k, tuple(range(k, 256 + k))) for k in (0, 3)],
    "widths of 256 and modules missing": [
        KeepNeurons(0, tuple(range(0, 512, 2))), DropMLP(1), DropAttention(2), DropAttention(3),
    ],
}  # fmt: skip
FORMS = {"vllm": ("transformers", 96), "nemotron-nas": ("vllm", 512)}  # which of vLLM's models; neurons when dense
CELL = ("family", "layout", "form", "dtype")


def made_up(family: str, width: int, **own: Any) -> Model:
    """A random model in which a forgotten bias or norm shows."""
    row = FAMILIES[family]
    sizes = SIZES | ({row.kv_heads: 2} if row.kv_heads else {}) | {row.width: width} | _OWN.get(family, {}) | own
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        hf: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes), dtype=torch.float32)
        for parameter in hf.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.1 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    hf.generation_config.eos_token_id = None
    return Model(hf)


@torch.no_grad()
def greedy(hf: Any, ids: torch.Tensor, new: int) -> list[int]:
    """The likeliest tokens after ids, (length,), by plain forwards."""
    whole = ids
    for _ in range(new):
        whole = torch.cat([whole, hf(input_ids=whole[None], use_cache=False).logits[0, -1].argmax()[None]])
    return whole[len(ids) :].tolist()


@torch.no_grad()
def scored(hf: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every token after the first; ids (length,)."""
    logits = hf(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def compared(model: Model, ids: torch.Tensor, found: Mapping[str, Any]) -> dict[str, Any]:
    """Largest differences of log-probabilities, of the prompt's tokens and of those that vLLM generated, as both score
    them; ids (length,). Of a model in bfloat16 also both against float32 on its weights: mean and largest."""
    theirs = torch.tensor(found["prompt"] + found["new_logprobs"])
    whole, prompt = torch.cat([ids, torch.tensor(found["new"])]), len(ids) - 1
    same, ours = found["new"] == greedy(model.hf, ids, len(found["new"])), scored(model.hf, whole)
    apart = (theirs - ours).abs()
    result = {"prompt": apart[:prompt].max().item(), "new_logprobs": apart[prompt:].max().item(), "same_tokens": same}
    if model.dtype != torch.float32:
        exact = scored(model.hf.float(), whole)
        for name, values in (("vllm", theirs), ("transformers", ours)):
            away = (values - exact).abs()
            result[f"{name}_to_float32"] = {"mean": away.mean().item(), "largest": away.max().item()}
    return result


def pruned(cell: Mapping[str, str]) -> Model:
    """The tiny model of a cell."""
    model = made_up(cell["family"], FORMS[cell["form"]][1])
    model.hf.to(getattr(torch, cell["dtype"]))
    for edit in (edit for edit in LAYOUTS[cell["layout"]] if type(edit).__name__ not in model.family.cannot):
        apply(model, edit)
    return model


def run(cells: list[dict[str, Any]], python: Path) -> dict[str, str]:
    """Write what vLLM is to read, let it read, and add to each cell what came out; vLLM's versions. Refusals are
    results."""
    ids = torch.randint(5, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as name:
        folder, asked = Path(name), {}
        for number, cell in enumerate(cells):
            model, form = pruned(cell), EXPORTS[cell["form"]]
            cell["refused"] = form.refuses(model)
            if cell["refused"] is None:
                (folder / f"{number:03}").mkdir()
                with quiet_transformers():
                    form.write(model, folder / f"{number:03}", "5GB")
                asked[f"{number:03}"] = {"dtype": cell["dtype"], "model_impl": FORMS[cell["form"]][0]}
        (folder / "job.json").write_text(json.dumps({"checkpoints": asked, "ids": ids.tolist(), "new": NEW}))
        subprocess.run([python.absolute(), SIDE, folder], check=True)
        for number in asked:
            path = folder / f"{number}.json"
            found = json.loads(path.read_text()) if path.is_file() else {"error": "the process died"}
            cell = cells[int(number)]
            cell |= found if "error" in found else compared(pruned(cell), ids, found) | {"seconds": found["seconds"]}
        versions: dict[str, str] = json.loads((folder / "versions.json").read_text())
        return versions


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    asked.add_argument("--layouts", nargs="+", default=["everything"], choices=list(LAYOUTS))
    asked.add_argument("--form", default="vllm", choices=list(FORMS))
    asked.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"), help="of vLLM's environment")
    asked.add_argument("--json", type=Path, default=Path("docs/results/vllm/parity.json"))
    options = asked.parse_args()
    names = [(family, layout) for family in options.families for layout in options.layouts]
    cells: list[dict[str, Any]] = [dict(zip(CELL, (*name, options.form, options.dtype), strict=True)) for name in names]
    versions = run(cells, options.python)
    if options.json.is_file():  # what was run before stays
        ran = [tuple(cell[key] for key in CELL) for cell in cells]
        before = json.loads(options.json.read_text())["cells"]
        cells = [cell for cell in before if tuple(cell[key] for key in CELL) not in ran] + cells
    result = {"machine": machine(), "written_by": {"transformers": __version__}, "read_by": versions, "cells": cells}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for cell in cells:
        print(cell)


if __name__ == "__main__":
    main()
