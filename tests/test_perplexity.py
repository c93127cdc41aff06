"""Perplexity against a loop by hand, and what it may be compared with."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, tiny, tiny_tokens
from oracles import Watcher, mean_nll, standing, weighted

from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError
from secateur.judge.perplexity import perplexity, ratio
from secateur.run import Run


@pytest.mark.parametrize("shape", ["dense", "lopsided"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_perplexity_equals_a_loop_by_hand(family: str, shape: Any) -> None:
    model = standing(family, shape)
    tokens = weighted(tiny_tokens(model, 3, 9))
    result = perplexity(model, tokens)
    nll = mean_nll(model, tokens)
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert (result.samples, result.length) == (3, 9)
    assert result.predictions == int((tokens.weights[:, 1:] != 0).sum()) < 24


def test_the_standard_error_is_that_of_windows() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 5, 8)
    windows = [mean_nll(model, Tokens.of(ids[None])) for ids in tokens.ids]
    result = perplexity(model, tokens)
    assert result.nll == pytest.approx(statistics.mean(windows), rel=1e-6)
    assert result.nll_stderr == pytest.approx(statistics.stdev(windows) / math.sqrt(5), rel=1e-4)
    assert perplexity(model, tokens.first(1)).nll_stderr is None


def test_a_window_where_nothing_counts_does_not_spoil_the_others() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 3, 8)
    weights = torch.ones(3, 8)
    weights[1] = 0
    result = perplexity(model, Tokens.of(tokens.ids, weights))
    alone = perplexity(model, Tokens.of(tokens.ids[[0, 2]]))
    assert result.nll == pytest.approx(alone.nll)
    assert result.nll_stderr == pytest.approx(alone.nll_stderr)
    assert result.predictions == 14


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


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_windows_own_loss_adds_up(family: str) -> None:
    model = standing(family)
    tokens = weighted(tiny_tokens(model, 4, 7))
    tokens = Tokens.of(tokens.ids, tokens.weights * torch.tensor([1.0, 0, 1, 1])[:, None])
    result = perplexity(model, tokens)
    losses, weights = result.window_nll, result.window_predictions
    assert len(losses) == len(weights) == 3
    assert sum(weights) == pytest.approx(float(tokens.weights[:, 1:].sum()))
    assert sum(map(operator.mul, losses, weights)) / sum(weights) == pytest.approx(result.nll)
    assert losses[0] == pytest.approx(mean_nll(model, tokens.first(1)), rel=1e-6)


def test_perplexities_over_the_same_tokens_are_compared() -> None:
    dense, model = tiny("llama"), standing("llama", "lopsided")
    tokens = tiny_tokens(dense, 2, 9)
    before, after = perplexity(dense, tokens), perplexity(model, tokens)
    assert ratio(before, after) == pytest.approx(after.perplexity / before.perplexity)
    assert ratio(before, before) == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (lambda tokens: tokens.first(2, 8), "windows of 9 and of 8 tokens cannot be compared"),
        (lambda tokens: tokens.first(1), "different tokens"),
        (lambda tokens: Tokens.of(tokens.ids.flip(0)), "different tokens"),
        (weighted, "different tokens"),
    ],
)
def test_other_perplexities_are_not(tokens: Callable[[Tokens], Tokens], message: str) -> None:
    model = standing("llama")
    windows = tiny_tokens(model, 2, 9)
    with pytest.raises(InvalidOptionError, match=message):
        ratio(perplexity(model, windows), perplexity(model, tokens(windows)))
