"""How long a grid will still take. A part is foretold from what parts of its kind have taken in the same folder.

Before any has been timed, it is foretold from one probed block, and told to be a guess. What was foretold of a part, in
probed seconds, is only used to compare parts of a kind: a cell that keeps half of the blocks takes about half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from secateur.run import Advance
from secateur.study.estimate import PERPLEXITY, PRUNE

Kind = tuple[str, str]  # a part's name; of prunings, the method too
Took = Mapping[str, float]  # seconds by part

_BY_ITSELF = 0.05  # of a part that must be done before its own progress counts


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
    closed: int = 0
    done: float = 0.0


class Pace:
    """Times the parts of a grid's cells and foretells those to come.

    Args:
        foretold: by cell and part, seconds by one probed block.
        methods: of the cells.
        there: what the parts of finished cells took.
        clock: seconds.
        show: is told of every move.
    """

    def __init__(
        self, foretold: Mapping[str, Took], methods: Mapping[str, str], there: Mapping[str, Took], *,
        clock: Callable[[], float], show: Callable[[Standing], None],
    ) -> None:  # fmt: skip
        self._foretold, self._methods, self._clock, self._show = foretold, methods, clock, show
        self._todo = {cell: dict.fromkeys(parts) for cell, parts in foretold.items() if cell not in there}
        self._timed: dict[Kind, tuple[float, float]] = {}  # seconds taken, seconds foretold
        self._now: _Running | None = None
        self._took: dict[str, float] = {}  # by the parts of the cell that is made
        for cell, took in there.items():
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
        self._now = _Running(cell, name, self._clock(), bars)
        self._tell()
        try:
            yield self
            self._took[name] = self._clock() - self._now.began
            self._learn(cell, name, self._took[name])
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
        return sum(self._left_of(cell, part) for cell, part in self._to_come())

    def _left_of(self, cell: str, part: str) -> float:
        expected, now = self._seconds(cell, part), self._now
        if now is None or (now.cell, now.part) != (cell, part):
            return expected
        if now.done >= _BY_ITSELF:  # the further it is, the more its own pace counts
            own = (self._clock() - now.began) / now.done
            expected = (1 - now.done) * expected + now.done * own
        return (1 - now.done) * expected

    def _to_come(self) -> Iterable[tuple[str, str]]:
        return ((cell, part) for cell, parts in self._todo.items() for part in parts)

    def _seconds(self, cell: str, part: str) -> float:
        timed = self._timed.get(self._kind(cell, part)) or self._timed.get((PERPLEXITY, ""), (1.0, 1.0))
        return self._foretold[cell][part] * timed[0] / timed[1]

    def _learn(self, cell: str, part: str, seconds: float) -> None:
        foretold = self._foretold.get(cell, {}).get(part, 0.0)
        if foretold > 0:
            taken, expected = self._timed.get(self._kind(cell, part), (0.0, 0.0))
            self._timed[self._kind(cell, part)] = (taken + seconds, expected + foretold)

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
