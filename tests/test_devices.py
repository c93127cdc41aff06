"""A model that accelerate spreads over devices (`--device auto`) is pruned as one in one place.

Only a CPU is here: the map names it for every part, and accelerate's hooks, which bring inputs to where a part lies,
are put on all the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from models import tiny_hf, tiny_tokens
from oracles import KINDS_OF_METHOD, job_of

from secateur.engine.sweep import DENSE, Part, sample_sweep
from secateur.model.handle import Model
from secateur.planning import Request
from secateur.pruning import Pruned, run_job
from secateur.run import Run
from secateur.surgery.edits import KeepNeurons

METHODS: dict[str, dict[str, Any]] = {
    "2ssp": {},
    "blockpruner": {},
    "slimgpt": {},
    "slicegpt": {"multiple": 1},
    "secateur": {"allocation": "searched", "search_samples": 2, "search_rounds": 1},
}


def spread(family: str) -> Any:
    """Each block by itself, with hooks on all that is in it."""
    hf = tiny_hf(family)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    blocks = [f"model.layers.{number}" for number in range(hf.config.num_hidden_layers)]
    return dispatch_model(hf, dict.fromkeys([*parts, *blocks], "cpu"), force_hooks=True)


def pruned(hf: Any, method: str) -> Pruned:
    model = Model(hf, source={"name": "tiny"})
    request = Request(method=method, sparsity=0.4, options=METHODS[method], calibration=tiny_tokens(model, 4, 24))
    return run_job(job_of(request, model), run=Run())


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m not in KINDS_OF_METHOD)) for m in METHODS]
)
def test_a_spread_model_is_pruned_as_one_in_one_place(method: str) -> None:
    one, other = pruned(spread("llama"), method), pruned(tiny_hf("llama"), method)
    assert one.record.edits == other.record.edits
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(one.model.hf(input_ids=ids).logits, other.model.hf(input_ids=ids).logits)


def test_versions_of_a_spread_block_are_swept_and_it_is_whole_again() -> None:
    model, plain = Model(spread("llama")), Model(tiny_hf("llama"))
    tokens, part = tiny_tokens(plain, 2, 12), Part(1, "mlp", 7)
    versions = {part: KeepNeurons(1, tuple(range(7)))}
    variants = [frozenset({part}), DENSE, frozenset({part, Part(2, "attention")})]
    for _ in range(2):
        one, other = (sample_sweep(each, tokens, variants, versions=versions) for each in (model, plain))
        assert torch.equal(one, other)
