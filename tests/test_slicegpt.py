"""SliceGPT: each basis against a PCA of what plain hooks see, the width against the budget, and pruning again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import BLOCKS, REBASABLE, logits, orthonormal, parameters, tiny, tiny_in, tiny_tokens
from oracles import PROPERTY, activations, planned, pruner, standing, weighted
from test_stream import difference
from torch import Tensor

from secateur.errors import InfeasibleBudgetError, InvalidOptionError, NumericalError
from secateur.methods.slicegpt import sliced, sliced_width, slicegpt
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.load import load
from secateur.output import save
from secateur.run import MemoryStore, Run
from secateur.running import prune
from secateur.solvers.pca import principal_basis
from secateur.surgery.apply import apply
from secateur.surgery.edits import CentreEmbedding, Edit, FoldNorms, Rebase, UntieHead

SITES = range(2 * BLOCKS + 1)
run = pruner("slicegpt", multiple=1)


def bases(edits: list[Edit]) -> dict[int, Tensor]:
    return {edit.site: edit.basis for edit in edits if isinstance(edit, Rebase)}


# --- principal components ---


@PROPERTY
@given(seed=st.integers(0, 99), count=st.integers(1, 6))
def test_no_basis_keeps_more_than_the_principal_one(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 5, 3, 2, 1, 0.1])
    moment = x.T @ x
    basis = principal_basis(moment, count)
    assert torch.allclose(basis.T @ basis, torch.eye(count, dtype=torch.float64), atol=1e-12)
    kept = [float((x @ q).pow(2).sum()) for q in (basis, orthonormal(6, count, seed))]
    assert kept[0] >= kept[1] * (1 - 1e-12)
    by_column = (x @ basis).pow(2).sum(dim=0).tolist()
    assert by_column == sorted(by_column, reverse=True)
    assert (basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)) > 0).all()
    assert torch.equal(principal_basis(moment, 6)[:, :count], basis)  # fewer are a part of more
    with pytest.raises(NumericalError):
        principal_basis(moment * torch.nan, 2)


# --- the bases ---


@pytest.mark.parametrize(("family", "signal"), [("llama", "stream"), ("qwen3", "stream"), ("phi3", "norm")])
def test_each_basis_is_the_pca_of_its_site_with_the_sites_before_it_sliced(family: str, signal: Any) -> None:
    """Section 3.3, against the model's own forward with plain hooks at the moment when the edit is decided."""
    model, tokens = tiny(family), weighted(tiny_tokens(tiny(family), 4, 12))
    hidden, seen = model.hidden_size, []
    for edit in slicegpt(model, tokens, Budget(0.3), Run(), multiple=1, slice_head=True, signal=signal):
        if isinstance(edit, Rebase):
            number, tap = divmod(edit.site, 2)
            name = ("block_in", "block_mid")[tap] if number < BLOCKS else "block_out"
            x = activations(model, tokens.ids)[min(number, BLOCKS - 1)][name].double()
            if signal == "norm":
                x = x / (x.pow(2).sum(dim=-1, keepdim=True) / hidden).sqrt()
            rows = (x * tokens.weights[..., None].double().sqrt()).flatten(0, 1)
            count = edit.basis.shape[1]
            right = torch.linalg.svd(rows).Vh[:count].T
            assert difference(edit.basis.double() @ edit.basis.double().T, right @ right.T) < 1e-4
            assert x.shape[-1] == hidden  # not yet sliced here
            seen.append(edit.site)
        apply(model, edit)
    assert seen == [*SITES]


@torch.no_grad()
def low_rank(model: Model, basis: Tensor) -> Model:
    """All that is ever added to the residual stream lies in the span of the basis (hidden, rank)."""
    projection = (basis @ basis.T).float()
    embedding = model.hf.get_input_embeddings().weight
    embedding.copy_(embedding @ projection)
    for number in model.numbers:
        with model.open(number) as block:
            for linear in (block.attention_out, block.mlp_out):
                linear.weight.copy_(projection @ linear.weight)
                if linear.bias is not None:
                    linear.bias.copy_(projection @ linear.bias)
    return model


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("phi3", True)])
def test_a_stream_of_low_rank_is_found_and_nothing_lost(family: str, tied: bool) -> None:
    rank = 11
    model = low_rank(tiny(family, tie_word_embeddings=tied), orthonormal(tiny(family).hidden_size, rank))
    tokens = tiny_tokens(model, 4, 12)
    ids = tiny_tokens(model, 2, 12, seed=5).ids  # others than it was calibrated on
    dense = logits(model, ids)
    run(model, tokens, dimension=rank, slice_head=True)
    assert {model.layout().stream_width(site) for site in SITES} == {rank}
    assert difference(logits(model, ids), dense) < 1e-5


# --- options ---


def kinds(edits: list[Edit]) -> list[type[Edit]]:
    return list(dict.fromkeys(type(edit) for edit in edits))


@pytest.mark.parametrize(
    ("tied", "options", "expected"),
    [
        (True, {}, [FoldNorms, Rebase]),
        (True, {"untie": True}, [UntieHead, FoldNorms, Rebase]),
        (True, {"mean_centre": True}, [UntieHead, CentreEmbedding, FoldNorms, Rebase]),
        (False, {"untie": True}, [FoldNorms, Rebase]),
        (False, {"mean_centre": True}, [CentreEmbedding, FoldNorms, Rebase]),
    ],
)
def test_what_happens_to_the_ends(tied: bool, options: dict[str, Any], expected: list[type[Edit]]) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    tokens = tiny_tokens(model, 2, 8)
    cost = planned(model, "slicegpt", Budget(0.25), 2, 8, **{"multiple": 1, **options})
    pruning = run(model, tokens, **options)
    assert kinds(pruning.edits) == expected
    assert pruning.after == cost.after
    assert pruning.after.parameters == parameters(model)
    assert pruning.after.ends.tied == (tied and not options)
    assert pruning.after.ends.input_map == pruning.after.ends.tied


def test_untying_or_not_gives_the_same_model_of_another_size() -> None:
    tokens = tiny_tokens(tiny("llama"), 3, 10)
    models = [tiny("llama", tie_word_embeddings=True) for _ in range(2)]
    for model, untie in zip(models, (False, True), strict=True):
        run(model, tokens, dimension=20, untie=untie, slice_head=True)
    assert difference(logits(models[0], tokens.ids), logits(models[1], tokens.ids)) < 1e-4
    assert models[0].layout().parameters != models[1].layout().parameters


@pytest.mark.parametrize("slice_head", [False, True])
def test_the_head_is_sliced_only_if_asked(slice_head: bool) -> None:
    model = tiny("mistral")
    run(model, tiny_tokens(model, 2, 8), dimension=20, slice_head=slice_head)
    widths = [model.layout().stream_width(site) for site in SITES]
    assert widths == [20] * (2 * BLOCKS) + [20 if slice_head else 32]


# --- the width ---


@PROPERTY
@given(
    family=st.sampled_from(REBASABLE),
    sparsity=st.floats(0.02, 0.9),
    of=st.sampled_from(["blocks", "model"]),
    multiple=st.integers(1, 6),
    slice_head=st.booleans(),
    untie=st.booleans(),
)
def test_the_width_is_the_multiple_nearest_to_the_budget(
    family: str, sparsity: float, of: Any, multiple: int, slice_head: bool, untie: bool
) -> None:
    layout, budget = standing(family).layout(), Budget(sparsity, of=of)
    options: dict[str, Any] = {"slice_head": slice_head, "untie": untie and layout.ends.tied}
    widths = range(multiple, layout.ends.hidden, multiple)
    misses = {width: abs(budget.achieved(layout, sliced(layout, width, **options)) - sparsity) for width in widths}
    best = min(misses.values())
    assume(best < 0.24 * sparsity)
    assume(sparsity <= budget.achieved(layout, sliced(layout, multiple, **options)))
    width = sliced_width(layout, budget, dimension=None, multiple=multiple, **options)
    assert misses[width] == best


def test_the_dimension_wins_over_the_sparsity() -> None:
    model = tiny("llama")
    pruned = prune(model, "slicegpt", sparsity=0.01, calibration=tiny_tokens(model, 2, 8), dimension=17)
    assert pruned.pruning.after.stream_width(3) == 17
    assert pruned.record.sparsity.asked == 0.01
    assert pruned.record.sparsity.achieved.blocks > 0.2
    with pytest.raises(InfeasibleBudgetError, match=r"20\.53%"):  # by which the blocks would grow
        run(tiny("llama"), tiny_tokens(model, 2, 8), dimension=31)


# --- resuming, cost, and pruning again ---


def test_a_run_that_was_interrupted_goes_on() -> None:
    tokens, store = tiny_tokens(tiny("llama"), 2, 8), MemoryStore()
    whole, recorded = tiny("llama"), Run(store=store)
    run(whole, tokens, run=recorded)
    half = MemoryStore()
    for site in range(5):
        half.put(f"slicegpt/{site}", store.get(f"slicegpt/{site}"))
    resumed = tiny("llama")
    run(resumed, tokens, run=Run(store=half))
    assert difference(logits(resumed, tokens.ids), logits(whole, tokens.ids)) < 1e-4
    assert resumed.layout() == whole.layout()


@pytest.mark.slow
def test_a_sliced_model_is_saved_and_sliced_again(tmp_path: Any) -> None:
    model = tiny("qwen3")
    tokens = tiny_tokens(model, 3, 8)
    save(prune(model, "slicegpt", sparsity=0.1, calibration=tokens, multiple=1), tmp_path / "once")
    loaded = load(str(tmp_path / "once"))
    assert torch.equal(logits(loaded, tokens.ids), logits(model, tokens.ids))
    assert kinds(run(loaded, tokens, dimension=13).edits) == [Rebase]
    assert {loaded.layout().stream_width(site) for site in SITES[:-1]} == {13}
    with pytest.raises(InvalidOptionError, match="sliced before"):
        run(loaded, tokens, untie=True)


def test_the_least_work_is_done_where_little_is_left_to_slice() -> None:
    """Sites that are narrow already keep their basis."""
    model, recorded = tiny_in("sliced stream", "llama"), Run()  # widths 29, 28, ... 21
    tokens = tiny_tokens(model, 2, 8)
    cost = planned(model, "slicegpt", Budget(0.5), 2, 8, dimension=26)
    pruning = run(model, tokens, run=recorded, dimension=26)
    assert set(bases(pruning.edits)) == {0, 1, 2}
    assert pruning.after == cost.after
    assert recorded.meter.block_tokens == cost.meter.block_tokens
