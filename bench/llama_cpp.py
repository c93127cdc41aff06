"""Pruned and dense models in llama.cpp, by the type of their weights: bytes, perplexity, tokens per second.

    python bench/llama_cpp.py demo smaller --data ../shared/data --text wikitext2 --json FILE

Each model is exported as `secateur export --to gguf --type TYPE` does and run by llama.cpp on the CPU. Perplexity is
over the same windows for all, and for each model also what transformers gives in float32 on its weights as they are;
it takes a call per token. Speed: greedy tokens behind one prompt, all files in turn, the median of the rounds.
A quantised type that a model's widths do not allow is left out with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import machine

import secateur
from secateur.engine.tokens import Tokens, read_tokens
from secateur.engines.llama_cpp import running
from secateur.export import export, refusal
from secateur.export.gguf import FILE
from secateur.judge.perplexity import perplexity

PROMPT, NEW = 128, 64  # tokens


def rows_of(name: str, types: list[str], tokens: Tokens, folder: Path) -> list[dict[str, Any]]:
    """Write a model's files; what transformers says of it, and their bytes and perplexities."""
    model = secateur.load(name, device="cpu", dtype="float32")
    torch_perplexity = perplexity(model, tokens).perplexity
    rows = []
    for kept in types:
        row: dict[str, Any] = {"model": Path(name).name, "type": kept, "transformers": torch_perplexity}
        rows.append(row)
        if reason := refusal(model, "gguf", type=kept):
            row["refused"] = reason
            continue
        out = folder / f"{Path(name).name}-{kept}"
        export(model, "gguf", out, type=kept)
        row |= {"bytes": (out / FILE).stat().st_size, "file": str(out / FILE), "speeds": []}
        with running(out / FILE, context=tokens.length + 8) as engine:
            losses = [loss for ids in tokens.ids.tolist() for loss in engine.losses(ids, model.vocab_size)]
        row["perplexity"] = math.exp(statistics.fmean(losses))
        print({key: row[key] for key in ("model", "type", "bytes", "transformers", "perplexity")}, file=sys.stderr)
    return rows


def time_in_turn(rows: list[dict[str, Any]], prompt: list[int], rounds: int) -> None:
    """Tokens per second of each file, once a round."""
    for _ in range(rounds):
        for row in rows:
            if "file" in row:
                with running(Path(row["file"]), context=PROMPT + NEW + 8) as engine:
                    engine.greedy(prompt, 8)  # its memory is mapped by then
                    row["speeds"].append(engine.greedy(prompt, NEW).tokens_per_second)
    for row in rows:
        if row.pop("file", None):
            row["tokens_per_second"] = statistics.median(row["speeds"])


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("models", nargs="+")
    made.add_argument("--types", default="f16,q8_0,q4_0")
    made.add_argument("--data", help="Folder of corpora.")
    made.add_argument("--text", default="wikitext2")
    made.add_argument("--samples", type=int, default=4)
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--json", type=Path)
    chosen = made.parse_args()
    model = secateur.load(chosen.models[0], device="cpu")
    tokens = read_tokens(
        model, chosen.text, purpose="evaluation", samples=chosen.samples, length=chosen.length, data=chosen.data
    )
    with TemporaryDirectory() as folder:
        rows = [row for name in chosen.models for row in rows_of(name, chosen.types.split(","), tokens, Path(folder))]
        time_in_turn(rows, tokens.ids[0, :PROMPT].tolist(), chosen.rounds)
    about = {"text": chosen.text, "windows": [chosen.samples, chosen.length], "machine": machine()}
    shown = json.dumps({**about, "rows": rows}, indent=1)
    if chosen.json:
        chosen.json.write_text(shown + "\n")
    print(shown)


if __name__ == "__main__":
    main()
