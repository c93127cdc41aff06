"""What running a model costs: bytes against the real tensors, and who is timed when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, LAYOUTS, tiny, tiny_in, tiny_tokens
from oracles import Watcher, standing
from transformers import DynamicCache

from secateur.errors import InvalidOptionError
from secateur.hf import with_cache
from secateur.judge.inference import (
    COUNTER,
    TENSORS,
    device_peak,
    inference,
    kv_bytes_per_token,
    peak_tensor_memory,
    weight_bytes,
)
from secateur.model.handle import Model
from secateur.run import Run

TIMED = ("prefill_ms", "prefill_ms_iqr", "token_ms", "token_ms_iqr", "throughput_tokens_s")


@pytest.mark.parametrize(
    ("family", "layout"),
    [*(("llama", layout) for layout in LAYOUTS), *((family, "everything") for family in FAMILY_NAMES)],
)
def test_bytes_are_those_of_the_real_tensors(family: str, layout: str) -> None:
    model = tiny_in(layout, family)
    assert weight_bytes(model) == sum(p.nbytes for p in model.hf.parameters())
    cache = DynamicCache(config=model.hf.config)
    with torch.no_grad():
        model.hf(tiny_tokens(model, 2, 4).ids, **with_cache(model.hf, cache))
    held: list[Any] = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    assert kv_bytes_per_token(model) * 2 * 4 == sum(part.nbytes for part in held)


def test_the_cache_shrinks_with_heads_and_attentions_only() -> None:
    dense = kv_bytes_per_token(tiny("llama"))  # 4 blocks of 4 KV heads of 4 numbers, twice, in float32
    assert dense == 4 * 4 * 4 * 2 * 4
    assert kv_bytes_per_token(tiny_in("one KV group fewer", "llama")) == dense - 4 * 2 * 4
    assert kv_bytes_per_token(tiny_in("several attentions missing", "llama")) == dense // 2 + 2 * 2 * 4
    assert kv_bytes_per_token(tiny_in("mixed widths", "llama")) == dense
    half = tiny("llama")
    half.hf.to(torch.bfloat16)
    assert (kv_bytes_per_token(half), weight_bytes(half)) == (dense // 2, weight_bytes(tiny("llama")) // 2)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_both_models_are_reported(family: str) -> None:
    models = {"dense": standing(family), "pruned": standing(family, "lopsided")}
    report = inference(models, prompt_length=8, new_tokens=3, rounds=2, batch_size=2)
    assert list(report) == ["dense", "pruned"]
    for each in report.values():
        assert all(getattr(each, name) >= 0 for name in TIMED)
        assert (each.prompt_length, each.new_tokens, each.rounds, each.batch_size) == (8, 3, 2, 2)
    for key in ("weight_bytes", "kv_bytes_per_token", "peak_memory_bytes"):
        assert getattr(report["pruned"], key) < getattr(report["dense"], key)


def test_models_take_turns_on_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"a": tiny("llama"), "b": tiny("qwen2", vocab_size=50)}
    calls = []

    def once(model: Model, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        name = next(name for name, each in models.items() if each is model)
        calls.append((name, tuple(prompt.flatten().tolist()), new_tokens))
        return float(len(calls)), 2 * float(len(calls))

    monkeypatch.setattr("secateur.judge.inference._once", once)
    watcher = Watcher()
    report = inference(models, prompt_length=6, new_tokens=2, rounds=3, batch_size=4, run=Run(observer=watcher))
    assert "".join(name for name, *_ in calls) == "ab" + "ab" + "ba" + "ab"
    assert len({call[1:] for call in calls}) == 1
    assert len(calls[0][1]) == 4 * 6
    assert max(calls[0][1]) < 50  # ids that both know
    assert watcher.shown == [("inference", 8, 8)]
    assert report["a"].prefill_ms == 6000  # of 3, 6, 7: the first round warms up
    assert report["b"].token_ms == 5000  # of 4, 5, 8, for two tokens twice as long
    assert report["b"].token_ms_iqr == 4000
    assert report["a"].throughput_tokens_s == pytest.approx(4 * 2 / (3 * 6))
    assert report["a"].prefill_ms_rounds == [3000, 6000, 7000]  # in the order of the rounds, not of the calls
    assert report["b"].prefill_ms_rounds == [4000, 5000, 8000]
    assert report["b"].token_ms_rounds == [4000, 5000, 8000]
    assert report["a"].throughput_tokens_s_rounds == [round(8 / (3 * n), 3) for n in (3, 6, 7)]


def test_prompts_fit_the_positions_of_all_models() -> None:
    models = {"a": tiny("llama"), "b": tiny("opt", max_position_embeddings=40)}
    report = inference(models, new_tokens=4, rounds=1)
    assert report["a"].prefill_ms_iqr is report["a"].token_ms_iqr is None  # of one round there is no spread
    assert [each.prompt_length for each in report.values()] == [36, 36]
    assert inference(models, prompt_length=8, new_tokens=4, rounds=1)["a"].prompt_length == 8
    with pytest.raises(InvalidOptionError, match="40 new tokens; the model's positions end at 40"):
        inference(models, new_tokens=40)
    for name in ("prompt_length", "new_tokens", "rounds", "batch_size"):
        with pytest.raises(InvalidOptionError, match=f"{name} must be at least 1"):
            inference(models, **{name: 0})


# --- memory ---


def made(*sizes: int) -> Callable[[], object]:
    """Work that makes tensors of so many bytes, each gone before the next but one is made."""

    def work() -> None:
        before = after = None
        for size in sizes:
            before, after = after, torch.ones(size, dtype=torch.uint8)
        del before, after

    return work


def test_memory_is_what_lives_at_once_beside_the_weights() -> None:
    model = tiny("llama")
    weights = weight_bytes(model) + sum(each.nbytes for each in model.hf.buffers())
    assert peak_tensor_memory(model, lambda: None) == (weights, TENSORS)
    assert peak_tensor_memory(model, made(100, 300, 200))[0] == weights + 600  # the third is made while two are held
    kept: list[Any] = []
    peak, _ = peak_tensor_memory(model, lambda: kept.extend(torch.ones(50, dtype=torch.uint8) for _ in range(3)))
    assert peak == weights + 150
    views = peak_tensor_memory(model, lambda: torch.ones(64, dtype=torch.uint8).view(8, 8)[2:].t())[0]
    assert views == weights + 64
    assert peak_tensor_memory(model, lambda: model.hf.lm_head.weight.detach().t()[3:])[0] == weights  # no new memory


def test_memory_grows_with_the_prompt_and_the_batch() -> None:
    model = tiny("llama")
    peaks = [
        inference({"a": model}, prompt_length=length, new_tokens=1, rounds=1, batch_size=batch)["a"].peak_memory_bytes
        for length, batch in ((8, 1), (32, 1), (32, 2))
    ]
    assert peaks[0] < peaks[1] < peaks[2]
    with device_peak(model) as told:  # of a CPU no device tells one
        torch.ones(10**6)
    assert told == [None]


class Counters:
    """Of a GPU: what is allocated on it, and the most since the last reset."""

    allocated = peak = 10**9

    def take(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)


def test_a_devices_peak_begins_anew_and_leaves_out_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, model = Counters(), tiny("llama")
    gpu.take(10**8)
    gpu.take(-(10**8))  # an earlier cell's
    monkeypatch.setattr("secateur.judge.inference._devices", lambda model: {torch.device("cuda", 0)})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gpu.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(gpu, "peak", gpu.allocated))
    with device_peak(model) as told:
        gpu.take(5000)
        gpu.take(-4000)
    weights = sum(each.nbytes for each in [*model.hf.parameters(), *model.hf.buffers()])
    assert told == [weights + 5000]
    assert peak_tensor_memory(model, lambda: gpu.take(70)) == (weights + 70, COUNTER)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_other_models_do_not_count() -> None:
    model = tiny("llama")
    model.hf.to("cuda")
    alone = peak_tensor_memory(model, lambda: torch.ones(10**6, device="cuda"))[0]
    other = torch.ones(10**7, device="cuda")
    assert peak_tensor_memory(model, lambda: torch.ones(10**6, device="cuda"))[0] == alone
    assert alone < other.nbytes
