"""The two halves of a block: the units that each is made of, where they are seen, and what takes them away."""

from __future__ import annotations

from typing import Literal, NamedTuple

from secateur.engine.stream import OUT, Hidden, Out
from secateur.model.modeling_secateur import Shape
from secateur.surgery.edits import DropAttention, DropMLP, KeepHeads, KeepNeurons

Half = Literal["attention", "mlp"]


class Units(NamedTuple):
    """KV heads, each with the query heads that read it, or FFN neurons.

    Attributes:
        hidden: the tap of what the output projection reads; columns of it are the units.
        dropping, narrowing: the edits that take all of them away, and some.
    """

    hidden: Hidden
    dropping: type[DropAttention | DropMLP]
    narrowing: type[KeepHeads | KeepNeurons]

    @property
    def out(self) -> Out:
        """The role of the output projection."""
        return OUT[self.hidden]

    def count(self, shape: Shape) -> int:
        return shape.kv_heads if self.narrowing is KeepHeads else shape.width


HALVES: dict[Half, Units] = {
    "attention": Units("attention_hidden", DropAttention, KeepHeads),
    "mlp": Units("mlp_hidden", DropMLP, KeepNeurons),
}


def units_of(edit: KeepHeads | KeepNeurons) -> Units:
    """Those that an edit narrows."""
    return HALVES["attention" if isinstance(edit, KeepHeads) else "mlp"]
