"""What `compare` and `ablate` share: their defaults, a dry run, a run that shows how far it is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import typer
from rich.table import Table

from secateur.cli.guard import EXIT_FAILED, err, out
from secateur.cli.options import SourceOptions
from secateur.cli.progress import in_words, standing_shown
from secateur.errors import InvalidOptionError, SecateurError
from secateur.forecast import hollow_model, probe
from secateur.grid.pace import PARTS, PRUNE, Foretold, foretell, sequences, tokens_of
from secateur.grid.run import Asked, Grid, run_grid
from secateur.judge.judging import GENERATION, INFERENCE, PERPLEXITY, TASKS, Judge, Judging
from secateur.model.handle import Model
from secateur.model.load import check_device, load
from secateur.report.page import PAGE, write_report
from secateur.report.results import CellResult
from secateur.run import Meter

_HEADINGS = {  # of a dry run's columns, and what they are
    PRUNE: ("pruning", ""),
    PERPLEXITY: ("texts", "perplexity"),
    TASKS: ("tasks", ""),
    INFERENCE: ("timing", "prefill and time per token"),
    GENERATION: ("writing", "generated text"),
}


def default_text(model: str, source: SourceOptions) -> str:
    """The calibration text where none is named."""
    return "demo" if _needs_no_hub(model, source) else "c4"


def default_judging(model: str, source: SourceOptions) -> Judging:
    """What a grid is judged by where nothing is named."""
    return Judging(texts=("demo" if _needs_no_hub(model, source) else "wikitext2",), samples=20)


def _needs_no_hub(model: str, source: SourceOptions) -> bool:
    return model == "demo" and source.data is None


@dataclass(frozen=True)
class GridJob:
    """A grid on a model that is known by name."""

    model: str
    source: SourceOptions
    judging: Judging
    as_json: bool

    def run(self, asked: Asked, folder: Path | None, *, dry_run: bool) -> None:
        """Run the grid, with a line per finished cell, print its table and make its page; leave with a code that says
        whether cells failed.

        Raises:
            InvalidOptionError: no folder was named.
        """
        if dry_run:
            return self.show_estimates(asked)
        if folder is None:
            raise InvalidOptionError("--out DIR is missing: the folder of the grid (or ask for --dry-run)")
        where = self.source
        with standing_shown() as shown:
            dense = partial(
                load, self.model, device=where.device, dtype=where.dtype, revision=where.revision, cache=where.cache_dir
            )
            grid = Grid(
                load=dense, folder=folder, judging=self.judging, arguments={"command": sys.argv[1:]}, data=where.data,
                cache=where.cache_dir, told=_tell, shown=shown,
            )  # fmt: skip
            cells = run_grid(grid, asked)
        failed = {name: cell.error for name, cell in cells.items() if not cell.done}
        content = json.loads((folder / f"{asked.table}.json").read_text(encoding="utf-8"))
        if self.as_json:
            print(json.dumps({"out": str(folder), "failed": failed, **content}))
        else:
            out.print((folder / f"{asked.table}.md").read_text(encoding="utf-8"), markup=False, highlight=False)
            out.print(f"written to {folder}: {asked.table}.md, .csv, .json and .tex", markup=False, highlight=False)
        _write_page(folder)
        if failed:
            err.print(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again", highlight=False)
            raise typer.Exit(EXIT_FAILED)

    def show_estimates(self, asked: Asked) -> None:
        """List the cells with what their parts would take, from the configuration alone and one timed block."""
        where = self.source
        hollow = hollow_model(self.model, dtype=where.dtype, revision=where.revision, cache=where.cache_dir)
        cells = asked.cells(hollow)
        judge = Judge.of(self.judging, data=where.data, cache=where.cache_dir)
        device = check_device(None if where.device == "auto" else where.device)
        clock = time.process_time if device == "cpu" else time.perf_counter
        length = min(self.judging.length, hollow.max_length or self.judging.length)
        speed = probe(hollow, length, device, steps=sequences(self.judging), clock=clock)
        foretold = foretell(cells, hollow, self.judging, tokens_of(judge, None), speed)
        unit = "CPU seconds" if device == "cpu" else "seconds"
        if self.as_json:
            rows = [_row(name, cell, hollow, length) for name, cell in foretold.items()]
            everything = {"seconds": sum(cell.seconds for cell in foretold.values()), "unit": unit}
            print(json.dumps({"model": self.model, "length": length, **everything, "cells": rows}))
        else:
            _show_rows(foretold, unit, _guessed(self.judging))


def _row(name: str, cell: Foretold, hollow: Model, length: int) -> dict[str, object]:
    meter = cell.plan.meter if cell.plan is not None else Meter()
    forwards = meter.forwards(len(hollow.numbers), length, head=hollow.head_cost)
    known = {key: getattr(cell, key) for key in ("refused", "same_as", "removed", "parts", "seconds")}
    return {"name": name, **known, "forwards": forwards}


def _tell(cell: CellResult) -> None:
    if cell.done:
        losses = ", ".join(f"{text} {_number(result.perplexity)}" for text, result in cell.perplexity.items())
        line = f"{cell.name}{'' if cell.wall_s is None else f' in {cell.wall_s:,.0f} s'}: {losses}"
    else:
        line = f"{cell.name} failed: {cell.error}"
    err.print(line, markup=False, highlight=False)


def _number(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.2f}"


def _show_rows(cells: Mapping[str, Foretold], unit: str, guessed: str) -> None:
    """A row per cell and one of sums, with the parts' shares of all below: what dominates."""
    shown = [part for part in PARTS if any(part in cell.parts for cell in cells.values())]
    table = Table(box=None, pad_edge=False)
    table.add_column("cell", overflow="fold")
    for heading in ("removed", *(_HEADINGS[part][0] for part in shown), "all"):
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
    for line in [f"{name} is refused: {cell.refused}" for name, cell in cells.items() if cell.refused is not None]:
        out.print(line, markup=False, highlight=False)
    threads = f" on {torch.get_num_threads()} thread(s)" if unit.startswith("CPU") else ""
    meant = "".join(f"; {heading}: {what}" for part, (heading, what) in _HEADINGS.items() if what and part in shown)
    out.print(
        f"{unit} by one probed block, about {in_words(everything)} in all{threads}{meant}. Methods that solve "
        "(SlimGPT, SliceGPT) take somewhat longer to prune. What a method's runs share between sparsities is computed "
        "once, and counted in each here. A cell that is the same as another is not made again." + guessed,
        highlight=False,
    )


def _guessed(judging: Judging) -> str:
    guessed = [
        *(["the windows of texts that are wanted whole"] if judging.samples is None and judging.texts else []),
        *(["tasks, by their first documents"] if judging.tasks else []),
    ]
    return f" Guessed: {', '.join(guessed)}." if guessed else ""


def _write_page(folder: Path) -> None:
    """The page and plots of what is there; without their extra the tables stand alone."""
    try:
        write_report(folder)
    except SecateurError as error:
        err.print(f"no page was made: {error}", markup=False, highlight=False)
    else:
        err.print(f"the report: {folder / PAGE}", markup=False, highlight=False)
