"""`walk`: the block-by-block stream of activations. It never runs the LM head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.engine.blocks import BlockInputs, run_block
from secateur.engine.tokens import Tokens
from secateur.errors import SecateurError
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import Advance, Run

Order = Literal["blocks", "samples"]
Tap = Literal["block_in", "block_out", "attention_hidden", "mlp_hidden"]
Look = Callable[[Tensor, Tensor], None]


class Visit:
    """One open block with the hidden states that are to enter it.

    In order "blocks" there is one visit per block, with all samples; in order "samples" one per batch and block.

    Attributes:
        block: the block, open for the time of the visit.
    """

    def __init__(
        self,
        model: Model,
        block: Block,
        inputs: BlockInputs,
        hidden: Tensor,
        weights: Tensor,
        batch: int,
        run: Run,
    ) -> None:
        self.block = block
        self._model, self._inputs, self._run = model, inputs, run
        self._hidden, self._weights, self._batch = hidden, weights, batch
        self._advanced_at: int | None = None

    def observe(self, **taps: Look) -> None:
        """Run the block on all its inputs and show the taps; the outputs are thrown away. May be repeated.

        Taps, each called with (x, weights) per batch, x (batch, length, features), weights (batch, length):
        `block_in`, `block_out`: the residual stream; `attention_hidden`: the input of the attention's output
        projection; `mlp_hidden`: the input of the MLP's, which are the FFN neurons' activations.
        """
        self._pass(taps, keep=False)

    def advance(self, **taps: Look) -> None:
        """As `observe`, but the outputs replace the inputs and go on to the next block. Once per visit, and last."""
        self._pass(taps, keep=True)
        self._advanced_at = self._model.edits_applied

    def finish(self) -> None:
        """Advance if the method did not."""
        if self._advanced_at is None:
            self.advance()
        elif self._advanced_at != self._model.edits_applied:
            raise SecateurError(
                f"block {self.block.number} was edited after `advance`; the next block would see stale inputs"
            )

    @torch.no_grad()
    def _pass(self, taps: dict[str, Look], *, keep: bool) -> None:
        if self._advanced_at is not None:
            raise SecateurError(f"block {self.block.number} has been left: `advance` comes last")
        module = self.block.module
        for start in range(0, len(self._hidden), self._batch):
            rows = slice(start, start + self._batch)
            hidden, weights = self._hidden[rows], self._weights[rows]
            kwargs = self._inputs.kwargs(self.block.number, hidden.shape[0], hidden.shape[1])
            if "block_in" in taps:
                taps["block_in"](hidden, weights)
            with _tapped(self.block, taps, weights):
                output = run_block(module, hidden, kwargs)
            if "block_out" in taps:
                taps["block_out"](output, weights.to(output.device))
            if keep:
                self._hidden[rows] = output
            self._run.meter.block_tokens += weights.numel()


@contextmanager
def _tapped(block: Block, taps: dict[str, Look], weights: Tensor) -> Iterator[None]:
    """Show the inputs of the two output projections while the block runs."""
    places: dict[str, nn.Module] = {}
    if "attention_hidden" in taps and block.has_attention:
        places["attention_hidden"] = block.attention_out
    if "mlp_hidden" in taps and block.has_mlp:
        places["mlp_hidden"] = block.mlp_out

    def hook_for(look: Look) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        # some MLPs flatten (batch, length) away; taps always see it
        return lambda module, args: look(args[0].reshape(*weights.shape, -1), weights.to(args[0].device))

    handles = [module.register_forward_pre_hook(hook_for(taps[name])) for name, module in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def walk(
    model: Model,
    tokens: Tokens,
    *,
    order: Order = "blocks",
    run: Run | None = None,
    batch_size: int = 1,
    label: str = "walk",
) -> Iterator[Visit]:
    """Visit the blocks in order, each with the hidden states that really enter it.

    Args:
        order: "blocks": all samples through one block before the next; the method may edit the block it visits, and
            the edited block's outputs feed the next. Memory: samples x length x hidden. "samples": one batch through
            all blocks before the next; for methods that only look. Memory does not depend on the number of samples.
        batch_size: windows per forward.

    Yields:
        Visits. A visit's `observe` and `advance` give statistics; whatever the method does not run is run for it.
    """
    run = run or Run()
    work = tokens.samples * len(model.numbers)
    groups = range(0, tokens.samples, batch_size) if order == "samples" else [0]
    size = batch_size if order == "samples" else tokens.samples
    with run.progress(label, work) as done:
        for start in groups:
            part = Tokens(tokens.ids[start : start + size], tokens.weights[start : start + size])
            yield from _walk(model, part, batch_size, order, run, done)


def _walk(model: Model, tokens: Tokens, batch_size: int, order: Order, run: Run, done: Advance) -> Iterator[Visit]:
    inputs = BlockInputs(model)
    batches = tokens.ids.split(batch_size)
    hidden = torch.cat([inputs.embed(ids) for ids in batches])  # (samples, length, hidden)
    weights = tokens.weights.to(hidden.device)
    edits = model.edits_applied
    for number in list(model.numbers):
        with model.open(number) as block:
            visit = Visit(model, block, inputs, hidden, weights, batch_size, run)
            yield visit
            visit.finish()
        if order == "samples" and model.edits_applied != edits:
            raise SecateurError("an edit inside a walk over samples: the next batch would see another model")
        done(tokens.samples)
