"""Greedy removal: again and again, the part whose absence hurts least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from secateur.engine.loss import Metric
from secateur.engine.sweep import Part, Sweeper
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.model.budget import takes


def best_removal(
    sweeper: Sweeper,
    tokens: Tokens,
    candidates: Sequence[Part],
    *,
    metric: Metric,
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
    variants, label = [frozenset({part}) for part in candidates], label or key
    counted = float(tokens.weights[:, 1:].double().sum())
    losses: list[float] = sweeper.run.step(
        key, lambda: (sweeper.sums(tokens, variants, metric, label).sum(dim=1) / counted).tolist()
    )
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = min(range(len(finite)), key=finite.__getitem__)
    if math.isinf(finite[best]):
        raise NumericalError(
            f"{label}: every candidate's loss is NaN or Inf; use another dtype (float32, bfloat16) or other data"
        )
    return candidates[best], finite[best]


def greedy_removal(
    sweeper: Sweeper,
    tokens: Tokens,
    candidates: Sequence[Part],
    count: int,
    *,
    metric: Metric,
    key: str,
    sizes: Mapping[Part, int] | None = None,
) -> Iterator[tuple[Part, float]]:
    """Yield `count` parts, each the best single removal from the model as it is by then, and the loss without it.

    The caller makes each removal real before it resumes.

    Args:
        sizes: the parameters of the parts: as many go as come nearest to those of `count` average ones.
    """
    remaining, sizes = list(candidates), sizes or dict.fromkeys(candidates, 1)
    target, removed, place = count * sum(sizes.values()) / max(1, len(sizes)), 0, 0
    while remaining and takes(target, removed, min(sizes[part] for part in remaining)):
        label = f"{key} {place + 1}/{count}"
        part, loss = best_removal(sweeper, tokens, remaining, metric=metric, key=f"{key}/{place}", label=label)
        if not takes(target, removed, sizes[part]):
            return
        remaining.remove(part)
        removed, place = removed + sizes[part], place + 1
        yield part, loss
