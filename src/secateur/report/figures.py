"""What a comparison's pictures show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from secateur.report.blocks import draw_lanes, lanes
from secateur.report.comparing import LARGEST, losses, speed
from secateur.report.drawing import INK, PAPER, Dot, add_legend, draw_dots, mark, new_figure, set_ticks
from secateur.report.looks import count, looks, number, percent, title
from secateur.report.results import CellResult, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Z = 1.96  # standard errors on either side of a 95 % interval
_DASHES = ("solid", "dashed", "dotted")  # of the sizes, where the colour is the method's
Point = tuple[float, float, float]  # a value and its 95 % interval, the value itself where none is known
Y = Callable[[CellResult], Point | None]


# --- of a comparison ---


def comparison_figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Every plot that the data allow, by the name of its files."""
    losses: dict[str, Y] = {"all texts": _over_dense(results)} if len(results.texts) > 1 else {}
    losses |= {text: _loss(results, text) for text in results.texts}
    for name, x, label in (
        ("perplexity-size", _millions, "parameters, millions"),
        ("perplexity-time", lambda cell: cell.wall_s, "pruning time, s"),
    ):
        panels = {text: y for text, y in losses.items() if any(x(c) and y(c) for c in results.pruned if c.done)}
        if panels:
            yield name, _scatter(results, x, label, panels)
    accuracy = _accuracy(results)
    if any(accuracy(cell) for cell in results.pruned if cell.done):
        yield "accuracy-size", _scatter(results, _millions, "parameters, millions", {"": accuracy})
    if curves := [cell for cell in results.pruned if cell.done and len(_curve(cell)) > 1 and not cell.matched_to]:
        yield "search-curve", _curves(results, curves)
    if timed := [cell for cell in results.pruned if speed(cell, "prefill") or speed(cell, "token")]:
        yield "inference", _inference(results, [cell for cell in timed if not cell.matched_to])
    if results.pictured:
        yield "removed", _removed(results)


def size_figure(results: Results, text: str) -> Figure:
    """Perplexity on one text against the parameters that are left, without the cells at another one's size."""
    own = replace(results, cells=tuple(cell for cell in results.cells if not cell.matched_to))
    return _scatter(own, _millions, "parameters, millions", {text: _loss(own, text)})


def _millions(cell: CellResult) -> float | None:
    return cell.parameters / 1e6 if cell.parameters else None


def _over_dense(results: Results) -> Y:
    def y(cell: CellResult) -> Point | None:
        gap = losses(results).gap(cell, results.dense) if results.dense else None
        if gap is None or gap.difference > LARGEST:
            return None
        low, high = (gap.difference if edge is None else edge for edge in (gap.low, gap.high))
        return math.exp(gap.difference), math.exp(low), math.exp(high)

    return y


def _loss(results: Results, text: str) -> Y:
    def y(cell: CellResult) -> Point | None:
        result = results.loss(cell, text)
        if result is None or result.perplexity is None:
            return None
        margin = Z * (result.nll_stderr or 0.0)
        return result.perplexity, result.perplexity * math.exp(-margin), result.perplexity * math.exp(margin)

    return y


def _accuracy(results: Results) -> Y:
    def y(cell: CellResult) -> Point | None:
        value = results.accuracy(cell)
        if value is None:
            return None
        errors = [error for task in results.average.tasks if (error := cell.tasks[task].stderr) is not None]
        known = len(errors) == len(results.average.tasks)
        margin = Z * math.hypot(*errors) / len(errors) if known else 0.0
        return value, value - margin, value + margin

    return y


def _scatter(
    results: Results, x: Callable[[CellResult], float | None], label: str, panels: Mapping[str, Y]
) -> Figure:  # fmt: skip
    """A panel per text, with a line per method through its sizes; one panel without a name is of the mean accuracy."""
    figure, axes = new_figure(len(panels))
    for axis, (name, y) in zip(axes, panels.items(), strict=True):
        drawn: list[tuple[float, float]] = []
        for method, look in looks(results.methods).items():
            dots = [_dot(results, c, x, y) for c in results.pruned if c.method == method and c.done and x(c) and y(c)]
            reduced = any(cell.reduced for cell in results.pruned if cell.method == method and cell.done)
            draw_dots(axis, dots, look.colour, look.marker, ":" if reduced else "-")
            drawn += [(dot.x, dot.y) for dot in dots]
        if results.dense and (dense := y(results.dense)):
            axis.axhline(dense[0], color=INK, linewidth=1, linestyle=":", zorder=1)
            if x is _millions and (across := _millions(results.dense)):
                axis.plot(across, dense[0], marker="*", markersize=12, color=INK, zorder=3)
                drawn.append((across, dense[0]))
        axis.set_xscale("log")
        set_ticks(axis.xaxis, [point[0] for point in drawn])
        if name:
            axis.set_yscale("log")
            set_ticks(axis.yaxis, [point[1] for point in drawn])
        measure = "perplexity over dense" if name == "all texts" else "perplexity"
        axis.set(xlabel=label, ylabel=measure if name else f"mean {results.average.metric}", title=name)
    _legend(figure, results)
    return figure


def _dot(results: Results, cell: CellResult, x: Callable[[CellResult], float | None], y: Y) -> Dot:
    """A cell's; that of one at another method's size is hollow."""
    value, low, high = y(cell) or (0.0, 0.0, 0.0)
    interval = "" if low == high else f" (95 %: {number(low)} to {number(high)})"
    took = "" if cell.wall_s is None else f", pruned in {number(cell.wall_s)} s"
    words = f"{title(cell)}, {percent(cell.removed)} removed: {number(value)}{interval}; {count(cell.parameters)}{took}"
    return Dot(x(cell) or 0.0, value, low, high, words, bool(cell.matched_to), cell.method, results.size_of(cell))


def _legend(figure: Figure, results: Results) -> None:
    entries = {look.name: (look.colour, look.marker, "-", look.colour) for look in looks(results.methods).values()}
    if any(cell.matched_to for cell in results.pruned):
        entries["2SSP, at another's size"] = (looks(["2ssp"])["2ssp"].colour, "o", "none", PAPER)
    if results.dense:
        entries["Dense"] = (INK, "*", ":", INK)
    add_legend(figure, entries)


def _curve(cell: CellResult) -> list[tuple[int, float]]:
    return [(generation, loss) for generation, loss in cell.curve or [] if loss is not None]


def _curves(results: Results, cells: Sequence[CellResult]) -> Figure:
    """The best of each search, by generation: a colour per method, a dash per size."""
    figure, (axis,) = new_figure(1)
    entries = {}
    for cell in cells:
        look, size = looks([cell.method])[cell.method], results.size_of(cell)
        dash = _DASHES[results.sparsities.index(size) % len(_DASHES)] if size in results.sparsities else "solid"
        (line,) = axis.plot(*zip(*_curve(cell), strict=True), color=look.colour, linewidth=1.8, linestyle=dash)
        name = f"{title(cell)}, {percent(size)}"
        mark(line, cell.method, size, name)
        entries[name] = (look.colour, "", dash, look.colour)
    axis.set(xlabel="generation", ylabel="loss, nats")
    add_legend(figure, entries)
    return figure


def _inference(results: Results, cells: Sequence[CellResult]) -> Figure:
    figure, axes = new_figure(2, (4.6, 0.9 + 0.26 * len(cells)))
    for axis, (kind, heading) in zip(axes, (("prefill", "prefill ms"), ("token", "ms per token")), strict=True):
        for row, cell in enumerate(cells):
            if timing := speed(cell, kind):
                (bar,) = axis.barh(row, timing.ratio, color=looks([cell.method])[cell.method].colour, height=0.7)
                words = f"{title(cell)}, {percent(cell.removed)} removed: {number(timing.value)} ms, "
                mark(bar, cell.method, results.size_of(cell), f"{words}{number(timing.ratio)}× dense")
                low, high = (timing.ratio if edge is None else edge for edge in (timing.low, timing.high))
                mark(axis.hlines(row, low, high, color=INK, linewidth=1), cell.method, results.size_of(cell))
        axis.axvline(1, color=INK, linewidth=1, linestyle=":")
        axis.set_yticks(range(len(cells)), [f"{title(cell)}, {percent(results.size_of(cell))}" for cell in cells])
        axis.tick_params(axis="y", labelsize=8, left=False, labelleft=axis is axes[0])
        axis.set(title=f"{heading}, over dense", ylim=(len(cells) - 0.5, -0.5))
        axis.grid(visible=False, axis="y")
    return figure


def _removed(results: Results) -> Figure:
    """A picture per cell, in its method's colour, method by method."""
    dense = results.dense.shape if results.dense else None
    hidden = results.index.model.hidden_size
    cells = sorted(results.pictured, key=lambda cell: results.methods.index(cell.method))
    pictures = [
        (f"{title(cell)}, {percent(results.size_of(cell))}", lanes(cell.shape or [], dense or [], hidden),
         looks([cell.method])[cell.method].colour, cell) for cell in cells
    ]  # fmt: skip
    figure, axes = new_figure(len(pictures), (3.9, 1.15), columns=3)
    for axis, (name, rows, colour, cell) in zip(axes, pictures, strict=True):
        draw_lanes(axis, rows, colour)
        axis.set_title(name, fontsize=9, loc="left")
        mark(axis, cell.method, results.size_of(cell))
    return figure
