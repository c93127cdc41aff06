"""Progress bars with a time that is left; lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.cli.guard import err
from secateur.run import Advance

_LINE_EVERY_S = 15.0


class Bars:
    """Shows each stage's bar, or, inside `overall`, one bar for the whole job whose stages only change its label.

    The overall bar counts work as the engines meter it against what the method foretold, so its time left covers all
    stages, not only the current one.
    """

    def __init__(self) -> None:
        self._overall: _Shown | None = None
        self._work: Callable[[], float] = lambda: 0.0

    @contextmanager
    def overall(self, total: float, work: Callable[[], float]) -> Iterator[None]:
        """For the time of the context: `work()` of `total` is done."""
        with _shown("", total) as shown:
            self._overall, self._work = shown, work
            try:
                yield
            finally:
                self._overall = None

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Advance]:
        if self._overall is not None:
            shown = self._overall
            shown.label(label)
            yield lambda amount: shown.at(self._work())
            return
        with _shown(label, total) as own:
            done = 0.0

            def advance(amount: float) -> None:
                nonlocal done
                done += amount
                own.at(done)

            yield advance


class _Shown:
    """One bar, or lines now and then."""

    def __init__(self, label: str, total: float) -> None:
        self._label, self._total = label, total

    def label(self, label: str) -> None:
        self._label = label

    def at(self, done: float) -> None:
        raise TypeError("abstract")


class _Bar(_Shown):
    def __init__(self, label: str, total: float, progress: Progress) -> None:
        super().__init__(label, total)
        self._progress = progress
        self._task = progress.add_task(label, total=total)

    def label(self, label: str) -> None:
        self._progress.update(self._task, description=label)

    def at(self, done: float) -> None:
        self._progress.update(self._task, completed=min(done, self._total))


class _Lines(_Shown):
    def __init__(self, label: str, total: float) -> None:
        super().__init__(label, total)
        self._start = self._last = time.monotonic()

    def at(self, done: float) -> None:
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_S and done:
            self._last = now
            left = (now - self._start) * max(self._total / done - 1, 0)
            err.print(f"{self._label}: {min(done / self._total, 1):.0%}, {left:.0f} s left", highlight=False)


@contextmanager
def _shown(label: str, total: float) -> Iterator[_Shown]:
    if not err.is_terminal:
        yield _Lines(label, total)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as progress:
        yield _Bar(label, total, progress)
