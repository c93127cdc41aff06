"""An ablation's plots as PNG and SVG files, by matplotlib, from the same numbers as the page's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.report.plots import PANEL, add_legend, new_figure, save, set_ticks
from secateur.report.results_before import Results


def save_ablation_plots(results: Results, figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a figure per ablation, with a panel per measure, as NAME.png and NAME.svg.

    Args:
        figures: its numbers, as `secateur.report.ablated_page.ablation_figures` gives them.
        folder: made if need be.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return save(_drawn(figures), folder)


def _drawn(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for plot in figures["plots"]:
        there = [measure for measure in figures["measures"] if _has(plot, measure["key"])]
        if there:
            yield plot["name"], _panels(plot, there, figures["sizes"])


def _has(plot: Mapping[str, Any], key: str) -> bool:
    return any(key in point["y"] for line in plot["lines"] for point in line["points"])


def _panels(plot: Mapping[str, Any], there: Sequence[Mapping[str, Any]], sizes: Sequence[Mapping[str, Any]]) -> Any:
    figure, axes = new_figure(len(there), PANEL)
    for axis, measure in zip(axes, there, strict=True):
        heights = [height for size in sizes for height in _line(axis, plot, measure["key"], size)]
        if measure["log"]:
            axis.set_yscale("log")
            set_ticks(axis.yaxis, heights)
        _values(axis, plot)
        axis.set(xlabel=cut(plot["title"], 50), ylabel=cut(measure["title"], 50))
    add_legend(figure, axes[0])
    return figure


def _line(axis: Any, plot: Mapping[str, Any], key: str, size: Mapping[str, Any]) -> list[float]:
    """Means with their spread, and each seed as a small point; all heights that were drawn."""
    heights: list[float] = []
    points = [p for line in plot["lines"] if line["size"] == size["size"] for p in line["points"] if key in p["y"]]
    for hollow in (False, True):
        some = [point for point in points if point["hollow"] == hollow]
        if not some:
            continue
        x = [plot["values"][point["value"]]["x"] for point in some]
        means = [point["y"][key]["mean"] for point in some]
        each = [(at, y) for at, point in zip(x, some, strict=True) for y in point["y"][key]["each"].values()]
        axis.errorbar(
            x, means, yerr=[point["y"][key]["sd"] or 0.0 for point in some], color=size["colour"], capsize=3,
            marker=size["marker"], markersize=7, linewidth=1.8, elinewidth=1.2, zorder=2,
            linestyle="-" if plot["numbers"] and not hollow else "none",
            markerfacecolor="white" if hollow else size["colour"],
            label=f"{size['name']} removed" + (", at another's size" if hollow else ""),
        )  # fmt: skip
        axis.scatter(*zip(*each, strict=True), s=9, color=size["colour"], alpha=0.45, zorder=3)
        heights += [*means, *(y for _, y in each)]
    return heights


def _values(axis: Any, plot: Mapping[str, Any]) -> None:
    """The values themselves are the axis' ticks; the default is named."""
    from matplotlib.ticker import NullLocator

    if plot["log"]:
        axis.set_xscale("log")
    values = ticked(plot["values"])
    names = [cut(value["shown"]) + ("\ndefault" if value["default"] else "") for value in values]
    longest = max(len(cut(value["shown"])) for value in values)
    turned = {"rotation": 30, "ha": "right"} if longest * len(values) > 40 else {}
    axis.set_xticks([value["x"] for value in values], names, **turned)
    axis.xaxis.set_minor_locator(NullLocator())
    if not plot["numbers"]:
        axis.set_xlim(-0.6, len(plot["values"]) - 0.4)


def cut(name: str, most: int = 24) -> str:
    """A name that leaves the plot its room: a text's may be any file's."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def ticked(values: Sequence[Mapping[str, Any]], most: int = 10) -> list[Mapping[str, Any]]:
    """As many of the values as an axis has room for, the default among them."""
    step = math.ceil(len(values) / most)
    own = next((place for place, value in enumerate(values) if value["default"]), 0)
    return [value for place, value in enumerate(values) if (place - own) % step == 0]
