"""`secateur cache`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from secateur.cli.guard import note, out, say
from secateur.cli.options import CacheDir, Json
from secateur.cli.progress import in_words
from secateur.errors import InvalidOptionError

if TYPE_CHECKING:
    from secateur.assets import Cached


def cache(
    action: Annotated[Literal["list", "clear"], typer.Argument(help="What to do.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="clear: names that `list` shows, or that `fetch` takes."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="clear: all that `list` shows.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="TIME", help="clear: only what was written longer ago, as 30d or 12h.")
    ] = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """List or clear the models, texts and rows of tasks that were fetched.

    What else lies in the folder stays, and what a running fetch writes. What came from the hub is in its own cache:
    `hf cache ls`.
    """
    from msgspec import to_builtins

    from secateur.assets import cache_dir as place
    from secateur.assets import clear_cached, list_cached
    from secateur.quantities import seconds_of

    folder = place(cache_dir)
    if action == "list":
        if names or everything or older_than:
            raise InvalidOptionError("names, --all and --older-than are of `secateur cache clear`")
        entries = list_cached(cache_dir)
    else:
        age = seconds_of(older_than, "--older-than") if older_than else 0.0
        if names and everything:
            raise InvalidOptionError("give names or --all, not both")
        if not (names or everything or older_than):
            _ask(list_cached(cache_dir), asks=not as_json and sys.stdin.isatty())
        entries = clear_cached(cache_dir, names or None, older_than_s=age)
    if as_json:
        what = "entries" if action == "list" else "removed"
        print(json.dumps({"cache": str(folder), what: to_builtins(entries)}))
        return
    _show(entries)
    done = "in" if action == "list" else "removed from"
    say(f"{sum(each.bytes for each in entries) / 1e6:,.1f} MB {done} {folder}")


def _ask(entries: Sequence[Cached], *, asks: bool) -> None:
    """Let whoever sits there decide; nobody does in a script."""
    if not asks:
        raise InvalidOptionError("say what to clear: names that `secateur cache list` shows, --older-than, or --all")
    _show(entries)
    if not (entries and typer.confirm("Remove all of this?", err=True)):
        note("nothing was removed")
        raise typer.Exit


def _show(entries: Sequence[Cached]) -> None:
    table = Table("name", "what", "fetched by", box=None, pad_edge=False)
    table.add_column("MB", justify="right")
    table.add_column("age", justify="right")
    for each in entries:
        by = "running, or killed today" if each.busy else f"fetch {each.fetched_by}" if each.fetched_by else "killed"
        table.add_row(escape(each.name), each.kind, by, f"{each.bytes / 1e6:,.1f}", in_words(each.age_s))
    if entries:
        out.print(table)
