"""What an ablation's pictures show: one per ablation and method, with a panel per measure and a line per size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from secateur.report.ablation import (
    AblatedValue,
    Group,
    against,
    difference_in_words,
    groups,
    measures,
    spread,
)
from secateur.report.comparing import ALL, Measure
from secateur.report.drawing import PAPER, Dot, add_legend, draw_dots, mark, new_figure, set_ticks
from secateur.report.looks import Look, method_name, number, percent, size_looks
from secateur.report.results import Results
from secateur.report.table import typeset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADE = 10.0  # from this ratio on an axis is logarithmic


class Places(NamedTuple):
    """Where the values of an ablation stand on its axis.

    Attributes:
        names: in the order of their places.
        at: their places: the values themselves where all are numbers, else 0, 1, ...
        numbers: whether they are.
        own: the method's default.
    """

    names: tuple[str, ...]
    at: tuple[float, ...]
    numbers: bool
    own: str | None

    @property
    def log(self) -> bool:
        return self.numbers and self.at[0] > 0 and self.at[-1] / self.at[0] >= _DECADE

    def of(self, value: AblatedValue) -> float:
        return self.at[self.names.index(value.shown)]


def places(some: Sequence[Group]) -> Places:
    """Of an ablation of one method at all sizes."""
    names = list(dict.fromkeys(value.shown for group in some for value in group.values))
    try:
        at = [float(name) for name in names]
    except ValueError:
        at = []
    if len(at) > 1 and all(map(math.isfinite, at)):
        order = sorted(range(len(at)), key=at.__getitem__)
        return Places(tuple(names[n] for n in order), tuple(at[n] for n in order), True, some[0].own)
    return Places(tuple(names), tuple(map(float, range(len(names)))), False, some[0].own)


def together(results: Results) -> dict[str, list[Group]]:
    """The groups of one picture each, by the name of its files."""
    pictures: dict[tuple[str, str], list[Group]] = {}
    for group in groups(results):
        pictures.setdefault((group.what, group.of), []).append(group)
    return {
        "ablation-" + re.sub(r"[^A-Za-z0-9._-]+", "_", f"{what}-{of}"): some for (what, of), some in pictures.items()
    }


def sizes(results: Results) -> dict[float | None, Look]:
    return size_looks(sorted({group.sparsity for group in groups(results)}, key=lambda size: size or 0.0))


def ablation_figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Every plot that the data allow, by the name of its files. Of a single text its own perplexity says it all."""
    shown = [m for m in measures(results) if m.key != ALL or len(results.texts) > 1]
    for name, some in together(results).items():
        known = [m for m in shown if any(spread(g, value, m.shown) for g in some for value in g.values)]
        if known:
            yield name, _panels(some, known, sizes(results))


def _panels(some: Sequence[Group], known: Sequence[Measure], looks: dict[float | None, Look]) -> Figure:
    figure, axes = new_figure(len(known))
    where = places(some)
    for axis, measure in zip(axes, known, strict=True):
        heights = [height for group in some for height in _line(axis, group, measure, where, looks[group.sparsity])]
        if measure.lower:
            axis.set_yscale("log")
            set_ticks(axis.yaxis, heights)
        _values(axis, where)
        axis.set(xlabel=cut(f"{some[0].what}, {method_name(some[0].of)}", 50), ylabel=cut(measure.title, 50))
    entries = {}
    for group in some:
        look, line = looks[group.sparsity], "-" if where.numbers else "none"
        entries[f"{look.name} removed"] = (look.colour, look.marker, line, look.colour)
        if any(value.matched_to for value in group.values):
            entries[f"{look.name} removed, at another's size"] = (look.colour, look.marker, "none", PAPER)
    add_legend(figure, entries)
    return figure


def _line(axis: Axes, group: Group, measure: Measure, where: Places, look: Look) -> list[float]:
    """Means with their spread, and each seed as a small point; all heights that were drawn."""
    form = number if measure.lower else percent
    dots, heights = [], []
    for value in group.values:
        over = spread(group, value, measure.shown)
        if over is None:
            continue
        x, sd, gap = where.of(value), over.sd or 0.0, against(group, value, measure)
        words = f"{value.shown}, {look.name} removed: {measure.title} {form(over.mean)}"
        words += f" ± {form(sd)} over {len(group.seeds)} seeds" if over.sd is not None else ""
        words += f"; against the default: {typeset(difference_in_words(gap, measure))}" if gap else ""
        hollow, size = bool(value.matched_to), group.sparsity
        dots.append(Dot(x, over.mean, over.mean - sd, over.mean + sd, words, hollow, size=size))
        seeds = [measure.shown(value.cells[seed]) or 0.0 for seed in group.seeds]
        mark(axis.scatter([x] * len(seeds), seeds, s=9, color=look.colour, alpha=0.45, zorder=3), size=group.sparsity)
        heights += [over.mean, *seeds]
    draw_dots(axis, dots, look.colour, look.marker, "-" if where.numbers else "none")
    return heights


def _values(axis: Axes, where: Places) -> None:
    """The values themselves are the axis' ticks; the default is named."""
    from matplotlib.ticker import NullLocator

    if where.log:
        axis.set_xscale("log")
    shown = ticked(where)
    names = [cut(where.names[n]) + ("\ndefault" if where.names[n] == where.own else "") for n in shown]
    longest = max(len(cut(where.names[n])) for n in shown)
    turned: Any = {"rotation": 30, "ha": "right"} if longest * len(shown) > 40 else {}
    axis.set_xticks([where.at[n] for n in shown], names, **turned)
    axis.xaxis.set_minor_locator(NullLocator())
    if not where.numbers:
        axis.set_xlim(-0.6, len(where.names) - 0.4)


def cut(name: str, most: int = 24) -> str:
    """A name that leaves the plot its room: a text's may be any file's."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def ticked(where: Places, most: int = 10) -> list[int]:
    """As many of the values as an axis has room for, the default among them, by their number."""
    step = math.ceil(len(where.names) / most)
    own = where.names.index(where.own) if where.own in where.names else 0
    return [n for n in range(len(where.names)) if (n - own) % step == 0]
