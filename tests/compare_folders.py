"""Compare folders as `secateur compare` leaves them, with random but plausible numbers."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.judge.inference import COUNTER

BLOCKS, WIDTH, KV_HEADS, HIDDEN = 30, 1536, 3, 576
PARAMETERS, IN_BLOCKS = 134_515_008, 106_203_456
TEXTS = {"wikitext2": 2.55, "c4": 2.95, "fineweb-edu": 2.7}  # the dense model's loss
TASKS = {"piqa": (0.67, 0.5), "hellaswag": (0.43, 0.25), "arc_easy": (0.58, 0.25), "winogrande": (0.51, 0.5)}
# how much a method harms at 25 %, what a pruning takes in seconds, and whether it can meet a size exactly
METHODS = {
    "2ssp": (0.32, 160, True),
    "slimgpt": (0.325, 420, True),
    "slicegpt": (0.75, 90, True),
    "shortgpt": (1.6, 14, False),
    "window": (1.5, 60, False),
    "blockpruner": (0.95, 900, False),
    "evopress": (0.9, 900, False),
    "secateur": (0.5, 300, True),
}
SENTENCES = (
    "Albert Einstein was a German-born physicist who developed the theory of relativity. He was born in Ulm.",
    "The theory of relativity is the theory that space and time are one, and that gravity is the bending of both.",
    "the the the and of the of which is, and the one of the most important of the the of the",
    "I am a student of physics, and I would like to know more about the theory of the theory.",
)


def make_compare_folder(
    folder: Path,
    *,
    methods: Sequence[str] = tuple(METHODS),
    sparsities: Sequence[float] = (0.25, 0.375, 0.5),
    texts: Sequence[str] = tuple(TEXTS),
    only_perplexity: bool = False,
    windows: int = 20,
    documents: int = 200,
    harms: Mapping[str, float] | None = None,
    change: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "SmolLM2-135M-Instruct",
    missing: Sequence[str] = (),
) -> Path:
    """Write a compare folder and return it.

    Args:
        only_perplexity: no tasks, inference or generation.
        harms: in nats at 25 %, in place of those of METHODS.
        change: by cell: what stands in its file instead. By default one has failed, and EvoPress searched less.
        missing: cells that are named and have no file.
    """
    draw = random.Random(0)
    common = {text: [draw.gauss(0, 0.25) for _ in range(windows)] for text in texts}  # hard windows are hard for all
    answers = {task: [draw.random() for _ in range(documents)] for task in TASKS}  # and hard documents
    cells = [_cell(draw, "dense", "dense", None, 0.0, common, answers)]
    for sparsity in sparsities:
        for method in methods:
            harm, wall, exact = METHODS.get(method, (1.2, 30, True))
            harm = ((harms or {}).get(method, harm)) * (sparsity / 0.25) ** 1.6
            achieved = sparsity if exact else round(sparsity * BLOCKS) / BLOCKS - 0.004
            cell = _cell(draw, f"{method}-{sparsity:g}", method, sparsity, harm, common, answers, achieved, wall)
            cells.append(cell)
            if not exact and "2ssp" in methods and method == "shortgpt":
                matched = _cell(
                    draw, f"2ssp-as-{cell['name']}", "2ssp", achieved, 0.32 * (achieved / 0.25) ** 1.6, common, answers,
                    achieved, 160,
                )  # fmt: skip
                cells.append({**matched, "matched_to": cell["name"], "label": "2ssp at the size of shortgpt"})
    if change is None:
        change = {
            "slicegpt-0.5": {"status": "failed", "error": "NumericalError: block 7 gave NaN <after rotation>"},
            **{
                f"evopress-{s:g}": {
                    "label": "evopress (reduced search)",
                    "notes": {"reduced": "the search was reduced to 30 of 400 generations, to end within 15 minutes"},
                }
                for s in sparsities
            },
        }
    for cell in cells:
        if only_perplexity:
            cell |= {"tasks": {}, "inference": None, "generation": None}
        cell |= change.get(cell["name"], {})
        if cell["name"] not in missing:
            target = folder / "cells" / cell["name"] / "cell.json"
            target.parent.mkdir(parents=True)
            target.write_text(json.dumps(cell), encoding="utf-8")
    about = {
        "schema": 1,
        "kind": "compare",
        "model": {"name": name, "fingerprint": "3f7a9c" * 8, "parameters": PARAMETERS, "block_parameters": IN_BLOCKS,
                  "blocks": BLOCKS, "family": "llama", "hidden_size": HIDDEN},
        "arguments": {"command": ["compare", "demo", "--methods", ",".join(methods), "--texts", ",".join(texts),
                                  "--eval-samples", str(windows), "--inference", "--out", "out/compare"]},
        "settings": {"texts": list(texts), "length": 2048, "grid": {"calibration": "c4", "seed": 0}},
        "texts": {text: {"name": text, "fingerprint": "9f31" * 8} for text in texts},
        "machine": "AMD EPYC, 2 cores, 1 thread", "created": "2026-11-27T10:00:00+00:00",
        "versions": {"secateur": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "python": "3.11.7"},
        "cells": [cell["name"] for cell in cells],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def _cell(
    draw: random.Random, name: str, method: str, sparsity: float | None, harm: float,
    common: Mapping[str, Sequence[float]], answers: Mapping[str, Sequence[float]], achieved: float = 0.0,
    wall: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    dense = method == "dense"
    parameters = round(PARAMETERS - achieved * IN_BLOCKS)
    return {
        "name": name, "method": method, "label": method, "sparsity": sparsity, "status": "done", "error": None,
        "options": {} if dense else {"alpha": 1.5}, "notes": {},
        "calibration": {} if dense else {"name": "c4", "samples": 32, "length": 2048, "fingerprint": "d748281a2acc"},
        "achieved": {"blocks": achieved, "model": achieved * IN_BLOCKS / PARAMETERS},
        "parameters": parameters, "weight_bytes": 2 * parameters,
        "prune": {"wall_s": wall * draw.uniform(0.8, 1.3), "cpu_s": wall, "forwards": 50.0, "forwards_asked": 75.0,
                  "peak_device_memory_bytes": None},
        "curve": [[n, 3.4 + 0.6 * math.exp(-n / 8)] for n in range(30)] if method == "evopress" else None,
        "shape": _shape(draw, method, achieved),
        "perplexity": {text: _perplexity(draw, text, harm, common[text]) for text in common},
        "tasks": {task: _task(draw, task, harm, answers[task]) for task in TASKS},
        "inference": _inference(draw, achieved),
        "generation": _generation(draw, harm),
        "matched_to": None,
    }  # fmt: skip


def _shape(draw: random.Random, method: str, achieved: float) -> list[dict[str, Any]]:
    gone = set(range(BLOCKS - 2 - round(achieved * BLOCKS), BLOCKS - 2)) if method in ("shortgpt", "window") else set()
    shape = []
    for block in range(BLOCKS):
        width, heads = WIDTH, KV_HEADS
        if block in gone:
            width = heads = 0
        elif method in ("2ssp", "slimgpt"):
            width = round(WIDTH * min(1, max(0.1, 1 - achieved * draw.uniform(0.6, 1.3))))
            heads = 0 if method == "2ssp" and draw.random() < achieved / 2 else KV_HEADS
        elif method in ("blockpruner", "evopress"):
            width, heads = WIDTH * (draw.random() > achieved * 0.8), KV_HEADS * (draw.random() > achieved * 1.2)
        entry = {"block": block, "width": width, "kv_heads": heads, "query_heads": 3 * heads,
                 "attention": heads > 0, "mlp": width > 0}  # fmt: skip
        if method == "slicegpt":
            entry["sites"] = [round(HIDDEN * (1 - achieved))] * 3
        shape.append(entry)
    return shape


def _perplexity(draw: random.Random, text: str, harm: float, common: Sequence[float]) -> dict[str, Any]:
    losses = [TEXTS.get(text, 2.8) + harm + each + draw.gauss(0, 0.02) for each in common]
    nll = sum(losses) / len(losses)
    spread = math.sqrt(sum((each - nll) ** 2 for each in losses)) / len(losses)
    return {"perplexity": math.exp(nll), "nll": nll, "nll_stderr": spread, "text": text, "samples": len(losses),
            "length": 2048, "predictions": 2047 * len(losses), "window_nll": losses,
            "window_predictions": [2047] * len(losses)}  # fmt: skip


def _task(draw: random.Random, task: str, harm: float, answers: Sequence[float]) -> dict[str, Any]:
    dense, chance = TASKS[task]
    right = chance + (dense - chance) * math.exp(-harm)
    found = [float(each + draw.gauss(0, 0.05) < right) for each in answers]
    value = sum(found) / len(found)
    return {"task": task, "metric": "acc", "value": value, "stderr": math.sqrt(value * (1 - value) / len(found)),
            "documents": len(found), "chance": chance, "fewshot": 0, "per_document": found}  # fmt: skip


def _inference(draw: random.Random, achieved: float) -> dict[str, Any]:
    busy = [draw.uniform(1, 1.5) for _ in range(5)]  # the machine, by round

    def timed(share: float) -> dict[str, Any]:
        measured = {
            "prefill_ms": [410 * share * each for each in busy],
            "token_ms": [38 * (0.2 + 0.8 * share) * each * draw.uniform(0.99, 1.01) for each in busy],
            "throughput_tokens_s": [26 / share / each for each in busy],
        }
        return {
            **{name: statistics.median(values) for name, values in measured.items()},
            **{f"{name}_rounds": values for name, values in measured.items()},
            "prefill_ms_iqr": 80.0, "token_ms_iqr": 8.0, "weight_bytes": round(269_000_000 * share),
            "kv_bytes_per_token": 23_040, "peak_memory_bytes": 800_000_000, "peak_memory_by": COUNTER,
        }  # fmt: skip

    return {"dense": timed(1.0), "pruned": timed((1 - achieved * 0.85) * draw.uniform(0.96, 1.06))}


def _generation(draw: random.Random, harm: float) -> dict[str, Any]:
    worse = min(len(SENTENCES) - 1, round(harm * 1.6))
    samples = [
        {"prompt": prompt, "settings": settings,
         "text": f"{prompt} " + " ".join(draw.choice(SENTENCES[: worse + 1]) for _ in range(3))}
        for prompt in ("Who is Albert Einstein?", "The theory of relativity")
        for settings in ({"beams": 5, "no_repeat_ngram": 3, "new_tokens": 128}, {"greedy": True, "new_tokens": 128})
    ]  # fmt: skip
    return {"samples": samples, "figures": {
        "greedy_agreement": math.exp(-harm), "common_prefix_tokens": 40 * math.exp(-3 * harm), "distinct_1": 0.5,
        "distinct_2": 0.7, "distinct_3": 0.8, "ended_share": 0.5}}  # fmt: skip
