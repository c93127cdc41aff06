"""How long a grid will still take: a simulated grid on a fake clock, whose parts cost otherwise than was foretold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles import write_texts
from secateur.grid.clocked import Clocked, Shared
from studies import comparison, grid
from torch import Tensor

from secateur.engine.tokens import Tokens
from secateur.grid import compare
from secateur.grid.pace import Pace, Standing
from secateur.model.handle import Model
from secateur.solvers import greedy

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
        self.pace = Pace(FORETOLD, METHODS, self.there, {}, clock=lambda: self.now, show=self.note)

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
    """For itself and for all to come of its kind."""
    during = [s for s, _ in whole.seen if (s.cell, s.part) == ("dense", "generation")]
    assert [s.done for s in during] == pytest.approx([step / 20 for step in range(21)])
    later = sum(parts["generation"] for name, parts in FORETOLD.items() if name != "dense")
    rest = during[0].left_s - 1.2 * (20 + later)  # the other parts; this one is guessed by perplexity's pace
    wrong = [30 * (20 * (1 - s.done) + later) - (s.left_s - rest) for s in during]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[10] < wrong[0] / 2
    assert wrong[-1] == pytest.approx(0, abs=1e-6)


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


# --- prunings that take steps over ---

ROUNDS = [60.0 - 2 * place for place in range(18)]  # seconds
# By method, how the keys of its shared steps begin, and by sparsity the seconds of these and of those that are its own.
SHARING: dict[str, tuple[str, list[tuple[list[float], list[float]]]]] = {
    "2ssp": ("scores", [([150.0], [40.0] * 3), ([150.0], [40.0] * 5), ([150.0], [40.0] * 8)]),
    "shortgpt": ("influence", [([100.0], [])] * 3),
    "blockpruner": ("blockpruner/", [(ROUNDS[:count], []) for count in (10, 14, 18)]),
}
CELLS = [(method, place) for place in range(3) for method in SHARING]  # in a grid's order


def alone(method: str, place: int) -> float:
    shared, own = SHARING[method][1][place]
    return sum(shared) + sum(own)


class Pruned:
    """Prunes with real shared stores, on a clock of its own; probed, everything was thought to be twice as fast."""

    def __init__(self, there: dict[str, dict[str, float]]) -> None:
        self.now, self.seen = 0.0, list[tuple[Standing, float]]()
        self.todo = [(method, place) for method, place in CELLS if f"{method}-{place}" not in there]
        stores = {method: Shared(beginning) for method, (beginning, _) in SHARING.items()}
        self.shared = {f"{method}-{place}": stores[method] for method, place in CELLS}
        self.pace = Pace(
            {f"{m}-{n}": {"prune": alone(m, n) / 2, "perplexity": 5.0} for m, n in CELLS},
            {f"{m}-{n}": m for m, n in CELLS}, there, self.shared,
            clock=lambda: self.now, show=lambda standing: self.seen.append((standing, self.now)),
        )  # fmt: skip
        self.took = {f"{method}-{place}": self.cell(method, place) for method, place in self.todo}

    def cell(self, method: str, place: int) -> dict[str, float]:
        name = f"{method}-{place}"
        shared, own = SHARING[method][1][place]
        with self.pace.cell(name) as took:
            with self.pace.part(name, "prune") as observer:
                run = Clocked(0, shared=self.shared[name], observer=observer, clock=lambda: self.now)
                run.expect(sum(shared) + sum(own), 0, head=0)
                self.steps(run, SHARING[method][0], shared)
                self.steps(run, "own/", own)
            with self.pace.part(name, "perplexity"):
                self.now += 10
        return took

    def steps(self, run: Clocked, beginning: str, seconds: Sequence[float]) -> None:
        """A token through a block takes a second."""

        def work(each: float) -> float:
            with run.progress("a step", 2) as advance:
                for _ in range(2):
                    self.now += each / 2
                    run.meter.block_tokens += int(each / 2)
                    advance(1)
            return each

        for place, each in enumerate(seconds):
            assert run.step(f"{beginning}{place}", lambda each=each: work(each)) == each

    def misjudged(self) -> list[tuple[int, float, float]]:
        """At every move: the finished cells, the time left as foretold, and as it was."""
        return [(standing.finished, standing.left_s, self.now - now) for standing, now in self.seen]


@pytest.fixture(scope="module")
def sharing() -> Pruned:
    return Pruned({})


def test_what_is_taken_over_is_not_foretold_again(sharing: Pruned) -> None:
    later = sum(alone(method, place) for method, place in CELLS[3:])
    known = next(n for n, (s, _) in enumerate(sharing.seen) if s.cell == "blockpruner-0" and s.done > 0.999)
    late = sharing.misjudged()[known:]
    assert late[0][2] < later / 2  # more is taken over than done
    for _, left, real in late:
        assert left == pytest.approx(real, rel=0.01, abs=1e-6)


def test_a_pruning_that_takes_steps_over_reaches_its_end(sharing: Pruned) -> None:
    for method, place in CELLS:
        done = [s.done for s, _ in sharing.seen if (s.cell, s.part) == (f"{method}-{place}", "prune")]
        assert done == sorted(done)
        assert done[-1] == pytest.approx(1)
    assert sharing.took["blockpruner-2"]["prune"] == pytest.approx(sum(ROUNDS))  # as if run alone


@pytest.mark.parametrize("finished", range(3, 9))
def test_after_a_restart_what_was_shared_is_done_again(sharing: Pruned, finished: int) -> None:
    there = {f"{method}-{place}": sharing.took[f"{method}-{place}"] for method, place in CELLS[:finished]}
    for _, left, real in Pruned(there).misjudged():
        assert left == pytest.approx(real, rel=0.01, abs=1e-6)


def test_a_grid_s_cells_share_one_store_and_say_what_lies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which each candidate of BlockPruner's rounds takes a second, and nothing else anything."""
    now, seen = [0.0], list[Standing]()
    text, real = write_texts(tmp_path)[0], greedy.sweep

    def slow(model: Model, tokens: Tokens, variants: Sequence[Any], *rest: Any, **more: Any) -> Tensor:
        now[0] += len(variants)
        return real(model, tokens, variants, *rest, **more)

    monkeypatch.setattr(greedy, "sweep", slow)
    wanted = comparison(text, "blockpruner", sparsities=(0.25, 0.5, 0.75))
    here = replace(grid(tmp_path / "out", text), clock=lambda: now[0], shown=seen.append)
    cells = list(compare(wanted, here).values())[1:]
    assert [cell["seconds"] for cell in cells] == [
        {"prune": alone, "shared": alone, "perplexity": 0.0} for alone in (8 + 7, 8 + 7 + 6 + 5, 8 + 7 + 6 + 5 + 4 + 3)
    ]
    assert [cell["seconds"]["prune"] for cell in cells] == [cell["prune"]["wall_s"] for cell in cells]
    assert now == [8 + 7 + 6 + 5 + 4 + 3]
    after_one = next(standing for standing in seen if standing.finished == 2)  # with the dense one
    assert after_one.left_s == pytest.approx(now[0] - 15, rel=0.1)
