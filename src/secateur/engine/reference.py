"""The dense model's stream beside the pruned one's: what targets and comparisons are taken from."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.engine.blocks import BlockInputs
from secateur.engine.stream import OUT, Hidden, Look, Out, Stream, stream_before, stream_of
from secateur.engine.tokens import Tokens
from secateur.errors import UnsupportedEditError
from secateur.model.handle import Model
from secateur.model.views import Block, Original
from secateur.run import Run


class Reference:
    """The stream of a model as it is now, beside walks over what the model becomes.

    What a block is before it is edited is kept (its own tensors, no copies) until the reference stream has gone through
    it. It does so once a walk is about to leave the block, or somebody wants the two compared there; so it costs one
    forward more. As long as nothing was edited the walk's states are the reference's, and nothing is run or held.

    Args:
        batch_size: the walk's.
        inputs: the walk's, where it is there already: what the blocks are called with is the same.
    """

    def __init__(
        self, model: Model, tokens: Tokens, run: Run, batch_size: int = 1, inputs: BlockInputs | None = None
    ) -> None:
        self._model = model
        self._stream = stream_of(model, tokens, batch_size, run)
        self._stream.inputs = inputs or self._stream.inputs
        self._originals: dict[int, Original] = {}  # blocks as they were, of those that the stream has not passed
        self._changes = len(model.rebases)
        self._entered: list[Tensor] = []  # of the block that was passed last, per batch
        self._outputs: dict[Out, list[Tensor]] = {}
        model.guards.append(self._keep)

    @property
    def differs(self) -> bool:
        """Whether its states may be others than the walk's."""
        return self._stream.started

    def reach(self, number: int, walked: Stream) -> None:
        """Go through the blocks up to `number`, as they were.

        Args:
            walked: the walk's states, which enter that block or an earlier one.

        Raises:
            UnsupportedEditError: the walk's states have other coordinates now.
        """
        if any(basis is not None for _, _, basis in self._model.rebases[self._changes :]):
            raise UnsupportedEditError("states in another basis cannot be compared with those of the model that was")
        stream = self._stream
        if not stream.started:
            first = min(self._originals, default=number + 1)
            if first > number:
                return
            stream.begin(walked.hidden, [each for each in stream.ahead if each >= min(first, walked.ahead[0])])
        while stream.ahead and stream.ahead[0] <= number:
            place = stream.ahead[0]
            original = self._originals.pop(place, None)
            with original.open() if original else self._model.open(place) as block:
                self._entered, self._outputs = list(stream.hidden), {out: [] for out in OUT.values()}
                stream.pass_through(block, {out: self._note(out) for out in OUT.values()})

    def output(self, block: Block, tap: Hidden, place: int, until: int, stream: Tensor | None) -> Tensor:
        """What the projection behind a tap, without its bias, should give.

        Args:
            place: of the batch.
            until: the site that was reached.
            stream: the walk's, which the projection adds to; the sum should then be the reference's at `until`. None:
                what the projection gave in the reference, in the block that was reached last.

        Returns:
            (batch, length, rows).
        """
        linear = block.linear(block.roles[OUT[tap]])
        bias = 0 if linear.bias is None else linear.bias
        if stream is None:
            given = self._outputs[OUT[tap]][place]
            return given.to(torch.promote_types(given.dtype, torch.float32)) - bias
        wanted = self._stream.hidden[place]
        if until % 2:
            outputs: dict[str, Tensor] = {out: given[place] for out, given in self._outputs.items() if given}
            wanted = stream_before(block, "mlp_hidden", {**outputs, "block_in": self._entered[place]})
        return (wanted.to(stream) - stream) / block.multiplier - bias

    def close(self) -> None:
        self._model.guards.remove(self._keep)
        self._originals, self._entered, self._outputs = {}, [], {}
        self._stream.close()

    def _keep(self, place: int | None) -> str | None:
        """Called before each edit."""
        if place is None:
            return "the embedding is edited while states are compared with those of the model that was"
        stream = self._stream
        if place in stream.ahead and place not in self._originals:
            if not self._originals:  # before a block is gone: what all are called with
                stream.note_arguments()
            self._originals[place] = self._model.original(place)
        return None

    def _note(self, out: Out) -> Look:
        return lambda x, w: self._outputs[out].append(x.clone())


def leads_to_stream(model: Model) -> bool:
    """Whether what an output projection gives is added to the residual stream as it is."""
    shapes = [block.shape for block in model.layout().blocks.values()]
    return not model.family.post_norms and not any(shape.attention_skip or shape.mlp_skip for shape in shapes)
