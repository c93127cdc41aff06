"""How the speed-up of shared prefixes and stage 1's memory grow with the number of blocks, the width and the length.

Models are made up from configurations; one quantity varies at a time. Speed: one greedy round over all attentions, of
the dense model, medians of alternating repeats (see two_ssp.py). Memory: see memory.py.

    python bench/growth.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import Report, calibration, load_model, parser
from memory import compare
from two_ssp import greedy

BASE = {"blocks": 12, "hidden": 256, "length": 256}
VARIED = {"blocks": (6, 12, 24), "hidden": (128, 256, 512), "length": (64, 256, 1024)}


def cases() -> list[dict[str, int]]:
    """The base, and the base with one quantity changed."""
    others = [{**BASE, name: value} for name, values in VARIED.items() for value in values]
    return [each for place, each in enumerate(others) if each not in others[:place]]


def grow(case: dict[str, int], repeats: int, samples: int, vocab: int) -> dict[str, Any]:
    """One row."""
    heads = max(2, case["hidden"] // 64)
    name = f"random:blocks={case['blocks']},hidden={case['hidden']},heads={heads},kv_heads={heads // 2},vocab={vocab}"
    model = load_model(name)
    row = greedy(model, calibration(model, 1, case["length"]), 1, repeats)[0]
    figures: dict[str, Any] = {
        **case,
        "plain s": row["plain s"],
        "sweep s": row["sweep s"],
        "ideal x": row["ideal x"],
        "sweep x": row["sweep x"],
    }
    for order in ("samples", "blocks"):
        memory = compare(name, samples, case["length"], order)
        figures[f"{order} MB"] = memory["measured MB"]
        figures[f"foretold, {order}"] = memory["foretold MB"]
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.set_defaults(model=None)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--samples", type=int, default=64, help="calibration windows of stage 1, for its memory")
    made.add_argument("--vocab", type=int, default=8192)
    made.add_argument("--first", type=int, help="only this many of the cases")
    options = made.parse_args(arguments)
    report = Report("Growth with blocks, width and length", options)
    rows = [grow(case, options.repeats, options.samples, options.vocab) for case in cases()[: options.first]]
    report.table(
        f"Made-up models, a vocabulary of {options.vocab}; memory of stage 1 for {options.samples} windows", rows
    )
    report.close()


if __name__ == "__main__":
    main()
