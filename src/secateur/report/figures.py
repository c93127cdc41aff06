"""The numbers of the plots: the page's and matplotlib's are drawn from the same ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from secateur.report.compared import accuracy, loss_gap
from secateur.report.looks import looks, method_name, percent
from secateur.report.results import CellResult, Results, finite_or_none

Z = 1.96  # standard errors on either side of a 95 % interval
ALL = "*"  # all texts together: the geometric mean of perplexity over the dense model's


def figures(results: Results) -> dict[str, Any]:
    """What the plots show, in plain JSON.

    Returns:
        `texts`, `start` (the one shown first), `metric` (of `accuracy`), `sparsities`, `methods` (key, name, colour,
        glyph, symbol, marker), `dense` and `cells`; each cell has `y`, by text: [value, low, high] with a 95 % interval
        (the value itself where none is known), `accuracy` of the same form or None, and `speed`, by kind: [ratio to
        dense, low, high, milliseconds], of the same form.
    """
    pruned = [_cell(results, cell) for cell in results.pruned if cell.done]
    found = looks(results.methods)
    return {
        "texts": list(results.texts),
        "start": ALL if len(results.texts) > 1 else next(iter(results.texts), None),
        "metric": results.average.metric,
        "sparsities": results.sparsities,
        "methods": [{"key": key, **vars(look)} for key, look in found.items()],
        "dense": _cell(results, results.dense) if results.dense else None,
        "cells": pruned,
    }


def title(cell: CellResult) -> str:
    """A cell's label, with methods written as people do."""
    return " ".join(method_name(word) for word in cell.label.split(" "))


def _cell(results: Results, cell: CellResult) -> dict[str, Any]:
    return {
        "name": cell.name,
        "method": cell.method,
        "label": title(cell),
        "size": results.size_of(cell),
        "removed": percent(cell.removed),
        "matched": bool(cell.matched_to),
        "reduced": cell.reduced,
        "parameters": cell.parameters,
        "wall_s": cell.wall_s,
        "y": {text: y for text in (ALL, *results.texts) if (y := _perplexity(results, cell, text))},
        "accuracy": _accuracy(results, cell),
        "speed": {kind: y for kind in ("prefill", "token") if (y := _speed(cell, kind))},
        "curve": [
            [x, y]
            for x, y in cell.data.get("curve") or []
            if finite_or_none(x) is not None and finite_or_none(y) is not None
        ],
    }


def _perplexity(results: Results, cell: CellResult, text: str) -> list[float] | None:
    if text != ALL:
        value = results.perplexity(cell, text)
        if value is None:
            return None
        margin = Z * (finite_or_none(results.loss(cell, text).get("nll_stderr")) or 0.0)
        return [value, value * math.exp(-margin), value * math.exp(margin)]
    gap = loss_gap(cell, results.dense, results.averaged_texts) if results.dense else None
    if gap is None or gap.difference > 700:
        return None
    low, high = (gap.difference if edge is None else edge for edge in (gap.low, gap.high))
    return [math.exp(gap.difference), math.exp(low), math.exp(high)]


def _accuracy(results: Results, cell: CellResult) -> list[float] | None:
    value = accuracy(results, cell)
    if value is None:
        return None
    errors = [finite_or_none(cell.section("tasks")[task].get("stderr")) for task in results.average.tasks]
    known = [error for error in errors if error is not None]
    margin = Z * math.hypot(*known) / len(known) if len(known) == len(errors) else 0.0
    return [value, value - margin, value + margin]


def _speed(cell: CellResult, kind: str) -> list[float] | None:
    timing = speed(cell, kind)
    if timing is None:
        return None
    low, high = (timing.ratio if edge is None else edge for edge in (timing.low, timing.high))
    return [timing.ratio, low, high, timing.ms]


class Timing(NamedTuple):
    """A median time relative to the dense model's, timed in turn with it.

    Attributes:
        low, high: half the range of the quartiles on each side; None where it is not known.
        ms: the time itself.
    """

    ratio: float
    low: float | None
    high: float | None
    ms: float


def speed(cell: CellResult, kind: str) -> Timing | None:
    """A cell's time.

    Args:
        kind: "prefill" (the whole prompt) or "token" (each further one).
    """
    both = cell.section("inference")
    ours = both.get("pruned") or {}
    theirs = both.get("dense") or {}
    ms, dense_ms = finite_or_none(ours.get(f"{kind}_ms")), finite_or_none(theirs.get(f"{kind}_ms"))
    if ms is None or not dense_ms:
        return None
    spread, ratio = finite_or_none(ours.get(f"{kind}_ms_iqr")), ms / dense_ms
    if spread is None:
        return Timing(ratio, None, None, ms)
    margin = spread / 2 / dense_ms
    return Timing(ratio, ratio - margin, ratio + margin, ms)
