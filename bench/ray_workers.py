"""One against two of Ray's workers on this machine, for a search of EvoPress.

The same search runs in this process, over one worker and over two, in turn, on equal tokens, with one thread each; all
must choose the same modules, else this fails. Two figures say what limits the gain: what the split allows, counted
(work over that of the busier worker of each sweep), and what two processes can gain on this machine at all (the same
forwards by one worker, and as many by each of two at once), which on two hyperthreads of one core is far from twofold.

    OMP_NUM_THREADS=1 python bench/ray_workers.py          (or: ... --model random:blocks=6 --length 64 --rounds 1)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from common import Report, calibration, load_model, median, parser
from transformers import LlamaConfig

from secateur.driver import run_method
from secateur.engine.loss import NegativeLogLikelihood
from secateur.engine.sweep import DENSE, Variant, _work
from secateur.engine.tokens import Tokens
from secateur.methods import get_method
from secateur.methods.evopress import search_space
from secateur.model.budget import Budget
from secateur.model.handle import Model, hollow
from secateur.model.load import Source
from secateur.run import Run
from secateur.surgery.edits import to_json
from secateur.workers.session import Workers, session
from secateur.workers.sweeps import SpreadSweeper, SpreadSweeps, _by_prefix, split

SPARSITY = 0.25
WAYS = {"in this process": 0, "one worker": 1, "two workers": 2}


class Counted(SpreadSweeper):
    """Counts the work of the busiest worker of each sweep, in tokens through one block: the others wait for it."""

    busiest, every = 0.0, 0.0

    def _results(self, calls: Any, label: str) -> Iterator[tuple[int, Any]]:
        head, count = self.model.head_cost, len(self._sweeps.actors)
        shares, before = [0.0] * count, self.run.meter.work(head)
        for place, result in super()._results(calls, label):
            now = self.run.meter.work(head)
            shares[place % count] += now - before
            before = now
            yield place, result
        Counted.busiest += max(shares)
        Counted.every += sum(shares)


class CountedSweeps(SpreadSweeps):
    def __call__(self, model: Model, run: Run, versions: Any = None) -> SpreadSweeper:
        return Counted(self, model, run, versions)


@contextmanager
def by_name(model: str) -> Iterator[Source]:
    """A model that workers can load: a made-up one is written first."""
    if not model.startswith("random"):
        yield Source(name=model, device="cpu")
        return
    with tempfile.TemporaryDirectory() as folder:
        load_model(model).hf.save_pretrained(folder)
        yield Source(name=folder, device="cpu")


def search(source: Source, tokens: Tokens, sweeps: Any, options: dict[str, Any]) -> tuple[float, list[Any], Run]:
    """What a search takes by the clock without loading the model, what it chooses, and its run."""
    model, run = source.load(), Run(sweeper=sweeps)
    began = time.perf_counter()
    pruning = run_method(model, get_method("evopress"), tokens, Budget(SPARSITY), run, **options)
    return time.perf_counter() - began, [to_json(edit) for edit in pruning.edits], run


def forwards(sweeps: SpreadSweeps, source: Source, tokens: Tokens, count: int) -> float:
    """Seconds in which each worker runs so many forwards, all workers at once."""
    every = count * sweeps.workers.count
    windows = Tokens(tokens.ids[:1].repeat(every, 1), tokens.weights[:1].repeat(every, 1))
    sweeper = sweeps(source.hollow(), Run())
    began = time.perf_counter()
    sweeper.sums(windows, [DENSE], NegativeLogLikelihood(), "forwards")
    return time.perf_counter() - began


def counted_gains(workers: Sequence[int]) -> list[dict[str, Any]]:
    """By counting, on the shapes of Llama-3.1-8B: a sweep's work in one process over that of the busiest worker."""
    shapes = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }  # fmt: skip
    model = hollow(LlamaConfig(**shapes), torch.bfloat16, {})
    layout, rng = model.layout(), torch.Generator().manual_seed(0)
    space = search_space(layout, Budget(SPARSITY), "modules")
    parent = space.draw(rng)
    single = [frozenset({part}) for parts in space.parts.values() for part in parts]
    sweeps = {
        "a round of BlockPruner: 64 candidates, one window": (single, 1),
        "EvoPress's first step: 32 offspring, one window": ([space.mutate(parent, 3, rng) for _ in range(32)], 1),
        "its second: 4 candidates, 16 windows": ([space.mutate(parent, 3, rng) for _ in range(4)], 16),
    }

    def work(variants: Sequence[Variant]) -> float:
        return _work(model, [variants]) + model.head_cost * len(variants)

    rows = []
    for name, (variants, samples) in sweeps.items():
        ordered = sorted(set(variants), key=_by_prefix)
        row: dict[str, Any] = {"sweep": name}
        for count in workers:
            busy = [0.0] * count
            for place, share in enumerate(split(ordered, samples, count, model.numbers, model.head_cost)):
                some = [ordered[each] for each in share.variants]
                busy[place % count] += work(some) * len(share.samples)
            row[f"{count} workers"] = work(ordered) * samples / max(busy)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--generations", type=int, default=2)
    options.add_argument("--offspring", type=int, default=12)
    options.add_argument("--forwards", type=int, default=6, help="of each worker, for what two can gain at all")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    report = Report("EvoPress by Ray's workers", given)
    tokens = calibration(load_model(given.model), 2, given.length)
    how = {
        "generations": given.generations, "offspring": given.offspring, "initial": given.offspring,
        "initial_tokens": given.length, "survivors": "2,1", "selection_tokens": f"{given.length},{2 * given.length}",
    }  # fmt: skip
    with by_name(given.model) as source, session(Workers(count=3, cpus=1)):
        fingerprint = source.load().fingerprint()
        sweeps = {
            way: (CountedSweeps if count == 2 else SpreadSweeps)(
                Workers(count=count, cpus=1), source, "cpu", fingerprint
            )
            if count
            else None
            for way, count in WAYS.items()
        }
        spread = [each for each in sweeps.values() if each is not None]
        for each in spread:  # they load
            forwards(each, source, tokens, 1)
        took: dict[str, list[float]] = {way: [] for way in WAYS}
        alone, both, work = list[float](), list[float](), dict[str, int]()
        for turn in range(given.rounds):
            chosen, ways = dict[str, Any](), list(WAYS)
            Counted.busiest = Counted.every = 0.0
            for way in ways[turn % 3 :] + ways[: turn % 3]:
                seconds, chosen[way], run = search(source, tokens, sweeps[way], how)
                took[way].append(seconds)
                work[way] = run.meter.block_tokens
            assert all(edits == chosen["in this process"] for edits in chosen.values()), "they chose differently"
            counted = Counted.every / Counted.busiest
            one, two = (forwards(each, source, tokens, given.forwards) for each in spread)
            alone.append(one)
            both.append(two)
    rows = [{"way": way, "s": median(took[way]), "tokens through blocks": work[way]} for way in WAYS]
    report.table("search", rows)
    gains = [one / two for one, two in zip(took["one worker"], took["two workers"], strict=True)]
    room = [2 * one / two for one, two in zip(alone, both, strict=True)]
    report.table("by counting, at scale", counted_gains((2, 4, 8)))
    report.say("gain", gains, f"two workers over one: {median(gains):.2f} times as fast ({listed(gains)})")
    report.say("ideal", counted, f"by the work of the busier worker of each sweep: {counted:.2f}")
    report.say("room", room, f"two processes over one, the same forwards each: {median(room):.2f} ({listed(room)})")
    report.close()


def listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)


if __name__ == "__main__":
    main()
