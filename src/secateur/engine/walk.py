"""`walk`: the block-by-block stream of activations. It never runs the LM head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.engine.blocks import BlockInputs, Done, activation_bytes, run_block
from secateur.engine.moments import SecondMoment
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError, SecateurError
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import Advance, Run

Order = Literal["blocks", "samples"]
Tap = Literal["block_in", "block_mid", "block_out", "attention_hidden", "mlp_hidden"]
Look = Callable[[Tensor, Tensor], None]
Weigh = Callable[[Tensor, Tensor], Tensor]  # states and weights -> weights

GROUP_BYTES = 256 * 2**20  # of hidden states, in order "samples"
_SHOWN = 4  # tokens of made-up states that a rehearsal shows


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
        self.started = False
        self.ahead = list(model.numbers)
        self._site = -1  # where the states wait
        self._seen = 0  # how many of the model's `rebases` they know of

    def reach(self, number: int) -> None:
        """Move the states up to the entrance of block `number`, in the coordinates that it takes now."""
        if not self.started:
            self.started = True
            self._start()
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

    def passed(self, place: int | None) -> bool:
        """Whether an edit there (a block's number; None: before the first) would change what was computed already."""
        return self.started and (place is None or not self.ahead or place < self.ahead[0])

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
        if run:
            self.count(self.tokens.ids.numel())

    def count(self, tokens: int) -> None:
        self.run.meter.block_tokens += tokens
        self.run.meter.asked_tokens += tokens

    def moment(self, block: Block, tap: Tap, dtype: torch.dtype, weigh: Weigh | None, *, keep: bool) -> SecondMoment:
        moment = SecondMoment(dtype)

        def add(x: Tensor, w: Tensor) -> None:
            moment.add(x, weigh(x, w) if weigh else w)

        self.through(block, {tap: add}, keep=keep)
        if moment.total is None:
            raise NumericalError(f"block {block.number}: its {tap} was never computed")
        return moment

    def close(self) -> None:
        """Nobody wants the states any more."""

    def _start(self) -> None:
        with self.model.open_ends():
            self.hidden = [self.inputs.embed(ids) for ids in self.ids]

    def _wait(self) -> None:
        ahead = [number for number in self.ahead if number in self.model.numbers]
        self._site, self._seen = 2 * ahead[0] if ahead else -1, len(self.model.rebases)

    def _follow(self) -> None:
        """Take the states along where their place was rebased: X <- X Q is what the blocks before would give now."""
        for site, then, basis in self.model.rebases[self._seen :]:
            if site == self._site:
                self._site = then
                if basis is not None:
                    self.hidden = [_rebased(x, basis) for x in self.hidden]
        self._seen = len(self.model.rebases)


class _Rehearsed(_Stream):
    """Of a rehearsal: counts the work and what is held, and shows a few tokens of made-up states, once per visit."""

    def __init__(self, model: Model, tokens: Tokens, batch_size: int, run: Any) -> None:
        super().__init__(model, tokens, batch_size, run)
        self.rehearsal = run
        self._activation_bytes = min(batch_size, tokens.samples) * activation_bytes(model, tokens.length)
        self._held = 0.0

    def through(self, block: Block, taps: dict[str, Look], *, keep: bool) -> None:
        for tap in taps:
            if tap in ("attention_hidden", "mlp_hidden") and not _has(block, tap):
                continue
            shape = (1, min(_SHOWN, self.tokens.length), _features(self.model, block, tap))
            x = torch.rand(shape, generator=self.rehearsal.rng("made-up states", block.number, tap))
            taps[tap](x, torch.ones(shape[:2]))
        if keep or taps.keys() != {"block_in"}:
            with self.rehearsal.holding(self._activation_bytes):
                self.count(self.tokens.ids.numel())

    def moment(self, block: Block, tap: Tap, dtype: torch.dtype, weigh: Weigh | None, *, keep: bool) -> SecondMoment:
        features = _features(self.model, block, tap)
        self.through(block, {} if keep or tap != "block_in" else {"block_in": lambda x, w: None}, keep=keep)
        moment = SecondMoment(dtype)
        moment.total, moment.weight = torch.empty(features, features, dtype=dtype, device="meta"), 1.0
        with self.rehearsal.holding(features**2 * dtype.itemsize):
            return moment

    def close(self) -> None:
        self.rehearsal.hold(-self._held)
        self._held = 0.0

    def _start(self) -> None:
        self._held = self.tokens.ids.numel() * self.model.hidden_size * self.model.dtype.itemsize
        self.rehearsal.hold(self._held)

    def _follow(self) -> None:
        self._seen = len(self.model.rebases)


def _has(block: Block, tap: str) -> bool:
    return block.has_attention if tap == "attention_hidden" else block.has_mlp


def _features(model: Model, block: Block, tap: str) -> int:
    match tap:
        case "attention_hidden":
            return block.weight("attention_out").shape[1]
        case "mlp_hidden":
            return block.weight("mlp_out").shape[1]
    return block.shape.stream(model.hidden_size)[("block_in", "block_mid", "block_out").index(tap)]


def _require_finite(x: Tensor, block: Block, what: str) -> None:
    if not x.isfinite().all():
        raise NumericalError(f"block {block.number}: its {what} has NaN or Inf; try another dtype (float32)")


def _rebased(hidden: Tensor, basis: Tensor) -> Tensor:
    """Hidden states (batch, length, before) in another basis (before, after), rounded once."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(precise) @ basis.to(hidden.device, precise)).to(hidden.dtype)


class Visit:
    """One open block with the hidden states that are to enter it.

    In order "blocks" there is one visit per block, with all samples; in order "samples" one per group of windows and
    block.

    Attributes:
        block: the block, open for the time of the visit.
    """

    def __init__(self, block: Block, stream: _Stream) -> None:
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
        the attention's output projection; `mlp_hidden`: the input of the MLP's, the FFN neurons' activations. A
        rehearsal shows fewer tokens.
        """
        self._reach()
        self._stream.through(self.block, taps, keep=False)

    def advance(self, **taps: Look) -> None:
        """As `observe`, but the outputs replace the inputs and go on to the next block. Once per visit, and last."""
        self._reach()
        self._stream.through(self.block, taps, keep=True)
        self._stream.left()
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
        moment = self._stream.moment(self.block, tap, dtype, weigh, keep=False)
        if weigh is None:
            self._moments[tap, dtype] = moment
        return moment

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
    group_bytes: int = GROUP_BYTES,
    label: str = "walk",
) -> Iterator[Visit]:
    """Visit the blocks in order, each with the hidden states that really enter it.

    Args:
        order: "blocks": all samples through one block before the next; the method may edit the block it visits and
            those ahead, and the edited block's outputs feed the next. Memory: samples x length x hidden. "samples": a
            group of windows through all blocks before the next; for methods that only look.
        batch_size: windows per forward.
        group_bytes: of hidden states at once, in order "samples".

    Yields:
        Visits. What a method does not look at is run only if something later is.

    Raises:
        InvalidEditError, from the edit: it changes what was computed already.
    """
    run = run or Run()
    window_bytes = tokens.length * model.hidden_size * model.dtype.itemsize
    size = tokens.samples if order == "blocks" else max(batch_size, group_bytes // window_bytes)
    kind = _Rehearsed if run.rehearses else _Stream
    with run.progress(label, tokens.samples * len(model.numbers)) as done:
        for start in range(0, tokens.samples, size):
            part = Tokens(tokens.ids[start : start + size], tokens.weights[start : start + size])
            stream = kind(model, part, batch_size, run)
            check = _guard(stream, order)
            model.guards.append(check)
            try:
                yield from _walk(stream, done)
            finally:
                model.guards.remove(check)
                run.visit = None
                stream.close()


def _guard(stream: _Stream, order: Order) -> Callable[[int | None], str | None]:
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


def _walk(stream: _Stream, done: Advance) -> Iterator[Visit]:
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
    """Statistics at the blocks that edits come for, ascending: for filters.

    Where the method's own walk stands at the block, they are taken there, before the edit. Else from states of the
    follower's own, which go on through each block as it is before its edit, by the pass that takes its statistics: a
    pruning with a filter then costs one more forward of each window, not one per edit.
    """

    def __init__(self, model: Model, tokens: Tokens, run: Run) -> None:
        self._model, self._run = model, run
        self._stream = (_Rehearsed if run.rehearses else _Stream)(model, tokens, 1, run)

    def second_moment(self, number: int, tap: Tap, dtype: torch.dtype = torch.float64) -> SecondMoment:
        """The second moment at block `number`, which is not edited yet.

        Raises:
            SecateurError: the follower has passed the block.
        """
        visit: Visit | None = self._run.root.visit
        if visit is not None and visit.block.number == number:
            return visit.second_moment(tap, dtype)
        stream = self._stream
        if number not in stream.ahead:
            raise SecateurError(f"statistics of block {number} were asked for after those of a later one")
        stream.reach(number)
        with self._model.open(number) as block:
            moment = stream.moment(block, tap, dtype, None, keep=True)
        stream.left()
        return moment
