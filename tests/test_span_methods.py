"""ShortGPT and the sliding window against hooks on the whole model, and on models whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import tiny, tiny_tokens
from oracles import PROPERTY, activations, edited, lopsided, standing, still, weighted
from torch import Tensor

from secateur.driver import run_method
from secateur.engine.sweep import Part
from secateur.engine.tokens import Tokens
from secateur.errors import DataError, InfeasibleBudgetError
from secateur.methods import get_method
from secateur.methods.shortgpt import influence, least_influential
from secateur.methods.window import angle, window_lengths
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.similarity import span_distances
from secateur.surgery.edits import DropBlock


def block_influence(model: Model, tokens: Tokens, *, positions: Any = "all", run: Run) -> Tensor:
    spans = [(1, influence)]
    return span_distances(model, tokens, spans, positions=positions, order="samples", run=run, label="test")[0]


def cosines(model: Model, tokens: Tokens, n: int, positions: str) -> tuple[Tensor, Tensor]:
    """The long way: (spans, chosen tokens) cosines between what enters a block and what leaves the n-th from it, and
    the tokens' weights."""
    rows, weights = [], []
    for ids, weight in zip(tokens.ids, tokens.weights.double(), strict=True):
        seen = list(activations(model, ids[None]).values())
        chosen = [t for t in range(len(ids)) if weight[t] > 0]
        if positions == "last":
            chosen, weight = chosen[-1:], torch.ones(len(ids), dtype=torch.float64)
        for t in chosen:
            pairs = [
                (seen[start]["block_in"][0, t].double(), seen[start + n - 1]["block_out"][0, t].double())
                for start in range(len(seen) - n + 1)
            ]
            rows.append([float(one @ other / (one.norm() * other.norm())) for one, other in pairs])
            weights.append(float(weight[t]))
    return torch.tensor(rows, dtype=torch.float64).T, torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_distances_are_those_of_the_dense_models_stream(family: str, positions: Any) -> None:
    for model in (standing(family), standing(family, "lopsided")):
        tokens = weighted(tiny_tokens(model, 3, 8))
        for order in ("samples", "blocks"):
            run = Run()
            got = span_distances(
                model, tokens, [(1, influence), (3, angle), (2, angle)], positions=positions, order=order,
                run=run, label="x",
            )  # fmt: skip
            assert run.meter.block_tokens == 3 * 8 * 4  # one walk for all
            for n, distances in zip((1, 3, 2), got, strict=True):
                cosine, weights = cosines(model, tokens, n, positions)
                want = 1 - cosine if n == 1 else torch.arccos(cosine) / math.pi
                torch.testing.assert_close(distances, (want * weights).sum(1) / weights.sum(), rtol=1e-4, atol=1e-6)


def dropped(model: Model, name: str, budget: Budget, tokens: Tokens | None = None, **options: Any) -> list[int]:
    tokens = tokens or tiny_tokens(model, 2, 8)
    edits = run_method(model, get_method(name), tokens, budget, Run(), **options).edits
    assert all(isinstance(edit, DropBlock) for edit in edits)
    return [edit.block for edit in edits]


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_blocks_that_do_nothing_go(family: str, positions: str) -> None:
    model = tiny(family, num_hidden_layers=6)

    def gone(name: str, sparsity: float, *silent: int) -> list[int]:
        quiet = still(model, *(Part(number, "block") for number in silent))
        return dropped(quiet, name, Budget(sparsity), positions=positions)

    # 0: the first block is judged as all others are; ties go to the lower number
    assert gone("shortgpt", 1 / 3, 4, 0) == [0, 4]
    for start in (0, 2, 4):
        assert gone("window", 1 / 3, start, start + 1) == [start, start + 1]
    # shortgpt takes the stillest wherever they are; a window is whole
    assert gone("shortgpt", 0.5, 1, 3, 4) == [1, 3, 4]
    assert gone("window", 1 / 3, 1, 3, 4) == [3, 4]


def test_only_the_last_token_that_counts_is_looked_at() -> None:
    model = standing("qwen2")
    tokens = tiny_tokens(model, 2, 8)
    weights = torch.ones(2, 8)
    weights[:, 5:] = 0
    for windows in (2, 1):  # a window where nothing counts is passed over
        weights[windows:] = 0
        got = block_influence(model, Tokens.of(tokens.ids, weights), positions="last", run=Run())
        cut = block_influence(model, tokens.first(windows, 5), positions="last", run=Run())
        torch.testing.assert_close(got, cut)
    silent = edited(model)  # nothing enters the first block at its first token: no direction, but no NaN
    silent.hf.get_input_embeddings().weight.data[tokens.ids[0, 0]] = 0
    assert 0 < block_influence(silent, tokens, run=Run())[0] <= 2
    with pytest.raises(DataError):
        block_influence(model, Tokens.of(tokens.ids, torch.zeros(2, 8)), run=Run())


# --- how many ---


@pytest.mark.parametrize("of", ["blocks", "model"])
def test_blocks_of_several_sizes_are_counted_in_parameters(of: Any) -> None:
    model = lopsided(tiny("llama", num_hidden_layers=8))
    layout = model.layout()
    sizes = [block.parameters for block in layout.blocks.values()]
    tokens = tiny_tokens(model, 2, 8)
    for sparsity in (0.2, 0.3, 0.4):
        budget = Budget(sparsity, of=of)
        target = sparsity * (layout.parameters if of == "model" else sum(sizes))
        # least influence first, until the next block would lead further away
        ranked = torch.sort(block_influence(model, tokens, run=Run()), stable=True).indices.tolist()
        totals = torch.tensor([sizes[number] for number in ranked]).cumsum(0)
        count = int((totals - target).abs().argmin()) + 1
        assert dropped(edited(model), "shortgpt", budget, tokens) == ranked[:count]
        # each window is the nearest of those with its start
        lengths = window_lengths(layout, budget)
        assert len(set(lengths.values())) > 1
        for start, n in lengths.items():
            apart = [abs(sum(sizes[start : start + k]) - target) for k in range(1, len(sizes) - start + 1)]
            assert apart[n - 1] == min(apart)
            assert apart[n - 1] <= max(sizes) / 2
        got = dropped(edited(model), "window", budget, tokens)
        assert lengths[got[0]] == len(got)


@PROPERTY
@given(st.integers(1, 40), st.floats(0.01, 0.99))
def test_equal_blocks_make_windows_of_one_length_from_every_start(blocks: int, sparsity: float) -> None:
    layout = tiny_layout(blocks)
    budget = Budget(sparsity)
    try:
        n = budget.whole_blocks(layout)
    except InfeasibleBudgetError:
        assume(False)
    assert n == math.floor(blocks * sparsity + 0.5)
    assert window_lengths(layout, budget) == dict.fromkeys(range(blocks - n + 1), n)
    influence = torch.arange(blocks, dtype=torch.float64).flip(0)
    assert least_influential(layout, influence, budget) == list(range(blocks))[::-1][:n]


def tiny_layout(blocks: int) -> Any:
    layout = standing("llama").layout()
    return type(layout)(dict.fromkeys(range(blocks), layout.blocks[0]), layout.other, layout.ends)
