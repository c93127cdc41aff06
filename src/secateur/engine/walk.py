"""`walk`: the block-by-block stream of activations. It never runs the LM head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.engine.blocks import BlockInputs, Done, run_block
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError, SecateurError
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import Advance, Run

Order = Literal["blocks", "samples"]
Tap = Literal["block_in", "block_mid", "block_out", "attention_hidden", "mlp_hidden"]
Look = Callable[[Tensor, Tensor], None]


class _Stream:
    """Hidden states of some samples on their way through the blocks, moved on only when somebody looks.

    A method whose steps are answered from a journal looks at nothing, and then nothing is run. States that are held
    follow a `Rebase` of the place where they wait.
    """

    def __init__(self, model: Model, tokens: Tokens, batch_size: int, run: Run) -> None:
        self.model, self.tokens, self.run = model, tokens, run
        self.inputs = BlockInputs(model)
        self.ids, self.weights = tokens.ids.split(batch_size), tokens.weights.split(batch_size)
        self.hidden: list[Tensor] = []  # per batch (samples, length, stream), entering the first of `ahead`
        self.ahead = list(model.numbers)
        self._site = -1  # where the states wait
        self._seen = 0  # how many of the model's `rebases` they know of

    def reach(self, number: int) -> None:
        """Move the states up to the entrance of block `number`, in the coordinates that it takes now."""
        if not self.hidden:
            self.hidden = [self.inputs.embed(ids) for ids in self.ids]
            self._wait()
        while self.ahead[0] != number:
            if self.ahead[0] in self.model.numbers:
                with self.model.open(self.ahead[0]) as block:
                    self._follow()
                    self.through(block, {}, keep=True)
                self.left()
            else:  # the method has dropped it
                self.ahead.pop(0)
        self._follow()

    def left(self) -> None:
        """The states have passed the first block ahead, and are in the coordinates in which it gives them now."""
        self.ahead.pop(0)
        self._wait()

    def _wait(self) -> None:
        there = [number for number in self.ahead if number in self.model.numbers]
        self._site, self._seen = 2 * there[0] if there else -1, len(self.model.rebases)

    def _follow(self) -> None:
        """Take the states along where their place was rebased: X <- X Q is what the blocks before would give now."""
        for site, then, basis in self.model.rebases[self._seen :]:
            if site == self._site:
                self._site = then
                if basis is not None:
                    self.hidden = [_rebased(x, basis) for x in self.hidden]
        self._seen = len(self.model.rebases)

    @torch.no_grad()
    def through(self, block: Block, taps: dict[str, Look], *, keep: bool) -> None:
        """Run the block on all states, show the taps, and keep the outputs in their place if asked."""
        run = keep or taps.keys() != {"block_in"}
        for place, x in enumerate(self.hidden):
            w = self.weights[place].to(x.device)
            if "block_in" in taps:
                taps["block_in"](x, w)
            if not run:
                continue
            arguments = self.inputs.arguments(block.number, x.shape[0], x.shape[1])
            whole, output = keep or "block_out" in taps, None
            with _tapped(block, taps, w, stop=not whole), suppress(Done):
                output = run_block(block.module, x, arguments)
            if output is not None:
                _require_finite(output, block, "output")
            if "block_out" in taps:
                assert output is not None  # narrows the type
                taps["block_out"](output, w.to(output.device))
            if keep:
                assert output is not None  # narrows the type
                self.hidden[place] = output
            self.run.meter.block_tokens += w.numel()
            self.run.meter.asked_tokens += w.numel()


def _require_finite(x: Tensor, block: Block, what: str) -> None:
    if not x.isfinite().all():
        raise NumericalError(f"block {block.number}: its {what} has NaN or Inf; try another dtype (float32)")


def _rebased(hidden: Tensor, basis: Tensor) -> Tensor:
    """Hidden states (batch, length, before) in another basis (before, after), rounded once."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(precise) @ basis.to(hidden.device, precise)).to(hidden.dtype)


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
        during the call only: `block_in`, `block_mid`, `block_out`: the residual stream where it enters, between
        attention and MLP, and where it leaves (to see what enters, nothing is run); `attention_hidden`: the input of
        the attention's output projection; `mlp_hidden`: the input of the MLP's, the FFN neurons' activations.
        """
        self._pass(taps, keep=False)

    def advance(self, **taps: Look) -> None:
        """As `observe`, but the outputs replace the inputs and go on to the next block. Once per visit, and last."""
        self._pass(taps, keep=True)
        self._stream.left()
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
def _tapped(block: Block, taps: dict[str, Look], weights: Tensor, *, stop: bool) -> Iterator[None]:
    """Show the stream before the MLP and the inputs of the two output projections while the block runs.

    With `stop` the forward ends by `Done` where the last tap has been shown: what comes after it is not computed.
    """
    places: dict[str, nn.Module] = {}
    if "block_mid" in taps and block.family.no_rebase is None:  # other forms of block have no such place
        places["block_mid"] = block.mlp_norm
    if "attention_hidden" in taps and block.has_attention:
        places["attention_hidden"] = block.attention_out
    if "mlp_hidden" in taps and block.has_mlp:
        places["mlp_hidden"] = block.mlp_out

    unseen = set(places)

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(*weights.shape, -1)  # some MLPs flatten (batch, length) away; taps always see it
            taps[name](x, weights.to(x.device))
            unseen.discard(name)
            if stop and not unseen:
                _require_finite(x, block, name)
                raise Done

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in places.items()]
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
