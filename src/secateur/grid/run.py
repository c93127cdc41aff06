"""The engine of `compare` and `ablate`: run a grid's cells, each in its own folder, so that a killed run goes on."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.errors import Interrupted, InvalidOptionError, OutputBusyError, OutputExistsError, SecateurError
from secateur.folders import claimed
from secateur.forecast import Clock, timed
from secateur.grid.cells import DENSE, Cell, Matrices, check_names, in_words
from secateur.grid.clocked import Clocked, Shared
from secateur.grid.estimate import PRUNE, estimates, steps
from secateur.grid.folder import GridFolder
from secateur.grid.index import continued, differing, digest, make_index, unequal_terms
from secateur.grid.judges import Judges
from secateur.grid.pace import Pace, Standing
from secateur.grid.pruning import blank, complete_options, dense_facts, pruned
from secateur.judge.judging import Judging
from secateur.methods import methods
from secateur.model.handle import Model
from secateur.report.results import finite

logger = logging.getLogger(__name__)

Load = Callable[[], Model]  # the dense model, afresh at each call


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that a run of cells needs beside the cells.

    Attributes:
        load: gives the dense model afresh; a pruned one is never made whole again.
        folder: of the grid; made if need be, continued if it is there.
        judging: what each cell is judged by.
        kind: "compare" or "ablate"; a folder is of one kind.
        arguments: as given, for the record.
        settings: more that the tables need to know, as the base of differences.
        data, cache: where texts and tasks are read from and kept.
        told: hears of each cell as it is finished.
        shown: hears how far the whole grid is, often.
        clock: seconds; parts are timed by it.

    Raises:
        InvalidOptionError: there is neither a text nor a task to judge by.
    """

    load: Load
    folder: Path
    judging: Judging
    kind: str = "compare"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Path | None = None
    cache: Path | None = None
    told: Callable[[Mapping[str, Any]], None] = lambda cell: None
    shown: Callable[[Standing], None] = lambda standing: None
    clock: Clock = time.monotonic

    def __post_init__(self) -> None:
        if not (self.judging.texts or self.judging.tasks):
            raise InvalidOptionError("nothing to judge by: give at least one text or task")


def run_grid(
    grid: Grid, make_cells: Callable[[Model], Sequence[Cell]], write_tables: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Run the cells that are not there yet; a cell that failed is tried again.

    One cell's failure is written into its file and does not end the run. What is wrong with the grid itself (an unknown
    method or text, a folder made with other settings) is refused before anything is run. A second process may work on
    the same folder: a cell that another one is making, one like it, and one that is matched to it, are left for later,
    and what is not there by the end to the other process.

    Args:
        make_cells: the cells, for the dense model; the dense one first, a matched cell after what it is matched to.
        write_tables: of what is in the folder; called after each cell, so that a killed run has its tables too.

    Returns:
        By name, what is in the folder of this grid's cells, in their order.

    Raises:
        OutputExistsError: the folder, or one of its cells, was made with other arguments.
        Whatever is wrong with the arguments.
    """
    return _Runner(grid, make_cells, write_tables).run()


class _Runner:
    def __init__(
        self, grid: Grid, make_cells: Callable[[Model], Sequence[Cell]], write_tables: Callable[[], None]
    ) -> None:
        self.grid, self.folder, self.write_tables = grid, GridFolder(grid.folder), write_tables
        self.folder.index()  # refuses what is no grid's folder, before gigabytes are read
        self.judges = Judges(grid.judging, data=grid.data, cache=grid.cache)
        dense = grid.load()
        self.cells = list(make_cells(dense))
        check_names(self.cells)
        self.judges.read(dense)
        self.matrices = Matrices(dense, self.cells, data=grid.data, cache=grid.cache)
        self.model_fingerprint = dense.fingerprint()
        self.index = make_index(
            grid.kind, dense, self.model_fingerprint, grid.judging, self.judges.texts, self.cells,
            arguments=grid.arguments, settings=grid.settings,
        )  # fmt: skip
        self.shared = self._shared()
        self.refused: dict[str, str] = {}
        # It was read to know the cells and only looked at, so it is still whole: the first cell takes it instead of
        # reading gigabytes again.
        self._spare: Model | None = dense

    def run(self) -> dict[str, dict[str, Any]]:
        self._check_there()
        self._write_index()
        missing = [cell for cell in self.cells if not self._is_done(cell.name)]
        if missing:
            pace = self._pace()
        left = missing
        while left:  # what another process made impossible for now may be possible after the others
            busy = [cell for cell in left if not self._tried(cell, pace)]
            if len(busy) == len(left):
                break
            left = busy
        self._write_index()
        self.write_tables()
        return self._there()

    def _tried(self, cell: Cell, pace: Pace) -> bool:
        """Make a cell, unless another process is making it, or the one that it is matched to."""
        if cell.matched_to is not None and self.folder.cell(cell.matched_to) is None:
            return False
        try:
            return self._one(cell, pace)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted in {cell.name}; finished cells are whole, and the same command goes on from there"
            ) from None

    def _pace(self) -> Pace:
        """What the cells will take; also notes which are refused."""
        judging, dense = self.grid.judging, self._load()
        self._spare = dense
        windows: dict[str, int | None] = {name: tokens.samples for name, tokens in self.judges.texts.items()}
        told = estimates(self.cells, dense, judging, windows=windows, task_tokens=self.judges.task_tokens())
        self.refused = {name: each["refused"] for name, each in told.items() if "refused" in each}
        speed = timed(dense, min(judging.length, dense.max_length or judging.length), steps=steps(judging))
        return Pace(
            {name: {part: work.seconds(speed) for part, work in each["parts"].items()} for name, each in told.items()},
            {cell.name: cell.method for cell in self.cells},
            {name: cell.get("seconds", {}) for name, cell in self._there().items() if cell["status"] == "done"},
            self.shared, clock=self.grid.clock, show=self.grid.shown,
        )  # fmt: skip

    def _there(self) -> dict[str, dict[str, Any]]:
        """This grid's cells that are in the folder."""
        return self.folder.cells([cell.name for cell in self.cells])

    def _load(self) -> Model:
        """The dense model; the one that was looked at first is used up first."""
        model, self._spare = self._spare, None
        return model if model is not None else self.grid.load()

    # --- one cell ---

    def _one(self, cell: Cell, pace: Pace) -> bool:
        """Make a cell, unless it is there; False if another process is making it, or one of the same identity, which
        can be copied then."""
        claims = [self.folder.cell_path(name) for name in (cell.name, self._identity(cell))]
        try:
            with claimed(claims[0]), claimed(claims[1]), pace.cell(cell.name) as seconds:
                if self._is_done(cell.name):  # by another process, meanwhile
                    return True
                made = self._made(cell, pace)
                self.folder.write_cell({**made, "seconds": finite(seconds)})
        except OutputBusyError:
            logger.info("%s is being made by another process", cell.name)
            return False
        self.write_tables()
        self.grid.told(made)
        return True

    def _is_done(self, name: str) -> bool:
        there = self.folder.cell(name)
        return there is not None and there["status"] == "done"

    def _made(self, cell: Cell, pace: Pace) -> dict[str, Any]:
        result = {**blank(cell), **{key: self.index[key] for key in ("machine", "versions")}}
        try:
            cell = self._matched(cell)
            fingerprint = self._fingerprint(cell)
            result |= {"sparsity": cell.sparsity, "fingerprint": fingerprint}
            if (same := self._same(fingerprint)) is not None:
                own = ("name", "matched_to", "ablation", "created")
                label = _labelled(cell.label, same["notes"])
                return {**same, **{key: result[key] for key in own}, "label": label, "same_as": same["name"]}
            if cell.name in self.refused and cell.matched_to is None:
                return {**result, "error": self.refused[cell.name]}
            self._fill(cell, result, pace)
            result["status"] = "done"
        except Exception as error:  # one cell's failure is reported in the cell
            logger.info("%s failed", cell.name, exc_info=True)
            result |= {"status": "failed", "error": in_words(error)}
        made: dict[str, Any] = finite(result)
        return made

    def _fill(self, cell: Cell, result: dict[str, Any], pace: Pace) -> None:
        part = functools.partial(pace.part, cell.name)
        if cell.method == DENSE:
            model = self._load()
            result |= dense_facts(model)
            self.judges.judge(model, lambda: model, result, part, dense_samples=None)
            return
        assert cell.calibration is not None  # narrows the type
        tokens, seed = self.matrices.rows(cell.calibration), cell.calibration.seed
        with ExitStack() as stack:
            with part(PRUNE) as observer:
                model = self._load()
                run = Clocked(seed, shared=self.shared.get(cell.name), observer=observer, clock=self.grid.clock)
                result |= stack.enter_context(pruned(cell, model, tokens, run))
            result["label"] = _labelled(cell.label, result["notes"])
            self.judges.judge(model, functools.cache(self.grid.load), result, part, dense_samples=self._dense_samples())

    def _dense_samples(self) -> list[dict[str, Any]] | None:
        """The dense model's samples of text, which need not be generated again for each cell."""
        there = (self.folder.cell(DENSE) or {}).get("generation")
        return there["samples"] if there else None

    # --- what cells share ---

    def _shared(self) -> dict[str, Shared]:
        """By cell, the steps that it shares with all of the same method, options and calibration."""
        stores: dict[str, Shared] = {}
        by_cell = {}
        for cell in self.cells:
            known = methods().get(cell.method)
            if known is not None and known.shared is not None and cell.calibration is not None:
                key = digest(cell.method, complete_options(cell), self.matrices.rows(cell.calibration).fingerprint())
                by_cell[cell.name] = stores.setdefault(key, Shared(known.shared))
        return by_cell

    def _same(self, fingerprint: str) -> dict[str, Any] | None:
        """A finished cell of the same identity, which need not be made twice."""
        there = self._there().values()
        return next((c for c in there if c["status"] == "done" and c["fingerprint"] == fingerprint), None)

    def _matched(self, cell: Cell) -> Cell:
        """With the size that the cell which it is matched to achieved."""
        if cell.matched_to is None:
            return cell
        other = self.folder.cell(cell.matched_to)
        if other is None or other.get("achieved") is None:
            raise SecateurError(f"{cell.matched_to}, whose size it is to have, is not there")
        return replace(cell, sparsity=other["achieved"][cell.of])

    def _fingerprint(self, cell: Cell) -> str:
        tokens = self.matrices.rows(cell.calibration).fingerprint() if cell.calibration else None
        return digest(self.index["judged_by"], {**cell.identity, "options": complete_options(cell)}, tokens)

    def _identity(self, cell: Cell) -> str:
        """The name by which what the cell is, is claimed."""
        try:
            return self._fingerprint(self._matched(cell))
        except SecateurError:  # of a match whose partner failed; the cell will say so
            return f"{cell.name}-alone"

    # --- the folder ---

    def _check_there(self) -> None:
        """Refuse a folder, or a cell, that was made with other arguments."""
        old = self.folder.index()
        if old is None:
            return
        if names := differing(old, self.index, self.grid.judging):
            raise OutputExistsError(
                f"{self.folder.path} was made with other arguments ({', '.join(names)} differ); choose another --out, "
                "or give the same. Methods and sparsities may be added"
            )
        earlier = self.folder.cells(old["cells"])
        if names := unequal_terms(earlier.values(), self.cells):
            raise OutputExistsError(
                f"{self.folder.path} has cells of the same ablation on other terms ({', '.join(names)} differ); choose "
                "another --out, or give the same. Seeds, values and sparsities may be added"
            )
        for cell in self.cells:
            there = earlier.get(cell.name)
            if there is None or there["status"] != "done":
                continue
            if cell.matched_to is not None and not earlier.get(cell.matched_to, {}).get("achieved"):
                continue  # its size is not known before that one is made
            if there["fingerprint"] != self._fingerprint(self._matched(cell)):
                raise OutputExistsError(
                    f"{self.folder.cell_path(cell.name)} was made with other options or another calibration; choose "
                    "another --out, or give the same"
                )

    def _write_index(self) -> None:
        self.folder.write_index(continued(self.folder.index() or self.index, self.index))


def _labelled(label: str, notes: Mapping[str, str]) -> str:
    """With what nobody may overlook in a table."""
    return f"{label} (reduced search)" if "reduced" in notes else label
