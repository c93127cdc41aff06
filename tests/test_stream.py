"""The residual stream in other coordinates: a square basis changes no logit, a narrow one is a projection."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    BLOCKS,
    FAMILY_NAMES,
    REBASABLE,
    VOCABULARY,
    apply_all,
    logits,
    orthonormal,
    stream_layouts,
    tiny,
    tiny_closed,
    tiny_in,
    tiny_tokens,
)
from oracles import activations, mean_nll, without
from test_surgery import same_model, same_state, state, unchanged
from torch import Tensor

from secateur import load
from secateur.engine.sweep import DENSE, Part, sweep
from secateur.engine.walk import walk
from secateur.errors import InvalidEditError, UnsupportedEditError
from secateur.export import save
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES
from secateur.run import Run
from secateur.surgery.apply import apply
from secateur.surgery.edits import (
    CentreEmbedding,
    DropAttention,
    DropBlock,
    DropMLP,
    Edit,
    FoldNorms,
    KeepHeads,
    KeepNeurons,
    Rebase,
    UntieHead,
    from_json,
    to_json,
)

IDS = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7))
SITES = range(2 * BLOCKS + 1)
FEW = [("llama", False), ("phi3", True)]
CAN = [(family, tied) for family in REBASABLE for tied in (False, True)]


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# --- what changes no logit ---


@pytest.mark.parametrize(("family", "tied"), CAN)
def test_neither_folding_nor_a_square_basis_at_any_site_changes_a_logit(family: str, tied: bool) -> None:
    """Each edit leaves a whole model, whichever came before it, also where modules are missing."""
    model = apply_all(tiny(family, tie_word_embeddings=tied), [DropMLP(0), DropAttention(2)])
    ids = tiny_tokens(model, 1, 9, seed=1).ids
    before, of_others = logits(model, IDS), logits(model, ids)
    apply(model, FoldNorms())
    assert difference(logits(model, IDS), before) < 2e-6
    assert not any("layernorm" in name for name in model.hf.state_dict())
    for site in (3, 0, 8, 4, 1, 2, 5, 6, 7, 8, 0):  # the last two for the second time
        width = model.layout().stream_width(site)
        apply(model, Rebase(site, orthonormal(width, width, site)))
        assert difference(logits(model, IDS), before) < 4e-6, site
    assert difference(logits(model, ids), of_others) < 4e-6


@pytest.mark.parametrize("family", REBASABLE)
def test_untying_changes_no_logit_and_then_the_ends_are_narrow(family: str, tmp_path: Any) -> None:
    model = tiny(family, tie_word_embeddings=True)
    dense, parameters = logits(model, IDS), model.layout().parameters
    apply(model, UntieHead())
    assert torch.equal(logits(model, IDS), dense)
    assert model.layout().parameters == parameters + VOCABULARY * model.hidden_size
    assert save(model, tmp_path / "stock") == "A"
    assert torch.equal(logits(load(str(tmp_path / "stock")), IDS), dense)
    apply_all(
        model, [FoldNorms(), Rebase(0, orthonormal(model.hidden_size, 9)), Rebase(8, orthonormal(model.hidden_size, 7))]
    )
    assert model.hf.get_input_embeddings().weight.shape == (VOCABULARY, 9)
    assert model.hf.get_output_embeddings().weight.shape == (VOCABULARY, 7)


def test_centring_touches_the_embedding_only() -> None:
    model = tiny("llama")
    before = state(model)
    apply(model, CentreEmbedding())
    after = state(model)
    embedding = after.pop("model.embed_tokens.weight")
    old = before.pop("model.embed_tokens.weight")
    assert same_state(before, after)
    assert torch.allclose(embedding.mean(dim=1), torch.zeros(VOCABULARY), atol=1e-6)
    assert torch.allclose(old - embedding, (old - embedding)[:, :1].expand_as(old), atol=1e-6)  # by one number a row


# --- slicing is projecting ---


def projected(model: Model, bases: dict[int, Tensor], ids: Tensor) -> Tensor:
    """Logits of a stock model whose residual stream is projected, x <- Q Q^T x, at each of the sites."""
    projections = {site: (basis @ basis.T).float() for site, basis in bases.items()}
    entered: dict[int, Tensor] = {}

    def enter(number: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            entered[number] = args[0] @ projections[2 * number] if 2 * number in bases else args[0]
            return (entered[number], *args[1:])

        return hook

    def added(number: int) -> Callable[..., Any]:
        def hook(_: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            name = model.family.multiplier  # by which Granite scales what it adds
            scale: Any = getattr(model.blocks[number], name) if name else 1.0
            between = (entered[number] + scale * output[0]) @ projections[2 * number + 1]
            return ((between - entered[number]) / scale, *output[1:])

        return hook

    for number, module in enumerate(model.blocks):
        module.register_forward_pre_hook(enter(number))
        if 2 * number + 1 in bases:
            module.get_submodule(model.family.attention).register_forward_hook(added(number))
    if 2 * BLOCKS in bases:
        norm = model.hf.get_submodule(model.family.final_norm)
        norm.register_forward_pre_hook(lambda _, args: (args[0] @ projections[2 * BLOCKS],))
    return logits(model, ids)


@pytest.mark.parametrize(
    ("family", "tied", "sites"),
    [
        *((family, tied, SITES) for family, tied in CAN),
        *((family, tied, sites) for family, tied in FEW for sites in ((0,), (8,), (3, 4))),
    ],
)
def test_a_sliced_model_is_the_dense_one_with_its_stream_projected(family: str, tied: bool, sites: Any) -> None:
    hidden = tiny(family).hidden_size
    bases = {site: orthonormal(hidden, hidden - 3 - site, seed=site) for site in sites}
    dense = logits(tiny(family, tie_word_embeddings=tied), IDS)
    expected = projected(tiny(family, tie_word_embeddings=tied), bases, IDS)
    model = tiny(family, tie_word_embeddings=tied)
    apply_all(model, [FoldNorms(), *(Rebase(site, basis) for site, basis in bases.items())])
    assert difference(logits(model, IDS), expected) < 5e-6
    assert difference(expected, dense) > 1e-2  # or this test would compare the dense model with itself
    widths = [model.layout().stream_width(site) for site in SITES]
    assert widths == [bases[site].shape[1] if site in bases else hidden for site in SITES]


# --- with other edits ---


@pytest.mark.parametrize("family", REBASABLE)
def test_the_order_of_sites_and_of_other_edits_does_not_matter(family: str) -> None:
    others: list[Edit] = [KeepNeurons(0, (1, 4, 6)), KeepHeads(1, (0,)), DropAttention(2), DropMLP(3), DropAttention(0)]
    fold, *sites = stream_layouts(tiny(family))["sliced stream"]
    first = apply_all(tiny(family), [*others, fold, *sites])
    for edits in ([fold, *sites, *others], [fold, *reversed(sites), *others]):
        model = apply_all(tiny(family), edits)
        assert model.layout() == first.layout()
        assert difference(logits(model, IDS), logits(first, IDS)) < 4e-6


@pytest.mark.parametrize(("family", "tied"), FEW)
@pytest.mark.parametrize("number", [0, 1, BLOCKS - 1])
def test_a_dropped_block_leaves_its_change_of_basis(family: str, tied: bool, number: int) -> None:
    dropped, emptied = (tiny_in("sliced stream", family, tie_word_embeddings=tied) for _ in range(2))
    apply_all(emptied, [DropAttention(number), DropMLP(number)])
    apply(dropped, DropBlock(number))
    assert difference(logits(dropped, IDS), logits(emptied, IDS)) < 4e-6
    assert dropped.layout().parameters < emptied.layout().parameters


@pytest.mark.parametrize("layout", ["rotated stream", "sliced stream and more"])
def test_two_open_blocks_are_enough(layout: str) -> None:
    edits = stream_layouts(tiny("llama"))[layout]
    assert same_model(apply_all(tiny_closed("llama"), edits).whole(), tiny_in(layout, "llama"))


def test_dtype_and_what_is_trained_stay() -> None:
    model = tiny("qwen3")
    for parameter in model.hf.parameters():
        parameter.data = parameter.data.bfloat16()
        parameter.requires_grad_(False)
    apply_all(model, stream_layouts(model)["sliced stream and more"])
    assert {parameter.dtype for parameter in model.hf.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model, IDS)).all()
    kept = [p for name, p in model.hf.named_parameters() if name.rpartition(".")[2] in ("weight", "bias")]
    assert not any(parameter.requires_grad for parameter in kept)


def test_a_model_can_be_trained_after_slicing() -> None:
    model = tiny_in("sliced stream", "phi3", tie_word_embeddings=True, resid_pdrop=0.5)
    model.hf.train()
    torch.manual_seed(0)
    one, other = (model.hf(IDS, labels=IDS).loss for _ in range(2))
    assert one != other  # the dropout of its residual branches is still there
    one.backward()
    assert all(parameter.grad is not None for parameter in model.hf.parameters())


# --- refusals ---

HALF = orthonormal(32, 16)
NARROW: list[Edit] = [FoldNorms(), Rebase(0, HALF)]
REFUSED: dict[str, list[tuple[bool, list[Edit], Edit]]] = {  # by what is said: whether tied, what went before
    "FoldNorms comes first": [(False, [], Rebase(0, HALF))],
    "folded already": [(False, [FoldNorms()], FoldNorms())],
    "no site 9": [(False, [FoldNorms()], Rebase(9, HALF))],
    "no site -1": [(False, [FoldNorms()], Rebase(-1, HALF))],
    "no site 3": [(False, [FoldNorms(), DropBlock(1)], Rebase(3, HALF))],
    "site 0 has 16 coordinates": [(False, NARROW, Rebase(0, HALF)), (False, NARROW, Rebase(0, HALF.T))],
    "site 1 has 32 coordinates": [(False, [FoldNorms()], Rebase(1, basis)) for basis in (HALF[:, :0], HALF[:, 0])],
    "not orthonormal": [(False, [FoldNorms()], Rebase(1, by * HALF)) for by in (1.01, torch.nan)],
    "not tied": [(False, [], UntieHead())],
    "untie the head before": [(True, NARROW, UntieHead())],
    "untie it before": [(True, [], CentreEmbedding())],
    "centre the embedding before": [(False, NARROW, CentreEmbedding())],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_edit_changes_nothing(message: str) -> None:
    for tied, before, edit in REFUSED[message]:
        model = apply_all(tiny("llama", tie_word_embeddings=tied), before)
        with unchanged(model), pytest.raises(InvalidEditError, match=message):
            apply(model, edit)


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in REBASABLE])
def test_families_of_another_form_refuse_with_the_reason(family: str) -> None:
    model = tiny(family)
    for edit in (FoldNorms(), Rebase(0, HALF), UntieHead(), CentreEmbedding()):
        says = f"{family} cannot do {type(edit).__name__}: .*{re.escape(str(FAMILIES[family].no_rebase))}"
        with unchanged(model), pytest.raises(UnsupportedEditError, match=says):
            apply(model, edit)


def test_edits_as_data() -> None:
    for edit in (FoldNorms(), UntieHead(), CentreEmbedding()):
        assert from_json(to_json(edit)) == edit
    entry = to_json(Rebase(3, HALF))
    assert (entry["site"], entry["basis"]["shape"]) == (3, [32, 16])
    with pytest.raises(InvalidEditError, match="Rebase of site 3 carries a tensor"):
        from_json(entry)


# --- the engines ---


def into(shown: list[Tensor]) -> Callable[[Tensor, Tensor], None]:
    """A tap that keeps what it is shown."""
    return lambda x, weights: shown.append(x.clone())


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("looks", [(0, 1, 2, 3), (2,), (1, 3), (0, 3)])
def test_a_walk_follows_the_stream_into_its_new_basis(looks: tuple[int, ...], closed: bool) -> None:
    """What a visit shows is what the model, as edited so far, gives, whenever somebody looks; though block 1 goes."""
    edits: dict[int, list[Edit]] = {
        0: [Rebase(0, orthonormal(32, 20)), Rebase(1, orthonormal(32, 25))],
        1: [Rebase(2, orthonormal(32, 24)), Rebase(3, orthonormal(32, 21)), DropMLP(1), DropBlock(1)],
        2: [Rebase(4, orthonormal(32, 32)), Rebase(4, orthonormal(32, 22)), KeepNeurons(2, (1, 2, 3))],
        3: [Rebase(6, orthonormal(32, 19)), Rebase(7, orthonormal(32, 18)), Rebase(8, orthonormal(32, 17))],
    }
    model, plain = (tiny_closed if closed else tiny)("mistral"), tiny("mistral")
    tokens = tiny_tokens(model, 3, 9)
    apply(model, FoldNorms())
    apply(plain, FoldNorms())
    for visit in walk(model, tokens, batch_size=2):
        number, seen = visit.block.number, dict[str, list[Tensor]]()
        for when in ("before", "after"):
            taps: dict[str, Any] = {
                tap: into(seen.setdefault(f"{when} {tap}", [])) for tap in ("block_in", "block_mid", "block_out")
            }
            expected = activations(plain, tokens.ids).get(number)
            if number in looks and expected is not None:
                visit.observe(**taps)
                for tap in taps:
                    assert difference(torch.cat(seen[f"{when} {tap}"]), expected[tap]) < 4e-6, (number, when, tap)
            if when == "before":
                for edit in edits[number]:
                    apply(model, edit)
                    apply(plain, edit)
    assert model.layout() == plain.layout()


def test_to_see_what_enters_nothing_is_run() -> None:
    run, model, shown = Run(), tiny("llama"), list[Tensor]()
    next(walk(model, tiny_tokens(model, 2, 7), run=run)).observe(block_in=into(shown))
    assert (run.meter.block_tokens, [x.shape for x in shown]) == (0, [(1, 7, 32)] * 2)


@pytest.mark.parametrize("layout", ["sliced stream", "sliced stream and more"])
def test_a_sweep_equals_brute_force(layout: str) -> None:
    model = tiny_in(layout, "qwen3")
    tokens = tiny_tokens(model, 2, 9)
    numbers = model.numbers
    parts = [[(0, "block")], [(1, "mlp")], [(0, "attention"), (-1, "block")], [(1, "block"), (2, "block")]]
    variants = [DENSE, *(frozenset(Part(numbers[at], kind) for at, kind in gone) for gone in parts)]
    losses = sweep(model, tokens, variants)
    for variant, loss in zip(variants, losses.tolist(), strict=True):
        assert loss == pytest.approx(mean_nll(without(model, variant), tokens), rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_hooks_that_spread_a_model_over_devices_still_wrap_it(tied: bool) -> None:
    """With `--device auto` accelerate has replaced each module's forward by one that keeps the old one."""
    hooks = pytest.importorskip("accelerate.hooks")
    plain = tiny_in("sliced stream", "llama", tie_word_embeddings=tied)
    model = tiny("llama", tie_word_embeddings=tied)
    called: list[str] = []

    class Hook(hooks.AlignDevicesHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(type(module).__name__)
            return super().pre_forward(module, *args, **kwargs)

    for module in (model.hf.get_input_embeddings(), *model.blocks, model.hf.lm_head):
        hooks.add_hook_to_module(module, Hook(execution_device="cpu", io_same_device=True))
    apply_all(model, stream_layouts(model)["sliced stream"])
    assert torch.equal(logits(model, IDS), logits(plain, IDS))
    assert called.count("LlamaDecoderLayer") == BLOCKS  # the name by which accelerate keeps a block in one piece
