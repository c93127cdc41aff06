"""`secateur eval`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from secateur import api
from secateur.cli.guard import err, out, start_logging
from secateur.cli.options import (
    CacheDir,
    Data,
    Device,
    Dtype,
    Json,
    LogFile,
    LogLevel,
    ModelName,
    Revision,
)  # fmt: skip
from secateur.cli.progress import Bars
from secateur.cli.tasks import Fewshot, Limit, Tasks, task_rows, unfolded
from secateur.errors import CheckpointError, InvalidOptionError
from secateur.model.load import load
from secateur.report.record import append_evaluation
from secateur.run import Run


def evaluate(
    model: ModelName,
    against: Annotated[
        str | None, typer.Option(help="Another model, usually the dense one, on the same tokens and in turn.")
    ] = None,
    perplexity: Annotated[list[str] | None, typer.Option(help="A text's name or file; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    samples: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Time the prompt and each further token.")] = False,
    generate: Annotated[list[str] | None, typer.Option(help="Continue this prompt; may be repeated.")] = None,
    tasks: Tasks = None,
    limit: Limit = None,
    fewshot: Fewshot = None,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    data: Data = None,
    cache_dir: CacheDir = None,
    log_level: LogLevel = "warning",
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Judge a model, pruned or dense: perplexity, latency, samples of its text, downstream tasks.

    The result of a checkpoint of secateur's is added to its secateur.json.
    """
    start_logging(log_level, log_file)
    if not (perplexity or latency or generate or tasks):
        raise InvalidOptionError("nothing to do: give --perplexity TEXT, --latency, --generate PROMPT or --tasks NAME")
    options: dict[str, Any] = {"device": device, "dtype": dtype, "cache": cache_dir}
    judged = load(model, revision=revision, **options)
    other = load(against, **options) if against else None
    report = api.evaluate(
        judged, against=other, perplexity_on=perplexity or (), length=length, samples=samples, with_latency=latency,
        prompts=generate or (), tasks=unfolded(tasks), limit=limit, fewshot=fewshot, data=data, cache=cache_dir,
        run=Run(observer=Bars()),
    )  # fmt: skip
    stamp = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "dtype": dtype}
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
    if model == "demo":  # the asset, not a folder of that name
        return
    try:
        append_evaluation(Path(model), {**stamp, **report})
    except (OSError, CheckpointError) as error:
        err.print(f"the result could not be added to {model}/secateur.json: {error}", markup=False, highlight=False)


def _show(report: dict[str, Any]) -> None:
    columns = list(reversed(report.values()))  # what it is judged against stands first
    names = [PurePath(str(each["name"])).name for each in columns]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", *names):
        table.add_column(escape(heading), no_wrap=True)

    def row(name: str, values: list[float], form: str) -> None:
        change = [f"{values[1] / values[0] - 1:+.1%}"] if len(values) == 2 else []
        table.add_row(escape(name), *(format(value, form) for value in values), *change)

    if len(columns) == 2:
        table.add_column("")
    row("parameters", [each["parameters"] for each in columns], ",")
    row("weights, MB", [each["weight_bytes"] / 1e6 for each in columns], ",.1f")
    for results in zip(*(each.get("perplexity", []) for each in columns), strict=True):
        first = results[0]
        row(
            f"perplexity, {PurePath(str(first['text'])).name}, {first['samples']} x {first['length']}",
            [each["perplexity"] for each in results],
            ".2f",
        )
    if all("latency" in each for each in columns):
        length = columns[0]["latency"]["prompt_length"]
        row(f"prompt of {length}, ms", [each["latency"]["prefill_ms"] for each in columns], ".1f")
        row("each further token, ms", [each["latency"]["token_ms"] for each in columns], ".1f")
    remarks = task_rows(table, columns)
    out.print(table)
    for remark in remarks:
        out.print(remark, style="dim", markup=False, highlight=False)
    for name, each in zip(names, columns, strict=True):
        for sample in each.get("samples", []):
            out.print(f"\n{name}: {sample['prompt']}", style="bold", markup=False, highlight=False)
            out.print(sample["text"].strip(), markup=False, highlight=False)
