"""Draw what each method removed from the demo model at 37.5 %, block by block (`make figures`).

The cells of `secateur compare` say it themselves. Those of bench/methods.py name the edits only; what these leave open
(how wide an FFN stays, how many heads) is arithmetic, and the parameters that were measured must come out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from figures import DOCS, demo_model, grids

from secateur.methods import get_method
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.report.blocks import lanes, picture
from secateur.study.pruning import shape
from secateur.surgery.apply import predict
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP

SPARSITY = 0.375
NAMED = {"DropBlock": DropBlock, "DropAttention": DropAttention, "DropMLP": DropMLP}


def pruned(model: Model, cell: Mapping[str, Any]) -> Layout:
    """The layout that a cell of bench/methods.py left.

    Raises:
        ValueError: it would have other parameters than the cell says.
    """
    used, before = cell["calibration"], model.layout()
    plan = get_method(cell["method"]).plan(
        model, Budget(cell["sparsity"]), used["samples"], used["length"], cell["options"]
    )
    after = before
    for number, block in plan.cost.after.blocks.items():  # widths; which attentions go stands in the edits
        whole = after.blocks[number]
        if ["KeepNeurons", number] in cell["edits"]:
            whole = whole.with_width(block.shape.width)
        if ["KeepHeads", number] in cell["edits"]:
            whole = whole.with_kv_heads(block.shape.kv_heads)
        after = after.with_block(number, whole)
    for edit, number in cell["edits"]:
        if edit in NAMED:
            after = predict(after, NAMED[edit](number))
    if ["Rebase", None] in cell["edits"]:
        after = plan.cost.after
    if after.parameters != cell["parameters"]:
        raise ValueError(f"{cell['name']}: {after.parameters:,} parameters, {cell['parameters']:,} were measured")
    return after


def draw(model: Model, cell: Mapping[str, Any]) -> str:
    """A cell's picture as SVG."""
    dense = shape(model.layout(), model.layout())
    left = cell.get("shape") or shape(model.layout(), pruned(model, cell))
    title = f"{cell['label']}, {cell['achieved']['blocks']:.1%} of the blocks' parameters removed"
    return picture(lanes(left, dense, model.hidden_size), title=title) + "\n"


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
