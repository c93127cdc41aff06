"""The numbers of the plots: the page's and matplotlib's are drawn from the same ones."""

from __future__ import annotations

import math
from typing import Any

from secateur.report.compared import accuracy, loss_gap
from secateur.report.comparison import Cell, Comparison, Z, finite
from secateur.report.looks import looks, method_name, percent

ALL = "*"  # all texts together: the geometric mean of perplexity over the dense model's


def figures(comparison: Comparison) -> dict[str, Any]:
    """What the plots show, in plain JSON.

    Returns:
        `texts`, `sparsities`, `methods` (key, name, colour, glyph, symbol, marker), `dense` and `cells`; each cell has
        `y`, by text: [value, low, high] with a 95 % interval (the value itself where none is known), `accuracy` of the
        same form or None, and `speed`, by kind: [ratio to dense, low, high, milliseconds].
    """
    pruned = [_cell(comparison, cell) for cell in comparison.pruned if cell.done]
    found = looks(comparison.methods)
    return {
        "texts": list(comparison.texts),
        "sparsities": comparison.sparsities,
        "methods": [{"key": key, **vars(look)} for key, look in found.items()],
        "dense": _cell(comparison, comparison.dense) if comparison.dense else None,
        "cells": pruned,
    }


def title(cell: Cell) -> str:
    """A cell's label, with methods written as people do."""
    return " ".join(method_name(word) for word in cell.label.split(" "))


def _cell(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    return {
        "name": cell.name,
        "method": cell.method,
        "label": title(cell),
        "size": comparison.size_of(cell),
        "removed": percent(cell.removed),
        "matched": bool(cell.matched_to),
        "reduced": cell.reduced,
        "parameters": cell.parameters,
        "wall_s": cell.wall_s,
        "y": {text: y for text in (ALL, *comparison.texts) if (y := _perplexity(comparison, cell, text))},
        "accuracy": _accuracy(comparison, cell),
        "speed": {kind: y for kind in ("prefill", "token") if (y := speed(cell, kind))},
        "curve": [[x, y] for x, y in cell.data.get("curve") or [] if finite(x) is not None and finite(y) is not None],
    }


def _perplexity(comparison: Comparison, cell: Cell, text: str) -> list[float] | None:
    if text != ALL:
        value = cell.perplexity(text)
        if value is None:
            return None
        margin = Z * (finite(cell.section("perplexity")[text].get("nll_stderr")) or 0.0)
        return [value, value * math.exp(-margin), value * math.exp(margin)]
    gap = loss_gap(cell, comparison.dense, comparison.texts) if comparison.dense else None
    if gap is None or gap.difference > 700:
        return None
    low, high = (gap.difference if edge is None else edge for edge in (gap.low, gap.high))
    return [math.exp(gap.difference), math.exp(low), math.exp(high)]


def _accuracy(comparison: Comparison, cell: Cell) -> list[float] | None:
    value = accuracy(comparison, cell)
    if value is None:
        return None
    errors = [finite(cell.section("tasks")[task].get("stderr")) or 0.0 for task in comparison.counted_tasks]
    margin = Z * math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return [value, value - margin, value + margin]


def speed(cell: Cell, kind: str) -> list[float] | None:
    """Time relative to dense, measured in turn with it: ratio, its spread (half the quartiles' on each side), and ms.

    Args:
        kind: "prefill" (the whole prompt) or "token" (each further one).
    """
    both = cell.section("inference")
    ours = both.get("pruned") or {}
    theirs = both.get("dense") or {}
    ms, dense_ms = finite(ours.get(f"{kind}_ms")), finite(theirs.get(f"{kind}_ms"))
    if ms is None or not dense_ms:
        return None
    spread = (finite(ours.get(f"{kind}_ms_iqr")) or 0.0) / 2 / dense_ms
    return [ms / dense_ms, ms / dense_ms - spread, ms / dense_ms + spread, ms]
