"""What running a model costs: the prompt's time, each further token's, throughput, bytes, and the most memory."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedConfig

from secateur.errors import InvalidOptionError
from secateur.hf import with_cache
from secateur.judge.results import Facts, Inference
from secateur.judge.statistics import quartiles
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout, Layout
from secateur.run import Run

COUNTER = "torch's counter on the device"
TENSORS = "tensors alive at once; what an operation takes inside is not seen"


def inference(
    models: Mapping[str, Model],
    *,
    prompt_length: int = 256,
    new_tokens: int = 16,
    rounds: int = 5,
    batch_size: int = 1,
    run: Run | None = None,
) -> dict[str, Inference]:
    """Time the models in turn in one run, so that a change of the machine's speed hits all alike.

    Args:
        models: by the name under which each is reported.
        prompt_length: tokens of the (random) prompts; fewer where the models' positions end.
        new_tokens: tokens generated after each, greedily, with the KV cache.
        rounds: measured rounds after one to warm up, in which memory is measured. Every other one goes backwards.
        batch_size: prompts at once.

    Returns:
        By name. In one round the models were timed right after each other, so their rounds can be paired, and are kept
        to three decimals. `kv_bytes_per_token` holds as long as no sliding window is full.

    Raises:
        InvalidOptionError: a number below one; more new tokens than a model's positions.
    """
    at_least_one(rounds=rounds, batch_size=batch_size)
    for model in models.values():
        model.require_whole("timing it")
    run = run or Run()
    prompt_length = min(longest_prompt(model, new_tokens, prompt_length) for model in models.values())
    vocabulary = min(model.vocab_size for model in models.values())
    prompt = torch.randint(vocabulary, (batch_size, prompt_length), generator=run.rng("inference"))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks: dict[str, tuple[int, str]] = {}
    with run.progress("inference", (rounds + 1) * len(models)) as done:
        for name, model in models.items():
            peaks[name] = peak_tensor_memory(model, partial(_once, model, prompt, new_tokens))
            done(1)
        for number in range(rounds):
            names = list(models)
            for name in reversed(names) if number % 2 else names:
                times[name].append(_once(models[name], prompt, new_tokens))
                done(1)
    return {
        name: Inference(
            **_times(times[name], new_tokens, batch_size), weight_bytes=weight_bytes(model),
            kv_bytes_per_token=kv_bytes_per_token(model), peak_memory_bytes=peaks[name][0],
            peak_memory_by=peaks[name][1], prompt_length=prompt_length, new_tokens=new_tokens, rounds=rounds,
            batch_size=batch_size,
        )
        for name, model in models.items()
    }  # fmt: skip


def speedup(dense: Model, smaller: Model, *, of: str, run: Run | None = None, **settings: int) -> float:
    """How many times as fast as the dense model the smaller one is: the median over the rounds, in each of which both
    were timed.

    Args:
        of: the "prompt", or each further "token".
        settings: of `inference`.
    """
    timed = inference({"dense": dense, "smaller": smaller}, run=run, **settings)
    name = "prefill_ms_rounds" if of == "prompt" else "token_ms_rounds"
    rounds = zip(getattr(timed["dense"], name), getattr(timed["smaller"], name), strict=True)
    return statistics.median(one / other for one, other in rounds)


def at_least_one(**numbers: int | None) -> None:
    """Raise InvalidOptionError for a number below one; None is no number."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InvalidOptionError(f"{name} must be at least 1, not {value}")


def weight_bytes(model: Model) -> int:
    """The bytes of all weights, at the model's dtype."""
    return model.layout().parameters * model.dtype.itemsize


def kv_bytes_per_token(model: Model) -> int:
    """What the KV cache of one sequence grows by with each token, in bytes.

    A removed attention keeps its place there with one number for the keys and one for the values.
    """
    blocks = model.layout().blocks.values()
    numbers = sum(map(_kv_numbers, blocks))
    return 2 * numbers * model.dtype.itemsize


def kv_bytes(layout: Layout, config: PreTrainedConfig, tokens: int, item: int) -> int:
    """What the KV cache of one sequence of so many tokens takes; a layer with a sliding window keeps that much of it.

    Args:
        config: of a model of that layout; item: bytes of a number.
    """
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    blocks = zip(layout.blocks.values(), windows, strict=True)
    return 2 * item * sum(_kv_numbers(block) * min(tokens, window or tokens) for block, window in blocks)


def _kv_numbers(block: BlockLayout) -> int:
    """The keys of one token."""
    return block.shape.kv_heads * block.head_dim or 1


def longest_prompt(model: Model, new_tokens: int, prompt_length: int) -> int:
    """The longest prompt, up to `prompt_length` tokens, that leaves positions for the new tokens.

    Raises:
        InvalidOptionError: a number below one; more new tokens than a model's positions.
    """
    at_least_one(prompt_length=prompt_length, new_tokens=new_tokens)
    if model.max_length is None:
        return prompt_length
    if new_tokens >= model.max_length:
        raise InvalidOptionError(f"{new_tokens} new tokens; the model's positions end at {model.max_length}")
    return min(prompt_length, model.max_length - new_tokens)


@torch.inference_mode()
def _once(model: Model, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompts (batch, length), and seconds for all further tokens."""
    ids = prompt.to(model.device)
    start = _now(model)
    onto = with_cache(model.hf, DynamicCache(config=model.hf.config))
    output = model.hf(input_ids=ids, logits_to_keep=1, **onto)
    middle = _now(model)
    for _ in range(new_tokens):
        ids = output.logits[:, -1:].argmax(dim=-1)
        output = model.hf(input_ids=ids, **onto)
    return middle - start, _now(model) - middle


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _times(times: Sequence[tuple[float, float]], new_tokens: int, batch_size: int) -> Facts:
    """The fields of times: medians, interquartile ranges, and each round."""
    measured = {
        "prefill_ms": [1000 * first for first, _ in times],
        "token_ms": [1000 * rest / new_tokens for _, rest in times],
        "throughput_tokens_s": [batch_size * new_tokens / (first + rest) for first, rest in times],
    }
    fields: Facts = {}
    for name, values in measured.items():
        fields |= {name: statistics.median(values), f"{name}_rounds": [round(value, 3) for value in values]}
        if name.endswith("_ms"):
            edges = quartiles(values)
            fields[f"{name}_iqr"] = edges and edges[1] - edges[0]
    return fields


# --- memory ---


def peak_tensor_memory(model: Model, work: Callable[[], object]) -> tuple[int, str]:
    """Do some work with a model; return its weights' bytes and the most beside them, and how that was measured.

    Other models that are loaded do not count. On CUDA torch's own counter tells. A CPU has none, and the process's
    memory holds all models: there every tensor is counted from the operation that makes it until it is gone.
    """
    if not _devices(model):
        weights = _weights(model)
        living = _Living({tensor.untyped_storage()._cdata for tensor in weights if not tensor.is_meta})
        with living:
            work()
        return sum(tensor.nbytes for tensor in weights) + living.peak, TENSORS
    with device_peak(model) as told:
        work()
    assert told[0] is not None  # narrows the type; there are devices
    return told[0], COUNTER


@contextmanager
def device_peak(model: Model) -> Iterator[list[int | None]]:
    """Gives a list that holds, after the context, what `peak_tensor_memory` tells of CUDA; None where there is none.

    What else was on the devices before does not count, nor what was used there earlier: the counters begin anew.
    """
    told: list[int | None] = []
    devices = _devices(model)
    size = sum(tensor.nbytes for tensor in _weights(model))
    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    yield told
    beside = sum(torch.cuda.max_memory_allocated(device) - there for device, there in before.items())
    told.append(size + beside if devices else None)


def _weights(model: Model) -> list[Tensor]:
    return list({id(each): each for each in [*model.hf.parameters(), *model.hf.buffers()]}.values())


def _devices(model: Model) -> set[torch.device]:
    return {tensor.device for tensor in _weights(model) if tensor.device.type == "cuda"}


class _Living(TorchDispatchMode):
    """Adds up the storages of the tensors that operations give, but `known` ones, for as long as each is there."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak = 0
        self._known = known
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self._bytes:
                    self._bytes[key] = storage.nbytes()
                    self.peak = max(self.peak, sum(self._bytes.values()))
                    weakref.finalize(storage, self._bytes.pop, key, None)
        return result
