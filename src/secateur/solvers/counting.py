"""What an evolutionary search will cost: it is run with losses that are made up, and its sweeps are counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from secateur.engine.sweep import Kind, Part, Variant, sweep_states
from secateur.model.layout import Layout
from secateur.solvers.cost import Cost
from secateur.solvers.criterion import Criterion
from secateur.solvers.evolution import Generation

_SIMULATED = 32  # generations whose cost is counted one by one


class CountingSweeps:
    """Stands for `evolution.Sweeps` to count what a search will cost. Each variant has one loss, at random, the same
    on all tokens, so that a good parent stays for long and is seldom computed anew, as in a real search.

    Attributes:
        block_tokens, head_tokens, asked_tokens: so far, as in `Cost`.
        sweep_states: of the largest sweep.
    """

    def __init__(self, layout: Layout, criterion: Criterion) -> None:
        kinds: tuple[Kind, ...] = ("attention", "mlp", "block")
        self.layout = layout
        self._blocks = [(Part(k, "block"), frozenset(Part(k, kind) for kind in kinds)) for k in layout.blocks]
        self._kl = criterion == "kl"
        self._quality: dict[Variant, float] = {}
        self._dense: set[tuple[int, int]] = set()  # (sample, length)
        self._rng = torch.Generator().manual_seed(0)
        self.block_tokens = self.head_tokens = self.asked_tokens = self.sweep_states = self._stacked = 0

    def __call__(self, variants: Sequence[Variant], samples: Sequence[int], length: int, label: str) -> Tensor:
        blocks, tokens = len(self._blocks), len(samples) * length
        self.block_tokens += self._forwards(variants) * tokens
        self.head_tokens += (len(variants) + self._kl) * len(samples) * (length - 1)
        self.asked_tokens += len(variants) * tokens * blocks
        self.sweep_states = max(self.sweep_states, sweep_states(len(variants), len(samples), length))
        if self._kl:
            new = {(sample, length) for sample in samples} - self._dense
            self.block_tokens += len(new) * length * blocks
            self.asked_tokens += len(new) * length * blocks
            self._dense |= new
            self._stacked = max(self._stacked, tokens)
        for variant in variants:
            if variant not in self._quality:
                self._quality[variant] = float(torch.rand((), generator=self._rng))
        values = torch.tensor([self._quality[variant] for variant in variants], dtype=torch.float64)
        return values[:, None].repeat(1, len(samples)) * (length - 1)

    @property
    def kept_states(self) -> int:
        """Tokens whose dense states are kept, and those of one selection once more, side by side."""
        return sum(length for _, length in self._dense) + self._stacked

    def _forwards(self, variants: Sequence[Variant]) -> int:
        """Block-forwards of a sweep: a block's distinct outputs, which a dropped block does not compute."""
        total = 0
        state = [0] * len(variants)
        for whole, parts in self._blocks:
            seen: dict[tuple[int, Variant], int] = {}
            for place, variant in enumerate(variants):
                state[place] = seen.setdefault((state[place], parts & variant), len(seen))
            total += sum(whole not in muted for _, muted in seen)
        return total


def evolution_cost(search: Iterable[Generation], generations: int, sweeps: CountingSweeps) -> tuple[Variant, Cost]:
    """The cost of a search over so many generations, of which the first few are run on `sweeps`, and a variant such as
    it may find; the cost's `after` is the layout before."""
    spent = []  # (block tokens, head tokens, tokens asked for) after each generation
    for generation in search:
        spent.append((sweeps.block_tokens, sweeps.head_tokens, sweeps.asked_tokens))
        best = generation.parents[0]
        if generation.number == _SIMULATED:
            break
    left = generations - (len(spent) - 1)
    half = len(spent) // 2  # the later generations are like each other
    block, head, asked = (
        last + left * (last - middle) / max(1, len(spent) - 1 - half)
        for last, middle in zip(spent[-1], spent[half], strict=True)
    )
    return best, Cost(
        block_tokens=block,
        head_tokens=head,
        asked_tokens=asked,
        peak_states=0,
        after=sweeps.layout,
        sweep_states=sweeps.sweep_states,
        kept_states=sweeps.kept_states,
    )
