"""Draw what each method removed from the demo model at 37.5 %, block by block (`make figures`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from figures import DOCS, demo_model, grids
from msgspec import to_builtins

from secateur.grid.pruning import shape
from secateur.model.handle import Model
from secateur.report.blocks import lanes, picture

SPARSITY = 0.375


def draw(model: Model, cell: Mapping[str, Any]) -> str:
    """A cell's picture as SVG."""
    dense = to_builtins(shape(model.layout(), model.layout()))
    title = f"{cell['label']}, {cell['achieved']['blocks']:.1%} of the blocks' parameters removed"
    return picture(lanes(cell["shape"], dense, model.hidden_size), title=title) + "\n"


def newest() -> dict[str, dict[str, Any]]:
    """Each method's cell, of the last comparison that has one."""
    return {
        cell["method"]: cell
        for grid in grids()
        if grid.kind == "compare"
        for cell in grid.cells.values()
        if cell["sparsity"] == SPARSITY and cell["status"] == "done" and not cell["matched_to"]
    }


if __name__ == "__main__":
    demo = demo_model()
    for method, found in newest().items():
        Path(DOCS, "images", "methods", f"{method}.svg").write_text(draw(demo, found), encoding="utf-8")
