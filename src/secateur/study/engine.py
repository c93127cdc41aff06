"""The engine of `compare` and `ablate`: run a grid's cells, each in its own folder, so that a killed run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.api import read_tokens
from secateur.engine.tokens import Tokens
from secateur.errors import Interrupted, OutputBusyError, OutputExistsError, SecateurError
from secateur.folders import claimed
from secateur.methods import methods
from secateur.model.handle import Model
from secateur.run import Observer, Run, Silent
from secateur.study import judges
from secateur.study.cells import DENSE, Cell, Judging, Matrices, check_names, in_words
from secateur.study.clocked import Clocked, Shared
from secateur.study.estimate import estimates
from secateur.study.folder import GridFolder, finite
from secateur.study.index import differing, digest, make_index, now, united
from secateur.study.progress import Share
from secateur.study.pruning import complete_options, pruned, shape

logger = logging.getLogger(__name__)

Load = Callable[[], Model]  # the dense model, afresh at each call
Told = Callable[[Mapping[str, Any]], None]  # hears of each cell as it is finished


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that a run of cells needs beside the cells.

    Attributes:
        load: gives the dense model afresh; a pruned one is never made whole again.
        kind: "compare" or "ablate"; a folder is of one kind.
        arguments: as given, for the record.
        settings: more that the tables need to know, as the base of differences.
    """

    load: Load
    folder: Path
    judging: Judging
    kind: str = "compare"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Path | None = None
    cache: Path | None = None
    observer: Observer = field(default_factory=Silent)
    told: Told = lambda cell: None


def run_grid(grid: Grid, make_cells: Callable[[Model], Sequence[Cell]]) -> dict[str, dict[str, Any]]:
    """Run the cells that are not there yet; a cell that failed is tried again.

    One cell's failure is written into its file and does not end the run. What is wrong with the grid itself (an unknown
    method or text, a folder made with other settings) is refused before anything is run. A second process may work on
    the same folder: a cell that another one is making is left to it.

    Args:
        make_cells: the cells, for the dense model; the dense one first, a matched cell after what it is matched to.

    Returns:
        By name, what is in the folder of this grid's cells, in their order.

    Raises:
        OutputExistsError: the folder, or one of its cells, was made with other arguments.
        Whatever is wrong with the arguments.
    """
    return _Runner(grid, make_cells).run()


class _Runner:
    def __init__(self, grid: Grid, make_cells: Callable[[Model], Sequence[Cell]]) -> None:
        self.grid, self.folder = grid, GridFolder(grid.folder)
        self.folder.index()  # refuses what is no grid's folder, before gigabytes are read
        self.tasks = judges.prepare(grid.judging, data=grid.data, cache=grid.cache)
        dense = grid.load()
        self.cells = list(make_cells(dense))
        check_names(self.cells)
        self.texts = {
            name: read_tokens(
                dense, name, purpose="evaluation", length=grid.judging.length, samples=grid.judging.samples,
                data=grid.data, cache=grid.cache,
            )
            for name in grid.judging.texts
        }  # fmt: skip
        self.matrices = Matrices(dense, self.cells, data=grid.data, cache=grid.cache)
        self.model_fingerprint = dense.fingerprint()
        self.index = make_index(
            grid.kind, dense, self.model_fingerprint, grid.judging, self.texts, self.cells, arguments=grid.arguments,
            settings=grid.settings,
        )  # fmt: skip
        windows: dict[str, int | None] = {name: tokens.samples for name, tokens in self.texts.items()}
        foretold = estimates(self.cells, dense, grid.judging, windows=windows, documents=judges.documents(self.tasks))
        self.stages = {
            name: {stage: work.units(dense.head_cost) for stage, work in each["stages"].items()}
            for name, each in foretold.items()
        }
        self.refused = {name: each["refused"] for name, each in foretold.items() if "refused" in each}
        self.shared: dict[str, Shared] = {}
        self._spare: Model | None = dense

    def run(self) -> dict[str, dict[str, Any]]:
        self._check_there()
        self._write_index()
        missing = [cell for cell in self.cells if not self._is_done(cell.name)]
        everything, todo = (sum(self._work(cell.name) for cell in some) for some in (self.cells, missing))
        with self.grid.observer.progress(self.grid.kind, everything, everything - todo) as advance:
            bar = Share(todo, advance)
            for cell in missing:
                try:
                    self._one(cell, bar)
                except KeyboardInterrupt:
                    raise Interrupted(
                        f"interrupted in {cell.name}; finished cells are whole, and the same command goes on from there"
                    ) from None
        self._write_index()
        return self.folder.cells([cell.name for cell in self.cells])

    def _work(self, name: str) -> float:
        return sum(self.stages[name].values())

    def _load(self) -> Model:
        """The dense model; the one that was looked at first is used up first."""
        model, self._spare = self._spare, None
        return model if model is not None else self.grid.load()

    # --- one cell ---

    def _one(self, cell: Cell, bar: Share) -> None:
        """Make a cell, unless it is there."""
        with bar.part(self._work(cell.name)) as share:
            try:
                with claimed(self.folder.cell_path(cell.name)):
                    if self._is_done(cell.name):  # by another process, meanwhile
                        return
                    made = self._made(cell, share)
                    self.folder.write_cell(made)
            except OutputBusyError:
                logger.info("%s is being made by another process", cell.name)
                return
        self.grid.told(made)

    def _is_done(self, name: str) -> bool:
        there = self.folder.cell(name)
        return there is not None and there["status"] == "done"

    def _made(self, cell: Cell, bar: Share) -> dict[str, Any]:
        result = _blank(cell)
        try:
            cell = self._matched(cell)
            fingerprint = self._fingerprint(cell)
            result |= {"sparsity": cell.sparsity, "fingerprint": fingerprint}
            if (same := self._same(fingerprint)) is not None:
                own = ("name", "label", "matched_to", "ablation", "created")
                return {**same, **{key: result[key] for key in own}, "same_as": same["name"]}
            if cell.name in self.refused and cell.matched_to is None:
                return {**result, "error": self.refused[cell.name]}
            self._fill(cell, result, bar)
            result["status"] = "done"
        except Exception as error:  # one cell's failure is reported in the cell
            logger.info("%s failed", cell.name, exc_info=True)
            result |= {"status": "failed", "error": in_words(error)}
        made: dict[str, Any] = finite(result)
        return made

    def _fill(self, cell: Cell, result: dict[str, Any], bar: Share) -> None:
        model, stages = self._load(), self.stages[cell.name]
        if cell.method == DENSE:
            layout = model.layout()
            result |= {
                "achieved": {"blocks": 0.0, "model": 0.0},
                "parameters": layout.parameters,
                "weight_bytes": layout.parameters * model.dtype.itemsize,
                "shape": shape(layout, layout),
                "dense_shape": shape(layout, layout),
            }
            self._judge(model, model, result, stages, bar)
            return
        assert cell.calibration is not None  # narrows the type
        tokens, seed = self.matrices.rows(cell.calibration), cell.calibration.seed
        with ExitStack() as stack:
            with bar.part(stages.get("prune", 0.0)) as observer:
                run = Clocked(seed, shared=self._shared(cell, tokens), observer=observer)
                result |= stack.enter_context(pruned(cell, model, tokens, run))
            if "reduced" in result["notes"]:
                result["label"] += " (reduced search)"
            self._judge(model, None, result, stages, bar)

    def _judge(
        self, model: Model, dense: Model | None, result: dict[str, Any], stages: Mapping[str, float], bar: Share
    ) -> None:
        """Fill in all judgements; what is there before one fails stays in the cell."""
        judging = self.grid.judging
        with bar.part(stages.get("perplexity", 0.0)) as observer:
            result["perplexity"] = judges.perplexities(model, self.texts, Run(observer=observer))
        if self.tasks:
            with bar.part(stages.get("tasks", 0.0)) as observer:
                result["tasks"] = judges.tasks(model, self.tasks, Run(observer=observer))
        if not (judging.inference or judging.prompts):
            return
        dense = dense or self.grid.load()
        if judging.inference:
            with bar.part(stages.get("inference", 0.0)) as observer:
                result["inference"] = judges.inference(dense, model, judging, run=Run(observer=observer))
        if judging.prompts:
            with bar.part(stages.get("generation", 0.0)):
                result["generation"] = judges.generation(model, judging.prompts, dense=dense)

    # --- what cells share ---

    def _shared(self, cell: Cell, tokens: Tokens) -> Shared | None:
        """The steps that hold at every sparsity, of this method with these options and this calibration."""
        known = methods().get(cell.method)
        if known is None or known.shared is None:
            return None
        key = digest(cell.method, complete_options(cell), tokens.fingerprint())
        return self.shared.setdefault(key, Shared(known.shared))

    def _same(self, fingerprint: str) -> dict[str, Any] | None:
        """A finished cell of the same identity, which need not be made twice."""
        there = self.folder.cells([cell.name for cell in self.cells])
        return next((c for c in there.values() if c["status"] == "done" and c["fingerprint"] == fingerprint), None)

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
        for cell in self.cells:
            there = self.folder.cell(cell.name)
            if there is None or there["status"] != "done" or cell.matched_to is not None:
                continue
            if there["fingerprint"] != self._fingerprint(cell):
                raise OutputExistsError(
                    f"{self.folder.cell_path(cell.name)} was made with other options or another calibration; choose "
                    "another --out, or give the same"
                )

    def _write_index(self) -> None:
        """With the cells of earlier runs, or of another process, after this one's."""
        old = self.folder.index() or self.index
        cells = united(old["cells"], self.index["cells"])
        self.folder.write_index({**self.index, "created": old["created"], "cells": cells})


def _blank(cell: Cell) -> dict[str, Any]:
    """A cell's file before anything is known."""
    return {
        "name": cell.name,
        "method": cell.method,
        "label": cell.label,
        "sparsity": cell.sparsity,
        "of": cell.of,
        "status": "failed",
        "error": None,
        "options": dict(cell.options),
        "notes": {},
        "calibration": None,
        "achieved": None,
        "parameters": None,
        "weight_bytes": None,
        "prune": None,
        "curve": None,
        "shape": None,
        "perplexity": {},
        "tasks": {},
        "inference": None,
        "generation": None,
        "matched_to": cell.matched_to,
        "ablation": dict(cell.ablation) if cell.ablation is not None else None,
        "created": now(),
    }
