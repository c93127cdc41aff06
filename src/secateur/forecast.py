"""What a pruning will take, before it is run: no weights are loaded, one block is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from secateur.assets import resolve_model
from secateur.engine.blocks import BlockInputs, head_logits, run_block
from secateur.engine.loss import LOGIT_BYTES
from secateur.engine.sweep import activation_bytes, sweep_bytes
from secateur.errors import SecateurError
from secateur.hf import quiet_transformers
from secateur.methods import Cost, Method, methods
from secateur.model.budget import Budget, shares
from secateur.model.handle import Model, hollow
from secateur.model.layout import Layout
from secateur.model.load import check_device, check_dtype, explained, read_config
from secateur.model.modeling_secateur import PER_BLOCK_LISTS, plain_config, shapes_from
from secateur.run import work_forwards

_PROBE_HEAD_TOKENS = 128

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Speed:
    """Seconds through one block, and through the LM head.

    Attributes:
        block_s, head_s: of one token of a window.
        steps: by a number of sequences, those of one further token of each: what generating takes. There `block_s` and
            `head_s` are of all the sequences together.
    """

    block_s: float
    head_s: float
    steps: Mapping[int, Speed] = field(default_factory=dict)

    def seconds(self, block_tokens: float, head_tokens: float) -> float:
        return block_tokens * self.block_s + head_tokens * self.head_s


def forecast(
    name: str,
    method: Method,
    budget: Budget,
    *,
    samples: int | None = None,
    length: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    cache: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Foretell a run of `method` on the model `name`.

    Returns:
        Parameters before and after, shares, bytes in memory at the peak and on disk, forwards, seconds.

    Raises:
        InfeasibleBudgetError and the other errors that the run itself would raise for its arguments.
    """
    device = check_device(device)
    hollow = hollow_model(name, dtype=dtype, revision=revision, cache=cache)
    layout = hollow.layout()
    plan = method.plan(hollow, budget, samples, length, options)
    length, cost = plan.length, plan.cost
    one = check_device(None) if device == "auto" else device
    speed = probe(hollow, length, one)
    return {
        "model": name,
        "method": method.name,
        "parameters": {"before": layout.parameters, "after": cost.after.parameters},
        "removed": shares(layout, cost.after),
        "peak_memory_bytes": _peak(hollow, layout, cost, length, torch.device(one).type),
        "disk_bytes": cost.after.parameters * hollow.dtype.itemsize,
        **_forwards(hollow, cost, length),
        "seconds": speed.seconds(cost.block_tokens, cost.head_tokens),
        "samples": plan.samples,
        "length": length,
    }


def forwards_by_method(
    name: str, budget: Budget, *, revision: str | None = None, cache: Path | None = None
) -> dict[str, dict[str, Any]]:
    """What each method would take on the model `name`, with its default calibration and options.

    Returns:
        By method: samples, length, the full-length `forwards` that it will run, the `forwards_asked` for as papers
        count them (prefixes not shared, heads always run); or `refused`, the reason why it cannot.
    """
    hollow = hollow_model(name, revision=revision, cache=cache)
    told: dict[str, dict[str, Any]] = {}
    for method in methods().values():
        try:
            plan = method.plan(hollow, budget, None, None, {})
        except SecateurError as error:
            told[method.name] = {"refused": str(error)}
        else:
            shape = {"samples": plan.samples, "length": plan.length}
            told[method.name] = {**shape, **_forwards(hollow, plan.cost, plan.length)}
    return told


def _forwards(hollow: Model, cost: Cost, length: int) -> dict[str, float]:
    blocks = len(hollow.numbers)
    spent = work_forwards(cost.block_tokens, cost.head_tokens, blocks, length, head=hollow.head_cost)
    return {"forwards": spent, "forwards_asked": cost.asked_tokens / (blocks * length)}


def hollow_model(
    name: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    cache: Path | None = None,
) -> Model:
    """A model without weights (on `meta`), from its configuration alone; its source has its `model_type`,
    the `location` (folder or hub id) that the name stands for, and its `revision` there."""
    location, _ = resolve_model(name, cache=cache, revision=revision)
    check_dtype(dtype)
    config, about = read_config(location, revision)
    kind = getattr(torch, dtype) if dtype != "auto" else (config.dtype or torch.float32)
    told = {"name": name, "model_type": config.model_type, "location": location, "revision": about.revision}
    with explained(location):
        return hollow(config, kind, told)


def probe(
    hollow: Model, length: int, device: str, *, steps: Iterable[int] = (), clock: Clock = time.perf_counter
) -> Speed:
    """`timed` on random weights: a model of a single block of the largest shape."""
    config, family = hollow.hf.config, hollow.family
    small: Any = plain_config(config, family, shapes_from(config, family))
    small.num_hidden_layers = 1
    for name in PER_BLOCK_LISTS:
        if getattr(small, name, None) is not None:
            setattr(small, name, getattr(small, name)[:1])
    with quiet_transformers():
        model = Model(AutoModelForCausalLM.from_config(small, dtype=hollow.dtype).to(device))
    return timed(model, length, steps=steps, clock=clock)


def timed(model: Model, length: int, *, steps: Iterable[int] = (), clock: Clock = time.perf_counter) -> Speed:
    """Time the model's largest block and its head, on a window of `length` tokens and on single tokens of so many
    sequences at once as `steps` has.

    Args:
        clock: `time.process_time` for the seconds of all the CPU's threads.
    """
    blocks = model.layout().blocks
    largest = max(blocks, key=lambda number: (blocks[number].attention + blocks[number].mlp, -number))
    inputs = BlockInputs(model)
    with torch.inference_mode(), model.open(largest) as block:

        def passes(sequences: int, tokens: int) -> tuple[float, float]:
            hidden = inputs.embed(torch.zeros(sequences, tokens, dtype=torch.long))
            arguments = inputs.arguments(largest, sequences, tokens)
            last = hidden.flatten(0, 1)[:_PROBE_HEAD_TOKENS]
            times = [
                _median(work, model.device.type, clock)
                for work in (lambda: run_block(block.module, hidden, arguments), lambda: head_logits(model, last))
            ]
            return times[0], times[1] * sequences * tokens / len(last)

        block_s, head_s = passes(1, length)
        single = {sequences: Speed(*passes(sequences, 1)) for sequences in steps}
    return Speed(block_s / length, head_s / length, single)


def _median(work: Callable[[], Any], device: str, clock: Clock, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[1:])


def _peak(model: Model, layout: Layout, cost: Cost, length: int, device: str) -> int:
    """Weights, what the method keeps, hidden states held, one forward's activations and one chunk of logits.

    A sweep puts several rows into a forward. Logits are there twice: as the model's dtype and as float32, or, for KL,
    beside the reference's. Activations are gone by then, but the allocator need not have given them back.
    """
    item = model.dtype.itemsize
    state = model.hidden_size * item
    walked = cost.peak_states * state + activation_bytes(model, length)
    swept = sweep_bytes(model, cost.sweep_states, length, device)
    logits = 2 * min(LOGIT_BYTES, 4 * model.vocab_size * length) if cost.head_tokens else 0
    kept = cost.kept_states * state + cost.extra_bytes
    return int(layout.parameters * item + kept + max(walked, swept) + logits)
