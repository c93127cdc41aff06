"""What a pruning removed, block by block, as SVG: a column per block, what is gone as a dashed outline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

_BAR, _GAP, _LABELS, _ATTENTION, _FFN, _STREAM = 16, 5, 90, 26, 80, 26
_KEPT, _GONE, _INK = "#2a7f5f", "#c9ced6", "#6b7280"
_EVERY = 5  # blocks from one number to the next, where there is no room for all

Shape = Mapping[str, Any]


class Lane(NamedTuple):
    """One row of the picture.

    Attributes:
        name: "attention", "FFN" or "stream".
        height: in pixels.
        kept: by block, the share that is left, from 0 to 1.
        told: by block, the same in words.
    """

    name: str
    height: int
    kept: list[float]
    told: list[str]


def lanes(shape: Sequence[Shape], dense: Sequence[Shape], hidden_size: int | None = None) -> list[Lane]:
    """The rows that a model's picture has: attention, FFN, and the residual stream where its width was changed.

    Args:
        shape, dense: one entry per block of the dense model: `width` (FFN neurons), `kv_heads`, and `sites` (the widths
            of the residual stream) where a method changed them.
        hidden_size: the dense model's width of the stream; without it that row is left out.
    """
    before = {each["block"]: each for each in dense}
    after = {each["block"]: each for each in shape}
    rows = [
        Lane("attention", _ATTENTION, *_column(before, after, "kv_heads", "KV heads")),
        Lane("FFN", _FFN, *_column(before, after, "width", "FFN neurons")),
    ]
    if hidden_size and any(each.get("sites") for each in shape):
        widths = [_stream(after.get(block, {}), hidden_size) for block in before]
        told = [f"a residual stream {width:,} of {hidden_size:,} wide" for width in widths]
        rows.append(Lane("stream", _STREAM, [width / hidden_size for width in widths], told))
    return rows


def _column(
    before: Mapping[int, Shape], after: Mapping[int, Shape], key: str, what: str
) -> tuple[list[float], list[str]]:
    counts = [(after.get(block, {}).get(key) or 0, dense.get(key) or 0) for block, dense in before.items()]
    kept = [min(1.0, new / old) if old else 0.0 for new, old in counts]
    return kept, [f"{new:,} of {old:,} {what}" for new, old in counts]


def _stream(shape: Shape, hidden_size: int) -> int:
    """The width in the middle of a block; nothing of a block that is gone."""
    sites = shape.get("sites")
    if sites:
        return int(sites[len(sites) // 2])
    return hidden_size if shape.get("kv_heads") or shape.get("width") else 0


def picture(rows: Sequence[Lane], *, title: str = "", colour: str = _KEPT, compact: bool = False) -> str:
    """Draw lanes as one SVG element.

    Args:
        title: written above it, and read out by screen readers.
        colour: of what is kept; any CSS colour.
        compact: for the page: no words, and a number at every fifth block.
    """
    blocks = len(rows[0].kept) if rows else 0
    left, top = (2, 4) if compact else (_LABELS, 34)
    width = left + blocks * (_BAR + _GAP) + (2 if compact else 10)
    parts: list[str] = [] if compact else [_text(4, 16, title)]
    y = top
    for lane in rows:
        if not compact:
            parts.append(_text(left - 10, y + lane.height / 2 + 4, lane.name, "end"))
        for block, (kept, told) in enumerate(zip(lane.kept, lane.told, strict=True)):
            x = left + block * (_BAR + _GAP)
            parts.append(_column_of(x, y, lane.height, kept, f"block {block}: {told}", colour))
        y += lane.height + 10
    step, size = (_EVERY, 20) if compact else (1, 12)
    for block in range(0, blocks, step):
        parts.append(_text(left + block * (_BAR + _GAP) + _BAR / 2, y + size * 0.7, str(block), "middle", size))
    height = y + size
    fixed = "" if compact else f'width="{width}" height="{height}" '
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {fixed}viewBox="0 0 {width} {height:.0f}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(title)}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _column_of(x: float, y: float, height: float, kept: float, told: str, colour: str) -> str:
    outline = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{_BAR}" height="{height:.1f}" rx="2" fill="transparent" '
        f'stroke="{_GONE}" stroke-width="1.2" stroke-dasharray="3 2"/>'
    )
    bar = height * kept
    place = f'x="{x:.1f}" y="{y + height - bar:.1f}" width="{_BAR}" height="{bar:.1f}"'
    filled = f'<rect {place} rx="2" fill="{escape(colour)}"/>'
    return f"<g><title>{escape(told)}</title>{outline if kept < 1 else ''}{filled if bar else ''}</g>"


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{_INK}">{escape(words)}</text>'
    )
