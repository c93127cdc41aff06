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

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import Report, Seconds, alternate, calibration, load_model, median, parser, whole
from torch import Tensor

from secateur.engine.blocks import BlockInputs, run_block
from secateur.engine.loss import KLDivergence, Metric, NegativeLogLikelihood, sample_losses
from secateur.engine.sweep import Part, Sweeper, Variant, final_states, sweep
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


@dataclass
class Race:
    """The same losses both ways, in turn, timed and counted."""

    model: Model
    tokens: Tokens
    metric: Metric
    took: dict[str, list[Seconds]] = field(default_factory=lambda: {way: [] for way in WAYS})
    runs: dict[str, Run] = field(default_factory=lambda: {way: Run() for way in WAYS})
    apart: float = 0.0  # the largest difference of a loss, nats

    def losses(self, variants: Sequence[Variant]) -> dict[str, list[float]]:
        works = {"whole": partial(self._whole, variants), "shared": partial(self._shared, variants)}
        found, took = alternate(works, turn=len(self.took["whole"]))
        for way in WAYS:
            self.took[way].append(took[way])
        self.apart = max([self.apart, *(abs(a - b) for a, b in zip(found["whole"], found["shared"], strict=True))])
        return found

    def _whole(self, variants: Sequence[Variant]) -> list[float]:
        return [whole(self.model, self.tokens, each, self.metric, self.runs["whole"]) for each in variants]

    def _shared(self, variants: Sequence[Variant]) -> list[float]:
        found = sweep(self.model, self.tokens, variants, self.metric, run=self.runs["shared"]).tolist()
        if isinstance(self.metric, KeptKL):  # what is kept did not go through the head again
            self.runs["shared"].meter.head_tokens -= self.tokens.samples * (self.tokens.length - 1)
        return found

    def reset(self) -> None:
        self.took = {way: [] for way in WAYS}
        self.runs = {way: Run() for way in WAYS}

    def ideal(self, head: float) -> float:
        """How many times less work the shared way is; `head` is what a token through it costs, in tokens through a
        block."""
        of_all, of_shared = (
            meter.block_tokens + head * meter.head_tokens for meter in (self.runs[way].meter for way in WAYS)
        )
        return of_all / of_shared

    def row(self, name: str, timed: float) -> dict[str, Any]:
        """The figures, by processor time if there is one thread, else by the clock."""
        clock = {way: sum(each.wall for each in many) for way, many in self.took.items()}
        cpu = {way: sum(each.cpu for each in many) for way, many in self.took.items()}
        basis = cpu if torch.get_num_threads() == 1 else clock
        speed_up = basis["whole"] / basis["shared"]
        return {
            "search": name,
            **{f"{way} s": basis[way] for way in WAYS},
            **{f"{way} clock s": clock[way] for way in WAYS},
            "speed-up x": speed_up,
            "head, in blocks": timed,
            "ideal x": self.ideal(timed),
            "share of the ideal": speed_up / self.ideal(timed),
            "head by parameters": self.model.head_cost,
            "ideal by parameters x": self.ideal(self.model.head_cost),
            "largest difference, nats": self.apart,
        }


class KeptKL:
    """`KLDivergence` of one window, its dense log-probabilities computed once."""

    heads = 1

    def __init__(self, reference: Tensor) -> None:
        self._metric = KLDivergence(reference)
        self._kept: dict[tuple[int, int], Tensor] = {}
        self.loss = self._metric.loss

    def prepare(self, model: Model, sample: int, positions: slice) -> Tensor:
        if (sample, positions.start) not in self._kept:
            self._kept[sample, positions.start] = self._metric.prepare(model, sample, positions)
        return self._kept[sample, positions.start]


def blockpruner(model: Model, tokens: Tokens, rounds: int) -> Race:
    """Greedy rounds over all modules; each removal is made real before the next."""
    race = Race(model, tokens, NegativeLogLikelihood())
    race.losses([frozenset()])  # to warm up
    race.reset()
    kinds: tuple[Any, ...] = ("attention", "mlp")
    remaining = {way: [Part(number, kind) for number in model.numbers for kind in kinds] for way in WAYS}
    stores = {way: MemoryStore() for way in WAYS}
    searches = {
        way: greedy_removal(Sweeper(model, Run(store=stores[way])), tokens, list(remaining[way]), rounds,
                            metric=race.metric, key="greedy")
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


def evopress(model: Model, tokens: Tokens, generations: int, offspring: int, sparsity: float) -> Race:
    """Generations on the same window; the parent's loss is known and not computed again."""
    race = Race(model, tokens, KeptKL(final_states(model, tokens)))
    race.losses([frozenset()])  # the dense log-probabilities, and a first round to warm up
    race.reset()
    shown: list[dict[str, Tensor]] = []  # each selection's losses, for whoever comes second

    class Raced(Sweeper):
        """Both ways' losses, raced once and shown to each."""

        def __init__(self, way: str) -> None:
            super().__init__(model, Run())
            self.way, self.turn = way, iter(range(10**6))

        def sums(self, cut: Tokens, variants: Sequence[Variant], metric: Metric, label: str) -> Tensor:
            place = next(self.turn)
            if place == len(shown):
                found = race.losses(variants)
                shown.append(
                    {way: torch.tensor(each).double()[:, None] * (cut.length - 1) for way, each in found.items()}
                )
            return shown[place][self.way]

    space = search_space(model.layout(), Budget(sparsity), "modules")
    searches = []
    for way in WAYS:
        raced = Raced(way)
        score = WindowLosses(
            raced, tokens, key="evopress", windows="first", criterion="ppl", asked={"initial_tokens": [tokens.length]}
        )  # fmt: skip
        searches.append(
            evolve(space, score, raced.run, key="evopress", generations=generations, offspring=offspring,
                   initial=offspring, initial_tokens=tokens.length, selections=[Selection(1, tokens.length)],
                   max_mutations=3)
        )  # fmt: skip
    for one, other in zip(*searches, strict=True):
        if one.parents != other.parents:
            raise RuntimeError(f"generation {one.number}: different choices: {one.parents}, {other.parents}")
    return race


def timed_head(model: Model, tokens: Tokens, metric: Metric) -> float:
    """What a token costs in head and loss, relative to one in a block: medians of 5, by processor time if there is one
    thread."""
    inputs, run = BlockInputs(model), Run()
    number = model.numbers[0]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def took(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):  # the first one warms up
            start = clock()
            work()
            times.append(clock() - start)
        return median(times[1:])

    with torch.no_grad(), model.open(number) as block:
        hidden = inputs.embed(tokens.ids)
        arguments = inputs.arguments(number, 1, tokens.length)
        in_block = took(lambda: run_block(block.module, hidden, arguments)) / tokens.length
        in_head = took(lambda: sample_losses(model, [hidden[0]], tokens, 0, metric, run)) / (tokens.length - 1)
    return in_head / in_block


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--rounds", type=int, default=5, help="of BlockPruner; 0: not at all")
    made.add_argument("--generations", type=int, default=4, help="of EvoPress; 0: not at all")
    made.add_argument("--offspring", type=int, default=16)
    made.add_argument("--sparsity", type=float, default=0.25, help="of EvoPress")
    options = made.parse_args(arguments)
    report = Report("BlockPruner's and EvoPress's searches: shared prefixes against whole forwards", options)
    model = load_model(options.model)
    tokens = calibration(model, 1, options.length)
    rows = []
    if options.generations:
        timed = timed_head(model, tokens, KeptKL(final_states(model, tokens)))
        race = evopress(model, tokens, options.generations, options.offspring, options.sparsity)
        rows.append(race.row(f"EvoPress, {options.generations} generations of {options.offspring}, KL", timed))
    if options.rounds:  # last: its removals are real
        timed = timed_head(model, tokens, NegativeLogLikelihood())
        rows.append(
            blockpruner(model, tokens, options.rounds).row(f"BlockPruner, {options.rounds} rounds, perplexity", timed)
        )
    if not rows:
        made.error("nothing to do: no rounds and no generations")
    report.table("Searches", rows)
    report.say("same choices", True, "Same choices throughout.")
    report.close()


if __name__ == "__main__":
    main()
