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

from secateur.engine.tokens import Tokens
from secateur.errors import SecateurError
from secateur.forecast import Speed
from secateur.grid.cells import Cell
from secateur.grid.pruning import counted, plan_cell
from secateur.judge.generation import GREEDY
from secateur.judge.judging import GENERATION, INFERENCE, PERPLEXITY, TASKS, Judge, Judging
from secateur.model.budget import shares
from secateur.model.handle import Model
from secateur.planning import Plan
from secateur.report.results import DENSE
from secateur.run import Advance
from secateur.sharing import Shared

PRUNE = "prune"
_WINDOWS = 150  # of a text that is wanted whole and was not read
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
    plan: Plan | None = None
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
    cells: Sequence[Cell], model: Model, judge: Judge, texts: Mapping[str, Tokens] | None, speed: Speed
) -> dict[str, Foretold]:
    """By cell, what it will take.

    Args:
        model: the dense one; it may be a hollow one.
        texts: None where they were not read.
    """
    asked = judge.judging
    guessed = asked.length * (asked.samples or _WINDOWS) * len(asked.texts)
    read = guessed if texts is None else sum(tokens.ids.numel() for tokens in texts.values())
    tokens = {PERPLEXITY: read, TASKS: judge.task_tokens()}
    known: dict[str, Foretold] = {}
    first: dict[str, str] = {}  # the cell of an identity
    for cell in cells:
        if cell.matched_to is not None:
            if known[cell.matched_to].refused is not None:
                known[cell.name] = Foretold(refused=f"{cell.matched_to}, whose size it is to have, is refused")
                continue
            cell = replace(cell, sparsity=known[cell.matched_to].removed)
        same = first.setdefault(cell.identity("", repr(cell.calibration)), cell.name)
        if same != cell.name:
            twin = known[same]
            known[cell.name] = twin if twin.refused is not None else Foretold(removed=twin.removed, same_as=same)
            continue
        try:
            plan = plan_cell(cell, model) if cell.method != DENSE else None
        except SecateurError as error:
            known[cell.name] = Foretold(refused=str(error))
            continue
        layout = model.layout()
        gone = shares(layout, layout if plan is None else counted(cell, layout, plan.after))
        parts = _judging(model, asked, tokens, 1 - gone["blocks"], speed)
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
        beside: the same of what other workers do at the same time.
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
    beside: tuple[tuple[str, str, float], ...] = ()


@dataclass(eq=False, kw_only=True)
class TimedPart:
    """A part of a cell that is to be run, and how far it is.

    Attributes:
        kind: what it is timed with.
        foretold_s: by one probed block.
        shared: where the steps lie that it may take over.
        began: on a clock that runs as if all were computed that is taken over.
        to_spare: what `shared.spared_s` comes to if it takes over all that lay there when it began.
        bars, closed: how many it shows one after the other, each counting the same; how many of them are full.
        done: 0 to 1.
    """

    cell: str
    name: str
    kind: Kind
    foretold_s: float = 0.0
    shared: Shared = field(default_factory=Shared)
    began: float = 0.0
    to_spare: float = 0.0
    bars: int = 1
    closed: int = 0
    done: float = 0.0


def parts_of(cell: Cell, foretold: Foretold, shared: Shared) -> list[TimedPart]:
    """Args: shared: where the steps lie that the pruning may take over."""
    kinds = {name: ((PRUNE, cell.shown_method), shared) if name == PRUNE else ((name, ""), Shared()) for name in PARTS}
    return [
        TimedPart(cell=cell.name, name=name, kind=kinds[name][0], foretold_s=seconds, shared=kinds[name][1])
        for name, seconds in foretold.parts.items()
    ]


class Pace:
    """Times the parts of a grid's cells and foretells those to come.

    Args:
        parts: by cell.
        finished: what the parts of finished cells took.
        clock: seconds.
        show: is told of every move.
        hands: how many cells are made at once.
        chains: by cell, the name of those that are made one after the other, where there are others.
    """

    def __init__(
        self, parts: Mapping[str, Sequence[TimedPart]], finished: Mapping[str, Seconds], *,
        clock: Callable[[], float], show: Callable[[Standing], None], hands: int = 1,
        chains: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self._clock, self._show, self._cells = clock, show, len(parts)
        self._parts, self._hands, self._chains = parts, hands, chains or {}
        self._elsewhere: dict[str, TimedPart] = {}  # by cell, what other processes are at
        self._todo = {cell: {part.name: part for part in some} for cell, some in parts.items()}
        self._timed: dict[Kind, tuple[float, float]] = {}  # seconds taken, seconds foretold
        self._now: TimedPart | None = None
        self.took: dict[str, float] = {}  # by the parts of the cell that is made
        for cell, took in finished.items():
            for name, part in self._todo.pop(cell).items():
                if name in took:
                    self._learn(part, took[name])
        self._began = clock()

    @contextmanager
    def cell(self, name: str) -> Iterator[dict[str, float]]:
        """A cell is made, or found made; gives a dictionary that its parts' seconds are put into."""
        self.took = {}
        try:
            yield self.took
        finally:
            self._todo.pop(name, None)
            self._tell()

    @contextmanager
    def part(self, cell: str, name: str, *, bars: int = 1) -> Iterator[Pace]:
        """A part of a cell is run; gives an observer.

        Args:
            bars: how many the part shows one after the other; each counts the same.
        """
        part = self._todo.get(cell, {}).get(name) or TimedPart(cell=cell, name=name, kind=(name, ""))
        part.began, part.bars, part.to_spare = self._time(part), bars, part.shared.spared_s + part.shared.seconds
        self._now = part
        self._tell()
        try:
            yield self
            self.took[name] = self._time(part) - part.began
            self._learn(part, self.took[name])
        finally:
            self._now = None
            self._todo.get(cell, {}).pop(name, None)

    def note(self, message: str) -> None:
        """A cell that goes on is not worth a word."""

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0.0) -> Iterator[Advance]:
        part = self._now

        def moved(amount: float) -> None:
            nonlocal done
            done += amount
            if part is not None and total > 0:
                reached = (part.closed + min(done / total, 1.0)) / part.bars
                part.done = max(part.done, min(reached, 1.0))
                self._tell()

        yield moved
        if part is not None:
            part.closed = min(part.closed + 1, part.bars - 1)

    # --- cells that other processes make ---

    def heard(self, cell: str, name: str, done: float, took: Seconds) -> None:
        """How far a worker is with a part of a cell. One that was killed begins again.

        Args:
            took: what the parts of the cell took that are over.
        """
        if cell not in self._todo:
            return
        self._learn_all(cell, took)
        self._todo[cell] = {part.name: part for part in self._parts[cell] if part.name not in took}
        part = self._todo[cell].get(name)
        if part is not None and part is not self._elsewhere.get(cell):
            part.began, part.to_spare = self._time(part), part.shared.spared_s + part.shared.seconds
        if part is not None:
            part.done, self._elsewhere[cell] = done, part
        self._tell()

    def over(self, cell: str, took: Seconds) -> None:
        """A worker has made a cell, or left it."""
        self._elsewhere.pop(cell, None)
        self._learn_all(cell, took)
        self._todo.pop(cell, None)
        self._tell()

    def left_of(self, cell: str) -> float:
        """Seconds until a cell is there, once it is begun."""
        return sum(map(self._left, self._todo.get(cell, {}).values()))

    def _learn_all(self, cell: str, took: Seconds) -> None:
        for name in self._todo.get(cell, {}).keys() & took.keys():
            self._learn(self._todo[cell][name], took[name])

    def _time(self, part: TimedPart) -> float:
        return self._clock() + part.shared.spared_s

    def _learn(self, part: TimedPart, seconds: float) -> None:
        if part.foretold_s > 0:
            taken, foretold = self._timed.get(part.kind, (0.0, 0.0))
            self._timed[part.kind] = (taken + seconds, foretold + part.foretold_s)

    def _rate(self, kind: Kind) -> float:
        """Seconds that a foretold one takes. A part that is being run counts, with what it took and what is still
        expected of it; a kind that was never timed is as fast as perplexity."""
        taken, foretold = self._timed.get(kind) or self._timed.get((PERPLEXITY, ""), (1.0, 1.0))
        rate, running = taken / foretold, [part for part in self._running if part.kind == kind and part.foretold_s]
        if not running:
            return rate
        taken, foretold = self._timed.get(kind, (0.0, 0.0))
        for part in running:
            taken += self._time(part) - part.began + (1 - part.done) * part.foretold_s * rate
            foretold += part.foretold_s
        return taken / foretold

    @property
    def _running(self) -> list[TimedPart]:
        return [*([self._now] if self._now else []), *self._elsewhere.values()]

    def _left(self, part: TimedPart) -> float:
        """Seconds until a part is done."""
        # of a cell that goes on more may be spared than other cells' steps
        to_spare = max(part.to_spare - part.shared.spared_s, 0.0) if part in self._running else part.shared.seconds
        return max((1 - part.done) * part.foretold_s * self._rate(part.kind) - to_spare, 0.0)

    def _tell(self) -> None:
        now, *beside = [(part.cell, part.name, part.done) for part in self._running] or [("", "", 0.0)]
        to_come = [part for parts in self._todo.values() for part in parts.values()]
        guessed = dict.fromkeys(part.kind for part in to_come if part.kind not in self._timed)
        self._show(
            Standing(
                *now, self._cells - len(self._todo), self._cells, self._clock() - self._began, self._left_of_all(),
                tuple(guessed), tuple(beside),
            )
        )  # fmt: skip

    def _left_of_all(self) -> float:
        """Seconds until all cells are there: the hands share the work, but a chain is one hand's."""
        chains: dict[object, float] = {}
        for cell in self._todo:
            chain = self._chains.get(cell, cell)
            chains[chain] = chains.get(chain, 0.0) + self.left_of(cell)
        shared = sum(chains.values()) / self._hands
        return max([shared, *chains.values()]) if self._hands > 1 else shared
