"""`secateur ablate`."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from secateur.cli import grids
from secateur.cli.groups import grouped
from secateur.cli.guard import start_logging
from secateur.cli.options import ModelName, OfShare, OutputOptions, SourceOptions, TaskOptions, words
from secateur.errors import InvalidOptionError
from secateur.grid.ablate import WHATS, Ablation
from secateur.grid.ablate import ablate as run_ablation
from secateur.grid.words import parse_options
from secateur.report.ablation import NAME


@grouped
def ablate(
    model: ModelName,
    *,
    what: Annotated[
        list[str],
        typer.Option(metavar="NAME,...", help="What is ablated, of the names above; may be repeated."),
    ],
    out_dir: grids.OutDir = None,
    values: Annotated[
        str | None, typer.Option(help="The values to try, commas between; the papers' if not given. For one --what.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Another method that has the same option.")] = None,
    sparsities: Annotated[str, typer.Option(help=grids.SPARSITIES)] = "0.5",
    seeds: Annotated[str, typer.Option(help="Repeats: 0 takes the text's first windows, any other a draw.")] = "0,1,2",
    of: OfShare = "blocks",
    option: grids.MethodOption = None,
    calibration: grids.CalibrationOptions,
    texts: grids.TextOptions,
    tasks: TaskOptions,
    dry_run: grids.DryRun = False,
    source: SourceOptions,
    output: OutputOptions,
) -> None:
    """Vary one choice of a method at a time, repeated over seeds: mean and standard deviation.

    The ablations of the 2SSP and SlimGPT papers. Restartable as `secateur compare` is. --what is one of:
    """
    start_logging(output.log_level, output.log_file)
    ablation = Ablation(
        what=words(what), values=words(values), method=method, sparsities=words(sparsities), seeds=_seeds(seeds), of=of,  # type: ignore[arg-type]  # checked there
        options=parse_options(option or ()), calibration=calibration.calibration or grids.default_text(model, source),
        samples=calibration.samples, length=calibration.length, count=calibration.count,  # type: ignore[arg-type]  # checked there
    )  # fmt: skip
    job = grids.GridJob(
        model, source, tasks.applied(texts.applied(grids.default_judging(model, source))), output.as_json
    )
    if dry_run:
        job.show_estimates(ablation.cells)
        return
    with job.grid(out_dir) as grid:
        cells = run_ablation(ablation, grid)
    try:
        job.finish(cells, grid.folder, NAME)
    finally:
        grids.write_page(grid.folder)


_LISTED = [f"- {name}: {each.help} ({each.method})" for name, each in WHATS.items()]
ablate.__doc__ = "\n".join([inspect.cleandoc(ablate.__doc__ or ""), *_LISTED])


def _seeds(text: str) -> list[int]:
    found = words(text)
    if not all(seed.isdecimal() for seed in found):
        raise InvalidOptionError(f"--seeds takes whole numbers with commas between, as 0,1,2; not {text!r}")
    return [int(seed) for seed in found]
