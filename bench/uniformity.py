"""What it costs to keep within the layouts that an engine runs unpatched (`prune --for`): perplexity at one size.

    python bench/uniformity.py --data DIR --texts wikitext2 c4

Each method is pruned for each engine, with the same calibration and at the same sparsity, and judged on the same
windows, in float32. `any` is without limits; vLLM holds whatever a Llama is pruned to, so it is not asked. Each cell is
a JSON file that is written when it is done and not made again: a perplexity by text, or why the engine is refused.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import folder_parser, load_model, windows, write
from msgspec import to_builtins

import secateur
from secateur.errors import UnsupportedExportError
from secateur.judge.perplexity import perplexity
from secateur.model.handle import Model

METHODS, ENGINES = ("2ssp", "slimgpt", "secateur"), ("any", "llama.cpp", "stock")


def judged(model: Model, options: Any) -> dict[str, Any]:
    texts = {
        Path(name).name: windows(model, name, options.judged, options.length, options, purpose="evaluation")
        for name in options.texts
    }
    return {name: to_builtins(perplexity(model, tokens)) | {"text": name} for name, tokens in texts.items()}


def cell(method: str, engine: str, options: Any) -> dict[str, Any]:
    """Prune once and judge what is left, or the dense model."""
    model = load_model(options.model, "float32")
    made: dict[str, Any] = {"method": method, "engine": engine}
    if method == "dense":
        return made | {"perplexity": judged(model, options)}
    tokens = windows(model, "c4", options.samples, options.length, options, purpose="calibration")
    start = time.process_time()
    try:
        pruned = secateur.prune(model, method, sparsity=options.sparsity, for_=engine, calibration=tokens)
    except UnsupportedExportError as error:
        return made | {"refused": str(error)}
    record = pruned.record
    return made | {
        "cpu_s": round(time.process_time() - start, 1), "sparsity": to_builtins(record.sparsity),
        "options": record.options, "calibration": record.calibration, "tier": record.tier,
        "after": to_builtins(record.after), "perplexity": judged(pruned.model, options),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = folder_parser(__doc__, out="uniformity", samples=32, length="tokens per window, calibration too")
    parser.set_defaults(length=512)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--texts", nargs="+", default=["wikitext2", "c4"], help="to judge on")
    parser.add_argument("--judged", type=int, default=20, help="windows of each text to judge on")
    parser.add_argument("--only", nargs="+", metavar="METHOD-ENGINE", help="these cells")
    options = parser.parse_args(arguments)
    for method, engine in [("dense", "any"), *itertools.product(METHODS, ENGINES)]:
        name = f"{method}-{engine}"
        path = options.out / f"{name}.json"
        if path.exists() or (options.only and name not in options.only):
            continue
        write(path, cell(method, engine, options))


if __name__ == "__main__":
    main()
