"""`secateur compare`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.groups import grouped
from secateur.cli.guard import start_logging
from secateur.cli.options import words

PRESETS = ("2ssp-paper", "slimgpt-paper")  # those of `secateur.grid.presets`, which takes torch to read


@grouped
def compare(
    model: options.ModelName,
    *,
    methods: Annotated[
        str | None, typer.Option(help="`all`, or names with commas between.", show_default="all")
    ] = None,
    sparsities: Annotated[str | None, typer.Option(help=options.SPARSITIES, show_default="paper")] = None,
    out_dir: options.GridOut = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Everything as published: {', '.join(PRESETS)}. Other options win over it.")
    ] = None,
    of: Annotated[str | None, options.OF] = None,
    round_to: Annotated[int, options.ROUND_TO] = 1,
    option: options.MethodOption = None,
    calibration: options.CalibrationOptions,
    seed: Annotated[int | None, options.SEED] = None,
    bos: Annotated[str | None, options.BOS] = None,
    matched: Annotated[
        bool,
        typer.Option("--matched/--no-matched", help="Beside each block-wise method 2SSP at the size that it achieved."),
    ] = True,
    refit: Annotated[
        bool, typer.Option("--refit", help="Beside each method that it can be put behind, a row with `prune --refit`.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="The method that differences are taken to.", show_default="2ssp, else the first one"),
    ] = None,
    texts: options.TextOptions,
    tasks: options.TaskOptions,
    running: options.RunningOptions,
    dry_run: options.GridDryRun = False,
    source: options.SourceOptions,
    workers: options.WorkerOptions,
    output: options.OutputOptions,
) -> None:
    """Compare methods on one model, one calibration and one judgement, cell by cell.

    A cell is one method at one sparsity: a folder under DIR/cells, made once. A run that was stopped goes on where it
    was, and more methods or sparsities may be added to the same DIR. Two processes may work on one DIR.
    """
    from secateur.cli import grids
    from secateur.grid.asked import parse_options
    from secateur.grid.compare import Comparison
    from secateur.grid.presets import get_preset

    start_logging(output.log_level, output.log_file)
    text, judging = grids.defaults(model, source)
    if preset is not None:
        text, judging = "", get_preset(preset).judging
    comparison = Comparison.from_preset(
        preset, methods=words(methods), sparsities=words(sparsities), of=of, round_to=round_to,
        options=parse_options(option or ()), calibration=calibration.calibration or text or None,
        samples=calibration.samples, length=calibration.length, seed=seed, count=calibration.count, bos=bos,
        matched=matched, base=base, refit=refit, text_field=source.text_field,
    )  # fmt: skip
    judging = running.applied(tasks.applied(texts.applied(judging)))
    judging = replace(judging, bos=comparison.bos)
    job = grids.GridJob(model, source, judging, output.as_json, workers.of())
    job.show_estimates(comparison) if dry_run else job.run(comparison, out_dir)
