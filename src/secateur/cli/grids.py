"""What `compare` and `ablate` share: their options, a dry run, the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from secateur.cli.guard import EXIT_FAILED, err, out
from secateur.cli.progress import Bars
from secateur.errors import InvalidOptionError
from secateur.forecast import hollow_model, probe
from secateur.model.handle import Model
from secateur.model.load import check_device, load
from secateur.study import judges
from secateur.study.cells import Cell, Judging
from secateur.study.engine import Grid
from secateur.study.estimate import Work, estimates, forwards, total

OutDir = Annotated[Path | None, typer.Option("--out", help="Folder of the grid; a run that was stopped goes on there.")]
OfShare = Annotated[str, typer.Option(help="A share of the `blocks`' parameters or of the whole `model`'s.")]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="METHOD.NAME=VALUE",
        help="An option of one method, as evopress.generations=4; `samples` and `length` are its calibration's. "
        "May be repeated.",
    ),
]
Calibration = Annotated[str | None, typer.Option(help="c4, wikitext2, fineweb-edu, demo, or a file.")]
Samples = Annotated[int | None, typer.Option(help="Calibration windows of every method; each paper's if not given.")]
Length = Annotated[int | None, typer.Option(help="Tokens per window; the papers' if not given.")]
Texts = Annotated[str | None, typer.Option(help="Texts to take the perplexity on, commas between. [wikitext2]")]
EvalSamples = Annotated[int | None, typer.Option(help="First windows of each text; 0 for all. [20]")]
EvalLength = Annotated[int | None, typer.Option(help="Tokens per window of each text. [2048]")]
Tasks = Annotated[str | None, typer.Option(help="Tasks or suites (2ssp, slimgpt), commas between.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many documents of each task.")]
FewShot = Annotated[int | None, typer.Option(help="Examples before each document; the suite's number if not given.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the cells with what they would take.")]


@dataclass(frozen=True)
class Source:
    """The model by name, and where things lie."""

    model: str
    device: str | None
    dtype: str
    revision: str | None
    data: Path | None
    cache: Path | None

    def load(self) -> Model:
        return load(
            self.model, device=self.device, dtype=self.dtype, revision=self.revision, cache=self.cache
        )  # fmt: skip

    def hollow(self) -> Model:
        return hollow_model(self.model, dtype=self.dtype, revision=self.revision, cache=self.cache)

    def default_text(self) -> str:
        return "demo" if self.model == "demo" and self.data is None else "c4"


def words(text: str | None) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b")."""
    return tuple(word for each in (text or "").split(",") if (word := each.strip()))


def judging_of(
    default: Judging, *, texts: str | None, samples: int | None, length: int | None, tasks: str | None,
    limit: int | None, fewshot: int | None, inference: bool | None, prompts: Sequence[str] | None,
) -> Judging:  # fmt: skip
    """The judging that was asked for; what was not said is as in `default`.

    Raises:
        InvalidOptionError: nothing to judge by, or a number below 1.
    """
    given: dict[str, Any] = {
        "texts": words(texts) if texts is not None else None, "length": length,
        "tasks": words(tasks) if tasks is not None else None, "limit": limit, "fewshot": fewshot,
        "inference": inference, "prompts": tuple(prompts) if prompts else None,
    }  # fmt: skip
    chosen = {name: getattr(default, name) for name in Judging.__dataclass_fields__}
    chosen |= {name: value for name, value in given.items() if value is not None}
    if samples is not None:
        chosen["samples"] = samples or None
    return Judging(**chosen)


def grid_of(source: Source, out_dir: Path | None, judging: Judging) -> Grid:
    """The grid, with a bar and a line per finished cell.

    Raises:
        InvalidOptionError: no folder was named.
    """
    if out_dir is None:
        raise InvalidOptionError("--out DIR is missing: the folder of the grid (or ask for --dry-run)")
    return Grid(
        load=source.load, folder=out_dir, judging=judging, arguments={"command": sys.argv[1:]}, data=source.data,
        cache=source.cache, observer=Bars(), told=_tell,
    )  # fmt: skip


def _tell(cell: Mapping[str, Any]) -> None:
    if cell["status"] == "failed":
        told = f"{cell['name']} failed: {cell['error']}"
    else:
        losses = ", ".join(f"{text} {result['perplexity']:.2f}" for text, result in cell["perplexity"].items())
        took = f" in {cell['prune']['wall_s']:,.0f} s" if cell["prune"] else ""
        told = f"{cell['name']}{took}: {losses}"
    err.print(told, markup=False, highlight=False)


def finish(cells: Mapping[str, Mapping[str, Any]], folder: Path, table: str, as_json: bool) -> None:
    """Print the table and leave with a code that says whether cells failed."""
    failed = {name: cell["error"] for name, cell in cells.items() if cell["status"] == "failed"}
    content = json.loads((folder / f"{table}.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps({"out": str(folder), "failed": failed, **content}))
    else:
        out.print((folder / f"{table}.md").read_text(encoding="utf-8"), markup=False, highlight=False)
        out.print(f"written to {folder}: {table}.md, .csv, .json and .tex", markup=False, highlight=False)
    if failed:
        err.print(
            f"{len(failed)} of {len(cells)} cells failed; the same command tries them again", highlight=False
        )  # fmt: skip
        raise typer.Exit(EXIT_FAILED)


def show_estimates(
    source: Source, make_cells: Callable[[Model], Sequence[Cell]], judging: Judging, as_json: bool
) -> None:
    """List the cells with what each would take, from the configuration alone and one timed block."""
    hollow = source.hollow()
    cells = make_cells(hollow)
    windows = dict.fromkeys(judging.texts, judging.samples)
    tasks = judges.prepare(judging, data=source.data, cache=source.cache)
    foretold = estimates(cells, hollow, judging, windows=windows, documents=judges.documents(tasks))
    device = check_device(None if source.device == "auto" else source.device)
    length = min(judging.length, hollow.max_length or judging.length)
    speed = probe(hollow, length, device)

    def seconds(work: Work) -> float:
        return work.block_tokens * speed.block_s + work.head_tokens * speed.head_s

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "refused": each.get("refused"),
            "removed": each.get("achieved"),
            "forwards": forwards(total(each), hollow, length),
            "prune_s": seconds(each["stages"].get("prune", Work())),
            "seconds": seconds(total(each)),
        }
        for name, each in foretold.items()
    ]
    everything = sum(row["seconds"] for row in rows)
    if as_json:
        print(json.dumps({"model": source.model, "length": length, "seconds": everything, "cells": rows}))
        return
    table = Table("cell", "removed", "forwards", "pruning, s", "all, s", box=None, pad_edge=False)
    for row in rows:
        if row["refused"]:
            table.add_row(row["name"], f"refused: {row['refused']}")
        else:
            numbers = (f"{row['forwards']:,.0f}", f"{row['prune_s']:,.0f}", f"{row['seconds']:,.0f}")
            table.add_row(row["name"], f"{row['removed']:.1%}", *numbers)
    out.print(table)
    guessed = [
        *(["windows of the texts (all of them were asked for)"] if judging.samples is None else []),
        *(["tasks"] if judging.tasks else []),
        *(["latency"] if judging.inference else []),
        *(["samples of text"] if judging.prompts else []),
    ]
    out.print(
        f"about {everything / 3600:.1f} hours by one probed block, in forwards of {length} tokens; methods that solve "
        "(SlimGPT, SliceGPT) take longer" + (f"; guessed: {', '.join(guessed)}" if guessed else ""),
        highlight=False,
    )  # fmt: skip
