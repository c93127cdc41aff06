"""Ablation folders as `secateur ablate` leaves them, with random but plausible numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_folders import TASKS, _cell, make_compare_folder

from secateur.methods import get_method

# by ablation: the method, what varies (its term), and the harm of each value in nats
Choices = Mapping[tuple[str, str], tuple[str, Mapping[str, float]]]
CHOICES: Choices = {
    ("norm", "2ssp"): ("2ssp.norm", {"l2": 0.320, "l1": 0.300}),
    ("calibration-size", "2ssp"): ("samples", {str(2**n): 0.32 + 0.16 / 2**n for n in range(1, 9)}),
    ("calibration-size", "slimgpt"): ("samples", {str(2**n): 0.32 + 0.9 / 2**n for n in range(1, 9)}),
    ("alpha", "2ssp"): ("2ssp.alpha", {"0.5": 0.36, "1.0": 0.33, "1.5": 0.32, "2.0": 0.33, "3.0": 0.4}),
    ("stage1-only", "2ssp"): ("2ssp.stage1_only", {"False": 0.32, "True": 0.46}),
    ("repeats", "2ssp"): ("", {"as given": 0.32}),
    ("balance", "2ssp"): ("2ssp.attentions", {str(n): 0.32 + 0.02 * abs(n - 4) for n in range(9)}),
}


def make_ablation_folder(
    folder: Path,
    *,
    choices: Choices = CHOICES,
    sparsities: Sequence[float] = (0.25, 0.5),
    seeds: Sequence[int] = (0, 1, 2),
    texts: Sequence[str] = ("wikitext2", "c4"),
    tasks: bool = True,
    windows: int = 20,
    documents: int = 200,
    noise: float = 0.004,
    change: Mapping[str, Mapping[str, Any]] | None = None,
    missing: Sequence[str] = (),
    name: str = "SmolLM2-135M-Instruct",
) -> Path:
    """Write an ablation's folder and return it.

    Args:
        noise: of a seed's effect on a value, in nats; what a draw does to all values alike differs by five times it
            from one to the next.
        change: by cell: what stands in its file instead.
        missing: cells that are named and have no file.
    """
    cells = ablation_cells(choices, sparsities, seeds, texts, windows, documents, noise)
    make_compare_folder(folder, methods=(), texts=texts, change={}, missing=["dense"], name=name)
    for cell in cells:
        cell |= {} if tasks else {"tasks": {}}
        cell |= (change or {}).get(cell["name"], {})
        if cell["name"] not in missing:
            target = folder / "cells" / cell["name"] / "cell.json"
            target.parent.mkdir(parents=True)
            target.write_text(json.dumps(cell), encoding="utf-8")
    about = json.loads((folder / "compare.json").read_text())
    command = ["ablate", "demo", "--what", ",".join(dict.fromkeys(what for what, _ in choices)), "--out", "out/ablate"]
    about |= {"kind": "ablate", "arguments": {"command": command}, "cells": [cell["name"] for cell in cells]}
    (folder / "compare.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def ablation_cells(
    choices: Choices, sparsities: Sequence[float] = (0.25,), seeds: Sequence[int] = (0, 1, 2),
    texts: Sequence[str] = ("c4",), windows: int = 20, documents: int = 200, noise: float = 0.004,
) -> list[dict[str, Any]]:  # fmt: skip
    """What the files of the cells hold, the dense one first."""
    draw = random.Random(0)
    common = {text: [draw.gauss(0, 0.25) for _ in range(windows)] for text in texts}
    answers = {task: [draw.random() for _ in range(documents)] for task in TASKS}
    cells = [{**_cell(draw, "dense", "dense", None, 0.0, common, answers), "ablation": None, "of": "blocks"}]
    for (what, of), (varies, harms) in choices.items():
        for sparsity in sparsities:
            drawn = {seed: 5 * noise * (place - (len(seeds) - 1) / 2) for place, seed in enumerate(seeds)}
            for value, harm in harms.items():
                for seed in seeds:
                    named = what if of == "2ssp" else f"{of}-{what}"
                    worse = harm * (sparsity / 0.25) ** 1.6 + drawn[seed] + draw.gauss(0, noise)
                    made = _cell(
                        draw, f"{named}-{value.replace(' ', '_')}-{sparsity:g}-seed{seed}", of, sparsity, worse, common,
                        answers, sparsity, 160,
                    )  # fmt: skip
                    told = {"what": what, "value": value, "seed": seed, "of": of, "terms": _terms(of, varies)}
                    cells.append({**made, "of": "blocks", "label": f"{of}, {what} {value}", "ablation": told})
    return cells


def _terms(of: str, varies: str) -> dict[str, Any]:
    method = get_method(of)
    options = {f"{of}.{name}": value for name, value in method.complete({}).items()}
    terms = {"of": "blocks", "count": "all", "text": "c4", "samples": 32, "length": 2048, **options}
    return {name: value for name, value in terms.items() if name != varies}
