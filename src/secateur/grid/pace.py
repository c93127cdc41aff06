"""How long a grid will take, part by part.

Before anything is run a part is foretold from the work that is in it and the speed of one probed block: a guess, since
methods that solve take longer, and so does text by beams. As parts are finished, those to come of their kind are
corrected by the ratio of what was taken to what was foretold. A pruning is foretold and timed as if it were run alone;
what it will take over from those before it is then subtracted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from secateur.errors import SecateurError
from secateur.forecast import Speed
from secateur.grid.cells import Cell
from secateur.grid.pruning import Shared, cost_of, identity, removed
from secateur.judge.generation import GREEDY
from secateur.judge.judging import Judging
from secateur.model.budget import shares
from secateur.model.handle import Model
from secateur.report.results import DENSE
from secateur.run import Advance, work_forwards

PRUNE, PERPLEXITY, TASKS, INFERENCE, GENERATION = "prune", "perplexity", "tasks", "inference", "generation"
PARTS = (PRUNE, PERPLEXITY, TASKS, INFERENCE, GENERATION)  # of a cell, in the order in which they are run
WINDOWS = 150  # of a text whose windows were not counted

Kind = tuple[str, str]  # a part's name; of prunings, the method too
Seconds = Mapping[str, float]  # by part


# --- before anything is run ---


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What is known of a cell before it is run.

    Attributes:
        parts: seconds by part, in the order in which they are run; none of a cell that will not be made.
        forwards: of the pruning, of one window of the perplexity's length.
        removed: the share that will be gone.
        refused: why it cannot be made.
        same_as: the cell that it will be a copy of.
    """

    parts: Seconds = field(default_factory=dict)
    forwards: float = 0.0
    removed: float | None = None
    refused: str | None = None
    same_as: str | None = None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What every cell's judging is.

    Attributes:
        text_tokens, task_tokens: of all windows of all texts, and of all documents.
    """

    judging: Judging
    text_tokens: float
    task_tokens: float

    @classmethod
    def of(cls, judging: Judging, windows: Iterable[int | None], task_tokens: float) -> Judged:
        """Args: windows: of each text; None where they were not counted."""
        counted = sum(WINDOWS if n is None else n for n in windows)
        return cls(judging=judging, text_tokens=counted * judging.length, task_tokens=task_tokens)

    @property
    def beams(self) -> Counter[int]:
        """Tokens generated, by the number of sequences at once."""
        tokens = Counter[int]()
        for decoding in (GREEDY, *self.judging.decodings) if self.judging.prompts else ():
            each = decoding.max_new_tokens or decoding.max_length or 0
            tokens[decoding.num_beams] += each * len(self.judging.prompts)
        return tokens

    @property
    def sequences(self) -> set[int]:
        """The numbers of sequences that are generated for at once: of what `Speed.steps` is needed."""
        return {*self.beams, *([self.judging.batch_size] if self.judging.inference else [])}

    def parts(self, blocks: int, kept: float, speed: Speed) -> dict[str, float]:
        """Seconds by part, of a model that has a share `kept` of its blocks' parameters: about what a token costs."""
        asked, here = self.judging, blocks * kept
        parts = {}
        for part, tokens in ((PERPLEXITY, self.text_tokens), (TASKS, self.task_tokens)):
            if tokens:
                parts[part] = speed.seconds(tokens * here, tokens)
        if asked.inference:
            rounds, both = asked.rounds + 1, blocks + here  # dense and pruned
            prompt, new = rounds * asked.batch_size * asked.prompt_length, rounds * asked.new_tokens
            single = speed.steps[asked.batch_size]
            parts[INFERENCE] = speed.seconds(prompt * both, 0) + single.seconds(new * both, 2 * new)
        if asked.prompts:
            parts[GENERATION] = sum(speed.steps[n].seconds(each * here, each) for n, each in self.beams.items())
        return parts


def foretell(cells: Sequence[Cell], model: Model, judged: Judged, speed: Speed) -> dict[str, Foretold]:
    """By cell, what it will take.

    Args:
        model: the dense one; it may be a hollow one.
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
            foretold = _foretell(cell, model, judged, speed)
        except SecateurError as error:
            foretold = Foretold(refused=str(error))
        same = first.setdefault(identity(cell, "", repr(cell.calibration)), cell.name)
        if same != cell.name and foretold.refused is None:
            foretold = Foretold(removed=foretold.removed, same_as=same)
        known[cell.name] = foretold
    return known


def _foretell(cell: Cell, model: Model, judged: Judged, speed: Speed) -> Foretold:
    blocks = len(model.numbers)
    if cell.method == DENSE:
        return Foretold(removed=0.0, parts=judged.parts(blocks, 1.0, speed))
    cost = cost_of(cell, model)
    kept = 1 - shares(model.layout(), cost.after)["blocks"]
    return Foretold(
        removed=removed(cell, model, cost),
        forwards=work_forwards(
            cost.block_tokens, cost.head_tokens, blocks, judged.judging.length, head=model.head_cost
        ),
        parts={PRUNE: speed.seconds(cost.block_tokens, cost.head_tokens), **judged.parts(blocks, kept, speed)},
    )


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
    """The part that is being run; `to_spare` are the seconds of shared steps that lay there when it began."""

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
        self._now = _Running(cell, name, self._time(store), store.seconds + store.spared_s, bars)
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

    def left(self) -> float:
        """Seconds until all is done."""
        left, now = 0.0, self._now
        held: dict[Shared, float] = {}  # seconds of the steps that will lie there by then
        for cell, part in self._to_come():
            store, whole = self._store(cell, part), self._foretold[cell][part] * self._rate(self._kind(cell, part))
            lies = max(store.seconds, held.get(store, 0.0))
            if now is not None and (now.cell, now.part) == (cell, part):
                left += max((1 - now.done) * whole - (now.to_spare - store.spared_s), 0.0)
            else:
                left += max(whole - lies, 0.0)
            held[store] = max(lies, whole if store.is_series else 0.0)
        return left

    def _store(self, cell: str, part: str) -> Shared:
        return self._shared.get(cell, self._alone) if part == PRUNE else self._alone

    def _time(self, store: Shared) -> float:
        """Seconds on a clock that runs as if all were computed that is taken over."""
        return self._clock() + store.spared_s

    def _to_come(self) -> Iterator[tuple[str, str]]:
        return ((cell, part) for cell, parts in self._todo.items() for part in parts)

    def _rate(self, kind: Kind) -> float:
        """Seconds that a foretold one takes. A part that is being run counts, with what it took and what is still
        expected of it; a kind that was never timed is as fast as perplexity."""
        taken, foretold = self._timed.get(kind) or self._timed.get((PERPLEXITY, ""), (1.0, 1.0))
        rate, now = taken / foretold, self._now
        if now is None or self._kind(now.cell, now.part) != kind or not (own := self._foretold[now.cell].get(now.part)):
            return rate
        so_far = self._time(self._store(now.cell, now.part)) - now.began
        taken, foretold = self._timed.get(kind, (0.0, 0.0))
        return (taken + so_far + (1 - now.done) * own * rate) / (foretold + own)

    def _learn(self, cell: str, part: str, seconds: float) -> None:
        if (foretold := self._foretold[cell].get(part, 0.0)) > 0:
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
