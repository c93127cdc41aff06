"""Reads checkpoints in an environment of transformers 4, for test_transformers_4.py: a list of jobs in, results out.

A job is a folder and what is asked of it; a result is what came out, or {"error": ...}. No secateur here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Some text, 12 tokens?\n<|im_start|>user"
CHAT = [{"role": "user", "content": "Hello, there!"}]


def logits(folder: str, ids: list[list[int]], out: str) -> dict[str, Any]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    with torch.no_grad():
        save_file({"logits": model.eval()(input_ids=torch.tensor(ids), use_cache=False).logits}, out)
    return {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}


def load(folder: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    getattr(transformers, name).from_pretrained(folder, **options)
    return {}


def tokens(folder: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "ids": tokenizer(TEXT)["input_ids"],
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
        "special": sorted(map(str, tokenizer.all_special_tokens)),
    }


def run(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for job in jobs:
        function = {"logits": logits, "load": load, "tokens": tokens}[job.pop("ask")]
        try:
            results.append(function(**job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {str(error)[:200]}"})
    return results


if __name__ == "__main__":
    jobs, out = map(Path, sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    out.write_text(json.dumps({"version": transformers.__version__, "results": run(json.loads(jobs.read_text()))}))
