"""`secateur plan`: bytes against the real tensors, what fits and what does not, and losses that are only claimed where
they were measured."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models import tiny_in, tiny_tokens
from oracles import write_model
from test_cli import call
from transformers import DynamicCache

from secateur.errors import InvalidOptionError
from secateur.fitting import Measured, fitting
from secateur.hf import with_cache
from secateur.judge.inference import kv_bytes
from secateur.methods import methods
from secateur.model.load import Source
from secateur.planning import Request, plan

CONTEXT, BATCH = 32, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = write_model(tmp_path_factory.mktemp("fitting") / "model")
    for file in folder.glob("*.safetensors"):  # the configuration is enough
        file.unlink()
    return Source(name=str(folder))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tokens", [3, 11])
def test_the_cache_is_that_of_real_tensors(family: str, tokens: int) -> None:
    """A sliding window keeps one token less than its size beside the one that is read."""
    model = tiny_in("several attentions missing", family)
    cache = DynamicCache(config=model.hf.config)
    with torch.no_grad():
        for step in tiny_tokens(model, 1, tokens).ids.split(1, dim=1):
            model.hf(step, **with_cache(model.hf, cache))
    held, sliding = 0, 0
    for layer in cache.layers:
        assert layer.keys is not None
        assert layer.values is not None
        window = getattr(layer, "sliding_window", None)
        full = window is not None and tokens >= window
        per_token = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
        held, sliding = held + layer.keys.nbytes + layer.values.nbytes, sliding + full * per_token
    assert kv_bytes(model.layout(), model.hf.config, tokens, 4) == held + sliding


def test_what_fits_is_listed_with_what_it_takes(source: Source) -> None:
    hollow = source.hollow()
    everything = fitting(source, fits=10**9, context=CONTEXT, batch=BATCH, sparsities=(0.5,), names=("2ssp",))
    assert everything.dense_fits
    assert everything.dense.weights == 4 * hollow.layout().parameters
    assert everything.dense.kv_cache == BATCH * kv_bytes(hollow.layout(), hollow.hf.config, CONTEXT, 4)
    assert [(choice.sparsity, choice.least) for choice in everything.choices] == [(0.5, False)]
    size = int(everything.dense.total * 0.8)
    names = ("2ssp", "shortgpt")
    tight = fitting(source, fits=size, context=CONTEXT, batch=BATCH, sparsities=(0.125, 0.75), names=names)
    assert not tight.dense_fits
    assert {choice.method for choice in tight.choices} == set(names)
    for choice in tight.choices:
        assert choice.need.total <= size
        planned = plan(Request(sparsity=choice.sparsity, method=choice.method), hollow)
        assert choice.need.weights == 4 * planned.after.parameters == 4 * choice.parameters
        assert choice.need.kv_cache == BATCH * kv_bytes(planned.after, planned.config, CONTEXT, 4)
        assert choice.pruning_bytes > everything.dense.weights
        assert min(choice.forwards, choice.seconds) > 0
    nothing = fitting(source, fits=1000, context=CONTEXT, sparsities=(0.5,), names=("2ssp",))
    assert (nothing.choices, list(nothing.refused)) == ([], ["2ssp"])
    # A sparsity that a method cannot reach hides none that it can.
    some = fitting(source, fits=10**9, context=CONTEXT, sparsities=(0.99, 0.5), names=("secateur",))
    assert ([choice.sparsity for choice in some.choices], some.refused) == ([0.5], {})
    with pytest.raises(InvalidOptionError, match="positions end at 64"):
        fitting(source, fits=10**9, context=65)


def test_losses_are_those_that_were_measured_and_lie_between_them() -> None:
    measured = Measured.read()
    assert set(measured.losses) <= set(methods())
    for method, points in measured.losses.items():
        for share, loss in points:
            assert measured.loss(method, share) == pytest.approx(loss)
        for (first, low), (second, high) in pairwise(points):
            middle = measured.loss(method, (first + second) / 2)
            assert middle is not None
            assert middle["c4"] == pytest.approx((low["c4"] + high["c4"]) / 2)
        assert measured.loss(method, points[-1][0] + 0.05) is None
    assert measured.loss("a method that was not measured", 0.25) is None


def test_the_command_says_what_is_not_known(source: Source) -> None:
    words = ("plan", source.name, "--fits", "1GB", "--context", 32, "--batch", 2, "--methods", "2ssp,window")
    told = call(*words)
    assert told.code == 0, told.err
    assert "fits as it is" in told.out
    assert "not known" in told.out
    assert "SmolLM2-135M-Instruct" in told.out
    as_json = call(*words, "--json").json
    assert (as_json["is_demo"], as_json["dense_fits"], as_json["batch"]) == (False, True, 2)
    assert {choice["method"] for choice in as_json["choices"]} == {"2ssp", "window"}
    for wrong in (("--fits", "much"), ("--context", "9k"), ("--batch", 0), ("--methods", "2spp"), ("--sparsities", 2)):
        assert call(*words, *wrong).code == 3, wrong
