"""Does a removed attention or a narrower FFN pay in the engine? The demo model in shapes, timed in turn.

    python bench/engine_speed.py --engines transformers llama.cpp-f16 llama.cpp-q8_0 vllm vllm-transformers

Only shapes matter for speed, so neurons and attentions go by their numbers, without calibration. Of each engine all
models are loaded at once and timed right after each other, a round after the other: ratios to the dense model within a
round are what counts. Time is processor time of the engine's process, which other programs disturb less than the clock.
float32 in transformers and in vLLM (eager), by its own classes (`vllm`; a stock checkpoint, or `nemotron-nas` where
attentions are gone) or by its transformers backend (`--to vllm`). One thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine

import secateur
from secateur.engines.llama_cpp import LlamaCpp, running
from secateur.export import export, refusal, save, tier
from secateur.export.gguf import FILE
from secateur.model.handle import Model
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, Edit, KeepNeurons

SIDE = Path(__file__).with_name("vllm_speed_side.py")
BLOCKS = 30  # of the demo model
SHAPES: dict[str, list[Edit]] = {
    "dense": [],
    "8 attentions removed": [DropAttention(k) for k in range(2, 26, 3)],
    "15 attentions removed": [DropAttention(k) for k in range(1, BLOCKS, 2)],
    **{
        f"FFN {width:,} wide": [KeepNeurons(k, tuple(range(width))) for k in range(BLOCKS)]
        for width in (1152, 1120, 1101, 1088, 1024, 768, 749)
    },
}
PROMPT, VOCABULARY = 256, 49152  # tokens

Speeds = dict[str, dict[str, Any]]  # by shape: tokens per second by round, "prompt" and "new"; or why there are none


def shaped(name: str) -> Model:
    model = secateur.load("demo", device="cpu", dtype="float32")
    for edit in SHAPES[name]:
        apply(model, edit)
    return model


def ids_of(length: int, number: int) -> list[int]:
    """A prompt of its own in each round, so that nothing is read off a cache."""
    return [random.Random(number).randrange(5, VOCABULARY) for _ in range(length)]


def time_in_turn(works: Mapping[str, Callable[[list[int], int], float]], rounds: int, new: int) -> Speeds:
    """Tokens per second of processor time of a prompt, and of new tokens; every other round goes backwards.

    Args:
        works: by shape, what a prompt and so many new tokens take.
    """
    speeds: Speeds = {name: {"prompt": [], "new": []} for name in works}
    for number in range(-1, rounds):  # the first warms up
        for name in reversed(works) if number % 2 else works:
            few, many = (works[name](ids_of(8, number), amount) for amount in (1, 1 + new))
            prompt = works[name](ids_of(PROMPT, number), 1)
            if number >= 0:
                speeds[name]["prompt"].append(PROMPT / prompt)
                speeds[name]["new"].append(new / (many - few))
    return speeds


def in_transformers(rounds: int, new: int, _: Path) -> tuple[Speeds, str]:
    def work(hf: Any, ids: list[int], new: int) -> float:
        began, prompt = time.process_time(), torch.tensor([ids])
        mask = torch.ones_like(prompt)
        hf.generate(prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.process_time() - began

    works = {name: partial(work, shaped(name).hf) for name in SHAPES}
    return time_in_turn(works, rounds, new), f"torch {torch.__version__}"


def in_llama_cpp(kind: str, rounds: int, new: int, _: Path) -> tuple[Speeds, str]:
    import xllamacpp

    def work(engine: LlamaCpp, ids: list[int], new: int) -> float:
        began = processor_seconds(engine._process.pid)
        engine._ask("complete", prompt=[ids], max_tokens=new, ignore_eos=True, cache_prompt=False)
        return processor_seconds(engine._process.pid) - began

    refused, works = {}, {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for place, name in enumerate(SHAPES):
            model, out = shaped(name), Path(folder) / str(place)
            if reason := refusal(model, "gguf", type=kind):
                refused[name] = {"refused": reason}
                continue
            export(model, "gguf", out, type=kind)
            works[name] = partial(work, stack.enter_context(running(out / FILE, context=PROMPT + new)))
        return refused | time_in_turn(works, rounds, new), f"xllamacpp {xllamacpp.__version__}"


def processor_seconds(process: int) -> float:
    """What a process has used, all its threads (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_vllm(implementation: str, rounds: int, new: int, python: Path) -> tuple[Speeds, str]:
    with tempfile.TemporaryDirectory() as work:
        asked = {}
        for place, name in enumerate(SHAPES):
            model, folder = shaped(name), Path(work) / str(place)
            if implementation == "transformers":
                export(model, "vllm", folder)
            elif tier(model) == "A":
                save(model, folder)
            else:
                export(model, "nemotron-nas", folder)
            asked[str(place)] = implementation
        job = {"checkpoints": asked, "prompt": PROMPT, "new": new, "rounds": rounds, "vocabulary": VOCABULARY}
        (Path(work) / "job.json").write_text(json.dumps(job))
        subprocess.run([python.absolute(), SIDE, work], check=True)
        found = json.loads((Path(work) / "speeds.json").read_text())
    return {name: found["speeds"][str(place)] for place, name in enumerate(SHAPES)}, f"vllm {found['version']}"


ENGINES: dict[str, Callable[[int, int, Path], tuple[Speeds, str]]] = {
    "transformers": in_transformers,
    "llama.cpp-f16": partial(in_llama_cpp, "f16"),
    "llama.cpp-q8_0": partial(in_llama_cpp, "q8_0"),
    "vllm": partial(in_vllm, "vllm"),
    "vllm-transformers": partial(in_vllm, "transformers"),
}


def parameters(model: Model) -> dict[str, int]:
    """What a new token reads (a tied head once) and what each token of a prompt is multiplied with."""
    layout = model.layout()
    head = model.hf.get_input_embeddings().weight.numel()
    return {"new": layout.parameters, "prompt": layout.parameters - head}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--new", type=int, default=24, help="tokens; more for a faster engine")
    asked.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"), help="of vLLM's environment")
    asked.add_argument("--json", type=Path, default=Path("docs/results/engine-speed/speed.json"))
    options = asked.parse_args()
    engines = json.loads(options.json.read_text())["engines"] if options.json.is_file() else {}
    shapes = {name: parameters(shaped(name)) for name in SHAPES}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for name in options.engines:  # those that ran before stay
        speeds, version = ENGINES[name](options.rounds, options.new, options.python)
        engines[name] = {"version": version, "new": options.new, "speeds": speeds}
        found = {"machine": machine(), "prompt": PROMPT, "parameters": shapes, "engines": engines}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
