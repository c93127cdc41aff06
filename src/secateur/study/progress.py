"""One bar over all cells of a grid, in units of work, so that its remaining time is honest.

The stages of a cell count their own progress each in its own unit. Here a stage has a share of the grid's foretold
work, and whatever it shows moves the one bar within that share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from secateur.run import Advance


class Share:
    """A part of a bar, and an observer: a fraction done of what it shows becomes the same fraction of the share.

    Args:
        work: the share, in units of the bar.
        advance: moves what it is a part of.
    """

    def __init__(self, work: float, advance: Advance) -> None:
        self._work, self._advance, self._moved = work, advance, 0.0

    @contextmanager
    def part(self, work: float) -> Iterator[Share]:
        """A smaller share, which is all done when the context ends, however it ends."""
        share = Share(work, self._move)
        try:
            yield share
        finally:
            share._move(share._work - share._moved)

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0.0) -> Iterator[Advance]:
        def moved(amount: float) -> None:
            if total > 0:
                self._move(self._work * amount / total)

        yield moved

    def _move(self, amount: float) -> None:
        """Never beyond the share: what shows several bars, or more than was foretold, waits at its end."""
        amount = max(0.0, min(amount, self._work - self._moved))
        self._moved += amount
        self._advance(amount)
