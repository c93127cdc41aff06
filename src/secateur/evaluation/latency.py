"""How fast models are: the prompt, and each token after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from secateur.model.handle import Model
from secateur.run import Run


def latency(
    models: Mapping[str, Model],
    *,
    prompt_length: int = 256,
    new_tokens: int = 16,
    rounds: int = 5,
    run: Run | None = None,
) -> dict[str, dict[str, Any]]:
    """Time the models alternately in one run, so that a change of the machine's speed hits all alike.

    Args:
        models: by the name under which each is reported.
        prompt_length: tokens of the (random) prompt, in one sequence; fewer where the models' positions end.
        new_tokens: tokens generated after it, greedily, with the KV cache.
        rounds: measured rounds after one warm-up; medians are reported.

    Returns:
        Per model: `prompt_length`, `prefill_ms` for the whole prompt, `token_ms` per further token, both with
        `_spread` (the interquartile range), and `tokens_per_s`.
    """
    run = run or Run()
    vocabulary = min(model.vocab_size for model in models.values())
    for model in models.values():
        if model.max_length is not None:
            prompt_length = max(1, min(prompt_length, model.max_length - new_tokens))
    prompt = torch.randint(vocabulary, (1, prompt_length), generator=run.rng("latency"))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with run.progress("latency", (rounds + 1) * len(models)) as done:
        for round_number in range(rounds + 1):
            for name, model in models.items():
                measured = _once(model, prompt, new_tokens)
                if round_number:
                    times[name].append(measured)
                done(1)
    return {name: {"prompt_length": prompt_length, **_summary(each)} for name, each in times.items()}


@torch.inference_mode()
def _once(model: Model, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and seconds per further token."""
    ids = prompt.to(model.device)
    start = _now(model)
    output = model.hf(input_ids=ids, use_cache=True, logits_to_keep=1)
    middle = _now(model)
    for _ in range(new_tokens):
        ids = output.logits[:, -1:].argmax(dim=-1)
        output = model.hf(input_ids=ids, use_cache=True, past_key_values=output.past_key_values)
    return middle - start, (_now(model) - middle) / new_tokens


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, seconds in zip(("prefill_ms", "token_ms"), zip(*times, strict=True), strict=True):
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        result[name] = 1000 * statistics.median(seconds)
        result[f"{name}_spread"] = 1000 * (quartiles[2] - quartiles[0])
    result["tokens_per_s"] = 1000 / result["token_ms"]
    return result
