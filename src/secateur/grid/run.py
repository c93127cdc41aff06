"""The engine of `compare` and `ablate`: run a grid's cells, each in its own folder, so that a killed run goes on."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msgspec import UNSET, structs

from secateur.compensation import narrows
from secateur.engine.tokens import Tokens, wants_bos
from secateur.errors import (
    Interrupted,
    InvalidOptionError,
    OutputBusyError,
    OutputError,
    OutputExistsError,
    SecateurError,
)
from secateur.folders import claimed, unclaim
from secateur.forecast import timed
from secateur.grid.asked import Asked
from secateur.grid.cells import Cell, Matrices, digest
from secateur.grid.folder import GridFolder, make_index, now
from secateur.grid.pace import PRUNE, Foretold, Pace, Standing, foretell, parts_of, sequences
from secateur.grid.pruning import Fields, dense_fields, plan_cell, prune_cell
from secateur.journal import Journal, Journaled, forget
from secateur.judge.judging import Judge, JudgedPart, Judging
from secateur.model.handle import Model
from secateur.record import public_name
from secateur.report.results import DENSE, CellResult, InferencePair
from secateur.sharing import Clock, SharingRun
from secateur.version import __version__
from secateur.workers.session import Workers, session

logger = logging.getLogger(__name__)

Load = Callable[[], Model]  # the dense model, afresh at each call


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that a run of cells needs beside the cells.

    Attributes:
        load: gives the dense model afresh; a pruned one is never made whole again.
        folder: of the grid; made if need be, continued if it is there.
        judging: what each cell is judged by.
        arguments: as given, for the record.
        data, cache: where texts and tasks are read from and kept.
        on_cell: hears of each cell as it is finished.
        on_standing: hears how far the whole grid is, often.
        clock: seconds; parts are timed by it.
        workers: that make the cells; in this process if None. All must see `folder`, and what `load` loads.

    Raises:
        InvalidOptionError: there is neither a text nor a task to judge by, or two texts have one name in tables.
    """

    load: Load
    folder: Path
    judging: Judging
    arguments: Mapping[str, object] = field(default_factory=dict)
    data: Path | None = None
    cache: Path | None = None
    on_cell: Callable[[CellResult], None] = lambda cell: None
    on_standing: Callable[[Standing], None] = lambda standing: None
    clock: Clock = time.monotonic
    workers: Workers | None = None

    def __post_init__(self) -> None:
        if not (self.judging.texts or self.judging.tasks):
            raise InvalidOptionError("nothing to judge by: give at least one text or task")
        names = [public_name(name) for name in self.judging.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidOptionError(f"tables name a text by its file, and several are {', '.join(twice)}")


def run_grid(grid: Grid, asked: Asked) -> dict[str, CellResult]:
    """Run the cells that are not there yet; a cell that failed is tried again.

    One cell's failure is written into its file and does not end the run. What is wrong with the grid itself (an unknown
    method or text, a folder made with other settings) is refused before anything is run. A second process may work on
    the same folder: a cell that another one is making, one like it, and one that is matched to it, are left for later,
    and what is not there by the end to the other process.

    Returns:
        By name, what is in the folder of this grid's cells, in their order.

    Raises:
        OutputExistsError: the folder, or one of its cells, was made with other arguments.
        WorkersError: there are no such workers, or they do not see what this process sees.
        Whatever is wrong with the arguments.
    """
    with session(grid.workers):
        return Runner(grid, asked).run()


class Runner:
    """Runs a grid's cells in this process, or has workers run them, of which each has a runner to make single ones."""

    def __init__(self, grid: Grid, asked: Asked) -> None:
        self.grid, self.asked, self.folder = grid, asked, GridFolder(grid.folder)
        self.folder.index()  # refuses what is no grid's folder, and the settings what cannot be, before any reading
        settings = asked.settings
        places: dict[str, Any] = {"data": grid.data, "cache": grid.cache, "text_field": asked.text_field}
        self.judge = Judge.of(grid.judging, **places)
        dense = grid.load()
        self.cells = list(asked.cells(dense))
        names = [cell.name for cell in self.cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidOptionError(f"asked for twice: {', '.join(twice)}")
        self.texts = self.judge.windows(dense)
        self.matrices = Matrices(dense, self.cells, **places)
        self.index = make_index(
            asked.kind, dense, grid.judging, self.texts, self.cells, arguments=grid.arguments,
            settings={**settings, "bos": wants_bos(dense.family, asked.bos)},
        )  # fmt: skip
        self.shared = self._shared()
        self.foretold: dict[str, Foretold] = {}
        # It was read to know the cells and only looked at, so it is still whole: the first cell takes it instead of
        # reading gigabytes again.
        self._spare: Model | None = dense

    def run(self) -> dict[str, CellResult]:
        self._check()
        self.folder.write_index(self.index)
        left = [cell for cell in self.cells if not self.is_done(cell.name)]
        if left and self.grid.workers is not None:
            from secateur.grid.spread import spread  # whose workers have runners

            spread(self, self.grid.workers, left)
        elif left:
            self._in_turn(left, self.pace())
        self.folder.write_index(self.index)
        self.asked.write_tables(self.folder.path)
        for claim in (claim for cell in self.cells for claim in self._claims(cell)):
            unclaim(claim)
        unfinished = {id(self.shared[cell.name]) for cell in self.cells if not self.is_done(cell.name)}
        for store in self.shared.values():
            if id(store) not in unfinished:
                forget(store.journal.folder)
        with suppress(OSError):  # another process is at work in one
            self.folder.runs.rmdir()
        return self._results()

    def _in_turn(self, left: list[Cell], pace: Pace) -> None:
        while left:  # what another process made impossible for now may be possible after others
            busy: list[Cell] = []
            for cell in left:  # one of the size of a cell that failed before waits until that is tried again
                if cell.matched_to in {each.name for each in busy} or not self.make(cell, pace, self.tell):
                    busy.append(cell)
            if len(busy) == len(left):
                break
            left = busy

    def tell(self, written: CellResult) -> None:
        """A cell is there."""
        self.asked.write_tables(self.folder.path)
        self.grid.on_cell(written)

    def _results(self) -> dict[str, CellResult]:
        """This grid's cells that are in the folder."""
        return self.folder.cells(cell.name for cell in self.cells)

    def _load(self) -> Model:
        """The dense model; the one that was looked at first is used up first."""
        model, self._spare = self._spare, None
        return model if model is not None else self.grid.load()

    def pace(self, **how: Any) -> Pace:
        """What the cells will take. Args: how: of `Pace`."""
        judging, self._spare = self.grid.judging, self._load()
        length = min(judging.length, self._spare.max_length or judging.length)
        speed = timed(self._spare, length, steps=sequences(judging))
        self.foretold = foretell(self.cells, self._spare, self.judge, self.texts, speed)
        cells = [(cell, self.foretold[cell.name], self.shared[cell.name]) for cell in self.cells]
        return Pace(
            {cell.name: parts_of(cell, foretold, shared) for cell, foretold, shared in cells},
            {name: cell.seconds for name, cell in self._results().items() if cell.done},
            clock=self.grid.clock, show=self.grid.on_standing, **how,
        )  # fmt: skip

    def let_go(self) -> str:
        """Free the dense model, where others make the cells; gives the kind of device that it was on."""
        return self._load().device.type

    # --- one cell ---

    def make(self, cell: Cell, pace: Pace, tell: Callable[[CellResult], None]) -> bool:
        """Make a cell, unless it is there. False if it has to wait: another process is making it, or one of the same
        identity, which can be copied then, or the one that it is matched to.

        Args:
            tell: hears of it when it is there.
        """
        if cell.matched_to is not None and self.folder.cell(cell.matched_to) is None:
            return False
        claims = self._claims(cell)
        try:
            journal = self._journal(cell)
            with claimed(claims[0]), claimed(claims[1]), journal, pace.cell(cell.name) as seconds:
                if self.is_done(cell.name):  # by another process, meanwhile
                    return True
                written = self.folder.write_cell(structs.replace(self._result(cell, pace), seconds=seconds))
                if written.done:
                    self.shared[cell.name].drop()
            tell(written)
        except OutputBusyError:
            logger.info("%s is being made by another process", cell.name)
            return False
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted in {cell.name}; its steps so far are kept, and the same command goes on from there"
            ) from None
        return True

    def is_done(self, name: str) -> bool:
        cell = self.folder.cell(name)
        return cell is not None and cell.done

    def _result(self, cell: Cell, pace: Pace) -> CellResult:
        """The cell's file; of one that fails, what was known by then."""
        result = self.blank(cell)
        try:
            cell = self._matched(cell)
            result = structs.replace(result, sparsity=cell.sparsity, fingerprint=self._fingerprint(cell))
            if (same := self._same(result.fingerprint)) is not None:
                return structs.replace(
                    same, name=result.name, label=_labelled(result.label, same.notes), same_as=same.name,
                    matched_to=result.matched_to, ablation=result.ablation, created=result.created,
                )  # fmt: skip
            for fields in self._fields(cell, pace):
                result = structs.replace(result, **fields)
            return structs.replace(result, status="done", label=_labelled(cell.label, result.notes))
        except OutputError:  # a full disk is no cell's failure
            raise
        except Exception as error:  # one cell's failure is reported in the cell
            logger.info("%s failed", cell.name, exc_info=True)
            foreseen = isinstance(error, SecateurError)
            return structs.replace(result, error=str(error) if foreseen else f"{type(error).__name__}: {error}")

    def blank(self, cell: Cell) -> CellResult:
        """A cell's file as it is before anything was made of it."""
        return CellResult(
            name=cell.name, method=cell.shown_method, label=cell.label, sparsity=cell.sparsity, of=cell.of,
            status="failed", options=dict(cell.options), matched_to=cell.matched_to, ablation=cell.ablation,
            created=now(), machine=self.index.machine, versions=self.index.versions,
        )  # fmt: skip

    def _fields(self, cell: Cell, pace: Pace) -> Iterator[Fields]:
        """What the cell's file says, part by part as they are run."""
        part = functools.partial(pace.part, cell.name)
        if cell.method == DENSE:
            model = self._load()
            yield dense_fields(model)
            yield from judged(self.folder, self.judge, model, self.texts, part, lambda: model)
            return
        assert cell.calibration is not None  # narrows the type
        foretold = self.foretold[cell.name]
        if foretold.refused is not None and cell.matched_to is None:
            raise SecateurError(foretold.refused)
        tokens, shared = self.matrices.rows(cell.calibration), self.shared[cell.name]
        with part(PRUNE) as observer:
            model, plan = self._load(), foretold.plan
            if plan is None or plan.request.sparsity != cell.sparsity:  # a match, whose size was foretold otherwise
                plan = plan_cell(cell, model)
            run = SharingRun(cell.calibration.seed, shared, observer=observer, clock=self.grid.clock)
            fields = prune_cell(cell, plan, model, tokens, run)
        yield fields
        yield from judged(self.folder, self.judge, model, self.texts, part, functools.cache(self.grid.load))

    # --- what cells share ---

    def _shared(self) -> dict[str, Journaled]:
        """By cell, the store of the steps that it shares with all of the same method, options and calibration."""
        stores, by_cell = dict[str, Journaled](), dict[str, Journaled]()
        for cell in self.cells:
            beginning = None if cell.method == DENSE else cell.made_by.shared
            refitted = cell.refit and narrows(cell.made_by)
            key = digest(cell.method, cell.complete_options, refitted, self.matrices.fingerprint(cell.calibration))
            if key not in stores:
                stores[key] = Journaled(Journal(self.folder.run_path(key), repair=False), beginning)
            by_cell[cell.name] = stores[key]
        return by_cell

    def _journal(self, cell: Cell) -> AbstractContextManager[None]:
        """Holds the journal of a cell that is pruned: what a killed process had of it by then is not done again."""
        store = self.shared[cell.name]
        steps = store.journal.folder.name
        dense = self.index.model
        identity = {
            "model": dense.fingerprint, "configuration": dense.configuration, "secateur": __version__, "steps": steps,
        }  # fmt: skip
        return nullcontext() if cell.method == DENSE else store.held(identity)

    def _same(self, fingerprint: str | None) -> CellResult | None:
        """A finished cell of the same identity, which need not be made twice; of an earlier run in the folder, too."""
        cells = self.folder.cells((self.folder.index() or self.index).cells)
        return next((cell for cell in cells.values() if cell.done and cell.fingerprint == fingerprint), None)

    def _matched(self, cell: Cell) -> Cell:
        """With the size that the cell which it is matched to achieved."""
        if cell.matched_to is None:
            return cell
        other = self.folder.cell(cell.matched_to)
        if other is None or other.achieved is None:
            raise SecateurError(f"{cell.matched_to}, whose size it is to have, is not there")
        return replace(cell, sparsity=getattr(other.achieved, cell.of))

    def _fingerprint(self, cell: Cell) -> str:
        return cell.identity(self.index.judged_by, self.matrices.fingerprint(cell.calibration))

    def _claims(self, cell: Cell) -> list[Path]:
        """What is claimed while the cell is made: its folder, and what it is, by its identity."""
        try:
            identity = self._fingerprint(self._matched(cell))
        except SecateurError:  # of a match whose partner failed; the cell will say so
            identity = f"{cell.name}-alone"
        return [self.folder.cell_path(name) for name in (cell.name, identity)]

    def _check(self) -> None:
        """Refuse a folder, or a cell, that was made with other arguments."""
        earlier = self.folder.cells(self.folder.check(self.index, self.cells))
        for cell in self.cells:
            if (result := earlier.get(cell.name)) is None or not result.done:
                continue
            partner = earlier.get(cell.matched_to) if cell.matched_to is not None else result
            if partner is None or partner.achieved is None:
                continue  # its size is not known before that one is made
            if result.fingerprint != self._fingerprint(self._matched(cell)):
                raise OutputExistsError(
                    f"{self.folder.cell_path(cell.name)} was made with other options or another calibration; choose "
                    "another --out, or give the same"
                )


def judged(
    folder: GridFolder, judge: Judge, model: Model, texts: Mapping[str, Tokens], part: JudgedPart, load: Load
) -> Iterator[Fields]:
    """What a cell's file says of its model's judgement, as far as it is known after each part.

    Args:
        load: gives the dense model, the same at each call.
    """
    dense = folder.cell(DENSE)  # its text need not be generated again for each cell
    samples = dense.generation.samples if dense is not None and dense.generation is not None else None
    for known in judge.judge(model, texts, part, dense=load, dense_samples=samples):
        own, against = known.model, known.against.inference if known.against else UNSET
        by_text = zip(map(public_name, texts), own.perplexity or (), strict=False)
        yield {
            "perplexity": {name: structs.replace(result, text=name) for name, result in by_text},
            "tasks": own.tasks or {},
            "inference": InferencePair(dense=against, pruned=own.inference) if against and own.inference else None,
            "generation": own.generation or None,
        }


def _labelled(label: str, notes: Mapping[str, str]) -> str:
    """With what nobody may overlook in a table."""
    return f"{label} (reduced search)" if "reduced" in notes else label
