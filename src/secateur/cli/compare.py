"""`secateur compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import grids
from secateur.cli.groups import grouped
from secateur.cli.guard import err, start_logging
from secateur.cli.options import (
    OF,
    SEED,
    ModelName,
    OutputOptions,
    RoundTo,
    RunningOptions,
    SourceOptions,
    TaskOptions,
    words,
)  # fmt: skip
from secateur.errors import SecateurError
from secateur.report.page import PAGE, write_report
from secateur.study.asked import parse_options
from secateur.study.compare import Comparison
from secateur.study.compare import compare as run_comparison
from secateur.study.main_table import NAME
from secateur.study.presets import PRESETS, get_preset


@grouped
def compare(
    model: ModelName,
    *,
    methods: Annotated[
        str | None, typer.Option(help="`all`, or names with commas between.", show_default="all")
    ] = None,
    sparsities: Annotated[str | None, typer.Option(help=grids.SPARSITIES, show_default="paper")] = None,
    out_dir: grids.OutDir = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Everything as published: {', '.join(PRESETS)}. Other options win over it.")
    ] = None,
    of: Annotated[str | None, OF] = None,
    round_to: RoundTo = 1,
    option: grids.MethodOption = None,
    calibration: grids.CalibrationOptions,
    seed: Annotated[int | None, SEED] = None,
    matched: Annotated[
        bool, typer.Option("--matched", help="Beside each block-wise method 2SSP at the size that it achieved.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="The method that differences are taken to.", show_default="2ssp, else the first one"),
    ] = None,
    texts: grids.TextOptions,
    tasks: TaskOptions,
    running: RunningOptions,
    dry_run: grids.DryRun = False,
    source: SourceOptions,
    output: OutputOptions,
) -> None:
    """Compare methods on one model, one calibration and one judgement, cell by cell.

    A cell is one method at one sparsity: a folder under DIR/cells, made once. A run that was stopped goes on where it
    was, and more methods or sparsities may be added to the same DIR. Two processes may work on one DIR.
    """
    start_logging(output.log_level, output.log_file)
    published = get_preset(preset) if preset is not None else None
    given = parse_options(option or ())
    wanted: dict[str, Any] = {"calibration": grids.default_text(model, source), "options": given}
    if published is not None:
        merged = {name: {**published.options.get(name, {}), **given.get(name, {})} for name in
                  {**published.options, **given}}  # fmt: skip
        wanted = {
            "methods": published.methods, "sparsities": published.sparsities, "of": published.of, "options": merged,
            "calibration": published.calibration, "seed": published.seed,
        }  # fmt: skip
    asked = {
        "methods": words(methods) or None, "sparsities": words(sparsities) or None, "of": of,
        "calibration": calibration.calibration, "seed": seed, "base": base,
    }  # fmt: skip
    wanted |= {name: value for name, value in asked.items() if value is not None}
    wanted["options"] = _of_the_compared(wanted["options"], given, wanted.get("methods"))
    comparison = Comparison(
        preset=preset, round_to=round_to, samples=calibration.samples, length=calibration.length,
        count=calibration.count, matched=matched, **wanted,  # type: ignore[arg-type]  # checked there
    )  # fmt: skip
    judging = texts.applied(published.judging if published is not None else grids.JUDGING)
    job = grids.GridJob(model, source, running.applied(tasks.applied(judging)), output.as_json)
    if dry_run:
        job.show_estimates(comparison.cells)
        return
    with job.grid(out_dir) as grid:
        cells = run_comparison(comparison, grid)
    try:
        job.finish(cells, grid.folder, NAME)
    finally:
        _write_page(grid.folder)


def _write_page(folder: Path) -> None:
    """The page and plots of what is there; without their extra the tables stand alone."""
    try:
        write_report(folder)
    except SecateurError as error:
        err.print(f"no page was made: {error}", markup=False, highlight=False)
    else:
        err.print(f"the report: {folder / PAGE}", markup=False, highlight=False)


def _of_the_compared(
    options: dict[str, dict[str, Any]], given: dict[str, dict[str, Any]], methods: Any
) -> dict[str, dict[str, Any]]:
    """A preset's options for methods that were deselected are left out; given ones are kept, to be refused."""
    if methods is None or tuple(methods) == ("all",):
        return options
    return {name: each for name, each in options.items() if name in methods or name in given}
