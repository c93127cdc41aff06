"""What prunings by one method at several sparsities share: steps that hold at all of them are computed once, and count
as if each pruning were run alone."""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from secateur.run import MemoryStore, Meter, Observer, Run

T = TypeVar("T")
Clock = Callable[[], float]  # seconds


class Spent(NamedTuple):
    """Wall and CPU seconds, and the work of a `Meter`."""

    wall_s: float
    cpu_s: float
    block_tokens: int
    head_tokens: int
    asked_tokens: int

    def since(self, earlier: Spent) -> Spent:
        return Spent(*map(operator.sub, self, earlier))


@dataclass
class _Last:
    """A run's last step: what was spent when it ended, and whether it was taken over."""

    ended: Spent | None = None
    taken_over: bool = False


class Shared(MemoryStore):
    """The store of one method's runs at several sparsities: from one to the next it keeps the steps whose keys begin
    with `beginning`, which hold at every sparsity; none if that is None. Opened again for the job that it was last
    open for, it has all of that job's steps.

    Attributes:
        spent: what each step took that lies here.
        spared_s: seconds that were spared so far by taking steps over.
    """

    def __init__(self, beginning: str | None = None) -> None:
        super().__init__()
        self.beginning, self.spent, self.spared_s = beginning, dict[str, Spent](), 0.0

    def open(self, identity: str) -> None:
        if identity != self.identity:
            self._results = {key: result for key, result in self._results.items() if self._holds(key)}
            self.spent = {key: spent for key, spent in self.spent.items() if self._holds(key)}
        self.identity = identity

    def copy(self) -> Shared:
        """As it is now; what lies here is not copied."""
        other = copy.copy(self)
        other._results, other.spent = dict(self._results), dict(self.spent)
        return other

    def sibling(self, beginning: str | None) -> Shared:
        """An empty store of the same kind, for other jobs."""
        return Shared(beginning)

    def _holds(self, key: str) -> bool:
        return self.beginning is not None and key.startswith(self.beginning)

    @property
    def seconds(self) -> float:
        """That the steps took which a run at another sparsity takes over."""
        return sum(spent.wall_s for key, spent in self.spent.items() if self._holds(key))


class SharingRun(Run):
    """A run that takes steps over from earlier ones; its meter and clocks go as if it were run alone.

    A step stands for all that was done since the one before it, a walk's passes between them too. So where it is taken
    over, what was done again meanwhile does not count, nor do the passes by which a walk catches up.

    Args:
        shared: of runs of the same method with the same options, calibration and seed.
        clock: seconds.
        keep_states, sweeper: as `Run` has them.
    """

    def __init__(
        self, seed: int, shared: Shared, *, observer: Observer | None = None, clock: Clock = time.monotonic,
        keep_states: int = 0, sweeper: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(seed, store=shared, observer=observer, keep_states=keep_states, sweeper=sweeper)
        self._shared, self._clock = shared, clock
        self._spared: list[Spent] = []
        self._last = _Last()  # shared by the run's parts

    def expect(self, meter: Meter, *, head: float) -> None:
        super().expect(meter, head=head)
        self._last.ended = self.spent()  # the work begins

    def step(self, key: str, compute: Callable[[], T], *, scratch_bytes: float = 0) -> T:
        shared, name, last = self._shared, self._scope + key, self._last
        began = last.ended or self.spent()
        known = shared.spent.get(name)
        if known is not None:
            shared.spared_s += known.wall_s
            with self.progress(key, 1) as advance:
                self._count(known.since(self.spent().since(began)))
                advance(1)

        def timed() -> T:
            result = compute()
            shared.spent[name] = self.spent().since(began)  # known when the result is put
            return result

        result = super().step(key, timed)
        last.ended, last.taken_over = self.spent(), known is not None
        return result

    @contextmanager
    def again(self) -> Iterator[None]:
        if not self._last.taken_over:
            yield
            return
        began = self.spent()
        yield
        self._count(began.since(self.spent()))

    def _count(self, spent: Spent) -> None:
        """As if so much more, or less, had been done."""
        self._spared.append(spent)
        self.meter.block_tokens += spent.block_tokens
        self.meter.head_tokens += spent.head_tokens
        self.meter.asked_tokens += spent.asked_tokens

    @property
    def spared(self) -> Spent:
        """By taking steps over."""
        return Spent(*(sum(values) for values in zip(*self._spared, strict=True))) if self._spared else Spent(*[0] * 5)

    @property
    def spared_s(self) -> float:
        return self.spared.wall_s

    @property
    def computed(self) -> Meter:
        """The work without what was taken over."""
        spared, meter = self.spared, self.meter
        return Meter(
            meter.block_tokens - spared.block_tokens, meter.head_tokens - spared.head_tokens,
            meter.asked_tokens - spared.asked_tokens,
        )  # fmt: skip

    def spent(self) -> Spent:
        """Until now, from some time before the run."""
        spared = self.spared
        return Spent(self._clock() + spared.wall_s, time.process_time() + spared.cpu_s, **asdict(self.meter))
