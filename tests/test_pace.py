"""How long a grid will still take: a simulated grid on a fake clock, whose parts cost otherwise than was foretold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from secateur.study.pace import Pace, Standing

METHODS = {"dense": "dense", **{f"{m}-{n}": m for n in range(4) for m in ("2ssp", "slimgpt")}}
KEPT = {"dense": 1.0, **{name: 0.8 - 0.1 * int(name[-1]) for name in METHODS if name != "dense"}}
FORETOLD = {
    name: {
        **({"prune": 50.0} if name != "dense" else {}),
        "perplexity": 100 * kept, "tasks": 200 * kept, "inference": 10 * (1 + kept), "generation": 20 * kept,
    }
    for name, kept in KEPT.items()
}  # fmt: skip
# What a part really takes for a second foretold: text by beams is far dearer than was thought, SlimGPT solves.
TRUE = {"perplexity": 1.2, "tasks": 0.5, "inference": 2.0, "generation": 30.0}
PRUNE = {"2ssp": 1.0, "slimgpt": 9.0}


class Simulated:
    """Runs the cells on a clock of its own and notes every standing, with what really was left then."""

    def __init__(self, there: dict[str, dict[str, float]] | None = None) -> None:
        self.now, self.seen = 0.0, list[tuple[Standing, float]]()
        self.there = there or {}
        self.todo = [name for name in METHODS if name not in self.there]
        self.end = sum(self.cost(name, part) for name in self.todo for part in FORETOLD[name])
        self.pace = Pace(FORETOLD, METHODS, self.there, clock=lambda: self.now, show=self.note)

    def cost(self, name: str, part: str) -> float:
        return FORETOLD[name][part] * (PRUNE[METHODS[name]] if part == "prune" else TRUE[part])

    def note(self, standing: Standing) -> None:
        self.seen.append((standing, self.end - self.now))

    def run(self) -> dict[str, dict[str, float]]:
        took = {}
        for name in self.todo:
            with self.pace.cell(name) as took[name]:
                for part in FORETOLD[name]:
                    self.run_part(name, part)
        return took

    def run_part(self, name: str, part: str, bars: int = 4) -> None:
        with self.pace.part(name, part, bars=bars) as observer:
            for _ in range(bars):
                with observer.progress("a bar", 5) as advance:
                    for _ in range(5):
                        self.now += self.cost(name, part) / 5 / bars
                        advance(1)


@pytest.fixture(scope="module")
def whole() -> Simulated:
    simulated = Simulated()
    simulated.took = simulated.run()  # type: ignore[attr-defined]
    return simulated


def test_after_one_cell_of_each_kind_what_is_left_is_known(whole: Simulated) -> None:
    late = [(standing, left) for standing, left in whole.seen if standing.finished >= 3]
    assert len(late) > 400
    for standing, left in late:
        assert standing.left_s == pytest.approx(left, rel=0.01, abs=1e-6)
        assert standing.guessed == ()


def test_after_the_dense_cell_only_prunings_are_guessed(whole: Simulated) -> None:
    standing, left = next(each for each in whole.seen if each[0].finished == 1)
    assert standing.guessed == (("prune", "2ssp"), ("prune", "slimgpt"))
    unknown = 4 * 50 * (9.0 - 1.2)  # SlimGPT's solving; until it is timed its walk is counted, at perplexity's pace
    assert standing.left_s == pytest.approx(left - unknown, rel=0.03)
    first = whole.seen[0][0]
    assert first.left_s < left / 2  # before anything is timed: the probe, which says nothing of beams
    assert ("generation", "") in first.guessed


def test_a_part_s_own_pace_counts_the_more_the_further_it_is(whole: Simulated) -> None:
    during = [s for s, _ in whole.seen if (s.cell, s.part) == ("dense", "generation")]
    assert [s.done for s in during] == pytest.approx([step / 20 for step in range(21)])
    rest = during[0].left_s - 20.0 * 1.2  # the part itself, as it was guessed
    own = [s.left_s - rest for s in during]
    assert own[0] == pytest.approx(24)
    assert own[15] == pytest.approx(600 / 4, rel=0.3)
    assert own[-1] == pytest.approx(0, abs=1e-6)


def test_times_of_finished_cells_count_after_a_restart(whole: Simulated) -> None:
    there = {name: whole.took[name] for name in ("dense", "2ssp-0", "slimgpt-0")}  # type: ignore[attr-defined]
    assert there["slimgpt-0"]["prune"] == pytest.approx(450)
    again = Simulated(there)
    again.run()
    first, left = again.seen[0]
    assert (first.finished, first.guessed) == (3, ())
    assert first.left_s == pytest.approx(left, rel=0.01)


def test_a_part_that_fails_teaches_nothing_and_is_no_longer_to_come() -> None:
    simulated = Simulated()

    @contextmanager
    def failing() -> Iterator[None]:
        with pytest.raises(RuntimeError, match="worm"), simulated.pace.cell("dense") as took:
            yield
        assert took == {}

    with failing(), simulated.pace.part("dense", "perplexity"):
        simulated.now += 1e6
        raise RuntimeError("a worm in the wood")
    last = simulated.seen[-1][0]
    assert (last.finished, last.part) == (1, "")
    assert last.left_s == pytest.approx(sum(sum(parts.values()) for n, parts in FORETOLD.items() if n != "dense"))
    assert ("perplexity", "") in last.guessed


def test_a_bar_that_goes_on_from_where_it_was_is_one_bar() -> None:
    """A pruning opens its one bar for each of its steps, with what is done already."""
    simulated = Simulated()
    with simulated.pace.cell("2ssp-0"), simulated.pace.part("2ssp-0", "prune") as observer:
        for begun in (0.0, 4.0):
            with observer.progress("steps", 10, begun) as advance:
                advance(4)
        assert simulated.seen[-1][0].done == pytest.approx(0.8)
        with observer.progress("more than was foretold", 10, 8) as advance:
            advance(40)
        assert simulated.seen[-1][0].done == 1
