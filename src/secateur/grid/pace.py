"""How long a grid will still take. A part is foretold from what parts of its kind have taken in the same folder.

Before any has been timed, it is foretold from one probed block, and told to be a guess. What was foretold of a part, in
probed seconds, is only used to compare parts of a kind: a cell that keeps half of the blocks takes about half.

A pruning is foretold and timed as if it were run alone. What it will take over from those before it is then subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from secateur.grid.clocked import Shared
from secateur.grid.estimate import PERPLEXITY, PRUNE
from secateur.run import Advance

Kind = tuple[str, str]  # a part's name; of prunings, the method too
Took = Mapping[str, float]  # seconds by part; under SHARED, of the pruning's those of steps that others share

SHARED = "shared"


@dataclass(frozen=True)
class Standing:
    """How far a grid is.

    Attributes:
        cell, part: what is being done; "" between cells.
        done: of the part, 0 to 1.
        finished, cells: of the whole grid, with those of earlier runs.
        elapsed_s: of this run.
        left_s: until all cells are there.
        guessed: the kinds of parts to come of which none has been timed yet.
    """

    cell: str
    part: str
    done: float
    finished: int
    cells: int
    elapsed_s: float
    left_s: float
    guessed: tuple[Kind, ...]


@dataclass
class _Running:
    cell: str
    part: str
    began: float
    bars: int
    store: Shared
    closed: int = 0
    done: float = 0.0

    def __post_init__(self) -> None:
        self._held, self._spared_before = self.store.seconds, self.store.spared_s

    @property
    def spared(self) -> float:
        """Seconds that were spared so far by steps taken over."""
        return self.store.spared_s - self._spared_before

    @property
    def to_spare(self) -> float:
        """Seconds that still may be."""
        return self._held - self.spared


class Pace:
    """Times the parts of a grid's cells and foretells those to come.

    Args:
        foretold: by cell and part, seconds by one probed block.
        methods: of the cells.
        there: what the parts of finished cells took.
        shared: of the cells that share steps, where these lie in this run; those that share have the same one.
        clock: seconds.
        show: is told of every move.
    """

    def __init__(
        self, foretold: Mapping[str, Took], methods: Mapping[str, str], there: Mapping[str, Took],
        shared: Mapping[str, Shared], *, clock: Callable[[], float], show: Callable[[Standing], None],
    ) -> None:  # fmt: skip
        self._foretold, self._methods, self._shared = foretold, methods, shared
        self._clock, self._show = clock, show
        self._alone = Shared("")  # of parts that share nothing
        self._todo = {cell: dict.fromkeys(parts) for cell, parts in foretold.items() if cell not in there}
        self._timed: dict[Kind, tuple[float, float]] = {}  # seconds taken, seconds foretold
        self._now: _Running | None = None
        self._took: dict[str, float] = {}  # by the parts of the cell that is made
        self._once: dict[Shared, float] = {}  # seconds that a shared step took in earlier runs
        for cell, took in there.items():
            if cell in shared:
                self._once[shared[cell]] = max(self._once.get(shared[cell], 0.0), took.get(SHARED, 0.0))
            for part, seconds in took.items():
                self._learn(cell, part, seconds)
        self._began = clock()

    @contextmanager
    def cell(self, name: str) -> Iterator[dict[str, float]]:
        """A cell is made, or found made; gives a dictionary that its parts' seconds are put into."""
        self._took = {}
        try:
            yield self._took
        finally:
            self._todo.pop(name, None)
            self._tell()

    @contextmanager
    def part(self, cell: str, name: str, *, bars: int = 1) -> Iterator[Pace]:
        """A part of a cell is run; gives an observer.

        Args:
            bars: how many the part shows one after the other; each counts the same.
        """
        store = self._store(cell, name)
        self._now = _Running(cell, name, self._clock(), bars, store)
        self._tell()
        try:
            yield self
            self._took[name] = self._alone_s(self._now)
            self._learn(cell, name, self._took[name])
            if store.seconds:
                self._took[SHARED] = store.seconds
        finally:
            self._now = None
            self._todo.get(cell, {}).pop(name, None)

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0.0) -> Iterator[Advance]:
        running = self._now

        def moved(amount: float) -> None:
            nonlocal done
            done += amount
            if running is not None and total > 0:
                reached = (running.closed + min(done / total, 1.0)) / running.bars
                running.done = max(running.done, min(reached, 1.0))
                self._tell()

        yield moved
        if running is not None:
            running.closed = min(running.closed + 1, running.bars - 1)

    def left(self) -> float:
        """Seconds until all is done."""
        left = 0.0
        held: dict[Shared, float] = {}  # seconds of the steps that will be there by then
        for cell, part in self._to_come():
            store, whole, now = self._store(cell, part), self._seconds(cell, part), self._running(cell, part)
            there = max(store.seconds, held.get(store, 0.0))
            done, spared = (now.done, now.to_spare) if now else (0.0, there)
            left += max((1 - done) * whole - spared, 0.0)
            held[store] = max(there, whole if store.is_series else self._once.get(store, 0.0))
        return left

    def _running(self, cell: str, part: str) -> _Running | None:
        return self._now if self._now and (self._now.cell, self._now.part) == (cell, part) else None

    def _store(self, cell: str, part: str) -> Shared:
        return self._shared.get(cell, self._alone) if part == PRUNE else self._alone

    def _to_come(self) -> Iterable[tuple[str, str]]:
        return ((cell, part) for cell, parts in self._todo.items() for part in parts)

    def _seconds(self, cell: str, part: str) -> float:
        """Of the whole part, if run alone."""
        return self._foretold[cell][part] * self._rate(self._kind(cell, part))

    def _rate(self, kind: Kind) -> float:
        """Seconds that a foretold one takes; a part that is run counts with what it took and what is expected of it."""
        timed, now = self._timed.get(kind), self._now
        taken, foretold = timed or self._timed.get((PERPLEXITY, ""), (1.0, 1.0))
        rate = taken / foretold
        if now is None or self._kind(now.cell, now.part) != kind or not (own := self._foretold_of(now.cell, now.part)):
            return rate
        taken, foretold = timed or (0.0, 0.0)
        return (taken + self._alone_s(now) + (1 - now.done) * own * rate) / (foretold + own)

    def _learn(self, cell: str, part: str, seconds: float) -> None:
        if (foretold := self._foretold_of(cell, part)) > 0:
            taken, expected = self._timed.get(self._kind(cell, part), (0.0, 0.0))
            self._timed[self._kind(cell, part)] = (taken + seconds, expected + foretold)

    def _alone_s(self, running: _Running) -> float:
        """Seconds that a part took so far, as if run alone."""
        return self._clock() - running.began + running.spared

    def _foretold_of(self, cell: str, part: str) -> float:
        return self._foretold.get(cell, {}).get(part, 0.0)

    def _kind(self, cell: str, part: str) -> Kind:
        return part, self._methods[cell] if part == PRUNE else ""

    def _tell(self) -> None:
        now = self._now
        kinds = dict.fromkeys(self._kind(cell, part) for cell, part in self._to_come())
        self._show(
            Standing(
                now.cell if now else "", now.part if now else "", now.done if now else 0.0,
                len(self._foretold) - len(self._todo), len(self._foretold), self._clock() - self._began, self.left(),
                tuple(kind for kind in kinds if kind not in self._timed),
            )
        )  # fmt: skip
