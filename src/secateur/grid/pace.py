"""How long a grid will take, part by part.

Before anything is run a part is foretold from the work that is in it and the speed of one probed block: a guess, since
methods that solve take longer, and so does text by beams. As parts are finished, those to come of their kind are
corrected by the ratio of what was taken to what was foretold. A pruning is foretold and timed as if it were run alone;
what it will take over from those before it is then subtracted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from secateur.errors import SecateurError
from secateur.forecast import Speed
from secateur.grid.cells import Cell
from secateur.grid.pruning import CellPlan, Shared, identity, plan_cell
from secateur.judge.generation import GREEDY
from secateur.judge.judging import Judging
from secateur.model.handle import Model
from secateur.report.results import DENSE
from secateur.run import Advance

PRUNE, PERPLEXITY, TASKS, INFERENCE, GENERATION = "prune", "perplexity", "tasks", "inference", "generation"
PARTS = (PRUNE, PERPLEXITY, TASKS, INFERENCE, GENERATION)  # of a cell, in the order in which they are run

Kind = tuple[str, str]  # a part's name; of prunings, the method too
Seconds = Mapping[str, float]  # by part


# --- before anything is run ---


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What is known of a cell before it is run.

    Attributes:
        parts: seconds by part; none of a cell that will not be made.
        removed: the share that will be gone.
        plan: of its pruning.
        refused: why it cannot be made.
        same_as: the cell that it will be a copy of.
    """

    parts: Seconds = field(default_factory=dict)
    removed: float | None = None
    plan: CellPlan | None = None
    refused: str | None = None
    same_as: str | None = None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def generated(judging: Judging) -> Counter[int]:
    """Tokens that will be generated one by one, by the number of sequences at once."""
    tokens = Counter[int]()
    for decoding in (GREEDY, *judging.decodings) if judging.prompts else ():
        tokens[decoding.num_beams] += (decoding.max_new_tokens or decoding.max_length or 0) * len(judging.prompts)
    return tokens


def sequences(judging: Judging) -> set[int]:
    """The numbers of sequences at once, of which `Speed.steps` is needed."""
    return {*generated(judging), *([judging.batch_size] if judging.inference else [])}


def foretell(
    cells: Sequence[Cell], model: Model, judging: Judging, tokens: Mapping[str, float], speed: Speed
) -> dict[str, Foretold]:
    """By cell, what it will take.

    Args:
        model: the dense one; it may be a hollow one.
        tokens: of all texts (PERPLEXITY), and of all tasks (TASKS).
    """
    known: dict[str, Foretold] = {}
    first: dict[str, str] = {}  # the cell of an identity
    for cell in cells:
        if cell.matched_to is not None and cell.sparsity is None:
            other = known[cell.matched_to]
            if other.refused is not None:
                known[cell.name] = Foretold(refused=f"{cell.matched_to}, whose size it is to have, is refused")
                continue
            cell = replace(cell, sparsity=other.removed)
        try:
            plan = plan_cell(cell, model) if cell.method != DENSE else None
        except SecateurError as error:
            known[cell.name] = Foretold(refused=str(error))
            continue
        gone = plan.removed if plan is not None else {"blocks": 0.0, cell.of: 0.0}
        if (same := first.setdefault(identity(cell, "", repr(cell.calibration)), cell.name)) != cell.name:
            known[cell.name] = Foretold(removed=gone[cell.of], same_as=same)
            continue
        parts = _judging(model, judging, tokens, 1 - gone["blocks"], speed)
        if plan is not None:
            parts = {PRUNE: speed.seconds(plan.meter.block_tokens, plan.meter.head_tokens), **parts}
        known[cell.name] = Foretold(parts=parts, removed=gone[cell.of], plan=plan)
    return known


def _judging(
    model: Model, judging: Judging, tokens: Mapping[str, float], kept: float, speed: Speed
) -> dict[str, float]:
    """Args: kept: the share of its blocks' parameters that a model has: about what a token costs."""
    blocks = len(model.numbers)
    parts = {part: speed.seconds(blocks * kept * n, n) for part, n in tokens.items() if n}
    if judging.inference:
        rounds, both = judging.rounds + 1, blocks * (1 + kept)  # dense and pruned
        prompt, new = rounds * judging.batch_size * judging.prompt_length, rounds * judging.new_tokens
        step = speed.steps[judging.batch_size]
        parts[INFERENCE] = speed.seconds(prompt * both, 0) + step.seconds(new * both, 2 * new)
    if judging.prompts:
        steps = generated(judging).items()
        parts[GENERATION] = sum(speed.steps[beams].seconds(blocks * kept * n, n) for beams, n in steps)
    return parts


# --- while it runs ---


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
    """The part that is being run. `to_spare` is what its shared steps' `spared_s` comes to if it takes over all that
    lay there when it began; `closed` are the bars that are full."""

    cell: str
    part: str
    began: float
    to_spare: float
    bars: int
    closed: int = 0
    done: float = 0.0


class Pace:
    """Times the parts of a grid's cells and foretells those to come.

    Args:
        foretold: by cell and part, seconds by one probed block.
        methods: of the cells.
        finished: what the parts of finished cells took.
        shared: of prunings that share steps, where these lie in this run.
        clock: seconds.
        show: is told of every move.
    """

    def __init__(
        self, foretold: Mapping[str, Seconds], methods: Mapping[str, str], finished: Mapping[str, Seconds],
        shared: Mapping[str, Shared], *, clock: Callable[[], float], show: Callable[[Standing], None],
    ) -> None:  # fmt: skip
        self._foretold, self._methods, self._shared = foretold, methods, shared
        self._clock, self._show = clock, show
        self._alone = Shared("")  # of parts that share nothing
        self._todo = {cell: dict.fromkeys(parts) for cell, parts in foretold.items() if cell not in finished}
        self._timed: dict[Kind, tuple[float, float]] = {}  # seconds taken, seconds foretold
        self._now: _Running | None = None
        self._took: dict[str, float] = {}  # by the parts of the cell that is made
        for cell, took in finished.items():
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
        self._now = _Running(cell, name, self._time(store), store.spared_s + store.seconds, bars)
        self._tell()
        try:
            yield self
            self._took[name] = self._time(store) - self._now.began
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

    def _store(self, cell: str, part: str) -> Shared:
        return self._shared.get(cell, self._alone) if part == PRUNE else self._alone

    def _time(self, store: Shared) -> float:
        """Seconds on a clock that runs as if all were computed that is taken over."""
        return self._clock() + store.spared_s

    def _kind(self, cell: str, part: str) -> Kind:
        return part, self._methods[cell] if part == PRUNE else ""

    def _learn(self, cell: str, part: str, seconds: float) -> None:
        if (foretold := self._foretold[cell].get(part, 0.0)) > 0:
            taken, expected = self._timed.get(self._kind(cell, part), (0.0, 0.0))
            self._timed[self._kind(cell, part)] = (taken + seconds, expected + foretold)

    def _rate(self, kind: Kind) -> float:
        """Seconds that a foretold one takes. A part that is being run counts, with what it took and what is still
        expected of it; a kind that was never timed is as fast as perplexity."""
        taken, foretold = self._timed.get(kind) or self._timed.get((PERPLEXITY, ""), (1.0, 1.0))
        rate, now = taken / foretold, self._now
        if now is None or self._kind(now.cell, now.part) != kind or not self._foretold[now.cell].get(now.part):
            return rate
        so_far, own = self._time(self._store(now.cell, now.part)) - now.began, self._foretold[now.cell][now.part]
        taken, foretold = self._timed.get(kind, (0.0, 0.0))
        return (taken + so_far + (1 - now.done) * own * rate) / (foretold + own)

    def _left(self) -> float:
        """Seconds until all is done."""
        left, now = 0.0, self._now
        for cell, part in self._to_come():
            store, whole = self._store(cell, part), self._foretold[cell][part] * self._rate(self._kind(cell, part))
            if now is not None and (now.cell, now.part) == (cell, part):
                left += max((1 - now.done) * whole - (now.to_spare - store.spared_s), 0.0)
            else:
                left += max(whole - store.seconds, 0.0)
        return left

    def _to_come(self) -> Iterator[tuple[str, str]]:
        return ((cell, part) for cell, parts in self._todo.items() for part in parts)

    def _tell(self) -> None:
        now = self._now
        kinds = dict.fromkeys(self._kind(cell, part) for cell, part in self._to_come())
        self._show(
            Standing(
                now.cell if now else "", now.part if now else "", now.done if now else 0.0,
                len(self._foretold) - len(self._todo), len(self._foretold), self._clock() - self._began, self._left(),
                tuple(kind for kind in kinds if kind not in self._timed),
            )
        )  # fmt: skip
