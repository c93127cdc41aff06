"""`walk` is the model's own forward, block by block; its taps see what hooks on the whole model see."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, REBASABLE, logits, tiny, tiny_closed, tiny_tokens
from oracles import Watcher, activations, edited, lopsided, standing, weighted
from torch import Tensor, nn

from secateur.engine import processor
from secateur.engine.tokens import Tokens
from secateur.engine.walk import Visit, walk
from secateur.errors import InvalidEditError, SecateurError
from secateur.model.handle import Model
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
    SetWeight,
    UntieHead,
)

TAPS = ("block_in", "block_mid", "block_out", "attention_hidden", "mlp_hidden")


class Collector:
    """Everything that taps are shown, by block and tap, in the order of samples."""

    def __init__(self) -> None:
        self.x: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self.weights: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def taps(self, visit: Visit) -> dict[str, Any]:
        def look(name: str) -> Any:
            def see(x: Tensor, weights: Tensor) -> None:
                assert x.shape[:2] == weights.shape
                self.x[visit.block.number, name].append(x.clone())
                self.weights[visit.block.number, name].append(weights.clone())

            return see

        return {name: look(name) for name in TAPS}

    def all(self, number: int, name: str) -> Tensor:
        return torch.cat(self.x[number, name])


def collect(model: Model, tokens: Tokens, **options: Any) -> Collector:
    collector = Collector()
    for visit in walk(model, tokens, **options):
        visit.advance(**collector.taps(visit))
    return collector


@pytest.mark.parametrize(
    ("shape", "order", "batch_size"),
    [("dense", "blocks", 1), ("dense", "blocks", 3), ("dense", "samples", 1), ("dense", "samples", 3),
     ("lopsided", "blocks", 3), ("lopsided", "samples", 1)],
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_taps_equal_hooks_on_the_whole_model(family: str, shape: Any, batch_size: int, order: str) -> None:
    model = standing(family, shape)
    tokens = weighted(tiny_tokens(model, 4, 11))
    seen = collect(model, tokens, order=order, batch_size=batch_size)
    assert all(torch.equal(torch.cat(weights), tokens.weights) for weights in seen.weights.values())
    expected = [activations(model, ids) for ids in tokens.ids.split(batch_size)]  # batched alike: bit for bit
    taps = {(number, name) for number, by_name in expected[0].items() for name in by_name}
    assert set(seen.x) == taps
    assert len(taps) == (16 if shape == "dense" else 14) + 4 * (family in REBASABLE)
    for number, name in taps:
        want = torch.cat([each[number][name] for each in expected])
        assert torch.equal(seen.all(number, name), want), (number, name)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_an_edit_during_a_visit_feeds_the_next_block(family: str) -> None:
    model = tiny(family)
    tokens = tiny_tokens(model, 3, 8)
    generator = torch.Generator().manual_seed(1)
    with model.open(1) as block:
        hidden, inner = block.weight("attention_out").shape
        groups = block.shape.kv_heads
    edits = {
        0: [KeepNeurons(0, (0, 3, 4, 9), torch.randn(hidden, 4, generator=generator))],
        1: [KeepHeads(1, (0,), torch.randn(hidden, inner // groups, generator=generator)), DropMLP(1)],
        2: [DropAttention(2), SetWeight(2, "mlp_out", torch.zeros(hidden, model.layout().blocks[2].shape.width))],
    }
    pruned = edited(model, *(edit for each in edits.values() for edit in each))
    expected = [activations(pruned, ids) for ids in tokens.ids.split(2)]
    before, seen = Collector(), Collector()
    for visit in walk(model, tokens, batch_size=2):
        number = visit.block.number
        visit.observe(**before.taps(visit))
        for edit in edits.get(number, []):
            apply(model, edit)
        visit.observe(**seen.taps(visit))  # the edited block, and not advanced by looking
        if number == 1:
            visit.advance()  # the others are advanced by the walk
    for number in model.numbers:
        for name, want in expected[0][number].items():
            want = torch.cat([each[number][name] for each in expected])
            assert torch.equal(seen.all(number, name), want), (number, name)
        entered = torch.cat([each[number]["block_in"] for each in expected])
        assert torch.equal(before.all(number, "block_in"), entered)
        # the looks at block 3 see one block, the others one before and one after the edit
        assert torch.equal(before.all(number, "block_out"), seen.all(number, "block_out")) == (number == 3)


@pytest.mark.parametrize("look", ["before", "after", "no"])
@pytest.mark.parametrize("edit", [DropAttention(1), DropBlock(1)], ids=["attention", "block"])
def test_a_visit_need_not_advance(edit: Edit, look: str) -> None:
    model = tiny("qwen2")  # its blocks are called with different masks
    tokens = tiny_tokens(model, 2, 9)
    expected = activations(edited(model, edit), tokens.ids)
    seen = Collector()
    for visit in walk(model, tokens, batch_size=2):
        if visit.block.number == 1:
            if look == "before":
                visit.observe()
            apply(model, edit)
            if look == "after" and isinstance(edit, DropAttention):
                visit.observe()
        elif visit.block.number > 1:
            visit.advance(**seen.taps(visit))
    for number in (2, 3):
        for name in TAPS:
            assert torch.equal(seen.all(number, name), expected[number][name])


@pytest.mark.parametrize(
    ("edit", "refused"),
    [(DropAttention(0), True), (DropBlock(0), True), (DropMLP(2), True), (CentreEmbedding(), True),
     (DropAttention(3), False), (DropBlock(3), False), (UntieHead(), False), (FoldNorms(), False)],
    ids=str,
)  # fmt: skip
def test_an_edit_behind_the_walk_is_refused_and_changes_nothing(edit: Edit, refused: bool) -> None:
    """The states that wait were computed without it."""
    tied = isinstance(edit, UntieHead)
    model, tokens = tiny("qwen3", tie_word_embeddings=tied), tiny_tokens(tiny("qwen3"), 2, 6)
    before, seen = model.fingerprint(), Collector()
    for visit in walk(model, tokens):
        visit.advance(**seen.taps(visit))
        if visit.block.number == 2 and refused:
            with pytest.raises(InvalidEditError, match="block 3"):
                apply(model, edit)
            assert model.fingerprint() == before
        elif visit.block.number == 2:
            apply(model, edit)
    apply(model, DropAttention(0))  # nobody walks any more
    assert (3, "block_out") in seen.x or edit == DropBlock(3)


def test_advance_comes_last() -> None:
    model = tiny("qwen3")
    visit = next(walk(model, tiny_tokens(model, 2, 6)))
    visit.advance()
    for then in (visit.advance, visit.observe):
        with pytest.raises(SecateurError, match="advance"):
            then()


@pytest.mark.parametrize(("block", "samples"), [(0, 1), (3, 1), (0, 2), (3, 2)])
def test_an_edit_inside_a_walk_over_samples_is_refused(block: int, samples: int) -> None:
    model = tiny("qwen3")
    visits = walk(model, tiny_tokens(model, samples, 6), order="samples")
    with pytest.raises(SecateurError, match="samples"):  # noqa: PT012  # at the edit, or as the walk goes on
        for visit in visits:
            if visit.block.number == block:
                apply(model, DropAttention(block))


@pytest.mark.parametrize(("order", "passes"), [("blocks", 1), ("samples", 1), ("one by one", 3)])
def test_closed_blocks_have_no_weights(order: str, passes: int) -> None:
    closed, model = tiny_closed("qwen2"), tiny("qwen2")
    tokens = tiny_tokens(model, 3, 8)
    how: dict[str, Any] = {"order": order} if passes == 1 else {"order": "samples", "group_bytes": 1}
    seen, expected = collect(closed, tokens, **how), collect(model, tokens, **how)
    assert seen.x.keys() == expected.x.keys()
    assert all(torch.equal(seen.all(*key), expected.all(*key)) for key in expected.x)
    assert closed.block_openings == [0, 1, 2, 3] * passes


@pytest.mark.parametrize("order", ["blocks", "samples"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_meter_counts_every_token_through_every_block(order: str, batch_size: int) -> None:
    model, watcher = lopsided(tiny("mistral")), Watcher()
    tokens = tiny_tokens(model, 5, 7)
    run = Run(observer=watcher)
    for visit in walk(model, tokens, order=order, batch_size=batch_size, run=run, label="look"):
        visit.advance()
    assert watcher.shown == [("look", 20, 20)]
    assert run.meter.block_tokens == 5 * 7 * 4
    assert run.meter.head_tokens == 0
    for visit in walk(model, tokens, order=order, batch_size=batch_size, run=run):
        visit.observe()
    assert run.meter.block_tokens == (4 + 4 + 3) * 5 * 7  # nobody needs the outputs of the last block


@pytest.mark.parametrize("order", ["blocks", "samples"])
def test_what_nobody_looks_at_is_not_run(order: str) -> None:
    model, run = tiny("mistral"), Run()
    model.hf.lm_head.weight = nn.Parameter(torch.zeros(1, 1))  # nor the head ever: it would fail at once
    tokens, calls = tiny_tokens(model, 3, 7), []
    handle = model.hf.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in walk(model, tokens, order=order, run=run):
        pass
    handle.remove()
    assert run.meter.block_tokens == 0
    assert not calls

    seen = Collector()
    for visit in walk(model, tokens, order=order, run=run):
        if visit.block.number in (1, 3):
            visit.observe(**seen.taps(visit))
    assert run.meter.block_tokens == (1 + 2 + 1 + 1) * 3 * 7  # block 1 to look and to pass on; the last to look
    for number in (1, 3):
        for name in TAPS:
            assert torch.equal(seen.all(number, name), collect(model, tokens).all(number, name))


@pytest.mark.parametrize(
    ("taps", "spared"), [(("attention_hidden",), "mlp_norm"), (("block_in", "mlp_hidden"), "mlp_out")]
)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_look_ends_where_the_last_tap_is_shown(family: str, taps: tuple[str, ...], spared: str) -> None:
    model = tiny(family)
    tokens = tiny_tokens(model, 2, 6)
    whole, part, calls = Collector(), Collector(), []
    for visit in walk(model, tokens):
        part_taps = part.taps(visit)
        module = visit.block.mlp_out if spared == "mlp_out" else visit.block.mlp_norm
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        visit.observe(**{name: part_taps[name] for name in taps})
        handle.remove()
        assert not calls
        visit.advance(**whole.taps(visit))
    for number in model.numbers:
        for name in taps:
            assert torch.equal(part.all(number, name), whole.all(number, name))


@pytest.mark.parametrize("tap", TAPS)
def test_an_exception_in_a_tap_leaves_no_trace(tap: str) -> None:
    model = tiny_closed("phi3")
    tokens = tiny_tokens(model, 2, 6)
    blocks = model.blocks

    def fail(x: Tensor, weights: Tensor) -> None:
        raise ZeroDivisionError

    stream = walk(model, tokens)
    next(stream).advance()
    visit = next(stream)
    with pytest.raises(ZeroDivisionError):
        visit.observe(**{tap: fail})
    stream.close()
    assert not model.opened
    assert model.blocks is blocks
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.hf.modules())
    assert torch.equal(logits(model.whole(), tokens.ids), logits(tiny("phi3"), tokens.ids))


@pytest.mark.parametrize("observe", [True, False])
def test_a_block_is_fetched_once_per_visit(observe: bool) -> None:
    model = tiny_closed("llama")
    for visit in walk(model, tiny_tokens(model, 2, 6)):
        visit.observe()
        apply(model, DropAttention(visit.block.number))
        if not observe:
            visit.advance()
    assert model.block_openings == [0, 1, 2, 3]


def test_an_exception_in_the_models_forward_puts_the_blocks_back() -> None:
    model = tiny("opt")
    blocks = model.blocks
    stream = walk(model, Tokens.of(torch.full((1, 4), model.vocab_size)))
    with pytest.raises(IndexError):
        next(stream).observe()
    assert model.blocks is blocks


@pytest.mark.parametrize(("times", "warned"), [(5.0, True), (0.6, False)])
def test_a_processor_that_is_slow_in_the_models_dtype_is_told_of_once(
    times: float, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processor, "_LARGE", 0)
    monkeypatch.setattr(processor, "_seconds", {torch.float32: 1.0, torch.bfloat16: times}.__getitem__)
    monkeypatch.setattr(processor, "_warn_if_slow", functools.cache(processor._warn_if_slow.__wrapped__))
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        model = tiny("llama")
        model.hf.to(dtype)
        collect(model, tiny_tokens(model, 1, 5))
    assert ["5 times as long in bfloat16" in line for line in caplog.messages] == [True] * warned
