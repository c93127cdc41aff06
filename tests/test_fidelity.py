"""Fidelity against loops by hand, and its properties."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from models import FAMILY_NAMES, logits, tiny, tiny_tokenizer, tiny_tokens
from oracles import Watcher, mean_kl, mean_nll, standing, weighted

from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError
from secateur.judge.fidelity import fidelity
from secateur.model.handle import Model
from secateur.run import Run


def agreement(dense: Model, model: Model, tokens: Tokens) -> float:
    """The weighed share of predictions whose most probable token is the same."""
    same = logits(dense, tokens.ids).argmax(dim=-1)[:, :-1] == logits(model, tokens.ids).argmax(dim=-1)[:, :-1]
    weights = tokens.weights[:, 1:]
    return float((same * weights).sum() / weights.sum())


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_equals_a_loop_by_hand(family: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_windows_add_up_and_give_the_standard_error() -> None:
    dense, model = tiny("llama"), standing("llama", "lopsided")
    weights = torch.ones(4, 8)
    weights[1] = 0  # nothing counts there
    tokens = Tokens.of(tiny_tokens(model, 4, 8).ids, weights)
    result = fidelity(model, dense, tokens)
    assert result.window_predictions == [7, 7, 7]
    for key, window in (("loss", "window_nll"), ("kl", "window_kl"), ("top1_agreement", "window_top1")):
        assert statistics.mean(getattr(result, window)) == pytest.approx(getattr(result, key))
        assert statistics.stdev(getattr(result, window)) / math.sqrt(3) == pytest.approx(
            getattr(result, f"{key}_stderr")
        )
    assert fidelity(model, dense, tokens.first(1)).kl_stderr is None


def test_only_what_counts_reaches_the_head_and_little_of_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, run, watcher = tiny("llama"), tiny("llama", seed=1), Run(), Watcher()
    run.observer = watcher
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
