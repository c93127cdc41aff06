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


class _Stream:
    """Hidden states of some samples on their way through the blocks, moved on only when somebody looks.

    A method whose steps are answered from a journal looks at nothing, and then nothing is run.
    """

    def __init__(self, model: Model, tokens: Tokens, batch_size: int, run: Run) -> None:
        self.model, self.tokens, self.batch_size, self.run = model, tokens, batch_size, run
        self.inputs = BlockInputs(model)
        self.hidden: Tensor | None = None  # (samples, length, hidden), entering the first of `ahead`
        self.ahead = list(model.numbers)

    def reach(self, number: int) -> Tensor:
        """Move the states up to the entrance of block `number`."""
        if self.hidden is None:
            self.hidden = self.inputs.embed_windows(self.tokens.ids, self.batch_size)
        while self.ahead[0] != number:
            if self.ahead[0] in self.model.numbers:  # the method may have dropped it
                with self.model.open(self.ahead[0]) as block:
                    self.through(block, {}, keep=True)
            self.ahead.pop(0)
        return self.hidden

    @torch.no_grad()
    def through(self, block: Block, taps: dict[str, Look], *, keep: bool) -> None:
        """Run the block on all states, show the taps, and keep the outputs in their place if asked."""
        hidden = self.hidden
        assert hidden is not None  # narrows the type; `reach` came first
        weights = self.tokens.weights.to(hidden.device)
        for start in range(0, len(hidden), self.batch_size):
            rows = slice(start, start + self.batch_size)
            x, w = hidden[rows], weights[rows]
            arguments = self.inputs.arguments(block.number, x.shape[0], x.shape[1])
            if "block_in" in taps:
                taps["block_in"](x, w)
            with _tapped(block, taps, w):
                output = run_block(block.module, x, arguments)
            if "block_out" in taps:
                taps["block_out"](output, w.to(output.device))
            if keep:
                hidden[rows] = output
            self.run.meter.block_tokens += w.numel()


class Visit:
    """One open block with the hidden states that are to enter it.

    In order "blocks" there is one visit per block, with all samples; in order "samples" one per batch and block.

    Attributes:
        block: the block, open for the time of the visit.
    """

    def __init__(self, block: Block, stream: _Stream) -> None:
        self.block = block
        self._stream = stream
        self._looked = False
        self._left_at: int | None = None

    def observe(self, **taps: Look) -> None:
        """Run the block on all its inputs and show the taps; the outputs are thrown away. May be repeated.

        Taps, each called with (x, weights) per batch, x (batch, length, features), weights (batch, length), both valid
        during the call only: `block_in`, `block_out`: the residual stream; `attention_hidden`: the input of the
        attention's output projection; `mlp_hidden`: the input of the MLP's, the FFN neurons' activations.
        """
        self._pass(taps, keep=False)

    def advance(self, **taps: Look) -> None:
        """As `observe`, but the outputs replace the inputs and go on to the next block. Once per visit, and last."""
        self._pass(taps, keep=True)
        self._stream.ahead.pop(0)
        self._left_at = self._stream.model.edits_applied

    def finish(self) -> None:
        """Check that what was advanced is still true. A visit that only observed is advanced, while its block is open;
        one that did not look is caught up with when somebody looks further on."""
        stream = self._stream
        if self._looked and self._left_at is None and self.block.number in stream.model.numbers:
            if len(stream.ahead) > 1:  # nothing comes after the last block
                self.advance()
        elif self._left_at not in (None, self._stream.model.edits_applied):
            raise SecateurError(
                f"block {self.block.number} was edited after `advance`; the next block would see stale inputs"
            )

    def _pass(self, taps: dict[str, Look], *, keep: bool) -> None:
        if self._left_at is not None:
            raise SecateurError(f"block {self.block.number} has been left: `advance` comes last")
        self._looked = True
        self._stream.reach(self.block.number)
        self._stream.through(self.block, taps, keep=keep)


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
        Visits. What a method does not look at is run only if something later is.
    """
    run = run or Run()
    size = batch_size if order == "samples" else tokens.samples
    with run.progress(label, tokens.samples * len(model.numbers)) as done:
        for start in range(0, tokens.samples, size):
            part = Tokens(tokens.ids[start : start + size], tokens.weights[start : start + size])
            yield from _walk(_Stream(model, part, batch_size, run), order, done)


def _walk(stream: _Stream, order: Order, done: Advance) -> Iterator[Visit]:
    model, edits = stream.model, stream.model.edits_applied
    for number in list(model.numbers):
        with model.open(number) as block:
            visit = Visit(block, stream)
            yield visit
            visit.finish()
        if order == "samples" and model.edits_applied != edits:
            raise SecateurError("an edit inside a walk over samples: the next batch would see another model")
        done(stream.tokens.samples)
