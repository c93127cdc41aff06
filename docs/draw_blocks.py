"""Draw what a pruning removed, block by block, from a checkpoint's secateur.json, as SVG.

python docs/draw_blocks.py out/smollm2-135m-2ssp-25/secateur.json docs/images/demo.svg
"""

import json
import sys
from pathlib import Path

from secateur.report.blocks import lanes, picture


def draw(record: dict) -> str:
    """The picture of a pruning that narrowed FFNs and dropped attentions, as 2SSP does."""
    before = record["before"]
    heads, neurons = before["kv_heads"] // before["attentions"], before["neurons"] // before["mlps"]
    dense = [{"block": n, "kv_heads": heads, "width": neurons} for n in range(before["blocks"])]
    widths = {e["block"]: len(e["index"]) for e in record["edits"] if e["edit"] == "KeepNeurons"}
    dropped = {e["block"] for e in record["edits"] if e["edit"] == "DropAttention"}
    shape = [
        {"block": n, "kv_heads": 0 if n in dropped else heads, "width": widths.get(n, neurons)}
        for n in range(before["blocks"])
    ]
    achieved = record["sparsity"]["achieved"]["blocks"]
    name = f"{record['model']['name']}, {record['method']}: {achieved:.1%} of the blocks' parameters removed"
    return picture(lanes(shape, dense), title=name) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(draw(json.loads(source.read_text())))
