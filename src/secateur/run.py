"""The bottom layer: a run's journal, its random numbers, its progress and its cost.

Every costly step of a method goes through `Run.step`, and randomness only comes from `Run.rng`. So a run is resumed
by iterating its method afresh: the steps are answered from the journal, and the edits are applied again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
Advance = Callable[[float], None]


class Store(Protocol):
    """Where a run's step results lie. Results are tensors, numbers, strings, and lists or dicts of these."""

    def get(self, key: str) -> Any:
        """Return the result of `key`; raise KeyError where there is none."""

    def put(self, key: str, value: Any) -> None: ...


class MemoryStore:
    """Results in memory; copied in and out, so that nobody can change what was recorded."""

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return copy.deepcopy(self._results[key])

    def put(self, key: str, value: Any) -> None:
        _check_storable(value, key)
        self._results[key] = copy.deepcopy(value)


def _check_storable(value: Any, key: str) -> None:
    """Hold every result to what a store on disk will be able to keep, so that no method relies on more."""
    match value:
        case None | bool() | int() | float() | str() | torch.Tensor():
            return
        case list():
            for each in value:
                _check_storable(each, key)
        case dict() if all(isinstance(name, str) for name in value):
            for each in value.values():
                _check_storable(each, key)
        case _:
            raise TypeError(
                f"step {key!r} gave a {type(value).__name__}; results are tensors, numbers, strings, and "
                "lists or dicts (by string) of these"
            )


class Observer(Protocol):
    """Shows progress; the CLI has one that draws bars."""

    def progress(self, label: str, total: float, done: float = 0.0) -> AbstractContextManager[Advance]: ...


class Silent:
    """An observer that shows nothing."""

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

    def forwards(self, blocks: int, length: int, *, head: float) -> float:
        """The work as forwards of one sequence of `length` tokens through a model of `blocks` blocks and a head.

        Args:
            head: what a token costs in the LM head, relative to one in a block.
        """
        return work_forwards(self.block_tokens, self.head_tokens, blocks, length, head=head)

    def forwards_asked(self, blocks: int, length: int) -> float:
        """The forwards of the whole model that were asked for, each counted by itself: what papers count."""
        return self.asked_tokens / (blocks * length)


def work_forwards(block_tokens: float, head_tokens: float, blocks: int, length: int, *, head: float) -> float:
    """Work in tokens as forwards of the whole model; see `Meter.forwards`."""
    return (block_tokens + head * head_tokens) / ((blocks + head) * length)


class Run:
    """One run of a method.

    Args:
        seed: the source of all randomness.
        store: answers the steps it knows and records the others; in memory by default.
        observer: shows progress.
    """

    def __init__(self, seed: int = 0, *, store: Store | None = None, observer: Observer | None = None) -> None:
        self.seed = seed
        self.store: Store = store if store is not None else MemoryStore()
        self.observer: Observer = observer if observer is not None else Silent()
        self.meter = Meter()
        self.notes: dict[str, Any] = {}
        self._asked: set[str] = set()
        self._expected: float | None = None
        self._head = 0.0

    def step(self, key: str, compute: Callable[[], T]) -> T:
        """Return the recorded result of `key`, or compute and record it. A key may be used once in a run."""
        if key in self._asked:
            raise ValueError(f"step {key!r} is asked twice in one run; its second result would be the first one's")
        self._asked.add(key)
        try:
            result: T = self.store.get(key)
        except KeyError:
            result = compute()
            self.store.put(key, result)
        return result

    def rng(self, *key: str | int) -> torch.Generator:
        """A generator that depends on the seed and the key only, never on what was drawn before."""
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
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

    def expect(self, block_tokens: float, head_tokens: float, *, head: float) -> None:
        """Foretell the whole run's work, so that progress counts all stages to come and not only the current one.

        Args:
            head: what a token costs in the LM head, relative to one in a block.
        """
        self._head = head
        self._expected = block_tokens + head * head_tokens

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Advance]:
        """Show a bar named `label`; the context gives a function that advances it by an amount of work.

        After `expect` the bar is the whole run's and moves by what the engines meter.
        """
        if self._expected is None:
            with self.observer.progress(label, total) as advance:
                yield advance
            return
        before = self._work()
        with self.observer.progress(label, self._expected, before) as advance:

            def catch_up(amount: float) -> None:
                nonlocal before
                now = self._work()
                advance(now - before)
                before = now

            yield catch_up

    def _work(self) -> float:
        return self.meter.block_tokens + self._head * self.meter.head_tokens
