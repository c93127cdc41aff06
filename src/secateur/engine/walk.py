"""`walk`: the block-by-block stream of activations. It never runs the LM head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from secateur.engine.moments import SecondMoment
from secateur.engine.reference import Reference, leads_to_stream
from secateur.engine.stream import Hidden, Look, Moments, Stream, Tap, Target, Weigh, stream_of
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, SecateurError
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import Advance, Run

Order = Literal["blocks", "samples"]

GROUP_BYTES = 256 * 2**20  # of hidden states, in order "samples"


class Visit:
    """One open block with the hidden states that are to enter it.

    In order "blocks" there is one visit per block, with all samples; in order "samples" one per group of windows and
    block.

    Attributes:
        block: the block, open for the time of the visit.
    """

    def __init__(self, block: Block, stream: Stream) -> None:
        self.block = block
        self._stream = stream
        self._looked = self._left = False
        self._moments: dict[tuple[Tap, torch.dtype], SecondMoment] = {}
        self._edits = 0  # that the moments know of

    def observe(self, **taps: Look) -> None:
        """Run the block on all its inputs and show the taps; the outputs are thrown away. May be repeated.

        Taps, each called with (x, weights) per batch, x (batch, length, features), weights (batch, length), both valid
        during the call only: `block_in`, `block_mid`, `block_out`: the residual stream where it enters, between
        attention and MLP, and where it leaves (to see what enters, nothing is run); `attention_hidden`: the input of
        the attention's output projection; `mlp_hidden`: the input of the MLP's, the FFN neurons' activations;
        `attention_out`, `mlp_out`: what these projections give. A rehearsal shows fewer tokens.
        """
        self._reach()
        self._stream.through(self.block, taps, advance=False)

    def advance(self, **taps: Look) -> None:
        """As `observe`, but the outputs replace the inputs and go on to the next block. Once per visit, and last."""
        self._reach()
        self._stream.pass_through(self.block, taps)
        self._left = True

    def second_moment(
        self, tap: Tap, dtype: torch.dtype = torch.float64, *, weigh: Weigh | None = None
    ) -> SecondMoment:
        """The sum of w x x^T over all calibration tokens at a tap. Asked for again before an edit, it is not taken
        again: so a method and a filter that want the same cost one look.

        Args:
            weigh: weights of the tokens from states and weights, (batch, length, features) and (batch, length).
        """
        if self._edits != self._stream.model.edits_applied:
            self._moments, self._edits = {}, self._stream.model.edits_applied
        if weigh is None and (tap, dtype) in self._moments:
            return self._moments[tap, dtype]
        self._reach()
        moment = self._stream.moment(self.block, tap, dtype, weigh)
        if weigh is None:
            self._moments[tap, dtype] = moment
        return moment

    def moments(
        self,
        tap: Hidden,
        target: Target = "original",
        dtype: torch.dtype = torch.float64,
        *,
        until: int | None = None,
        halves: bool = False,
    ) -> Moments:
        """For a regression of the output projection W behind a tap, in one look: E[x x^T] of its inputs on the walk's
        stream, and E[y x^T] of what it is to give.

        Args:
            target: what y is. "original": W x. "dense": what the projection gives in the reference, where the same
                tokens come by other states. "stream": what makes the residual stream behind the projection the
                reference's, so that it also makes up for what went wrong before. The same while nothing was edited.
            until: for "stream", the site up to which the difference is made up for; 2n enters block n, 2n + 1 lies
                between its attention and its MLP. The one behind the projection if None.
            halves: with `Moments.halves`, where y is not W x.

        Raises:
            InvalidOptionError: the walk has no reference; or the family's blocks add no linear map of x to the stream.
        """
        reference = self._stream.reference if target != "original" else None
        if target != "original" and reference is None:
            raise InvalidOptionError(f"the target '{target}' needs a walk with a reference")
        if target == "stream" and not leads_to_stream(self._stream.model):
            raise InvalidOptionError(
                f"in this {self.block.family.model_type} a norm or a change of basis lies between the modules and the "
                "stream, so no linear map leads there; take the target 'original' or 'dense'"
            )
        self._reach()
        if reference is not None:
            until = until or 2 * self.block.number + (1 if tap == "attention_hidden" else 2)
            reference.reach((until - 1) // 2, self._stream)
            if reference.differs:
                return self._stream.moments(self.block, tap, target, until, dtype, halves)
        return Moments(self.second_moment(tap, dtype).mean)

    def finish(self) -> None:
        """A visit that only observed is advanced, while its block is open; one that did not look is caught up with
        when somebody looks further on."""
        remains = self.block.number in self._stream.model.numbers
        if self._looked and not self._left and remains and len(self._stream.ahead) > 1:  # nothing comes after the last
            self.advance()

    def _reach(self) -> None:
        if self._left:
            raise SecateurError(f"block {self.block.number} has been left: `advance` comes last")
        self._looked = True
        self._stream.reach(self.block.number)


def walk(
    model: Model,
    tokens: Tokens,
    *,
    order: Order = "blocks",
    run: Run | None = None,
    batch_size: int = 1,
    group_bytes: int = GROUP_BYTES,
    label: str = "walk",
    reference: bool | Reference = False,
) -> Iterator[Visit]:
    """Visit the blocks in order, each with the hidden states that really enter it.

    Args:
        order: "blocks": all samples through one block before the next; the method may edit the block it visits and
            those ahead, and the edited block's outputs feed the next. Memory: samples x length x hidden. "samples": a
            group of windows through all blocks before the next; for methods that only look.
        batch_size: windows per forward.
        group_bytes: of hidden states at once, in order "samples".
        reference: in order "blocks", keep beside these states those of the model as it is now, or was when a
            `Reference` was made, for `Visit.moments`. Memory: four times the states more.

    Yields:
        Visits. What a method does not look at is run only if something later is.

    Raises:
        InvalidEditError, from the edit: it changes what was computed already.
    """
    run = run or Run()
    if reference and order == "samples":
        raise InvalidOptionError('a walk over samples edits nothing, so it needs no reference; take order "blocks"')
    window_bytes = tokens.length * model.hidden_size * model.dtype.itemsize
    size = tokens.samples if order == "blocks" else max(batch_size, group_bytes // window_bytes)
    with run.progress(label, tokens.samples * len(model.numbers)) as done:
        for start in range(0, tokens.samples, size):
            part = Tokens(tokens.ids[start : start + size], tokens.weights[start : start + size])
            stream = stream_of(model, part, batch_size, run)
            stream.name = run.name_walk(label)
            own = Reference(model, part, run, batch_size, inputs=stream.inputs) if reference is True else None
            stream.reference = own or reference or None  # type: ignore[assignment]  # True is `own`
            check = _guard(stream, order)
            model.guards.append(check)
            try:
                yield from _walk(stream, done)
            finally:
                model.guards.remove(check)
                run.visit = None
                stream.close()
                if own is not None:
                    own.close()


def _guard(stream: Stream, order: Order) -> Callable[[int | None], str | None]:
    """Says why an edit at a place cannot be while the walk is under way; None if it can."""

    def refused(place: int | None) -> str | None:
        if order == "samples":
            return "an edit inside a walk over samples: the next group would see another model"
        if not stream.passed(place):
            return None
        what = "the embedding" if place is None else f"block {place}"
        where = f"block {stream.ahead[0]}" if stream.ahead else "the end"
        return f"{what} is edited behind a walk that stands at {where}, whose states were computed without the edit"

    return refused


def _walk(stream: Stream, done: Advance) -> Iterator[Visit]:
    model, run = stream.model, stream.run
    for number in list(model.numbers):
        if number not in model.numbers:  # dropped meanwhile
            continue
        with model.open(number) as block:
            visit = Visit(block, stream)
            run.visit = visit
            yield visit
            visit.finish()
        done(stream.tokens.samples)


class Follower:
    """Statistics at the blocks that edits come for: for filters. To be closed at the end.

    Where the method's own walk stands at the block, and no reference is wanted, they are taken there, before the edit.
    Else on states of the follower's own, which go through the blocks as the edits leave them: two forwards of each
    window without the head, and one more for a reference, not some per edit. An edit behind them makes them begin anew.

    Args:
        reference: one that is there, which the follower closes; True: compare with the model as it is when the follower
            is made. Where its states begin anew, with the model as it is then.
    """

    def __init__(self, model: Model, tokens: Tokens, run: Run, *, reference: bool | Reference = False) -> None:
        self._model, self._tokens, self._run, self._compares = model, tokens, run, bool(reference)
        self._stream: Stream | None = None
        self._begin(reference if isinstance(reference, Reference) else None)

    @contextmanager
    def visit(self, number: int) -> Iterator[Visit]:
        """A visit of block `number` as it is now; nothing moves on by it."""
        visit: Visit | None = self._run.root.visit
        if not self._compares and visit is not None and visit.block.number == number:
            yield visit
            return
        if self._stream is None or self._stream.passed(number):
            self.close()
            self._begin()
        assert self._stream is not None  # narrows the type
        self._stream.reach(number)
        with self._model.open(number) as block:
            yield Visit(block, self._stream)

    def close(self) -> None:
        if self._stream is not None:
            self._model.guards.remove(self._check)
            self._stream.close()
            if self._stream.reference is not None:
                self._stream.reference.close()
            self._stream = None

    def _begin(self, reference: Reference | None = None) -> None:
        self._stream = stream_of(self._model, self._tokens, 1, self._run)
        if self._compares:
            self._stream.reference = reference or Reference(self._model, self._tokens, self._run)
        self._model.guards.append(self._check)

    def _check(self, place: int | None) -> None:
        """Called before each edit."""
        if self._stream is not None and self._stream.passed(place):
            self.close()
