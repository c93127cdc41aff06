"""Progress bars with a time that is left, and how far a grid is; lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip

from secateur.cli.guard import err, note

if TYPE_CHECKING:
    from secateur.grid.pace import Kind, Standing
    from secateur.run import Advance


_LINE_EVERY_S = 15.0
_STANDING_EVERY_S = 60.0
# The parts of a grid's cell, where their names do not say what they are.
PARTS_IN_WORDS = {"prune": "pruning", "inference": "prefill and time per token", "generation": "generated text"}

Show = Callable[[float], None]  # work done so far


class Bars:
    """An observer that draws a bar per stage on a terminal, and elsewhere prints a line now and then."""

    def note(self, message: str) -> None:
        note(message)

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0.0) -> Iterator[Advance]:
        with _bar(label, total, done) if err.is_terminal else nullcontext(_lines(label, total, done)) as show:

            def advance(amount: float) -> None:
                nonlocal done
                done += amount
                show(min(done, total))

            yield advance


@contextmanager
def _bar(label: str, total: float, done: float) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(label, total=total, completed=done)  # type: ignore[arg-type]  # a float is fine
        yield lambda now: progress.update(task, completed=now)


def _lines(label: str, total: float, done: float) -> Show:
    start = last = time.monotonic()

    def show(now_done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now_done > done and now - last >= _LINE_EVERY_S:
            last = now
            left = (now - start) * (total - now_done) / (now_done - done)
            err.print(f"{label}: {now_done / total:.0%}, {left:.0f} s left", highlight=False)

    return show


@contextmanager
def standing_shown(clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[Standing], None]]:
    """Shows a grid's standing: a bar on a terminal, elsewhere a line a minute and one after each cell."""
    if not err.is_terminal:
        yield _standing_lines(clock)
        return
    columns = (BarColumn(20), TextColumn("{task.percentage:.0f}%, {task.description}"))
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(now: Standing) -> None:
            total = now.elapsed_s + now.left_s
            progress.update(task, description=standing_in_words(now), total=total or 1, completed=now.elapsed_s)

        yield show


def _standing_lines(clock: Callable[[], float]) -> Callable[[Standing], None]:
    last, finished = clock(), None

    def show(now: Standing) -> None:
        nonlocal last, finished
        if clock() - last >= _STANDING_EVERY_S or finished not in (None, now.finished):
            last = clock()
            err.print(standing_in_words(now), markup=False, highlight=False)
        finished = now.finished

    return show


def standing_in_words(now: Standing) -> str:
    """How far a grid is, what it is at, how long it will take, and how much of that is guessed."""
    line = f"{now.finished} of {now.cells} cells"
    if now.finished < now.cells:
        line += f", about {in_words(now.left_s)} left"
    for cell, part, done in ((now.cell, now.part, now.done), *now.beside):
        if part:
            line += f"; {cell}: {PARTS_IN_WORDS.get(part, part)} {done:.0%}"
    return f"{line}; not timed yet: {', '.join(map(_kind_in_words, now.guessed))}" if now.guessed else line


def _kind_in_words(kind: Kind) -> str:
    part, method = kind
    words = PARTS_IN_WORDS.get(part, part)
    return f"{words} by {method}" if method else words


def in_words(seconds: float) -> str:
    """A time as one says it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"
