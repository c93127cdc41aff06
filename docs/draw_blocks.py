"""Draw what a pruning removed, block by block, from a checkpoint's secateur.json, as SVG.

python docs/draw_blocks.py out/smollm2-135m-2ssp-25/secateur.json docs/images/demo.svg
"""

import json
import sys
from pathlib import Path

from secateur.report.blocks import lanes, picture
from secateur.report.results import Shape


def draw(record: dict) -> str:
    """The picture of a pruning that narrowed FFNs and dropped attentions, as 2SSP does."""
    before = record["before"]
    heads, neurons = before["kv_heads"] // before["attentions"], before["neurons"] // before["mlps"]
    widths = {e["block"]: len(e["index"]) for e in record["edits"] if e["edit"] == "KeepNeurons"}
    dropped = {e["block"] for e in record["edits"] if e["edit"] == "DropAttention"}

    def shape(block: int, width: int, kv_heads: int) -> Shape:
        return Shape(block=block, width=width, kv_heads=kv_heads, query_heads=0, attention=kv_heads > 0, mlp=width > 0)

    dense = [shape(block, neurons, heads) for block in range(before["blocks"])]
    after = [shape(n, widths.get(n, neurons), 0 if n in dropped else heads) for n in range(before["blocks"])]
    achieved = record["sparsity"]["achieved"]["blocks"]
    name = f"{record['model']['name']}, {record['method']}: {achieved:.1%} of the blocks' parameters removed"
    return picture(name, lanes(after, dense))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(draw(json.loads(source.read_text())))
