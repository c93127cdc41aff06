"""Hidden states on their way through the blocks, by whom walks and references are moved on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.engine.blocks import BlockInputs, Done, activation_bytes, run_block
from secateur.engine.moments import CrossMoment, SecondMoment, matmul_precision
from secateur.engine.spill import STATE_BYTES, room_for
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import NEEDED, Run

if TYPE_CHECKING:
    from secateur.engine.reference import Reference


Hidden = Literal["attention_hidden", "mlp_hidden"]
Out = Literal["attention_out", "mlp_out"]
Tap = Hidden | Out | Literal["block_in", "block_mid", "block_out"]
Target = Literal["original", "dense", "stream"]
Look = Callable[[Tensor, Tensor], None]
Weigh = Callable[[Tensor, Tensor], Tensor]  # states and weights -> weights

_SHOWN = 4  # tokens of made-up states that a rehearsal shows
OUT: dict[Hidden, Out] = {"attention_hidden": "attention_out", "mlp_hidden": "mlp_out"}


@dataclass(frozen=True)
class Moments:
    """What a regression of an output projection W on its inputs x starts from: means over tokens, by weight.

    Attributes:
        inputs: E[x x^T], (columns, columns).
        target: E[y x^T], (rows, columns), of what W is to give; None where that is W x.
        halves: if asked for, where there is a target, the same of every other window (of a single one, of its first and
            second half): a fit on one can be judged on the other.
    """

    inputs: Tensor
    target: Tensor | None = None
    halves: tuple[Moments, ...] = ()


class Stream:
    """Hidden states of some samples on their way through the blocks, moved on only when somebody looks.

    A method whose steps are answered from a journal looks at nothing, and then nothing is run. States that are held
    follow a `Rebase` of the place where they wait.

    Attributes:
        name: of the walk by which the run's store has its states for an interrupted run to go on from: after every
            `Run.keep_states` blocks; wherever they wait for what may be a `Rebase`, with `Run.rebases`. None: they are
            computed again from the first block.
    """

    def __init__(self, model: Model, tokens: Tokens, batch_size: int, run: Run) -> None:
        self.model, self.tokens, self.run = model, tokens, run
        self.inputs = BlockInputs(model)
        self.ids, self.weights = tokens.ids.split(batch_size), tokens.weights.split(batch_size)
        self.reference: Reference | None = None
        self.name: str | None = None
        states_bytes = tokens.ids.numel() * model.hidden_size * model.dtype.itemsize
        self.room = room_for(model, states_bytes, STATE_BYTES)
        self.hidden: list[Tensor] = []  # per batch (samples, length, stream), entering the first of `ahead`
        self.started = False
        self._blocks = list(model.numbers)
        self.ahead = list(self._blocks)
        self._site = -1  # where the states wait
        self._seen = 0  # how many of the model's `rebases` they know of

    def reach(self, number: int) -> None:
        """Move the states up to the entrance of block `number`, in the coordinates that it takes now."""
        if not self.started:
            self.started = True
            if not self._go_on(number):
                self._start()
                self._wait()
        between = [each for each in self.ahead[: self.ahead.index(number)] if each in self.model.numbers]
        while self.ahead[0] != number:
            if self.ahead[0] in self.model.numbers:
                # The last of them is left after the last step that was taken over, all others before it.
                before = self.run.again() if self.ahead[0] != between[-1] else nullcontext()
                with self.model.open(self.ahead[0]) as block, before:
                    self._follow()
                    if self.reference is not None:
                        with self.run.again():
                            self.reference.reach(block.number, self)
                    self.pass_through(block, {})
            else:  # the method has dropped it
                self.ahead.pop(0)
        self._follow()

    def pass_through(self, block: Block, taps: dict[str, Look]) -> None:
        """Take the states through the first block ahead; they are then in the coordinates in which it gives them."""
        if self.reference is not None:
            self.reference.reach(block.number, self)
        self.through(block, taps, advance=True)
        self.ahead.pop(0)
        self._wait()
        passed, every = len(self._blocks) - len(self.ahead), self.run.keep_states
        if every and passed % every == 0 and not self.run.root.rebases:
            self._put_states()

    def begin(self, hidden: list[Tensor], ahead: list[int]) -> None:
        """Take over states that enter the first of the blocks ahead."""
        self.started, self.hidden, self.ahead = True, list(hidden), ahead

    def passed(self, place: int | None) -> bool:
        """Whether an edit there (a block's number; None: before the first) would change what was computed already."""
        return self.started and (place is None or not self.ahead or place < self.ahead[0])

    @torch.no_grad()
    def through(self, block: Block, taps: dict[str, Look], *, advance: bool) -> None:
        """Run the block on all states, show the taps, and put the outputs in their place if asked."""
        run = advance or taps.keys() != {"block_in"}
        for place, held in enumerate(self.hidden):
            x = held if self.room.device is None else held.to(self.room.device)
            w = self.weights[place].to(x.device)
            if "block_in" in taps:
                taps["block_in"](x, w)
            if not run:
                continue
            arguments = self.inputs.arguments(block.number, x.shape[0], x.shape[1])
            whole, output = advance or "block_out" in taps, None
            with _tapped(block, taps, w, stop=not whole), suppress(Done):
                output = run_block(block.module, x, arguments)
            if output is not None:
                _require_finite(output, block, "output")
            if "block_out" in taps:
                assert output is not None  # narrows the type
                taps["block_out"](output, w.to(output.device))
            if advance:
                assert output is not None  # narrows the type
                self.hidden[place] = self.room.put(output)
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

        self.through(block, {tap: add}, advance=False)
        if moment.total is None:
            raise NumericalError(f"block {block.number}: its {tap} was never computed")
        return moment

    def moments(
        self, block: Block, tap: Hidden, target: Target, until: int, dtype: torch.dtype, halves: bool
    ) -> Moments:
        """With a reference; see `Visit.moments`."""
        sums = [(SecondMoment(dtype), CrossMoment(dtype)) for _ in range(2 if halves else 1)]
        place, window, shown = itertools.count(), itertools.count(), dict[str, Tensor]()
        reference = self.reference
        assert reference is not None  # narrows the type

        def add(x: Tensor, w: Tensor) -> None:
            stream = stream_before(block, tap, shown) if target == "stream" else None
            y = reference.output(block, tap, next(place), until, stream)
            for row in range(len(x)):
                for number, part in self._halves(next(window)) if halves else [(0, slice(None))]:
                    sums[number][0].add(x[row, part], w[row, part])
                    sums[number][1].add_pairs(y[row, part], x[row, part], w[row, part])

        def show(name: str) -> Look:
            return lambda x, w: shown.__setitem__(name, x)

        self.through(block, {**{name: show(name) for name in ("block_in", "attention_out")}, tap: add}, advance=False)
        means = [Moments(inputs.mean, products.mean) for inputs, products in sums]
        return _joined(means, [inputs.weight for inputs, _ in sums]) if halves else means[0]

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
            self.hidden = [self.room.put(self.inputs.embed(ids)) for ids in self.ids]

    def _wait(self) -> None:
        ahead = [number for number in self.ahead if number in self.model.numbers]
        self._site, self._seen = 2 * ahead[0] if ahead else -1, len(self.model.rebases)
        if self.run.root.rebases:  # before any step sees them: they are never behind the journal's last one
            self._put_states()

    def _follow(self) -> None:
        """Take the states along where their place was rebased: X <- X Q is what the blocks before would give now."""
        for site, then, basis in self.model.rebases[self._seen :]:
            if site == self._site:
                self._site = then
                if basis is not None:
                    self.hidden = [self.room.put(_rebased(x, basis)) for x in self.hidden]
        self._seen = len(self.model.rebases)

    def _put_states(self) -> None:
        if self._states_key is not None and self.ahead:
            place = [self.ahead[0], self.model.edits_applied, self._site, self._seen]
            self.run.store.put_states(self._states_key, {"states": self.hidden, "place": place})

    @property
    def _states_key(self) -> str | None:
        if self.name is None or self.reference is not None:
            return None
        return f"{NEEDED}{self.name}" if self.run.root.rebases else self.name

    def _go_on(self, number: int) -> bool:
        """Take up an interrupted run's states, if they are of the model as it is by now and not behind `number`."""
        if self._states_key is None:
            return False
        try:
            stored = self.run.store.get_states(self._states_key)
        except KeyError:
            return False
        first, edits, site, seen = stored["place"]
        if edits > self.model.edits_applied or first not in self.ahead or first > number:
            return False
        self.hidden, self._site, self._seen = [self.room.put(x.clone()) for x in stored["states"]], site, seen
        passed = self.ahead.index(first)
        self.ahead = self.ahead[passed:]
        last, one = int(first == number), self.tokens.ids.numel()  # of those that were run before, see `reach`
        with self.run.again():
            self.count((passed - last) * one)
        self.count(last * one)
        return True


class _Rehearsed(Stream):
    """Of a rehearsal: counts the work and what is held, and shows a few tokens of made-up states, once per visit."""

    def __init__(self, model: Model, tokens: Tokens, batch_size: int, run: Any) -> None:
        super().__init__(model, tokens, batch_size, run)
        self.rehearsal = run
        self._activation_bytes = min(batch_size, tokens.samples) * activation_bytes(model, tokens.length)
        self._held = 0.0

    def through(self, block: Block, taps: dict[str, Look], *, advance: bool) -> None:
        for tap in taps:
            if not _has(block, tap):
                continue
            shape = (1, min(_SHOWN, self.tokens.length), _features(self.model, block, tap))
            x = torch.rand(shape, generator=self.rehearsal.rng("made-up states", block.number, tap))
            taps[tap](x, torch.ones(shape[:2]))
        if advance or taps.keys() != {"block_in"}:
            with self.rehearsal.holding(self._activation_bytes):
                self.count(self.tokens.ids.numel())

    def moment(self, block: Block, tap: Tap, dtype: torch.dtype, weigh: Weigh | None) -> SecondMoment:
        features = _features(self.model, block, tap)
        self.through(block, {"block_in": lambda x, w: None} if tap == "block_in" else {}, advance=False)
        moment = SecondMoment(dtype)
        moment.total, moment.weight = torch.empty(features, features, dtype=dtype, device="meta"), 1.0
        with self.rehearsal.holding(features**2 * dtype.itemsize):
            return moment

    def moments(
        self, block: Block, tap: Hidden, target: Target, until: int, dtype: torch.dtype, halves: bool
    ) -> Moments:
        inputs, weight = self.moment(block, tap, dtype, None).mean, block.weight(OUT[tap])
        products = torch.empty(weight.shape, dtype=dtype, device="meta")
        with self.rehearsal.holding(2 * (inputs.numel() + products.numel()) * dtype.itemsize):
            return Moments(inputs, products, 2 * (Moments(inputs, products),) if halves else ())

    def begin(self, hidden: list[Tensor], ahead: list[int]) -> None:
        super().begin(hidden, ahead)
        self._start(copies=4)  # what enters and leaves a block, and what its two projections give

    def note_arguments(self) -> None:
        pass

    def close(self) -> None:
        self.rehearsal.hold(-self._held)
        self._held = 0.0

    def _start(self, copies: int = 1) -> None:
        states = self.tokens.ids.numel() * self.model.hidden_size * self.model.dtype.itemsize
        if self._states_key is not None:
            self.rehearsal.root.states_bytes += states
        self._held = copies * states
        beside = states if copies > 1 else 0  # the walk's own
        self.rehearsal.root.spilled_bytes = max(self.rehearsal.root.spilled_bytes, self._held + beside)
        self.rehearsal.hold(self._held)

    def _follow(self) -> None:
        self._seen = len(self.model.rebases)

    def _put_states(self) -> None:
        pass


def stream_of(model: Model, tokens: Tokens, batch_size: int, run: Run) -> Stream:
    return (_Rehearsed if run.rehearses else Stream)(model, tokens, batch_size, run)


def _has(block: Block, tap: str) -> bool:
    part = tap.partition("_")[0]
    return block.has_attention if part == "attention" else block.has_mlp if part == "mlp" else True


def _features(model: Model, block: Block, tap: str) -> int:
    match tap:
        case "attention_hidden" | "mlp_hidden":
            return block.weight(OUT[tap]).shape[1]
        case "attention_out" | "mlp_out":
            return block.weight(tap).shape[0]
    return block.shape.stream(model.hidden_size)[("block_in", "block_mid", "block_out").index(tap)]


def _require_finite(x: Tensor, block: Block, what: str) -> None:
    if not x.isfinite().all():
        raise NumericalError(f"block {block.number}: its {what} has NaN or Inf; try another dtype (float32)")


@matmul_precision()
def _rebased(hidden: Tensor, basis: Tensor) -> Tensor:
    """Hidden states (batch, length, before) in another basis (before, after), rounded once."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(precise) @ basis.to(hidden.device, precise)).to(hidden.dtype)


def stream_before(block: Block, tap: Hidden, shown: dict[str, Tensor]) -> Tensor:
    """The residual stream that a projection adds to, (batch, length, hidden) in float32 or better, on its device.

    Args:
        tap: the projection's input.
        shown: what taps of the block have shown: "block_in" and, unless there is no attention, "attention_out".
    """
    entered = shown["block_in"]  # where the block before lies
    here = next(block.module.parameters(), entered).device
    stream = entered.to(here, torch.promote_types(entered.dtype, torch.float32))
    if tap == "mlp_hidden" and "attention_out" in shown:
        stream = stream + block.multiplier * shown["attention_out"].to(stream)
    return stream


def _joined(halves: list[Moments], weights: list[float]) -> Moments:
    """The means over both halves."""
    shares = [weight / (sum(weights) or 1.0) for weight in weights]
    inputs = sum(share * half.inputs for share, half in zip(shares, halves, strict=True))
    targets = [half.target for half in halves if half.target is not None]
    target = sum(share * each for share, each in zip(shares, targets, strict=True))
    return Moments(inputs, target, tuple(halves))  # type: ignore[arg-type]  # sums of tensors


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
        if name in OUT.values():
            return module.register_forward_hook(lambda module, args, output: show(name, output))
        return module.register_forward_pre_hook(lambda module, args: show(name, args[0]))

    handles = [attach(name, module) for name, module in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
