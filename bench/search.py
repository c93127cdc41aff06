"""BlockPruner's and EvoPress's searches by `sweep` against a whole forward per candidate.

BlockPruner: the first greedy rounds over all attention modules and MLPs, by perplexity. EvoPress: a few generations, by
the KL divergence to the dense model. Both on one window. In every round and selection the two ways take turns on the
same candidates, tokens, threads and chunks of logits, and must choose the same; otherwise this fails. A KL divergence's
dense log-probabilities are computed once and kept, for both.

The ideal is the ratio of the work of both ways, as `Run.meter` counts it: tokens through blocks, and tokens through
head and loss, of which nothing is shared. What the latter cost relative to a block is timed here, and given by the
number of parameters for comparison.

    python bench/search.py          (or: python bench/search.py --length 256 --rounds 2)
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.api import read_tokens
from secateur.engine.blocks import BlockInputs, run_block
from secateur.engine.loss import LOGIT_BYTES, KLDivergence, Metric, NegativeLogLikelihood, sample_losses
from secateur.engine.sweep import Part, Variant, final_states, muted, sweep
from secateur.engine.tokens import Tokens
from secateur.methods.evopress import search_space
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import MemoryStore, Run
from secateur.solvers.evolution import Selection, WindowLosses, evolve
from secateur.solvers.greedy import greedy_removal
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropMLP

WAYS = ("whole", "shared")


@torch.no_grad()
def whole(model: Model, tokens: Tokens, variant: Variant, metric: Metric, run: Run) -> float:
    """The mean loss without these parts: mute them, run the whole model, its logits in chunks."""
    inner = model.hf.get_submodule(model.family.blocks.rpartition(".")[0])
    head = model.hf.get_output_embeddings()
    chunk = max(1, LOGIT_BYTES // (4 * model.vocab_size))
    total = 0.0
    with ExitStack() as stack:
        for number in sorted({part.block for part in variant}):
            block = stack.enter_context(model.open(number))
            stack.enter_context(muted(block, [part for part in variant if part.block == number]))
        for sample, ids in enumerate(tokens.ids.split(1)):
            states = inner(input_ids=ids, use_cache=False).last_hidden_state[0]  # (length, hidden), normed
            run.meter.block_tokens += tokens.length * len(model.numbers)
            for start in range(0, tokens.length - 1, chunk):
                positions = slice(start, min(start + chunk, tokens.length - 1))
                targets = ids[0, positions.start + 1 : positions.stop + 1]
                prepared = metric.prepare(model, sample, positions)
                total += float(metric.loss(head(states[positions]).float(), targets, prepared).double().sum())
                run.meter.head_tokens += len(targets)
    return total / (tokens.samples * (tokens.length - 1))


@dataclass
class Race:
    """The same losses both ways, in turn, timed and counted."""

    model: Model
    tokens: Tokens
    metric: Metric
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))
    runs: dict[str, Run] = field(default_factory=lambda: {way: Run() for way in WAYS})
    clock: Callable[[], float] = time.perf_counter
    turns: int = 0
    apart: float = 0.0  # the largest difference of a loss, nats

    def losses(self, variants: Sequence[Variant]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for way in WAYS if self.turns % 2 else WAYS[::-1]:
            start = self.clock()
            if way == "whole":
                found[way] = [whole(self.model, self.tokens, each, self.metric, self.runs[way]) for each in variants]
            else:
                found[way] = sweep(self.model, self.tokens, variants, self.metric, run=self.runs[way]).tolist()
                if isinstance(self.metric, KeptKL):  # what is kept did not go through the head again
                    self.runs[way].meter.head_tokens -= self.tokens.samples * (self.tokens.length - 1)
            self.seconds[way] += self.clock() - start
        self.turns += 1
        self.apart = max([self.apart, *(abs(a - b) for a, b in zip(found["whole"], found["shared"], strict=True))])
        return found

    def reset(self) -> None:
        self.seconds = dict.fromkeys(WAYS, 0.0)
        self.runs = {way: Run() for way in WAYS}

    def work(self, way: str, head: float) -> float:
        """In tokens through a block; `head` is what one through the head costs relative to that."""
        return self.runs[way].meter.block_tokens + head * self.runs[way].meter.head_tokens

    def tell(self, name: str, heads: dict[str, float]) -> None:
        took = self.seconds
        speed_up = took["whole"] / took["shared"]
        print(f"{name}: whole {took['whole']:.1f} s, shared {took['shared']:.1f} s: {speed_up:.2f}x")
        for kind, head in heads.items():
            ideal = self.work("whole", head) / self.work("shared", head)
            print(f"  ideal by count {ideal:.2f}x (head {head:.1f} blocks, {kind}): {speed_up / ideal:.0%} of it")
        print(f"  same choices throughout; losses within {self.apart:.1e} nats", flush=True)


class KeptKL:
    """`KLDivergence` of one window, its dense log-probabilities computed once."""

    def __init__(self, reference: Tensor) -> None:
        self._metric = KLDivergence(reference)
        self._kept: dict[tuple[int, int], Tensor] = {}
        self.loss = self._metric.loss

    def prepare(self, model: Model, sample: int, positions: slice) -> Tensor:
        if (sample, positions.start) not in self._kept:
            self._kept[sample, positions.start] = self._metric.prepare(model, sample, positions)
        return self._kept[sample, positions.start]


def blockpruner(model: Model, tokens: Tokens, rounds: int, clock: Callable[[], float]) -> Race:
    """Greedy rounds over all modules; each removal is made real before the next."""
    race = Race(model, tokens, NegativeLogLikelihood(), clock)
    race.losses([frozenset()])  # to warm up
    race.reset()
    kinds: tuple[Any, ...] = ("attention", "mlp")
    remaining = {way: [Part(number, kind) for number in model.numbers for kind in kinds] for way in WAYS}
    stores = {way: MemoryStore() for way in WAYS}
    searches = {
        way: greedy_removal(model, tokens, list(remaining[way]), rounds, metric=race.metric, key="greedy",
                            run=Run(store=stores[way]))
        for way in WAYS
    }  # fmt: skip
    for place in range(rounds):
        for way, found in race.losses([frozenset({part}) for part in remaining["whole"]]).items():
            stores[way].put(f"greedy/{place}", found)  # the solver chooses by these
        chosen = {way: next(searches[way])[0] for way in WAYS}
        if chosen["whole"] != chosen["shared"]:
            raise RuntimeError(f"round {place + 1}: different choices: {chosen}")
        for way in WAYS:
            remaining[way].remove(chosen[way])
        part = chosen["whole"]
        apply(model, DropAttention(part.block) if part.kind == "attention" else DropMLP(part.block))
    return race


def evopress(
    model: Model, tokens: Tokens, generations: int, offspring: int, sparsity: float, clock: Callable[[], float]
) -> Race:
    """Generations on the same window; the parent's loss is known and not computed again."""
    race = Race(model, tokens, KeptKL(final_states(model, tokens)), clock)
    race.losses([frozenset()])  # the dense log-probabilities, and a first round to warm up
    race.reset()
    shown: list[dict[str, Tensor]] = []  # each selection's losses, for whoever comes second

    def compute(way: str) -> Callable[..., Tensor]:
        turn = iter(range(10**6))

        def losses(variants: Sequence[Variant], samples: Sequence[int], length: int, label: str) -> Tensor:
            place = next(turn)
            if place == len(shown):
                found = race.losses(variants)
                shown.append(
                    {name: torch.tensor(each).double()[:, None] * (length - 1) for name, each in found.items()}
                )
            return shown[place][way]

        return losses

    space = search_space(model.layout(), Budget(sparsity), "modules")
    searches = []
    for way in WAYS:
        run = Run()
        score = WindowLosses(
            compute(way), tokens.weights, run, key="evopress", windows="first", asked=[tokens.length]
        )  # fmt: skip
        searches.append(
            evolve(space, score, run, key="evopress", generations=generations, offspring=offspring, initial=offspring,
                   initial_tokens=tokens.length, selections=[Selection(1, tokens.length)], max_mutations=3)
        )  # fmt: skip
    for whole, shared in zip(*searches, strict=True):
        if whole.parents != shared.parents:
            raise RuntimeError(f"generation {whole.number}: different choices: {whole.parents}, {shared.parents}")
    return race


def head_cost(model: Model, tokens: Tokens, metric: Metric, clock: Callable[[], float]) -> float:
    """What a token costs in head and loss, relative to one in a block: medians of 5."""
    inputs, run = BlockInputs(model), Run()
    number = model.numbers[0]
    with torch.no_grad(), model.open(number) as block:
        hidden = inputs.embed(tokens.ids)
        arguments = inputs.arguments(number, 1, tokens.length)
        in_block = _median(lambda: run_block(block.module, hidden, arguments), clock) / tokens.length
        in_head = _median(lambda: sample_losses(model, [hidden[0]], tokens, 0, metric, run), clock) / (
            tokens.length - 1
        )
    return in_head / in_block


def _median(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    times = []
    for _ in range(6):
        start = clock()
        work()
        times.append(clock() - start)
    return sorted(times[1:])[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="of BlockPruner; 0: not at all")
    parser.add_argument("--generations", type=int, default=4, help="of EvoPress; 0: not at all")
    parser.add_argument("--offspring", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.25, help="of EvoPress")
    parser.add_argument("--cpu-time", action="store_true", help="for one thread on a machine that is used by others")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    start = time.perf_counter()
    model = secateur.load(options.model, device="cpu")
    tokens = read_tokens(model, "demo", purpose="calibration", length=options.length, samples=1)
    print(
        f"{options.model}, one window of {options.length} tokens, {torch.get_num_threads()} thread(s), "
        f"load {os.getloadavg()[0]:.1f}"
    )
    layout = model.layout()
    by_size = model.vocab_size * model.hidden_size * len(layout.blocks) / layout.block_parameters
    searches: dict[str, Callable[[], Race]] = {
        f"EvoPress, {options.generations} generations of {options.offspring}, KL": lambda: evopress(
            model, tokens, options.generations, options.offspring, options.sparsity, clock
        ),
        f"BlockPruner, {options.rounds} rounds, perplexity": lambda: blockpruner(model, tokens, options.rounds, clock),
    }
    for name, search in searches.items():  # BlockPruner last: its removals are real
        if not (options.rounds if "Block" in name else options.generations):
            continue
        metric: Metric = NegativeLogLikelihood() if "Block" in name else KeptKL(final_states(model, tokens))
        timed = head_cost(model, tokens, metric, clock)
        search().tell(name, {"timed": timed, "by parameters": by_size})
    print(f"took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
