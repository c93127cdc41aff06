"""Stage 2 of 2SSP: greedy attention removal by `sweep` against running the whole model for each candidate.

Both prune the same model, which stage 1 has narrowed, and must choose the same attention in every round. They take
turns in one process, on the same tokens, with the same threads, loss, chunks of logits and, on a CPU, rows per forward:
one. The ideal is the ratio of counted work (bench/work.py) for this length and these widths. Speed-ups are ratios of
processor time if there is one thread, else of the clock's.

    make bench          (or: python bench/two_ssp.py --sparsity 0.5 --length 256)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import Report, Seconds, alternate, calibration, load_model, median, parser, whole
from work import Work, head_parameters, ideal_speedup, plain_round, shared_round

from secateur.engine.loss import NegativeLogLikelihood
from secateur.engine.sweep import Part, sweep
from secateur.engine.tokens import Tokens
from secateur.methods.two_ssp import Balance, balance
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.scores import neuron_scores, top_neurons
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, KeepNeurons


def plain(model: Model, tokens: Tokens, candidates: Sequence[Part], run: Run) -> list[float]:
    """The mean loss without each candidate: mute it, run the whole model."""
    return [whole(model, tokens, frozenset({part}), NegativeLogLikelihood(), run) for part in candidates]


def shared(model: Model, tokens: Tokens, candidates: Sequence[Part], run: Run) -> list[float]:
    return sweep(model, tokens, [frozenset({part}) for part in candidates], run=run).tolist()


WAYS = {"plain": plain, "sweep": shared}


def narrow(model: Model, tokens: Tokens, made: Balance) -> None:
    """Stage 1, as the method does it."""
    scores = neuron_scores(model, tokens, norm="l2", order="samples", run=Run())
    for number, width in made.widths.items():
        apply(model, KeepNeurons(number, top_neurons(scores[str(number)], width)))


def greedy(model: Model, search: Tokens, count: int, repeats: int) -> list[dict[str, Any]]:
    """`count` rounds, each done by all ways, `repeats` times in turn; one row of figures per round.

    Raises:
        RuntimeError: two ways choose differently, or one ran more or less than counted.
    """
    remaining = [Part(number, "attention") for number, block in model.layout().blocks.items() if block.attention]
    rows = []
    for place in range(count):
        layout, numbers = model.layout(), {part.block for part in remaining}
        counted = {name: (plain_round if name == "plain" else shared_round)(layout, numbers) for name in WAYS}
        works = {name: partial(_checked, name, model, search, remaining, counted[name]) for name in WAYS}
        took: dict[str, list[Seconds]] = {name: [] for name in WAYS}
        for repeat in range(repeats):
            losses, seconds = alternate(works, turn=place * repeats + repeat)
            for name in WAYS:
                took[name].append(seconds[name])
        best = {name: min(range(len(each)), key=each.__getitem__) for name, each in losses.items()}
        if len(set(best.values())) != 1:
            raise RuntimeError(f"round {place + 1}: different choices: {best}")
        chosen = remaining.pop(best["plain"])
        apply(model, DropAttention(chosen.block))
        clock = {name: median([each.wall for each in many]) for name, many in took.items()}
        cpu = {name: median([each.cpu for each in many]) for name, many in took.items()}
        basis = cpu if torch.get_num_threads() == 1 else clock
        row = {
            "round": place + 1,
            "candidates": len(numbers),
            "removed block": chosen.block,
            "plain block-forwards": counted["plain"].block_forwards,
            "sweep block-forwards": counted["sweep"].block_forwards,
            "head-forwards": counted["sweep"].heads,
        }
        row |= {f"{name} s": basis[name] for name in WAYS}
        row["ideal x"] = ideal_speedup(layout, numbers, search.length, head_parameters(model))
        row |= {f"{name} x": basis["plain"] / basis[name] for name in WAYS if name != "plain"}
        row |= {f"{name} clock s": clock[name] for name in WAYS}
        row["largest difference, nats"] = max(
            abs(a - b) for name in WAYS for a, b in zip(losses["plain"], losses[name], strict=True)
        )
        rows.append(row)
    return rows


def _checked(name: str, model: Model, search: Tokens, candidates: Sequence[Part], counted: Work) -> list[float]:
    run = Run()
    losses = WAYS[name](model, search, candidates, run)
    ran = run.meter.block_tokens, run.meter.head_tokens
    if ran != (counted.block_forwards * search.samples * search.length,
               counted.heads * search.samples * (search.length - 1)):  # fmt: skip
        raise RuntimeError(f"{name}: {ran} tokens through blocks and head, which is not what was counted: {counted}")
    return losses


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
    chosen = balance(model.layout(), Budget(options.sparsity), attentions=options.attentions)
    narrow(model, tokens, chosen)
    rows = greedy(model, tokens.first(options.search_samples), chosen.attentions, options.repeats)
    shown = [name for name in rows[0] if not name.endswith("clock s")]
    report.table("Rounds", [{name: row[name] for name in shown} for row in rows])
    total = {kind: {name: sum(row[f"{name} {kind}"] for row in rows) for name in WAYS} for kind in ("s", "clock s")}
    shares = {name: median([row[f"{name} x"] / row["ideal x"] for row in rows]) for name in WAYS if name != "plain"}
    ideal = sum(row["plain s"] for row in rows) / sum(row["plain s"] / row["ideal x"] for row in rows)
    report.table(
        "Whole stage",
        [
            {
                "way": name,
                "s": total["s"][name],
                "clock s": total["clock s"][name],
                "speed-up x": total["s"]["plain"] / total["s"][name],
                "by the clock x": total["clock s"]["plain"] / total["clock s"][name],
                "ideal x": 1.0 if name == "plain" else ideal,
                "median share of the ideal": shares.get(name),
            }
            for name in WAYS
        ],
    )
    report.say("rounds with equal choices", len(rows), f"Same choice in all {len(rows)} rounds.")
    report.close()


if __name__ == "__main__":
    main()
