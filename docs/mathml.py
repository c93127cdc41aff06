"""Equations of the site as MathML, which browsers draw themselves: no script, no font, no network. A hook of mkdocs."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# what pymdownx.arithmatex leaves: \( \) in a span, \[ \] in a div
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)


def _mathml(found: re.Match[str]) -> str:
    kind, tex = found.groups()
    drawn = convert(html.unescape(tex), display="block" if kind == "div" else "inline")
    return f'<{kind} class="arithmatex">{drawn}</{kind}>'


def on_page_content(content: str, **_: Any) -> str:
    """A page's HTML with its equations drawn."""
    return _EQUATION.sub(_mathml, content)
