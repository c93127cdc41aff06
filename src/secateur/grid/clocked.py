"""What a pruning takes, also where a part of it was taken over from another sparsity's run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from secateur.forecast import Clock
from secateur.run import MemoryStore, Observer, Run

T = TypeVar("T")


class Shared(MemoryStore):
    """The steps of one method's runs that hold at every sparsity, with what each took.

    Args:
        beginning: of their keys. With a "/" at its end they are a series, of which a run asks the more, the more it
            removes; without, it is one step, which each run asks.

    Attributes:
        spent: what each took.
        spared_s: seconds that were spared so far by taking steps over.
    """

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning
        self.spent: dict[str, dict[str, float]] = {}
        self.spared_s = 0.0

    @property
    def is_series(self) -> bool:
        return self.beginning.endswith("/")

    @property
    def seconds(self) -> float:
        """That the steps which are there took."""
        return sum(each["wall_s"] for each in self.spent.values())


class Clocked(Run):
    """A run that knows what it took, as if run alone: what a shared step took counts again.

    Args:
        shared: steps of earlier runs of the same method with the same options, calibration and seed; None if it has
            none that hold at every sparsity.
        clock: seconds.
    """

    def __init__(
        self, seed: int, *, shared: Shared | None, observer: Observer | None = None, clock: Clock = time.monotonic
    ) -> None:
        super().__init__(seed, observer=observer)
        self._shared, self._clock = shared, clock
        self._spared: list[dict[str, float]] = []

    def step(self, key: str, compute: Callable[[], T], *, scratch_bytes: float = 0) -> T:
        shared = self._shared
        if shared is None or not key.startswith(shared.beginning):
            return super().step(key, compute)

        def taken_over() -> T:
            try:
                result: T = shared.get(key)
            except KeyError:
                began = self._now()
                result = compute()
                shared.spent[key] = _difference(self._now(), began)
                shared.put(key, result)
            else:
                with self.progress(key, 1) as advance:
                    self._spared.append(shared.spent[key])
                    shared.spared_s += shared.spent[key]["wall_s"]
                    advance(1)
            return result

        return super().step(key, taken_over)

    @contextmanager
    def clocked(self) -> Iterator[dict[str, float]]:
        """Gives a dictionary that holds, after the context: wall_s, cpu_s, block_tokens, head_tokens, asked_tokens."""
        took: dict[str, float] = {}
        began = self._now()
        yield took
        took |= _difference(self._now(), began)
        for each in self._spared:
            took |= {name: took[name] + value for name, value in each.items()}

    def work_done(self) -> float:
        spared = sum(each["block_tokens"] + self._head * each["head_tokens"] for each in self._spared)
        return super().work_done() + spared

    def _now(self) -> dict[str, float]:
        return {"wall_s": self._clock(), "cpu_s": time.process_time(), **vars(self.meter)}


def _difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in after.items()}
