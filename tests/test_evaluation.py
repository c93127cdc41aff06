"""Perplexity against a loop by hand, greedy text against a loop by hand, and what latency reports."""

from __future__ import annotations

import importlib
import math
import statistics
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, logits, tiny, tiny_tokenizer, tiny_tokens
from oracles import Watcher, edited, lopsided, mean_nll, standing, weighted

from secateur.engine.tokens import Tokens
from secateur.errors import DataError, NumericalError
from secateur.evaluation import generate, latency, perplexity
from secateur.model.handle import Model
from secateur.run import Run
from secateur.surgery.edits import DropAttention

# --- perplexity ---


@pytest.mark.parametrize("shape", ["dense", "lopsided"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_perplexity_equals_a_loop_by_hand(family: str, shape: Any) -> None:
    model = standing(family, shape)
    tokens = weighted(tiny_tokens(model, 3, 9))
    result = perplexity(model, tokens)
    nll = mean_nll(model, tokens)
    assert result["nll"] == pytest.approx(nll, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert (result["samples"], result["length"]) == (3, 9)
    assert result["predictions"] == int((tokens.weights[:, 1:] != 0).sum()) < 24


def test_the_standard_error_is_that_of_windows() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 5, 8)
    windows = [mean_nll(model, Tokens.of(ids[None])) for ids in tokens.ids]
    result = perplexity(model, tokens)
    assert result["nll"] == pytest.approx(statistics.mean(windows), rel=1e-6)
    assert result["nll_stderr"] == pytest.approx(statistics.stdev(windows) / math.sqrt(5), rel=1e-4)
    assert perplexity(model, tokens.first(1))["nll_stderr"] is None


def test_a_window_where_nothing_counts_does_not_spoil_the_others() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 3, 8)
    weights = torch.ones(3, 8)
    weights[1] = 0
    result = perplexity(model, Tokens.of(tokens.ids, weights))
    alone = perplexity(model, Tokens.of(tokens.ids[[0, 2]]))
    assert result["nll"] == pytest.approx(alone["nll"])
    assert result["nll_stderr"] == pytest.approx(alone["nll_stderr"])
    assert result["predictions"] == 14


def test_windows_are_taken_one_at_a_time() -> None:
    model, run, watcher = tiny("llama"), Run(), Watcher()
    run.observer = watcher
    sizes = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[:2])))
    perplexity(model, tiny_tokens(model, 4, 7), run=run, label="ppl")
    handle.remove()
    assert sizes == [(1, 7)] * 4
    assert run.meter.block_tokens == 4 * 7 * 4
    assert run.meter.head_tokens == 4 * 6
    assert watcher.shown == [("ppl", 16, 16)]


def test_a_loss_that_is_no_number_is_an_error() -> None:
    model = tiny("qwen3")
    with torch.no_grad():
        model.hf.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(NumericalError, match="float32"):
        perplexity(model, tiny_tokens(model, 1, 5))


# --- text ---


def by_hand(model: Model, prompt: str, new_tokens: int) -> str:
    """The most probable next token, again and again, of those that complete no 3-gram twice."""
    assert model.tokenizer is not None
    ids: list[int] = model.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(new_tokens):
        scores = logits(model, torch.tensor([ids]))[0, -1].clone()
        for place in range(len(ids) - 2):
            if ids[place : place + 2] == ids[-2:]:
                scores[ids[place + 2]] = -math.inf
        ids.append(int(scores.argmax()))
    return str(model.tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama", "dense"), ("qwen2", "first attention gone"), *((name, "lopsided") for name in FAMILY_NAMES)],
)
def test_text_is_continued_greedily(family: str, shape: str) -> None:
    model = tiny(family) if shape == "dense" else lopsided(tiny(family))
    if shape == "first attention gone":
        model = edited(tiny(family), DropAttention(0))
    model.tokenizer = tiny_tokenizer()
    text = generate(model, "ab ab ab", new_tokens=9)
    assert text == by_hand(model, "ab ab ab", 9)
    assert text


def test_the_prompt_is_not_part_of_the_text() -> None:
    model = tiny("llama")
    model.tokenizer = tiny_tokenizer()
    one = generate(model, "Some prompt", new_tokens=1)
    assert len(one) <= 1


def test_text_ends_where_the_positions_end() -> None:
    model = tiny("opt")
    model.tokenizer = tiny_tokenizer()
    assert generate(model, "a" * 60) == by_hand(model, "a" * 60, 4)
    for length in (64, 80):
        with pytest.raises(DataError, match=f"prompt has {length} tokens; the model's positions end at 64"):
            generate(model, "a" * length)


def test_text_needs_a_tokenizer_and_a_prompt() -> None:
    model = tiny("llama")
    with pytest.raises(DataError, match="no tokenizer"):
        generate(model, "a")
    model.tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="prompt is empty"):
        generate(model, "")


# --- latency ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_latency_reports_both_models(family: str) -> None:
    models = {"model": standing(family, "lopsided"), "against": standing(family)}
    report = latency(models, prompt_length=8, new_tokens=3, rounds=2)
    assert list(report) == ["model", "against"]
    for each in report.values():
        assert set(each) == {
            "prompt_length",
            "prefill_ms",
            "prefill_ms_spread",
            "token_ms",
            "token_ms_spread",
            "tokens_per_s",
        }
        assert all(value >= 0 for value in each.values())
        assert each["tokens_per_s"] == pytest.approx(1000 / each["token_ms"])


def test_models_take_turns_on_the_same_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("secateur.evaluation.latency")
    models = {"a": tiny("llama"), "b": tiny("qwen2", vocab_size=50)}
    calls = []

    def once(model: Model, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        name = next(name for name, each in models.items() if each is model)
        calls.append((name, tuple(prompt[0].tolist()), new_tokens))
        return float(len(calls)), 1.0 / len(calls)

    monkeypatch.setattr(module, "_once", once)
    watcher = Watcher()
    report = latency(models, prompt_length=6, new_tokens=2, rounds=3, run=Run(observer=watcher))
    assert [name for name, *_ in calls] == ["a", "b"] * 4
    assert len({call[1:] for call in calls}) == 1
    assert max(calls[0][1]) < 50  # ids that both know
    assert watcher.shown == [("latency", 8, 8)]
    assert report["a"]["prefill_ms"] == 5000  # of 3, 5, 7: the first round warms up
    assert report["b"]["token_ms"] == pytest.approx(1000 / 6)  # of 1/4, 1/6, 1/8


def test_the_prompt_fits_the_positions_of_all_models() -> None:
    models = {"a": tiny("llama"), "b": tiny("opt", max_position_embeddings=40)}
    report = latency(models, new_tokens=4, rounds=1)
    assert [each["prompt_length"] for each in report.values()] == [36, 36]
    assert latency(models, prompt_length=8, new_tokens=4, rounds=1)["a"]["prompt_length"] == 8
