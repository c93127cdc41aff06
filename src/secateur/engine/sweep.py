"""`sweep`: the loss of many variants of a model in one pass over its blocks.

A variant is a set of muted parts. Variants that agree up to some block share their hidden states up to there; the
states split only where variants differ. A greedy round over N candidates therefore costs about half of N forwards, and
each block is opened once, however many variants there are. It is exact: the losses are those of the whole model with
the same parts removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.engine.blocks import BlockInputs, run_block
from secateur.engine.loss import Metric, NegativeLogLikelihood, sample_losses
from secateur.engine.tokens import Tokens
from secateur.model.handle import Model
from secateur.model.modeling_secateur import Shape, drop_attention, drop_mlp
from secateur.model.views import Block
from secateur.run import Advance, Run

Kind = Literal["attention", "mlp", "block"]
MEMORY_BYTES = 2 * 2**30
CPU_TOKENS = 1024  # per block-forward; a CPU gains nothing beyond, and its caches lose


@dataclass(frozen=True, order=True)
class Part:
    """Something that a variant goes without: a block's attention, its MLP, or the whole block."""

    block: int
    kind: Kind


Variant = frozenset[Part]
DENSE: Variant = frozenset()


@contextmanager
def muted(block: Block, parts: Iterable[Part]) -> Iterator[None]:
    """For the time of the context the block lacks these modules, exactly as if they had been dropped.

    Of a whole block only the maps on its residual branch are left, where the residual stream was rebased.
    """
    family, module = block.family, block.module
    kinds = {part.kind for part in parts}
    if "block" in kinds:
        kinds = {"attention", "mlp"}
    saved: dict[str, nn.Module] = {}

    def save(*paths: str) -> None:
        for path in paths:
            saved.setdefault(path, module.get_submodule(path))

    try:
        if "attention" in kinds and block.has_attention:
            save(family.attention, *family.attention_norms, *family.shared_norms)
            drop_attention(module, family)
        if "mlp" in kinds and block.has_mlp:
            save(*family.mlp, *family.mlp_norms, *family.shared_norms)
            drop_mlp(module, family)
        yield
    finally:
        for path, original in saved.items():
            module.set_submodule(path, original)


def sweep(
    model: Model,
    tokens: Tokens,
    variants: Sequence[Variant],
    metric: Metric | None = None,
    *,
    run: Run | None = None,
    memory_bytes: int = MEMORY_BYTES,
    label: str = "sweep",
) -> Tensor:
    """Mean loss of each variant over all counted predictions.

    Args:
        variants: sets of muted parts, by block numbers of the model as loaded; the empty set is the model as it is.
        metric: negative log-likelihood if None.
        memory_bytes: what the hidden states and activations may take, half each. Samples, then variants, that do not
            fit together are run in groups, at least one sample and two variants at a time.

    Returns:
        (variants,) float64, in nats. A variant whose activations overflow has NaN or Inf.
    """
    sums = sample_sweep(model, tokens, variants, metric, run=run, memory_bytes=memory_bytes, label=label)
    return sums.sum(dim=1) / tokens.weights[:, 1:].double().sum()


def sample_sweep(
    model: Model,
    tokens: Tokens,
    variants: Sequence[Variant],
    metric: Metric | None = None,
    *,
    run: Run | None = None,
    memory_bytes: int = MEMORY_BYTES,
    label: str = "sweep",
) -> Tensor:
    """As `sweep`, but the weighted sum of losses per variant and sample, (variants, samples) float64."""
    run, metric = run or Run(), metric or NegativeLogLikelihood()
    if not variants:
        return torch.zeros(0, tokens.samples, dtype=torch.float64)
    run.meter.asked_tokens += len(variants) * tokens.ids.numel() * len(model.numbers)
    unique = sorted(set(variants), key=sorted)  # neighbours share prefixes
    row_bytes = _row_bytes(model, tokens.length)
    samples_at_once = max(1, memory_bytes // (2 * row_bytes * len(unique)))
    variants_at_once = max(2, memory_bytes // (2 * row_bytes))
    sums: dict[Variant, Tensor] = {v: torch.zeros(tokens.samples, dtype=torch.float64) for v in unique}
    groups = [unique[i : i + variants_at_once] for i in range(0, len(unique), variants_at_once)]
    rows_at_once = _rows_at_once(model, tokens.length, memory_bytes)
    with run.progress(label, _work(model, groups) * tokens.samples) as done:
        for start in range(0, tokens.samples, samples_at_once):
            ids = tokens.ids[start : start + samples_at_once]
            for group in groups:
                finals = propagate(model, ids, group, run=run, rows_at_once=rows_at_once, done=done)
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
    rows_at_once = _rows_at_once(model, tokens.length, MEMORY_BYTES)
    return propagate(model, tokens.ids, [DENSE], run=run, rows_at_once=rows_at_once)[DENSE]


@torch.no_grad()
def propagate(
    model: Model,
    ids: Tensor,
    variants: Sequence[Variant],
    *,
    run: Run,
    rows_at_once: int,
    done: Advance = lambda amount: None,
) -> dict[Variant, Tensor]:
    """Hidden states after the last block for each variant: ids (samples, length) -> (samples, length, hidden)."""
    inputs = BlockInputs(model)
    states = {DENSE: inputs.embed_windows(ids, 1)}  # by the parts muted so far
    for number in list(model.numbers):
        with model.open(number) as block:
            states = _through(block, inputs, states, variants, run, rows_at_once, done)
    return {variant: states[_upto(variant, model.numbers[-1])] for variant in variants}


def _through(
    block: Block,
    inputs: BlockInputs,
    states: dict[Variant, Tensor],
    variants: Sequence[Variant],
    run: Run,
    rows_at_once: int,
    done: Advance,
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
            kept = [state if mine else state.clone() for state, mine in zip(before, last, strict=True)]
            after.update(zip(reached_here, kept, strict=True))
            continue
        samples, length = before[0].shape[:2]
        outputs: list[Tensor] = []
        rows = [(state, sample) for state in range(len(before)) for sample in range(samples)]
        with muted(block, action):
            for start in range(0, len(rows), rows_at_once):
                batch = rows[start : start + rows_at_once]
                # a state that passed a dropped block may still lie on another device
                taken = [before[state][sample, None].to(before[0].device) for state, sample in batch]
                hidden = taken[0] if len(taken) == 1 else torch.cat(taken)  # (rows, length, hidden)
                output = run_block(block.module, hidden, inputs.arguments(block.number, len(batch), length))
                if not outputs:  # in the place of states that nobody needs any more, unless width or device change
                    width = output.shape[-1]
                    outputs = [
                        state
                        if mine and state.shape[-1] == width and state.device == output.device
                        else output.new_empty(samples, length, width)
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


def _upto(variant: Variant, number: int) -> Variant:
    return frozenset(part for part in variant if part.block <= number)


def _work(model: Model, groups: Sequence[Sequence[Variant]]) -> int:
    """Block-forwards per sample: the distinct states that each block produces, dropped blocks apart."""
    total, blocks = 0, model.layout().blocks
    for group in groups:
        for number in model.numbers:
            reached = {_upto(variant, number) for variant in group}
            total += sum(_runs(variant & {Part(number, "block")}, blocks[number].shape) for variant in reached)
    return total


def _row_bytes(model: Model, length: int) -> int:
    """One variant's hidden states for one sample."""
    return length * model.hidden_size * model.dtype.itemsize


def _rows_at_once(model: Model, length: int, memory_bytes: int) -> int:
    """Rows per block-forward. A GPU wants all that fits."""
    if model.device.type == "cpu":
        return max(1, CPU_TOKENS // length)
    return max(1, memory_bytes // 2 // activation_bytes(model, length))


def activation_bytes(model: Model, length: int) -> int:
    """What one row takes inside a block: a few hidden states, and the widest MLP's gate, up and product."""
    width = max(block.shape.width for block in model.layout().blocks.values())
    return length * (4 * model.hidden_size + 3 * width) * model.dtype.itemsize
