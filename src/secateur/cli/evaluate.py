"""`secateur eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

import secateur
from secateur.cli.groups import grouped
from secateur.cli.guard import EXIT_FAILED, err, start_logging
from secateur.cli.options import ModelName, OutputOptions, RunningOptions, SourceOptions, TaskOptions
from secateur.cli.progress import Bars
from secateur.errors import CheckpointError, InvalidOptionError


@grouped
def evaluate(
    model: ModelName,
    *,
    against: Annotated[
        str | None, typer.Option(help="Another model, usually the dense one, on the same tokens and in turn.")
    ] = None,
    perplexity: Annotated[list[str] | None, typer.Option(help="A text's name or file; may be repeated.")] = None,
    fidelity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Loss, KL divergence from the model of --against and agreement with it, on your own text or chat file "
            "(of chats only responses count); may be repeated.",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    samples: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    running: RunningOptions,
    tasks: TaskOptions,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help='Exit with code 4 if this holds of the model, as "kl>0.1"; may be repeated.'
        ),
    ] = None,
    source: SourceOptions,
    output: OutputOptions,
) -> None:
    """Judge a model, pruned or dense: perplexity, fidelity to the dense one, cost of running it, its text, tasks.

    The result of a checkpoint of secateur's is added to its secateur.json.
    """
    from secateur.cli.judged import show
    from secateur.judge.judging import Judging
    from secateur.record import append_evaluation

    start_logging(output.log_level, output.log_file)
    judging = Judging(texts=tuple(perplexity or ()), length=length, samples=samples)
    judging = running.applied(tasks.applied(judging))
    if not (fidelity or judging.texts or judging.inference or judging.prompts or judging.tasks):
        raise InvalidOptionError(
            "nothing to do: give --perplexity TEXT, --fidelity FILE, --inference, --generate PROMPT or --tasks NAME"
        )
    where: dict[str, Any] = {"device": source.device, "dtype": source.dtype, "cache": source.cache_dir}
    judged = secateur.load(model, revision=source.revision, **where)
    other = secateur.load(against, **where) if against else None
    report = secateur.evaluate(
        judged, judging, against=other, fidelity_on=fidelity or (), fail_if=fail_if or (), data=source.data,
        cache=source.cache_dir, run=secateur.Run(observer=Bars()),
    )  # fmt: skip
    stamp = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "dtype": source.dtype}
    if output.as_json:
        print(json.dumps(report))
    else:
        show(report)
    if model != "demo":  # the asset, not a folder of that name
        try:
            append_evaluation(Path(model), {**stamp, **report})
        except (OSError, CheckpointError) as error:
            err.print(f"the result could not be added to {model}/secateur.json: {error}", markup=False, highlight=False)
    _end(report.get("failed", ()))


def _end(failed: Sequence[dict[str, Any]]) -> None:
    """Say what failed, and end with a code of its own."""
    for each in failed:
        value = "not known" if each["value"] is None else f"{each['value']:.6g}"
        err.print(f"failed, {each['condition']}: {each['figure']} is {value}", markup=False, highlight=False)
    if failed:
        raise typer.Exit(EXIT_FAILED)
