"""How much each block keeps, searched on the loss.

The search stands on two things. A database of versions: each MLP at a few widths and each attention at every number of
KV heads, pruned and refitted once by optimal brain surgery, from one walk over the stream of a model that is pruned to
the budget already (as Tyr-the-Pruner, arXiv 2503.09657, lets errors accumulate). And an estimate of what each version
changes in the loss, with everything else pruned as it is now: where the output projection gives W h(t) for token t, and
g(t) is the gradient of the summed loss there, a version with the map W' (zeros for the columns that are gone) changes
it by

    sum over t of d(t) + d(t)^2 / 2,  d(t) = g(t)^T (W' - W) h(t),

its first order and the diagonal of the empirical Fisher, which alone sees that a large change costs: one backward pass
for all versions of all blocks. The least total under the budget is where marginal losses are equal, by a Lagrange
multiplier. Blocks move as far as the estimates are good, which the true loss decides, and these are made anew there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.engine.blocks import BlockInputs, run_block
from secateur.engine.loss import NegativeLogLikelihood, logit_bytes, loss_slopes, require_slopes
from secateur.engine.moments import matmul_precision
from secateur.engine.sweep import REMOVED, Part, Variant, altered, sweeper_of
from secateur.engine.tokens import Tokens
from secateur.engine.walk import Visit, walk
from secateur.errors import DataError, InvalidOptionError
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import Run
from secateur.solvers.allocation import Allocation, narrowed, rounded
from secateur.solvers.halves import HALVES, Half
from secateur.solvers.obs import columns_of, group_sizes, prune_bytes, prune_groups
from secateur.solvers.ratios import root_of
from secateur.surgery.apply import trial
from secateur.surgery.edits import DropAttention, DropMLP, KeepHeads, KeepNeurons, SetWeight, keep

Place = tuple[int, Half]  # of a block
Choice = Mapping[Place, int]  # FFN neurons or KV heads, 0 for nothing

_STRIDES = (3, 2, 1)  # how many sizes further a place may go at once: each is tried


def search_allocation(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    start: Allocation,
    levels: int = 8,
    rounds: int = 4,
    search_samples: int = 8,
    damping: float = 0.001,
) -> Allocation:
    """FFN widths and KV heads of the least loss on held-out calibration, from a start. A journaled step, in which each
    half of a block is one, too: an interrupted search goes on with the versions that there are.

    Nothing is changed in the model. A round costs two forwards and a backward pass of the search's windows, and one
    forward per stride that is tried.

    Args:
        start: an allocation of this budget, as `curve_allocation` gives one.
        levels: widths of each MLP in the database, beside its own, the start's and none.
        search_samples: the last windows of the calibration, on which the loss is taken; the others are for the
            statistics.
        damping: of the surgery, see `prune_groups`.

    Raises:
        InvalidOptionError: a value out of its range; a model in float16.
        DataError: no token counts in the search's windows.
    """
    if levels < 2 or rounds < 1:
        raise InvalidOptionError(f"a searched allocation takes 2 levels and 1 round at least, not {levels}, {rounds}")
    if not 0 < search_samples < tokens.samples:
        raise InvalidOptionError(
            f"search_samples is at least 1 and less than the calibration's {tokens.samples} windows (--samples), not "
            f"{search_samples}"
        )
    require_slopes(model)
    apart = tokens.samples - search_samples
    search = Tokens(tokens.ids[apart:], tokens.weights[apart:])
    if not search.weights[:, 1:].any():
        raise DataError(f"no token counts in the {search_samples} windows of the search; give more search_samples")

    def compute() -> dict[str, Any]:
        database = _Database(model, start, levels, damping)
        choice = database.choice(start)
        database.fill(tokens.first(apart), choice, run)
        try:
            allocation, curve = _Search(model, search, budget, run, database).descend(choice, rounds)
        finally:
            run.hold(-database.bytes)
        return {"allocation": allocation.to_json(), "curve": curve}

    found = run.step("allocation", compute)
    run.note("loss while allocating", found["curve"])
    return Allocation.from_json(found["allocation"])


class _Database:
    """Versions of each block's MLP and attention.

    Attributes:
        edits: what makes a version, by part; `Part.version` is its size.
        sizes: by place, ascending: FFN neurons or KV heads, from 0 (it goes) to all.
        bytes: of the edits' weights.
    """

    def __init__(self, model: Model, start: Allocation, levels: int, damping: float) -> None:
        self.model, self.layout, self.damping = model, model.layout(), damping
        self.edits: dict[Part, KeepHeads | KeepNeurons] = {}
        self.sizes: dict[Place, list[int]] = {}
        self.bytes = 0
        able = {edit: edit.__name__ not in model.family.cannot for edit in (DropAttention, DropMLP, KeepHeads)}
        if model.family.post_norms:  # to first order, what only scales a norm's input changes nothing: all looks free
            able[DropAttention] = able[DropMLP] = False
        for number, block in self.layout.blocks.items():
            width, kv_heads = block.shape.width, block.shape.kv_heads
            if kv_heads:
                some = range(1, kv_heads) if able[KeepHeads] else ()
                self.sizes[number, "attention"] = [*[0] * able[DropAttention], *some, kv_heads]
            if width:
                widths = {width * k // (levels + 1) for k in range(1, levels + 1)} | {start.widths[number]}
                self.sizes[number, "mlp"] = sorted({*[0] * able[DropMLP], *widths - {0}, width})

    def choice(self, allocation: Allocation) -> Choice:
        return {(number, half): allocation.kept(half)[number] for number, half in self.sizes}

    def variant(self, choice: Choice, number: int | None = None) -> Variant:
        """The parts that are not whole; of one block if asked."""
        return frozenset(
            Part(n, half, size or REMOVED)
            for (n, half), size in choice.items()
            if size < self.sizes[n, half][-1] and number in (None, n)
        )

    def version(self, place: Place, size: int, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The columns that stay of an output projection whose whole weight is (out, in), and the weight on these."""
        number, half = place
        if size in (0, self.sizes[place][-1]):
            columns = torch.arange(whole.shape[1] if size else 0, device=whole.device)
            return columns, whole[:, columns]
        edit = self.edits[Part(number, half, size)]
        columns = columns_of(torch.tensor(edit.index), whole.shape[1] // self.sizes[place][-1])
        assert edit.out_weight is not None  # narrows the type
        return columns.to(whole.device), edit.out_weight.to(whole)

    def fill(self, tokens: Tokens, choice: Choice, run: Run) -> None:
        """One walk over the stream of the model that is pruned by these versions; those of each place are a step."""
        for visit in walk(self.model, tokens, order="blocks", run=run, label="versions"):
            with ExitStack() as pruned:
                for half in ("attention", "mlp"):
                    place = (visit.block.number, half)
                    if place in self.sizes:
                        key = f"versions of block {visit.block.number}, {half}"
                        self._add(place, run.step(key, partial(self._pruned, visit, place, run)), run)
                        part = self.variant({place: choice[place]})
                        pruned.enter_context(altered(visit.block, part, self.edits))
                visit.advance()

    def _pruned(self, visit: Visit, place: Place, run: Run) -> dict[str, dict[str, Tensor]]:
        """By optimal brain surgery through all sizes in one descent: by size, what stays and the weight on it."""
        number, half = place
        weight = visit.block.weight(HALVES[half].out).detach()
        *sizes, whole = (size for size in self.sizes[place] if size)
        versions: dict[str, dict[str, Tensor]] = {}
        if not sizes:
            return versions
        moment = visit.second_moment(HALVES[half].hidden, torch.float32)
        hessian, left, index = 2 * moment.mean, weight, torch.arange(whole)
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean())  # once for all sizes
        rows, wide = weight.shape
        columns_each = wide // whole
        with run.holding(prune_bytes(rows, wide, torch.float32)):
            for size in reversed(sizes):
                gone = len(index) - size
                kept = prune_groups(  # what a singular Hessian is damped by more holds for all smaller sizes
                    left, hessian, columns_each, [1] * gone if half == "attention" else group_sizes(gone, "released"),
                    error="exact", damping=0.0, name=f"block {number}, {half}",
                )  # fmt: skip
                columns = columns_of(kept.index, columns_each).to(hessian.device)
                index, hessian, left = index[kept.index], hessian[columns][:, columns], kept.weight
                versions[str(size)] = {"index": index, "weight": left.to(weight.dtype)}
        return versions

    def _add(self, place: Place, versions: Mapping[str, Mapping[str, Tensor]], run: Run) -> None:
        number, half = place
        for size, kept in versions.items():
            weight = kept["weight"]
            self.edits[Part(number, half, int(size))] = HALVES[half].narrowing(number, keep(kept["index"]), weight)
            self.bytes += weight.numel() * weight.element_size()
            run.hold(weight.numel() * weight.element_size())


class _Option(NamedTuple):
    """A size of a place: what it changes in the loss (nats), and the parameters that go with it."""

    size: int
    change: float
    saved: int


class _Search:
    """From an allocation to a better one, in versions of the database.

    Args:
        tokens: windows whose loss is taken.
    """

    def __init__(self, model: Model, tokens: Tokens, budget: Budget, run: Run, database: _Database) -> None:
        self.model, self.tokens, self.budget, self.run, self.database = model, tokens, budget, run, database
        self.layout = database.layout
        self.sweeper = sweeper_of(model, run, database.edits)

    def descend(self, choice: Choice, rounds: int) -> tuple[Allocation, list[float]]:
        """What was found, and the loss after each round."""
        (loss,) = self._losses([choice])
        curve = [loss]
        for _ in range(rounds):
            changes = self._changes(choice)
            nexts = [self._step(choice, changes, stride) for stride in _STRIDES]
            losses = self._losses(nexts)
            best = min(range(len(nexts)), key=losses.__getitem__)
            if losses[best] < loss:
                choice, loss = nexts[best], losses[best]
            elif not self.run.rehearses:  # which foretells the most that it takes
                break
            curve.append(loss)
        return self._settled(choice), [round(each, 4) for each in curve if math.isfinite(each)]

    def _losses(self, choices: Sequence[Choice]) -> list[float]:
        """Mean losses on the search's windows, in nats; infinite where they are NaN."""
        variants = [self.database.variant(choice) for choice in choices]
        sums = self.sweeper.sums(self.tokens, variants, NegativeLogLikelihood(), "allocation").sum(dim=1)
        means = (sums / self.tokens.weights[:, 1:].double().sum()).tolist()
        return [mean if math.isfinite(mean) else math.inf for mean in means]

    def _saved(self, place: Place, size: int) -> int:
        """The parameters that go where a place has this size, the other half of its block being whole."""
        block, half = self.layout.blocks[place[0]], place[1]
        sizes = (size, block.shape.kv_heads) if half == "mlp" else (block.shape.width, size)
        return block.parameters - narrowed(block, *sizes).parameters

    # --- what each version would change ---

    @torch.no_grad()
    def _changes(self, choice: Choice) -> dict[Place, dict[int, float]]:
        """What each size of each place would change in the loss of the choice, in nats per token, as estimated."""
        if self.run.rehearses:
            return self._rehearsed()
        model, ids, database = self.model, self.tokens.ids, self.database
        inputs, entering = BlockInputs(model), []
        changes: dict[Place, dict[int, float]] = {}
        hidden = inputs.embed_windows(ids, 1)  # (samples, length, hidden)
        for number in model.numbers:
            entering.append(hidden)
            with model.open(number) as block, altered(block, database.variant(choice, number), database.edits):
                some = [run_block(block.module, x, inputs.arguments(number, 1, ids.shape[1])) for x in hidden.split(1)]
            hidden = torch.cat(some)
        _, slopes = loss_slopes(model, hidden, self.tokens, torch.arange(len(ids)), NegativeLogLikelihood())
        for number in reversed(model.numbers):
            with model.open(number) as block:
                changes |= self._back(block, choice, entering.pop(), slopes, inputs)
        self._count()
        return changes

    def _back(
        self, block: Block, choice: Choice, hidden: Tensor, slopes: Tensor, inputs: BlockInputs
    ) -> dict[Place, dict[int, float]]:
        """The changes of one block's versions; the slopes by what leaves it become those by what enters it.

        The block is whole, with zeros for the columns that are gone, so that all versions see what they read.
        """
        halves = [half for number, half in choice if number == block.number]
        wide = [SetWeight(block.number, HALVES[half].out, self._wide(block, half, choice)) for half in halves]
        changes = {(block.number, half): dict.fromkeys(self.database.sizes[block.number, half], 0.0) for half in halves}
        whole = {half: block.weight(HALVES[half].out).detach() for half in halves}
        maps: dict[Half, tuple[Tensor, Tensor]] = {}  # what the output projections read and gave

        def seen(half: Half) -> Callable[[Any, tuple[Tensor], Tensor], None]:
            return lambda module, args, output: maps.update({half: (args[0], output)})

        with trial(block, wide), ExitStack() as hooks:
            for half in halves:
                linear = block.linear(block.roles[HALVES[half].out])
                hooks.callback(linear.register_forward_hook(seen(half)).remove)
            for place in range(len(hidden)):
                with torch.enable_grad():
                    x = hidden[place : place + 1].detach().requires_grad_()
                    output = run_block(block.module, x, inputs.arguments(block.number, 1, x.shape[1]))
                    given = [maps[half][1] for half in halves]
                    by_input, *by_given = torch.autograd.grad(output, [x, *given], slopes[place : place + 1].to(output))
                for half, slope in zip(halves, by_given, strict=True):
                    now = choice[block.number, half]
                    for size, change in self._along((block.number, half), now, whole[half], slope, maps[half][0]):
                        changes[block.number, half][size] += change
                slopes[place] = by_input[0]  # last: the MLP's may lie there
        return changes

    def _wide(self, block: Block, half: Half, choice: Choice) -> Tensor:
        """The output projection's weight in the choice, with zeros for the columns that are gone."""
        whole = block.weight(HALVES[half].out).detach()
        columns, weight = self.database.version((block.number, half), choice[block.number, half], whole)
        wide = torch.zeros_like(whole)
        wide[:, columns] = weight
        return wide

    def _along(self, place: Place, now: int, whole: Tensor, slope: Tensor, read: Tensor) -> Iterator[tuple[int, float]]:
        """The change by each size, from some tokens: what the projection reads, and the slopes by what it gives."""
        slope, read = slope.reshape(-1, len(whole)).float(), read.detach().reshape(-1, whole.shape[1]).float()
        along: dict[int, Tensor] = {}  # g(t)^T W' h(t) by size, (tokens,)
        for size in self.database.sizes[place]:
            columns, weight = self.database.version(place, size, whole)
            with matmul_precision():
                along[size] = ((slope @ weight.float()) * read[:, columns]).sum(dim=1)
        counted = float(self.tokens.weights[:, 1:].double().sum())  # the slopes are those of the mean
        for size, given in along.items():
            change = given - along[now]
            yield size, float(change.sum() + counted * change.square().sum() / 2)

    def _rehearsed(self) -> dict[Place, dict[int, float]]:
        self._count()
        states = (len(self.model.numbers) + 2) * self.tokens.ids.numel() * self.model.hidden_size
        with self.run.holding(states * self.model.dtype.itemsize + 2 * logit_bytes(self.model, self.tokens.length)):
            return {place: {size: -float(size) for size in sizes} for place, sizes in self.database.sizes.items()}

    def _count(self) -> None:
        """A forward; of the blocks one more, since nothing but what enters them was kept; a backward pass, which counts
        as two."""
        meter, tokens = self.run.meter, self.tokens.ids.numel()
        meter.block_tokens += 4 * tokens * len(self.model.numbers)
        meter.asked_tokens += 4 * tokens * len(self.model.numbers)
        meter.head_tokens += 3 * tokens

    # --- the best under the budget ---

    def _step(self, choice: Choice, changes: Mapping[Place, Mapping[int, float]], stride: int) -> Choice:
        """The least estimated loss within the room, each place at most `stride` sizes away.

        By a Lagrange multiplier, the price of a parameter; what room is left goes to the best gains per parameter.
        """
        options: dict[Place, list[_Option]] = {}
        most = max(map(len, self.database.sizes.values()))
        for place, size in choice.items():
            sizes = self.database.sizes[place]
            at = sizes.index(size)
            reach = math.ceil(stride * len(sizes) / most)  # of few KV heads one at a time
            near = sizes[max(0, at - reach) : at + reach + 1]
            options[place] = [_Option(each, changes[place][each], self._saved(place, each)) for each in near]
        target = self.budget.target(self.layout)

        def cheapest(price: float) -> dict[Place, _Option]:
            return {place: min(some, key=lambda o: o.change - price * o.saved) for place, some in options.items()}

        def saved(price: float) -> int:
            return sum(option.saved for option in cheapest(price).values())

        dearest = 1 + 2 * max(abs(option.change) for some in options.values() for option in some)
        price = root_of(saved, target, -dearest, dearest)
        chosen = cheapest(math.nextafter(price, math.inf))
        room = sum(option.saved for option in chosen.values()) - target
        while gains := [
            ((chosen[place].change - option.change) / (chosen[place].saved - option.saved), place, option)
            for place, some in options.items()
            for option in some
            if 0 < chosen[place].saved - option.saved <= room and option.change < chosen[place].change
        ]:
            _, place, option = max(gains)
            room -= chosen[place].saved - option.saved
            chosen[place] = option
        return {place: option.size for place, option in chosen.items()}

    def _settled(self, choice: Choice) -> Allocation:
        """The choice, with all FFNs a little wider or narrower, so that the target is met to a neuron."""
        full = Allocation.of(self.layout)
        widths = {n: choice.get((n, "mlp"), width) for n, width in full.widths.items()}
        heads = {n: choice.get((n, "attention"), kv_heads) for n, kv_heads in full.kv_heads.items()}
        kept, target = Allocation(widths, heads).parameters(self.layout), self.budget.target(self.layout)
        owed = kept - (self.layout.block_parameters - target)
        blocks = {n: self.layout.blocks[n] for n, width in widths.items() if width}
        neurons = sum(widths[n] * block.neuron for n, block in blocks.items())

        def wanted(more: float) -> dict[int, float]:
            return {n: min(widths[n] * (1 + more), block.shape.width) for n, block in blocks.items()}

        def grown(more: float) -> float:
            return sum(width * blocks[n].neuron for n, width in wanted(more).items()) - neurons

        more = root_of(grown, -owed, -1.0, 10.0)
        return Allocation({**widths, **rounded(self.layout, wanted(more), self.budget)}, heads)
