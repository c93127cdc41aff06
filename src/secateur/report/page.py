"""The report: one HTML page that holds everything it needs, and asks no network for anything."""

from __future__ import annotations

import base64
import gzip
import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from secateur.errors import MissingExtraError, OutputError
from secateur.folders import write_file
from secateur.report.blocks import lanes, picture
from secateur.report.figures import figures, title
from secateur.report.looks import count, looks, percent, times
from secateur.report.plots import save_plots
from secateur.report.results import CellResult, Results, read_results
from secateur.report.table import PageColumn, PageRow, columns, generated, rows, running
from secateur.report.verdict import Verdict, verdict

PAGE, PLOTS = "report.html", "plots"


def write_report(folder: Path) -> Verdict:
    """Make report.html and plots/ in a compare folder, anew where they are there already.

    Returns:
        What the page says in words.

    Raises:
        DataError: no compare folder, or a damaged one.
        MissingExtraError: the extra `report` is not installed.
        OutputError: the folder cannot be written.
    """
    results = read_results(folder)
    said, drawn = verdict(results), figures(results)
    html = render(results, said, drawn)
    try:
        save_plots(results, drawn, folder / PLOTS)
        write_file(folder / PAGE, html)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return said


def render(results: Results, said: Verdict, drawn: Mapping[str, Any]) -> str:
    """The page's HTML.

    All that comes from models and users is escaped by the template, and a policy in the page's head lets the browser
    run our two scripts only, and reach no address at all.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError.of(error.name or "plotly", "report", "the report") from error
    environment = Environment(
        loader=PackageLoader("secateur.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": percent, "count": count, "times": times, "title_of": title, "words": _words,
        "facts": lambda told: list(_facts(told or {})),
    }  # fmt: skip
    script, plotly = _own("page.js"), get_plotlyjs()
    wanted = columns(results)
    return environment.get_template("page.html").render(
        results=results,
        verdict=said,
        looks=looks(results.methods),
        columns=wanted,
        rows=rows(results, wanted),
        running=_measured(results, running(results)),
        generated=_measured(results, generated(results)),
        removed=[(cell, Markup(svg)) for cell, svg in _removed(results)],
        samples=_samples(results),
        commands=[on_lines(words) for words in results.commands],
        figures=drawn,
        style=Markup(_own("page.css")),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {_allowed(script)} {_allowed(plotly)}",
        plotly=base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode(),
    )


def _measured(results: Results, wanted: list[PageColumn]) -> tuple[list[PageColumn], list[PageRow]]:
    """A table's columns, and its rows but for those of which nothing was measured."""
    found = rows(results, wanted)
    return wanted, [row for row in found if any(entry.sort is not None for entry in row.entries)]


def _own(name: str) -> str:
    return (files("secateur.report") / "templates" / name).read_text(encoding="utf-8")


def _allowed(script: str) -> str:
    """A script by its sum, as a page's content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _removed(results: Results) -> Iterator[tuple[CellResult, str]]:
    """A picture per cell, in its method's colour."""
    for cell in results.pictured:
        rows = lanes(cell.data["shape"], results.dense_shape, results.hidden_size)
        yield cell, picture(rows, title=cell.name, colour=looks([cell.method])[cell.method].colour, compact=True)


def _samples(results: Results) -> list[dict[str, Any]]:
    """By prompt and settings: each cell's text, dense first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in (each for each in results.cells if not each.matched_to):
        for sample in cell.section("generation").get("samples") or []:
            prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
            key = (prompt, _words(sample.get("settings") or "greedy"))
            found.setdefault(key, []).append({"cell": cell, "text": text.removeprefix(prompt).strip()})
    return [{"prompt": p, "settings": s, "texts": texts} for (p, s), texts in found.items()]


def _words(value: Any) -> str:
    """A setting in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(_words(each) for each in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _facts(told: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as one list of names and values."""
    for key, value in told.items():
        if isinstance(value, dict):
            yield from _facts(value, f"{prefix}{key}, ")
        else:
            yield f"{prefix}{key}", _words(value)


def on_lines(words: Sequence[str]) -> str:
    """A command, one option on a line."""
    return " ".join(shlex.quote(str(word)) for word in ["secateur", *words]).replace(" --", " \\\n  --")
