"""Which layout runs where: tried on tiny Llama models, written as docs/engines.md (`make engines`).

vLLM is not installed here: its column has what `make vllm` found, docs/results/vllm/parity.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from models import LAYOUTS, STREAM_LAYOUTS, logits, tiny_in, whole_load
from test_gguf import VOCABULARY, byte_tokenizer, difference

from secateur.export import export, refusal, save
from secateur.export.gguf import FILE
from secateur.model.handle import Model

PARITY = Path(__file__).parents[1] / "docs" / "results" / "vllm" / "parity.json"
IDS = torch.randint(5, 90, (2, 11), generator=torch.Generator().manual_seed(1))
HEADER = """# What runs where

Written by the tests (`make engines`): each layout, of a tiny Llama model, in each program. A number is the largest
difference to the pruned model's logits (in llama.cpp and vLLM: of log-probabilities, in float32) when it was run;
"written" means that it was not. PEFT: after a step of LoRA, the merged model against the adapted one.
Other families: [exports](exports.md), [vLLM](exports-vllm.md), [llama.cpp](exports-gguf.md). SGLang, TensorRT-LLM,
mlx-lm and Ollama were not run; what `nemotron-nas` and `gguf` write is written for them, too.

"""


def in_transformers(model: Model, folder: Path) -> float:
    save(model, folder)
    return _difference(whole_load(folder), model)


def in_peft(model: Model, folder: Path) -> float:
    save(model, folder)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    adapted = peft.get_peft_model(whole_load(folder), settings)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(adapted.parameters(), lr=1.0).step()
    before = logits(adapted, IDS)
    return (logits(adapted.merge_and_unload(), IDS) - before).abs().max().item()


def in_llama_cpp(model: Model, folder: Path) -> float:
    export(model, "gguf", folder, type="f32")
    return difference(model, folder / FILE)


def padded(model: Model, folder: Path) -> float:
    export(model, "padded", folder)
    return _difference(whole_load(folder), model)


def _difference(hf: object, model: Model) -> float:
    return (logits(hf, IDS) - logits(model, IDS)).abs().max().item()


RUNTIMES: dict[str, tuple[str | None, Callable[[Model, Path], float]]] = {
    "transformers": (None, in_transformers),
    "PEFT": (None, in_peft),
    "padded": ("padded", padded),
    "llama.cpp": ("gguf", in_llama_cpp),
}


def in_vllm(layout: str, model: Model) -> str:
    cells = json.loads(PARITY.read_text())["cells"]
    wanted = {"family": "llama", "layout": layout, "form": "vllm", "dtype": "float32"}
    run = next((cell for cell in cells if wanted.items() <= cell.items()), None)
    if (reason := refusal(model, "vllm")) is not None:
        return f"no: {reason}"
    return f"{run['prompt']:.0e}" if run else "written"


def table() -> str:
    lines = ["| layout | " + " | ".join([*RUNTIMES, "vLLM"]) + " |", "|---" * (len(RUNTIMES) + 2) + "|"]
    reasons: list[str] = []
    for layout in (*LAYOUTS, *STREAM_LAYOUTS):
        model = tiny_in(layout, "llama", vocab_size=VOCABULARY)
        model.tokenizer, model.source = byte_tokenizer(), {"name": "tiny"}
        cells = []
        for to, run in RUNTIMES.values():
            if to is not None and (reason := refusal(model, to)) is not None:
                cells.append(f"no: {reason}")
            elif run is in_peft and not any(block.attention or block.mlp for block in model.layout().blocks.values()):
                cells.append("nothing to train")
            else:
                with TemporaryDirectory() as folder:
                    cells.append(f"{run(model, Path(folder) / 'out'):.0e}")
        cells.append(in_vllm(layout, model))
        for place, cell in enumerate(cells):
            if cell.startswith("no: "):
                if cell not in reasons:
                    reasons.append(cell)
                cells[place] = f"no ({reasons.index(cell) + 1})"
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason.removeprefix('no: ')}." for number, reason in enumerate(reasons, start=1)]
    return HEADER + "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
