"""Perplexity and fidelity against loops by hand, their properties, and what they may be compared with."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, logits, tiny, tiny_tokenizer, tiny_tokens
from oracles import Watcher, mean_kl, mean_nll, standing, weighted

from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError
from secateur.judge.fidelity import fidelity
from secateur.judge.perplexity import perplexity, ratio
from secateur.model.handle import Model
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
    model, watcher, sizes = tiny("llama"), Watcher(), []
    run = Run(observer=watcher)
    model.blocks[0].register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[:2])))
    perplexity(model, tiny_tokens(model, 4, 7), run=run, label="ppl")
    assert sizes == [(1, 7)] * 4
    assert run.meter.block_tokens == 4 * 7 * 4
    assert run.meter.head_tokens == 4 * 6
    assert watcher.shown == [("ppl", 16, 16)]


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


# --- fidelity ---


def agreement(dense: Model, model: Model, tokens: Tokens) -> float:
    """The weighed share of predictions whose most probable token is the same."""
    same = logits(dense, tokens.ids).argmax(dim=-1)[:, :-1] == logits(model, tokens.ids).argmax(dim=-1)[:, :-1]
    weights = tokens.weights[:, 1:]
    return float((same * weights).sum() / weights.sum())


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fidelity_equals_a_loop_by_hand(family: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where logits come three predictions at a time."""
    dense, model = standing(family), standing(family, "lopsided")
    if chunk:
        monkeypatch.setattr("secateur.judge.fidelity.LOGIT_BYTES", chunk * 2 * 4 * model.vocab_size)
    tokens = weighted(tiny_tokens(model, 3, 9))
    result = fidelity(model, dense, tokens)
    assert result.loss == pytest.approx(mean_nll(model, tokens), rel=1e-6)
    assert result.dense_loss == pytest.approx(mean_nll(dense, tokens), rel=1e-6)
    assert result.kl == pytest.approx(mean_kl(dense, model, tokens), rel=1e-4)
    assert result.top1_agreement == pytest.approx(agreement(dense, model, tokens))
    assert (result.samples, result.length) == (3, 9)
    assert result.predictions == int((tokens.weights[:, 1:] > 0).sum())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_model_is_faithful_to_itself_and_never_more(family: str) -> None:
    dense, model = standing(family), standing(family, "lopsided")
    tokens = tiny_tokens(model, 2, 8)
    for one, same in ((dense, dense), (model, copy.deepcopy(model))):
        result = fidelity(one, same, tokens)
        assert (result.kl, result.top1_agreement) == (0, 1)
        assert result.loss == result.dense_loss
    forth, back = fidelity(model, dense, tokens), fidelity(dense, model, tokens)
    assert forth.kl > 0 < back.kl
    assert forth.kl != pytest.approx(back.kl, rel=1e-3)  # the divergence is from the dense model
    assert (forth.top1_agreement, forth.loss) == (back.top1_agreement, back.dense_loss)


def test_windows_of_fidelity_add_up_and_give_the_standard_error() -> None:
    dense, model = tiny("llama"), standing("llama", "lopsided")
    weights = torch.ones(4, 8)
    weights[1] = 0  # nothing counts there
    tokens = Tokens.of(tiny_tokens(model, 4, 8).ids, weights)
    result = fidelity(model, dense, tokens)
    assert result.window_predictions == [7, 7, 7]
    for key, window in (("loss", "window_nll"), ("kl", "window_kl"), ("top1_agreement", "window_top1")):
        values, error = getattr(result, window), getattr(result, f"{key}_stderr")
        assert statistics.mean(values) == pytest.approx(getattr(result, key))
        assert statistics.stdev(values) / math.sqrt(3) == pytest.approx(error)
    assert fidelity(model, dense, tokens.first(1)).kl_stderr is None


def test_only_what_counts_reaches_the_head_and_little_of_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, watcher = tiny("llama"), tiny("llama", seed=1), Watcher()
    run = Run(observer=watcher)
    weights = torch.zeros(3, 12)
    weights[0, 4:] = weights[2, 7] = 1
    rows: list[int] = []
    monkeypatch.setattr("secateur.judge.fidelity.LOGIT_BYTES", 3 * 2 * 4 * model.vocab_size)
    for each in (model, dense):
        each.hf.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
    fidelity(model, dense, Tokens.of(tiny_tokens(model, 3, 12).ids, weights), run=run, label="own")
    assert rows == [3, 3, 3, 3, 2, 2, 1, 1]  # 8 and 1 predictions, of both models
    assert run.meter.head_tokens == 2 * 9
    assert run.meter.block_tokens == 2 * 2 * 12 * 4  # two windows, two models of four blocks
    assert watcher.shown == [("own", 3 * 8, 3 * 8)]


def test_other_vocabularies_and_figures_that_are_no_numbers_are_refused() -> None:
    model, small = tiny("qwen3"), tiny("qwen3", vocab_size=50)
    tokens = tiny_tokens(small, 1, 5)
    with pytest.raises(InvalidOptionError, match="another tokenizer or vocabulary"):
        fidelity(model, small, tokens)
    model.tokenizer = tiny_tokenizer()
    with pytest.raises(InvalidOptionError, match="another tokenizer or vocabulary"):
        fidelity(model, tiny("qwen3"), tokens)
    model.tokenizer = None
    with torch.no_grad():
        model.hf.lm_head.weight[3, 3] = torch.nan
    for pair in ((model, tiny("qwen3")), (tiny("qwen3"), model)):
        with pytest.raises(NumericalError, match="float32"):
            fidelity(*pair, tokens)
    with pytest.raises(NumericalError, match="float32"):
        perplexity(model, tokens)
