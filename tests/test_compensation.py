"""The fold is a least-squares fit of the stream behind the cut; what `refit=True` puts behind which method."""

from __future__ import annotations

import pytest
import torch
from models import apply_all, tiny, tiny_tokens
from oracles import activations, edited

from secateur.compensation import get_filter, refits
from secateur.compensation.fold import Module, fold, folded_into
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.methods import get_method
from secateur.model.modeling_secateur import FAMILIES
from secateur.planning import Request, plan
from secateur.run import Run
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, Edit, SetWeight

FOLDED = ("llama", "granite", "opt", "gpt2", "phi", "gpt_neox")


@pytest.mark.parametrize("family", FOLDED)
@torch.no_grad()
def test_the_fold_solves_the_normal_equations_of_the_stream_behind_the_cut(family: str) -> None:
    """E[(r - r') x^T] / m = lambda (W' - W), r the stream that the next block read, r' the one that it reads."""
    dense, model, damping = tiny(family), tiny(family), 0.02
    tokens, gone = tiny_tokens(model, 8, 24), [DropBlock(2), DropAttention(1)]
    for edit in fold(model, tokens, Run(), iter(gone), damping=damping):
        apply_all(model, [edit])
    was, now = activations(dense, tokens.ids), activations(model, tokens.ids)
    x = now[1]["mlp_hidden"].double().flatten(0, 1)
    error = (was[3]["block_in"] - now[3]["block_in"]).double().flatten(0, 1)
    with dense.open(1) as before, model.open(1) as after:
        change, scale = after.weight("mlp_out") - before.weight("mlp_out"), after.multiplier
    pull = damping * x.square().mean() * change.double()
    assert torch.allclose(error.T @ x / len(x) / scale, pull, atol=1e-4)
    plain = activations(edited(dense, *gone), tokens.ids)[3]["block_in"].double().flatten(0, 1)
    assert error.square().sum() < (was[3]["block_in"].double().flatten(0, 1) - plain).square().sum()


@pytest.mark.parametrize(
    ("edits", "serial", "parallel"),
    [
        ([DropAttention(2)], {(1, "mlp_out"): 5}, {(2, "mlp_out"): 6}),
        ([DropMLP(1)], {(1, "attention_out"): 4}, {(1, "attention_out"): 4}),
        ([DropBlock(1), DropAttention(2), DropMLP(2)], {(0, "mlp_out"): 6}, {(0, "mlp_out"): 6}),
        ([DropMLP(1), DropAttention(2)], {(1, "attention_out"): 5}, {(1, "attention_out"): 4, (2, "mlp_out"): 6}),
        ([DropBlock(3)], {(2, "mlp_out"): 8}, {(2, "mlp_out"): 8}),
        ([DropBlock(0)], {(1, "attention_out"): 3}, {(1, "mlp_out"): 4}),
        ([DropAttention(0)], {(0, "mlp_out"): 2}, {(0, "mlp_out"): 2}),
    ],
)
def test_who_takes_over_what_is_gone(
    edits: list[Edit], serial: dict[tuple[int, str], int], parallel: dict[tuple[int, str], int]
) -> None:
    model = tiny("llama")
    before, after = model.layout(), edited(model, *edits).layout()
    for side_by_side, wanted in ((False, serial), (True, parallel)):
        chosen = folded_into(before, after, parallel=side_by_side)
        assert {(module.block, module.role): end for module, end in chosen.items()} == wanted
    assert folded_into(before, before, parallel=False) == {}


def test_modules_are_named_by_where_they_read_and_give() -> None:
    layout = tiny("llama").layout()
    chosen = folded_into(layout, edited(tiny("llama"), DropBlock(1)).layout(), parallel=False)
    assert chosen == {Module(0, "mlp_out", 1, 2): 4}


def test_the_edits_of_the_method_come_first_and_unchanged() -> None:
    model, gone = tiny("llama"), [DropMLP(3), DropBlock(0)]
    made: list[Edit] = []
    for edit in fold(model, tiny_tokens(model, 2, 8), Run(), iter(gone)):
        apply_all(model, [edit])
        made.append(edit)
    assert made[:2] == gone
    assert [(edit.block, edit.role) for edit in made[2:] if isinstance(edit, SetWeight)] == [
        (1, "attention_out"), (3, "attention_out"),
    ]  # fmt: skip
    assert model.guards == []


@pytest.mark.parametrize(
    ("method", "family", "names"),
    [("2ssp", "llama", ["refit", "fold"]), ("2ssp", "gemma2", ["refit"]), ("slimgpt", "llama", ["refit"]),
     ("shortgpt", "phi", ["fold"]), ("shortgpt", "olmo2", []), ("slicegpt", "llama", []), ("slicegpt", "olmo2", []),
     ("secateur", "llama", [])],
)  # fmt: skip
def test_which_filters_a_refit_is(method: str, family: str, names: list[str]) -> None:
    assert [filtering.name for filtering in refits(get_method(method), FAMILIES[family])] == names
    if not names:
        request = Request(method=method, sparsity=0.25, refit=True, samples=2, length=8)
        with pytest.raises(InvalidOptionError, match=method):
            plan(request, tiny(family))


def test_a_filter_has_a_name_and_options_that_are_known() -> None:
    assert get_filter("refit", target="stream").options["target"] == "stream"
    for name, options in (("refits", {}), ("fold", {"target": "dense"})):
        with pytest.raises(UnknownNameError):
            get_filter(name, **options)
