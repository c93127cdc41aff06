"""Perplexity against a loop by hand, and what it may be compared with."""

from __future__ import annotations

import math
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
    """So does each window's own; one where nothing counts is left out."""
    model = standing(family, shape)
    tokens = weighted(tiny_tokens(model, 4, 9))
    tokens = Tokens.of(tokens.ids, tokens.weights * torch.tensor([1.0, 0, 1, 1])[:, None])
    result = perplexity(model, tokens)
    nll = mean_nll(model, tokens)
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert (result.samples, result.length) == (4, 9)
    assert result.predictions == int((tokens.weights[:, 1:] != 0).sum()) < 24
    losses, weights = result.window_nll, result.window_predictions
    by_hand = [mean_nll(model, Tokens.of(tokens.ids[i, None], tokens.weights[i, None])) for i in (0, 2, 3)]
    assert losses == pytest.approx(by_hand, rel=1e-6)
    assert weights == pytest.approx(tokens.weights[[0, 2, 3], 1:].sum(dim=1).tolist())
    assert result.nll_stderr == pytest.approx(statistics.stdev(by_hand) / math.sqrt(3), rel=1e-4)
    assert perplexity(model, tokens.first(1)).nll_stderr is None


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


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (lambda tokens: tokens.first(2, 8), "windows of 9 and of 8 tokens cannot be compared"),
        (lambda tokens: tokens.first(1), "different tokens"),
        (lambda tokens: Tokens.of(tokens.ids.flip(0)), "different tokens"),
        (weighted, "different tokens"),
    ],
)
def test_only_perplexities_over_the_same_tokens_are_compared(tokens: Callable[[Tokens], Tokens], message: str) -> None:
    dense, model = standing("llama"), standing("llama", "lopsided")
    windows = tiny_tokens(model, 2, 9)
    before, after = perplexity(dense, windows), perplexity(model, windows)
    assert ratio(before, after) == pytest.approx(after.perplexity / before.perplexity)
    with pytest.raises(InvalidOptionError, match=message):
        ratio(before, perplexity(model, tokens(windows)))
