"""The report: one HTML page that holds everything it needs, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from secateur.errors import MissingExtraError, OutputError
from secateur.folders import write_file
from secateur.report.ablation import Group, ablation_table, groups
from secateur.report.ablation_figures import ablation_figures, places, sizes, together
from secateur.report.ablation_verdict import AblationVerdict, ablation_verdict
from secateur.report.drawing import for_page, save
from secateur.report.figures import comparison_figures
from secateur.report.looks import count, looks, method_name, percent, times, title, written
from secateur.report.main_table import main_table
from secateur.report.results import ABLATE, CellResult, Results, read_results
from secateur.report.short_table import by_text_and_task, short_table
from secateur.report.table import text, typeset
from secateur.report.verdict import Verdict, verdict

PAGE, PLOTS = "report.html", "plots"
_CAPTIONS = {
    "perplexity-size": ("Perplexity against size", "both axes logarithmic"),
    "perplexity-time": ("Perplexity against pruning time", "both axes logarithmic"),
    "accuracy-size": ("Mean accuracy on tasks against size", "size on a logarithmic axis, accuracy on a plain one"),
    "search-curve": ("Best of the search, by generation", "both axes plain; a colour per method, a dash per size"),
}


def write_report(folder: Path) -> Verdict | AblationVerdict:
    """Make report.html and plots/ in the folder of a comparison or an ablation, anew where they are there already.

    Returns:
        What the page says in words.

    Raises:
        DataError: no compare folder, or a damaged one.
        MissingExtraError: the extra `report` is not installed.
        OutputError: the folder cannot be written.
    """
    results = read_results(folder)
    ablation = results.index.kind == ABLATE
    said = ablation_verdict(results) if ablation else verdict(results)
    drawn = ablation_figures(results) if ablation else comparison_figures(results)
    try:
        html = render(results, said, save(drawn, folder / PLOTS))
        write_file(folder / PAGE, html)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return said


def render(results: Results, said: Verdict | AblationVerdict, drawn: Mapping[str, str]) -> str:
    """The HTML of a folder's page.

    All that comes from models and users is escaped by the template, and a policy in the page's head lets the browser
    run our script only, and reach no address at all.

    Args:
        drawn: the pictures as SVG, by the name of their files.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError.of("jinja2", "report", "the report") from error
    environment = Environment(
        loader=PackageLoader("secateur.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": percent, "count": count, "times": times, "title_of": title, "words": in_words, "typeset": typeset,
        "method_name": method_name, "written": written, "facts": lambda known: list(_facts(known or {})),
    }  # fmt: skip
    script = _own("page.js")
    more = _of_ablation(results, said) if isinstance(said, AblationVerdict) else _of_comparison(results)
    pictures = {name: Markup(for_page(svg, _caption(name)[0])) for name, svg in drawn.items()}
    return environment.get_template(f"{results.index.kind}.html").render(
        results=results, index=msgspec.to_builtins(results.index), verdict=said, looks=looks(results.methods),
        commands=[on_lines(words) for words in results.index.all_commands], text=text, pictures=pictures,
        caption=_caption, style=Markup(_own("page.css")), script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {_allowed(script)}",
        **more,
    )  # fmt: skip


def _of_comparison(results: Results) -> dict[str, Any]:
    table = main_table(results)
    return {
        "table": table, "places": {row["name"]: n for n, row in enumerate(table.rows)}, "samples": samples(results),
        "short": short_table(results, measures[0]) if (measures := by_text_and_task(results)) else None,
    }  # fmt: skip


def _of_ablation(results: Results, said: AblationVerdict) -> dict[str, Any]:
    shown = groups(results)
    cards = groupby(said.findings, key=lambda each: (each.group.what, each.group.of))
    return {
        "table": ablation_table(results, shown),
        "rows": [(group, value) for group in shown for value in group.values],
        "cards": [(what, of, list(some)) for (what, of), some in cards], "sizes": sizes(results),
        "captions": {name: _ablation_caption(some) for name, some in together(results).items()},
    }  # fmt: skip


def _ablation_caption(some: Sequence[Group]) -> tuple[str, str]:
    where = places(some)
    kind = "values on a logarithmic axis" if where.log else "values on a plain axis" if where.numbers else ""
    return f"{some[0].what}, {method_name(some[0].of)}", kind or "values as words"


def _caption(name: str) -> tuple[str, str]:
    return _CAPTIONS.get(name, (name, ""))


def samples(results: Results) -> dict[tuple[str, str], list[tuple[CellResult, str]]]:
    """By prompt and settings: each cell's text, dense first."""
    texts: dict[tuple[str, str], list[tuple[CellResult, str]]] = {}
    for cell in results.done:
        for sample in cell.generation.samples if cell.generation and not cell.matched_to else ():
            words = sample.text.removeprefix(sample.prompt).strip()
            texts.setdefault((sample.prompt, in_words(sample.settings or "greedy")), []).append((cell, words))
    return texts


def _own(name: str) -> str:
    return (files("secateur.report") / "templates" / name).read_text(encoding="utf-8")


def _allowed(script: str) -> str:
    """A script by its sum, as a page's content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def in_words(value: object) -> str:
    """A setting in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(in_words(each) for each in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _facts(known: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as one list of names and values."""
    for key, value in known.items():
        if isinstance(value, dict):
            yield from _facts(value, f"{prefix}{key}, ")
        else:
            yield f"{prefix}{key}", in_words(value)


def on_lines(words: Sequence[str]) -> str:
    """A command, one option on a line."""
    return " ".join(shlex.quote(str(word)) for word in ["secateur", *words]).replace(" --", " \\\n  --")
