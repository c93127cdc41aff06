"""A model whose weights are there only while they are asked for goes all the way, and is read as seldom as can be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, ClosedModel, logits, random, tiny, tiny_closed, tiny_tokens
from oracles import EACH_METHOD, prepared
from torch import nn

from secateur import Run, load, prune, save
from secateur.errors import InvalidEditError, NumericalError
from secateur.export import save as save_checkpoint
from secateur.judge.fidelity import fidelity
from secateur.judge.perplexity import perplexity

# The methods' defaults, but for one that selects on more tokens than there are here.
OPTIONS = {"evopress": {"initial_tokens": 64, "selection_tokens": "32,128"}}
ONCE = {None: 1, 0: 1, 1: 1, 2: 1, 3: 1}  # each block and the ends


def reads(model: ClosedModel) -> Counter[int | None]:
    """How often each part was read since this was last asked."""
    count = Counter(model.fetched)
    model.fetched.clear()
    return count


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_closed_has_no_weights_and_no_edit_is_lost(family: str) -> None:
    """The ground on which closed models are tested is itself sound."""
    closed, dense = tiny_closed(family), tiny(family)
    assert all(parameter.is_meta for parameter in closed.hf.parameters())
    with closed.open(2, write=True) as block, closed.open(2) as again:
        assert again.module is block.module
        assert not any(parameter.is_meta for parameter in block.module.parameters())
        new = random(*block.mlp_out.weight.shape)  # whichever way the module keeps it
        block.mlp_out.weight = nn.Parameter(new)
        with pytest.raises(AssertionError, match="block 0 is opened while"), closed.open(0):
            pass
    with closed.open_ends(write=True), torch.no_grad():
        assert not closed.hf.get_output_embeddings().weight.is_meta
        closed.hf.get_input_embeddings().weight[7] = 0.5
    assert all(parameter.is_meta for parameter in closed.hf.parameters())
    with pytest.raises(InvalidEditError, match="not opened for writing"), closed.open(1) as block, torch.no_grad():
        block.mlp_out.weight.zero_()
    closed, dense = tiny_closed(family), tiny(family)
    for model in (closed, dense):
        with model.open(2, write=True) as block, model.open_ends(write=True), torch.no_grad():
            block.mlp_out.weight.copy_(new)
            model.hf.get_input_embeddings().weight[7] = 0.5
    ids = tiny_tokens(dense, 1, 8).ids
    assert torch.equal(logits(closed.whole(), ids), logits(dense, ids))


@pytest.mark.parametrize("name", EACH_METHOD)
def test_every_method_prunes_saves_and_judges_a_closed_model(name: str, tmp_path: Path) -> None:
    outcomes: list[Any] = []
    for model in (tiny_closed("llama"), tiny("llama")):
        tokens = tiny_tokens(model, 8, 16)
        result = prune(model, name, sparsity=0.5, calibration=tokens, run=Run(0), **OPTIONS.get(name, {}))
        if isinstance(model, ClosedModel):  # the ends are not read again for each window or variant
            assert model.fetched.count(None) <= max(map(model.fetched.count, range(4)))
        outcomes.append((perplexity(model, tokens), fidelity(model, tiny("llama"), tokens)))
        save(result, tmp_path / type(model).__name__)
        outcomes[-1] += (load(str(tmp_path / type(model).__name__)).fingerprint(), model.fingerprint())
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][2] == outcomes[0][3]


def test_each_part_is_read_once_for_what_looks_at_it_once(tmp_path: Path) -> None:
    model = tiny_closed("llama")
    tokens = tiny_tokens(model, 5, 8)
    prepared(model, "2ssp", sparsity=0.5, calibration=tokens)  # checks and fingerprint
    assert reads(model) == ONCE
    perplexity(model, tokens)
    assert reads(model) == ONCE
    fidelity(model, dense := tiny_closed("llama", seed=1), tokens)
    assert reads(model) == reads(dense) == ONCE
    for shard_size in ("5GB", "10KB"):
        save_checkpoint(model, tmp_path / shard_size, max_shard_size=shard_size)
        assert reads(model) == ONCE


def test_windows_that_do_not_fit_together_are_judged_at_once_or_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = tiny_closed("llama"), tiny_closed("llama", seed=1)
    tokens = tiny_tokens(model, 5, 8)
    together = perplexity(model, tokens), fidelity(model, dense, tokens)
    reads(model), reads(dense)
    monkeypatch.setattr("secateur.judge.perplexity.STATE_BYTES", 2 * 8 * model.hidden_size * 4)
    assert perplexity(model, tokens) == together[0] == perplexity(tiny("llama"), tokens)
    assert reads(model) == ONCE  # its states lie in files
    assert fidelity(model, dense, tokens) == together[1] == fidelity(tiny("llama"), tiny("llama", seed=1), tokens)
    assert reads(model) == reads(dense) == ONCE


def test_what_is_no_number_is_found_wherever_it_lies() -> None:
    for part in (2, None):
        model = tiny_closed("gpt2")
        with torch.no_grad():
            if part is None:
                with model.open_ends(write=True):
                    model.hf.get_input_embeddings().weight[3, 3] = torch.inf
            else:
                with model.open(part, write=True) as block:
                    block.mlp_out.weight[3, 3] = torch.nan
        with pytest.raises(NumericalError, match="block 2: mlp.c_proj" if part else "lm_head.weight"):
            model.fingerprint()
