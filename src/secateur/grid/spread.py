"""A grid's cells as Ray's tasks: each worker makes single cells, in the folder that all see.

A worker has a runner of its own, so a cell is made as in one process: its claim, its figures, its failure. Cells that
share steps are made one after the other, from one journal in the folder. One that is matched to another waits for it. A
worker that is killed is replaced, and its cell goes on from the journal.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import structs

from secateur.errors import Interrupted, WorkersError
from secateur.grid.asked import Asked
from secateur.grid.cells import Cell
from secateur.grid.pace import Foretold, Pace, Seconds, Standing, parts_of
from secateur.grid.run import Grid, Load, Runner
from secateur.judge.judging import Judging
from secateur.report.results import DENSE
from secateur.workers.session import Workers, begin_work, caused, first_line, ray_module, require_workers

_TOLD_EVERY_S = 0.5  # by a worker, how far it is; and as often it is shown


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker makes the cells of a grid from.

    Attributes:
        key: of the grid's run: a worker process keeps what it has read for its next cell.
        judged_by: of the command's index; a worker must come to the same.
        threads, cwd: as `begin_work` takes them.
    """

    key: str
    load: Load
    folder: Path
    judging: Judging
    data: Path | None
    cache: Path | None
    asked: Asked
    judged_by: str
    threads: int
    cwd: Path


@dataclass(frozen=True)
class Heard:
    """What a worker says of its cell; see `Pace.heard`."""

    cell: str
    part: str
    done: float
    took: Seconds


def spread(runner: Runner, workers: Workers, left: list[Cell]) -> None:
    """Have cells made by workers. Ends when all are there, failed, or are another process's."""
    chains: dict[str, int] = {name: id(store) for name, store in runner.shared.items()}
    pace = runner.pace(hands=workers.count, chains=chains)
    device = runner.let_go()
    require_workers(workers, device, runner.folder.path)
    _Spreading(runner, workers, device, pace, chains).run(left)


class _Spreading:
    def __init__(
        self, runner: Runner, workers: Workers, device: str, pace: Pace, chains: dict[str, int]
    ) -> None:  # fmt: skip
        self.ray, self.runner, self.workers, self.pace, self.chains = ray_module(), runner, workers, pace, chains
        grid = runner.grid
        self.work = self.ray.put(
            Work(
                key=uuid.uuid4().hex, load=grid.load, folder=runner.folder.path, judging=grid.judging, data=grid.data,
                cache=grid.cache, asked=runner.asked, judged_by=runner.index.judged_by, threads=workers.threads,
                cwd=Path.cwd(),
            )
        )  # fmt: skip
        self.task = self.ray.remote(make).options(max_retries=workers.retries, **workers.options(device))
        self.running: dict[Any, Cell] = {}

    def run(self, left: list[Cell]) -> None:
        waiting: set[str] = set()  # for another process
        with self._ending(), self._mail() as mail:
            while True:
                while len(self.running) < self.workers.count and (cell := self._next(left, waiting)) is not None:
                    self._begin(cell, mail)
                if not self.running:
                    return
                ready, _ = self.ray.wait(list(self.running), timeout=_TOLD_EVERY_S)
                with suppress(self.ray.exceptions.RayError):  # the figures do not hang on it
                    for heard in mail.get_nowait_batch(mail.size()):
                        self.pace.heard(heard.cell, heard.part, heard.done, heard.took)
                for reference in ready:
                    cell = self.running.pop(reference)
                    if self._end(cell, reference):
                        left, waiting = [each for each in left if each.name != cell.name], set()
                    else:
                        waiting.add(cell.name)

    def _next(self, left: list[Cell], waiting: set[str]) -> Cell | None:
        """Of the cells that can be begun, the one of the longest chain; the dense one where others read its text."""
        busy = {self.chains[cell.name] for cell in self.running.values()}
        can = [
            cell
            for cell in left
            if self.chains[cell.name] not in busy
            and cell.name not in waiting
            and cell.matched_to not in {each.name for each in left}  # it may have failed before, and is tried again
        ]
        if self.runner.grid.judging.prompts and DENSE in {cell.name for cell in left} - waiting:
            can = [cell for cell in can if cell.name == DENSE]
        first: dict[int, Cell] = {}
        for cell in can:
            first.setdefault(self.chains[cell.name], cell)
        seconds = {
            chain: sum(self.pace.left_of(c.name) for c in left if self.chains[c.name] == chain) for chain in first
        }
        return first[max(first, key=lambda chain: seconds[chain])] if first else None

    def _begin(self, cell: Cell, mail: Any) -> None:
        foretold = replace(self.runner.foretold[cell.name], plan=None)  # a worker makes its own
        reference = self.task.remote(self.work, cell.name, foretold, mail)
        self.running[reference] = cell

    def _end(self, cell: Cell, reference: Any) -> bool:
        """False if another process is making the cell."""
        exceptions = self.ray.exceptions
        try:
            made = self.ray.get(reference)
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError) as error:
            died = f"its worker died {self.workers.retries + 1} times: {first_line(error)}"
            made = True
            if not self.runner.is_done(cell.name):  # it may have died when that was written
                self.runner.folder.write_cell(structs.replace(self.runner.blank(cell), error=died))
        except exceptions.RayError as error:
            raise caused(error) from error
        self.runner.shared[cell.name].look()  # what the cells to come may take over
        written = self.runner.folder.cell(cell.name)
        if made and written is not None:
            self.pace.over(cell.name, written.seconds)
            self.runner.tell(written)
        return made

    @contextmanager
    def _mail(self) -> Iterator[Any]:
        from ray.util.queue import Queue

        mail = Queue(actor_options={"num_cpus": 0})
        try:
            yield mail
        finally:
            mail.shutdown(force=True)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends the grid ends its workers."""
        try:
            yield
        except KeyboardInterrupt:
            names = ", ".join(cell.name for cell in self.running.values())
            raise Interrupted(
                f"interrupted in {names}; finished cells are whole, the steps of others are kept, and the same command "
                "goes on from there"
            ) from None
        finally:
            for reference in self.running:
                self.ray.cancel(reference, force=True)


# --- in a worker ---

_RUNNERS: dict[str, Runner] = {}  # of this process, the last grid's


def make(work: Work, name: str, foretold: Foretold, mail: Any) -> bool:
    """Make a cell; False if another process is making it."""
    begin_work(work.threads, work.cwd)
    runner = _runner(work)
    cell = next(cell for cell in runner.cells if cell.name == name)
    runner.foretold[name] = foretold
    parts = {name: parts_of(cell, foretold, runner.shared[name])}
    pace = Pace(parts, {}, clock=time.monotonic, show=lambda standing: say(standing))
    say = _saying(mail, pace)
    return runner.make(cell, pace, lambda written: None)


def _runner(work: Work) -> Runner:
    if work.key not in _RUNNERS:
        _RUNNERS.clear()
        grid = Grid(load=work.load, folder=work.folder, judging=work.judging, data=work.data, cache=work.cache)
        runner = Runner(grid, work.asked)
        if runner.index.judged_by != work.judged_by:
            raise WorkersError(
                "a worker reads another model or other texts by this command's names; all machines must see the same"
            )
        _RUNNERS[work.key] = runner
    return _RUNNERS[work.key]


def _saying(mail: Any, pace: Pace) -> Callable[[Standing], None]:
    """Tells the command how far a cell is, now and then."""
    last, told = float("-inf"), ""

    def say(standing: Standing) -> None:
        nonlocal last, told
        now = time.monotonic()
        if standing.part and (standing.part != told or now - last >= _TOLD_EVERY_S):
            last, told = now, standing.part
            with suppress(ray_module().exceptions.RayError):  # the figures do not hang on it
                mail.put_nowait(Heard(standing.cell, standing.part, standing.done, dict(pace.took)))

    return say
