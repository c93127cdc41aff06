"""How far the residual stream turns over spans of blocks: what ShortGPT and the sliding window compare."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.engine.tokens import Tokens
from secateur.engine.walk import Order, walk
from secateur.errors import DataError, NumericalError
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.model.views import Block
from secateur.run import Run
from secateur.solvers.cost import Cost
from secateur.surgery.apply import predict
from secateur.surgery.edits import DropBlock

Positions = Literal["all", "last"]
Distance = Callable[[Tensor], Tensor]  # of cosines, elementwise


def span_distances(
    model: Model,
    tokens: Tokens,
    spans: Sequence[tuple[int, Distance]],
    *,
    positions: Positions,
    order: Order,
    run: Run,
    label: str,
) -> list[Tensor]:
    """Mean distances between the hidden states that enter a block and those that leave a later one, in one walk.

    Args:
        spans: (n, distance): n blocks are spanned, and the distance of two states follows from their cosine.
        positions: "all": the mean over all tokens, by their weights; "last": over windows, at each one's last token
            that counts.
        order: as `walk`'s. Beside the walk's own states, the chosen tokens' states are kept at the entrances of the
            last n blocks: of one window in order "samples", of all in order "blocks".

    Returns:
        For each of `spans`, (blocks - n + 1,) float64: entry l belongs to the span of n blocks that starts with the
        l-th block there is.

    Raises:
        DataError: no token counts.
        NumericalError: hidden states are NaN or Inf.
    """
    weights = _weights(tokens, positions)
    if not weights.any():
        raise DataError("no token of the calibration counts")
    sums = _Sums(weights, len(model.numbers), spans)
    for visit in walk(model, tokens, order=order, run=run, label=label):
        visit.advance(block_in=sums.enter, block_out=functools.partial(sums.leave, visit.block))
        sums.next(every_window=order == "blocks")
    means = [each / weights.sum() for each in sums.distances]
    if not all(torch.isfinite(each).all() for each in means):
        raise NumericalError("hidden states have NaN or Inf; use another dtype (float32, bfloat16)")
    return means


class _Sums:
    """Weighted sums of distances, while a walk shows one window after the other at one block after the other.

    Args:
        weights: (samples, length); states of tokens that weigh nothing are not kept.
    """

    def __init__(self, weights: Tensor, blocks: int, spans: Sequence[tuple[int, Distance]]) -> None:
        self.weights, self.blocks, self.spans = weights, blocks, spans
        self.distances = [torch.zeros(blocks - n + 1, dtype=torch.float64) for n, _ in spans]
        self.longest = max(n for n, _ in spans)
        self.place = self.window = 0
        self.entered: dict[tuple[int, int], Tensor] = {}  # by block's place and window, (chosen tokens, hidden)

    def enter(self, x: Tensor, w: Tensor) -> None:
        self.entered[self.place, self.window] = self._choose(x)
        self.entered.pop((self.place - self.longest, self.window), None)

    def leave(self, block: Block, x: Tensor, w: Tensor) -> None:
        for (place, window), entered in self.entered.items():
            if window == self.window:  # where the stream was rebased, without the block it would still change its basis
                self.entered[place, window] = block.past(entered)
        after, weights = self._choose(x).double(), self.weights[self.window]
        for (n, distance), sums in zip(self.spans, self.distances, strict=True):
            start = self.place - n + 1
            if start >= 0:
                before = self.entered[start, self.window].to(x.device).double()
                apart = distance(_cosine(before, after))  # (chosen tokens,)
                sums[start] += (apart.cpu().double() * weights[weights > 0]).sum()
        self.window += 1

    def next(self, *, every_window: bool) -> None:
        """After a visit: on to the next block, with all windows or with the one that has just been seen."""
        last = self.place == self.blocks - 1
        if every_window:
            self.window = 0
        elif not last:
            self.window -= 1
        self.place = 0 if last else self.place + 1
        if last:
            self.entered.clear()

    def _choose(self, x: Tensor) -> Tensor:
        """A copy of the chosen tokens' states: the walk reuses the memory of x, (1, length, hidden)."""
        return x[0, (self.weights[self.window] > 0).to(x.device)]


def span_states(longest: int, samples: int, length: int, *, positions: Positions, order: Order) -> int:
    """The hidden states of tokens that `span_distances` holds at once, the walk's own included."""
    windows = samples if order == "blocks" else 1
    return windows * (length + (longest + 1) * (length if positions == "all" else 1))


def drop_cost(
    layout: Layout,
    dropped: Sequence[int],
    longest: int,
    samples: int,
    length: int,
    *,
    positions: Positions,
    order: Order,
) -> Cost:
    """What it costs to compare spans of at most `longest` blocks in one walk, and to drop blocks by it.

    Args:
        dropped: the numbers of as many blocks as will go; which ones is not known, they are mostly of one size.
    """
    after, work = layout, samples * length * len(layout.blocks)
    for number in dropped:
        after = predict(after, DropBlock(number))
    states = span_states(longest, samples, length, positions=positions, order=order)
    return Cost(block_tokens=work, head_tokens=0, asked_tokens=work, peak_states=states, after=after)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """(tokens, hidden) float64 -> (tokens,); 1 to the last bit for equal states, so that ties are ties; 0 beside 0."""
    norms = ((one * one).sum(dim=-1) * (other * other).sum(dim=-1)).sqrt()
    return torch.where(norms == 0, 0, (one * other).sum(dim=-1) / norms).clamp(-1, 1)


def _weights(tokens: Tokens, positions: Positions) -> Tensor:
    """What each token's distance weighs, (samples, length) float64."""
    weights = tokens.weights.double()
    if positions == "all":
        return weights
    last = torch.zeros_like(weights)
    for window, row in enumerate(weights):
        last[window, row.nonzero().flatten()[-1:]] = 1  # of a window where nothing counts, none
    return last
