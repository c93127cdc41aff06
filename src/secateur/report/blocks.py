"""What a pruning removed, block by block: a column per block, what is gone pale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from secateur.report.drawing import LINE, mark, new_figure, styled, to_svg
from secateur.report.results import Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EVERY = 5  # blocks from one number to the next
_GAP = 0.12
_KEPT = "#2a7f5f"


class Lane(NamedTuple):
    """One row of the picture.

    Attributes:
        name: "attention", "FFN" or "stream".
        height: relative to the other rows'.
        kept: by block, the share that is left, from 0 to 1.
        told: by block, the same in words.
    """

    name: str
    height: float
    kept: list[float]
    told: list[str]


def lanes(shape: Sequence[Shape], dense: Sequence[Shape], hidden_size: int | None = None) -> list[Lane]:
    """The rows that a model's picture has: attention, FFN, and the residual stream where its width was changed.

    Args:
        shape, dense: one entry per block of the dense model.
        hidden_size: the dense model's width of the stream; without it that row is left out.
    """
    after = {each.block: each for each in shape}
    both = [(after.get(each.block), each) for each in dense]
    heads = [(new.kv_heads if new else 0, old.kv_heads) for new, old in both]
    widths = [(new.width if new else 0, old.width) for new, old in both]
    rows = [_lane("attention", 1.0, heads, "{} of {} KV heads"), _lane("FFN", 2.5, widths, "{} of {} FFN neurons")]
    if hidden_size and any(each.sites for each in shape):
        stream = [(_stream(new, hidden_size), hidden_size) for new, _ in both]
        rows.append(_lane("stream", 1.0, stream, "a residual stream {} of {} wide"))
    return rows


def _lane(name: str, height: float, counts: Sequence[tuple[int, int]], words: str) -> Lane:
    kept = [min(1.0, new / old) if old else 0.0 for new, old in counts]
    return Lane(name, height, kept, [words.format(f"{new:,}", f"{old:,}") for new, old in counts])


def _stream(shape: Shape | None, hidden_size: int) -> int:
    """The width in the middle of a block; nothing of a block that is gone."""
    if shape is None:
        return 0
    if shape.sites:
        return shape.sites[len(shape.sites) // 2]
    return hidden_size if shape.kv_heads or shape.width else 0


def picture(title: str, rows: Sequence[Lane], colour: str = _KEPT) -> str:
    """One model's picture, by itself, as SVG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with styled():
        figure, (axis,) = new_figure(1, (7.0, 2.0))
        draw_lanes(axis, rows, colour, named=True)
        axis.set_title(title, fontsize=10, loc="left")
        return to_svg(figure)


def draw_lanes(axis: Axes, rows: Sequence[Lane], colour: str, *, named: bool = False) -> None:
    """Draw lanes one below the other, on axes of their own; each block says under the pointer what is left of it."""
    top, middles = 0.0, []
    for lane in rows:
        blocks, bottom = range(len(lane.kept)), top - lane.height
        axis.bar(blocks, [lane.height] * len(blocks), bottom=bottom, color=LINE, width=1 - _GAP)
        kept = axis.bar(
            blocks, [share * lane.height for share in lane.kept], bottom=bottom, color=colour, width=1 - _GAP
        )
        for block, (bar, words) in enumerate(zip(kept, lane.told, strict=True)):
            mark(bar, words=f"block {block}: {words}")
        middles.append(bottom + lane.height / 2)
        top = bottom - 2 * _GAP
    count = len(rows[0].kept) if rows else 0
    axis.set_xticks(range(0, count, _EVERY))
    axis.tick_params(length=0, labelsize=8)
    axis.set_yticks(middles, [lane.name for lane in rows] if named else [""] * len(rows))
    axis.set(xlim=(-0.7, count - 0.3), ylim=(top, 0.1))
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
