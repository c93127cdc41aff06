"""`secateur ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import grids
from secateur.cli.guard import start_logging
from secateur.cli.options import CacheDir, Data, Device, Dtype, Json, LogFile, LogLevel, ModelName, Revision
from secateur.errors import InvalidOptionError
from secateur.study.ablate import WHATS, Ablation
from secateur.study.ablate import ablate as run_ablation
from secateur.study.ablation_table import NAME
from secateur.study.asked import parse_options
from secateur.study.cells import Judging


def ablate(
    model: ModelName,
    what: Annotated[
        list[str],
        typer.Option(
            help="; ".join(f"{name}: {each.help} ({each.method})" for name, each in WHATS.items())
            + ". May be repeated."
        ),
    ],
    out_dir: grids.OutDir = None,
    values: Annotated[
        str | None, typer.Option(help="The values to try, commas between; the papers' if not given. For one --what.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Another method that has the same option.")] = None,
    sparsities: Annotated[str, typer.Option(help="As in `secateur compare`.")] = "0.5",
    seeds: Annotated[str, typer.Option(help="Repeats: 0 takes the text's first windows, any other a draw.")] = "0,1,2",
    of: grids.OfShare = "blocks",
    option: grids.MethodOption = None,
    calibration: grids.Calibration = None,
    samples: grids.Samples = None,
    length: grids.Length = None,
    count: Annotated[str, typer.Option(help="Which tokens count: all, or only the responses in chat data.")] = "all",
    texts: grids.Texts = None,
    eval_samples: grids.EvalSamples = None,
    eval_length: grids.EvalLength = None,
    tasks: grids.Tasks = None,
    limit: grids.Limit = None,
    fewshot: grids.FewShot = None,
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
    """Vary one choice of a method at a time, repeated over seeds: mean and standard deviation.

    The ablations of the 2SSP and SlimGPT papers. Restartable as `secateur compare` is.
    """  # fmt: skip
    start_logging(log_level, log_file)
    source = grids.Source(model, device, dtype, revision, data, cache_dir)
    ablation = Ablation(
        what=[name for each in what for name in grids.words(each)], values=grids.words(values), method=method,
        sparsities=grids.words(sparsities), seeds=_seeds(seeds), of=of, options=parse_options(option or ()),  # type: ignore[arg-type]  # checked there
        calibration=calibration or source.default_text(), samples=samples, length=length, count=count,  # type: ignore[arg-type]  # checked there
    )  # fmt: skip
    judging = grids.judging_of(
        Judging(), texts=texts, samples=eval_samples, length=eval_length, tasks=tasks, limit=limit, fewshot=fewshot,
        inference=None, prompts=None,
    )  # fmt: skip
    if dry_run:
        grids.show_estimates(source, ablation.cells, judging, as_json)
        return
    grid = grids.grid_of(source, out_dir, judging)
    cells = run_ablation(ablation, grid)
    grids.finish(cells, Path(grid.folder), NAME, as_json)


def _seeds(text: str) -> list[int]:
    found = grids.words(text)
    if not all(seed.isdecimal() for seed in found):
        raise InvalidOptionError(f"--seeds takes whole numbers with commas between, as 0,1,2; not {text!r}")
    return [int(seed) for seed in found]
