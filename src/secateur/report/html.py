"""What all pages are made of: a template, our script and style, plotly, and the policy that shuts the rest out."""

from __future__ import annotations

import base64
import gzip
import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from secateur.errors import MissingExtraError
from secateur.report.figures import title
from secateur.report.looks import count, looks, method_name, percent, times
from secateur.report.results_before import Results


def make_html(template: str, script: str, results: Results, figures: Mapping[str, Any], **more: Any) -> str:
    """A page.

    All that comes from models and users is escaped by the template, and a policy in the page's head lets the browser
    run our two scripts only, and reach no address at all.

    Args:
        template, script: files among the templates; the script runs after the one that all pages share.
        figures: what the script draws, in plain JSON.
        more: what the template asks for beside.

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
        "percent": percent, "count": count, "times": times, "title_of": title, "words": in_words,
        "method_name": method_name, "facts": lambda told: list(_facts(told or {})),
    }  # fmt: skip
    ours, plotly = _own("shared.js") + _own(script), get_plotlyjs()
    return environment.get_template(template).render(
        results=results,
        looks=looks(results.methods),
        commands=[on_lines(words) for words in results.commands],
        figures=figures,
        style=Markup(_own("page.css")),
        script=Markup(ours),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {_allowed(ours)} {_allowed(plotly)}",
        plotly=base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode(),
        **more,
    )


def _own(name: str) -> str:
    return (files("secateur.report") / "templates" / name).read_text(encoding="utf-8")


def _allowed(script: str) -> str:
    """A script by its sum, as a page's content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def in_words(value: Any) -> str:
    """A setting in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(in_words(each) for each in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _facts(told: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as one list of names and values."""
    for key, value in told.items():
        if isinstance(value, dict):
            yield from _facts(value, f"{prefix}{key}, ")
        else:
            yield f"{prefix}{key}", in_words(value)


def on_lines(words: Sequence[str]) -> str:
    """A command, one option on a line."""
    return " ".join(shlex.quote(str(word)) for word in ["secateur", *words]).replace(" --", " \\\n  --")
