"""SlimGPT's experiments on one model: schedules and ablations (Tables 5, 6), calibration (Fig. 3), recovery (Fig. 5).

Each cell is a JSON file that is written when it is done and not made again: interrupt as you like, and let two
processes share the work by --only. `make figures` writes the tables into the docs. Shares are of the blocks'
parameters. C4 calibrates; WikiText-2's test text judges, in windows of 2,048 and of 128 tokens, which must not be
compared with each other.

    python bench/slimgpt.py cells --data ../shared/data                (about 10 CPU-minutes a cell)
    python bench/slimgpt.py calibration --data ../shared/data
    python bench/slimgpt.py recovered --checkpoints DIR ... --data ../shared/data   (written by secateur recover)
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common import Seconds, folder_parser, load_model, windows, write
from msgspec import to_builtins

from secateur.driver import run_method
from secateur.judge.perplexity import perplexity, without_windows
from secateur.methods import get_method
from secateur.model.budget import Budget, shares
from secateur.model.handle import Model
from secateur.record import RECORD
from secateur.run import Run

METHOD = get_method("slimgpt")
SPARSITIES = (0.2, 0.5)
# Table 6's schedules and Table 5's ablations, and two of our own (paper's words for the groups; exact head error).
VARIANTS: dict[str, dict[str, Any]] = {
    "log": {},
    "linear": {"ratio": "linear"},
    "uniform": {"ratio": "uniform"},
    "no-compensation": {"compensate": False},
    "group-128": {"group": 128},
    "group-paper": {"group": "paper"},
    "head-ordinary": {"head_error": "ordinary"},
    "head-exact": {"head_error": "exact"},
    "log-decrease": {"ratio": "log-decrease"},
    "linear-decrease": {"ratio": "linear-decrease"},
}
FIGURE3 = [(n, 256) for n in (16, 32, 64, 128)] + [(32, n) for n in (64, 128, 512, 1024)]
LENGTHS = {128: 160, 2048: 20}  # windows of the judging text, by their length


class Warnings(logging.Handler):
    """Collects what the solves warn of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def listening() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("secateur"), Warnings()
    logger.addHandler(handler)
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)


def errors(run: Run, model: Model) -> dict[str, float]:
    """By "block/kind", the loss by the quadratic model, from the run's journal."""
    found = {}
    for number, (half, kind) in itertools.product(model.numbers, (("attention", "heads"), ("mlp", "neurons"))):
        with suppress(KeyError):  # nothing of it went
            found[f"{number}/{kind}"] = run.store.get(f"slimgpt/{number}/{half}")["error"]
    return found


def judged(model: Model, lengths: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Perplexities by window length."""
    return {
        str(length): to_builtins(
            without_windows(
                perplexity(model, windows(model, "wikitext2", LENGTHS[length], length, options, purpose="evaluation"))
            )
        )
        for length in lengths
    }


def cell(
    name: str, sparsity: float, samples: int, length: int, settings: dict[str, Any], lengths: Sequence[int],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Prune once, judge, write."""
    path = options.out / f"{name}-{sparsity:g}-{samples}x{length}.json"
    if path.exists():
        return
    model = load_model(options.model)
    made: dict[str, Any] = {"name": name, "sparsity": sparsity}
    if sparsity:
        tokens = windows(model, "c4", samples, length, options, purpose="calibration")
        wall, cpu = time.perf_counter(), time.process_time()
        run = Run()
        with listening() as warnings:
            done = run_method(model, METHOD, tokens, Budget(sparsity), run, **settings)
        took = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
        left = [(block.shape.kv_heads, block.shape.width) for block in done.after.blocks.values()]
        made |= {
            "options": done.options, "calibration": {"text": "c4", "samples": tokens.samples, "length": tokens.length},
            "achieved": shares(done.before, done.after), "parameters": done.after.parameters, "left": left,
            "wall_s": took.wall, "cpu_s": took.cpu, "errors": errors(run, model), "warnings": warnings,
        }  # fmt: skip
    made["perplexity"] = judged(model, lengths, options)
    write(path, made)
    print(
        f"{path.name}: " + ", ".join(f"{n}: {p['perplexity']:.2f}" for n, p in made["perplexity"].items()), flush=True
    )


def cells(options: argparse.Namespace) -> None:
    cell("dense", 0, 0, 0, {}, tuple(LENGTHS), options)
    for name, sparsity in itertools.product(options.only or VARIANTS, options.sparsities):
        cell(name, sparsity, options.samples, options.length, VARIANTS[name], options.judged_at, options)


def calibration(options: argparse.Namespace) -> None:
    for samples, length in FIGURE3:
        cell("log", 0.5, samples, length, {}, (128,), options)


def recovered(options: argparse.Namespace) -> None:
    """Fig. 5 and the perplexities of what `secateur recover` wrote."""
    for folder in options.checkpoints:
        path = options.out / f"recovered-{folder.name}.json"
        if not path.exists():
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            perplexities = judged(load_model(str(folder)), tuple(LENGTHS), options)
            write(path, {"recovery": record["recovery"], "cost": record["cost"], "perplexity": perplexities})


def main(arguments: Sequence[str] | None = None) -> None:
    works = {each.__name__: each for each in (cells, calibration, recovered)}
    parser = folder_parser(__doc__, out="slimgpt", samples=32, length="tokens per calibration window")
    parser.add_argument("work", choices=works)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="these variants")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--judged-at", nargs="+", type=int, choices=LENGTHS, default=tuple(LENGTHS), metavar="TOKENS")
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[], help="folders that secateur recover wrote")
    options = parser.parse_args(arguments)
    works[options.work](options)


if __name__ == "__main__":
    main()
