"""What bfloat16 and the number of threads change: stage 1's neurons, stage 2's order, the perplexity.

Every setting runs on the same windows; the first one, float32 with one thread, is what the others are compared with.
Both stages are carried out, then perplexity is taken of the dense and the pruned model.

    python bench/precision.py --data ../../shared/data
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Report, calibration, load_model, parser
from torch import Tensor

from secateur.driver import run_method
from secateur.engine.tokens import Tokens, read_tokens
from secateur.judge.perplexity import perplexity
from secateur.methods import get_method
from secateur.model.budget import Budget
from secateur.run import MemoryStore, Run
from secateur.surgery.edits import DropAttention, KeepNeurons


@dataclass(frozen=True)
class Outcome:
    """What one setting gave.

    Attributes:
        scores: stage 1's, by block number as a string, (width,).
        kept: neurons by block number.
        removed: attentions in order.
        losses: of stage 2's rounds, one per candidate.
        dense, pruned: perplexities.
    """

    scores: dict[str, Tensor]
    kept: dict[int, frozenset[int]]
    removed: list[int]
    losses: list[list[float]]
    dense: float
    pruned: float


def outcome(name: str, dtype: str, threads: int, options: Any, held_out: Tokens | None) -> Outcome:
    """Prune and judge in one setting."""
    torch.set_num_threads(threads)
    model = load_model(name, dtype)
    tokens = calibration(model, options.samples, options.length, options.text)
    if held_out is None:
        held_out = tokens
    dense = perplexity(model, held_out).perplexity
    store = MemoryStore()
    search = {"search_length": options.search_length, "attentions": options.attentions}
    pruning = run_method(model, get_method("2ssp"), tokens, Budget(options.sparsity), Run(store=store), **search)
    removed = [edit.block for edit in pruning.edits if isinstance(edit, DropAttention)]
    return Outcome(
        scores=store.get("scores"),
        kept={edit.block: frozenset(edit.index) for edit in pruning.edits if isinstance(edit, KeepNeurons)},
        removed=removed,
        losses=[store.get(f"2ssp stage 2/{place}") for place in range(len(removed))],
        dense=dense,
        pruned=perplexity(model, held_out).perplexity,
    )


def against(base: Outcome, other: Outcome) -> dict[str, Any]:
    """How far one outcome is from another."""
    swapped = {number: base.kept[number] - other.kept[number] for number in base.kept}
    gaps, shifts = [], []
    for number, lost in swapped.items():
        scores = base.scores[str(number)]
        edge = min(float(scores[i]) for i in base.kept[number])  # the weakest that stays
        gaps += [float(scores[i]) / edge - 1 for i in lost]
        shifts.append(float((other.scores[str(number)] / scores - 1).abs().median()))
    same_rounds = 0
    for mine, theirs in zip(base.removed, other.removed, strict=False):
        if mine != theirs:
            break
        same_rounds += 1
    comparable = zip(base.losses[: same_rounds + 1], other.losses[: same_rounds + 1], strict=False)
    differences = [abs(a - b) for mine, theirs in comparable for a, b in zip(mine, theirs, strict=True)]
    return {
        "neurons that differ": sum(map(len, swapped.values())),
        "of kept": sum(map(len, base.kept.values())),
        "median score shift": max(shifts),
        "largest score gap": max(gaps, default=0.0),
        "same rounds": f"{same_rounds} of {len(base.removed)}",
        "largest loss difference, nats": max(differences, default=0.0),
    }


def margins(base: Outcome) -> list[dict[str, Any]]:
    """By how much each round's best beat the second: what noise would have to exceed."""
    rows = []
    for place, losses in enumerate(base.losses):
        first, second = sorted(losses)[:2]
        rows.append({"round": place + 1, "removed block": base.removed[place], "loss": first, "margin": second - first})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder with the named texts")
    made.add_argument("--text", default="demo", help="calibration text")
    made.add_argument("--perplexity", default="wikitext2", help="text to judge on")
    made.add_argument("--windows", type=int, default=4)
    made.add_argument("--window-length", type=int, default=1024)
    made.add_argument("--samples", type=int, default=8)
    made.add_argument("--length", type=int, default=1024)
    made.add_argument("--search-length", type=int, default=256)
    made.add_argument("--sparsity", type=float, default=0.25)
    made.add_argument("--attentions", type=int, help="equation 5's number if not given")
    made.add_argument("--settings", nargs="+", default=["float32:1", "float32:2", "bfloat16:1", "bfloat16:2"])
    options = made.parse_args(arguments)
    report = Report("bfloat16 and threads against float32 with one thread", options)
    held_out = None
    if not options.model.startswith("random"):
        held_out = read_tokens(
            load_model(options.model), options.perplexity, purpose="evaluation", samples=options.windows,
            length=options.window_length, data=options.data,
        )  # fmt: skip
    before = torch.get_num_threads()
    outcomes = {}
    for setting in options.settings:
        dtype, _, threads = setting.partition(":")
        outcomes[setting] = outcome(options.model, dtype, int(threads or 1), options, held_out)
    torch.set_num_threads(before)
    base = outcomes[options.settings[0]]
    rows = [
        {"setting": setting, **against(base, each), "removed": " ".join(map(str, each.removed)),
         "dense perplexity": each.dense, "pruned perplexity": each.pruned}
        for setting, each in outcomes.items()
    ]  # fmt: skip
    report.table("Settings (dtype:threads)", rows)
    if base.losses:
        report.table("Margins of the first setting's rounds", margins(base))
    report.close()


if __name__ == "__main__":
    main()
