"""`sweep`: the loss of many variants of a model in one pass over its blocks.

A variant is a set of parts that are removed, or replaced by another version of them. Variants that agree up to some
block share their hidden states up to there; the states split only where variants differ. A greedy round over N
candidates therefore costs about half of N forwards, and each block is opened once, however many variants there are. It
is exact: the losses are those of the whole model with the same parts removed or replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.engine.blocks import BlockInputs, activation_bytes, run_block
from secateur.engine.loss import Metric, NegativeLogLikelihood, logit_bytes, sample_losses
from secateur.engine.spill import Room, room_for
from secateur.engine.tokens import Tokens
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout
from secateur.model.modeling_secateur import Shape
from secateur.model.views import Block
from secateur.run import Advance, Rehearsal, Run
from secateur.surgery.apply import trial
from secateur.surgery.edits import BlockEdit, DropAttention, DropMLP, Edit

Kind = Literal["attention", "mlp", "block"]
MEMORY_BYTES = 2 * 2**30
REMOVED = -1  # a part's version


@dataclass(frozen=True, order=True)
class Part:
    """Something of which a variant has another version: a block's attention, its MLP, or the whole block.

    Attributes:
        version: REMOVED, or the number of one that the sweep is given (see `Versions`).
    """

    block: int
    kind: Kind
    version: int = REMOVED


Variant = frozenset[Part]
DENSE: Variant = frozenset()
Versions = Mapping[Part, BlockEdit]  # the edit that makes the part's version; of whole blocks there are none
_REMOVES: Mapping[Kind, tuple[type[DropAttention | DropMLP], ...]] = {
    "attention": (DropAttention,),
    "mlp": (DropMLP,),
    "block": (DropAttention, DropMLP),
}


@contextmanager
def altered(block: Block, parts: Iterable[Part], versions: Versions | None = None) -> Iterator[None]:
    """For the time of the context the block has these versions of its parts, exactly as if it had been edited so.

    Of a whole block that is removed only the maps on its residual branch are left, where the residual stream was
    rebased.
    """
    edits: dict[type[BlockEdit], BlockEdit] = {}
    for part in parts:
        if part.version != REMOVED:
            edit = (versions or {})[part]
            edits[type(edit)] = edit
            continue
        for kind in _REMOVES[part.kind]:
            if block.has_attention if kind is DropAttention else block.has_mlp:
                edits[kind] = kind(block.number)
    with trial(block, list(edits.values())):
        yield


class Sweeper:
    """Sweeps of one model by one run, in this process: what a search is handed. A subclass may spread the variants over
    workers, and adds what these metered to the run's meter.

    Args:
        versions: the edits of the versions that variants name.
    """

    def __init__(self, model: Model, run: Run, versions: Versions | None = None) -> None:
        self.model, self.run, self.versions = model, run, versions

    @staticmethod
    def publish(edit: Edit) -> object:
        """Put an edit that is real where sweeps elsewhere can follow it; gives what they find it by."""
        return None

    def sums(self, tokens: Tokens, variants: Sequence[Variant], metric: Metric, label: str) -> Tensor:
        """Weighted sums of losses, (variants, samples) float64; see `sample_sweep`."""
        return sample_sweep(self.model, tokens, variants, metric, run=self.run, versions=self.versions, label=label)

    def final_states(self, tokens: Tokens) -> Tensor:
        """Of the model as it is, (samples, length, hidden)."""
        return final_states(self.model, tokens, run=self.run)


def sweeper_of(model: Model, run: Run, versions: Versions | None = None) -> Sweeper:
    """The run's own kind of sweeper."""
    made: Sweeper = (run.sweeper or Sweeper)(model, run, versions)
    return made


def sweep(
    model: Model, tokens: Tokens, variants: Sequence[Variant], metric: Metric | None = None, **how: Any
) -> Tensor:
    """Mean loss of each variant over all counted predictions, (variants,) float64, in nats; else as `sample_sweep`."""
    sums = sample_sweep(model, tokens, variants, metric, **how)
    return sums.sum(dim=1) / tokens.weights[:, 1:].double().sum()


def sample_sweep(
    model: Model,
    tokens: Tokens,
    variants: Sequence[Variant],
    metric: Metric | None = None,
    *,
    run: Run | None = None,
    versions: Versions | None = None,
    memory_bytes: int = MEMORY_BYTES,
    label: str = "sweep",
) -> Tensor:
    """The weighted sum of losses of each variant over each sample's counted predictions.

    Args:
        variants: sets of parts that are removed or of another version, by block numbers of the model as loaded; the
            empty set is the model as it is.
        metric: negative log-likelihood if None.
        versions: the edits that make the versions, by part.
        memory_bytes: what the hidden states and activations may take, half each. Samples, then variants, that do not
            fit together are run in groups, at least one sample and two variants at a time; of a streamed model, which
            each group would read again, all together, with states in files.

    Returns:
        (variants, samples) float64, in nats. A variant whose activations overflow has NaN or Inf.
    """
    run, metric = run or Run(), metric or NegativeLogLikelihood()
    if not variants:
        return torch.zeros(0, tokens.samples, dtype=torch.float64)
    run.meter.asked_tokens += len(variants) * tokens.ids.numel() * len(model.numbers)
    unique = sorted(set(variants), key=sorted)  # neighbours share prefixes
    row_bytes = _row_bytes(model, tokens.length)
    room = room_for(model, row_bytes * len(unique) * tokens.samples, memory_bytes / 2)
    samples_at_once = max(1, memory_bytes // (2 * row_bytes * len(unique)))
    variants_at_once = max(2, memory_bytes // (2 * row_bytes))
    if model.is_streamed:
        samples_at_once, variants_at_once = tokens.samples, len(unique)
    sums: dict[Variant, Tensor] = {v: torch.zeros(tokens.samples, dtype=torch.float64) for v in unique}
    groups = [unique[i : i + variants_at_once] for i in range(0, len(unique), variants_at_once)]
    if isinstance(run, Rehearsal):
        return _counted(model, tokens, variants, groups, metric, run)
    rows_at_once = _rows_at_once(model, tokens.length, model.device.type, memory_bytes)
    with run.progress(label, _work(model, groups) * tokens.samples) as done, model.open_ends():
        for start in range(0, tokens.samples, samples_at_once):
            ids = tokens.ids[start : start + samples_at_once]
            for group in groups:
                finals = propagate(
                    model, ids, group, run=run, rows_at_once=rows_at_once, versions=versions, done=done, room=room
                )
                for place in range(len(ids)):
                    hidden = [finals[variant][place] for variant in group]
                    losses = sample_losses(model, hidden, tokens, start + place, metric, run)
                    for variant, loss in zip(group, losses, strict=True):
                        sums[variant][start + place] = loss
    return torch.stack([sums[variant] for variant in variants])


def final_states(model: Model, tokens: Tokens, *, run: Run | None = None) -> Tensor:
    """Hidden states after the last block, (samples, length, hidden); what `KLDivergence` keeps of a reference."""
    run = run or Run()
    run.meter.asked_tokens += tokens.ids.numel() * len(model.numbers)
    if isinstance(run, Rehearsal):
        run.meter.block_tokens += tokens.ids.numel() * len(model.numbers)
        with run.holding(sweep_bytes(model, tokens.ids.numel(), tokens.length, run.device)):
            return torch.empty(*tokens.ids.shape, model.hidden_size, dtype=model.dtype, device="meta")
    rows_at_once = _rows_at_once(model, tokens.length, model.device.type, MEMORY_BYTES)
    with run.progress("final states", _work(model, [[DENSE]]) * tokens.samples) as done:
        return propagate(model, tokens.ids, [DENSE], run=run, rows_at_once=rows_at_once, done=done)[DENSE]


@torch.no_grad()
def propagate(
    model: Model,
    ids: Tensor,
    variants: Sequence[Variant],
    *,
    run: Run,
    rows_at_once: int,
    versions: Versions | None = None,
    done: Advance = lambda amount: None,
    room: Room | None = None,
) -> dict[Variant, Tensor]:
    """Hidden states after the last block for each variant: ids (samples, length) -> (samples, length, hidden)."""
    inputs, room = BlockInputs(model), room or Room()
    states = {DENSE: inputs.embed_windows(ids, 1, room)}  # by the parts muted so far
    for number in list(model.numbers):
        with model.open(number) as block:
            states = _through(block, inputs, states, variants, versions, run, rows_at_once, done, room)
    return {variant: states[_upto(variant, model.numbers[-1])] for variant in variants}


def _through(
    block: Block,
    inputs: BlockInputs,
    states: dict[Variant, Tensor],
    variants: Sequence[Variant],
    versions: Versions | None,
    run: Run,
    rows_at_once: int,
    done: Advance,
    room: Room,
) -> dict[Variant, Tensor]:
    """One block for all variants: each distinct prefix once for each distinct thing muted here.

    A state's last use writes its output in the state's place, so memory holds what comes out, not also what went in.
    """
    after: dict[Variant, Tensor] = {}
    by_action: dict[Variant, list[Variant]] = {}
    for reached in sorted({_upto(variant, block.number) for variant in variants}, key=sorted):
        action = frozenset(part for part in reached if part.block == block.number)
        by_action.setdefault(action, []).append(reached)
    uses = Counter(reached - action for action, many in by_action.items() for reached in many)
    for action, reached_here in by_action.items():
        before = [states[reached - action] for reached in reached_here]
        uses.subtract(reached - action for reached in reached_here)
        last = [not uses[reached - action] for reached in reached_here]
        if not _runs(action, block.shape):
            for reached, entered, mine in zip(reached_here, before, last, strict=True):
                after[reached] = entered if mine else room.empty(entered, entered.shape).copy_(entered)
            continue
        samples, length = before[0].shape[:2]
        outputs: list[Tensor] = []
        rows = [(state, sample) for state in range(len(before)) for sample in range(samples)]
        with altered(block, action, versions):
            for start in range(0, len(rows), rows_at_once):
                batch = rows[start : start + rows_at_once]
                # a state that passed a dropped block may still lie on another device
                where = room.device or before[0].device
                taken = [before[state][sample, None].to(where) for state, sample in batch]
                hidden = taken[0] if len(taken) == 1 else torch.cat(taken)  # (rows, length, hidden)
                output = run_block(block.module, hidden, inputs.arguments(block.number, len(batch), length))
                if not outputs:  # in the place of states that nobody needs any more, unless width or device change
                    width = output.shape[-1]
                    outputs = [
                        state if mine and room.takes(state, output) else room.empty(output, (samples, length, width))
                        for state, mine in zip(before, last, strict=True)
                    ]
                for (state, sample), row in zip(batch, output, strict=True):
                    outputs[state][sample] = row
                run.meter.block_tokens += len(batch) * length
                done(len(batch))
        after.update(zip(reached_here, outputs, strict=True))
    return after


def _runs(action: Variant, shape: Shape) -> bool:
    """Whether a block without these parts changes its input; a whole one leaves the maps between two bases."""
    return bool(shape.attention_skip or shape.mlp_skip) or not any(part.kind == "block" for part in action)


def _counted(
    model: Model, tokens: Tokens, variants: Sequence[Variant], groups: Sequence[Sequence[Variant]], metric: Metric,
    run: Rehearsal,
) -> Tensor:  # fmt: skip
    """What `sample_sweep` would do, counted, and made-up losses: at random, times the parameters that are missing,
    since small parts are the ones that go first."""
    unique, predicted = sum(map(len, groups)), tokens.length - 1
    run.meter.block_tokens += _work(model, groups) * tokens.ids.numel()
    run.meter.head_tokens += (unique + len(groups) * metric.heads) * tokens.samples * predicted
    states = sweep_states(unique, tokens.samples, tokens.length)
    run.root.spilled_bytes = max(run.root.spilled_bytes, states / tokens.length * _row_bytes(model, tokens.length))
    held = sweep_bytes(model, states, tokens.length, run.device)
    with run.holding(held + logit_bytes(model, tokens.length)):
        blocks = model.layout().blocks
        sizes = [1 + sum(_size(blocks[part.block], part.kind) for part in variant) for variant in variants]
        losses = torch.tensor([run.loss_of(variant) * size for variant, size in zip(variants, sizes, strict=True)])
    return losses.double()[:, None].repeat(1, tokens.samples) * predicted


def _upto(variant: Variant, number: int) -> Variant:
    return frozenset(part for part in variant if part.block <= number)


def _size(block: BlockLayout, kind: Kind) -> int:
    return {"attention": block.attention, "mlp": block.mlp, "block": block.parameters}[kind]


def _work(model: Model, groups: Sequence[Sequence[Variant]]) -> int:
    """Block-forwards per sample: the distinct states that each block produces, dropped blocks apart."""
    total, blocks = 0, model.layout().blocks
    for group in groups:
        actions = [_by_block(variant) for variant in group]
        states = [0] * len(group)  # equal numbers: equal prefixes
        for number in model.numbers:
            shape, outputs = blocks[number].shape, dict[tuple[int, Variant], int]()
            for place, action in enumerate(actions):
                states[place] = outputs.setdefault((states[place], action.get(number, DENSE)), len(outputs))
            total += sum(_runs(action, shape) for _, action in outputs)
    return total


def _by_block(variant: Variant) -> dict[int, Variant]:
    return {part.block: frozenset(other for other in variant if other.block == part.block) for part in variant}


def _row_bytes(model: Model, length: int) -> int:
    """One variant's hidden states for one sample."""
    return length * model.hidden_size * model.dtype.itemsize


def sweep_states(variants: int, samples: int, length: int) -> int:
    """The hidden states of tokens that a sweep over different variants holds at once where they fit: one row each.

    What comes out of a block takes the place of what went in, and there are never more prefixes than variants. (Only
    where a block changes the stream's width are both there.)
    """
    return variants * samples * length


def sweep_bytes(model: Model, states: float, length: int, device: str, memory_bytes: int = MEMORY_BYTES) -> float:
    """What a sweep takes at most: its hidden states and a block-forward's activations, as `sample_sweep` limits them.

    Args:
        states: as `sweep_states` counts them.
        length: of a row.
        device: the kind of device that it will run on; the model itself may be hollow.
    """
    if not states:
        return 0
    row = _row_bytes(model, length)
    held = min(states / length * row, max(memory_bytes / 2, 2 * row))
    rows = min(states / length, _rows_at_once(model, length, device, memory_bytes))
    return held + max(1, rows) * activation_bytes(model, length)


def _rows_at_once(model: Model, length: int, device: str, memory_bytes: int) -> int:
    """Rows per block-forward. A GPU wants all that fits. A CPU gains from more than one below 1,024 tokens, but a row
    that begins within one of its vectors has other last bits than alone: they would depend on who shares its forward.
    """
    if device == "cpu":
        return 1
    return max(1, memory_bytes // 2 // activation_bytes(model, length))
