"""Stage 2 of 2SSP: a greedy round by `sweep` against running the whole model for each candidate.

Same tokens, threads and chunked loss in both; alternating in one run; medians. Prints the ratio of
times beside the ratio of work, counted in tokens through blocks and through the head.

    make bench          (or: python bench/sweep.py --length 256 --rounds 5)
"""

import argparse
import statistics
import time

import torch

import secateur
from secateur.api import read_tokens
from secateur.engine.sweep import Part, sweep
from secateur.model.handle import Model
from secateur.run import Run


def plain(model: Model, tokens: secateur.Tokens, candidates: list[Part], run: Run) -> list[float]:
    """One whole forward per candidate: what the method costs without shared prefixes."""
    return [float(sweep(model, tokens, [frozenset({part})], run=run)[0]) for part in candidates]


def shared(model: Model, tokens: secateur.Tokens, candidates: list[Part], run: Run) -> list[float]:
    return sweep(model, tokens, [frozenset({part}) for part in candidates], run=run).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = secateur.load(options.model)
    tokens = read_tokens(model, "demo", purpose="calibration", length=options.length, samples=1)
    candidates = [Part(number, "attention") for number in model.numbers]
    times: dict[str, list[float]] = {"plain": [], "shared": []}
    runs = {"plain": Run(), "shared": Run()}
    for _ in range(options.rounds):
        losses = {}
        for name, work in (("plain", plain), ("shared", shared)):
            start = time.perf_counter()
            losses[name] = work(model, tokens, candidates, runs[name])
            times[name].append(time.perf_counter() - start)
        best = {name: min(range(len(each)), key=each.__getitem__) for name, each in losses.items()}
        difference = max(abs(a - b) for a, b in zip(losses["plain"], losses["shared"], strict=True))
        assert best["plain"] == best["shared"], "the two chose differently"
    median = {name: statistics.median(each) for name, each in times.items()}
    layout = model.layout()
    head = model.vocab_size * model.hidden_size * len(layout.blocks) / layout.block_parameters  # in blocks
    work = {name: run.meter.block_tokens + head * run.meter.head_tokens for name, run in runs.items()}
    print(f"{options.model}, {len(candidates)} candidates, {options.length} tokens, {torch.get_num_threads()} threads")
    print(f"plain {median['plain']:.2f} s, shared {median['shared']:.2f} s: {median['plain'] / median['shared']:.2f}x")
    print(f"work by count: {work['plain'] / work['shared']:.2f}x; same choice, losses within {difference:.1e} nats")


if __name__ == "__main__":
    main()
