"""How pictures are drawn and kept: by matplotlib, once, as PNG and SVG in plots/; a page holds the same SVG."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from secateur.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, SOFT, LINE, PAPER = "#30343b", "#98a0ab", "#e4e7ec", "#ffffff"
_ON_PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", PAPER: "var(--card)"}
_DPI, PANEL = 160, (4.8, 3.9)  # inches
_WIDE = 500  # points, from which on a picture stands alone on its row
_MARK = "¦"  # parts a mark's kind, method, size and words
Drawn = Iterable[tuple[str, "Figure"]]


def save(drawn: Drawn, folder: Path) -> dict[str, str]:
    """Write figures as NAME.png and NAME.svg, all in one style; they are drawn one by one.

    Returns:
        The SVGs by name.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    svgs = {}
    with styled():
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn:
            svgs[name] = to_svg(figure)
            (folder / f"{name}.svg").write_text(svgs[name], encoding="utf-8")
            figure.savefig(folder / f"{name}.png", dpi=_DPI)
    return svgs


@contextmanager
def styled() -> Iterator[None]:
    """The style of all pictures.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "report", "drawing plots") from error
    style: Any = {
        "svg.hashsalt": "secateur", "svg.fonttype": "none", "font.size": 10, "lines.linewidth": 1.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": LINE,
        "axes.edgecolor": SOFT, "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    }  # fmt: skip
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font has not
        yield


def to_svg(figure: Figure) -> str:
    """A figure drawn, with its marks as SVG has them."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # it has been laid out, which takes time
    return _titled(out.getvalue())


def mark(artist: Artist, method: str = "", size: float | None = None, words: str = "") -> None:
    """What a mark is of, for the page's switches, and what it says under the pointer."""
    parts = (method.replace(_MARK, "|").replace('"', "”"), "" if size is None else str(size), words.replace('"', "”"))
    artist.set_gid(_MARK.join(("mark", *parts)))


def _titled(svg: str) -> str:
    """Marks as SVG has them; other ids of elements, which are of no use, left out."""

    def group(found: re.Match[str]) -> str:
        method, size, words = found.groups()
        data = "".join(f' data-{name}="{value}"' for name, value in (("method", method), ("size", size)) if value)
        return f"<g{data}>" + (f"<title>{words}</title>" if words else "")

    svg = re.sub(rf'<g id="mark{_MARK}([^{_MARK}"]*){_MARK}([^{_MARK}"]*){_MARK}([^"]*)">', group, svg)
    return re.sub(r'(<g) id="[\w.]+_\d+"', r"\1", svg)


def for_page(svg: str, label: str) -> str:
    """An SVG as part of a page, in the page's colours; `label` is what a screen reader says."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    for colour, variable in _ON_PAGE.items():
        body = body.replace(colour, variable)
    width = float(re.findall(r'width="([\d.]+)pt"', body)[0])
    escaped = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    body = re.sub(r' (width|height)="[\d.]+pt"', "", body, count=2)
    tag = f'<svg role="img" aria-label="{escaped}" class="{"wide" if width > _WIDE else ""}"'
    return body.replace("<svg", f'{tag} style="--width: {4 / 3 * width:.0f}px"', 1)


def new_figure(panels: int, size: tuple[float, float] = PANEL, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """Panels in rows of `columns`, of `size` inches each."""
    from matplotlib.figure import Figure  # no pyplot: it keeps figures and a backend for the whole process
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    across, down = min(panels, columns), math.ceil(panels / columns)
    layout = ConstrainedLayoutEngine(h_pad=0.08)  # inches, between a row's labels and the titles below
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout=layout)
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


class Dot(NamedTuple):
    """A point of a line, with its range; `hollow` ones are on no line. `words` are what it says under the pointer."""

    x: float
    y: float
    low: float
    high: float
    words: str
    hollow: bool = False
    method: str = ""
    size: float | None = None


def draw_dots(axis: Axes, dots: Sequence[Dot], colour: str, marker: str, line: Any = "-") -> None:
    """Draw points from left to right, and a line through those that are not hollow."""
    dots = sorted(dots, key=lambda dot: dot.x)
    solid = [dot for dot in dots if not dot.hollow]
    if solid and line != "none":
        (path,) = axis.plot([dot.x for dot in solid], [dot.y for dot in solid], color=colour, linestyle=line, zorder=2)
        mark(path, solid[0].method, solid[0].size if len({dot.size for dot in solid}) == 1 else None)
    for dot in dots:
        bar = axis.vlines(dot.x, dot.low, dot.high, color=colour, linewidth=1.1, zorder=2)
        mark(bar, dot.method, dot.size)
        face = PAPER if dot.hollow else colour
        (point,) = axis.plot(dot.x, dot.y, marker=marker, markersize=7, color=colour, markerfacecolor=face, zorder=2.5)
        mark(point, dot.method, dot.size, dot.words)


def set_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Numbers as people write them; a log axis of less than a decade has hardly any by itself."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    decades = math.log10(max(values) / min(values))
    steps = ((1.0, (1.0, 1.5, 2.0, 3.0, 5.0)), (1.5, (1.0, 2.0, 5.0)), (3.0, (1.0, 3.0)), (math.inf, (1.0,)))
    subs = next(some for most, some in steps if decades < most)
    axis.set_major_locator(MaxNLocator(6) if decades < 0.6 else LogLocator(subs=subs, numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def add_legend(figure: Figure, entries: Mapping[str, tuple[str, str, Any, str]]) -> None:
    """By name: colour, marker, style of the line, and the marker's face."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle=line, markerfacecolor=face, label=name)
        for name, (colour, marker, line, face) in entries.items()
    ]
    fit = int(figure.get_figwidth() / (0.45 + 0.065 * max(map(len, entries))))  # inches: a handle, and a letter each
    columns = max(1, min(fit, len(entries)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
