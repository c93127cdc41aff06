"""The work of a greedy round, counted from the layout alone: what no implementation of the two kinds can go below.

Multiply-adds count two. A block costs its projections and, where it has an attention, that one's scores and weighted
sums, which grow with length: a token looks at (length + 1) / 2 tokens on average. A sliding window shorter than the
length is not accounted for; norms, activations and the embedding are left out.

Run as a script it prints the ideal speed-up of stage 2's first round, from configurations alone:

    python bench/work.py --lengths 256 2048
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from common import Report, made_up_config, parser
from transformers import AutoModelForCausalLM

from secateur.methods.two_ssp import balance
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout, Layout
from secateur.model.load import Source


@dataclass(frozen=True)
class Work:
    """What a greedy round over some candidates runs, per search window.

    Attributes:
        whole, muted: by block number, how often it runs with and without its attention.
        heads: how often the LM head runs.
    """

    whole: dict[int, int]
    muted: dict[int, int]
    heads: int

    @property
    def block_forwards(self) -> int:
        return sum(self.whole.values()) + sum(self.muted.values())

    def flops(self, layout: Layout, length: int, head_parameters: int) -> float:
        """Floating-point operations for one window of `length` tokens, which has length - 1 predictions."""
        blocks = sum(
            self.whole[number] * block_flops(block, length)
            + self.muted[number] * block_flops(block.without_attention(), length)
            for number, block in layout.blocks.items()
        )
        return blocks + self.heads * 2 * head_parameters * (length - 1)


def block_flops(block: BlockLayout, length: int) -> float:
    """One block, one window."""
    scores = 4 * block.shape.query_heads * block.head_dim * (length + 1) / 2
    return length * (2 * (block.attention + block.mlp) + scores)


def plain_round(layout: Layout, candidates: Collection[int]) -> Work:
    """The whole model once per candidate, the candidate's attention muted."""
    return Work(
        whole={number: len(candidates) - (number in candidates) for number in layout.blocks},
        muted={number: int(number in candidates) for number in layout.blocks},
        heads=len(candidates),
    )


def shared_round(layout: Layout, candidates: Collection[int]) -> Work:
    """Each distinct prefix once: a block runs for every candidate before it, for the candidate that is itself, and for
    the model that lacks nothing yet while a candidate is still to come."""
    return Work(
        whole={n: sum(c < n for c in candidates) + any(c > n for c in candidates) for n in layout.blocks},
        muted={n: int(n in candidates) for n in layout.blocks},
        heads=len(candidates),
    )


def ideal_speedup(layout: Layout, candidates: Collection[int], length: int, head_parameters: int) -> float:
    """How many times less work the shared prefixes leave."""
    plain, shared = plain_round(layout, candidates), shared_round(layout, candidates)
    return plain.flops(layout, length, head_parameters) / shared.flops(layout, length, head_parameters)


def head_parameters(model: Model) -> int:
    return model.vocab_size * model.hidden_size


def narrowed(layout: Layout, sparsity: float) -> tuple[Layout, int]:
    """The layout after stage 1 of 2SSP, and how many attentions stage 2 removes."""
    made = balance(layout, Budget(sparsity))
    for number, width in made.widths.items():
        layout = layout.with_block(number, layout.blocks[number].with_width(width))
    return layout, made.attentions


LLAMA_2_7B = "random:blocks=32,hidden=4096,heads=32,kv_heads=32,width=11008,vocab=32000"


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.set_defaults(model=["demo", LLAMA_2_7B])
    made.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    made.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5])
    options = made.parse_args(arguments)
    report = Report("The ideal speed-up of stage 2's first round, by counting", options)
    rows = []
    for name in [options.model] if isinstance(options.model, str) else options.model:
        if name.startswith("random"):
            with torch.device("meta"):
                model = Model(AutoModelForCausalLM.from_config(made_up_config(name)))
        else:
            model = Source(name=name).hollow()
        for sparsity in options.sparsities:
            layout, attentions = narrowed(model.layout(), sparsity)
            row = {"model": name, "sparsity": sparsity, "rounds": attentions}
            for length in options.lengths:
                row[f"length {length}"] = ideal_speedup(layout, set(layout.blocks), length, head_parameters(model))
            row["blocks only"] = ideal_speedup(layout, set(layout.blocks), options.lengths[0], 0)
            rows.append(row)
    report.table("Ideal speed-up", rows)
    report.close()


if __name__ == "__main__":
    main()
