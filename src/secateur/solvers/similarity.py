"""How far the residual stream turns over spans of blocks: what ShortGPT and the sliding window compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.engine.tokens import Tokens
from secateur.engine.walk import GROUP_BYTES, Order, walk
from secateur.errors import DataError, NumericalError
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import Run

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
            last n blocks: of a group of windows in order "samples", of all in order "blocks".

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
    sums = _Sums(list(model.numbers), spans)
    entrances = 1 + (sums.longest + 1 if positions == "all" else 0)  # whose states are held, of whole windows
    group_bytes = GROUP_BYTES // entrances
    window_bytes = tokens.length * model.hidden_size * model.dtype.itemsize
    windows = tokens.samples if order == "blocks" else min(tokens.samples, max(1, group_bytes // window_bytes))
    kept_bytes = windows * window_bytes * (sums.longest + 1) / (1 if positions == "all" else tokens.length)
    counted = Tokens(tokens.ids, weights)
    with run.holding(kept_bytes):
        for visit in walk(model, counted, order=order, run=run, group_bytes=group_bytes, label=label):
            sums.visit(visit.block)
            visit.advance(block_in=sums.enter, block_out=sums.leave)
    means = [distances / weights.sum() for distances in sums.distances]
    if not all(torch.isfinite(mean).all() for mean in means):
        raise NumericalError("hidden states have NaN or Inf; use another dtype (float32, bfloat16)")
    return means


class _Sums:
    """Weighted sums of distances, while a walk shows some windows, one by one, at one block after the other."""

    def __init__(self, numbers: Sequence[int], spans: Sequence[tuple[int, Distance]]) -> None:
        self.numbers, self.spans = numbers, spans
        self.distances = [torch.zeros(len(numbers) - n + 1, dtype=torch.float64) for n, _ in spans]
        self.longest = max(n for n, _ in spans)
        self.entered: dict[tuple[int, int], Tensor] = {}  # by block's place and window, (chosen tokens, hidden)

    def visit(self, block: Block) -> None:
        self.block, self.place, self.window = block, self.numbers.index(block.number), 0
        if not self.place:
            self.entered.clear()

    def enter(self, x: Tensor, weights: Tensor) -> None:
        self.entered[self.place, self.window] = _chosen(x, weights)
        self.entered.pop((self.place - self.longest, self.window), None)

    def leave(self, x: Tensor, weights: Tensor) -> None:
        for (place, window), entered in self.entered.items():
            if window == self.window:  # where the stream was rebased, without the block it would still change its basis
                self.entered[place, window] = self.block.past(entered)
        after = _chosen(x, weights).double()
        weighs = weights[weights > 0].cpu()
        for (n, distance), sums in zip(self.spans, self.distances, strict=True):
            start = self.place - n + 1
            if start >= 0:
                before = self.entered[start, self.window].to(x.device).double()
                apart = distance(_cosine(before, after))  # (chosen tokens,)
                sums[start] += (apart.cpu().double() * weighs).sum()
        self.window += 1


def _chosen(x: Tensor, weights: Tensor) -> Tensor:
    """A copy of the states of the tokens that weigh something: the walk reuses the memory of x, (1, length, hidden)."""
    return x[0, weights[0] > 0]


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
