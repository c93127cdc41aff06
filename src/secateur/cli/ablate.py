"""`secateur ablate`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from secateur.cli import options
from secateur.cli.groups import grouped
from secateur.cli.guard import start_logging
from secateur.cli.options import words
from secateur.errors import InvalidOptionError


@grouped
def ablate(
    model: options.ModelName,
    *,
    what: Annotated[
        list[str],
        typer.Option(metavar="NAME,...", help="What is ablated, of the names above; may be repeated."),
    ],
    out_dir: options.GridOut = None,
    values: Annotated[
        str | None, typer.Option(help="The values to try, commas between; the papers' if not given. For one --what.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Another method that has the same option.")] = None,
    sparsities: Annotated[str, typer.Option(help=options.SPARSITIES)] = "0.5",
    seeds: Annotated[str, typer.Option(help="Repeats: 0 takes the text's first windows, any other a draw.")] = "0,1,2",
    of: options.OfShare = "blocks",
    bos: Annotated[str, options.BOS] = "auto",
    option: options.MethodOption = None,
    calibration: options.CalibrationOptions,
    texts: options.TextOptions,
    tasks: options.TaskOptions,
    dry_run: options.GridDryRun = False,
    source: options.SourceOptions,
    workers: options.WorkerOptions,
    output: options.OutputOptions,
) -> None:
    """Vary one choice of a method at a time, repeated over seeds: mean and standard deviation.

    The ablations of the 2SSP and SlimGPT papers. Restartable as `secateur compare` is. --what is one of:
    """
    from secateur.cli import grids
    from secateur.grid.ablate import Ablation
    from secateur.grid.asked import parse_options

    start_logging(output.log_level, output.log_file)
    text, judging = grids.defaults(model, source)
    ablation = Ablation(
        what=words(what), values=words(values), method=method, sparsities=words(sparsities), seeds=_seeds(seeds), of=of,  # type: ignore[arg-type]  # checked there
        options=parse_options(option or ()), calibration=calibration.calibration or text,
        samples=calibration.samples, length=calibration.length, count=calibration.count, bos=bos,  # type: ignore[arg-type]  # checked there
        text_field=source.text_field,
    )  # fmt: skip
    judging = replace(tasks.applied(texts.applied(judging)), bos=ablation.bos)
    job = grids.GridJob(model, source, judging, output.as_json, workers.of())
    job.show_estimates(ablation) if dry_run else job.run(ablation, out_dir)


class _What(msgspec.Struct):
    method: str
    help: str


_TABLE = Path(__file__).parents[1] / "grid" / "ablations.toml"
_WHATS = msgspec.toml.decode(_TABLE.read_bytes(), type=dict[str, _What])
_LISTED = [f"- {name}: {what.help} ({what.method})" for name, what in _WHATS.items()]
ablate.__doc__ = "\n".join([inspect.cleandoc(ablate.__doc__ or ""), *_LISTED])


def _seeds(text: str) -> list[int]:
    found = words(text)
    if not all(seed.isdecimal() for seed in found):
        raise InvalidOptionError(f"--seeds takes whole numbers with commas between, as 0,1,2; not {text!r}")
    return [int(seed) for seed in found]
