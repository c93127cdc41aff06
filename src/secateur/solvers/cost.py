"""What a method will cost, foretold from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.model.layout import Layout


@dataclass(frozen=True)
class Cost:
    """What a method will do.

    Attributes:
        block_tokens, head_tokens: tokens through one block, and through the head.
        asked_tokens: as `block_tokens`, by an implementation that shares no prefixes between variants; what papers
            count. The same unit as `Meter.asked_tokens`.
        peak_states: the largest number of hidden-state tokens held at once, those of sweeps apart.
        after: the layout that the method will reach; approximate where the method decides on the way.
        sweep_states: hidden-state tokens that its largest sweep would hold at once if memory were no matter (see
            `engine.sweep.sweep_states`); not while `peak_states` are held.
        kept_states: those that are held beside both, such as a reference's.
        extra_bytes: what it holds at the peak beside weights and hidden states, in bytes: statistics, factorizations,
            edits with their matrices.
    """

    block_tokens: float
    head_tokens: float
    asked_tokens: float
    peak_states: float
    after: Layout
    sweep_states: float = 0
    kept_states: float = 0
    extra_bytes: float = 0
