"""Progress bars with a time that is left; lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.cli.guard import err
from secateur.run import Advance

_LINE_EVERY_S = 15.0


Show = Callable[[float], None]  # work done so far


class Bars:
    """An observer that draws a bar per stage on a terminal, and elsewhere prints a line now and then."""

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
