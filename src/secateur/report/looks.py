"""How methods look and numbers read, the same on the page, in the plots and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.report.results import CellResult

# Eight colours found by search: told apart by people with any of the three colour blindnesses, and clear of a white
# and of a dark ground. tests/test_report_looks.py holds them to that. Each has its own marker as well.
_KNOWN = {
    "2ssp": ("2SSP", "#3467E6"),
    "slimgpt": ("SlimGPT", "#B84D00"),
    "slicegpt": ("SliceGPT", "#30A676"),
    "shortgpt": ("ShortGPT", "#35B1FF"),
    "window": ("Sliding window", "#8F5B95"),
    "blockpruner": ("BlockPruner", "#89BA00"),
    "evopress": ("EvoPress", "#FF69C6"),
    "secateur": ("secateur", "#87424B"),
}
NBSP = "\u00a0"  # a number and its unit stay on one line
GREY = "#808080"  # for a method that we do not know; its marker tells it from others
# the page's glyph and matplotlib's marker
_MARKERS = (
    ("●", "o"), ("■", "s"), ("◆", "D"), ("▲", "^"), ("▼", "v"), ("✚", "P"), ("✖", "X"), ("◀", "<"), ("▶", ">"),
    ("⬟", "p"), ("⬢", "h"),
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """One method's name, colour and marker; `glyph` is the marker's form as a character."""

    name: str
    colour: str
    glyph: str
    marker: str


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """One look per method; those we know look the same in every report, others are grey with markers of their own; with
    a refit, the method's colour with a marker of its own."""
    known, others = list(_KNOWN), _MARKERS[len(_KNOWN) :]
    methods = list(methods)
    strangers = [method for method in methods if method not in _KNOWN]

    def look(method: str) -> Look:
        if method in _KNOWN:
            return Look(*_KNOWN[method], *_MARKERS[known.index(method)])
        colour = _KNOWN.get(method.partition(" ")[0], ("", GREY))[1]  # of a method with more: "2ssp + refit"
        return Look(written(method), colour, *others[strangers.index(method) % len(others)])

    return {method: look(method) for method in methods}


def size_looks(sizes: Sequence[float | None]) -> dict[float | None, Look]:
    """One look per size, for plots of a single method: the same colours, since they can be told apart."""
    colours = [colour for _, colour in _KNOWN.values()]
    return {
        size: Look(percent(size), colours[place % len(colours)], *_MARKERS[place % len(_MARKERS)])
        for place, size in enumerate(sizes)
    }


def method_name(method: str) -> str:
    """As people write it: 2SSP for 2ssp."""
    if " " in method:
        return written(method)
    return "Dense" if method == "dense" else _KNOWN.get(method, (method, ""))[0]


def title(cell: CellResult) -> str:
    """A cell's label, with methods written as people do."""
    return written(cell.shown)


def written(label: str) -> str:
    return " ".join(method_name(word) for word in label.split(" "))


def percent(share: float | None, digits: int = 1) -> str:
    """0.375 -> 37.5 %, 0.25 -> 25 %."""
    if share is None:
        return "–"
    text = f"{100 * share:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{NBSP}%"


def number(value: float | None, digits: int = 3) -> str:
    """Some significant digits, thousands parted, no exponent below a million."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def times(ratio: float) -> str:
    return f"{number(ratio)}×"


def count(value: float | None) -> str:
    """Parameters as people say them: 135 M, 1.71 B."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{number(value / size)}{NBSP}{unit}"
    return f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """A duration: 0.8 s, 42 s, 3 min 20 s, 2 h 5 min."""
    if value is None:
        return "–"
    if value < 9.95:
        return f"{value:.1f}{NBSP}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}{NBSP}s"
    large, small, unit, smaller = (*divmod(whole, 60), "min", "s")
    if whole >= 3600:
        large, small, unit, smaller = (*divmod(round(value / 60), 60), "h", "min")
    return f"{large}{NBSP}{unit}" + (f"{NBSP}{small}{NBSP}{smaller}" if small else "")


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"
