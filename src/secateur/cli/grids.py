"""What `compare` and `ablate` share: their defaults, a dry run, a run that shows how far it is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from secateur.assets import usual_text
from secateur.cli.guard import EXIT_FAILED, err, out
from secateur.cli.options import SourceOptions
from secateur.cli.progress import PARTS_IN_WORDS, in_words, standing_shown
from secateur.errors import InvalidOptionError, SecateurError
from secateur.forecast import probe
from secateur.grid.asked import Asked
from secateur.grid.folder import RUNS
from secateur.grid.pace import PARTS, PRUNE, Foretold, foretell, sequences
from secateur.grid.run import Grid, run_grid
from secateur.judge.judging import GENERATION, INFERENCE, PERPLEXITY, TASKS, Judge, Judging
from secateur.model.handle import Model
from secateur.report.page import PAGE, write_report
from secateur.report.results import CellResult
from secateur.run import Meter
from secateur.workers.session import Workers

_HEADINGS = {PRUNE: "pruning", PERPLEXITY: "texts", TASKS: "tasks", INFERENCE: "timing", GENERATION: "writing"}


def defaults(model: str, source: SourceOptions) -> tuple[str, Judging]:
    """The calibration text, and what a grid is judged by, where nothing is named; of the demo all is there."""
    calibration, judged = (usual_text(name, model=model, data=source.data) for name in ("c4", "wikitext2"))
    return calibration, Judging(texts=(judged,), samples=20)


@dataclass(frozen=True)
class GridJob:
    """A grid on a model that is known by name."""

    model: str
    source: SourceOptions
    judging: Judging
    as_json: bool
    workers: Workers | None = None

    def run(self, asked: Asked, folder: Path | None) -> None:
        """Run the grid, with a line per finished cell, print its table and make its page; leave with a code that says
        whether cells failed.

        Raises:
            InvalidOptionError: no folder was named.
        """
        if folder is None:
            raise InvalidOptionError("--out DIR is missing: the folder of the grid (or ask for --dry-run)")
        where = self.source
        source = replace(where.of(self.model), scratch=folder / RUNS)
        if self.workers is not None and source.device is not None:  # a worker sees its own GPUs only, first is cuda:0
            source = replace(source, device=source.device.partition(":")[0])
        with standing_shown() as shown:
            grid = Grid(
                load=source.load, folder=folder, judging=self.judging, arguments={"command": sys.argv[1:]},
                data=where.data, cache=where.cache_dir, workers=self.workers,
                on_cell=lambda cell: _say(err, cell_in_words(cell)), on_standing=shown,
            )  # fmt: skip
            cells = run_grid(grid, asked)
        failed = {name: cell.error for name, cell in cells.items() if not cell.done}
        written = {kind: (folder / f"{asked.table}.{kind}").read_text(encoding="utf-8") for kind in ("json", "md")}
        if self.as_json:
            print(json.dumps({"out": str(folder), "failed": failed, **json.loads(written["json"])}))
        else:
            _say(out, written["md"])
            _say(out, f"written to {folder}: {asked.table}.md, .csv, .json and .tex")
        try:
            write_report(folder)
        except SecateurError as error:  # without its extra the tables stand alone
            _say(err, f"no page was made: {error}")
        else:
            _say(err, f"the report: {folder / PAGE}")
        if failed:
            _say(err, f"{len(failed)} of {len(cells)} cells failed; the same command tries them again")
            raise typer.Exit(EXIT_FAILED)

    def show_estimates(self, asked: Asked) -> None:
        """List the cells with what their parts would take, from the configuration alone and one timed block."""
        where, judging = self.source, self.judging
        source = where.of(self.model)
        hollow, device = source.hollow(), source.main_device
        cells, judge = asked.cells(hollow), Judge.of(judging, data=where.data, cache=where.cache_dir)
        clock, unit = (time.process_time, "CPU seconds") if device.type == "cpu" else (time.perf_counter, "seconds")
        length = min(judging.length, hollow.max_length or judging.length)
        speed = probe(hollow, length, device, steps=sequences(judging), clock=clock)
        foretold = foretell(cells, hollow, judge, None, speed)
        if self.as_json:
            rows = [_row(name, cell, hollow, length) for name, cell in foretold.items()]
            everything = {"seconds": sum(cell.seconds for cell in foretold.values()), "unit": unit}
            print(json.dumps({"model": self.model, "length": length, **everything, "cells": rows}))
        else:
            _show_rows(foretold, unit, judging)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _row(name: str, cell: Foretold, hollow: Model, length: int) -> dict[str, object]:
    meter = cell.plan.meter if cell.plan is not None else Meter()
    forwards = meter.forwards(len(hollow.numbers), length, head=hollow.head_cost)
    known = {key: getattr(cell, key) for key in ("refused", "same_as", "removed", "parts", "seconds")}
    return {"name": name, **known, "forwards": forwards}


def cell_in_words(cell: CellResult) -> str:
    """A finished cell in a line."""
    if not cell.done:
        return f"{cell.name} failed: {cell.error}"
    values = {text: result.perplexity for text, result in cell.perplexity.items()}
    losses = ", ".join(f"{text} {'not finite' if value is None else f'{value:.2f}'}" for text, value in values.items())
    return f"{cell.name}{'' if cell.wall_s is None else f' in {cell.wall_s:,.0f} s'}: {losses}"


def _show_rows(cells: Mapping[str, Foretold], unit: str, judging: Judging) -> None:
    """A row per cell and one of sums, with the parts' shares of all below: what dominates."""
    shown = [part for part in PARTS if any(part in cell.parts for cell in cells.values())]
    table = Table(box=None, pad_edge=False)
    table.add_column("cell", overflow="fold")
    for heading in ("removed", *(_HEADINGS[part] for part in shown), "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    sums = {part: sum(cell.parts.get(part, 0.0) for cell in cells.values()) for part in shown}
    everything = sum(sums.values())
    for name, cell in cells.items():
        if cell.refused is None:
            parts = [f"{cell.parts[part]:,.0f}" if part in cell.parts else "" for part in shown]
            table.add_row(name, f"{cell.removed:.1%}", *parts, f"{cell.seconds:,.0f}")
    table.add_row("all", "", *(f"{sums[part]:,.0f}" for part in shown), f"{everything:,.0f}")
    if everything:
        table.add_row("", "", *(f"{sums[part] / everything:.0%}" for part in shown))
    out.print(table)
    for name, cell in cells.items():
        if cell.refused is not None:
            _say(out, f"{name} is refused: {cell.refused}")
    threads = f" on {torch.get_num_threads()} thread(s)" if unit.startswith("CPU") else ""
    named = (part for part in shown if part not in (PRUNE, TASKS))
    meant = "".join(f"; {_HEADINGS[part]}: {PARTS_IN_WORDS.get(part, part)}" for part in named)
    guesses = {
        "the windows of texts that are wanted whole": judging.samples is None and judging.texts,
        "tasks, by their first documents": judging.tasks,
    }
    guessed = ", ".join(guess for guess, applies in guesses.items() if applies)
    out.print(
        f"{unit} by one probed block, about {in_words(everything)} in all{threads}{meant}. Methods that solve "
        "(SlimGPT, SliceGPT) take somewhat longer to prune. What a method's runs share between sparsities is computed "
        "once, and counted in each here. A cell that is the same as another is not made again."
        + (f" Guessed: {guessed}." if guessed else ""),
        highlight=False,
    )
