"""Draw what each method removed from the demo model at 37.5 %, block by block (`make figures`)."""

from pathlib import Path

from figures import DOCS, folders

from secateur.report.blocks import lanes, picture
from secateur.report.results import COMPARE, CellResult, Results

SPARSITY = 0.375


def draw(results: Results, cell: CellResult) -> str:
    """A cell's picture as SVG."""
    share = cell.achieved.blocks if cell.achieved else None
    title = f"{cell.label}, {share:.1%} of the blocks' parameters removed"
    dense = results.dense.shape if results.dense else None
    return picture(title, lanes(cell.shape or [], dense or [], results.index.model.hidden_size))


def newest() -> dict[str, tuple[Results, CellResult]]:
    """Each method's cell, of the last comparison that has one."""
    return {
        cell.method: (results, cell) for results in folders(COMPARE) for cell in results.of_size(SPARSITY)
    }  # fmt: skip


if __name__ == "__main__":
    for method, found in newest().items():
        Path(DOCS, "images", "methods", f"{method}.svg").write_text(draw(*found), encoding="utf-8")
