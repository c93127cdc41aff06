"""A run's journal, random numbers, progress and meter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import Watcher

from secateur.errors import JournalError
from secateur.run import MemoryStore, Meter, Rehearsal, Run


def draw(run: Run, *key: str | int) -> list[float]:
    return torch.rand(4, generator=run.rng(*key)).tolist()


def test_random_numbers_depend_on_seed_and_key_only() -> None:
    keys: list[tuple[str | int, ...]] = [(), ("a",), ("b",), ("a", 1), ("a", 2), (1,), ("1",), ("a", "1"), ("a1",)]
    drawn = {(seed, key): draw(Run(seed), *key) for seed in (0, 1, 2) for key in keys}
    assert len({tuple(each) for each in drawn.values()}) == len(drawn)
    run = Run(1)
    for key in reversed(keys):  # another order, and something drawn between
        run.rng("between").seed()
        assert draw(run, *key) == drawn[1, key]
        assert draw(run, *key) == drawn[1, key]


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    draw(Run(3), "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert draw(Run(3), "a") == draw(Run(3), "a")
    torch.set_rng_state(state)


def test_a_step_is_computed_once_and_then_recalled() -> None:
    store, calls = MemoryStore(), []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"scores": torch.arange(3), "best": [1.5, None]}

    first = Run(store=store).step("a", compute)
    again = Run(store=store).step("a", compute)
    assert len(calls) == 1
    assert torch.equal(first["scores"], again["scores"])
    assert first["best"] == again["best"] == [1.5, None]
    assert Run(store=store).step("b", lambda: 2) == 2
    assert Run().step("a", lambda: 3) == 3  # another run's journal is another journal


def test_a_key_serves_once_in_a_run() -> None:
    store = MemoryStore()
    for _ in ("computed", "recorded"):
        run = Run(store=store)
        run.step("a", lambda: 1)
        with pytest.raises(ValueError, match="'a'"):
            run.step("a", lambda: 2)


def test_a_step_that_fails_is_not_recorded() -> None:
    store, calls = MemoryStore(), []

    def fail() -> int:
        calls.append(1)
        raise KeyError("a")  # not taken for a missing record

    with pytest.raises(KeyError):
        Run(store=store).step("a", fail)
    assert len(calls) == 1
    assert Run(store=store).step("a", lambda: 5) == 5


def test_nobody_can_change_what_was_recorded() -> None:
    store = MemoryStore()
    mine = {"x": torch.zeros(2), "list": [1]}
    given = Run(store=store).step("a", lambda: mine)
    for each in (mine, given, Run(store=store).step("a", lambda: mine)):
        each["x"] += 1
        each["list"].append(2)
    kept = store.get("a")
    assert kept["x"].tolist() == [0, 0]
    assert kept["list"] == [1]


def test_forwards_are_whole_sequences_through_all_blocks() -> None:
    whole = Meter(block_tokens=30 * 2048 * 3, head_tokens=2048 * 3, asked_tokens=30 * 2048 * 5)
    assert whole.forwards(30, 2048, head=8) == 3
    assert whole.forwards_asked(30, 2048) == 5
    assert Meter(head_tokens=2048).forwards(30, 2048, head=10) == 1 / 4  # a head that costs ten blocks of forty


def test_after_expect_all_stages_share_one_bar() -> None:
    watcher = Watcher()
    run = Run(observer=watcher)
    with run.progress("alone", 10) as done:
        done(4)
        done(6)
    run.expect(Meter(100, 10), head=2.0)
    with run.progress("one", 7) as done:
        run.meter.block_tokens += 30
        done(1)
        run.meter.block_tokens += 30
        done(6)
    with run.progress("two", 3) as done:
        run.meter.block_tokens += 40
        done(1)
        run.meter.head_tokens += 10
        done(2)
    assert watcher.shown == [("alone", 10, 10), ("one (whole run)", 120, 60), ("two (whole run)", 120, 120)]


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.5, "x", [1, [2.0, "a"]], {"a": {"b": [None]}}, {"t": torch.zeros(2)}], ids=str
)
def test_what_a_store_on_disk_could_keep_is_kept(value: Any) -> None:
    assert repr(Run().step("a", lambda: value)) == repr(value)


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, {3}, b"x", 1j, [{"a": (1,)}], object()], ids=lambda v: type(v).__name__
)
def test_what_a_store_on_disk_could_not_keep_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="step 'key' gave a"):
        Run().step("key", lambda: value)


class Rounding(MemoryStore):
    """Keeps less than it was given, as a store on disk might."""

    def put(self, key: str, value: Any) -> None:
        super().put(key, round(value))


def test_a_step_gives_what_was_stored() -> None:
    store = Rounding()
    assert Run(store=store).step("a", lambda: 0.7) == Run(store=store).step("a", lambda: 9.9) == 1


def test_parts_of_a_run_have_keys_and_randomness_of_their_own() -> None:
    run = Run(seed=3)
    one, two = run.scoped("one"), run.scoped("two")
    parts = (run, one, two, one.scoped("two"))
    assert [part.step("states", lambda n=n: n) for n, part in enumerate(parts)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="one/states"):
        run.scoped("one").step("states", lambda: 4)
    draws = {float(torch.rand((), generator=part.rng("x"))) for part in (run, one, two, Run(seed=4))}
    assert len(draws) == 4
    one.meter.block_tokens += 5
    two.note("said", "by two")
    assert (run.meter.block_tokens, run.notes) == (5, {"said": "by two"})


def test_a_store_belongs_to_one_job() -> None:
    store = MemoryStore()
    store.open("a")
    store.open("a")
    with pytest.raises(JournalError):
        store.open("b")


def test_a_rehearsal_adds_up_what_is_held_at_once() -> None:
    run = Rehearsal()
    run.step("a", lambda: [torch.empty(10, 10, device="meta"), {"b": torch.empty(5)}], scratch_bytes=700)
    with run.holding(300), run.scoped("part").holding(500):
        run.hold(100)
    assert run.held_bytes == 100  # a result lies on the disk
    assert run.peak_bytes == 300 + 500 + 100
    assert run.loss_of("x") == run.loss_of("x") != run.loss_of("y")


# --- notes ---


def test_notes_are_kept_as_they_were_said() -> None:
    run, curve = Run(), [3.5]
    run.note("curve", curve)
    curve.append(2.0)
    assert run.notes == {"curve": [3.5]}
    run.note("curve", curve)
    assert run.notes == {"curve": [3.5, 2.0]}


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")], torch.ones(2), {1, 2}, {"a": b""}])
def test_what_a_record_cannot_hold_is_no_note(value: Any) -> None:
    run = Run()
    with pytest.raises((TypeError, ValueError)):
        run.note("x", value)
    assert run.notes == {}
