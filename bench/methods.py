"""All methods on one model, one token matrix, one budget: perplexity, pruning time, forwards, achieved sparsity.

Each cell is a JSON file that is written when it is done and not made again, so the run can be interrupted. Two
processes may share the work: give each some methods. What a method's run at one sparsity has already found (its
journal) is used for the next where it does not depend on the sparsity; its time and forwards count again, as if run
alone.

    python bench/methods.py --data ../shared/data --out docs/results/methods           (some 4 CPU-hours)
    python bench/methods.py --data ../shared/data --samples 16 --length 512            (some 40 CPU-minutes)
    python bench/methods.py --out docs/results/methods --table
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import calibration, folder_parser, load_model, write

from secateur.api import prepare, read_tokens, run_job
from secateur.engine.tokens import Tokens
from secateur.evaluation.perplexity import perplexity
from secateur.model.handle import Model
from secateur.run import MemoryStore, Run, work_forwards

T = TypeVar("T")
SPARSITIES = (0.25, 0.375, 0.5)
# Reduced where the papers' amounts would take hours here; all calibrate on the first windows of the same C4 matrix.
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "2ssp": {},
    "shortgpt": {},
    "window": {},
    "blockpruner": {"search_length": 256},
    "evopress": {
        "generations": 4, "offspring": 16, "initial": 16, "initial_tokens": 512, "survivors": "2,1",
        "selection_tokens": "512,2048",
    },
    "slicegpt": {},
    "slimgpt": {},
}  # fmt: skip
# Journal entries that are the same at every sparsity, by how their keys begin.
SHARED = {"2ssp": "scores", "shortgpt": "influence", "blockpruner": "blockpruner/"}


class Inherited(MemoryStore):
    """A store that takes over what an earlier run of the same method found, where it holds for all sparsities."""

    def __init__(self, earlier: Inherited | None, beginning: str | None) -> None:
        super().__init__()
        if earlier is not None and beginning is not None:
            self._results = {key: value for key, value in earlier._results.items() if key.startswith(beginning)}
        self.inherited = set(self._results)


class Clocked(Run):
    """A run that knows what each of its steps took, also of those that an earlier run made.

    Args:
        spent: by step, seconds and work; shared with the runs to come.
    """

    def __init__(self, store: Inherited, spent: dict[str, dict[str, float]]) -> None:
        super().__init__(0, store=store)
        self._spent, self._inherited = spent, store.inherited
        self._used: list[str] = []

    def step(self, key: str, compute: Callable[[], T]) -> T:
        def measured() -> T:
            before, began = {**vars(self.meter)}, clocks()
            result = compute()
            self._spent[key] = difference(clocks() | vars(self.meter), began | before)
            return result

        self._used.append(key)
        return super().step(key, measured)

    def total(self, seconds: dict[str, float]) -> dict[str, float]:
        """What the run took, with what it was spared."""
        all_of_it = seconds | vars(self.meter)
        for key in self._inherited.intersection(self._used):
            all_of_it = {name: value + self._spent[key][name] for name, value in all_of_it.items()}
        return all_of_it


def clocks() -> dict[str, float]:
    return {"wall_s": time.perf_counter(), "cpu_s": time.process_time()}


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in after.items()}


def windows(model: Model, text: str, samples: int, length: int, options: argparse.Namespace, *, purpose: Any) -> Tokens:
    """So many windows of a text; random ids where the model has no tokenizer."""
    if model.tokenizer is None:
        return calibration(model, samples, min(length, options.length))
    return read_tokens(model, text, purpose=purpose, samples=samples, length=length, data=options.data)


def cells(method: str, options: argparse.Namespace) -> None:
    store: Inherited | None = None
    spent: dict[str, dict[str, float]] = {}
    for sparsity in SPARSITIES if method != "dense" else (0.0,):
        path = options.out / f"{method}-{sparsity:g}.json"
        if path.exists():
            continue
        model = load_model(options.model)
        cell: dict[str, Any] = {"method": method, "sparsity": sparsity, "threads": torch.get_num_threads()}
        if method != "dense":
            store = Inherited(store, SHARED.get(method))
            run = Clocked(store, spent)
            tokens = windows(model, "c4", options.samples, options.length, options, purpose="calibration")
            job = prepare(model, method, sparsity=sparsity, calibration=tokens, **SETTINGS[method])
            head = model.head_cost
            began = clocks()
            record = run_job(job, run=run).record
            cost = run.total(difference(clocks(), began))
            blocks = record["before"]["blocks"]
            cell |= {
                "options": record["options"], "achieved": record["sparsity"]["achieved"],
                "parameters": record["after"]["parameters"], "cost": cost,
                "forwards": work_forwards(
                    cost["block_tokens"], cost["head_tokens"], blocks, options.length, head=head
                ),
                "forwards_asked": cost["asked_tokens"] / (blocks * options.length),
                "calibration": {
                    key: record["calibration"].get(key) for key in ("name", "samples", "length", "fingerprint")
                },
                "edits": [[edit["edit"], edit.get("block")] for edit in record["edits"]],
            }  # fmt: skip
        judged = windows(model, "wikitext2", options.windows, options.length, options, purpose="evaluation")
        cell["perplexity"] = perplexity(model, judged)
        write(path, cell)
        print(f"{method} {sparsity:g}: perplexity {cell['perplexity']['perplexity']:.2f}", flush=True)


def table(folder: Path) -> str:
    """The cells that are there as Markdown: a row per method, and what its runs took."""
    found = {
        (c["method"], c["sparsity"]): c for c in (json.loads(p.read_text()) for p in sorted(folder.glob("*.json")))
    }
    lines = [
        "| method | "
        + " | ".join(f"{s:.1%}" for s in SPARSITIES)
        + " | achieved | CPU-seconds | forwards run (asked) |",
        "|---|" + "---|" * (len(SPARSITIES) + 3),
    ]
    for method in SETTINGS:
        row = [found.get((method, s)) for s in SPARSITIES]
        if method == "dense" and (dense := found.get(("dense", 0.0))):
            lines.append(f"| dense | {dense['perplexity']['perplexity']:.2f} | | | | | |")
        there = [cell for cell in row if cell]
        if not there:
            continue
        shown = [f"{cell['perplexity']['perplexity']:.2f}" if cell else "" for cell in row]
        achieved = ", ".join(f"{cell['achieved']['blocks']:.2%}" for cell in there)
        seconds = ", ".join(f"{cell['cost']['cpu_s']:.0f}" for cell in there)
        forwards = ", ".join(f"{cell['forwards']:.0f} ({cell['forwards_asked']:.0f})" for cell in there)
        lines.append(f"| {method} | {' | '.join(shown)} | {achieved} | {seconds} | {forwards} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = folder_parser(__doc__, out="methods", samples=8, length="tokens per window, of calibration and judgement")
    parser.add_argument("--methods", default=",".join(SETTINGS))
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="only print the table of the cells that are there")
    options = parser.parse_args(arguments)
    if not options.table:
        for method in options.methods.split(","):
            cells(method, options)
    print(table(options.out))


if __name__ == "__main__":
    main()
