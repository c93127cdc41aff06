"""What a pruning will take, before it is run: no weights are loaded, one block is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.engine.blocks import BlockInputs, head_logits, run_block
from secateur.engine.tokens import ready, wants_bos
from secateur.errors import SecateurError
from secateur.methods import methods
from secateur.model.budget import Budget
from secateur.model.configuration import PER_BLOCK_LISTS
from secateur.model.handle import Model, with_random_weights
from secateur.model.load import Source
from secateur.model.modeling_secateur import plain_config, shapes_from
from secateur.planning import Plan, Request, plan
from secateur.record import MetGoal, Sparsity
from secateur.sharing import Clock

_PROBE_HEAD_TOKENS = 128


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


@dataclass(frozen=True)
class Forwards:
    """What a pruning runs, as full-length forwards of the whole model, head included.

    Attributes:
        forwards: on the work really done; forwards_asked: as papers count, every variant by itself.
        samples, length: of the calibration.
    """

    samples: int
    length: int
    forwards: float
    forwards_asked: float

    @classmethod
    def of(cls, planned: Plan, head: float) -> Forwards:
        blocks, meter = len(planned.before.blocks), planned.meter
        return cls(
            planned.samples, planned.length, meter.forwards(blocks, planned.length, head=head),
            meter.forwards_asked(blocks, planned.length),
        )  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """What a pruning will take and leave.

    Attributes:
        parameters: `before` and `after`; sparsity: asked, got and why.
        bos: whether each window of the calibration will begin with the begin-of-sequence token.
        goal: what the sparsity was searched for, where none was asked for.
        peak_memory_bytes: weights, hidden states, statistics and results, beyond Python and torch; of a streamed model
            the weights that are open at once. States beyond the engine's budget lie in a file there.
        disk_bytes: of the weights that are written.
        streamed: whether the weights will stay in their files.
        run_bytes: the most that lies on the disk beside the output while it runs, but for texts that are measured.
    """

    model: str
    method: str
    parameters: Mapping[str, int]
    sparsity: Sparsity
    peak_memory_bytes: int
    disk_bytes: int
    seconds: float
    forwards: float
    forwards_asked: float
    samples: int
    length: int
    bos: bool
    goal: MetGoal | None
    streamed: bool
    run_bytes: int


def forecast(request: Request, source: Source, *, keep_states: int = 0) -> Forecast:
    """Foretell a pruning of a model that is known by name.

    Args:
        keep_states: as `Run` has it.

    Raises:
        InfeasibleBudgetError and the other errors that the run itself would raise for its arguments.
    """
    device, hollow = source.main_device, source.hollow()
    planned = plan(request, hollow, device=device)
    speed = probe(hollow, planned.length, device)
    before, after, item = planned.before, planned.after, hollow.dtype.itemsize
    return Forecast(
        model=hollow.source["name"],
        method=planned.method.name,
        parameters={"before": before.parameters, "after": after.parameters},
        sparsity=planned.sparsity,
        peak_memory_bytes=planned.peak_bytes(hollow),
        streamed=hollow.is_streamed,
        disk_bytes=after.parameters * item,
        run_bytes=planned.run_bytes(hollow, keep_states=keep_states),
        seconds=speed.seconds(planned.meter.block_tokens, planned.meter.head_tokens),
        goal=planned.goal,
        bos=ready(request.calibration) is None and wants_bos(hollow.family, request.bos),
        **vars(Forwards.of(planned, hollow.head_cost)),
    )


def forwards_by_method(source: Source, sparsity: float, of: Any = "blocks") -> dict[str, Forwards | str]:
    """What each method would take on the model, with its default calibration and options; or why it is refused.

    Raises:
        InvalidOptionError: no such share.
    """
    Budget(sparsity, of=of)
    hollow = source.hollow()
    found: dict[str, Forwards | str] = {}
    for name in methods():
        try:
            planned = plan(Request(method=name, sparsity=sparsity, of=of), hollow)
        except SecateurError as error:
            found[name] = str(error)
        else:
            found[name] = Forwards.of(planned, hollow.head_cost)
    return found


def probe(
    hollow: Model, length: int, device: torch.device, *, steps: Iterable[int] = (), clock: Clock = time.perf_counter
) -> Speed:
    """`timed` on random weights: a model of a single block of the largest shape."""
    config, family = hollow.hf.config, hollow.family
    small: Any = plain_config(config, family, shapes_from(config, family))
    small.num_hidden_layers = 1
    for name in PER_BLOCK_LISTS:
        if getattr(small, name, None) is not None:
            setattr(small, name, getattr(small, name)[:1])
    return timed(with_random_weights(small, hollow.dtype, device), length, steps=steps, clock=clock)


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
                _median(work, model.device, clock)
                for work in (lambda: run_block(block.module, hidden, arguments), lambda: head_logits(model, last))
            ]
            return times[0], times[1] * sequences * tokens / len(last)

        block_s, head_s = passes(1, length)
        single = {sequences: Speed(*passes(sequences, 1)) for sequences in steps}
    return Speed(block_s / length, head_s / length, single)


def _median(work: Callable[[], Any], device: torch.device, clock: Clock, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return statistics.median(times[1:])
