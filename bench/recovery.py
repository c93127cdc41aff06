"""What training brings a pruned model back: LoRA or all weights, on the text or on the dense model's predictions.

All ways see the same tokens of C4's train text; WikiText-2's validation text and C4's judge. Each cell is a JSON file
that is written when it is done and not made again, and a way that was interrupted goes on: `make figures` shows them.

    secateur prune demo --method 2ssp --sparsity 0.5 --samples 32 --length 512 --dtype float32 --data DIR --out 2ssp-50
    python bench/recovery.py --model 2ssp-50 --data DIR
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import folder_parser, load_model, write
from msgspec import to_builtins

import secateur
from secateur.engine.tokens import read_tokens
from secateur.journal import forget
from secateur.judge.perplexity import perplexity
from secateur.model.handle import Model

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lr": 1e-3},
    "all": {"train": "all", "lr": 3e-4},
    "lora-distilled": {"distill": True, "lr": 1e-3},
    "all-distilled": {"train": "all", "distill": True, "lr": 3e-4},
}
BEFORE = "pruned"


def judged(model: Model, data: Path, samples: int, length: int) -> dict[str, Any]:
    """Perplexities by text, on development text."""
    texts = {"wiki.valid": str(data / "wikitext2/wiki.valid.raw"), "c4": "c4"}
    windows: dict[str, Any] = {"samples": samples, "length": length, "data": data}
    return {
        name: to_builtins(perplexity(model, read_tokens(model, text, purpose="evaluation", **windows))) | {"text": name}
        for name, text in texts.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = folder_parser(__doc__, out="recovery", samples=24, length="tokens per window, of training and of judging")
    parser.set_defaults(length=512)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--lr", type=float, help="of all these ways, instead of each one's own; in the cells' names")
    parser.add_argument(
        "--no-autocast", action="store_true",
        help="matrix products in float32, for a CPU that is slow in bfloat16; in the cells' names",
    )  # fmt: skip
    parser.add_argument("--steps-of", type=int, default=8, help="windows per optimizer step")
    parser.add_argument("--held-out", type=int, default=12, help="windows")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data DIR is needed: the folder with the named texts")
    name = Path(options.model).name
    suffix = (f"-lr{options.lr:g}" if options.lr else "") + "-float32" * options.no_autocast
    for way in (BEFORE, *options.ways):
        path = options.out / (f"{name}-{way}.json" if way == BEFORE else f"{name}-{way}-{options.tokens}{suffix}.json")
        if path.exists():
            continue
        model, cell, start = load_model(options.model), {}, time.process_time()
        if way != BEFORE:
            settings = WAYS[way] | ({"lr": options.lr} if options.lr else {})
            steps = options.tokens // (options.length * options.steps_of)
            healed = secateur.recover(
                model, "c4", texts=options.data, checkpoints=path.with_suffix(".run"), max_tokens=options.tokens,
                max_length=options.length, global_batch=options.steps_of, held_out=options.held_out,
                eval_every=max(1, steps // 4 + 1), warmup_steps=max(1, steps // 10),
                autocast=not options.no_autocast, **settings,
            )  # fmt: skip
            cell = {"recovery": to_builtins(healed.record.recovery), "cost": to_builtins(healed.record.cost)}
            cell["cost"]["cpu_s"] = round(time.process_time() - start, 1)
        perplexities = judged(model, options.data, options.samples, options.length)
        write(path, {"model": name, "way": way, **cell, "perplexity": perplexities})
        forget(path.with_suffix(".run"))


if __name__ == "__main__":
    main()
