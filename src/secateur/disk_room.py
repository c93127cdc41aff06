"""What a run takes on the disk beside its output (`OUT.run`), foretold by a rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.driver import Pruning
from secateur.engine.spill import STATE_BYTES
from secateur.engine.tokens import Tokens
from secateur.model.handle import Model
from secateur.run import Rehearsal
from secateur.surgery.edits import Edit, KeepHeads, KeepNeurons, SetWeight, StreamEdit


@dataclass(frozen=True, kw_only=True)
class DiskRoom:
    """Of one pruning.

    Attributes:
        results_bytes: results of its steps.
        states_bytes: states of all walks, if they are stored.
        spilled_bytes: hidden states of the largest walk or sweep, which a streamed model runs as a whole.
        written: parameters that a streamed model writes into files as it is edited.
        block: parameters of the largest block.
        rebases: whether the residual stream may come into another basis, so that states are always stored.
    """

    results_bytes: float
    states_bytes: float
    spilled_bytes: float
    written: int
    block: int
    rebases: bool

    @classmethod
    def of(cls, run: Rehearsal, rehearsed: Pruning) -> DiskRoom:
        return cls(
            results_bytes=run.stored_bytes, states_bytes=run.states_bytes, spilled_bytes=run.spilled_bytes,
            written=_written(rehearsed), rebases=run.rebases,
            block=max(block.parameters for block in rehearsed.before.blocks.values()),
        )  # fmt: skip

    def bytes(self, model: Model, *, tries: int = 1, keep_states: int = 0, texts: Sequence[Tokens] = ()) -> int:
        """At most.

        Args:
            model: that is pruned; it may be hollow.
            tries: prunings that lie in one journal.
            keep_states: as `Run` has it.
            texts: that the model is measured on.
        """
        item, size = model.dtype.itemsize, tries * self.results_bytes
        if keep_states or self.rebases:
            # A walk's new ones are there before its old ones go; those of each try stay.
            size += tries * self.states_bytes + self.spilled_bytes
        if model.is_streamed:
            size += item * (self.written + self.block)
            measured = max((text.ids.numel() for text in texts), default=0) * model.hidden_size * item
            states = max(self.spilled_bytes, measured)
            size += (1 + self.rebases) * states if states > STATE_BYTES else 0  # beside them those of another width
        return int(size)


def _written(rehearsed: Pruning) -> int:
    """What of blocks is narrowed or replaced, by each edit. What an edit of the stream changes may lie there twice: as
    it was folded, and in its last basis."""
    before, after = rehearsed.before, rehearsed.after
    if any(isinstance(edit, StreamEdit) for edit in rehearsed.edits):
        return before.parameters + after.parameters

    def changed(edit: Edit) -> int:
        match edit:
            case SetWeight():
                return edit.tensor.numel()
            case KeepHeads() | KeepNeurons():
                block = after.blocks.get(edit.block, before.blocks[edit.block])
                return block.attention if isinstance(edit, KeepHeads) else block.mlp
        return 0

    return sum(map(changed, rehearsed.edits))
