"""`walk`: the block-by-block stream of activations. It never runs the LM head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.engine.blocks import BlockInputs, Done, activation_bytes, run_block
from secateur.engine.moments import CrossMoment, SecondMoment
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError, SecateurError, UnsupportedEditError
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import Advance, Run
from secateur.surgery.apply import twin

Order = Literal["blocks", "samples"]
Hidden = Literal["attention_hidden", "mlp_hidden"]
Out = Literal["attention_out", "mlp_out"]
Tap = Hidden | Out | Literal["block_in", "block_mid", "block_out"]
Target = Literal["original", "dense", "stream"]
Look = Callable[[Tensor, Tensor], None]
Weigh = Callable[[Tensor, Tensor], Tensor]  # states and weights -> weights

GROUP_BYTES = 256 * 2**20  # of hidden states, in order "samples"
_SHOWN = 4  # tokens of made-up states that a rehearsal shows
_OUT: dict[Hidden, Out] = {"attention_hidden": "attention_out", "mlp_hidden": "mlp_out"}


@dataclass(frozen=True)
class Moments:
    """What a regression of an output projection W on its inputs x starts from: means over tokens, by weight.

    Attributes:
        inputs: E[x x^T], (columns, columns).
        target: E[y x^T], (rows, columns), of what W is to give; None where that is W x.
        halves: where there is a target the same of every other window (of a single one, of its first and second half):
            a fit on one can be judged on the other.
    """

    inputs: Tensor
    target: Tensor | None = None
    halves: tuple[Moments, ...] = ()


class _Stream:
    """Hidden states of some samples on their way through the blocks, moved on only when somebody looks.

    A method whose steps are answered from a journal looks at nothing, and then nothing is run. States that are held
    follow a `Rebase` of the place where they wait.
    """

    def __init__(self, model: Model, tokens: Tokens, batch_size: int, run: Run) -> None:
        self.model, self.tokens, self.run = model, tokens, run
        self.inputs = BlockInputs(model)
        self.ids, self.weights = tokens.ids.split(batch_size), tokens.weights.split(batch_size)
        self.reference: Reference | None = None
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
                    self.pass_through(block, {})
            else:  # the method has dropped it
                self.ahead.pop(0)
        self._follow()

    def pass_through(self, block: Block, taps: dict[str, Look]) -> None:
        """Take the states through the first block ahead; they are then in the coordinates in which it gives them."""
        if self.reference is not None:
            self.reference.reach(block.number, self)
        self.through(block, taps, keep=True)
        self.ahead.pop(0)
        self._wait()

    def begin(self, hidden: list[Tensor], ahead: list[int]) -> None:
        """Take over states that enter the first of the blocks ahead."""
        self.started, self.hidden, self.ahead = True, list(hidden), ahead

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

    def note_arguments(self) -> None:
        """Note what all blocks are called with while they are there."""
        for size in {len(ids) for ids in self.ids}:
            self.inputs.arguments(self.ahead[0], size, self.tokens.length)

    def count(self, tokens: int) -> None:
        self.run.meter.block_tokens += tokens
        self.run.meter.asked_tokens += tokens

    def moment(self, block: Block, tap: Tap, dtype: torch.dtype, weigh: Weigh | None) -> SecondMoment:
        moment = SecondMoment(dtype)

        def add(x: Tensor, w: Tensor) -> None:
            moment.add(x, weigh(x, w) if weigh else w)

        self.through(block, {tap: add}, keep=False)
        if moment.total is None:
            raise NumericalError(f"block {block.number}: its {tap} was never computed")
        return moment

    def moments(
        self, block: Block, tap: Hidden, target: Target, until: int, dtype: torch.dtype, weigh: Weigh | None
    ) -> Moments:
        halves = [(SecondMoment(dtype), CrossMoment(dtype)) for _ in range(2)]
        place, window, shown = itertools.count(), itertools.count(), dict[str, Tensor]()
        reference = self.reference if target != "original" else None

        def add(x: Tensor, w: Tensor) -> None:
            stream = _before(block, tap, shown)
            w = weigh(stream, w) if weigh else w
            y = None
            if reference is not None:
                y = reference.output(block, tap, next(place), until, stream if target == "stream" else None)
            for row in range(len(x)):
                for number, part in self._halves(next(window)):
                    halves[number][0].add(x[row, part], w[row, part])
                    if y is not None:
                        halves[number][1].add_pairs(y[row, part], x[row, part], w[row, part])

        def show(name: str) -> Look:
            return lambda x, w: shown.__setitem__(name, x)

        self.through(block, {**{name: show(name) for name in ("block_in", "attention_out")}, tap: add}, keep=False)
        weights = [inputs.weight for inputs, _ in halves]
        means = [(inputs.mean, products.mean if reference else None) for inputs, products in halves]
        return _joined([Moments(*mean) for mean in means], weights)

    def _halves(self, window: int) -> list[tuple[int, slice]]:
        """Which half a window's tokens are in."""
        middle = self.tokens.length // 2
        return (
            [(window % 2, slice(None))] if self.tokens.samples > 1 else [(0, slice(middle)), (1, slice(middle, None))]
        )

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
            if not _has(block, tap):
                continue
            shape = (1, min(_SHOWN, self.tokens.length), _features(self.model, block, tap))
            x = torch.rand(shape, generator=self.rehearsal.rng("made-up states", block.number, tap))
            taps[tap](x, torch.ones(shape[:2]))
        if keep or taps.keys() != {"block_in"}:
            with self.rehearsal.holding(self._activation_bytes):
                self.count(self.tokens.ids.numel())

    def moment(self, block: Block, tap: Tap, dtype: torch.dtype, weigh: Weigh | None) -> SecondMoment:
        features = _features(self.model, block, tap)
        self.through(block, {"block_in": lambda x, w: None} if tap == "block_in" else {}, keep=False)
        moment = SecondMoment(dtype)
        moment.total, moment.weight = torch.empty(features, features, dtype=dtype, device="meta"), 1.0
        with self.rehearsal.holding(features**2 * dtype.itemsize):
            return moment

    def moments(
        self, block: Block, tap: Hidden, target: Target, until: int, dtype: torch.dtype, weigh: Weigh | None
    ) -> Moments:
        inputs, weight = self.moment(block, tap, dtype, weigh).mean, block.weight(_OUT[tap])
        products = torch.empty(weight.shape, dtype=dtype, device="meta")
        with self.rehearsal.holding(2 * (inputs.numel() + products.numel()) * dtype.itemsize):
            return (
                Moments(inputs) if target == "original" else Moments(inputs, products, 2 * (Moments(inputs, products),))
            )

    def begin(self, hidden: list[Tensor], ahead: list[int]) -> None:
        super().begin(hidden, ahead)
        self._start(copies=4)  # what enters and leaves a block, and what its two projections give

    def note_arguments(self) -> None:
        pass

    def close(self) -> None:
        self.rehearsal.hold(-self._held)
        self._held = 0.0

    def _start(self, copies: int = 1) -> None:
        self._held = copies * self.tokens.ids.numel() * self.model.hidden_size * self.model.dtype.itemsize
        self.rehearsal.hold(self._held)

    def _follow(self) -> None:
        self._seen = len(self.model.rebases)


def _has(block: Block, tap: str) -> bool:
    part = tap.partition("_")[0]
    return block.has_attention if part == "attention" else block.has_mlp if part == "mlp" else True


def _features(model: Model, block: Block, tap: str) -> int:
    match tap:
        case "attention_hidden" | "mlp_hidden":
            return block.weight(_OUT[tap]).shape[1]
        case "attention_out" | "mlp_out":
            return block.weight(tap).shape[0]
    return block.shape.stream(model.hidden_size)[("block_in", "block_mid", "block_out").index(tap)]


def _require_finite(x: Tensor, block: Block, what: str) -> None:
    if not x.isfinite().all():
        raise NumericalError(f"block {block.number}: its {what} has NaN or Inf; try another dtype (float32)")


def _rebased(hidden: Tensor, basis: Tensor) -> Tensor:
    """Hidden states (batch, length, before) in another basis (before, after), rounded once."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(precise) @ basis.to(hidden.device, precise)).to(hidden.dtype)


def _before(block: Block, tap: Hidden, shown: dict[str, Tensor]) -> Tensor:
    """The residual stream that a projection adds to, (batch, length, hidden) in float32 or better.

    Args:
        tap: the projection's input.
        shown: what taps of the block have shown: "block_in" and, unless there is no attention, "attention_out".
    """
    stream = shown["block_in"].to(torch.promote_types(shown["block_in"].dtype, torch.float32))
    if tap == "mlp_hidden" and "attention_out" in shown:
        stream = stream + block.multiplier * shown["attention_out"]
    return stream


def _joined(halves: list[Moments], weights: list[float]) -> Moments:
    """The means over both halves."""
    shares = [weight / (sum(weights) or 1.0) for weight in weights]
    inputs = sum(share * half.inputs for share, half in zip(shares, halves, strict=True))
    targets = [half.target for half in halves if half.target is not None]
    target = sum(share * each for share, each in zip(shares, targets, strict=True)) if targets else None
    return Moments(inputs, target, tuple(halves) if targets else ())  # type: ignore[arg-type]  # sums of tensors


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
        self._stream = _stream(model, tokens, batch_size, run)
        self._stream.inputs = inputs or self._stream.inputs
        self._originals: dict[int, Block] = {}  # blocks as they were, of those that the stream has not passed
        self._changes = len(model.rebases)
        self._entered: list[Tensor] = []  # of the block that was passed last, per batch
        self._outputs: dict[Out, list[Tensor]] = {}
        model.guards.append(self._keep)

    @property
    def differs(self) -> bool:
        """Whether its states may be others than the walk's."""
        return self._stream.started

    def reach(self, number: int, walked: _Stream) -> None:
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
            with nullcontext(original) if original else self._model.open(place) as block:
                self._entered, self._outputs = list(stream.hidden), {out: [] for out in _OUT.values()}
                stream.pass_through(block, {out: self._note(out) for out in _OUT.values()})

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
        linear = block.linear(block.roles[_OUT[tap]])
        bias = 0 if linear.bias is None else linear.bias
        if stream is None:
            return self._outputs[_OUT[tap]][place] - bias
        wanted = self._stream.hidden[place]
        if until % 2:
            outputs: dict[str, Tensor] = {out: given[place] for out, given in self._outputs.items() if given}
            wanted = _before(block, "mlp_hidden", {**outputs, "block_in": self._entered[place]})
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
            with self._model.open(place) as block:
                self._originals[place] = replace(block, module=twin(block.module))
        return None

    def _note(self, out: Out) -> Look:
        return lambda x, w: self._outputs[out].append(x.clone())


def leads_to_stream(model: Model) -> bool:
    """Whether what an output projection gives is added to the residual stream as it is."""
    shapes = [block.shape for block in model.layout().blocks.values()]
    return not model.family.post_norms and not any(shape.attention_skip or shape.mlp_skip for shape in shapes)


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
        the attention's output projection; `mlp_hidden`: the input of the MLP's, the FFN neurons' activations;
        `attention_out`, `mlp_out`: what these projections give. A rehearsal shows fewer tokens.
        """
        self._reach()
        self._stream.through(self.block, taps, keep=False)

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
        weigh: Weigh | None = None,
    ) -> Moments:
        """For a regression of the output projection W behind a tap, in one look: E[x x^T] of its inputs on the walk's
        stream, and E[y x^T] of what it is to give.

        Args:
            target: what y is. "original": W x. "dense": what the projection gives in the reference, where the same
                tokens come by other states. "stream": what makes the residual stream behind the projection the
                reference's, so that it also makes up for what went wrong before. The same while nothing was edited.
            until: for "stream", the site up to which the difference is made up for; 2n enters block n, 2n + 1 lies
                between its attention and its MLP. The one behind the projection if None.
            weigh: weights of the tokens from the residual stream that W adds to, and from their weights.

        Raises:
            InvalidOptionError: the walk has no reference; or the family's blocks add no linear map of x to the stream.
        """
        reference = self._stream.reference if target != "original" else None
        if target != "original" and reference is None:
            raise InvalidOptionError(f"the target '{target}' needs a walk with a reference")
        if (target == "stream" or weigh is not None) and not leads_to_stream(self._stream.model):
            raise InvalidOptionError(
                f"in this {self.block.family.model_type} a norm or a change of basis lies between the modules and the "
                "stream, so no linear map leads there; take the target 'original' or 'dense'"
            )
        self._reach()
        if reference is not None:
            until = until or 2 * self.block.number + (1 if tap == "attention_hidden" else 2)
            reference.reach((until - 1) // 2, self._stream)
            reference = reference if reference.differs else None
        if reference is None and weigh is None:
            return Moments(self.second_moment(tap, dtype).mean)
        return self._stream.moments(self.block, tap, target if reference else "original", until or 0, dtype, weigh)

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
    """Show the stream before the MLP and the inputs and outputs of the two output projections while the block runs.

    With `stop` the forward ends by `Done` where the last tap has been shown: what comes after it is not computed.
    """
    places: dict[str, nn.Module] = {}
    if "block_mid" in taps and block.family.no_rebase is None:  # other forms of block have no such place
        places["block_mid"] = block.mlp_norm
    places |= {
        tap: block.linear(block.roles[tap.replace("hidden", "out")])
        for tap in taps
        if tap.partition("_")[0] in ("attention", "mlp") and _has(block, tap)
    }
    unseen = set(places)

    def show(name: str, x: Tensor) -> None:
        x = x.reshape(*weights.shape, -1)  # some MLPs flatten (batch, length) away; taps always see it
        taps[name](x, weights.to(x.device))
        unseen.discard(name)
        if stop and not unseen:
            _require_finite(x, block, name)
            raise Done

    def attach(name: str, module: nn.Module) -> RemovableHandle:
        if name in _OUT.values():
            return module.register_forward_hook(lambda module, args, output: show(name, output))
        return module.register_forward_pre_hook(lambda module, args: show(name, args[0]))

    handles = [attach(name, module) for name, module in places.items()]
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
            stream = _stream(model, part, batch_size, run)
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


def _stream(model: Model, tokens: Tokens, batch_size: int, run: Run) -> _Stream:
    return (_Rehearsed if run.rehearses else _Stream)(model, tokens, batch_size, run)


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
        self._stream: _Stream | None = None
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
        self._stream = _stream(self._model, self._tokens, 1, self._run)
        if self._compares:
            self._stream.reference = reference or Reference(self._model, self._tokens, self._run)
        self._model.guards.append(self._check)

    def _check(self, place: int | None) -> None:
        """Called before each edit."""
        if self._stream is not None and self._stream.passed(place):
            self.close()
