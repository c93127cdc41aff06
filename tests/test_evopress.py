"""EvoPress: a planted optimum is found, every mask keeps the sparsity, nothing is computed twice, a replay is free, and
a search that is smaller than the paper's says so."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny, tiny_tokens
from oracles import PROPERTY, edit_facts, mean_kl, mean_nll, pruner, standing, still, weighted, without
from torch import Tensor

from secateur.engine.loss import Metric
from secateur.engine.sweep import Part, Sweeper, Variant
from secateur.engine.tokens import Tokens
from secateur.errors import InfeasibleBudgetError, InvalidOptionError, NumericalError
from secateur.methods import get_method
from secateur.methods.evopress import reduced, search_of, search_space
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import MemoryStore, Run
from secateur.solvers import evolution
from secateur.solvers.evolution import Selection, Space, WindowLosses, evolve
from secateur.surgery.apply import predict
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP

METHOD = get_method("evopress")
SMALL: dict[str, Any] = {
    "generations": 4, "offspring": 6, "initial": 8, "initial_tokens": 8, "selection_tokens": "8,24",
}  # fmt: skip
prune = pruner("evopress", **SMALL)


# --- the space ---


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    kinds: list[Any] = draw(st.sampled_from([["block"], ["attention", "mlp"]]))
    parts, gone = {}, {}
    for kind in kinds:
        blocks = sorted(draw(st.sets(st.integers(0, 12), min_size=1, max_size=9)))
        parts[kind] = tuple(Part(number, kind) for number in blocks)
        gone[kind] = draw(st.integers(0, len(blocks)))
    return Space(parts, gone)


def lost(variant: Variant, space: Space) -> dict[str, int]:
    return {kind: sum(part in variant for part in parts) for kind, parts in space.parts.items()}


@PROPERTY
@given(spaces(), st.integers(1, 5), st.integers(0, 10))
def test_every_draw_and_every_mutation_keeps_the_sparsity(space: Space, most: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    variant = space.draw(rng)
    for _ in range(20):
        assert lost(variant, space) == space.gone
        assert variant <= {part for parts in space.parts.values() for part in parts}
        child = space.mutate(variant, most, rng)
        assert len(child - variant) <= most
        variant = child


def test_a_mutation_switches_as_often_as_the_smaller_of_two_draws() -> None:
    space = Space({"block": tuple(Part(number, "block") for number in range(400))}, {"block": 200})
    rng = torch.Generator().manual_seed(0)
    parent = space.draw(rng)
    sizes = [len(space.mutate(parent, 3, rng) - parent) for _ in range(900)]
    shares = [sizes.count(size) / len(sizes) for size in (1, 2, 3)]
    assert shares == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.05)  # the space is large: switches seldom undo others
    both = Space({kind: tuple(Part(n, kind) for n in range(9)) for kind in ("attention", "mlp")},
                 {"attention": 4, "mlp": 4})  # fmt: skip
    parent = both.draw(rng)
    kinds = [next(iter(both.mutate(parent, 1, rng) - parent)).kind for _ in range(400)]
    assert kinds.count("mlp") == pytest.approx(200, abs=40)


def test_all_masks_and_all_parts_are_drawn_alike() -> None:
    space = Space({"block": tuple(Part(number, "block") for number in range(5))}, {"block": 2})
    rng = torch.Generator().manual_seed(0)
    drawn = [space.draw(rng) for _ in range(2000)]
    counts = [drawn.count(frozenset(Part(number, "block") for number in pair))
              for pair in itertools.combinations(range(5), 2)]  # fmt: skip
    assert min(counts) > 150
    assert max(counts) < 250
    parent = drawn[0]
    children = {space.mutate(parent, 1, rng) for _ in range(200)}
    assert len(children) == 2 * 3  # every neighbour


# --- the search, on made-up losses ---


BLOCKS = tuple(Part(number, "block") for number in range(12))


class Linear:
    """A loss that is a sum over dropped parts; it depends on the tokens where `noise` is given."""

    def __init__(self, noise: float = 0.0) -> None:
        self.calls: list[tuple[list[Variant], int, int, int]] = []
        self.noise = noise

    def __call__(self, variants: Sequence[Variant], tokens: int, generation: int, step: int) -> list[float]:
        self.calls.append((list(variants), tokens, generation, step))
        shift = self.noise * ((31 * generation + 7 * step) % 5)
        return [sum(1 + (part.block * 5) % 12 for part in variant) + shift for variant in variants]


def search(score: Any, run: Run | None = None, **changes: Any) -> list[evolution.Generation]:
    constants: dict[str, Any] = {
        "key": "test", "generations": 10, "offspring": 8, "initial": 6, "initial_tokens": 5,
        "selections": [Selection(3, 10), Selection(1, 40)], "max_mutations": 3,
    } | changes  # fmt: skip
    return list(
        evolve(constants.pop("space", Space({"block": BLOCKS}, {"block": 4})), score, run or Run(), **constants)
    )


def test_a_linear_loss_is_minimised_and_the_elite_never_gets_worse() -> None:
    generations = search(Linear(), generations=30, selections=[Selection(2, 9), Selection(1, 9)])
    assert generations[-1].parents == [frozenset(sorted(BLOCKS, key=lambda part: (part.block * 5) % 12)[:4])]
    losses = [each.loss for each in generations]  # all on equal tokens
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 1 + 2 + 3 + 4 < losses[0]


@pytest.mark.parametrize("survivors", [[3, 1], [5, 2], [4, 4, 3], [1]])
def test_selections_run_as_laid_out(survivors: list[int]) -> None:
    score = Linear()
    steps = [Selection(kept, 10 * (place + 1)) for place, kept in enumerate(survivors)]
    told = search(score, selections=steps)
    assert [each.number for each in told] == list(range(11))
    calls = iter(score.calls)
    first, tokens, *_ = next(calls)
    assert (len(set(first)), tokens) == (6, 5)
    parents = told[0].parents
    assert len(parents) == survivors[-1]
    for number in range(1, 11):
        before: set[Variant] = set()
        for step, selection in enumerate(steps):
            variants, tokens, *where = next(calls)
            assert (tokens, where) == (selection.tokens, [number, step])
            assert len(set(variants)) == len(variants)
            elite = set(parents) if step == len(steps) - 1 else set()
            assert set(variants) & set(parents) == elite
            assert len(variants) == (8 if step == 0 else steps[step - 1].survivors) + len(elite)
            assert not before or set(variants) - elite <= before
            before = set(variants)
        assert set(told[number].parents) <= before
        parents = told[number].parents


def test_equal_losses_go_to_the_lowest_blocks() -> None:
    told = search(lambda variants, *_: [1.0] * len(variants), generations=60, selections=[Selection(1, 9)])
    assert told[-1].parents == [frozenset(BLOCKS[:4])]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_candidate_without_a_finite_loss_loses(bad: float) -> None:
    def score(variants: Sequence[Variant], *_: int) -> list[float]:
        return [bad if BLOCKS[0] in variant else 1.0 for variant in variants]

    assert all(BLOCKS[0] not in each.parents[0] for each in search(score))
    with pytest.raises(NumericalError, match="test, initial draw"):
        search(lambda variants, *_: [bad] * len(variants))
    with pytest.raises(NumericalError, match="test, generation 3"):
        search(lambda variants, _, number, step: [bad if number == 3 and step else 1.0] * len(variants))


@pytest.mark.parametrize("gone", [0, 1, 2, 3])
def test_a_space_that_has_no_more_to_give_ends_nothing(gone: int) -> None:
    space = Space({"block": BLOCKS[:3]}, {"block": gone})
    told = search(Linear(), space=space, offspring=50, initial=50)
    assert len(told) == 11
    assert lost(told[-1].parents[0], space) == {"block": gone}


# --- windows ---


class Recorder(Sweeper):
    """Losses made up from variant and sample; notes every pair that it is asked for."""

    def __init__(self, run: Run | None = None) -> None:
        super().__init__(standing("llama"), run or Run())
        self.asked: list[tuple[Variant, int, int]] = []
        self.groups = 0

    def sums(self, tokens: Tokens, variants: Sequence[Variant], metric: Metric, label: str) -> Tensor:
        self.groups += 1
        samples, length = tokens.ids[:, 0].tolist(), tokens.length
        self.asked += [(variant, sample, length) for variant in variants for sample in samples]
        return torch.tensor([[self.value(v, s) * (length - 1) for s in samples] for v in variants]).double()

    @staticmethod
    def value(variant: Variant, sample: int) -> float:
        return sum(1 + (part.block * 5 + sample) % 12 for part in variant) / 8


def windows_of(sweeper: Sweeper, weights: Tensor, windows: Any, asked: list[int]) -> WindowLosses:
    """Of windows whose first token is their number."""
    tokens = Tokens.of(torch.arange(len(weights))[:, None].expand(weights.shape), weights)
    return WindowLosses(
        sweeper, tokens, key="test", windows=windows, criterion="ppl", asked={"selection_tokens": asked}
    )


@pytest.mark.parametrize("windows", ["drawn", "first"])
@pytest.mark.parametrize("selections", [[Selection(1, 80)], [Selection(3, 10), Selection(2, 45)]], ids=["one", "two"])
def test_nothing_is_computed_twice(windows: Any, selections: list[Selection]) -> None:
    run = Run()
    compute, asked = Recorder(run), [20, *(each.tokens for each in selections)]
    score = windows_of(compute, torch.ones(8, 10), windows, asked)
    told = search(score, run, selections=selections, initial_tokens=20)
    assert len(compute.asked) == len(set(compute.asked)) > 100
    if windows == "first":
        losses = [each.loss for each in told[1:]]
        assert losses == sorted(losses, reverse=True)
        assert {sample for _, sample, _ in compute.asked} == set(range(max(2, -(-selections[-1].tokens // 10))))
    else:
        assert {sample for _, sample, _ in compute.asked} == set(range(8))


@pytest.mark.parametrize("tokens", [2, 7, 10, 11, 12, 25, 40, 80])
def test_a_selection_takes_so_many_tokens_without_replacement(tokens: int) -> None:
    compute = Recorder()
    score = windows_of(compute, torch.ones(8, 10), "drawn", [tokens])
    seen = []
    for generation in range(4):
        variant = frozenset({BLOCKS[generation]})
        (loss,) = score([variant], tokens, generation, 0)
        taken = [(sample, length) for each, sample, length in compute.asked if each == variant]
        assert len({sample for sample, _ in taken}) == len(taken)
        assert sum(length for _, length in taken) in (tokens, tokens - 1)  # a single token predicts nothing
        assert all(length == 10 for _, length in taken[:-1])
        weight = sum(length - 1 for _, length in taken)
        assert loss == pytest.approx(sum(Recorder.value(variant, s) * (n - 1) for s, n in taken) / weight)
        seen.append(sorted(taken))
    assert tokens == 80 or seen.count(seen[0]) < 4


def test_windows_where_nothing_counts_are_not_drawn() -> None:
    weights = torch.zeros(6, 10)
    weights[1, 4], weights[4, 1], weights[5, 0] = 1, 2, 9  # a window's first token is not predicted
    for tokens, counting in ((20, {1, 4}), (3, {4})):
        compute = Recorder()
        score = windows_of(compute, weights, "drawn", [tokens])
        for generation in range(3):
            assert math.isfinite(score([frozenset({BLOCKS[generation]})], tokens, generation, 0)[0])
        assert {sample for _, sample, _ in compute.asked} == counting
    for tokens in (30, 21 + 1, 1, 0, -5):
        with pytest.raises(InvalidOptionError):
            windows_of(Recorder(), weights, "first", [tokens])


@pytest.mark.parametrize("criterion", ["kl", "ppl"])
def test_the_losses_are_those_of_the_pruned_models(criterion: Any) -> None:
    dense = standing("qwen2", "lopsided")
    tokens = weighted(tiny_tokens(dense, 4, 9), seed=1)
    score = WindowLosses(
        Sweeper(dense, Run()),
        tokens,
        key="t",
        windows="first",
        criterion=criterion,
        asked={"initial_tokens": [9], "selection_tokens": [22]},
    )
    variants = [frozenset({Part(0, "attention"), Part(3, "mlp")}), frozenset({Part(1, "block")}), frozenset[Part]()]
    pieces = [tokens.first(1), tokens.first(2), Tokens.of(tokens.ids[2:3, :4], tokens.weights[2:3, :4])]
    loss = mean_nll if criterion == "ppl" else (lambda model, part: mean_kl(dense, model, part))

    def whole(model: Model, parts: Sequence[Tokens]) -> float:
        counts = [float(part.weights[:, 1:].sum()) for part in parts]
        return sum(loss(model, part) * n for part, n in zip(parts, counts, strict=True)) / sum(counts)

    for step, (asked, parts) in enumerate([(9, pieces[:1]), (22, pieces[1:])]):
        got = score(variants, asked, 0, step)
        assert got == pytest.approx([whole(without(dense, v), parts) for v in variants], rel=1e-4, abs=1e-6)


# --- the method ---


@pytest.mark.slow
@pytest.mark.parametrize(("family", "units"), [("llama", "modules"), ("opt", "modules"), ("phi3", "blocks")])
def test_modules_that_add_nothing_go(family: str, units: str) -> None:
    silent = (
        [Part(1, "block"), Part(4, "block")] if units == "blocks"
        else [Part(0, "attention"), Part(4, "attention"), Part(2, "mlp"), Part(4, "mlp")]
    )  # fmt: skip
    model = still(tiny(family, num_hidden_layers=6), *silent)
    run = Run()
    pruning = prune(model, tiny_tokens(model, 4, 8), Budget(1 / 3), run, units=units, generations=20, offspring=10)
    edits = {"attention": DropAttention, "mlp": DropMLP, "block": DropBlock}
    assert edit_facts(pruning.edits) == edit_facts([edits[part.kind](part.block) for part in sorted(silent)])
    curve = run.notes["best kl by generation, in nats"]
    assert len(curve) == 21
    assert curve[-1] == pytest.approx(0, abs=1e-6) != curve[0]


def test_a_run_broken_off_goes_on_to_the_same_end() -> None:
    tokens, chosen = tiny_tokens(tiny("llama"), 6, 8), {"generations": 4, "selection_tokens": "8,20"}
    whole = Run(1)
    want = prune(tiny("llama"), tokens, Budget(0.5), whole, **chosen).edits

    class Breaks(MemoryStore):
        broken = True

        def put(self, key: str, value: Any) -> None:
            if key == "evopress/3/1" and self.broken:
                raise KeyboardInterrupt
            super().put(key, value)

    store = Breaks()
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("llama"), tokens, Budget(0.5), Run(1, store=store), **chosen)
    store.broken, resumed = False, Run(1, store=store)
    assert edit_facts(prune(tiny("llama"), tokens, Budget(0.5), resumed, **chosen).edits) == edit_facts(want)
    assert resumed.notes == whole.notes
    assert whole.notes.keys() == {"reduced", "best kl by generation, in nats"}
    assert 0 < resumed.meter.block_tokens < whole.meter.block_tokens


def test_another_seed_draws_otherwise() -> None:
    tokens = tiny_tokens(tiny("llama"), 6, 8)
    runs = [Run(seed) for seed in (0, 1, 2)]
    for run in runs:
        prune(tiny("llama"), tokens, Budget(0.5), run, generations=1)
    assert len({tuple(run.notes["best kl by generation, in nats"]) for run in runs}) == 3


# --- constants ---


def test_where_blocks_lack_modules_the_share_is_of_those_there() -> None:
    layout = tiny("llama").layout()
    for edit in (DropAttention(0), DropAttention(2), DropMLP(3)):
        layout = predict(layout, edit)
    space = search_space(layout, Budget(0.5), "modules")
    assert {kind: len(parts) for kind, parts in space.parts.items()} == {"attention": 2, "mlp": 3}
    assert space.gone == {"attention": 1, "mlp": 2}
    for edit in (DropMLP(0), DropMLP(1), DropAttention(1)):
        layout = predict(layout, edit)
    with pytest.raises(InfeasibleBudgetError):
        search_space(layout, Budget(0.6), "modules")


@pytest.mark.parametrize(
    ("smaller", "tokens", "figures"),
    [({}, 131072, []),
     ({"generations": 9, "offspring": 64, "survivors": "4,2,1", "selection_tokens": "2048,32768,65536"}, 131072, []),
     ({"generations": 1}, 131072, ["1", "2"]),
     ({"selection_tokens": "2048,4096", "offspring": 8}, 8192,
      ["8", "32", "2,048", "4,096", "2,048", "32,768", "8,192", "131,072"]),
     ({"survivors": "1", "selection_tokens": "32768"}, 131072, ["1", "2", "1", "32,768", "2,048", "32,768"])],
    ids=["full", "more", "generations", "tokens", "one step"],
)  # fmt: skip
def test_a_smaller_search_than_the_papers_says_so(smaller: dict[str, Any], tokens: int, figures: list[str]) -> None:
    chosen = METHOD.complete(smaller)
    del chosen["criterion"], chosen["windows"]
    said = reduced(search_of(standing("llama").layout(), Budget(0.5), **chosen), tokens)
    assert re.findall(r"\d[\d,]*", said) == figures  # what is less, and in full
