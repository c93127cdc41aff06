"""`secateur compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import grids
from secateur.cli.guard import err, start_logging
from secateur.cli.options import CacheDir, Data, Device, Dtype, Json, LogFile, LogLevel, ModelName, Revision
from secateur.errors import SecateurError
from secateur.report.page import PAGE, write_report
from secateur.study.asked import parse_options
from secateur.study.cells import Judging
from secateur.study.compare import Comparison
from secateur.study.compare import compare as run_comparison
from secateur.study.main_table import NAME
from secateur.study.presets import PRESETS, get_preset


def compare(
    model: ModelName,
    methods: Annotated[str | None, typer.Option(help="`all`, or names with commas between. [all]")] = None,
    sparsities: Annotated[
        str | None,
        typer.Option(
            help="Numbers between 0 and 1 with commas between; `paper` is 0.25,0.375,0.5, `every-block` every number "
            "of blocks. [paper]"
        ),
    ] = None,
    out_dir: grids.OutDir = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Everything as published: {', '.join(PRESETS)}. Other options win over it.")
    ] = None,
    of: Annotated[
        str | None, typer.Option(help="A share of the `blocks`' parameters or of the `model`'s. [blocks]")
    ] = None,
    round_to: Annotated[int, typer.Option(help="Round FFN widths to a multiple of this.")] = 1,
    option: grids.MethodOption = None,
    calibration: grids.Calibration = None,
    samples: grids.Samples = None,
    length: grids.Length = None,
    seed: Annotated[int | None, typer.Option(help="0: the calibration's first windows; n: a draw of them. [0]")] = None,
    count: Annotated[str, typer.Option(help="Which tokens count: all, or only the responses in chat data.")] = "all",
    matched: Annotated[
        bool, typer.Option("--matched", help="Beside each block-wise method 2SSP at the size that it achieved.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The method that differences are taken to; 2ssp, else the first one.")
    ] = None,
    texts: grids.Texts = None,
    eval_samples: grids.EvalSamples = None,
    eval_length: grids.EvalLength = None,
    tasks: grids.Tasks = None,
    limit: grids.Limit = None,
    fewshot: grids.FewShot = None,
    inference: Annotated[
        bool | None, typer.Option("--inference", help="Time prompt and tokens, dense and pruned in turn.")
    ] = None,
    generate: Annotated[list[str] | None, typer.Option(help="Continue this prompt; may be repeated.")] = None,
    dry_run: grids.DryRun = False,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    data: Data = None,
    cache_dir: CacheDir = None,
    log_level: LogLevel = "warning",
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Compare methods on one model, one calibration and one judgement, cell by cell.

    A cell is one method at one sparsity: a folder under DIR/cells, made once. A run that was stopped goes on where it
    was, and more methods or sparsities may be added to the same DIR. Two processes may work on one DIR.
    """
    start_logging(log_level, log_file)
    source = grids.Source(model, device, dtype, revision, data, cache_dir)
    published = get_preset(preset) if preset is not None else None
    given = parse_options(option or ())
    wanted: dict[str, Any] = {"calibration": source.default_text(), "options": given}
    default = Judging()
    if published is not None:
        default = published.judging
        merged = {name: {**published.options.get(name, {}), **given.get(name, {})} for name in
                  {**published.options, **given}}  # fmt: skip
        wanted = {
            "methods": published.methods, "sparsities": published.sparsities, "of": published.of, "options": merged,
            "calibration": published.calibration, "seed": published.seed,
        }  # fmt: skip
    asked = {
        "methods": grids.words(methods) or None, "sparsities": grids.words(sparsities) or None, "of": of,
        "calibration": calibration, "seed": seed, "base": base,
    }  # fmt: skip
    wanted |= {name: value for name, value in asked.items() if value is not None}
    wanted["options"] = _of_the_compared(wanted["options"], given, wanted.get("methods"), matched)
    comparison = Comparison(
        preset=preset, round_to=round_to, samples=samples, length=length, count=count, matched=matched, **wanted,  # type: ignore[arg-type]  # checked there
    )  # fmt: skip
    judging = grids.judging_of(
        default, texts=texts, samples=eval_samples, length=eval_length, tasks=tasks, limit=limit, fewshot=fewshot,
        inference=inference, prompts=generate,
    )  # fmt: skip
    if dry_run:
        grids.show_estimates(source, comparison.cells, judging, as_json)
        return
    grid = grids.grid_of(source, out_dir, judging)
    cells = run_comparison(comparison, grid)
    try:
        grids.finish(cells, Path(grid.folder), NAME, as_json)
    finally:
        _write_page(Path(grid.folder))


def _write_page(folder: Path) -> None:
    """The page and plots of what is there; without their extra the tables stand alone."""
    try:
        write_report(folder)
    except SecateurError as error:
        err.print(f"no page was made: {error}", markup=False, highlight=False)
    else:
        err.print(f"the report: {folder / PAGE}", markup=False, highlight=False)


def _of_the_compared(
    options: dict[str, dict[str, Any]], given: dict[str, dict[str, Any]], methods: Any, matched: bool
) -> dict[str, dict[str, Any]]:
    """A preset's options for methods that were deselected are left out; given ones are kept, to be refused."""
    if methods is None or tuple(methods) == ("all",):
        return options
    return {name: each for name, each in options.items() if name in methods or name in given}
