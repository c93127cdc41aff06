"""Greedy removal: again and again, the part whose absence hurts least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from secateur.engine.loss import Metric
from secateur.engine.sweep import Part, sweep, sweep_states
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.cost import Cost
from secateur.solvers.criterion import Criterion


def best_removal(
    model: Model,
    tokens: Tokens,
    candidates: Sequence[Part],
    *,
    metric: Metric,
    run: Run,
    key: str,
    label: str | None = None,
) -> tuple[Part, float]:
    """The best single removal from the model as it is. One journaled step, named `key`.

    A candidate whose loss is NaN or Inf is passed over; ties go to the earlier candidate.

    Returns:
        The part and the loss (nats) without it.

    Raises:
        NumericalError: no candidate has a finite loss.
    """
    variants = [frozenset({part}) for part in candidates]
    losses: list[float] = run.step(
        key, lambda: sweep(model, tokens, variants, metric, run=run, label=label or key).tolist()
    )
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = min(range(len(finite)), key=finite.__getitem__)
    if math.isinf(finite[best]):
        raise NumericalError(
            f"{label or key}: every candidate's loss is NaN or Inf; use another dtype (float32, bfloat16) or other data"
        )
    return candidates[best], finite[best]


def greedy_removal(
    model: Model,
    tokens: Tokens,
    candidates: Sequence[Part],
    count: int,
    *,
    metric: Metric,
    run: Run,
    key: str,
) -> Iterator[tuple[Part, float]]:
    """Yield `count` parts, each the best single removal from the model as it is by then, and the loss without it.

    The caller makes each removal real before it resumes.
    """
    remaining = list(candidates)
    for place in range(count):
        label = f"{key} {place + 1}/{count}"
        part, loss = best_removal(model, tokens, remaining, metric=metric, run=run, key=f"{key}/{place}", label=label)
        remaining.remove(part)
        yield part, loss


def round_forwards(candidates: int, blocks: int) -> float:
    """Block-forwards per window of a round over candidates that are spread evenly over the blocks: a block produces
    a state for each candidate up to it and, but for the last block, the one that lacks nothing."""
    return candidates * (blocks + 1) / 2 + blocks - 1


def greedy_cost(
    candidates: Sequence[int], *, blocks: int, samples: int, length: int, criterion: Criterion, after: Layout
) -> Cost:
    """What greedy rounds cost, without knowing which candidates will go.

    Args:
        candidates: their number in each round.
        blocks: of the model.
        samples, length: windows that the loss is taken on, and their tokens.
        after: the layout that they lead to.
    """
    windows = samples * length
    rounds, heads, tried = sum(round_forwards(count, blocks) for count in candidates), sum(candidates), sum(candidates)
    if kl := criterion == "kl" and bool(candidates):  # the dense model once, its logits once a round
        rounds, heads, tried = rounds + blocks, heads + len(candidates), tried + 1
    return Cost(
        block_tokens=windows * rounds,
        head_tokens=samples * (length - 1) * heads,
        asked_tokens=windows * tried * blocks,
        peak_states=0,
        after=after,
        sweep_states=sweep_states(max(candidates, default=0), samples, length),
        kept_states=windows * kl,
    )
