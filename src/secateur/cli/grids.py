"""What `compare` and `ablate` share: their options, a dry run, a run that shows how far it is, the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich.table import Table

from secateur.cli.guard import EXIT_FAILED, err, out
from secateur.cli.options import Calibration, Count, Length, Samples, SourceOptions, words
from secateur.cli.progress import in_words, standing_shown
from secateur.errors import InvalidOptionError, SecateurError
from secateur.forecast import Speed, probe
from secateur.grid.cells import Cell
from secateur.grid.estimate import GENERATION, INFERENCE, PARTS, PERPLEXITY, PRUNE, TASKS, Work, estimates, steps
from secateur.grid.judges import Judges
from secateur.grid.run import Grid
from secateur.judge.judging import Judging
from secateur.model.handle import Model
from secateur.model.load import Source, check_device, load
from secateur.report.page import PAGE, write_report
from secateur.run import Meter

SPARSITIES = (
    "Numbers between 0 and 1 with commas between; `paper` is 0.25,0.375,0.5, `every-block` every number of blocks."
)

OutDir = Annotated[Path | None, typer.Option("--out", help="Folder of the grid; a run that was stopped goes on there.")]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="METHOD.NAME=VALUE",
        help="An option of one method, as evopress.generations=4; `samples` and `length` are its calibration's. "
        "May be repeated.",
    ),
]
_HEADINGS = {  # of a dry run's columns, and what they are
    PRUNE: ("pruning", ""),
    PERPLEXITY: ("texts", "perplexity"),
    TASKS: ("tasks", ""),
    INFERENCE: ("timing", "prefill and time per token"),
    GENERATION: ("writing", "generated text"),
}
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the cells with what their parts would take.")]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The calibration of all cells."""

    PANEL: ClassVar[str] = "Calibration"

    calibration: Calibration = None
    samples: Samples = None
    length: Length = None
    count: Count = "all"


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The texts that the perplexity is taken on."""

    PANEL: ClassVar[str] = "Judging: perplexity"

    texts: Annotated[
        str | None,
        typer.Option(help="Texts to take the perplexity on, commas between.", show_default="wikitext2; demo for demo"),
    ] = None
    eval_samples: Annotated[
        int | None, typer.Option(help="First windows of each text; 0 for all.", show_default="20")
    ] = None
    eval_length: Annotated[int | None, typer.Option(help="Tokens per window of each text.", show_default="2048")] = None

    def applied(self, judging: Judging) -> Judging:
        """The judging with what was given."""
        if self.texts is not None:
            judging = replace(judging, texts=tuple(words(self.texts)))
        if self.eval_samples is not None:
            judging = replace(judging, samples=self.eval_samples or None)
        return judging if self.eval_length is None else replace(judging, length=self.eval_length)


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

    @contextmanager
    def grid(self, out_dir: Path | None) -> Iterator[Grid]:
        """The grid; while the context is open, it is shown how far it is, with a line per finished cell.

        Raises:
            InvalidOptionError: no folder was named.
        """
        if out_dir is None:
            raise InvalidOptionError("--out DIR is missing: the folder of the grid (or ask for --dry-run)")
        with standing_shown() as shown:
            yield Grid(
                load=self._load, folder=out_dir, judging=self.judging, arguments={"command": sys.argv[1:]},
                data=self.source.data, cache=self.source.cache_dir, told=_tell, shown=shown,
            )  # fmt: skip

    def _load(self) -> Model:
        where = self.source
        return load(
            self.model, device=where.device, dtype=where.dtype, revision=where.revision, cache=where.cache_dir
        )  # fmt: skip

    def finish(self, cells: Mapping[str, Mapping[str, Any]], folder: Path, table: str) -> None:
        """Print the table and leave with a code that says whether cells failed."""
        failed = {name: cell["error"] for name, cell in cells.items() if cell["status"] == "failed"}
        content = json.loads((folder / f"{table}.json").read_text(encoding="utf-8"))
        if self.as_json:
            print(json.dumps({"out": str(folder), "failed": failed, **content}))
        else:
            out.print((folder / f"{table}.md").read_text(encoding="utf-8"), markup=False, highlight=False)
            out.print(f"written to {folder}: {table}.md, .csv, .json and .tex", markup=False, highlight=False)
        if failed:
            err.print(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again", highlight=False)
            raise typer.Exit(EXIT_FAILED)

    def show_estimates(self, make_cells: Callable[[Model], Sequence[Cell]]) -> None:
        """List the cells with what their parts would take, from the configuration alone and one timed block."""
        where = self.source
        hollow = Source(name=self.model, dtype=where.dtype, revision=where.revision, cache=where.cache_dir).hollow()
        cells = make_cells(hollow)
        judges = Judges(self.judging, data=where.data, cache=where.cache_dir)
        windows = dict.fromkeys(self.judging.texts, self.judging.samples)
        foretold = estimates(cells, hollow, self.judging, windows=windows, task_tokens=judges.task_tokens())
        device = check_device(None if where.device == "auto" else where.device)
        clock = time.process_time if device == "cpu" else time.perf_counter
        length = min(self.judging.length, hollow.max_length or self.judging.length)
        speed = probe(hollow, length, device, steps=steps(self.judging), clock=clock)
        rows = [_row(name, each, speed, hollow, length) for name, each in foretold.items()]
        unit = "CPU seconds" if device == "cpu" else "seconds"
        if self.as_json:
            everything = {"seconds": sum(row["seconds"] for row in rows), "unit": unit}
            print(json.dumps({"model": self.model, "length": length, **everything, "cells": rows}))
        else:
            _show_rows(rows, unit, _guessed(self.judging))


def _row(name: str, foretold: Mapping[str, Any], speed: Speed, hollow: Model, length: int) -> dict[str, Any]:
    parts = {part: work.seconds(speed) for part, work in foretold["parts"].items()}
    pruning = foretold["parts"].get(PRUNE, Work())
    meter = Meter(int(pruning.block_tokens), int(pruning.head_tokens))
    spent = meter.forwards(len(hollow.numbers), length, head=hollow.head_cost)
    told = {key: foretold.get(key) for key in ("refused", "same_as", "removed")}
    return {"name": name, **told, "forwards": spent, "parts": parts, "seconds": sum(parts.values())}


def _tell(cell: Mapping[str, Any]) -> None:
    if cell["status"] == "failed":
        told = f"{cell['name']} failed: {cell['error']}"
    else:
        losses = ", ".join(f"{text} {_number(result['perplexity'])}" for text, result in cell["perplexity"].items())
        took = f" in {cell['prune']['wall_s']:,.0f} s" if cell["prune"] else ""
        told = f"{cell['name']}{took}: {losses}"
    err.print(told, markup=False, highlight=False)


def _number(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.2f}"


def _show_rows(rows: Sequence[Mapping[str, Any]], unit: str, guessed: str) -> None:
    """A row per cell and one of sums, with the parts' shares of all below: what dominates."""
    shown = [part for part in PARTS if any(part in row["parts"] for row in rows)]
    table = Table(box=None, pad_edge=False)
    table.add_column("cell", overflow="fold")
    for heading in ("removed", *(_HEADINGS[part][0] for part in shown), "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    sums = {part: sum(row["parts"].get(part, 0.0) for row in rows) for part in shown}
    everything = sum(sums.values())
    refused = []
    for row in rows:
        if row["refused"]:
            refused.append(f"{row['name']} is refused: {row['refused']}")
            continue
        if row["same_as"]:
            table.add_row(row["name"], f"{row['removed']:.1%}", *[""] * len(shown), "0")
            continue
        parts = [f"{row['parts'][part]:,.0f}" if part in row["parts"] else "" for part in shown]
        table.add_row(row["name"], f"{row['removed']:.1%}", *parts, f"{row['seconds']:,.0f}")
    table.add_row("all", "", *(f"{sums[part]:,.0f}" for part in shown), f"{everything:,.0f}")
    if everything:
        table.add_row("", "", *(f"{sums[part] / everything:.0%}" for part in shown))
    out.print(table)
    for told in refused:
        out.print(told, markup=False, highlight=False)
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


def write_page(folder: Path) -> None:
    """The page and plots of what is there; without their extra the tables stand alone."""
    try:
        write_report(folder)
    except SecateurError as error:
        err.print(f"no page was made: {error}", markup=False, highlight=False)
    else:
        err.print(f"the report: {folder / PAGE}", markup=False, highlight=False)
