"""Greedy removal: again and again, the part whose absence hurts least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from secateur.engine.loss import Metric
from secateur.engine.sweep import DENSE, Part, Sweeper
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError
from secateur.model.budget import takes


class Screen:
    """Which candidates of a greedy round are tried: after the first round only those that may well win.

    What a removal costs changes slowly from round to round, and mostly upwards. So the estimate of a candidate's loss
    is the loss of the model as it is and what the candidate added when it was last tried; those of the lowest estimates
    are tried, and the losses that they really have decide. What is never tried again keeps an estimate that is too low
    rather than too high, and so comes up again as the losses of the others rise.

    Args:
        count: candidates tried per round; those that never were are all tried.

    Raises:
        InvalidOptionError: not even one.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise InvalidOptionError(f"screen is the number of candidates tried per round, at least 1, not {count}")
        self.count = count
        self.loss: float | None = None  # of the model as it is, in nats
        self._added: dict[Part, float] = {}  # to the loss, when last tried

    def worth_trying(self, candidates: Sequence[Part]) -> list[Part]:
        """In the order given."""
        ranked = sorted(candidates, key=lambda part: self._added.get(part, -math.inf))
        untried = sum(part not in self._added for part in candidates)
        chosen = set(ranked[: max(self.count, untried)])
        return [part for part in candidates if part in chosen]

    def learn(self, losses: Mapping[Part, float]) -> None:
        """Take in the losses without each part that was tried; the part of the least goes."""
        before = self.loss if self.loss is not None and math.isfinite(self.loss) else 0.0
        self._added |= {part: loss - before for part, loss in losses.items()}
        self.loss = min(losses.values())


def best_removal(
    sweeper: Sweeper,
    tokens: Tokens,
    candidates: Sequence[Part],
    *,
    metric: Metric,
    key: str,
    label: str | None = None,
    screen: Screen | None = None,
) -> tuple[Part, float]:
    """The best single removal from the model as it is. One journaled step, named `key`.

    A candidate whose loss is NaN or Inf is passed over; ties go to the earlier candidate.

    Args:
        screen: decides which candidates are tried, and learns from it; all if None.

    Returns:
        The part and the loss (nats) without it.

    Raises:
        NumericalError: no candidate has a finite loss.
    """
    if screen:
        candidates = screen.worth_trying(candidates)
    variants, label = [frozenset({part}) for part in candidates], label or key
    if screen and screen.loss is None:
        variants.append(DENSE)
    counted = float(tokens.weights[:, 1:].double().sum())
    losses: list[float] = sweeper.run.step(
        key, lambda: (sweeper.sums(tokens, variants, metric, label).sum(dim=1) / counted).tolist()
    )
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = min(range(len(candidates)), key=finite.__getitem__)
    if math.isinf(finite[best]):
        raise NumericalError(
            f"{label}: every candidate's loss is NaN or Inf; use another dtype (float32, bfloat16) or other data"
        )
    if screen:
        screen.loss = finite[-1] if screen.loss is None else screen.loss
        screen.learn(dict(zip(candidates, finite, strict=False)))
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
    screen: Screen | None = None,
) -> Iterator[tuple[Part, float]]:
    """Yield `count` parts, each the best single removal from the model as it is by then, and the loss without it.

    The caller makes each removal real before it resumes.

    Args:
        sizes: the parameters of the parts: as many go as come nearest to those of `count` average ones.
        screen: of each round's candidates; all are tried if None.
    """
    remaining, sizes = list(candidates), sizes or dict.fromkeys(candidates, 1)
    target, removed, place = count * sum(sizes.values()) / max(1, len(sizes)), 0, 0
    while remaining and takes(target, removed, min(sizes[part] for part in remaining)):
        label = f"{key} {place + 1}/{count}"
        part, loss = best_removal(
            sweeper, tokens, remaining, metric=metric, key=f"{key}/{place}", label=label, screen=screen
        )
        if not takes(target, removed, sizes[part]):
            return
        remaining.remove(part)
        removed, place = removed + sizes[part], place + 1
        yield part, loss
