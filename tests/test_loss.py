"""Losses: which prediction is weighed by which weight, in which precision; perplexity and divergence at their ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILY_NAMES, tiny, tiny_tokens
from oracles import PROPERTY, weighted
from torch import Tensor

from secateur.engine import loss as loss_module
from secateur.engine.loss import KLDivergence, NegativeLogLikelihood
from secateur.engine.sweep import DENSE, Part, sample_sweep, sweep
from secateur.model.handle import Model


class Echo:
    """A metric that gives back which predictions it was asked for."""

    def prepare(self, model: Model, sample: int, positions: slice) -> Tensor:
        return torch.arange(positions.start, positions.stop) + 1000 * sample

    def loss(self, logits: Tensor, targets: Tensor, prepared: Tensor | None) -> Tensor:
        assert prepared is not None
        assert len(logits) == len(targets) == len(prepared)
        assert logits.dtype == torch.float32
        return 1e6 * targets.double() + prepared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_weight_weighs_the_prediction_of_its_token(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    model.hf.to(dtype)
    tokens = weighted(tiny_tokens(model, 3, 10))
    monkeypatch.setattr(loss_module, "LOGIT_BYTES", 4 * model.vocab_size * chunk)
    got = sample_sweep(model, tokens, [DENSE], Echo())[0]
    want = [
        sum(
            float(tokens.weights[sample, t]) * (1e6 * int(tokens.ids[sample, t]) + (t - 1) + 1000 * sample)
            for t in range(1, 10)
        )
        for sample in range(3)
    ]
    assert got.tolist() == want


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        for parameter in model.hf.get_output_embeddings().parameters():
            parameter.zero_()
    losses = sweep(model, weighted(tiny_tokens(model, 2, 8)), [DENSE, frozenset({Part(1, "mlp")})])
    assert losses.exp().tolist() == pytest.approx([model.vocab_size] * 2, rel=1e-6)


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5)


@PROPERTY
@given(LOGITS, LOGITS)
def test_divergence_is_never_negative_and_zero_of_itself(one: list[float], other: list[float]) -> None:
    p, q = torch.tensor([one]), torch.tensor([other])
    metric, targets = KLDivergence(torch.empty(0)), torch.zeros(1, dtype=torch.long)
    assert metric.loss(p, targets, p.log_softmax(-1)) == 0
    got = float(metric.loss(q, targets, p.log_softmax(-1)))
    assert got >= -1e-5
    p64, q64 = p.double().softmax(-1), q.double().softmax(-1)
    assert got == pytest.approx(float((p64 * (p64.log() - q64.log())).sum()), rel=1e-4, abs=1e-5)
    # which way round: KL(p || q), p being the reference
    backwards = float(metric.loss(p, targets, q.log_softmax(-1)))
    assert backwards == pytest.approx(float((q64 * (q64.log() - p64.log())).sum()), rel=1e-4, abs=1e-5)


@PROPERTY
@given(LOGITS, st.integers(0, 4))
def test_likelihood_is_minus_the_log_of_a_softmax(row: list[float], target: int) -> None:
    got = float(NegativeLogLikelihood().loss(torch.tensor([row]), torch.tensor([target]), None))
    total = math.fsum(math.exp(x - row[target]) for x in row)
    assert got == pytest.approx(math.log(total), rel=1e-5, abs=1e-5)
