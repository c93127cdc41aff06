"""The work of a greedy round, counted from the layout alone: what no implementation of the two kinds can go below.

Multiply-adds count two. A block costs its projections and, where it has an attention, that one's scores and weighted
sums, which grow with length: a token looks at (length + 1) / 2 tokens on average. A sliding window shorter than the
length is not accounted for; norms, activations and the embedding are left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from secateur.model.handle import Model
from secateur.model.layout import BlockLayout, Layout


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
