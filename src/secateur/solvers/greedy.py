"""Greedy removal: again and again, the part whose absence hurts least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from secateur.engine.loss import Metric
from secateur.engine.sweep import Part, sweep
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.model.handle import Model
from secateur.run import Run


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
    """Yield `count` parts, each the best single removal from the model as it is by then.

    The caller makes each removal real before it resumes. A candidate whose loss is NaN or Inf is passed over; ties
    go to the earlier candidate.

    Yields:
        The part and the loss (nats) without it.

    Raises:
        NumericalError: no candidate has a finite loss.
    """
    remaining = list(candidates)
    for place in range(count):
        label = f"{key} {place + 1}/{count}"
        variants = [frozenset({part}) for part in remaining]
        losses: list[float] = run.step(
            f"{key}/{place}",
            lambda variants=variants, label=label: sweep(  # type: ignore[misc]  # binds this round's values
                model, tokens, variants, metric, run=run, label=label
            ).tolist(),
        )
        finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
        best = min(range(len(finite)), key=finite.__getitem__)
        if math.isinf(finite[best]):
            raise NumericalError(
                f"{label}: every candidate's loss is NaN or Inf; use another dtype (float32, bfloat16) or other data"
            )
        yield remaining.pop(best), finite[best]
