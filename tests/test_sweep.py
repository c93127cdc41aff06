"""`sweep` equals brute force: really edit a copy, run the whole model, loop over the tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import FAMILY_NAMES, ClosedModel, tiny, tiny_closed, tiny_tokens
from oracles import PROPERTY, Watcher, edited, lopsided, mean_kl, mean_nll, standing, weighted, without
from torch import Tensor, nn

from secateur.engine import loss as loss_module
from secateur.engine.loss import KLDivergence, NegativeLogLikelihood
from secateur.engine.sweep import DENSE, Part, Variant, activation_bytes, final_states, sweep, sweep_bytes, sweep_states
from secateur.model.handle import Model
from secateur.run import Run
from secateur.surgery.edits import BlockEdit, DropAttention, DropBlock, KeepHeads, KeepNeurons

PARTS = st.builds(Part, st.integers(0, 3), st.sampled_from(["attention", "mlp", "block"]))
VARIANTS = st.lists(st.frozensets(PARTS, max_size=5), min_size=1, max_size=4)
SINGLES = [frozenset({Part(block, kind)}) for kind in ("attention", "mlp", "block") for block in range(4)]
NESTED = [
    frozenset({Part(3, "attention")}),
    frozenset({Part(0, "mlp"), Part(3, "attention")}),
    frozenset({Part(0, "mlp"), Part(1, "block"), Part(2, "attention"), Part(2, "mlp")}),
    DENSE,
]


TWICE = [frozenset({Part(1, "block")}), frozenset({Part(1, "block"), Part(1, "mlp")})]  # two names for one state


def close(got: Tensor, want: Sequence[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("shape", ["dense", "lopsided"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_equals_brute_force(family: str, shape: Any) -> None:
    model = standing(family, shape)
    tokens = weighted(tiny_tokens(model, 2, 9), seed=5)

    @settings(PROPERTY, max_examples=3)
    @example(SINGLES)
    @example([*TWICE, *(each | {Part(3, "mlp")} for each in TWICE)])
    @given(VARIANTS)
    def check(variants: list[Variant]) -> None:
        losses = sweep(model, tokens, variants)
        close(losses, [mean_nll(without(model, each), tokens) for each in variants])
        if variants == SINGLES and shape == "dense":
            assert len(set(losses.tolist())) == 12  # no part could be taken for another

    check()


@pytest.mark.parametrize(("family", "shape"), [("llama", "dense"), *((name, "lopsided") for name in FAMILY_NAMES)])
def test_kl_equals_brute_force(family: str, shape: Any) -> None:
    dense, model = standing(family), standing(family, shape)
    tokens = weighted(tiny_tokens(model, 2, 8), seed=2)
    watcher, work = Watcher(), 2 * len(dense.numbers)
    metric = KLDivergence(final_states(dense, tokens, run=Run(observer=watcher)))
    assert watcher.shown == [("final states", work, work)]
    got = sweep(model, tokens, NESTED, metric)
    close(got, [mean_kl(dense, without(model, each), tokens) for each in NESTED])
    assert (got[3].abs() < 1e-9) == (shape == "dense")


def test_the_answers_stand_in_the_order_of_the_questions() -> None:
    model = tiny("phi3")
    tokens = tiny_tokens(model, 2, 9)
    asked = [SINGLES[5], DENSE, SINGLES[0], SINGLES[5], DENSE]
    run, once = Run(), Run()
    losses = sweep(model, tokens, asked, run=run)
    close(losses, sweep(model, tokens, [SINGLES[5], DENSE, SINGLES[0]], run=once)[[0, 1, 2, 0, 1]].tolist())
    assert len(set(losses.tolist())) == 3
    spent = [(each.meter.block_tokens, each.meter.head_tokens) for each in (run, once)]
    assert spent[0] == spent[1]  # asked twice is computed once
    assert (run.meter.asked_tokens, once.meter.asked_tokens) == (5 * 18 * 4, 3 * 18 * 4)
    assert sweep(model, tokens, []).shape == (0,)


def test_block_numbers_are_those_of_the_model_as_loaded() -> None:
    whole = tiny("qwen2")
    model = edited(whole, DropBlock(1))
    tokens = tiny_tokens(model, 2, 9)
    gone = Part(1, "block")
    variants = [frozenset({Part(number, "mlp")}) for number in (0, 2, 3)]
    close(sweep(model, tokens, variants), sweep(whole, tokens, [v | {gone} for v in variants]).tolist())


NARROW = {  # versions of parts, by their numbers
    Part(0, "mlp", 0): KeepNeurons(0, (0, 3, 7, 9)),
    Part(0, "mlp", 1): KeepNeurons(0, (2, 3)),
    Part(2, "mlp", 0): KeepNeurons(2, (1, 5), torch.full((32, 2), 0.1)),
    Part(2, "attention", 0): KeepHeads(2, (1,)),
}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_variant_may_hold_another_version_of_a_part(family: str) -> None:
    """As if the edit that makes the version were really done; and the model is as it was."""
    versions: dict[Part, BlockEdit] = {
        part: edit for part, edit in NARROW.items() if type(edit).__name__ not in standing(family).family.cannot
    }
    model, tokens = tiny(family), weighted(tiny_tokens(tiny(family), 2, 9))
    before = model.fingerprint()
    variants = [
        DENSE, *(frozenset({part}) for part in versions), frozenset({Part(0, "mlp", 1), Part(2, "mlp", 0)}),
        frozenset({Part(0, "mlp", 0), Part(2, "attention"), Part(3, "block")}), frozenset({Part(0, "mlp")}),
    ]  # fmt: skip

    def really(variant: Variant) -> Model:
        return without(
            edited(model, *(versions[part] for part in variant & versions.keys())), variant - versions.keys()
        )

    got = sweep(model, tokens, variants, versions=versions)
    close(got, [mean_nll(really(variant), tokens) for variant in variants])
    assert len(set(got.tolist())) == len(variants)
    assert model.fingerprint() == before


@pytest.mark.parametrize("metric", ["ppl", "kl"])
def test_little_memory_means_more_passes_or_states_in_files_and_the_same_losses(metric: str) -> None:
    model, variants = tiny("mistral"), [*SINGLES, DENSE]
    tokens = weighted(tiny_tokens(model, 3, 8))
    chosen = KLDivergence(final_states(tiny("mistral", seed=1), tokens)) if metric == "kl" else None
    plenty, five, two = Run(), Run(), Run()
    want = sweep(model, tokens, variants, chosen, run=plenty)
    row = 8 * model.hidden_size * 4  # one variant's states of one sample
    some = sweep(model, tokens, variants, chosen, run=five, memory_bytes=2 * row * 5)
    got = sweep(model, tokens, variants, chosen, run=two, memory_bytes=1)
    assert two.meter.block_tokens > five.meter.block_tokens > plenty.meter.block_tokens
    for each in (some, got):
        torch.testing.assert_close(each, want, rtol=1e-6, atol=1e-6)
    closed, run = tiny_closed("mistral"), Run()
    assert torch.equal(sweep(closed, tokens, variants, chosen, run=run, memory_bytes=1), want)
    assert closed.block_openings == [0, 1, 2, 3]
    assert run.meter == plenty.meter


@pytest.mark.parametrize(("family", "metric"), [("llama", "ppl"), ("phi3", "kl"), ("opt", "kl")])
def test_logits_in_chunks_give_the_same_losses(family: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = standing(family)
    tokens = weighted(tiny_tokens(model, 2, 12))
    chosen = KLDivergence(final_states(model, tokens)) if metric == "kl" else NegativeLogLikelihood()
    whole, chunked = Run(), Run()
    want = sweep(model, tokens, NESTED, chosen, run=whole)
    monkeypatch.setattr(loss_module, "LOGIT_BYTES", 4 * model.vocab_size * 4)  # four rows: 4, 4 and 3 predictions
    got = sweep(model, tokens, NESTED, chosen, run=chunked)
    assert chunked.meter == whole.meter
    assert chunked.meter.head_tokens == 2 * 11 * (4 + (metric == "kl"))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def forwards(model: Model, candidates: list[int]) -> int:
    """Block-forwards of a greedy round: each block produces a state per candidate up to it, and the untouched one
    while there are candidates to come."""
    return sum(sum(c <= number for c in candidates) + any(c > number for c in candidates) for number in model.numbers)


@pytest.mark.parametrize("removed", [(), (0,), (3, 7), (10, 11)])
def test_a_greedy_round_costs_a_block_forward_per_distinct_prefix(removed: tuple[int, ...]) -> None:
    model = edited(tiny("llama", num_hidden_layers=12), *map(DropAttention, removed))
    candidates = [number for number in model.numbers if number not in removed]
    tokens = tiny_tokens(model, 2, 5)
    run, watcher = Run(), Watcher()
    run.observer = watcher
    sweep(model, tokens, [frozenset({Part(c, "attention")}) for c in candidates], run=run, label="round")
    assert run.meter.block_tokens == forwards(model, candidates) * 2 * 5
    assert run.meter.head_tokens == len(candidates) * 2 * 4
    assert watcher.shown == [("round", forwards(model, candidates) * 2, forwards(model, candidates) * 2)]
    if not removed:
        assert forwards(model, candidates) == (12 * 12 + 3 * 12 - 2) / 2  # brute force: 12 * 12


def test_a_muted_block_costs_nothing() -> None:
    model = tiny("llama")
    tokens = tiny_tokens(model, 1, 5)
    run, watcher = Run(), Watcher()
    run.observer = watcher
    muted = frozenset({Part(1, "block"), Part(1, "mlp"), Part(2, "block")})  # block 1 twice
    close(sweep(model, tokens, [muted], run=run), [mean_nll(without(model, muted), tokens)])
    assert run.meter.block_tokens == 2 * 5
    assert watcher.shown == [("sweep", 2, 2)]


def test_each_block_is_opened_once_per_pass() -> None:
    model = tiny_closed("qwen3")
    tokens = tiny_tokens(model, 3, 8)
    got = sweep(model, tokens, SINGLES + NESTED)
    assert model.block_openings == [0, 1, 2, 3]
    torch.testing.assert_close(got, sweep(tiny("qwen3"), tokens, SINGLES + NESTED), rtol=0, atol=0)


class Breaks(NegativeLogLikelihood):
    def loss(self, *_: Any) -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_model_is_as_before(family: str) -> None:
    model = lopsided(tiny(family))
    tokens = tiny_tokens(model, 2, 6)

    def facts() -> tuple[list[int], str, dict[str, Any]]:
        modules = [id(module) for module in model.hf.modules()]
        return modules, model.fingerprint(), copy.deepcopy(model.hf.config).to_dict()

    before = facts()
    sweep(model, tokens, SINGLES)
    assert facts() == before
    with pytest.raises(ZeroDivisionError):
        sweep(model, tokens, SINGLES, Breaks())
    assert facts() == before


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_model_is_as_before_when_a_block_fails(family: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ClosedModel(tiny(family).hf)
    before = [id(module) for module in model.hf.modules()]
    calls: Iterator[int] = iter(range(100))
    forward = model.blocks[2].forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:  # muted
            raise ZeroDivisionError
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[2], "forward", fail)
        with pytest.raises(ZeroDivisionError):
            sweep(model, tiny_tokens(model, 1, 6), [DENSE, frozenset({Part(2, kind)})])
    assert [id(module) for module in model.hf.modules()] == before
    assert not model.opened
    assert model.whole().fingerprint() == tiny(family).fingerprint()


def test_nan_in_one_module_spoils_only_the_variants_that_have_it() -> None:
    model = tiny("qwen2")
    with model.open(2) as block:
        block.attention_out.weight = nn.Parameter(torch.full_like(block.attention_out.weight, torch.nan))
    tokens = tiny_tokens(model, 2, 6)
    variants = [*SINGLES, frozenset({Part(0, "mlp"), Part(2, "attention")}), DENSE]
    losses = sweep(model, tokens, variants)
    healed = [v for v in variants if v & {Part(2, "attention"), Part(2, "block")}]
    assert len(healed) == 3
    for variant, loss in zip(variants, losses.tolist(), strict=True):
        assert (loss == loss) == (variant in healed)
    clean = sweep(tiny("qwen2"), tokens, healed)
    assert [loss for v, loss in zip(variants, losses.tolist(), strict=True) if v in healed] == clean.tolist()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_bytes_foretold_are_those_of_the_rows_up_to_the_limit(device: str) -> None:
    model = tiny("llama")
    row, active = 6 * 32 * 4, activation_bytes(model, 6)
    assert sweep_bytes(model, 0, 6, device) == 0
    at_once = {"cpu": 1, "cuda": 6}[device]
    assert sweep_bytes(model, sweep_states(3, 2, 6), 6, device) == 6 * row + at_once * active
    limit = 10 * active
    assert sweep_bytes(model, sweep_states(10**6, 2, 6), 6, "cuda", limit) == limit
    long = sweep_bytes(model, sweep_states(10**6, 2, 6), 6, device, 10**9)
    assert (long > 10**9 - 2 * active) == (device == "cuda")  # a CPU runs one row at a time
    assert sweep_bytes(model, sweep_states(9, 1, 6), 6, device, 1) >= 2 * row + active  # two variants fit always
