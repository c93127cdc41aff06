"""Draw what a pruning removed, block by block, from a checkpoint's secateur.json, as SVG.

python docs/draw_blocks.py out/smollm2-135m-2ssp-25/secateur.json docs/images/demo.svg
"""

import json
import sys
from pathlib import Path

BAR, GAP, LEFT, ATTENTION, FFN = 16, 5, 90, 26, 96
KEPT, GONE, INK = "#2a7f5f", "#c9ced6", "#6b7280"


def bar(x: float, y: float, height: float, *, kept: bool) -> str:
    style = f'fill="{KEPT}"' if kept else f'fill="none" stroke="{GONE}" stroke-width="1.2" stroke-dasharray="3 2"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{BAR}" height="{height:.1f}" rx="2" {style}/>'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" fill="{INK}">{words}</text>'


def draw(record: dict) -> str:
    """One column per block: its attention above, its FFN below, what went as a dashed outline."""
    blocks, dense = record["before"]["blocks"], record["before"]["neurons"] / record["before"]["mlps"]
    widths = {e["block"]: len(e["index"]) for e in record["edits"] if e["edit"] == "KeepNeurons"}
    dropped = {e["block"] for e in record["edits"] if e["edit"] == "DropAttention"}
    top, middle = 34, 34 + ATTENTION + 10
    width, height = LEFT + blocks * (BAR + GAP) + 10, middle + FFN + 26
    achieved = record["sparsity"]["achieved"]["blocks"]
    parts = [
        text(4, 16, f"{record['model']['name']}, {record['method']}: {achieved:.1%} of the blocks' parameters removed"),
        text(LEFT - 10, top + ATTENTION / 2 + 4, "attention", "end"),
        text(LEFT - 10, middle + FFN / 2 + 4, f"FFN, {dense:.0f}", "end"),
    ]
    for block in range(blocks):
        x = LEFT + block * (BAR + GAP)
        kept = FFN * widths.get(block, dense) / dense
        parts += [bar(x, top, ATTENTION, kept=block not in dropped), bar(x, middle, FFN, kept=False)]
        parts.append(bar(x, middle + FFN - kept, kept, kept=True))
        parts.append(text(x + BAR / 2, height - 10, str(block), "middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif">\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(draw(json.loads(source.read_text())))
