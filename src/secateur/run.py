"""The bottom layer: a run's journal, its random numbers, its progress and its cost.

Every costly step of a method goes through `Run.step`, and randomness only comes from `Run.rng`. So a run is resumed
by iterating its method afresh: the steps are answered from the journal, and the edits are applied again.

A `Rehearsal` is a run that computes nothing. Given one, the engines count what they would do and hold, and show made-up
states of the right shapes: so a method's cost and the layout that it leads to follow from the method itself.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from secateur.errors import JournalError

T = TypeVar("T")
Advance = Callable[[float], None]

_BESIDE = 128, 8192  # bytes on the disk beside tensors: of each value of a result, and of each result
NEEDED = "needed/"  # how the keys begin of states without which a run does not go on to the same bits

logger = logging.getLogger(__name__)


class Store(Protocol):
    """Where the results of one job's steps lie: tensors, numbers, strings, and lists or dicts (by string) of these."""

    def open(self, identity: str) -> None:
        """Take the store for the job of that identity; raise JournalError if it is another one's."""

    def get(self, key: str) -> Any:
        """Return the result of `key`; raise KeyError where there is none."""

    def put(self, key: str, value: Any) -> None: ...

    def put_states(self, key: str, value: Any) -> None:
        """Store the states of a walk or a training, which save a resumed run some work, in the place of those of this
        key; or do not."""

    def get_states(self, key: str) -> Any:
        """The states that were stored last; KeyError where none were."""


class MemoryStore:
    """Results in memory; copied in and out, so that nobody can change what was recorded."""

    def __init__(self) -> None:
        self.identity: str | None = None
        self._results: dict[str, Any] = {}

    def open(self, identity: str) -> None:
        if self.identity not in (None, identity):
            raise JournalError(
                "this journal is of another job: another model, calibration, method or options. Give each its own"
            )
        self.identity = identity

    def get(self, key: str) -> Any:
        return copy.deepcopy(self._results[key])

    def put(self, key: str, value: Any) -> None:
        self._results[key] = copy.deepcopy(value)

    def put_states(self, key: str, value: Any) -> None:
        """They would only lie there twice."""

    def get_states(self, key: str) -> Any:
        raise KeyError(key)


def _check_storable(value: Any, key: str) -> None:
    """Hold every result to what a store on disk will be able to keep, so that no method relies on more."""
    match value:
        case None | bool() | int() | float() | str() | torch.Tensor():
            return
        case list():
            for item in value:
                _check_storable(item, key)
        case dict() if all(isinstance(name, str) for name in value):
            for item in value.values():
                _check_storable(item, key)
        case _:
            raise TypeError(
                f"step {key!r} gave a {type(value).__name__}; results are tensors, numbers, strings, and "
                "lists or dicts (by string) of these"
            )


def _bytes_of(value: Any, beside: int = 0) -> int:
    """Of a result's tensors, and so many beside for each of its values."""
    match value:
        case torch.Tensor():
            return value.numel() * value.element_size() + beside
        case list():
            return sum(_bytes_of(item, beside) for item in value)
        case dict():
            return sum(_bytes_of(item, beside) for item in value.values())
    return beside


class Observer(Protocol):
    """Shows progress; the CLI has one that draws bars."""

    def progress(self, label: str, total: float, done: float = 0.0) -> AbstractContextManager[Advance]: ...

    def note(self, message: str) -> None:
        """Something that the user should know while it goes on."""


class Silent:
    """An observer that shows nothing."""

    def note(self, message: str) -> None:
        pass

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0.0) -> Iterator[Advance]:
        yield lambda amount: None


@dataclass
class Meter:
    """Work done, counted in tokens.

    Attributes:
        block_tokens, head_tokens: one token through one block, and through the LM head.
        asked_tokens: as `block_tokens`, had every variant been run by itself from the first block to the last.
    """

    block_tokens: int = 0
    head_tokens: int = 0
    asked_tokens: int = 0

    def work(self, head: float) -> float:
        """In tokens through one block; `head` is what a token costs in the LM head, relative to that."""
        return self.block_tokens + head * self.head_tokens

    def forwards(self, blocks: int, length: int, *, head: float) -> float:
        """The work as forwards of one sequence of `length` tokens through a model of `blocks` blocks and a head."""
        return self.work(head) / ((blocks + head) * length)

    def forwards_asked(self, blocks: int, length: int) -> float:
        """The forwards of the whole model that were asked for, each counted by itself: what papers count."""
        return self.asked_tokens / (blocks * length)


class Run:
    """One run of a method.

    Args:
        seed: the source of all randomness.
        store: answers the steps it knows and records the others; in memory by default.
        observer: shows progress.
        keep_states: keep a walk's hidden states after every so many blocks, where the store keeps anything: so much
            less is run again when an interrupted run goes on. Never if 0.
        sweeper: makes the engine of searches, where it is not the usual one: as `engine.sweep.Sweeper` is called, and
            with its `publish`.

    Attributes:
        meter: the work so far, of all scopes.
        notes: what the method said of its run; see `note`.
        visit: the open visit of the method's own walk, where it is walking (see `engine.walk`).
        edits: those that are real, as a sweeper of another kind keeps them; none where sweeps are made here.
        rebases: whether the residual stream may come into another basis, by which a walk's states are then mapped:
            computed anew they would be rounded otherwise.
    """

    rehearses = False

    def __init__(
        self,
        seed: int = 0,
        *,
        store: Store | None = None,
        observer: Observer | None = None,
        keep_states: int = 0,
        sweeper: Any = None,
    ) -> None:
        self.seed = seed
        self.keep_states = keep_states
        self.sweeper = sweeper
        self.store: Store = store if store is not None else MemoryStore()
        self.observer: Observer = observer if observer is not None else Silent()
        self.meter = Meter()
        self.notes: dict[str, Any] = {}
        self.visit: Any = None
        self.edits: list[Any] = []
        self.rebases = False
        self.root: Run = self
        self._scope = ""
        self._asked: set[str] = set()
        self._walks = Counter[str]()
        self._expected: float | None = None
        self._head = 0.0

    def scoped(self, name: str) -> Run:
        """The same run for a part of it, whose keys are its own: two parts may both ask for "scores"."""
        part = copy.copy(self)
        part._scope = f"{self._scope}{name}/"
        return part

    def step(self, key: str, compute: Callable[[], T], *, scratch_bytes: float = 0) -> T:
        """Return the recorded result of `key`, or compute and record it. A key may be used once in a run.

        Args:
            scratch_bytes: what computing it holds for a while, beside hidden states; for the forecast.

        Raises:
            TypeError: the result cannot be stored.
            ValueError: the key was asked before.
        """
        key = self._claimed(key)
        try:
            result: T = self.store.get(key)
        except KeyError:
            computed = compute()
            _check_storable(computed, key)
            self.store.put(key, computed)
            result = self.store.get(key)  # what a resumed run would get, to the last bit
        return result

    def _claimed(self, key: str) -> str:
        key = self._scope + key
        if key in self._asked:
            raise ValueError(f"step {key!r} is asked twice in one run; its second result would be the first one's")
        self._asked.add(key)
        return key

    def name_walk(self, label: str) -> str:
        """A name for a walk or a training that is about to begin, the same when the run is repeated."""
        label = self._scope + label
        self._walks[label] += 1
        return f"{label}, walk {self._walks[label]}"

    def rng(self, *key: str | int) -> torch.Generator:
        """A generator that depends on the seed and the key only, never on what was drawn before."""
        parts = (self.seed, self._scope, *key) if self._scope else (self.seed, *key)
        digest = hashlib.sha256(repr(parts).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def note(self, key: str, value: Any) -> None:
        """Say something about this run that its result does not show; it goes into the record under `notes`.

        A text is also shown to whoever reads the card or the command's output (say what was left out, in a sentence);
        a list of numbers is a curve. A key noted again is replaced.

        Raises:
            TypeError, ValueError: JSON cannot hold it; NaN and Inf are no JSON.
        """
        json.dumps(value, allow_nan=False)
        self.notes[key] = copy.deepcopy(value)

    def log(self, message: str, *args: object) -> None:
        """Tell what was chosen, for `--log-level info`."""
        logger.info(message, *args)

    def applied(self, edit: Any) -> None:
        """An edit is real now. Whoever sweeps the model elsewhere has to follow it."""
        if self.sweeper is not None:
            self.root.edits.append(self.sweeper.publish(edit))

    def hold(self, size_bytes: float) -> None:
        """So much more is held from now on, beside what the engines hold; for the forecast."""

    def hold_on_disk(self, size_bytes: float) -> None:
        """So much more than results of steps lies in the store at the most; for the forecast."""

    @contextmanager
    def holding(self, size_bytes: float) -> Iterator[None]:
        """So much more is held for the time of the context."""
        self.hold(size_bytes)
        try:
            yield
        finally:
            self.hold(-size_bytes)

    @contextmanager
    def again(self) -> Iterator[None]:
        """For what is done again, on the way to where an interrupted run stood."""
        yield

    def expect(self, meter: Meter, *, head: float) -> None:
        """Foretell the whole run's work, so that progress counts all stages to come and not only the current one.

        Args:
            head: what a token costs in the LM head, relative to one in a block.
        """
        self._head = head
        self._expected = meter.work(head)

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Advance]:
        """Show a bar named `label`; the context gives a function that advances it by an amount of work.

        After `expect` the bar is the whole run's, says so, and moves by what the engines meter.
        """
        if self.root._expected is None:
            with self.observer.progress(label, total) as advance:
                yield advance
            return
        before = self.root.work_done()
        with self.observer.progress(f"{label} (whole run)", self.root._expected, before) as advance:

            def catch_up(amount: float) -> None:
                nonlocal before
                now = self.root.work_done()
                advance(now - before)
                before = now

            yield catch_up

    @property
    def spared_s(self) -> float:
        """Seconds that were spared by taking steps over."""
        return 0.0

    def work_done(self) -> float:
        """The work so far, in the unit of `expect`."""
        return self.meter.work(self._head)


class Rehearsal(Run):
    """A run whose engines count instead of computing: for the forecast. It needs a hollow model.

    Args:
        device: the kind of device that the run will be on, as "cpu".

    Attributes:
        held_bytes, peak_bytes: hidden states, statistics and results held now, and the most at once.
        stored_bytes, states_bytes: on the disk, if all results of steps are stored and what a training keeps, and the
            states of all walks.
        spilled_bytes: hidden states of the largest walk or sweep, if none are run in groups.
    """

    rehearses = True
    root: Rehearsal

    def __init__(self, seed: int = 0, *, device: str = "cpu") -> None:
        super().__init__(seed)
        self.device = device
        self.held_bytes = self.peak_bytes = self.stored_bytes = self.states_bytes = self.spilled_bytes = 0.0
        self._qualities: dict[Hashable, float] = {}
        self._made_up = self.rng("made-up losses")

    def step(self, key: str, compute: Callable[[], T], *, scratch_bytes: float = 0) -> T:
        key = self._claimed(key)
        with self.holding(scratch_bytes):
            result = compute()
        _check_storable(result, key)
        each, whole = _BESIDE
        self.root.stored_bytes += _bytes_of(result, each) + whole
        with self.holding(_bytes_of(result)):  # for a while at least; the journal keeps it on the disk
            return result

    def log(self, message: str, *args: object) -> None:
        pass

    def hold(self, size_bytes: float) -> None:
        """So much more is held from now on, or less where it is negative."""
        self.root.held_bytes += size_bytes
        self.root.peak_bytes = max(self.root.peak_bytes, self.root.held_bytes)

    def hold_on_disk(self, size_bytes: float) -> None:
        self.root.stored_bytes += size_bytes

    @property
    def made_up(self) -> bool:
        """Whether losses were made up, which decide what goes."""
        return bool(self._qualities)

    def loss_of(self, variant: Hashable) -> float:
        """A loss at random, always the same for the same variant: so a search finds a good one that stays for long."""
        if variant not in self._qualities:
            self._qualities[variant] = float(torch.rand((), generator=self._made_up))
        return self._qualities[variant]
