"""Goals instead of sparsities: what is found meets them, no smaller step would, and it is what that sparsity gives."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import HIDDEN, NO_ENDS, parameters, tiny, tiny_tokens
from oracles import write_model, write_texts
from test_cli import call
from torch import Tensor

import secateur
from secateur import Goal, Judging, Tokens, planning
from secateur.engine.tokens import read_tokens
from secateur.errors import InfeasibleBudgetError, InvalidOptionError, OutputExistsError
from secateur.goals import Plans
from secateur.judge.perplexity import perplexity
from secateur.model.handle import Model, with_random_weights
from secateur.model.layout import Layout
from secateur.planning import Request, plan
from secateur.quantities import bytes_of, share_of, tokens_of
from secateur.running import prune_to

IDS = torch.randint(5, 97, (600,), generator=torch.Generator().manual_seed(0))
WINDOWS = {"calibration": IDS, "samples": 3, "length": 16}


def weights(model: Model) -> list[Tensor]:
    return [parameter.detach() for parameter in model.hf.parameters()]


# --- how they are written ---


def test_quantities_are_read_as_people_write_them() -> None:
    assert [bytes_of(size) for size in ("200MB", "1.5 GB", "2GiB", "3kb", 17)] == [2e8, 1.5e9, 2**31, 3000, 17]
    assert [tokens_of(number) for number in ("4096", "32k", "1M", 5)] == [4096, 32768, 2**20, 5]
    assert [share_of(share) for share in ("0.25", "25%", 0.25, "150 %")] == [0.25, 0.25, 0.25, 1.5]


@pytest.mark.parametrize(
    ("read", "wrong"),
    [*((bytes_of, each) for each in ("200", "0MB", "-1GB", "big", "1XB", 0, -5, True, None, 2.5)),
     *((tokens_of, each) for each in ("0", "-1", "4.5k", "32g", "", None)),
     *((share_of, each) for each in ("much", "", None, "nan", "inf"))],
)  # fmt: skip
def test_other_quantities_are_refused(read: Any, wrong: object) -> None:
    with pytest.raises(InvalidOptionError, match="the size is a"):
        read(wrong, "the size")


@pytest.mark.parametrize(
    "wrong",
    [{}, {"target_bytes": "1MB", "target_speedup": 2.0}, {"target_bytes": "much"}, {"target_speedup": 1.0},
     {"max_perplexity_increase": 0}, {"target_bytes": "1MB", "tolerance": 0.5},
     {"target_speedup": 2.0, "speedup_of": "head"}],
    ids=str,
)  # fmt: skip
def test_a_goal_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError):
        Goal(**wrong)


# --- the search ---


@dataclass(frozen=True)
class Made:
    """A plan of so many units that are gone."""

    gone: int
    approximate: bool = False

    @property
    def after(self) -> Layout:
        return Layout({}, 1000 - self.gone, NO_ENDS)


GOALS = (
    Goal(target_bytes=1, tolerance=0.01),
    Goal(target_speedup=2.0),
    Goal(max_perplexity_increase=1.0),
)


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.name)
@pytest.mark.parametrize("unit", [1, 7])
def test_the_search_finds_what_trying_all_would(goal: Goal, unit: int) -> None:
    """Of figures that go one way; sparsities below 5 % and above 83 % cannot be reached, units are coarse."""

    def plan_at(sparsity: float) -> Made:
        if not 0.05 <= sparsity <= 0.83:
            raise InfeasibleBudgetError("out of reach")
        return Made(int(100 * sparsity + 0.5) // unit * unit)

    reached = {place: plan_at(place / 100) for place in range(5, 84)}
    for turn in range(4, 90, 3):
        measured: list[Made] = []

        def figure(made: Made, turn: int = turn, measured: list[Made] = measured) -> float:
            measured.append(made)
            return goal.asked + (made.gone - turn if goal.is_loss or goal.name == "speedup" else turn - made.gone)

        good = [place for place, made in reached.items() if goal.meets(figure(made))]
        if not good:
            with pytest.raises(InfeasibleBudgetError, match="cannot be reached"):
                Plans(goal, plan_at).meet(figure)
            continue
        best, value, tried = Plans(goal, plan_at).meet(figure)
        assert best == reached[max(good) if goal.is_loss else min(good)]
        if goal.is_loss:
            assert any(best is made for made in measured)  # so that nothing of it is done again
        assert value == figure(best)
        assert len(tried) == len({value for _, value in tried}) <= 7


def test_gaps_between_sparsities_are_looked_across() -> None:
    def plan_at(sparsity: float) -> Made:
        if 0.1 < sparsity < 0.4:
            raise InfeasibleBudgetError("a gap")
        return Made(int(100 * sparsity + 0.5))

    made, _, _ = Plans(GOALS[0], plan_at).meet(lambda made: 45.0 - made.gone)
    assert made.gone == 44
    plans = Plans(GOALS[0], plan_at)
    made, _, _ = plans.meet(lambda made: 8.0 - made.gone)
    assert made.gone == 7
    before, behind = plans.at(10), plans.at(40)
    assert before is not None
    assert plans.smaller(before) is behind


@pytest.mark.parametrize("reach", range(50, 100, 3))
def test_the_next_smaller_is_found_up_to_the_method_s_reach(reach: int) -> None:
    def plan_at(sparsity: float) -> Made:
        if sparsity > reach / 100:
            raise InfeasibleBudgetError("out of reach")
        return Made(int(100 * sparsity + 0.5))

    for place in range(45, reach):
        plans = Plans(GOALS[0], plan_at)
        there = plans.at(place)
        assert there is not None
        assert plans.smaller(there) is plans.at(place + 1)
    plans = Plans(GOALS[0], plan_at)
    last = plans.at(reach)
    assert last is not None
    with pytest.raises(InfeasibleBudgetError, match=f"at a sparsity of {reach / 100:.4g}"):
        plans.smaller(last)


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.name)
@pytest.mark.parametrize(("low", "high"), [(10, 40), (60, 80)])
def test_a_goal_that_is_crossed_in_a_gap_is_met_at_its_edge(goal: Goal, low: int, high: int) -> None:
    def plan_at(sparsity: float) -> Made:
        if low / 100 < sparsity < high / 100:
            raise InfeasibleBudgetError("a gap")
        return Made(int(100 * sparsity + 0.5))

    sign = -1 if goal.name == "bytes" else 1
    made, _, _ = Plans(goal, plan_at).meet(lambda made: goal.asked + sign * (made.gone - (low + high) / 2))
    assert made.gone == (low if goal.is_loss else high)


# --- bytes ---


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [("llama", "2ssp", {"stage1_only": True}), ("llama", "blockpruner", {}),
     *(pytest.param(*each, {}, marks=pytest.mark.slow) for each in (("gemma2", "2ssp"), ("llama", "slicegpt"),
                                                                    ("gpt2", "slimgpt"), ("llama", "shortgpt")))],
)  # fmt: skip
def test_bytes_are_met_by_the_smallest_sparsity(family: str, method: str, options: dict[str, Any]) -> None:
    """Of BlockPruner, whose units differ in size, a real pruning may leave more than its rehearsal: more is tried."""
    model = tiny(family)
    tokens, target = tiny_tokens(model, 3, 16), int(4 * parameters(model) * 0.8)
    pruned = secateur.prune(model, method, goal=Goal(target_bytes=target), calibration=tokens, **options)
    goal, sparsity = pruned.record.goal, pruned.record.sparsity
    assert goal is not None
    assert sparsity is not None
    assert goal.got == pruned.record.after.weight_bytes == sum(each.nbytes for each in weights(model)) <= target
    same = secateur.prune(tiny(family), method, sparsity=sparsity.asked, calibration=tokens, **options)
    assert all(map(torch.equal, weights(same.model), weights(model)))
    assert same.record.fingerprint == pruned.record.fingerprint
    assert same.record.cost.forwards == pruned.record.cost.forwards
    for step in (1, 2, 9) if method != "blockpruner" else ():  # no smaller one meets it
        with suppress(InfeasibleBudgetError):
            request = Request(sparsity=sparsity.asked - step / 1000, method=method, options=options, calibration=tokens)
            assert plan(request, tiny(family)).after.parameters * 4 > target


def test_bytes_out_of_reach_are_told() -> None:
    model = tiny("llama")
    for target, error, message in (
        (4 * parameters(model), InvalidOptionError, "already"),
        (4 * 97 * HIDDEN, InfeasibleBudgetError, r"nearest is [\d.]+ MB"),
    ):
        with pytest.raises(error, match=message):
            secateur.prune(model, goal=Goal(target_bytes=target), calibration=tiny_tokens(model, 3, 16))
    with pytest.raises(InvalidOptionError, match="not both"):
        secateur.prune(model, sparsity=0.3, goal=Goal(target_bytes=100_000), calibration=tiny_tokens(model, 3, 16))
    assert model.edits_applied == 0


# --- speed ---


@pytest.mark.parametrize("method", ["2ssp", pytest.param("slicegpt", marks=pytest.mark.slow)])
def test_speed_is_that_of_the_layouts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes by the parameters."""
    timed = []

    def speedup(dense: Model, smaller: Model, run: object = None, **settings: object) -> float:
        assert all(each.isfinite().all() and each.abs().max() < 10 for each in weights(smaller))
        timed.append((smaller.layout(), settings))
        return parameters(dense) / parameters(smaller)

    monkeypatch.setattr(planning, "speedup", speedup)
    model = tiny("llama")
    goal = Goal(target_speedup=1.4, speedup_of="prompt", judging=Judging(batch_size=3))
    pruned = secateur.prune(model, method, goal=goal, calibration=tiny_tokens(model, 3, 16))
    met = pruned.record.goal
    assert met is not None
    assert met.got == parameters(tiny("llama")) / parameters(model) >= 1.4
    assert any(layout == model.layout() for layout, _ in timed)
    assert timed[0][1] == met.by
    assert (met.by["of"], met.by["batch_size"]) == ("prompt", 3)
    again = tiny("llama")
    with pytest.raises(InfeasibleBudgetError, match=r"at least 900 times the speed .* nearest is [\d.]+ times"):
        secateur.prune(again, method, goal=Goal(target_speedup=900), calibration=tiny_tokens(again, 3, 16))


def test_a_dense_model_and_a_smaller_one_are_timed() -> None:
    from secateur.judge.inference import speedup

    dense = tiny("llama")
    smaller = with_random_weights(plan(Request(sparsity=0.5, method="slicegpt"), dense).config, dense.dtype, "cpu")
    for of in ("prompt", "token"):
        assert speedup(dense, smaller, of=of, prompt_length=8, new_tokens=2, rounds=2) > 0


# --- loss ---


@pytest.mark.parametrize(
    ("method", "by_name"), [("2ssp", True), *(pytest.param(*each, marks=pytest.mark.slow) for each in
                                              (("2ssp", False), ("slimgpt", False), ("blockpruner", True)))]
)  # fmt: skip
def test_a_loss_is_kept_on_windows_held_out(method: str, by_name: bool, tmp_path: Path) -> None:
    source: Any = write_model(tmp_path / "model") if by_name else tiny("llama")
    goal = Goal(max_perplexity_increase="2%", judging=Judging(samples=8), tolerance=0.05)
    pruned = secateur.prune(source, method, goal=goal, **WINDOWS)
    record, met = pruned.record, pruned.record.goal
    assert met is not None
    assert record.sparsity is not None
    model = tiny("llama")
    held_out = read_tokens(model, IDS, purpose="calibration", samples=11, length=16).ids[3:]
    dense, after = perplexity(model, Tokens.of(held_out)), perplexity(pruned.model, Tokens.of(held_out))
    assert met.got == pytest.approx(after.perplexity / dense.perplexity - 1, rel=1e-6)
    assert met.got <= 0.02
    assert [(each.before, each.after) for each in record.perplexity or ()] == [(dense.perplexity, after.perplexity)]
    same = secateur.prune(tiny("llama"), method, sparsity=record.sparsity.asked, **WINDOWS)
    assert all(map(torch.equal, weights(same.model), weights(pruned.model)))
    assert same.record.fingerprint == record.fingerprint
    assert record.cost.forwards == same.record.cost.forwards
    assert met.cost.forwards is not None
    assert met.cost.forwards > (record.cost.forwards or 0)
    beyond = [value for sparsity, value in met.tried if sparsity > record.sparsity.asked]
    assert all(value > 0.02 for value in beyond)


def test_a_loss_needs_a_text_that_is_not_calibrated_on() -> None:
    model = tiny("llama")
    with pytest.raises(InvalidOptionError, match="--perplexity TEXT"):
        secateur.prune(model, goal=Goal(max_perplexity_increase=0.1), calibration=tiny_tokens(model, 3, 16))
    with pytest.raises(InvalidOptionError, match="foretold"):
        plan(Request(goal=Goal(max_perplexity_increase=0.1)), model)


# --- into a folder ---


def test_the_same_goal_again_finds_its_result(tmp_path: Path) -> None:
    model, (text, _) = write_model(tmp_path / "model"), write_texts(tmp_path)
    held_out = tmp_path / "held out.txt"
    held_out.write_text(Path(text).read_text())
    judging = Judging(texts=[str(held_out)], length=16, samples=4)
    request = Request(
        goal=Goal(max_perplexity_increase=0.3, judging=judging, tolerance=0.1),
        method="2ssp", calibration=text, samples=3, length=16, options={"stage1_only": True},
    )  # fmt: skip
    first = prune_to(request, model, tmp_path / "out")
    again = prune_to(request, model, tmp_path / "out")
    assert (first.was_there, again.was_there) == (False, True)
    assert again.record.goal == first.record.goal
    other = replace(request, goal=Goal(target_bytes="130KB"))
    with pytest.raises(OutputExistsError):
        prune_to(other, model, tmp_path / "out")
    held_out.write_text(held_out.read_text()[::-1])  # the text of the same name is another one now
    with pytest.raises(OutputExistsError):
        prune_to(request, model, tmp_path / "out")


def test_the_command_takes_one_goal(tmp_path: Path) -> None:
    model, (text, _) = write_model(tmp_path / "model"), write_texts(tmp_path)
    words = ("prune", model, "--method", "2ssp", "--calibration", text, "--samples", 3, "--length", 16, "--stage1-only")
    told = call(*words, "--target-bytes", "130KB", "--dry-run", "--json")
    assert told.code == 0, told.err
    assert told.json["disk_bytes"] <= 130_000 == told.json["goal"]["asked"]
    told = call(*words, "--target-bytes", "130KB", "--out", tmp_path / "out")
    assert told.code == 0, told.err
    assert "at most 0.1 MB of weights, got 0.1 MB" in told.out
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["goal"]["got"] <= 130_000
    assert "searched for a goal" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 1.1 * 130_000
    for wrong in (
        (),
        ("--sparsity", 0.3, "--target-speedup", 2),
        ("--target-bytes", "much"),
        ("--target-bytes", "1KB"),
        ("--target-bytes", "130KB", "--rounds", 9),
        ("--sparsity", 0.3, "--tolerance", 0.02),
    ):
        told = call(*words, *wrong, "--out", tmp_path / "no")
        assert told.code == 3, told.out
    assert not (tmp_path / "no").exists()
