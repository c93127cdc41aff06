"""The numbers of the plots: the page's and matplotlib's are drawn from the same ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from secateur.judge.statistics import quartiles
from secateur.report.compared import accuracy, loss_gap
from secateur.report.looks import looks, method_name, percent
from secateur.report.results_before import CellResult, Results, finite_or_none

TIMED = {"prefill": "prefill_ms", "token": "token_ms", "throughput": "throughput_tokens_s"}  # by kind: its key
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
    return [timing.ratio, low, high, timing.value]


class Timing(NamedTuple):
    """What was timed, relative to the dense model timed in turn with it.

    Attributes:
        low, high: the range of the ratio's quartiles; None where it is not known.
        value: the cell's own median, in ms or in tokens per second.
    """

    ratio: float
    low: float | None
    high: float | None
    value: float


def speed(cell: CellResult, kind: str) -> Timing | None:
    """What was timed of a cell; None where it was not.

    Args:
        kind: "prefill" (the whole prompt), "token" (each further one) or "throughput" (the higher, the faster).
    """
    both, key = cell.section("inference"), TIMED[kind]
    ours, theirs = both.get("pruned") or {}, both.get("dense") or {}
    value, dense = finite_or_none(ours.get(key)), finite_or_none(theirs.get(key))
    if value is None or not dense:
        return None
    return Timing(*_over_dense(ours, theirs, key), value)


def _over_dense(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str
) -> tuple[float, float | None, float | None]:
    """A ratio and the range of its quartiles, in one of two ways.

    Where the rounds are stored: median and quartiles of the ratios round by round. In each round the models run right
    after each other, so that what slows down both cancels.

    Where they are not, as in cells made before they were: median over median. The range is from the lower quartile over
    the dense model's upper one to the upper one over its lower one: nobody knows which rounds belong together. A
    quartile is taken as half the stored range from the median; the range is not known where one has no range, or the
    dense model's lower quartile would be below 0.
    """
    one, other = (each.get(f"{key}_rounds") or [] for each in (ours, theirs))
    if one and len(one) == len(other) and all(other):
        ratios = [value / dense for value, dense in zip(one, other, strict=True)]
        return statistics.median(ratios), *(quartiles(ratios) or (None, None))
    value, dense = ours[key], theirs[key]
    spreads = [finite_or_none(each.get(f"{key}_iqr")) for each in (ours, theirs)]
    if spreads[0] is None or spreads[1] is None or spreads[1] >= 2 * dense:
        return value / dense, None, None
    half, dense_half = spreads[0] / 2, spreads[1] / 2
    return value / dense, max(0.0, value - half) / (dense + dense_half), (value + half) / (dense - dense_half)
