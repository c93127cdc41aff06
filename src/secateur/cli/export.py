"""`secateur export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.groups import grouped
from secateur.cli.guard import say, start_logging
from secateur.cli.options import SHARD_SIZE, ModelName, OutputOptions, Overwrite, StreamOptions


def _export(
    model: ModelName,
    *,
    to: Annotated[
        str,
        typer.Option("--to", help="gguf, vllm, nemotron-nas or padded; `secateur inspect MODEL` says which fit."),
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    type_: Annotated[
        str | None,
        typer.Option("--type", help="Type of gguf's numbers: f32, f16 (the default), bf16, q8_0 or q4_0."),
    ] = None,
    overwrite: Overwrite = False,
    max_shard_size: Annotated[str | None, SHARD_SIZE] = None,
    source: StreamOptions,
    output: OutputOptions,
) -> None:
    """Write a model for an engine that does not know secateur, with the same logits up to the type of its numbers.

    A format that cannot hold the model exactly is refused before any work, with the reason and one that can.
    """
    from secateur.output import Output, export_to

    start_logging(output.log_level, output.log_file)
    given = {"type": type_, "max_shard_size": max_shard_size}
    options = {name: value for name, value in given.items() if value is not None}
    loads_in = export_to(source.of(model), to, Output(out_dir, overwrite), **options)
    if output.as_json:
        print(json.dumps({"out": str(out_dir), "to": to, "loads_in": loads_in, **options}))
    else:
        say(f"written to {out_dir} as {to}; it loads in {loads_in}")


export = grouped(_export)
