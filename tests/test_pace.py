"""How long a grid will take: what is foretold of its cells' parts, and what is left while they are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from oracles import planned, write_texts
from studies import comparison, grid

from secateur.engine.tokens import Tokens
from secateur.forecast import Speed
from secateur.grid import compare, pace
from secateur.grid.cells import Cell
from secateur.grid.pace import GENERATION, INFERENCE, PERPLEXITY, PRUNE, TASKS, Foretold, Pace, Standing, foretell
from secateur.judge.generation import REFERENCE_DECODING
from secateur.judge.judging import Judge, Judging
from secateur.model.budget import Budget
from secateur.run import Meter
from secateur.sharing import Shared, SharingRun

MANY = Judging(
    texts=("a", "b"), length=10, tasks=("piqa",), inference=True, prompt_length=8, new_tokens=4, rounds=2, batch_size=3,
    prompts=("x", "y"), decodings=(REFERENCE_DECODING,),
)  # fmt: skip
# A block's token takes a second, the head's a millionth: so both can be read off the sum. Tokens one by one: tens.
SPEED = Speed(1.0, 1e-6, {n: Speed(10.0, 1e-5) for n in (1, 3, 5)})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))[0]


class Asked(Judge):
    """A judge whose tasks are of so many tokens."""

    def task_tokens(self) -> float:
        return 1000.0 if self.judging.tasks else 0.0


def foretold(text: Path, judging: Judging, *methods: str, **more: Any) -> dict[str, Foretold]:
    model = tiny("llama")
    texts = {"a": Tokens.of(torch.zeros(153, 10, dtype=torch.long))} if judging.texts else {}
    return foretell(comparison(text, *methods, **more).cells(model), model, Asked(judging, ()), texts, SPEED)


def test_a_cell_costs_its_pruning_and_what_is_left_of_its_blocks(text: Path) -> None:
    cells = foretold(text, MANY, "shortgpt", sparsities=(0.5,))
    for name, kept in (("dense", 1.0), ("shortgpt-0.5", 0.5)):
        blocks, new = 4 * kept, 3 * 4  # of inference: three rounds, of two models
        assert cells[name].parts == pytest.approx({
            **({PRUNE: cells[name].parts[PRUNE]} if kept < 1 else {}),
            PERPLEXITY: 1530 * blocks + 0.00153,
            TASKS: 1000 * blocks + 0.001,
            INFERENCE: (3 * 3 * 8 + 10 * new) * (4 + blocks) + 2 * new * 1e-5,
            GENERATION: 2 * 2 * 128 * (10 * blocks + 1e-5),
        }, rel=1e-9)  # fmt: skip
    meter = planned(tiny("llama"), "shortgpt", Budget(0.5), 2, 24).meter
    assert cells["shortgpt-0.5"].parts[PRUNE] == pytest.approx(meter.block_tokens)
    assert pace.sequences(MANY) == {1, 3, 5}


def test_what_is_not_asked_for_is_no_part(text: Path) -> None:
    cells = foretold(text, Judging(texts=("a",)), "2ssp")
    assert [set(cell.parts) for cell in cells.values()] == [{PERPLEXITY}, {PRUNE, PERPLEXITY}]
    assert set(foretold(text, Judging(tasks=("piqa",)))["dense"].parts) == {TASKS}
    assert pace.sequences(Judging(texts=("a",))) == set()


def test_a_cell_that_is_made_already_or_refused_costs_nothing(text: Path) -> None:
    cells = foretold(text, MANY, "2ssp", "shortgpt", "window", sparsities=(0.3, 0.5, 0.95), matched=True)
    same = {name: cell.same_as for name, cell in cells.items() if cell.same_as is not None}
    assert same == {
        "2ssp-as-shortgpt-0.5": "2ssp-0.5", "2ssp-as-window-0.5": "2ssp-0.5",
        "2ssp-as-window-0.3": "2ssp-as-shortgpt-0.3",  # a quarter
    }  # fmt: skip
    refused = {name for name, cell in cells.items() if cell.refused is not None}
    assert refused == {f"{name}-0.95" for name in ("shortgpt", "window", "2ssp-as-shortgpt", "2ssp-as-window")}
    assert all(cells[name].seconds == 0 for name in {*same, *refused})


# --- while it runs ---

METHODS = {"dense": "dense", **{f"{m}-{n}": m for n in range(4) for m in ("2ssp", "slimgpt")}}
SECONDS = {PRUNE: 50.0, PERPLEXITY: 100.0, TASKS: 200.0, INFERENCE: 20.0, GENERATION: 20.0}
FORETOLD = {name: {part: SECONDS[part] for part in pace.PARTS if (name, part) != ("dense", PRUNE)} for name in METHODS}
# What a part really takes for a second foretold: text by beams is far dearer than was thought, SlimGPT solves.
TRUE = {PERPLEXITY: 1.2, TASKS: 0.5, INFERENCE: 2.0, GENERATION: 30.0, "2ssp": 1.0, "slimgpt": 9.0}


def true(name: str, part: str) -> float:
    return SECONDS[part] * TRUE[METHODS[name] if part == PRUNE else part]


def paced(
    finished: Mapping[str, Mapping[str, float]], clock: Callable[[], float], show: Callable[[Standing], None]
) -> Pace:
    cells = [Cell(name=name, method=method, label=name) for name, method in METHODS.items()]
    parts = {cell.name: pace.parts_of(cell, Foretold(parts=FORETOLD[cell.name]), Shared()) for cell in cells}
    return Pace(parts, finished, clock=clock, show=show)


class Simulated:
    """Runs the cells on a clock of its own and notes every standing, with what really was left then."""

    def __init__(self, finished: Mapping[str, Mapping[str, float]]) -> None:
        self.now, self.seen = 0.0, list[tuple[Standing, float]]()
        todo = [name for name in METHODS if name not in finished]
        self.end = sum(true(name, part) for name in todo for part in FORETOLD[name])
        self.pace = paced(finished, lambda: self.now, self.note)
        self.took = {name: self.cell(name) for name in todo}

    def note(self, standing: Standing) -> None:
        self.seen.append((standing, self.end - self.now))

    def cell(self, name: str) -> dict[str, float]:
        with self.pace.cell(name) as took:
            for part in FORETOLD[name]:
                with self.pace.part(name, part, bars=4) as observer:
                    for _ in range(4):
                        with observer.progress("a bar", 5) as advance:
                            for _ in range(5):
                                self.now += true(name, part) / 20
                                advance(1)
        return took


@pytest.fixture(scope="module")
def whole() -> Simulated:
    return Simulated({})


def test_what_is_left_is_known_after_one_cell_of_each_kind_and_guessed_before(whole: Simulated) -> None:
    first, left = whole.seen[0]
    assert first.left_s < left / 2  # the probe says nothing of beams
    assert {(GENERATION, ""), (PRUNE, "slimgpt")} <= set(first.guessed)
    dense = next(standing for standing, _ in whole.seen if standing.finished == 1)
    assert dense.guessed == ((PRUNE, "2ssp"), (PRUNE, "slimgpt"))
    late = [(standing, left) for standing, left in whole.seen if standing.finished >= 3]
    assert len(late) > 400
    for standing, left in late:
        assert (standing.left_s, standing.guessed) == (pytest.approx(left, rel=0.01, abs=1e-6), ())


def test_a_part_s_own_pace_counts_the_more_the_further_it_is(whole: Simulated) -> None:
    """For itself and for all to come of its kind."""
    during = [(s, left) for s, left in whole.seen if (s.cell, s.part) == ("dense", GENERATION)]
    assert [standing.done for standing, _ in during] == pytest.approx([step / 20 for step in range(21)])
    missed = [left - standing.left_s for standing, left in during]
    assert missed == sorted(missed, reverse=True)
    unknown = sum(true(name, PRUNE) - 1.2 * SECONDS[PRUNE] for name in METHODS if name != "dense")
    assert missed[0] > 2 * missed[-1]
    assert missed[-1] == pytest.approx(unknown)  # prunings, which are thought to be as fast as perplexity


def test_times_of_finished_cells_count_after_a_restart(whole: Simulated) -> None:
    finished = {name: whole.took[name] for name in ("dense", "2ssp-0", "slimgpt-0")}
    assert finished["slimgpt-0"][PRUNE] == pytest.approx(450)
    first, left = Simulated(finished).seen[0]
    assert (first.finished, first.guessed) == (3, ())
    assert first.left_s == pytest.approx(left, rel=0.01)


def test_a_part_that_fails_teaches_nothing_and_is_no_longer_to_come() -> None:
    now, seen = [0.0], list[Standing]()
    running = paced({}, lambda: now[0], seen.append)
    with suppress(RuntimeError), running.cell("dense") as took, running.part("dense", PERPLEXITY):
        now[0] += 1e6
        raise RuntimeError("a worm in the wood")
    assert took == {}
    assert (seen[-1].finished, seen[-1].part) == (1, "")
    assert seen[-1].left_s == pytest.approx(sum(sum(FORETOLD[name].values()) for name in METHODS if name != "dense"))
    assert (PERPLEXITY, "") in seen[-1].guessed


def test_a_bar_that_goes_on_from_where_it_was_is_one_bar() -> None:
    """A pruning opens its one bar for each of its steps, with what is done already."""
    seen: list[Standing] = []
    running = paced({}, lambda: 0.0, seen.append)
    with running.cell("2ssp-0"), running.part("2ssp-0", PRUNE) as observer:
        for begun, work, done in ((0.0, 4, 0.4), (4.0, 4, 0.8), (8.0, 40, 1.0)):  # at last more than was foretold
            with observer.progress("steps", 10, begun) as advance:
                advance(work)
            assert seen[-1].done == pytest.approx(done)


def test_of_several_workers_the_longest_chain_counts() -> None:
    """Two hands, three cells of which two are one hand's; a worker that was killed begins its cell again."""
    now, seen = [0.0], list[Standing]()
    parts = {
        name: pace.parts_of(Cell(name=name, method=name, label=name), Foretold(parts={PERPLEXITY: seconds}), Shared())
        for name, seconds in (("a", 60.0), ("b", 40.0), ("c", 20.0))
    }
    chains = {"a": 1, "b": 1, "c": 2}
    running = Pace(parts, {}, clock=lambda: now[0], show=seen.append, hands=2, chains=chains)
    running.heard("a", PERPLEXITY, 0.0, {})
    assert seen[-1].left_s == pytest.approx(100)
    running.heard("c", PERPLEXITY, 0.0, {})
    now[0] = 60.0  # twice as slow as was foretold
    running.heard("a", PERPLEXITY, 0.5, {})
    running.heard("c", PERPLEXITY, 1.0, {})
    assert (seen[-1].cell, seen[-1].beside) == ("a", (("c", PERPLEXITY, 1.0),))
    running.heard("a", PERPLEXITY, 0.0, {})
    assert seen[-1].done == 0
    running.over("c", {PERPLEXITY: 40.0})
    running.over("a", {PERPLEXITY: 120.0})
    assert (seen[-1].finished, seen[-1].left_s) == (2, pytest.approx(80))
    running.heard("a", PERPLEXITY, 0.9, {})  # late mail
    assert (seen[-1].finished, seen[-1].part) == (2, "")


# --- prunings that take steps over ---

ROUNDS = [60.0 - 2 * place for place in range(18)]  # seconds of a series, of which a larger sparsity asks for more
SHARING = [("scores", [150.0] + [40.0] * own) for own in (3, 5, 8)], [("rounds/", ROUNDS[:n]) for n in (10, 14, 18)]


def test_what_a_pruning_takes_over_is_not_foretold_again() -> None:
    """Three sizes of a method with one shared step, and of one with a series; all takes twice what was foretold."""
    now, seen = [0.0], list[tuple[Standing, float]]()
    cells = {f"{steps[place][0]}{place}": steps[place] for place in range(3) for steps in SHARING}
    stores = {beginning: Shared(beginning) for beginning in ("scores", "rounds/")}
    parts = {
        name: pace.parts_of(
            Cell(name=name, method=beginning, label=name), Foretold(parts={PRUNE: sum(steps) / 2}), stores[beginning]
        )
        for name, (beginning, steps) in cells.items()
    }  # fmt: skip
    running = Pace(parts, {}, clock=lambda: now[0], show=lambda standing: seen.append((standing, now[0])))

    def work(run: SharingRun, seconds: float) -> float:
        with run.progress("a step", 2) as advance:
            for _ in range(2):
                now[0] += seconds / 2
                run.meter.block_tokens += int(seconds / 2)
                advance(1)
        return seconds

    for name, (beginning, steps) in cells.items():
        with running.cell(name) as took, running.part(name, PRUNE) as observer:
            run = SharingRun(0, stores[beginning], observer=observer, clock=lambda: now[0])
            run.store.open(name)
            run.expect(Meter(int(sum(steps))), head=0)
            for place, seconds in enumerate(steps):
                key = f"{beginning}{place}" if beginning == "rounds/" or place == 0 else f"own {place}"
                assert run.step(key, partial(work, run, seconds)) == seconds
        assert took == {PRUNE: pytest.approx(sum(steps))}  # as if run alone
        done = [standing.done for standing, _ in seen if standing.cell == name]
        assert done == sorted(done)
        assert done[-1] == pytest.approx(1)
    known = [(standing, now[0] - then) for standing, then in seen if standing.finished >= 2]
    assert known[0][1] < sum(sum(steps) for _, steps in list(cells.values())[2:]) / 2  # more is taken over than done
    for standing, left in known:  # of a series' further rounds it is not known that they will lie there
        assert left * 0.999 - 1e-6 <= standing.left_s
        assert standing.left_s <= (1.001 * left + 1e-6 if standing.finished >= 4 else 2 * left)


def test_a_grid_s_cells_share_one_store(text: Path, tmp_path: Path) -> None:
    cells = compare(comparison(text, "blockpruner", sparsities=(0.25, 0.5, 0.75)), grid(tmp_path / "out", text))
    pruned = [cell for cell in cells.values() if cell.prune]
    forwards = [cell.prune.forwards for cell in pruned]
    assert forwards == sorted(set(forwards))  # each has the rounds of those before it, and its own
    assert [cell.prune.wall_s for cell in pruned] == pytest.approx([cell.seconds[PRUNE] for cell in pruned], abs=0.2)
