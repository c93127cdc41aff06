"""The same figures as the page's, as PNG and SVG files, by matplotlib."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import MissingExtraError
from secateur.report.blocks import lanes
from secateur.report.figures import ALL, title
from secateur.report.looks import INK, looks, percent
from secateur.report.results_before import Results

_DPI = 160
PANEL = (4.8, 3.9)  # inches
DASHES = ("solid", "dashed", "dotted")  # of the sizes, where the colour is the method's; the page has the same


def save_plots(results: Results, figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every plot that the data allow, as NAME.png and NAME.svg.

    Args:
        results: what was removed is read from it.
        figures: its numbers, as `secateur.report.figures.figures` gives them.
        folder: made if need be.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return save(_drawn(results, figures), folder)


def save(drawn: Iterable[tuple[str, Any]], folder: Path) -> list[Path]:
    """Write figures by name, all in one style; they are drawn one by one.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "report", "drawing plots") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    style: Any = {
        "svg.hashsalt": "secateur", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e7ec",
        "axes.edgecolor": "#98a0ab", "text.parse_math": False,
    }  # fmt: skip
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font has not
        for name, figure in drawn:
            for path, metadata in ((folder / f"{name}.png", None), (folder / f"{name}.svg", {"Date": None})):
                figure.savefig(path, dpi=_DPI, metadata=metadata, bbox_inches="tight")
                written.append(path)
    return written


def _drawn(results: Results, figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, x, label in (
        ("perplexity-size", "parameters", "parameters, millions"),
        ("perplexity-time", "wall_s", "pruning time, s"),
    ):
        views = [ALL, *figures["texts"]] if figures["start"] == ALL else figures["texts"]  # as the page has them
        texts = [text for text in views if _has(figures, x, text)]
        if texts:
            yield name, _panels(figures, x, label, texts)
    if any(cell["accuracy"] for cell in figures["cells"]):
        yield "accuracy-size", _panels(figures, "parameters", "parameters, millions", [None])
    if curves := [cell for cell in figures["cells"] if len(cell["curve"]) > 1 and not cell["matched"]]:
        yield "search-curve", _curves(figures, curves)
    if any(cell["speed"] for cell in figures["cells"]):
        yield "inference", _inference(figures)
    if results.pictured:
        yield "removed", _removed(results)


def _has(figures: Mapping[str, Any], x: str, text: str) -> bool:
    return any(cell[x] and text in cell["y"] for cell in figures["cells"])


def new_figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: it keeps figures and a backend for the whole process

    figure = Figure(figsize=(size[0] * columns, size[1]), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _panels(figures: Mapping[str, Any], x: str, label: str, texts: Sequence[str | None]) -> Any:
    """A panel per text or for all of them, or one of the mean accuracy where the text is None."""
    figure, axes = new_figure(len(texts), PANEL)
    scale = 1e6 if x == "parameters" else 1.0
    for axis, text in zip(axes, texts, strict=True):
        values = []
        for method in figures["methods"]:
            for style, cells in _series(figures["cells"], method["key"]):
                points = sorted((cell[x] / scale, *y) for cell in cells if cell[x] and (y := _y(cell, text)))
                if points:
                    values += points
                    _line(axis, points, method, style)
        dense = figures["dense"]
        if dense and (y := _y(dense, text)):
            axis.axhline(y[0], color=INK, linewidth=1, linestyle=":", label="Dense", zorder=1)
            if x == "parameters" and dense[x]:
                axis.plot(dense[x] / scale, y[0], marker="*", markersize=12, color=INK, zorder=3)
                values.append((dense[x] / scale, *y))
        axis.set_xscale("log")
        set_ticks(axis.xaxis, [point[0] for point in values])
        if text is not None:
            axis.set_yscale("log")
            set_ticks(axis.yaxis, [point[1] for point in values])
        axis.set(xlabel=label, ylabel=_named(figures, text), title="all texts" if text == ALL else text or "")
    add_legend(figure, axes[0])
    return figure


def _named(figures: Mapping[str, Any], text: str | None) -> str:
    return f"mean {figures['metric']}" if text is None else "perplexity over dense" if text == ALL else "perplexity"


def _y(cell: Mapping[str, Any], text: str | None) -> list[float] | None:
    found: list[float] | None = cell["accuracy"] if text is None else cell["y"].get(text)
    return found


def _series(cells: Sequence[Mapping[str, Any]], method: str) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """A method's own sizes as a line; those at another method's size are single hollow markers."""
    ours = [cell for cell in cells if cell["method"] == method]
    yield "line", [cell for cell in ours if not cell["matched"]]
    yield "matched", [cell for cell in ours if cell["matched"]]


def _line(axis: Any, points: Sequence[Sequence[float]], method: Mapping[str, Any], style: str) -> None:
    x, y, low, high = zip(*points, strict=True)
    errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
    hollow = style == "matched"
    axis.errorbar(
        x, y, yerr=errors, color=method["colour"], marker=method["marker"], markersize=7, elinewidth=1, capsize=0,
        linestyle="none" if hollow else "-", linewidth=1.8, markerfacecolor="white" if hollow else method["colour"],
        label=f"{method['name']}, at another's size" if hollow else method["name"], zorder=2,
    )  # fmt: skip


def set_ticks(axis: Any, values: Sequence[float]) -> None:
    """Round numbers as people write them; a log axis of less than a decade has hardly any by itself."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(round_numbers(min(values), max(values))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def round_numbers(low: float, high: float) -> list[float]:
    """Some round numbers for a log axis from `low` to `high`, both above 0: evenly spaced where it is short."""
    low, high = 0.93 * low, 1.07 * high
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 8)]
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step for step in (size, 2 * size, 5 * size, 10 * size) if (high - low) / step <= 7)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def add_legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)


def _curves(figures: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Any:
    """The best of each search, by generation: a colour per method, a dash per size."""
    colours = {method["key"]: method["colour"] for method in figures["methods"]}
    figure, axes = new_figure(1, (6.2, 3.9))
    for cell in cells:
        dash = DASHES[figures["sparsities"].index(cell["size"]) % len(DASHES)]
        axes[0].plot(
            *zip(*cell["curve"], strict=True), color=colours[cell["method"]], linewidth=1.8, linestyle=dash,
            label=f"{cell['label']}, {percent(cell['size'])}",
        )  # fmt: skip
    axes[0].set(xlabel="generation", ylabel="loss, nats")
    add_legend(figure, axes[0])
    return figure


def _inference(figures: Mapping[str, Any]) -> Any:
    cells = [cell for cell in figures["cells"] if cell["speed"] and not cell["matched"]]
    colours = {method["key"]: method["colour"] for method in figures["methods"]}
    figure, axes = new_figure(2, (4.6, 0.9 + 0.26 * len(cells)))
    for axis, (kind, heading) in zip(axes, (("prefill", "prefill ms"), ("token", "ms per token")), strict=True):
        for row, cell in enumerate(cells):
            if kind in cell["speed"]:
                value, low, high, _ = cell["speed"][kind]
                axis.barh(row, value, color=colours[cell["method"]], height=0.7)
                axis.plot([low, high], [row, row], color=INK, linewidth=1)
        axis.axvline(1, color=INK, linewidth=1, linestyle=":")
        axis.set_yticks(range(len(cells)), [f"{cell['label']}, {percent(cell['size'])}" for cell in cells])
        axis.tick_params(axis="y", labelsize=8, left=False, labelleft=axis is axes[0])
        axis.set(title=f"{heading}, over dense", ylim=(len(cells) - 0.5, -0.5))
        axis.grid(visible=False, axis="y")
    return figure


def _removed(results: Results) -> Any:
    """A row of columns per cell: attention, FFN, and the stream's width where it changed; what is gone is pale."""
    cells, known = results.pictured, looks(results.methods)
    figure, axes = new_figure(1, (8.0, 0.8 + 0.5 * len(cells)))
    axis = axes[0]
    for row, cell in enumerate(cells):
        drawn = lanes(cell.data["shape"], results.dense_shape, results.hidden_size)
        unit, top = 0.8 / sum(lane.height for lane in drawn), 0.45 - row
        for lane in drawn:
            height, blocks = lane.height * unit, range(len(lane.kept))
            axis.bar(blocks, [height] * len(blocks), bottom=top - height, color="#eceff3", width=0.8)
            kept = [share * height for share in lane.kept]
            axis.bar(blocks, kept, bottom=top - height, color=known[cell.method].colour, width=0.8)
            top -= height + 0.04
    names = [f"{title(cell)}, {percent(results.size_of(cell))}" for cell in cells]
    axis.set_yticks([-row for row in range(len(cells))], names, fontsize=8)
    axis.grid(visible=False)
    axis.set(xlabel="block; from above: attention, FFN, the stream's width if changed", ylim=(-len(cells) + 0.4, 0.6))
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)
    return figure
