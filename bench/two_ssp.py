"""Stage 2 of 2SSP: greedy attention removal by `sweep` against running the whole model for each candidate.

Both prune the same model, which stage 1 has narrowed, and must choose the same attention in every round. They take turns
in one process, on the same tokens, with the same threads and the same chunks of logits. The plain one runs a window
per forward, as it must; ours runs several candidates per forward, so it is timed a second time with one row per forward,
which is the same batch. The ideal is the ratio of counted work (bench/work.py) for this length and these widths.

    make bench          (or: python bench/two_ssp.py --sparsity 0.5 --length 256)
"""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import torch
from common import Report, alternate, calibration, load_model, median, parser
from torch.nn import functional as F
from work import head_parameters, ideal_speedup, plain_round, shared_round

from secateur.engine import loss
from secateur.engine import sweep as engine
from secateur.engine.sweep import Part, muted, sweep
from secateur.engine.tokens import Tokens
from secateur.methods.two_ssp import Plan, neuron_scores, plan, top_neurons
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import Run
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, KeepNeurons


@torch.no_grad()
def plain(model: Model, tokens: Tokens, candidates: Sequence[Part], run: Run) -> list[float]:
    """The mean loss without each candidate: mute it, run the whole model."""
    inner = model.hf.get_submodule(model.family.blocks.rpartition(".")[0])
    head = model.hf.get_output_embeddings()
    chunk = max(1, loss.LOGIT_BYTES // (4 * model.vocab_size))
    losses = []
    for part in candidates:
        total = 0.0
        with model.open(part.block) as block, muted(block, {part}):
            for ids in tokens.ids.split(1):
                states = inner(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
                run.meter.block_tokens += ids.shape[1] * len(model.numbers)
                for rows, targets in zip(states.split(chunk), ids[0, 1:].split(chunk), strict=True):
                    total += float(F.cross_entropy(head(rows).float(), targets, reduction="none").double().sum())
                    run.meter.head_tokens += len(rows)
        losses.append(total / (tokens.samples * (tokens.length - 1)))
    return losses


def shared(model: Model, tokens: Tokens, candidates: Sequence[Part], run: Run) -> list[float]:
    return sweep(model, tokens, [frozenset({part}) for part in candidates], run=run).tolist()


def shared_in_single_rows(model: Model, tokens: Tokens, candidates: Sequence[Part], run: Run) -> list[float]:
    with mock.patch.object(engine, "CPU_TOKENS", 1):
        return shared(model, tokens, candidates, run)


WAYS = {"plain": plain, "sweep": shared, "sweep, single rows": shared_in_single_rows}


def narrow(model: Model, tokens: Tokens, made: Plan) -> None:
    """Stage 1, as the method does it."""
    scores = neuron_scores(model, tokens, norm="l2", order="samples", run=Run())
    for number, width in made.widths.items():
        apply(model, KeepNeurons(number, top_neurons(scores[str(number)], width)))


def greedy(model: Model, search: Tokens, count: int, repeats: int) -> list[dict[str, object]]:
    """`count` rounds, each done by all ways, `repeats` times in turn.

    Raises:
        RuntimeError: two ways choose differently, or one ran more or less than counted.
    """
    remaining = [Part(number, "attention") for number, block in model.layout().blocks.items() if block.attention]
    rows: list[dict[str, object]] = []
    for place in range(count):
        layout, numbers = model.layout(), {part.block for part in remaining}
        runs = {name: Run() for name in WAYS}
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for repeat in range(repeats):
            works = {name: lambda n=name: WAYS[n](model, search, remaining, runs[n]) for name in WAYS}  # noqa: B023
            losses, times = alternate(works, turn=place * repeats + repeat)
            for name in WAYS:
                seconds[name].append(times[name])
        counted = {name: plain_round(layout, numbers) if name == "plain" else shared_round(layout, numbers)
                   for name in WAYS}  # fmt: skip
        for name, run in runs.items():
            ran = run.meter.block_tokens, run.meter.head_tokens
            windows = repeats * search.samples
            if ran != (counted[name].block_forwards * windows * search.length,
                       counted[name].heads * windows * (search.length - 1)):  # fmt: skip
                raise RuntimeError(f"{name}: {ran} tokens through blocks and head, counted {counted[name]}")
        best = {name: min(range(len(each)), key=each.__getitem__) for name, each in losses.items()}
        if len(set(best.values())) != 1:
            raise RuntimeError(f"round {place + 1}: different choices: {best}")
        chosen = remaining.pop(best["plain"])
        apply(model, DropAttention(chosen.block))
        took = {name: median(each) for name, each in seconds.items()}
        ideal = ideal_speedup(layout, numbers, search.length, head_parameters(model))
        rows.append(
            {
                "round": place + 1,
                "candidates": len(numbers),
                "block-forwards, plain": counted["plain"].block_forwards,
                "sweep": counted["sweep"].block_forwards,
                "head-forwards, each": counted["sweep"].heads,
                "plain s": took["plain"],
                "sweep s": took["sweep"],
                "single rows s": took["sweep, single rows"],
                "ideal x": ideal,
                "speed-up x": took["plain"] / took["sweep"],
                "single rows x": took["plain"] / took["sweep, single rows"],
                "removed block": chosen.block,
                "largest difference, nats": max(
                    abs(a - b) for name in WAYS for a, b in zip(losses["plain"], losses[name], strict=True)
                ),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--sparsity", type=float, default=0.5)
    made.add_argument("--attentions", type=int, help="greedy rounds; equation 5's number if not given")
    made.add_argument("--samples", type=int, default=8, help="calibration windows of stage 1")
    made.add_argument("--search-samples", type=int, default=1)
    made.add_argument("--length", type=int, default=256, help="of all windows")
    made.add_argument("--repeats", type=int, default=1, help="of each round; give more where the rounds are few")
    options = made.parse_args(arguments)
    report = Report("2SSP's second stage: shared prefixes against whole forwards", options)
    model = load_model(options.model)
    tokens = calibration(model, options.samples, options.length)
    chosen = plan(model.layout(), Budget(options.sparsity), attentions=options.attentions)
    narrow(model, tokens, chosen)
    rows = greedy(model, tokens.first(options.search_samples), chosen.attentions, options.repeats)
    report.table("Rounds", rows)
    ratios = {way: median([row[f"{way} x"] / row["ideal x"] for row in rows]) for way in ("speed-up", "single rows")}
    total = {way: sum(row[f"{way} s"] for row in rows) for way in ("plain", "sweep", "single rows")}
    report.say(
        "summary",
        {"median share of the ideal": ratios, "seconds": total},
        f"Same choice in all {len(rows)} rounds. Whole stage: plain {total['plain']:.1f} s, sweep {total['sweep']:.1f} s "
        f"({total['plain'] / total['sweep']:.2f}x), single rows {total['single rows']:.1f} s "
        f"({total['plain'] / total['single rows']:.2f}x). Median share of the ideal speed-up: "
        f"{ratios['speed-up']:.0%}, with single rows {ratios['single rows']:.0%}.",
    )
    report.close()


if __name__ == "__main__":
    main()
