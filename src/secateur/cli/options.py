"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or `demo` (SmolLM2-135M-Instruct).")
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ...; auto spreads over all. CUDA where there is one, if not given."),
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Data = Annotated[
    Path | None,
    typer.Option(envvar="SECATEUR_DATA", help="Folder with the named texts, for machines without a hub."),
]
CacheDir = Annotated[Path | None, typer.Option(envvar="SECATEUR_CACHE", help="Where fetched models and texts lie.")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
LogFile = Annotated[Path | None, typer.Option(help="Log to this file too.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to stderr.")]
